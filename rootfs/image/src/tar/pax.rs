//! Extended headers: PAX records (POSIX.1-2001) and GNU's long names.
//!
//! Owns: the records that mean something for a file; others are skipped, as POSIX asks.

use super::TarError;

/// Most xattrs of one file.
const MOST_XATTRS: usize = 128;
/// Longest value of an xattr in bytes, as Linux has it: setting a longer one fails.
const MOST_VALUE: usize = 64 << 10;
/// Most pieces of one sparse file.
pub(super) const MOST_PIECES: usize = 1 << 16;

/// What extended headers said of the entry that follows.
#[derive(Default)]
pub(super) struct Extended {
    /// GNU's, which win over PAX's as in Go's reader.
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Option<SparseForm>,
    any: bool,
}

/// PAX sparse forms: with a map in records (0.0, 0.1) or in the data (1.0).
#[derive(Default)]
pub(super) struct SparseForm {
    pub(super) real: Option<u64>,
    pub(super) map: Option<Vec<(u64, u64)>>,
    offset: Option<u64>,
    name: Option<Vec<u8>>,
    major: bool,
}

fn broken() -> TarError {
    TarError::Field { field: "PAX record", path: String::new() }
}

fn decimal<T: std::str::FromStr>(value: &[u8]) -> Result<T, TarError> {
    let text = std::str::from_utf8(value).map_err(|_| broken())?;
    if text.starts_with('+') {
        return Err(broken());
    }
    text.parse().map_err(|_| broken())
}

impl Extended {
    pub(super) fn is_empty(&self) -> bool {
        !self.any
    }

    pub(super) fn long_name(&mut self, mut bytes: Vec<u8>) {
        bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
        (self.any, self.long_name) = (true, Some(bytes).filter(|name| !name.is_empty()));
    }

    pub(super) fn long_link(&mut self, mut bytes: Vec<u8>) {
        bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
        (self.any, self.long_link) = (true, Some(bytes).filter(|link| !link.is_empty()));
    }

    /// Records of one header: `<length> <key>=<value>\n`, the length counting itself.
    ///
    /// It replaces what an earlier one said, as in Go's reader: what is kept of all of them is no more than one may have.
    pub(super) fn pax(&mut self, mut bytes: &[u8]) -> Result<(), TarError> {
        *self = Self {
            long_name: self.long_name.take(),
            long_link: self.long_link.take(),
            any: true,
            ..Self::default()
        };
        let mut sparse = SparseForm::default();
        let mut is_sparse = false;
        while !bytes.is_empty() {
            // GNU tar pads with NUL in places.
            if bytes.iter().all(|&byte| byte == 0) {
                break;
            }
            let space = bytes.iter().take(20).position(|&byte| byte == b' ').ok_or_else(broken)?;
            let length: usize = decimal(&bytes[..space])?;
            let record = bytes.get(space + 1..length).ok_or_else(broken)?;
            bytes = &bytes[length..];
            let record = record.strip_suffix(b"\n").ok_or_else(broken)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                is_sparse = true;
                sparse.record(key, value)?;
            } else {
                self.record(key, value)?;
            }
        }
        if is_sparse {
            if let Some(name) = sparse.name.take() {
                self.path = Some(name);
            }
            if sparse.map.is_none() && !sparse.major {
                return Err(broken());
            }
            self.sparse = Some(sparse);
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    if name.is_empty()
                        || name.contains(&0)
                        || self.xattrs.len() >= MOST_XATTRS
                        || value.len() > MOST_VALUE
                    {
                        return Err(broken());
                    }
                    self.xattrs.retain(|(have, _)| have != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

impl SparseForm {
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"size" | b"realsize" => self.real = Some(decimal(value)?),
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = decimal::<u32>(value)? == 1,
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or_else(broken)?;
                let map = self.map.get_or_insert_default();
                if map.len() >= MOST_PIECES {
                    return Err(broken());
                }
                map.push((offset, decimal(value)?));
            }
            b"map" => {
                let numbers: Vec<u64> = if value.is_empty() {
                    Vec::new()
                } else {
                    value.split(|&byte| byte == b',').map(decimal).collect::<Result<_, _>>()?
                };
                if !numbers.len().is_multiple_of(2) || numbers.len() / 2 > MOST_PIECES {
                    return Err(broken());
                }
                self.map = Some(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect());
            }
            _ => {}
        }
        Ok(())
    }
}

/// `[-]seconds[.fraction]`.
fn time(value: &[u8]) -> Result<(i64, u32), TarError> {
    let point = value.iter().position(|&byte| byte == b'.');
    let (whole, fraction) = match point {
        Some(point) => (&value[..point], &value[point + 1..]),
        None => (value, &b""[..]),
    };
    let seconds: i64 = decimal(whole)?;
    let mut nanos = 0u32;
    for i in 0..9 {
        let digit = fraction.get(i).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return Err(broken());
        }
        nanos = nanos * 10 + u32::from(digit - b'0');
    }
    if whole.starts_with(b"-") && nanos > 0 {
        return Ok((seconds.checked_sub(1).ok_or_else(broken)?, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}
