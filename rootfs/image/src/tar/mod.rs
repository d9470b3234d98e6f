//! A tar archive as a stream: ustar, PAX, GNU long names and all sparse forms.
//!
//! Owns: from bytes to [`Entry`] and its data. Every number is checked and every header bounded; nothing is
//! believed about names, which [`crate::unpack`] confines. Written here because the archive is hostile and the
//! `tar` crate reads extended headers of any length into memory.

mod header;
mod pax;
mod sparse;

use std::io::{self, BufRead, Read};

use thiserror::Error;

pub use sparse::Sparse;

/// Bytes of a block.
pub const BLOCK: usize = 512;
/// Longest extended header in bytes: 64 KiB for each of several xattrs.
const MOST_EXTENDED: u64 = 1 << 20;
/// Longest path in bytes, as Linux has it.
pub const MOST_PATH: usize = 4096;

/// The archive is broken, or something that is not unpacked.
#[derive(Debug, Error)]
pub enum TarError {
    /// The bytes stopped coming.
    #[error("tar: {0}")]
    Read(#[from] io::Error),
    /// In the middle of an entry.
    #[error("tar: it ends in the middle of {0}")]
    Short(&'static str),
    /// A header's sum.
    #[error("tar: header checksum is wrong at byte {0}")]
    Checksum(u64),
    /// A field.
    #[error("tar: {field} of {path:?} is broken")]
    Field {
        /// Which.
        field: &'static str,
        /// Whose, as far as known.
        path: String,
    },
    /// A kind of entry.
    #[error("tar: {path:?} has type {kind:?}, which no image layer has")]
    Kind {
        /// The type flag.
        kind: char,
        /// Whose.
        path: String,
    },
    /// An extended header.
    #[error("tar: extended header of {0} bytes, more than {MOST_EXTENDED}")]
    Extended(u64),
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// With data.
    File,
    /// Of an earlier path.
    HardLink(Vec<u8>),
    /// To a path.
    SymLink(Vec<u8>),
    /// Major and minor.
    CharDevice(u32, u32),
    /// Major and minor.
    BlockDevice(u32, u32),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry; its data follow by [`Archive::data`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As in the archive.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of data that follow in the archive.
    pub size: u64,
    /// Where they belong when the file has holes.
    pub sparse: Option<Sparse>,
}

/// An archive being read.
pub struct Archive<R> {
    source: R,
    /// Bytes read so far.
    at: u64,
    /// Of the current entry.
    left: u64,
    padding: u64,
}

impl<R: BufRead> Archive<R> {
    /// At its first byte.
    pub fn new(source: R) -> Self {
        Self { source, at: 0, left: 0, padding: 0 }
    }

    /// The next entry; what was not read of the last one's data is skipped.
    ///
    /// # Errors
    /// [`TarError`].
    pub fn entry(&mut self) -> Result<Option<Entry>, TarError> {
        let rest = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        self.skip(rest)?;
        let mut extended = pax::Extended::default();
        loop {
            let at = self.at;
            let Some(block) = self.block()? else {
                return if extended.is_empty() {
                    Ok(None)
                } else {
                    Err(TarError::Short("an extended header"))
                };
            };
            if block.iter().all(|&byte| byte == 0) {
                return Ok(None);
            }
            let header = header::Header::new(&block, at)?;
            match header.kind() {
                b'x' => extended.pax(&self.small(header.size()?)?)?,
                // Global headers carry comments (git archive); no tool applies them to files of layers.
                b'g' => drop(self.small(header.size()?)?),
                b'L' => extended.long_name(self.small(header.size()?)?),
                b'K' => extended.long_link(self.small(header.size()?)?),
                _ => return self.finish(&header, extended).map(Some),
            }
        }
    }

    fn finish(&mut self, header: &header::Header, mut extended: pax::Extended) -> Result<Entry, TarError> {
        let mut entry = header.entry(&mut extended)?;
        let has_data = entry.kind == Kind::File;
        self.left = if has_data { entry.size } else { 0 };
        self.padding = padding(self.left);
        // Links and directories of old archives carry a size without data; Go's and GNU's readers agree.
        if !has_data {
            entry.size = 0;
        }
        if header.kind() == b'S' {
            let mut map = header.sparse_map()?;
            while map.more {
                let block = self.block()?.ok_or(TarError::Short("a sparse map"))?;
                map.extend(&block)?;
            }
            entry.sparse = Some(map.check(&entry)?);
        } else if let Some(form) = extended.sparse {
            let before = self.left;
            let real = form.real.unwrap_or(entry.size);
            let map = match form.map {
                Some(map) => sparse::Map::of(map, real),
                None => sparse::Map::of(self.sparse_blocks()?, real),
            };
            entry.size -= before - self.left;
            entry.sparse = Some(map.check(&entry)?);
        }
        Ok(entry)
    }

    /// The map of PAX sparse form 1.0: decimal lines at the start of the data, padded to a block.
    fn sparse_blocks(&mut self) -> Result<Vec<(u64, u64)>, TarError> {
        let mut lines = sparse::Lines::default();
        while !lines.done() {
            if self.left < BLOCK as u64 {
                return Err(TarError::Short("a sparse map"));
            }
            let block = self.block()?.ok_or(TarError::Short("a sparse map"))?;
            self.left -= BLOCK as u64;
            lines.push(&block)?;
        }
        lines.map()
    }

    /// The next piece of the current entry's data, empty at its end. What is used goes to [`Archive::consume`].
    ///
    /// # Errors
    /// [`TarError`].
    pub fn data(&mut self) -> Result<&[u8], TarError> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let piece = self.source.fill_buf()?;
        if piece.is_empty() {
            return Err(TarError::Short("a file"));
        }
        Ok(&piece[..piece.len().min(left)])
    }

    /// So many bytes of [`Archive::data`] were used.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.source.consume(n);
        self.left -= n as u64;
        self.at += n as u64;
    }

    /// What lies behind the archive's end.
    pub fn into_source(self) -> R {
        self.source
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            match self.source.read(&mut block[have..])? {
                0 if have == 0 => return Ok(None),
                0 => return Err(TarError::Short("a header")),
                n => have += n,
            }
        }
        self.at += BLOCK as u64;
        Ok(Some(block))
    }

    fn skip(&mut self, mut n: u64) -> Result<(), TarError> {
        self.at = self.at.saturating_add(n);
        while n > 0 {
            let have = self.source.fill_buf()?.len() as u64;
            if have == 0 {
                return Err(TarError::Short("a file"));
            }
            let step = have.min(n);
            self.source.consume(step as usize);
            n -= step;
        }
        Ok(())
    }

    fn small(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MOST_EXTENDED {
            return Err(TarError::Extended(size));
        }
        let mut bytes = Vec::new();
        (&mut self.source).take(size).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(TarError::Short("an extended header"));
        }
        self.at += size;
        self.skip(padding(size))?;
        Ok(bytes)
    }
}

fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned()
}

#[cfg(test)]
mod tests;
