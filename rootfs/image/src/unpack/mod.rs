//! Layers onto one tree, in order: files, links, attributes, whiteouts, as image-spec's layer.md says.
//!
//! Owns: what a layer may do to the tree and how much it may put there. Does not own: whether the layer is
//! authentic: the tree must stay out of everybody's sight until [`crate::pipeline`] said so for every layer.

mod attributes;
mod beneath;
mod record;
mod removal;

use std::{io::BufRead, os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, Stat, fstat, ftruncate, linkat, makedev, mkdirat, mknodat, openat,
        statat, symlinkat,
    },
    io::{Errno, pwrite, write},
};
use thiserror::Error;

use self::{
    beneath::Inside,
    record::{MOST_LINKS, Record},
};
use crate::tar::{Archive, Entry, Kind, Sparse, TarError};

/// What an inode costs in tmpfs besides its data, in bytes; charged for every entry.
const INODE_COST: u64 = 1024;
/// Bytes of a block.
const BLOCK_COST: u64 = 4096;
/// Longest target of a link, in bytes, that tmpfs keeps beside the inode; a longer one has a block.
const SHORT_TARGET: usize = 127;
/// Most entries of one layer.
const MOST_ENTRIES: u64 = 4 << 20;

/// A layer cannot be unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The archive.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A path that no layer has.
    #[error("unpack: path {0:?}: {1}")]
    Path(String, &'static str),
    /// The system refused.
    #[error("unpack: {what} {path:?}: {errno}")]
    System {
        /// What was done.
        what: &'static str,
        /// To what.
        path: String,
        /// The system's words.
        errno: Errno,
    },
    /// More than was allowed.
    #[error(
        "unpack: the image needs more than the {0} bytes that it may take: raise the pod's memory or use a scratch disk, or it is a decompression bomb"
    )]
    Budget(u64),
    /// More entries than was allowed.
    #[error("unpack: more than {MOST_ENTRIES} entries in one layer")]
    Entries,
    /// More hard links to lower layers than was allowed.
    #[error("unpack: more than {MOST_LINKS} hard links to files of lower layers in one layer")]
    Links,
}

/// What is applied of an archive.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Owners, device nodes, and `security.*` and `trusted.*` attributes: for root.
    pub privileged: bool,
    /// Bytes that all layers together may put there, inodes and whole blocks counted.
    pub budget: u64,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Entries applied.
    pub entries: u64,
    /// Attributes that the file system does not have.
    pub skipped_xattrs: u64,
    /// Device nodes not made for want of privilege.
    pub skipped_devices: u64,
    /// Bytes of file data, holes not counted.
    pub bytes: u64,
}

/// A directory that entries go to, kept open while they do.
struct Parent {
    path: Vec<u8>,
    fd: Arc<OwnedFd>,
    stat: Stat,
}

/// A tree being made.
pub struct Unpacker {
    root: OwnedFd,
    options: Options,
    left: u64,
    record: Record,
    parent: Option<Parent>,
    report: Report,
}

impl Unpacker {
    /// On an empty directory.
    #[must_use]
    pub fn new(root: OwnedFd, options: Options) -> Self {
        Self {
            root,
            options,
            left: options.budget,
            record: Record::default(),
            parent: None,
            report: Report::default(),
        }
    }

    /// So far.
    #[must_use]
    pub fn report(&self) -> Report {
        self.report
    }

    /// Bytes that may still come.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Applies one layer.
    ///
    /// # Errors
    /// [`UnpackError`]; the tree is then good for nothing.
    pub fn layer<R: BufRead>(&mut self, archive: &mut Archive<R>) -> Result<(), UnpackError> {
        self.record.clear();
        let mut count = 0;
        while let Some(entry) = archive.entry()? {
            count += 1;
            if count > MOST_ENTRIES {
                return Err(UnpackError::Entries);
            }
            self.entry(&entry, archive)?;
        }
        self.leave_parent()
    }

