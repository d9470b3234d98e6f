//! Paths inside a container's root that its owner, or an attacker in it, wrote: never outside, whatever the links.
//!
//! Owns: resolution with openat2 RESOLVE_IN_ROOT, making what is missing. Does not own: what is done there.

use std::{
    collections::VecDeque,
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::fcntl::readlinkat;

/// Opens a path below `root`, in which no link is left, as a place (O_PATH).
pub(super) fn open(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_with(root, path, libc::O_PATH | libc::O_CLOEXEC, libc::RESOLVE_NO_SYMLINKS)
}

/// Opens a path below `root` with these flags; `resolve` says what more than a way out of there is refused.
pub(super) fn open_with(root: BorrowedFd<'_>, path: &Path, flags: i32, resolve: u64) -> io::Result<OwnedFd> {
    let inside = path.strip_prefix("/").unwrap_or(path);
    let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
    let name = CString::new(inside.as_os_str().as_bytes())?;
    // SAFETY: open_how is plain data for which zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = flags as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS | resolve;
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

/// The last part of the path is a link, wherever that leads.
pub(super) fn is_link(root: BorrowedFd<'_>, path: &Path) -> bool {
    let flags = libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW;
    let there = open_with(root, path, flags, 0).map(std::fs::File::from);
    there.and_then(|there| there.metadata()).is_ok_and(|meta| meta.is_symlink())
}

/// A user and a group, as they are outside of the container's user namespace.
pub(super) type Owner = (u32, u32);

/// As many links as the kernel follows in one path.
const MOST_LINKS: usize = 40;

/// A place below a root.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) fd: OwnedFd,
    /// Its path below the root, without links.
    pub(super) path: PathBuf,
    /// Nothing was there before.
    pub(super) made: bool,
}

/// Makes a directory with all parents, or with `file` an empty file in them, where nothing is; opens it. A link to what is not
/// there, as an image's /etc/resolv.conf often is, gets its target made, inside the root.
///
/// What is made is `owner`'s, where there is one and the file system knows owners.
///
/// In a root that is this guest's own, a link in what the host has mounted there is refused: it would let the host choose which of
/// the image's files the next mount lies over.
pub(super) fn make(root: BorrowedFd<'_>, path: &Path, file: bool, owner: Option<Owner>) -> io::Result<Place> {
    let is_hosts = |place: BorrowedFd<'_>| {
        nix::sys::statfs::fstatfs(place)
            .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::FUSE_SUPER_MAGIC)
    };
    let strict = !is_hosts(root);
    make_with(root, path, file, owner, &|link| strict && is_hosts(link))
}

fn make_with(
    root: BorrowedFd<'_>,
    path: &Path,
    file: bool,
    owner: Option<Owner>,
    is_foreign: &dyn Fn(BorrowedFd<'_>) -> bool,
) -> io::Result<Place> {
    if let Ok(fd) = open(root, path) {
        return Ok(Place { fd, path: path.to_owned(), made: false });
    }
    let mut left: VecDeque<OsString> = path.components().map(|c| c.as_os_str().to_owned()).collect();
    let (mut so_far, mut links, mut made) = (PathBuf::new(), 0, false);
    while let Some(name) = left.pop_front() {
        match Path::new(&name).components().next() {
            Some(Component::Normal(_)) => {}
            Some(Component::RootDir) => {
                so_far.clear();
                continue;
            }
            Some(Component::ParentDir) => {
                so_far.pop();
                continue;
            }
            _ => continue,
        }
        let directory = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let parent = open_with(root, &so_far, directory, libc::RESOLVE_NO_SYMLINKS)?;
        so_far.push(&name);
        let itself = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let Ok(place) = open_with(root, &so_far, itself, 0) else {
            make_one(&parent, &name, file && left.is_empty(), owner)?;
            made = left.is_empty();
            continue;
        };
        // Links cannot be read by their descriptor's name in /proc, which is one itself.
        let Ok(target) = readlinkat(&place, "") else { continue };
        if is_foreign(place.as_fd()) {
            let words = format!("/{} is a link in what the host has mounted", so_far.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        so_far.pop();
        for part in Path::new(&target).components().rev() {
            left.push_front(part.as_os_str().to_owned());
        }
    }
    Ok(Place { fd: open(root, &so_far)?, path: so_far, made })
}

/// Makes a directory or an empty file of this name.
fn make_one(parent: &OwnedFd, name: &OsStr, file: bool, owner: Option<Owner>) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    // SAFETY: the name outlives the call; both take a name of one component relative to an open directory.
    let made = unsafe {
        if file {
            libc::mknodat(parent.as_raw_fd(), name.as_ptr(), libc::S_IFREG | 0o755, 0)
        } else {
            libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), 0o755)
        }
    };
    match io::Error::last_os_error() {
        error if made < 0 && error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        error if made < 0 => return Err(error),
        _ => {}
    }
    if let Some((user, group)) = owner {
        // A file system of the host's may know no owners, and does then as it does for everybody.
        // SAFETY: as above.
        unsafe {
            libc::fchownat(parent.as_raw_fd(), name.as_ptr(), user, group, libc::AT_SYMLINK_NOFOLLOW);
        }
    }
    Ok(())
}

