//! Annotations of a confidential pod: what protects it, and the owner's initdata.
//!
//! Owns: `io.coffer.tee` and `io.coffer.initdata`, and that the launch is bound to the initdata's digest. Does not own:
//! what initdata says; the guest reads it.

use std::{fs::File, io::Read, path::PathBuf};

use coffer_attestation::initdata::Initdata;
use oci_spec::runtime::Spec;

use crate::error::{Error, host};

/// Longest initdata in bytes that is read from its file; the guest's own bound is smaller.
const MOST_INITDATA: u64 = 1 << 20;

/// What the annotations say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confidential {
    /// `none`, `snp`, `snp-emulated`: the VMM's words.
    pub tee: Option<String>,
    /// File with the initdata.
    pub file: Option<PathBuf>,
}

impl Confidential {
    /// Reads the annotations.
    ///
    /// # Errors
    /// [`Error::Bundle`], naming the annotation.
    pub fn of(spec: &Spec) -> Result<Self, Error> {
        let annotation = |key: &str| spec.annotations().as_ref().and_then(|a| a.get(key)).cloned();
        let tee = annotation("io.coffer.tee");
        if let Some(tee) = &tee
            && !["none", "snp", "snp-emulated"].contains(&tee.as_str())
        {
            let wrong = format!("annotation io.coffer.tee={tee} is none of none, snp, snp-emulated");
            return Err(Error::Bundle(wrong));
        }
        let file = annotation("io.coffer.initdata").map(PathBuf::from);
        if let Some(file) = file.as_ref().filter(|file| !file.is_absolute()) {
            let wrong = format!("annotation io.coffer.initdata={} is not an absolute path", file.display());
            return Err(Error::Bundle(wrong));
        }
        Ok(Self { tee, file })
    }

    /// The initdata's text.
    ///
    /// # Errors
    /// The file's, or that it is not text.
    pub fn initdata(&self) -> Result<Option<String>, Error> {
        let Some(path) = &self.file else { return Ok(None) };
        let mut text = String::new();
        let read = File::open(path).and_then(|file| file.take(MOST_INITDATA).read_to_string(&mut text));
        read.map_err(host(format!("read initdata {}", path.display())))?;
        Ok(Some(text))
    }

    /// Flags of the VMM: the TEE, and the digest that its launch is bound to.
    ///
    /// # Errors
    /// As [`Confidential::initdata`], or that it is not initdata.
    pub fn flags(&self) -> Result<Vec<String>, Error> {
        let Some(tee) = self.tee.as_deref().filter(|tee| *tee != "none") else { return Ok(Vec::new()) };
        let mut flags = vec!["--tee".to_owned(), tee.to_owned()];
        if let Some(text) = self.initdata()? {
            let initdata = Initdata::parse(text.as_bytes()).map_err(|e| Error::Bundle(e.to_string()))?;
            let digest =
                initdata.bound::<32>().iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
            flags.extend(["--host-data".to_owned(), digest]);
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launch_is_bound_to_the_files_digest() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("initdata.toml");
        // The worked vector of upstream's format; HOST_DATA is the first 32 bytes of its SHA-384.
        let text = "algorithm = \"sha384\"\nversion = \"0.1.0\"\n\n[data]\n\"key1\" = \"value1\"\n";
        std::fs::write(&file, text).unwrap();
        let mut confidential = Confidential { tee: Some("snp-emulated".into()), file: Some(file) };
        assert_eq!(
            confidential.flags().unwrap(),
            [
                "--tee",
                "snp-emulated",
                "--host-data",
                "ad344b89d2a0c99aad897d9b86bb5d3e47a81d10a68ff85d050dfac2463a5420"
            ]
        );
        assert_eq!(confidential.initdata().unwrap().as_deref(), Some(text));
        confidential.tee = None;
        assert!(confidential.flags().unwrap().is_empty());
    }
}