    fn entry<R: BufRead>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), UnpackError> {
        let path = Inside::new(&entry.path)?;
        if let Some(hidden) = path.name().strip_prefix(b".wh.") {
            return self.whiteout(&path, hidden);
        }
        self.report.entries += 1;
        self.charge(entry_cost(entry))?;
        if path.name().is_empty() {
            return match entry.kind {
                Kind::Directory => {
                    self.leave_parent()?;
                    let fd = self.root.try_clone().map_err(|_| failed("open", b"/", Errno::MFILE))?;
                    self.attributes(&fd, entry)
                }
                _ => Err(UnpackError::Path(lossy(&entry.path), "the root is a directory")),
            };
        }
        let (fd, inode) = self.enter_parent(&path)?;
        let name = path.name();
        match &entry.kind {
            Kind::File => self.file(&fd, name, entry, archive)?,
            Kind::Directory => self.directory(&fd, inode, name, entry)?,
            Kind::SymLink(target) => {
                let make = || symlinkat(target.as_slice(), &fd, name);
                self.replacing(&fd, inode, name, make).map_err(|e| failed("symlink", &entry.path, e))?;
                self.attributes_at(&fd, name, entry)?;
                self.made(&fd, name, entry)?;
            }
            Kind::HardLink(target) => {
                let to = Inside::new(target)?;
                let at = beneath::existing(&self.root, to.parent())
                    .and_then(|at| at.ok_or(Errno::NOENT))
                    .map_err(|e| failed("link to", target, e))?;
                // Removing what has the name first would lose a file that is linked to itself.
                let same = |a: &Stat, b: &Stat| (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino);
                let stat = |fd: &OwnedFd, name: &[u8]| statat(fd, name, AtFlags::SYMLINK_NOFOLLOW);
                if let (Ok(a), Ok(b)) = (stat(&at, to.name()), stat(&fd, name))
                    && same(&a, &b)
                {
                    return Ok(());
                }
                let make = || linkat(&at, to.name(), &fd, name, AtFlags::empty());
                self.replacing(&fd, inode, name, make).map_err(|e| failed("link to", target, e))?;
                let made = stat(&fd, name).map_err(|e| failed("link to", target, e))?;
                if !self.record.link(&made, inode, name) {
                    return Err(UnpackError::Links);
                }
            }
            Kind::Fifo => self.node(&fd, inode, name, entry, FileType::Fifo, (0, 0))?,
            Kind::CharDevice(major, minor) => {
                self.node(&fd, inode, name, entry, FileType::CharacterDevice, (*major, *minor))?;
            }
            Kind::BlockDevice(major, minor) => {
                self.node(&fd, inode, name, entry, FileType::BlockDevice, (*major, *minor))?;
            }
        }
        Ok(())
    }

    /// Something was made of a name that cannot be opened.
    fn made(&mut self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
        self.record.add(&stat.map_err(|e| failed("stat", &entry.path, e))?);
        Ok(())
    }

    fn file<R: BufRead>(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), UnpackError> {
        let err = |what| move |e| failed(what, &entry.path, e);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inode = self.parent.as_ref().map_or(0, |p| p.stat.st_ino);
        let make = || openat(parent, name, flags, Mode::from_raw_mode(0o600));
        let fd = self.replacing(parent, inode, name, make).map_err(err("create"))?;
        match &entry.sparse {
            None => loop {
                let piece = archive.data()?;
                if piece.is_empty() {
                    break;
                }
                let n = write(&fd, piece).map_err(err("write"))?;
                archive.consume(n);
            },
            Some(sparse) => self::sparse(&fd, sparse, entry, archive)?,
        }
        self.report.bytes += entry.size;
        self.record.add(&fstat(&fd).map_err(err("stat"))?);
        self.attributes(&fd, entry)
    }

    fn directory(
        &mut self,
        parent: &OwnedFd,
        inode: u64,
        name: &[u8],
        entry: &Entry,
    ) -> Result<(), UnpackError> {
        let err = |what| move |e| failed(what, &entry.path, e);
        let make = || mkdirat(parent, name, Mode::from_raw_mode(0o700));
        let mut kept = false;
        if let Err(e) = make() {
            let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(err("mkdir"))?;
            kept = e == Errno::EXIST && FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !kept {
                self.replacing(parent, inode, name, make).map_err(err("mkdir"))?;
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty()).map_err(err("open"))?;
        if kept {
            attributes::clear_xattrs(&fd).map_err(err("listxattr"))?;
        }
        self.record.add(&fstat(&fd).map_err(err("stat"))?);
        self.attributes(&fd, entry)
    }

    fn node(
        &mut self,
        parent: &OwnedFd,
        inode: u64,
        name: &[u8],
        entry: &Entry,
        kind: FileType,
        (major, minor): (u32, u32),
    ) -> Result<(), UnpackError> {
        if kind != FileType::Fifo && !self.options.privileged {
            self.report.skipped_devices += 1;
            return Ok(());
        }
        let mode = Mode::from_raw_mode(entry.mode);
        let make = || mknodat(parent, name, kind, mode, makedev(major, minor));
        self.replacing(parent, inode, name, make).map_err(|e| failed("mknod", &entry.path, e))?;
        self.attributes_at(parent, name, entry)?;
        self.made(parent, name, entry)
    }

    /// Makes something of a name; what has the name already is removed first.
    fn replacing<T>(
        &mut self,
        parent: &OwnedFd,
        inode: u64,
        name: &[u8],
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match make() {
            Err(Errno::EXIST) => {}
            other => return other,
        }
        self.remove(parent, inode, name, false)?;
        make()
    }

    fn whiteout(&mut self, path: &Inside, hidden: &[u8]) -> Result<(), UnpackError> {
        let err = |e| failed("whiteout", path.name(), e);
        self.leave_parent()?;
        let opaque = hidden == b".wh..opq";
        // aufs kept its own files under this prefix; they are nobody's.
        if !opaque && hidden.starts_with(b".wh.") {
            return Ok(());
        }
        if !opaque && matches!(hidden, b"" | b"." | b"..") {
            return Err(UnpackError::Path(lossy(path.name()), "a whiteout of nothing"));
        }
        let Some(fd) = beneath::existing(&self.root, path.parent()).map_err(err)? else { return Ok(()) };
        let stat = fstat(&fd).map_err(err)?;
        if opaque {
            self.empty(&fd, &stat, true).map_err(err)?;
        } else {
            self.remove(&fd, stat.st_ino, hidden, true).map_err(err)?;
        }
        attributes::set_times(&fd, &stat).map_err(err)
    }

    fn charge(&mut self, bytes: u64) -> Result<(), UnpackError> {
        self.left = self.left.checked_sub(bytes).ok_or(UnpackError::Budget(self.options.budget))?;
        Ok(())
    }

    /// Opens the directory of a path, unless it is the one that is open; also gives its inode.
    fn enter_parent(&mut self, path: &Inside) -> Result<(Arc<OwnedFd>, u64), UnpackError> {
        if let Some(open) = self.parent.as_ref().filter(|open| open.path == path.parent()) {
            return Ok((open.fd.clone(), open.stat.st_ino));
        }
        self.leave_parent()?;
        let record = &mut self.record;
        let made = |fd: &OwnedFd| {
            record.add(&fstat(fd)?);
            Ok(())
        };
        let err = |e| failed("open the directory", path.parent(), e);
        let fd = beneath::ensured(&self.root, path.parent(), made).map_err(err)?;
        let stat = fstat(&fd).map_err(err)?;
        let fd = Arc::new(fd);
        self.parent = Some(Parent { path: path.parent().to_vec(), fd: fd.clone(), stat });
        Ok((fd, stat.st_ino))
    }

    /// Closes the open directory and gives it back the times that it had before entries were made in it.
    fn leave_parent(&mut self) -> Result<(), UnpackError> {
        if let Some(parent) = self.parent.take() {
            attributes::set_times(&parent.fd, &parent.stat)
                .map_err(|e| failed("utimens", &parent.path, e))?;
        }
        Ok(())
    }
}

