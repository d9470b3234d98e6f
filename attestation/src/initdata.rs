//! initdata 0.1.0: what the pod's owner binds to the launch.
//!
//! Owns: the TOML form, its digest, and how the digest fits into a TEE's field. Does not own: what its entries mean
//! (`config`, `policy`), or who reads the field.
//!
//! Source: Trustee's `kbs/docs/initdata.md` and the code that reads it in Kata's agent and in guest-components.

use std::collections::BTreeMap;

use serde::Deserialize;
use thiserror::Error;

use crate::hash::{HashAlgorithm, UnknownAlgorithm};

/// The only version that upstream's agent accepts.
pub const VERSION: &str = "0.1.0";
/// Longest text, in bytes: it has to fit into one control message and into the KBS's request.
pub const LONGEST: usize = 1 << 20;

/// Why a text is no initdata, or not the one that was launched with.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum InitdataError {
    /// Over [`LONGEST`].
    #[error("initdata: {0} bytes, at most {LONGEST} are accepted")]
    TooLong(usize),
    /// Not of the form.
    #[error("initdata: {0}")]
    Form(String),
    /// Another version.
    #[error("initdata: version {0:?} is not known: write version = \"{VERSION}\"")]
    Version(String),
    /// Another digest.
    #[error("initdata: {0}")]
    Algorithm(#[from] UnknownAlgorithm),
    /// The host gave another one than it launched with.
    #[error(
        "initdata: digest {found} is not the one bound to this launch, {bound} in {field}: nothing of it is used"
    )]
    Mismatch {
        /// Digest of what came, fitted, in hexadecimal.
        found: String,
        /// What the TEE holds, in hexadecimal.
        bound: String,
        /// `HOST_DATA` or `MRCONFIGID`.
        field: &'static str,
    },
}

#[derive(Deserialize)]
struct Text {
    version: String,
    algorithm: String,
    #[serde(default)]
    data: BTreeMap<String, String>,
}

/// Initdata, read but not yet compared with the launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initdata {
    raw: String,
    algorithm: HashAlgorithm,
    data: BTreeMap<String, String>,
}

impl Initdata {
    /// Reads the text.
    ///
    /// # Errors
    /// [`InitdataError`], naming what is wrong.
    pub fn parse(raw: &[u8]) -> Result<Self, InitdataError> {
        if raw.len() > LONGEST {
            return Err(InitdataError::TooLong(raw.len()));
        }
        let raw = std::str::from_utf8(raw).map_err(|e| InitdataError::Form(e.to_string()))?;
        let text: Text = toml::from_str(raw).map_err(|e| InitdataError::Form(e.message().to_owned()))?;
        if text.version != VERSION {
            return Err(InitdataError::Version(text.version));
        }
        let algorithm = HashAlgorithm::from_name(&text.algorithm)?;
        Ok(Self { raw: raw.to_owned(), algorithm, data: text.data })
    }

    /// The text as it came; what the digest is over, and what a KBS gets.
    #[must_use]
    pub fn raw(&self) -> &str {
        &self.raw
    }

    /// Which digest it names.
    #[must_use]
    pub fn algorithm(&self) -> HashAlgorithm {
        self.algorithm
    }

    /// The digest over the raw bytes.
    #[must_use]
    pub fn digest(&self) -> Vec<u8> {
        self.algorithm.digest(self.raw.as_bytes())
    }

    /// The digest as a TEE's field of `N` bytes holds it.
    #[must_use]
    pub fn bound<const N: usize>(&self) -> [u8; N] {
        fit(&self.digest())
    }

    /// One entry, such as `policy.rego`.
    #[must_use]
    pub fn entry(&self, name: &str) -> Option<&str> {
        self.data.get(name).map(String::as_str)
    }

    /// Names of the entries.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.data.keys().map(String::as_str)
    }

    /// Compares with what the TEE holds.
    ///
    /// # Errors
    /// [`InitdataError::Mismatch`].
    pub fn check_bound<const N: usize>(
        &self,
        bound: &[u8; N],
        field: &'static str,
    ) -> Result<(), InitdataError> {
        let found = self.bound::<N>();
        if found == *bound {
            return Ok(());
        }
        let hex = crate::encoding::to_hex;
        Err(InitdataError::Mismatch { found: hex(&found), bound: hex(bound), field })
    }
}

/// Cuts a digest at the end, or fills it with zeros.
#[must_use]
pub fn fit<const N: usize>(digest: &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let length = digest.len().min(N);
    field[..length].copy_from_slice(&digest[..length]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::to_hex;
    use proptest::prelude::*;

    const VECTOR: &str = "algorithm = \"sha384\"\nversion = \"0.1.0\"\n\n[data]\n\"key1\" = \"value1\"\n";

    #[test]
    fn the_worked_vector_hashes_the_same() {
        let initdata = Initdata::parse(VECTOR.as_bytes()).unwrap();
        let digest = "ad344b89d2a0c99aad897d9b86bb5d3e47a81d10a68ff85d050dfac2463a542023b209996e7f8ff001e588df394d1d09";
        assert_eq!(to_hex(&initdata.digest()), digest);
        assert_eq!(to_hex(&initdata.bound::<32>()), digest[..64]);
        assert_eq!(to_hex(&initdata.bound::<64>()), format!("{digest}{}", "0".repeat(32)));
        assert_eq!(initdata.entry("key1"), Some("value1"));
    }

    #[test]
    fn white_space_is_part_of_it() {
        let initdata = Initdata::parse(VECTOR.as_bytes()).unwrap();
        let spaced = Initdata::parse(format!("{VECTOR}\n").as_bytes()).unwrap();
        let message = spaced.check_bound(&initdata.bound::<32>(), "HOST_DATA").unwrap_err().to_string();
        assert!(message.contains("is not the one bound to this launch, ad344b89"), "{message}");
        initdata.check_bound(&initdata.bound::<48>(), "MRCONFIGID").unwrap();
    }

    #[test]
    fn other_versions_and_algorithms_are_named() {
        let message = |from: &str, to: &str| {
            Initdata::parse(VECTOR.replace(from, to).as_bytes()).unwrap_err().to_string()
        };
        assert!(message("0.1.0", "0.1.1").contains("version \"0.1.1\" is not known"));
        assert!(message("sha384", "md5").contains("\"md5\" is not known"));
        assert!(message("version", "wersion").contains("missing field `version`"));
        assert!(matches!(Initdata::parse(&vec![b'a'; LONGEST + 1]), Err(InitdataError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn any_text_is_initdata_or_an_error(text in "\\PC{0,200}") {
            let _ = Initdata::parse(text.as_bytes());
        }

        #[test]
        fn any_change_of_the_bytes_changes_what_is_bound(place in any::<prop::sample::Index>(), byte in 32u8..127) {
            let mut changed = VECTOR.as_bytes().to_vec();
            let at = place.index(changed.len());
            prop_assume!(changed[at] != byte);
            changed[at] = byte;
            let bound = Initdata::parse(VECTOR.as_bytes()).unwrap().bound::<32>();
            if let Ok(other) = Initdata::parse(&changed) {
                prop_assert!(other.check_bound(&bound, "HOST_DATA").is_err());
            }
        }
    }
}
