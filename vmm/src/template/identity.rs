//! Which file it is, and whether it is still what it was, without reading it where that can be known.
//!
//! Owns: the comparison. A file of the same inode, size and times has the same content: the kernel alone sets the time of change.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What the kernel says of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Of an open file.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A file with its content's digest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    identity: Identity,
    sha256: String,
}

impl Content {
    /// Reads a file.
    ///
    /// # Errors
    /// The system's.
    pub fn of(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let identity = Identity::of(&file.metadata()?);
        let (mut digest, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => digest.update(&buffer[..count]),
            }
        }
        Ok(Self { identity, sha256: hex(&digest.finalize()) })
    }

    /// Whether `path` has the same content. It is read only when it is another file, or was touched.
    ///
    /// # Errors
    /// The system's.
    pub fn is(&self, path: &Path) -> io::Result<bool> {
        let now = Identity::of(&fs::metadata(path)?);
        if now == self.identity {
            return Ok(true);
        }
        Ok(now.size == self.identity.size && Self::of(path)?.sha256 == self.sha256)
    }
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_the_same_and_a_changed_byte_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        fs::write(&one, b"abc").unwrap();
        let content = Content::of(&one).unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(content.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(content.is(&one).unwrap());
        fs::copy(&one, &two).unwrap();
        assert!(content.is(&two).unwrap());
        fs::write(&one, b"abd").unwrap();
        assert!(!content.is(&one).unwrap());
        fs::write(&one, b"abcd").unwrap();
        assert!(!content.is(&one).unwrap());
    }
}
