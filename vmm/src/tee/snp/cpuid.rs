//! The CPUID page (AMD 56860, 8.17): the table that the guest uses in place of the CPUID instruction.
//!
//! Owns: the page's bytes from KVM's table, and the difference to what the firmware corrects. Does not own: KVM's table.

use coffer_layout::{
    PAGE,
    snp::{CPUID_ENTRY, CPUID_HEADER, CPUID_MAX},
};
use kvm_bindings::kvm_cpuid_entry2;
use thiserror::Error;

/// Why there is no page.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "KVM's CPUID table has {0} leaves with contents, the CPUID page holds {CPUID_MAX}: nothing may be left out in silence"
)]
pub struct TooMany(pub usize);

/// Bits that the firmware refuses, (leaf, index, [eax, ebx, ecx, edx]), each mask is cleared.
const CLEARED: [(u32, u32, [u32; 4]); 4] = [
    // TSC deadline timer.
    (0x1, 0, [0, 0, 1 << 24, 0]),
    // TSC_ADJUST, and speculation control that only the host may set.
    (0x7, 0, [0, 1 << 1, 0, u32::MAX]),
    // Speculative store bypass by VIRT_SPEC_CTRL.
    (0x8000_0008, 0, [0, 1 << 25, 0, 0]),
    (0x8000_0021, 0, [1 << 9, 0, u32::MAX, 0]),
];

/// Makes KVM's table one that the firmware takes. The guest gets the same table from KVM, so that both agree.
pub fn make_acceptable(entries: &mut [kvm_cpuid_entry2]) {
    for entry in entries {
        for (leaf, index, [eax, ebx, ecx, edx]) in CLEARED {
            if (entry.function, entry.index) == (leaf, index) {
                entry.eax &= !eax;
                entry.ebx &= !ebx;
                entry.ecx &= !ecx;
                entry.edx &= !edx;
            }
        }
    }
}

/// The page for a table.
///
/// # Errors
/// [`TooMany`].
pub fn page(entries: &[kvm_cpuid_entry2]) -> Result<[u8; PAGE as usize], TooMany> {
    let mut page = [0; PAGE as usize];
    let listed: Vec<_> = entries.iter().filter(|e| belongs(e)).collect();
    if listed.len() > CPUID_MAX {
        return Err(TooMany(listed.len()));
    }
    page[..4].copy_from_slice(&(listed.len() as u32).to_le_bytes());
    for (entry, to) in listed.iter().zip(page[CPUID_HEADER..].chunks_exact_mut(CPUID_ENTRY)) {
        let extended_state = entry.function == 0xd && entry.index <= 1;
        // The size that an x87 and SSE guest needs: what the firmware computes for XCR0 1 and XSS 0.
        let ebx = if extended_state { 0x240 } else { entry.ebx };
        let words = [entry.function, entry.index];
        let values = [entry.eax, ebx, entry.ecx, entry.edx];
        for (word, at) in words.iter().zip([0, 4]).chain(values.iter().zip([24, 28, 32, 36])) {
            to[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        to[8..16].copy_from_slice(&u64::from(extended_state).to_le_bytes());
    }
    Ok(page)
}

/// Leaves of zeros say what a leaf that is not there says; the first of a range gives its length.
fn belongs(entry: &kvm_cpuid_entry2) -> bool {
    let first = matches!(entry.function, 0 | 0x4000_0000 | 0x8000_0000);
    let empty = (entry.eax | entry.ebx | entry.ecx | entry.edx) == 0;
    (first || !empty) && entry.function != 0x8000_0026
}

/// Which words of a page the firmware changed, in words.
#[must_use]
pub fn difference(ours: &[u8; PAGE as usize], corrected: &[u8; PAGE as usize]) -> Vec<String> {
    let word =
        |page: &[u8; PAGE as usize], at: usize| u32::from_le_bytes(std::array::from_fn(|i| page[at + i]));
    let mut lines = Vec::new();
    for index in 0..CPUID_MAX {
        let at = CPUID_HEADER + index * CPUID_ENTRY;
        for (name, offset) in [("leaf", 0), ("index", 4), ("eax", 24), ("ebx", 28), ("ecx", 32), ("edx", 36)]
        {
            let (a, b) = (word(ours, at + offset), word(corrected, at + offset));
            if a != b {
                let (leaf, sub) = (word(ours, at), word(ours, at + 4));
                lines.push(format!("leaf {leaf:#x} index {sub}: {name} {a:#010x} became {b:#010x}"));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx: 2, ecx: u32::MAX, edx: 4, ..Default::default() }
    }

    #[test]
    fn entries_lie_where_the_abi_has_them_and_empty_ones_are_left_out() {
        let empty = kvm_cpuid_entry2 { function: 3, ..Default::default() };
        let page = page(&[leaf(0, 0, 0xd), empty, leaf(0xd, 0, 7)]).unwrap();
        assert_eq!(page[..16], [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[16..24], [0; 8]);
        assert_eq!((page[40], page[44], page[52]), (0xd, 2, 4));
        let second = &page[64..112];
        assert_eq!((second[0], second[8], second[16]), (0xd, 1, 0));
        assert_eq!(second[28..32], 0x240u32.to_le_bytes());
    }

    #[test]
    fn a_table_that_does_not_fit_is_refused() {
        let many: Vec<_> = (0..65).map(|i| leaf(i, 0, 1)).collect();
        assert_eq!(page(&many), Err(TooMany(65)));
        assert!(page(&many[..64]).is_ok());
    }

    #[test]
    fn what_the_firmware_refuses_is_cleared_and_what_it_changed_is_named() {
        let mut table = [leaf(1, 0, 1), leaf(7, 0, 1), leaf(7, 1, 1)];
        make_acceptable(&mut table);
        assert_eq!(table[0].ecx, !(1 << 24));
        assert_eq!((table[1].ebx, table[1].edx, table[2].edx), (0, 0, 4));
        let ours = page(&table).unwrap();
        let mut corrected = ours;
        corrected[16 + 32] = 0;
        assert_eq!(difference(&ours, &corrected), ["leaf 0x1 index 0: ecx 0xfeffffff became 0xfeffff00"]);
        assert!(difference(&ours, &ours).is_empty());
    }
}
