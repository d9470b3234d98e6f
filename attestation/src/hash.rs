//! The digests that initdata and the KBS's protocol name.
//!
//! Owns: algorithms by name. Does not own: what is hashed.

use serde::Serialize;
use sha2::{Digest, Sha256, Sha384, Sha512};
use thiserror::Error;

/// A digest algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its name")]
pub enum HashAlgorithm {
    Sha256,
    Sha384,
    Sha512,
}

/// A name that is none of ours.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("digest algorithm {0:?} is not known: use sha256, sha384 or sha512")]
pub struct UnknownAlgorithm(pub String);

impl HashAlgorithm {
    /// As initdata and challenges spell it; upper and lower case are the same.
    ///
    /// # Errors
    /// [`UnknownAlgorithm`].
    pub fn from_name(name: &str) -> Result<Self, UnknownAlgorithm> {
        match name.to_ascii_lowercase().as_str() {
            "sha256" => Ok(Self::Sha256),
            "sha384" => Ok(Self::Sha384),
            "sha512" => Ok(Self::Sha512),
            _ => Err(UnknownAlgorithm(name.to_owned())),
        }
    }

    /// Its name in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// The digest: 32, 48 or 64 bytes.
    #[must_use]
    pub fn digest(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::digest(bytes).to_vec(),
            Self::Sha384 => Sha384::digest(bytes).to_vec(),
            Self::Sha512 => Sha512::digest(bytes).to_vec(),
        }
    }
}

/// RFC 8785 canonical JSON of a value.
///
/// # Panics
/// Never for the types of this crate: they are plain data with text keys.
#[must_use]
pub fn canonical_json(value: &impl Serialize) -> Vec<u8> {
    serde_json_canonicalizer::to_vec(value).expect("plain data with text keys always serialises")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::to_hex;
    use serde_json::json;

    #[test]
    fn trustees_vector_of_canonical_json_hashes_the_same() {
        // Unit test of trustee:attestation-service/src/lib.rs.
        let json = canonical_json(&json!({ "b": 1, "a": "test", "c": { "d": "e" } }));
        let digest = HashAlgorithm::Sha384.digest(&json);
        assert_eq!(
            to_hex(&digest),
            "e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c4597480a186427c813ca941da78870c3"
        );
    }

    #[test]
    fn names_are_initdatas() {
        assert_eq!(HashAlgorithm::from_name("SHA384"), Ok(HashAlgorithm::Sha384));
        for name in ["sha256", "sha384", "sha512"] {
            assert_eq!(HashAlgorithm::from_name(name).unwrap().name(), name);
        }
        // The specification's spelling, which upstream's code refuses too.
        assert!(HashAlgorithm::from_name("sha-256").is_err());
    }
}
