//! Removing from the tree: what a whiteout hides, and what an entry replaces.
//!
//! Owns: that nothing outside the tree is touched (no link is followed), that a whiteout spares what its own
//! layer made, and that no number of whiteouts goes through the same names again and again.

use std::{mem::MaybeUninit, os::fd::OwnedFd};

use rustix::{
    fs::{AtFlags, Mode, OFlags, RawDir, Stat, fstat, openat, statat, unlinkat},
    io::Errno,
};

use super::{Unpacker, attributes::is_directory};

/// Deepest directory that is removed: links make trees deeper than any path, and this recurses.
const MOST_DEPTH: usize = 1024;

/// Bytes of names that are read at once. A directory of a layer may have any number of them.
const NAMES: usize = 4096;

impl Unpacker {
    /// Removes what is in a directory, as [`Self::remove`] does. Tells whether all of it is gone.
    pub(super) fn empty(&mut self, fd: &OwnedFd, stat: &Stat, spare: bool) -> Result<bool, Errno> {
        self.empty_at(fd, stat, spare, 0)
    }

    fn empty_at(&mut self, fd: &OwnedFd, stat: &Stat, spare: bool, depth: usize) -> Result<bool, Errno> {
        let settled = spare && self.record.is_settled(stat);
        let mut names = vec![MaybeUninit::uninit(); NAMES];
        let (mut list, mut empty) = (RawDir::new(fd, &mut names), true);
        while let Some(entry) = list.next() {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                if settled {
                    return Ok(false);
                }
                empty &= self.remove_at(fd, stat.st_ino, &name, spare, depth)?;
            }
        }
        // One that is empty takes no time, and is mostly removed.
        if spare && !empty {
            self.record.settle(stat);
        }
        Ok(empty)
    }

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
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(true),
            other => other?,
        };
        let spared = spare && self.record.has(&stat, inode, name);
        if !is_directory(&stat) {
            if spared {
                return Ok(false);
            }
            unlinkat(parent, name, AtFlags::empty())?;
            self.record.forget(inode, name);
            return Ok(true);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty())?;
        let below = fstat(&fd)?;
        let empty = self.empty_at(&fd, &below, spare, depth + 1)?;
        if spared || !empty {
            super::attributes::set_times(&fd, &below)?;
            return Ok(false);
        }
        unlinkat(parent, name, AtFlags::REMOVEDIR)?;
        self.record.forget(inode, name);
        Ok(true)
    }
}
