//! The measured page tables: the first 4 GiB mapped to themselves by 2 MiB pages.
//!
//! Owns: their bytes.

use coffer_layout::{
    PAGE,
    boot::{PAGE_TABLE_PAGES, PAGE_TABLES},
};

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;
const ENTRIES: u64 = 512;

/// All pages of tables, from [`PAGE_TABLES`] on.
pub(crate) fn identity() -> Vec<u8> {
    let mut words = vec![0u64; (PAGE_TABLE_PAGES * ENTRIES) as usize];
    words[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for gibibyte in 0..4 {
        words[(ENTRIES + gibibyte) as usize] = (PAGE_TABLES + (2 + gibibyte) * PAGE) | PRESENT_WRITABLE;
        for entry in 0..ENTRIES {
            words[((2 + gibibyte) * ENTRIES + entry) as usize] =
                gibibyte << 30 | entry << 21 | LARGE | PRESENT_WRITABLE;
        }
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does.
    fn translate(tables: &[u8], address: u64) -> u64 {
        let entry = |table: u64, index: u64| {
            let at = (table - PAGE_TABLES + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let pml4e = entry(PAGE_TABLES, address >> 39 & 511);
        let pdpte = entry(pml4e & !0xfff, address >> 30 & 511);
        let pde = entry(pdpte & !0xfff, address >> 21 & 511);
        assert_eq!(pml4e & pdpte & pde & 3, 3);
        assert_eq!(pde & 0x80, 0x80);
        (pde & !0x1f_ffff) | (address & 0x1f_ffff)
    }

    #[test]
    fn every_address_below_4_gib_is_itself() {
        let tables = identity();
        for address in [0, 0x10000, 0x100_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, address), address);
        }
    }
}
