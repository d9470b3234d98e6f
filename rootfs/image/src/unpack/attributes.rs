//! Owner, mode, extended attributes and times of what was made.
//!
//! Owns: their order: owner first, because changing it clears the set-id bits and capabilities.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags, chmod, chownat, fchmod,
        fchown, flistxattr, flistxattr_query, fremovexattr, fsetxattr, futimens, lsetxattr, utimensat,
    },
    io::Errno,
};

use super::{Entry, Kind, UnpackError, Unpacker, failed};

/// Attributes of another file system's making: they would mean something to it again.
const NEVER: [&[u8]; 3] = [b"trusted.overlay.", b"user.overlay.", b"security.nfs4_acl"];

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// The times of before, on a directory in which something was made since.
pub(super) fn set_times(fd: &OwnedFd, stat: &Stat) -> Result<(), Errno> {
    let time = |sec, nsec| Timespec { tv_sec: sec, tv_nsec: nsec };
    futimens(
        fd,
        &Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec as i64),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec as i64),
        },
    )
}

/// Removes what an earlier layer set on a directory that this one sets again.
pub(super) fn clear_xattrs(fd: &OwnedFd) -> Result<(), Errno> {
    let size = match flistxattr_query(fd) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(()),
        other => other?,
    };
    let mut names = vec![0; size];
    let n = flistxattr(fd, names.as_mut_slice())?;
    names.truncate(n);
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        match fremovexattr(fd, name) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Unpacker {
    /// On an open file or directory.
    pub(super) fn attributes(&mut self, fd: &OwnedFd, entry: &Entry) -> Result<(), UnpackError> {
        let err = |what| move |e| failed(what, &entry.path, e);
        if self.options.privileged {
            fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
                .map_err(err("chown"))?;
        }
        fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(err("chmod"))?;
        self.xattrs(entry, |name, value| fsetxattr(fd, name, value, XattrFlags::empty()))?;
        futimens(fd, &times(entry.mtime)).map_err(err("utimens"))
    }

    /// On something that cannot be opened: a link, a pipe, a device.
    pub(super) fn attributes_at(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
    ) -> Result<(), UnpackError> {
        let err = |what| move |e| failed(what, &entry.path, e);
        if self.options.privileged {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(err("chown"))?;
        }
        // The name was made a moment ago in a tree that nobody else sees, so that going by path is safe.
        let path = [format!("/proc/self/fd/{}/", parent.as_fd().as_raw_fd()).as_bytes(), name].concat();
        if !matches!(entry.kind, Kind::SymLink(_)) {
            chmod(path.as_slice(), Mode::from_raw_mode(entry.mode)).map_err(err("chmod"))?;
        }
        self.xattrs(entry, |name, value| lsetxattr(path.as_slice(), name, value, XattrFlags::empty()))?;
        utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(err("utimens"))
    }

    fn xattrs(
        &mut self,
        entry: &Entry,
        set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
    ) -> Result<(), UnpackError> {
        for (name, value) in &entry.xattrs {
            if NEVER.iter().any(|never| name.starts_with(never)) {
                continue;
            }
            match set(name, value) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP) => self.report.skipped_xattrs += 1,
                Err(Errno::PERM) if !self.options.privileged => self.report.skipped_xattrs += 1,
                // user.* attributes belong to files and directories only.
                Err(Errno::PERM) if name.starts_with(b"user.") => self.report.skipped_xattrs += 1,
                Err(e) => return Err(failed("setxattr", &entry.path, e)),
            }
        }
        Ok(())
    }
}

/// What a mode says of a file's type.
pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}
