//! Removing from the tree: what a whiteout hides, and what an entry replaces.
//!
//! Owns: that nothing outside the tree is touched (no link is followed) and that a whiteout spares what its own
//! layer made.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags, fstat, openat, statat, unlinkat},
    io::Errno,
};

use super::{Unpacker, attributes::is_directory};

/// Deepest directory that is removed: links make trees deeper than any path, and this recurses.
const MOST_DEPTH: usize = 1024;

/// The names in a directory.
pub(super) fn names(fd: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

impl Unpacker {
    /// Removes a name and what is below it. With `spare`, what the current layer made stays, and so do the
    /// directories that hold it. Tells whether the name is gone.
    pub(super) fn remove(
        &mut self,
        parent: &OwnedFd,
        inode: u64,
        name: &[u8],
        spare: bool,
    ) -> Result<bool, Errno> {
        self.remove_at(parent, inode, name, spare, 0)
    }

    fn remove_at(
        &mut self,
        parent: &OwnedFd,
        inode: u64,
        name: &[u8],
        spare: bool,
        depth: usize,
    ) -> Result<bool, Errno> {
        if depth > MOST_DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        let key = self.key(inode, name);
        let spared = spare && self.upper.contains(&key);
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(true),
            other => other?,
        };
        if !is_directory(&stat) {
            if spared {
                return Ok(false);
            }
            unlinkat(parent, name, AtFlags::empty())?;
            self.upper.remove(&key);
            return Ok(true);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty())?;
        let below = fstat(&fd)?;
        let mut empty = true;
        for child in names(&fd)? {
            empty &= self.remove_at(&fd, below.st_ino, &child, spare, depth + 1)?;
        }
        if spared || !empty {
            super::attributes::set_times(&fd, &below)?;
            return Ok(false);
        }
        unlinkat(parent, name, AtFlags::REMOVEDIR)?;
        self.upper.remove(&key);
        Ok(true)
    }
}
