//! Files with holes: GNU's old map, and PAX 0.0, 0.1 and 1.0.
//!
//! Owns: that a map is in order, does not overlap, fits the file, and accounts for the data that follow.

use super::{BLOCK, Entry, TarError, header::number, pax::MOST_PIECES, show};

/// Largest file in bytes, holes included.
const MOST_REAL: u64 = 1 << 40;

/// Where an entry's data belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sparse {
    /// Offset and length of each piece of data, in order.
    pub pieces: Vec<(u64, u64)>,
    /// The file's size with its holes.
    pub real: u64,
}

/// A map being read.
pub(super) struct Map {
    pieces: Vec<(u64, u64)>,
    real: u64,
    /// Another block of it follows.
    pub(super) more: bool,
}

impl Map {
    pub(super) fn of(pieces: Vec<(u64, u64)>, real: u64) -> Self {
        Self { pieces, real, more: false }
    }

    /// Pairs of 12-byte numbers, until an empty one.
    pub(super) fn take(&mut self, pairs: &[u8], more: bool) -> Result<(), TarError> {
        let broken = || TarError::Field { field: "sparse map", path: String::new() };
        self.more = more;
        for pair in pairs.chunks_exact(24) {
            if pair[12] == 0 {
                break;
            }
            let read = |field: &[u8]| number(field).and_then(|n| u64::try_from(n).ok()).ok_or_else(broken);
            if self.pieces.len() >= MOST_PIECES {
                return Err(broken());
            }
            self.pieces.push((read(&pair[..12])?, read(&pair[12..])?));
        }
        Ok(())
    }

    /// A block of GNU's old form: 21 pairs and whether another follows.
    pub(super) fn extend(&mut self, block: &[u8; BLOCK]) -> Result<(), TarError> {
        self.take(&block[..504], block[504] != 0)
    }

    pub(super) fn check(self, entry: &Entry) -> Result<Sparse, TarError> {
        let broken = || TarError::Field { field: "sparse map", path: show(&entry.path) };
        let (mut end, mut sum) = (0u64, 0u64);
        for &(offset, length) in &self.pieces {
            if offset < end {
                return Err(broken());
            }
            end = offset.checked_add(length).filter(|end| *end <= self.real).ok_or_else(broken)?;
            sum += length;
        }
        if sum != entry.size || self.real > MOST_REAL {
            return Err(broken());
        }
        Ok(Sparse { pieces: self.pieces, real: self.real })
    }
}

/// PAX 1.0's map: a count, then offsets and lengths, each a decimal line.
#[derive(Default)]
pub(super) struct Lines {
    numbers: Vec<u64>,
    partial: Option<u64>,
}

impl Lines {
    pub(super) fn done(&self) -> bool {
        self.numbers.first().is_some_and(|count| self.numbers.len() as u64 > count.saturating_mul(2))
    }

    pub(super) fn push(&mut self, block: &[u8; BLOCK]) -> Result<(), TarError> {
        let broken = || TarError::Field { field: "sparse map", path: String::new() };
        for &byte in block {
            if self.done() {
                break;
            }
            match byte {
                b'\n' => {
                    let n = self.partial.take().ok_or_else(broken)?;
                    if self.numbers.is_empty() && n > MOST_PIECES as u64 {
                        return Err(broken());
                    }
                    self.numbers.push(n);
                }
                b'0'..=b'9' => {
                    let n = self.partial.unwrap_or(0);
                    let n = n.checked_mul(10).and_then(|n| n.checked_add((byte - b'0').into()));
                    self.partial = Some(n.ok_or_else(broken)?);
                }
                _ => return Err(broken()),
            }
        }
        Ok(())
    }

    pub(super) fn map(self) -> Result<Vec<(u64, u64)>, TarError> {
        Ok(self.numbers.get(1..).unwrap_or_default().chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }
}
