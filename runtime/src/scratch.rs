//! The scratch disk of a pod: `io.coffer.scratch=SIZE`, room for images that the guest unpacks beyond its memory.
//!
//! Owns: the annotation, the file. Does not own: what lies on it; the guest encrypts it under a key that the host never has.
//!
//! The file is sparse and has no name: it is gone with the VMM's process, however that ends.

use std::{collections::HashMap, fs, fs::File, os::unix::fs::OpenOptionsExt, path::PathBuf};

use oci_spec::runtime::Spec;

use crate::error::{Error, host};

/// The annotation.
const NAME: &str = "io.coffer.scratch";
const LEAST: u64 = 16 << 20;
const MOST: u64 = 1 << 40;
/// Where files lie, unless the operator says otherwise: on a disk, as opposed to /run and often /tmp.
const PLACE: &str = "/var/tmp";
/// The operator's word: a file whose only line is a directory.
const CONFIGURED: &str = "/etc/coffer/scratch";
/// The guest keeps nonce and tag of each of these in its memory.
const BLOCK: u64 = 4096;
const TAG: u64 = 28;

/// Bytes that a configuration's annotation asks for.
///
/// # Errors
/// [`Error::Bundle`], naming it.
pub fn wanted(spec: &Spec) -> Result<Option<u64>, Error> {
    spec.annotations().as_ref().and_then(|a| a.get(NAME)).map(|text| size(text)).transpose()
}

/// `N`, `NM`, `NG`: bytes, MiB, GiB.
fn size(text: &str) -> Result<u64, Error> {
    let (digits, unit) = match text.strip_suffix(['M', 'm']) {
        Some(digits) => (digits, 1 << 20),
        None => text.strip_suffix(['G', 'g']).map_or((text, 1), |digits| (digits, 1 << 30)),
    };
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten();
    let bytes = number.and_then(|n| n.checked_mul(unit)).filter(|n| (LEAST..=MOST).contains(n));
    bytes.map(|bytes| bytes.next_multiple_of(BLOCK)).ok_or_else(|| {
        Error::Bundle(format!("annotation {NAME}={text} is not a size from 16M to 1024G, such as 2G"))
    })
}

/// Whether a container may have it in a VM that runs, whose first container had these annotations.
///
/// # Errors
/// [`Error::Bundle`].
pub fn check(wanted: Option<u64>, pod: Option<&HashMap<String, String>>) -> Result<(), Error> {
    match pod {
        Some(pod) if wanted.is_some() && !pod.contains_key(NAME) => Err(Error::Bundle(format!(
            "annotation {NAME}: the pod's VM runs already, without a scratch disk: annotate the pod's first container"
        ))),
        _ => Ok(()),
    }
}

/// MiB of the guest's memory that a disk of so many bytes takes.
#[must_use]
pub fn memory_mib(bytes: u64) -> u64 {
    (bytes / BLOCK * TAG).div_ceil(1 << 20)
}

/// Makes the disk's file, which has no name.
///
/// # Errors
/// The system's, naming the directory and the file that configures it.
pub fn make(bytes: u64) -> Result<File, Error> {
    let configured = fs::read_to_string(CONFIGURED).ok().map(|text| PathBuf::from(text.trim()));
    let place = configured.filter(|path| path.is_absolute()).unwrap_or_else(|| PLACE.into());
    let failed =
        host(format!("make a scratch disk in {} ({CONFIGURED} names another place)", place.display()));
    let open = File::options().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(&place);
    open.and_then(|file| file.set_len(bytes).map(|()| file)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_and_bounded() {
        for (text, bytes) in
            [("16M", 16 << 20), ("2G", 2 << 30), ("2g", 2 << 30), ("16777217", (16 << 20) + 4096)]
        {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "G", "15M", "1025G", "+2G", "2T", "99999999999999999999G", "-1", "2 G"] {
            let message = size(text).unwrap_err().to_string();
            assert!(message.contains("is not a size"), "{text}: {message}");
        }
        // 28 bytes for each of 262144 blocks.
        assert_eq!(memory_mib(1 << 30), 7);
    }

    #[test]
    fn a_vm_that_runs_gets_no_disk() {
        let pod = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        check(Some(1), None).unwrap();
        check(Some(1), Some(&pod(&[(NAME, "2G")]))).unwrap();
        check(None, Some(&pod(&[]))).unwrap();
        assert!(check(Some(1), Some(&pod(&[]))).is_err());
    }

    #[test]
    fn the_file_is_sparse_and_has_no_name() {
        use std::os::unix::fs::MetadataExt;
        let metadata = make(1 << 30).unwrap().metadata().unwrap();
        assert_eq!((metadata.len(), metadata.nlink(), metadata.mode() & 0o777), (1 << 30, 0, 0o600));
        assert!(metadata.blocks() < 100);
    }

    proptest! {
        #[test]
        fn any_word_is_a_size_or_refused(text in "\\PC{0,24}") {
            if let Ok(bytes) = size(&text) {
                prop_assert!((LEAST..=MOST).contains(&bytes) && bytes % BLOCK == 0);
            }
        }
    }
}
