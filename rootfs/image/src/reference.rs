//! How an image of a layout is named: `[oci:]DIRECTORY[:TAG][@DIGEST]`.
//!
//! Owns: the text. Skopeo's and umoci's `oci:DIRECTORY:TAG` read the same.

use std::{fmt, path::PathBuf, str::FromStr};

use thiserror::Error;

use crate::digest::{Digest, DigestError};

/// Not a reference.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// The digest half.
    #[error("reference: {0}")]
    Digest(#[from] DigestError),
    /// The rest.
    #[error("reference {0:?}: want DIRECTORY[:TAG][@sha256:…]")]
    Shape(String),
}

/// A reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The layout.
    pub path: PathBuf,
    /// By name.
    pub tag: Option<String>,
    /// By content.
    pub digest: Option<Digest>,
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let shape = || ReferenceError::Shape(text.to_owned());
        let rest = text.strip_prefix("oci:").unwrap_or(text);
        let (rest, digest) = match rest.rsplit_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (rest, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        let good = |tag: &str| {
            !tag.is_empty() && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b))
        };
        if path.is_empty() || tag.is_some_and(|tag| !good(tag)) {
            return Err(shape());
        }
        Ok(Self { path: path.into(), tag: tag.map(str::to_owned), digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tag = self.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        let text = format!("{}{tag}", self.path.display());
        // A directory whose own name begins so needs the scheme before it.
        f.write_str(if text.starts_with("oci:") { "oci:" } else { "" })?;
        f.write_str(&text)?;
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_apart() {
        let digest = Digest::sha256(b"");
        let all = format!("/a/b:1.0@{digest}");
        let r: Reference = format!("oci:{all}").parse().unwrap();
        assert_eq!(
            (r.path.to_str(), r.tag.as_deref(), &r.digest),
            (Some("/a/b"), Some("1.0"), &Some(digest))
        );
        assert_eq!(r.to_string(), all);
        let r: Reference = "dir:x/layout".parse().unwrap();
        assert_eq!((r.path.to_str(), r.tag), (Some("dir:x/layout"), None));
        // Found by fuzzing: what is shown must read back as itself.
        for text in ["oci:oci:a", "oci:oci:/a/a"] {
            let r: Reference = text.parse().unwrap();
            assert_eq!(r.to_string().parse(), Ok(r));
        }
        for bad in ["", ":tag", "a:", "a:b c", "a@sha256:00", "@"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
