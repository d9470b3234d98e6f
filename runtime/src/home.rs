//! Where the other parts of an installation are: next to this program, or where COFFER_HOME says.

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
            // The VMM is started in another directory.
            return std::path::absolute(home).map(Self).map_err(crate::error::host("find COFFER_HOME"));
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

    /// The image for a number of processors under a TEE: `snp`, `snp-emulated`, or none. Every TEE's kernel is an smp one; the
    /// emulated machine has its C-bit elsewhere, so that no image is for both. What an owner says (initdata, an image that
    /// the guest unpacks) is for an init that the image for one processor does not have: it would be a third larger.
    #[must_use]
    pub fn image(&self, vcpus: u32, tee: Option<&str>, owner: bool) -> PathBuf {
        self.0.join(match (tee, vcpus) {
            (Some("snp-emulated"), _) => "images/smp-emulated.igvm",
            (Some("snp"), _) | (_, 2..) => "images/smp.igvm",
            _ if owner => "images/smp.igvm",
            _ => "images/up.igvm",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_machine_has_an_image_of_its_own_and_nothing_else_gets_it() {
        let home = Home("/h".into());
        let name = |vcpus, tee| home.image(vcpus, tee, false).display().to_string();
        assert_eq!(name(1, Some("snp-emulated")), "/h/images/smp-emulated.igvm");
        assert_eq!(name(1, Some("snp")), "/h/images/smp.igvm");
        for tee in [None, Some("none")] {
            assert_eq!(
                (name(1, tee), name(2, tee)),
                ("/h/images/up.igvm".into(), "/h/images/smp.igvm".into())
            );
            assert_eq!(home.image(1, tee, true).display().to_string(), "/h/images/smp.igvm");
        }
    }
}