/// What an entry takes, its data included.
fn entry_cost(entry: &Entry) -> u64 {
    // tmpfs keeps attributes in memory that no file system's size bounds.
    let attributes: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
    let blocks = match (&entry.kind, &entry.sparse) {
        (Kind::File, Some(sparse)) => blocks(sparse),
        (Kind::File, None) => entry.size.div_ceil(BLOCK_COST),
        (Kind::SymLink(target), _) => u64::from(target.len() > SHORT_TARGET),
        _ => 0,
    };
    (INODE_COST + attributes as u64).saturating_add(blocks.saturating_mul(BLOCK_COST))
}

/// The blocks that pieces lie in: a single byte takes a whole one. Pieces are in order, so that the first block of one may be the last of
/// the one before.
fn blocks(sparse: &Sparse) -> u64 {
    let (mut sum, mut counted) = (0u64, 0);
    for &(offset, length) in sparse.pieces.iter().filter(|(_, length)| *length > 0) {
        let end = offset.saturating_add(length).div_ceil(BLOCK_COST);
        sum = sum.saturating_add(end.saturating_sub(counted.max(offset / BLOCK_COST)));
        counted = end;
    }
    sum
}

/// Bytes that a layer takes of a budget.
///
/// # Errors
/// [`TarError`], where it is no archive.
pub fn cost<R: BufRead>(archive: &mut Archive<R>) -> Result<u64, TarError> {
    let mut sum = 0u64;
    while let Some(entry) = archive.entry()? {
        let name = entry.path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        if name.starts_with(b".wh.") {
            continue;
        }
        sum = sum.saturating_add(entry_cost(&entry));
    }
    Ok(sum)
}

