//! The image's page tables: memory mapped to itself.
//!
//! Owns: their bytes.

use coffer_layout::{
    PAGE,
    boot::{PAGE_TABLE_PAGES, PAGE_TABLES},
    snp,
};

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;
const ENTRIES: u64 = 512;

/// A plain VM's: the first 4 GiB by 2 MiB pages, which every processor has.
pub(crate) fn native() -> Vec<u8> {
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

/// SEV-SNP's: 512 GiB by 1 GiB pages, private but for the gibibyte of shared window and devices.
pub(crate) fn snp(c_bit: u32) -> Vec<u8> {
    let private = 1 << c_bit;
    let mut words = vec![0u64; (snp::PAGE_TABLE_PAGES * ENTRIES) as usize];
    words[0] = (snp::PAGE_TABLES + PAGE) | PRESENT_WRITABLE | private;
    for gibibyte in 0..ENTRIES {
        let state = if gibibyte == snp::SHARED_BASE >> 30 { 0 } else { private };
        words[(ENTRIES + gibibyte) as usize] = gibibyte << 30 | LARGE | PRESENT_WRITABLE | state;
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does, and returns the physical address.
    fn translate(tables: &[u8], base: u64, c_bit: Option<u32>, address: u64) -> u64 {
        let c = c_bit.map_or(0, |bit| 1 << bit);
        let entry = |table: u64, index: u64| {
            let at = (table - base + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let next = |entry: u64| {
            assert_eq!(entry & 0x83, 3);
            entry & !0xfff & !c
        };
        let pdpte = entry(next(entry(base, address >> 39 & 511)), address >> 30 & 511);
        assert_eq!(pdpte & 3, 3);
        if pdpte & 0x80 != 0 {
            return (pdpte & !0x3fff_ffff) | (address & 0x3fff_ffff);
        }
        let pde = entry(next(pdpte), address >> 21 & 511);
        assert_eq!(pde & 0x83, 0x83);
        (pde & !0x1f_ffff) | (address & 0x1f_ffff)
    }

    #[test]
    fn every_address_below_4_gib_is_itself() {
        let tables = native();
        for address in [0, 0x10000, 0x100_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, PAGE_TABLES, None, address), address);
        }
    }

    #[test]
    fn all_but_the_shared_gibibyte_has_the_c_bit() {
        for bit in [47, 51] {
            let tables = snp(bit);
            for address in [0, 0x10000, 0xbfff_ffff, 4 << 30, (512 << 30) - 1] {
                assert_eq!(translate(&tables, snp::PAGE_TABLES, Some(bit), address), address | 1 << bit);
            }
            for address in [snp::SHARED_BASE, snp::SHARED_END - 1, 0xfee0_0000, 0xffff_ffff] {
                assert_eq!(translate(&tables, snp::PAGE_TABLES, Some(bit), address), address);
            }
        }
    }
}
