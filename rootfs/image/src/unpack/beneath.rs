//! Paths of an archive, resolved so that they cannot leave the tree that is being made.
//!
//! Owns: the kernel's own confinement (openat2 with RESOLVE_IN_ROOT, no magic links, no other mount): a symbolic
//! link in a lower layer is followed inside the tree, wherever it points.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, openat, openat2},
    io::Errno,
};

use super::UnpackError;

/// Longest chain of directories: more is an attack on whoever walks the tree later.
const MOST_DEPTH: usize = 512;

/// A path of the archive, cleaned: no empty and no `.` components.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Inside {
    path: Vec<u8>,
    split: usize,
}

impl Inside {
    /// # Errors
    /// [`UnpackError::Path`] when it climbs, or is too deep.
    pub(super) fn new(raw: &[u8]) -> Result<Self, UnpackError> {
        let bad = |why| UnpackError::Path(String::from_utf8_lossy(raw).into_owned(), why);
        let mut path = Vec::with_capacity(raw.len());
        let mut split = 0;
        let mut depth = 0;
        for part in raw.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => return Err(bad("it climbs out with ..")),
                _ if part.len() > 255 => return Err(bad("a name of more than 255 bytes")),
                _ => {}
            }
            split = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(part);
            depth += 1;
        }
        if depth > MOST_DEPTH {
            return Err(bad("more than 512 directories deep"));
        }
        Ok(Self { path, split })
    }

    /// All of it.
    pub(super) fn whole(&self) -> &[u8] {
        &self.path
    }

    /// The directory that it lies in; empty for the root.
    pub(super) fn parent(&self) -> &[u8] {
        &self.path[..self.split]
    }

    /// Its last component; empty when it is the root itself.
    pub(super) fn name(&self) -> &[u8] {
        let name = &self.path[self.split..];
        name.strip_prefix(b"/").unwrap_or(name)
    }
}

const RESOLVE: ResolveFlags =
    ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_XDEV);
const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn open(root: impl AsFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    loop {
        // EAGAIN: a rename somewhere in the system raced with "..".
        match openat2(&root, path, DIRECTORY, Mode::empty(), RESOLVE) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Opens a file of the tree for reading.
pub(super) fn file(root: impl AsFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    openat2(root, path, flags, Mode::empty(), RESOLVE)
}

/// Opens a directory of the tree; `None` when it does not exist.
pub(super) fn existing(root: impl AsFd, path: &[u8]) -> Result<Option<OwnedFd>, Errno> {
    match open(root, path) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Opens a directory of the tree, making what is missing of it (mode 0755). `made` is told of each directory that was made.
pub(super) fn ensured(
    root: impl AsFd,
    path: &[u8],
    mut made: impl FnMut(&OwnedFd) -> Result<(), Errno>,
) -> Result<OwnedFd, Errno> {
    match open(&root, path) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut at = open(&root, b"")?;
    let mut done = 0;
    for part in path.split(|&byte| byte == b'/') {
        done += part.len() + usize::from(done > 0);
        at = match open(&root, &path[..done]) {
            Err(Errno::NOENT) => {
                // A dangling link has the name: it must not become a directory elsewhere.
                mkdirat(&at, part, Mode::from_raw_mode(0o755))?;
                let fd = openat(&at, part, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
                made(&fd)?;
                fd
            }
            other => other?,
        };
    }
    Ok(at)
}
