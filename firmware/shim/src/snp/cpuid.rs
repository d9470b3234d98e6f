//! The CPUID page: a table that the hypervisor proposes and the firmware checks, entry by entry (AMD 56860, section 7.1).
//!
//! Owns: what of it the shim and the kernel rely on. The firmware checks each value against the processor, but not that
//! every leaf is there, nor that none is there twice. The instruction itself is never executed.

use coffer_layout::{
    PAGE,
    boot::Refusal,
    snp::{CPUID_COHERENT, CPUID_ENTRY, CPUID_HEADER, CPUID_MAX},
};

const BASIC: u32 = 0;
const FEATURES: u32 = 1;
const XSAVE: u32 = 0xd;
const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const MEMORY_ENCRYPTION: u32 = 0x8000_001f;
/// Last leaves of each range that have a meaning today.
const BASIC_LAST: u32 = 0x24;
const HYPERVISOR_LAST: u32 = 0x4000_01ff;
const EXTENDED_LAST: u32 = 0x8000_0028;

/// EDX of leaf 1 in every 64-bit processor: FPU, TSC, MSR, PAE, CX8, APIC, PGE, CMOV, FXSR, SSE, SSE2.
const FEATURES_EDX: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 13 | 1 << 15 | 7 << 24;
/// EDX of leaf 0x80000001: no-execute and long mode.
const EXTENDED_EDX: u32 = 1 << 20 | 1 << 29;
/// EAX of leaf 0x8000001F: SEV, SEV-ES, SEV-SNP.
const ENCRYPTION_EAX: u32 = 1 << 1 | 1 << 3 | 1 << 4;

/// What the shim wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Hardware keeps caches coherent when a page becomes private.
    pub coherent: bool,
}

#[derive(Clone, Copy)]
struct Entry<'a>(&'a [u8]);

impl Entry<'_> {
    fn number(&self, at: usize) -> u32 {
        u32::from_le_bytes(core::array::from_fn(|i| self.0[at + i]))
    }

    fn leaf(&self) -> u32 {
        self.number(0)
    }

    fn subleaf(&self) -> u32 {
        self.number(4)
    }

    /// Leaf, subleaf, XCR0 and XSS: what an answer is looked up by.
    fn key(&self) -> &[u8] {
        &self.0[..24]
    }

    fn eax(&self) -> u32 {
        self.number(24)
    }

    fn ebx(&self) -> u32 {
        self.number(28)
    }

    fn edx(&self) -> u32 {
        self.number(36)
    }
}

