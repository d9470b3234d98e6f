//! One header block (POSIX ustar, GNU): numbers, names, type.
//!
//! Owns: the block's fields. Extended headers come as [`Extended`] and win.

use super::{BLOCK, Entry, Kind, MOST_PATH, TarError, pax::Extended, show, sparse::Map};

/// A header whose checksum holds.
pub(super) struct Header<'a> {
    block: &'a [u8; BLOCK],
}

impl<'a> Header<'a> {
    pub(super) fn new(block: &'a [u8; BLOCK], at: u64) -> Result<Self, TarError> {
        let header = Self { block };
        let sum = |signed: bool| {
            block.iter().enumerate().fold(0i64, |sum, (i, &byte)| {
                let byte = if (148..156).contains(&i) { b' ' } else { byte };
                sum + if signed { i64::from(byte as i8) } else { i64::from(byte) }
            })
        };
        // Old Sun tars sum signed bytes.
        match number(&block[148..156]) {
            Some(said) if said == sum(false) || said == sum(true) => Ok(header),
            _ => Err(TarError::Checksum(at)),
        }
    }

    pub(super) fn kind(&self) -> u8 {
        self.block[156]
    }

    fn gnu(&self) -> bool {
        self.block[257..265] == *b"ustar  \0"
    }

    fn name(&self) -> Vec<u8> {
        let name = text(&self.block[..100]);
        let prefix = text(&self.block[345..500]);
        if self.block[257..263] == *b"ustar\0" && !prefix.is_empty() {
            return [prefix, b"/", name].concat();
        }
        name.to_vec()
    }

    fn broken(&self, field: &'static str) -> TarError {
        TarError::Field { field, path: show(&self.name()) }
    }

    fn field(&self, field: &'static str, from: usize, to: usize) -> Result<u64, TarError> {
        number(&self.block[from..to]).and_then(|n| u64::try_from(n).ok()).ok_or_else(|| self.broken(field))
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        self.field("size", 124, 136)
    }

    /// GNU's old sparse map; what does not fit follows in blocks.
    pub(super) fn sparse_map(&self) -> Result<Map, TarError> {
        let real = self.field("real size", 483, 495)?;
        let mut map = Map::of(Vec::new(), real);
        map.take(&self.block[386..482], self.block[482] != 0)?;
        Ok(map)
    }

    /// Takes names and attributes out of what extended headers said.
    pub(super) fn entry(&self, extended: &mut Extended) -> Result<Entry, TarError> {
        let path = extended.long_name.take().or(extended.path.take()).unwrap_or_else(|| self.name());
        let link = extended.long_link.take().or(extended.link.take());
        let link = link.unwrap_or_else(|| text(&self.block[157..257]).to_vec());
        if path.len() > MOST_PATH || path.contains(&0) {
            return Err(TarError::Field { field: "name", path: show(&path) });
        }
        let device = || -> Result<(u32, u32), TarError> {
            let small =
                |field, from, to| u32::try_from(self.field(field, from, to)?).map_err(|_| self.broken(field));
            Ok((small("major", 329, 337)?, small("minor", 337, 345)?))
        };
        let kind = match self.kind() {
            // Archives from before POSIX mark a directory by its name alone.
            b'\0' | b'0' if path.ends_with(b"/") => Kind::Directory,
            b'\0' | b'0' | b'7' => Kind::File,
            b'S' if self.gnu() => Kind::File,
            b'1' | b'2' if link.is_empty() || link.len() > MOST_PATH || link.contains(&0) => {
                return Err(TarError::Field { field: "link name", path: show(&path) });
            }
            b'1' => Kind::HardLink(link),
            b'2' => Kind::SymLink(link),
            b'3' => device().map(|(major, minor)| Kind::CharDevice(major, minor))?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice(major, minor))?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(TarError::Kind { kind: other.into(), path: show(&path) }),
        };
        let id = |field, from, to| -> Result<u32, TarError> {
            u32::try_from(self.field(field, from, to)?).map_err(|_| self.broken(field))
        };
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => (number(&self.block[136..148]).ok_or_else(|| self.broken("mtime"))?, 0),
        };
        Ok(Entry {
            kind,
            mode: (self.field("mode", 100, 108)? & 0o7777) as u32,
            uid: extended.uid.map_or_else(|| id("uid", 108, 116), Ok)?,
            gid: extended.gid.map_or_else(|| id("gid", 116, 124), Ok)?,
            mtime,
            xattrs: std::mem::take(&mut extended.xattrs),
            size: extended.size.map_or_else(|| self.size(), Ok)?,
            sparse: None,
            path,
        })
    }
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Octal, or base 256 when the first bit is set (GNU); empty is zero.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let start = if negative { -1i64 << 6 | i64::from(first & 0x3f) } else { i64::from(first & 0x3f) };
        return rest.iter().try_fold(start, |n, &byte| n.checked_mul(256)?.checked_add(byte.into()));
    }
    let digits = text(field);
    let digits = digits.trim_ascii();
    digits.iter().try_fold(0i64, |n, &digit| {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        n.checked_mul(8)?.checked_add((digit - b'0').into())
    })
}