/// Opens a file of a finished tree for reading, links followed inside the tree. `None` when it is not there.
///
/// # Errors
/// [`UnpackError`].
pub fn read_in(root: &OwnedFd, path: &str) -> Result<Option<std::fs::File>, UnpackError> {
    match beneath::file(root, Inside::new(path.as_bytes())?.whole()) {
        Ok(fd) => Ok(Some(fd.into())),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(failed("open", path.as_bytes(), e)),
    }
}

/// Makes a directory of a finished tree, with those above it, unless it is there.
///
/// # Errors
/// [`UnpackError`].
pub fn make_in(root: &OwnedFd, path: &str) -> Result<(), UnpackError> {
    let inside = Inside::new(path.as_bytes())?;
    let made = beneath::ensured(root, inside.whole(), |_| Ok(()));
    made.map(drop).map_err(|e| failed("mkdir", path.as_bytes(), e))
}

fn sparse<R: BufRead>(
    fd: &OwnedFd,
    sparse: &Sparse,
    entry: &Entry,
    archive: &mut Archive<R>,
) -> Result<(), UnpackError> {
    let err = |e| failed("write", &entry.path, e);
    ftruncate(fd, sparse.real).map_err(err)?;
    for &(mut at, mut left) in &sparse.pieces {
        while left > 0 {
            let piece = archive.data()?;
            let most = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if most == 0 {
                return Err(TarError::Short("a sparse file").into());
            }
            let n = pwrite(fd, &piece[..most], at).map_err(err)?;
            archive.consume(n);
            at += n as u64;
            left -= n as u64;
        }
    }
    Ok(())
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned()
}

fn failed(what: &'static str, path: &[u8], errno: Errno) -> UnpackError {
    UnpackError::System { what, path: lossy(path), errno }
}

#[cfg(test)]
mod tests;