/// Checks the page.
///
/// # Errors
/// [`Refusal::CpuidPage`], [`Refusal::CpuidLeaves`], [`Refusal::CBit`].
pub fn check(page: &[u8; PAGE as usize], c_bit: u32) -> Result<Features, Refusal> {
    let count = u32::from_le_bytes(core::array::from_fn(|i| page[i])) as usize;
    if count == 0 || count > CPUID_MAX {
        return Err(Refusal::CpuidPage);
    }
    let entry = |index: usize| Entry(&page[CPUID_HEADER + index * CPUID_ENTRY..][..CPUID_ENTRY]);
    let find = |leaf| (0..count).map(entry).find(|e| e.leaf() == leaf && e.subleaf() == 0);
    let wanted = |leaf| find(leaf).ok_or(Refusal::CpuidLeaves);

    let (basic, extended) = (wanted(BASIC)?.eax(), wanted(EXTENDED)?.eax());
    let hypervisor = find(HYPERVISOR).map_or(HYPERVISOR, |e| e.eax());
    if !(XSAVE..=0xff).contains(&basic)
        || !(MEMORY_ENCRYPTION..=EXTENDED + 0xff).contains(&extended)
        || hypervisor & !0xffff != HYPERVISOR
    {
        return Err(Refusal::CpuidLeaves);
    }
    for index in 0..count {
        let leaf = entry(index).leaf();
        let last = match leaf {
            BASIC..=BASIC_LAST => basic,
            // KVM's own range may begin 0x100 later, with its own maximum, when it stands behind Hyper-V's.
            HYPERVISOR..=HYPERVISOR_LAST => HYPERVISOR_LAST,
            EXTENDED..=EXTENDED_LAST => extended,
            _ => return Err(Refusal::CpuidPage),
        };
        if leaf > last || (0..index).any(|before| entry(before).key() == entry(index).key()) {
            return Err(Refusal::CpuidPage);
        }
    }
    let (features, more, sizes) = (wanted(FEATURES)?, wanted(EXTENDED_FEATURES)?, wanted(ADDRESS_SIZES)?);
    let encryption = wanted(MEMORY_ENCRYPTION)?;
    let (physical, linear) = (sizes.eax() & 0xff, sizes.eax() >> 8 & 0xff);
    let consistent = features.edx() & FEATURES_EDX == FEATURES_EDX
        && more.edx() & EXTENDED_EDX == EXTENDED_EDX
        && (36..=52).contains(&physical)
        && (48..=57).contains(&linear)
        && encryption.eax() & ENCRYPTION_EAX == ENCRYPTION_EAX
        // x87 and SSE state, and an area that holds them.
        && find(XSAVE).is_none_or(|e| e.eax() & 3 == 3 && (0x240..=0x4000).contains(&e.ebx()));
    if !consistent {
        return Err(Refusal::CpuidLeaves);
    }
    if encryption.ebx() & 0x3f != c_bit {
        return Err(Refusal::CBit);
    }
    Ok(Features { coherent: encryption.ebx() & CPUID_COHERENT != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::honest::{MILAN, cpuid_page as page};
    use proptest::prelude::*;

    #[test]
    fn a_milan_guests_page_is_accepted() {
        assert_eq!(check(&page(&MILAN), 51), Ok(Features { coherent: false }));
        let mut coherent = MILAN;
        coherent[8][3] |= 1 << 31;
        assert_eq!(check(&page(&coherent), 51), Ok(Features { coherent: true }));
    }

    #[test]
    fn another_c_bit_is_refused() {
        assert_eq!(check(&page(&MILAN), 47), Err(Refusal::CBit));
    }

    #[test]
    fn leaves_with_swapped_contents_are_refused() {
        for one in 0..MILAN.len() {
            for other in one + 1..MILAN.len() {
                let mut swapped = MILAN;
                let (left, right) = (MILAN[one], MILAN[other]);
                swapped[one][2..].copy_from_slice(&right[2..]);
                swapped[other][2..].copy_from_slice(&left[2..]);
                // Leaf 7 and the hypervisor's say nothing that could contradict the other.
                let vague = [7, 0x4000_0000];
                if vague.contains(&left[0]) && vague.contains(&right[0]) {
                    continue;
                }
                assert!(check(&page(&swapped), 51).is_err(), "{:#x} and {:#x}", left[0], right[0]);
            }
        }
    }

    #[test]
    fn missing_unknown_and_double_leaves_are_refused() {
        for missing in [0, 1, 5, 6, 7, 8] {
            let mut leaves = MILAN.to_vec();
            leaves.remove(missing);
            assert_eq!(check(&page(&leaves), 51), Err(Refusal::CpuidLeaves), "{missing}");
        }
        for unknown in [0x25, 0x11, 0x2000_0000, 0x4000_0200, 0x8000_0020, 0x8fff_ffff, u32::MAX] {
            let mut leaves = MILAN.to_vec();
            leaves.push([unknown, 0, 0, 0, 0, 0]);
            assert_eq!(check(&page(&leaves), 51), Err(Refusal::CpuidPage), "{unknown:#x}");
        }
        let mut double = MILAN.to_vec();
        double.push([1, 0, 0, 0, 0, FEATURES_EDX]);
        assert_eq!(check(&page(&double), 51), Err(Refusal::CpuidPage));
        for count in [0u32, 65, u32::MAX] {
            let mut wrong = page(&MILAN);
            wrong[..4].copy_from_slice(&count.to_le_bytes());
            assert_eq!(check(&wrong, 51), Err(Refusal::CpuidPage));
        }
    }

    proptest! {
        #[test]
        fn no_page_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), PAGE as usize), count in 0u32..70) {
            let mut page: [u8; PAGE as usize] = bytes.try_into().unwrap();
            page[..4].copy_from_slice(&count.to_le_bytes());
            let _ = check(&page, 51);
        }
    }
}
