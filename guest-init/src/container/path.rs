//! Paths inside a container's root that its owner, or an attacker in it, wrote: never outside, whatever the links.
//!
//! Owns: resolution with openat2 RESOLVE_IN_ROOT, making what is missing. Does not own: what is done there.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path},
};

/// Opens a path below `root` as a place (O_PATH), following links inside the root only.
pub(super) fn open(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_with(root, path, libc::O_PATH | libc::O_CLOEXEC)
}

fn open_with(root: BorrowedFd<'_>, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let inside = path.strip_prefix("/").unwrap_or(path);
    let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
    let name = CString::new(inside.as_os_str().as_bytes())?;
    // SAFETY: open_how is plain data for which zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = flags as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: name and how outlive the call; the size is how's.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Makes a directory with all parents, or with `file` an empty file in them, where nothing is; opens it.
pub(super) fn make(root: BorrowedFd<'_>, path: &Path, file: bool) -> io::Result<OwnedFd> {
    if let Ok(there) = open(root, path) {
        return Ok(there);
    }
    let names: Vec<_> =
        path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir)).collect();
    let mut so_far = std::path::PathBuf::new();
    for (index, name) in names.iter().enumerate() {
        let parent = open_with(root, &so_far, libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)?;
        so_far.push(name);
        if open(root, &so_far).is_ok() {
            continue;
        }
        let Component::Normal(name) = name else { return Err(io::ErrorKind::InvalidInput.into()) };
        let name = CString::new(name.as_bytes())?;
        let last = index + 1 == names.len();
        // SAFETY: the name outlives the call; both take a name of one component relative to an open directory.
        let made = unsafe {
            if last && file {
                libc::mknodat(parent.as_raw_fd(), name.as_ptr(), libc::S_IFREG | 0o755, 0)
            } else {
                libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), 0o755)
            }
        };
        if made < 0 && io::Error::last_os_error().kind() != io::ErrorKind::AlreadyExists {
            return Err(io::Error::last_os_error());
        }
    }
    open(root, path)
}

/// The name under which an open place can be given to calls that want a path.
pub(super) fn name(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::fd::AsFd, os::unix::fs::symlink};

    #[test]
    fn links_and_dots_never_lead_outside() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("dir")).unwrap();
        symlink("/../../..", root.join("up")).unwrap();
        symlink("/dir", root.join("link")).unwrap();
        let fd: OwnedFd = fs::File::open(&root).unwrap().into();
        for path in ["/up/made", "../../made", "/link/../made"] {
            make(fd.as_fd(), Path::new(path), false).unwrap();
            assert!(root.join("made").is_dir(), "{path}");
            fs::remove_dir(root.join("made")).unwrap();
        }
        make(fd.as_fd(), Path::new("/link/a/file"), true).unwrap();
        assert!(root.join("dir/a/file").is_file());
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }
}
