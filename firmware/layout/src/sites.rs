//! The table of sites: where shim and kernel have instructions that only SEV-SNP hardware executes.
//!
//! Owns: the page's format, both directions. How it is used stands in [`crate::snp`].

use crate::PAGE;

/// `SITES` and a format version.
const MAGIC: u64 = u64::from_le_bytes(*b"SITES\0\0\x01");
const HEAD: usize = 16;
const ENTRY: usize = 8;

/// Most sites that a page holds.
pub const SITES_MAX: usize = (PAGE as usize - HEAD) / ENTRY;

/// Which instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum SiteKind {
    /// PVALIDATE.
    Pvalidate = 1,
    /// RMPADJUST.
    Rmpadjust = 2,
    /// VMGEXIT.
    Vmgexit = 3,
}

impl SiteKind {
    /// Every instruction.
    pub const ALL: [Self; 3] = [Self::Pvalidate, Self::Rmpadjust, Self::Vmgexit];

    /// The instruction's bytes.
    #[must_use]
    pub const fn bytes(self) -> [u8; 4] {
        match self {
            Self::Pvalidate => [0xf2, 0x0f, 0x01, 0xff],
            Self::Rmpadjust => [0xf3, 0x0f, 0x01, 0xfe],
            Self::Vmgexit => [0xf3, 0x0f, 0x01, 0xd9],
        }
    }
}

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site {
    /// Guest physical address of its first byte, where the guest executes it.
    pub gpa: u32,
    /// Which it is.
    pub kind: SiteKind,
}

/// The page's bytes; `None` when there are more than [`SITES_MAX`].
#[must_use]
pub fn to_page(sites: &[Site]) -> Option<[u8; PAGE as usize]> {
    let mut page = [0; PAGE as usize];
    page[..8].copy_from_slice(&MAGIC.to_le_bytes());
    page[8..12].copy_from_slice(&u32::try_from(sites.len()).ok()?.to_le_bytes());
    for (index, site) in sites.iter().enumerate() {
        let at = HEAD + index * ENTRY;
        page.get_mut(at..at + 4)?.copy_from_slice(&site.gpa.to_le_bytes());
        page.get_mut(at + 4..at + 8)?.copy_from_slice(&(site.kind as u32).to_le_bytes());
    }
    Some(page)
}

/// The sites of a page, in its order; `None` when it is not of this format.
#[must_use]
pub fn from_page(page: &[u8; PAGE as usize]) -> Option<impl Iterator<Item = Site> + '_> {
    let number = |at: usize| u32::from_le_bytes(core::array::from_fn(|i| page[at + i]));
    let magic = u64::from(number(0)) | u64::from(number(4)) << 32;
    let count = number(8) as usize;
    if magic != MAGIC || count > SITES_MAX {
        return None;
    }
    let site = move |index: usize| {
        let at = HEAD + index * ENTRY;
        let kind = SiteKind::ALL.into_iter().find(|k| *k as u32 == number(at + 4))?;
        Some(Site { gpa: number(at), kind })
    };
    if (0..count).any(|index| site(index).is_none()) {
        return None;
    }
    Some((0..count).filter_map(site))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_table_comes_back_and_others_are_not_read() {
        let sites: Vec<Site> =
            (0..SITES_MAX as u32).map(|i| Site { gpa: i * 7, kind: SiteKind::ALL[i as usize % 3] }).collect();
        let page = to_page(&sites).unwrap();
        assert_eq!(from_page(&page).unwrap().collect::<Vec<_>>(), sites);
        assert!(to_page(&[sites[0]; SITES_MAX + 1]).is_none());
        for (at, byte) in [(0, b'X'), (7, 2), (9, 3), (HEAD + 4, 4)] {
            let mut other = page;
            other[at] = byte;
            assert!(from_page(&other).is_none(), "{at}");
        }
    }
}
