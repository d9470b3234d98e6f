//! SEV-SNP: addresses, numbers of the GHCB protocol, and how the shim's and the kernel's special instructions are found.
//!
//! Owns: what image tool, shim and VMM must agree on. Does not own: the launch (VMM), the checks (shim).
//! Sources: AMD 56421 (GHCB protocol, revision 2.03), 56860 (SNP firmware ABI), Linux 6.12 `arch/x86/include/asm/sev*.h`.
//!
//! # What is launched
//!
//! [`LAUNCH_START`] up to `Handoff::launch_end`, without a gap, in RAM below 640 KiB: secrets, CPUID page, parameters
//! (unmeasured), hash page, page tables, stack, shim. Then the first processor's VMSA at [`VMSA_GPA`], last. Nothing else
//! of RAM is launched, and the shim validates all of it once.
//!
//! # What is shared
//!
//! [`SHARED_BASE`] up to at most [`SHARED_END`] is no RAM and never private: the GHCB page, the table of sites, and the
//! bytes of command line, kernel and initramfs, each region of the hash page from a page's start. The VMM maps it as
//! memory of its own and may drop it once the kernel runs ([`crate::mark::KERNEL_ENTRY`], which arrives as a GHCB exit:
//! `out` of one byte to [`crate::MARK_PORT`]). No page changes its state before the kernel runs.
//!
//! The page tables ([`PAGE_TABLES`]) map 512 GiB to themselves by 1 GiB pages, the C-bit set in all of them but the
//! fourth, 0xC0000000 to 0xFFFFFFFF, where shared window and devices lie and never RAM.
//!
//! # Emulation
//!
//! PVALIDATE, RMPADJUST and VMGEXIT are four bytes each ([`crate::sites::SiteKind::bytes`]). The image tool finds them in the shim
//! and in the kernel and writes their addresses into the page at [`SITES`] ([`crate::sites`]). An emulated machine
//! replaces the shim's sites (below [`crate::boot::HIGH_START`]) once the launch digest is computed, and the kernel's
//! when the shim has verified it, that is, at [`crate::mark::KERNEL_ENTRY`]. On hardware nobody reads the page. It is
//! the host's: whoever uses it must see the four bytes at each site before it writes there, and stop if they differ.

use crate::{LOW_RAM_END, MMIO_BASE, PAGE, boot};

/// The secrets page.
pub const SECRETS: u64 = 0x8000;
/// The CPUID page.
pub const CPUID: u64 = 0x9000;
/// First of the pages that are launched privately.
pub const LAUNCH_START: u64 = SECRETS;
/// PML4 and PDPT.
pub const PAGE_TABLES: u64 = 0xc000;
/// Pages of page tables.
pub const PAGE_TABLE_PAGES: u64 = 2;
/// All RAM lies below: what one PDPT maps.
pub const MEMORY_TOP: u64 = 512 << 30;
/// Linux's `cc_setup_data` and, at [`CC_BLOB_OFFSET`], `cc_blob_sev_info`, written by the shim.
pub const CC_DATA: u64 = 0x25000;
/// Offset of the blob.
pub const CC_BLOB_OFFSET: u64 = 0x100;
/// Where hardware and KVM have the VMSAs: an address beyond all RAM, the same for every processor.
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// The shared window.
pub const SHARED_BASE: u64 = LOW_RAM_END;
/// Where it ends at the latest.
pub const SHARED_END: u64 = MMIO_BASE;
/// The shim's GHCB: first page of the shared window.
pub const GHCB: u64 = SHARED_BASE;
/// The table of sites.
pub const SITES: u64 = GHCB + PAGE;
/// Command line, kernel and initramfs.
pub const PAYLOAD: u64 = SITES + PAGE;

/// MSR: the GHCB's address or a message of the MSR protocol.
pub const MSR_GHCB: u32 = 0xc001_0130;
/// MSR: which features are active.
pub const MSR_SEV_STATUS: u32 = 0xc001_0131;
/// SEV_STATUS: SEV, SEV-ES and SEV-SNP.
pub const SEV_STATUS_SNP: u64 = 7;
/// VMSA field `sev_features`, bit 0.
pub const SEV_FEATURE_SNP_ACTIVE: u64 = 1;
/// Guest policy of every image: ABI 0.0, SMT allowed, no debugging, no migration (bit 17 must be one).
pub const POLICY: u64 = 0x3_0000;

/// The reason code set of the shim's termination requests (GHCB MSR bits 15:12); 0 is the specification's, 1 is Linux's.
pub const TERMINATION_SET: u8 = 0xc;

/// GHCB MSR value that asks for termination: request 0x100, set, code (a [`boot::Refusal`]).
#[must_use]
pub const fn termination(code: u8) -> u64 {
    0x100 | (TERMINATION_SET as u64) << 12 | (code as u64) << 16
}

/// The set and the code of a termination request; `None` when the value is not one.
#[must_use]
pub const fn terminated(ghcb_msr: u64) -> Option<(u8, u8)> {
    if ghcb_msr & 0xfff == 0x100 {
        Some(((ghcb_msr >> 12 & 15) as u8, (ghcb_msr >> 16 & 0xff) as u8))
    } else {
        None
    }
}

/// Bytes of the CPUID page before its entries: u32 count, then zeros.
pub const CPUID_HEADER: usize = 16;
/// Bytes of an entry: eax_in, ecx_in u32; xcr0_in, xss_in u64; eax, ebx, ecx, edx u32; reserved u64.
pub const CPUID_ENTRY: usize = 48;
/// Most entries.
pub const CPUID_MAX: usize = 64;
/// CPUID 0x8000001F EBX bit 31: hardware keeps caches coherent when a page becomes private (no CVE-2025-38560). An
/// emulated machine sets it, or the shim reads two bytes of every page of RAM.
pub const CPUID_COHERENT: u32 = 1 << 31;

const _: () = {
    assert!(
        CPUID == SECRETS + PAGE
            && boot::PARAMETERS == CPUID + PAGE
            && boot::HANDOFF == boot::PARAMETERS + PAGE
    );
    assert!(PAGE_TABLES == boot::HANDOFF + PAGE);
    assert!(PAGE_TABLES + PAGE_TABLE_PAGES * PAGE == boot::STACK_TOP - boot::STACK_SIZE);
    assert!(CC_DATA == boot::MP_TABLE + boot::MP_TABLE_MAX && CC_DATA + PAGE == boot::ACPI);
    assert!(CPUID_HEADER + CPUID_MAX * CPUID_ENTRY <= PAGE as usize);
    assert!(SHARED_BASE >> 30 == 3 && SHARED_END <= 4 << 30);
};

#[cfg(test)]
mod tests {
    use super::*;
    use boot::Refusal;

    #[test]
    fn every_refusal_has_a_code_of_its_own_and_words() {
        let mut seen = [false; 256];
        for refusal in Refusal::ALL {
            let code = *refusal as u8;
            assert!(!seen[usize::from(code)], "{refusal:?}");
            seen[usize::from(code)] = true;
            assert_ne!(Refusal::words(code), Refusal::words(0xff), "{refusal:?}");
            assert_eq!(terminated(termination(code)), Some((0xc, code)));
        }
        assert_eq!(terminated(0x1_1100), Some((1, 1)));
        assert_eq!(terminated(0xc000_0000), None);
    }
}