/// The name under which an open place can be given to calls that want a path.
pub(super) fn name(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn links_and_dots_never_lead_outside() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("dir")).unwrap();
        symlink("/../../..", root.join("up")).unwrap();
        symlink("/dir", root.join("link")).unwrap();
        let fd: OwnedFd = fs::File::open(&root).unwrap().into();
        symlink("loop", root.join("loop")).unwrap();
        let link = |path: &str| is_link(fd.as_fd(), Path::new(path));
        assert!(link("/up") && link("link") && link("/loop"));
        assert!(!link("/dir") && !link("/none") && !link("/link/made"));
        for path in ["/up/made", "../../made", "/link/../made"] {
            make(fd.as_fd(), Path::new(path), false, None).unwrap();
            assert!(root.join("made").is_dir(), "{path}");
            fs::remove_dir(root.join("made")).unwrap();
        }
        make(fd.as_fd(), Path::new("/link/a/file"), true, None).unwrap();
        assert!(root.join("dir/a/file").is_file());
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_of_the_hosts_moves_no_mount() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("usr/bin")).unwrap();
        fs::create_dir_all(root.path().join("data/plain")).unwrap();
        symlink("/usr/bin", root.path().join("data/sub")).unwrap();
        symlink("usr", root.path().join("own")).unwrap();
        let fd: OwnedFd = fs::File::open(root.path()).unwrap().into();
        let hosts = fs::read_link(root.path().join("data/sub")).unwrap();
        let is_hosts = |link: BorrowedFd<'_>| readlinkat(link, "").is_ok_and(|target| *target == *hosts);
        let make = |path: &str| make_with(fd.as_fd(), Path::new(path), false, None, &is_hosts);
        for path in ["/data/sub", "/data/sub/new", "data/plain/../sub/new"] {
            let refused = make(path).err().unwrap().to_string();
            assert!(refused.contains("data/sub is a link in what the host has mounted"), "{refused}");
        }
        assert!(!root.path().join("usr/bin/new").exists());
        let place = make("/own/bin").unwrap();
        assert_eq!((place.path.as_path(), place.made), (Path::new("usr/bin"), false));
        let place = make("/data/plain/new").unwrap();
        assert!(place.made && root.path().join("data/plain/new").is_dir());
    }

    #[test]
    fn a_link_to_what_is_not_there_gets_its_target_made_inside() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        symlink("../run/resolve/stub.conf", root.join("etc/resolv.conf")).unwrap();
        symlink("/../../far/away", root.join("etc/localtime")).unwrap();
        symlink("nowhere", root.join("var")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let fd: OwnedFd = fs::File::open(&root).unwrap().into();
        let made = |path: &str, file| make(fd.as_fd(), Path::new(path), file, None);
        made("/etc/resolv.conf", true).unwrap();
        assert!(root.join("run/resolve/stub.conf").is_file());
        made("/etc/localtime", true).unwrap();
        assert!(root.join("far/away").is_file());
        made("/var/lib/data", false).unwrap();
        assert!(root.join("nowhere/lib/data").is_dir());
        assert_eq!(made("/loop/file", true).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }
}
