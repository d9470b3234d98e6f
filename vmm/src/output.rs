//! Files that a caller names for what a VM says: the trace, the console.
//!
//! Owns: which files these may be. Does not own: what is written to them.

use std::{
    fs::{File, FileType},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

/// Opens a file to append to, which is made where there is none. An annotation names it, and the VMM's user is root mostly: a link may lead to
/// where its writer could not write, and what is written to a device is done by it.
///
/// # Errors
/// The system's, `ELOOP` for a symbolic link; or that it is neither a regular file nor a fifo.
pub fn open(path: &Path) -> io::Result<File> {
    let check = |kind: FileType| match kind.is_file() || kind.is_fifo() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a regular file nor a fifo")),
    };
    // To open a device does something already, a watchdog's for one.
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_symlink() => check(metadata.file_type())?,
        _ => {}
    }
    let flags = libc::O_NOFOLLOW | libc::O_NOCTTY;
    let file = File::options().create(true).append(true).custom_flags(flags).open(path)?;
    check(file.metadata()?.file_type())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::CString,
        io::Write,
        os::unix::{ffi::OsStrExt, fs::symlink},
        thread,
    };

    use super::*;

    #[test]
    fn a_file_is_made_or_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for line in ["a\n", "b\n"] {
            open(&path).unwrap().write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "a\nb\n");
    }

    #[test]
    fn a_fifo_is_written_to_once_somebody_reads() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        let name = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name ends in a zero byte and outlives the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let reader = thread::spawn({
            let path = path.clone();
            move || std::fs::read_to_string(path).unwrap()
        });
        open(&path).unwrap().write_all(b"through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
    }

    #[test]
    fn neither_links_nor_devices_are_written_to() {
        let directory = tempfile::tempdir().unwrap();
        let (target, link) = (directory.path().join("target"), directory.path().join("link"));
        for _ in 0..2 {
            let _ = std::fs::remove_file(&link);
            symlink(&target, &link).unwrap();
            assert_eq!(open(&link).unwrap_err().raw_os_error(), Some(libc::ELOOP));
            // With and without something there.
            std::fs::write(&target, "as it was").unwrap();
        }
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "as it was");
        for other in [Path::new("/dev/null"), Path::new("/dev/zero"), directory.path()] {
            assert!(open(other).is_err(), "{other:?}");
        }
    }
}
