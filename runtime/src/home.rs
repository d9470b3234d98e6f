//! Where the other parts of an installation are: next to this program, whatever the environment says.

use std::path::PathBuf;

use crate::error::Error;

/// An installation: `bin/coffer-vmm` and `images/`.
#[derive(Clone, Debug)]
pub struct Home(PathBuf);

impl Home {
    /// COFFER_HOME, or the directory above this program's.
    ///
    /// # Errors
    /// When this program's own path cannot be read.
    pub fn find() -> Result<Self, Error> {
        if let Some(home) = std::env::var_os("COFFER_HOME") {
            return Ok(Self(home.into()));
        }
        let program =
            std::fs::read_link("/proc/self/exe").map_err(crate::error::host("read /proc/self/exe"))?;
        Ok(Self(program.ancestors().nth(2).unwrap_or(&program).to_owned()))
    }

    /// The VMM.
    #[must_use]
    pub fn vmm(&self) -> PathBuf {
        self.0.join("bin/coffer-vmm")
    }

    /// The image for a number of processors.
    #[must_use]
    pub fn image(&self, vcpus: u32) -> PathBuf {
        self.0.join(if vcpus > 1 { "images/smp.igvm" } else { "images/up.igvm" })
    }
}
