//! An SEV-SNP machine on any KVM, for development: the same image, shim, kernel and init as on hardware, every page's state
//! tracked, every step counted. **It protects nothing**: guest memory is this process's, and its reports are signed by a key
//! that lies in a file.
//!
//! How it works: guest RAM is there twice, without and with the C-bit ([`views`]); SEV_STATUS and the GHCB MSR come here by
//! KVM's MSR filter; PVALIDATE, RMPADJUST and VMGEXIT, four bytes each, are replaced by an `out` that exits to this process,
//! in the shim after the launch digest was computed and in the kernel after the shim verified it ([`machine`]).
//!
//! What it does not show: CPUID, ports and MSRs never raise #VC, because KVM answers them.

pub mod chain;
pub mod ghcb;
pub mod machine;
pub mod messages;
pub mod processor;
pub mod psp;
pub mod report;
pub mod rmp;
pub mod start;
pub mod views;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use coffer_layout::snp::{CPUID_COHERENT, MSR_GHCB};

use super::snp::abi::CPUID_SEV;

/// Position of the C-bit: the highest bit that nested paging with four levels maps. Hardware's is 51, so that an image for
/// hardware does not start here by accident, nor one for this machine there.
pub const C_BIT: u32 = 47;

/// Shown at every start.
pub const WARNING: &str = "--tee snp-emulated PROTECTS NOTHING: this process reads and writes all of the guest, and signs its reports with a development key. Use it to develop and to test, never with a secret";

/// Makes a CPUID table that of this machine.
///
/// # Errors
/// The table is full.
pub fn cpuid(base: &CpuId) -> Result<CpuId, vmm_sys_util::fam::Error> {
    const ADDRESS_BITS: u32 = 48;
    // SEV, SEV-ES, SEV-SNP, and coherency of all caches.
    const FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 10;
    let mut entries: Vec<_> = base.as_slice().iter().filter(|e| e.function != CPUID_SEV).copied().collect();
    for entry in &mut entries {
        match entry.function {
            0x8000_0000 => entry.eax = entry.eax.max(CPUID_SEV),
            0x8000_0008 => entry.eax = entry.eax & !0xff | ADDRESS_BITS,
            _ => {}
        }
    }
    super::snp::cpuid::make_acceptable(&mut entries);
    let one_bit_less = 1 << 6;
    entries.push(kvm_cpuid_entry2 {
        function: CPUID_SEV,
        eax: FEATURES,
        ebx: C_BIT | one_bit_less | CPUID_COHERENT,
        ..Default::default()
    });
    CpuId::from_entries(&entries)
}

/// Brings the two MSRs to this process.
///
/// # Errors
/// KVM's: it has no MSR filter.
pub fn filter_msrs(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut cap = kvm_bindings::kvm_enable_cap { cap: Cap::X86UserSpaceMsr as u32, ..Default::default() };
    cap.args[0] = u64::from(MsrExitReason::Filter.bits());
    vm.enable_cap(&cap)?;
    let denied = [0];
    let range = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: MSR_GHCB,
        msr_count: 2,
        bitmap: &denied,
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
}

/// Makes a device's access to a private page end this process with words in place of a core dump.
pub fn catch_faults() {
    extern "C" fn ended(_: libc::c_int) {
        const WORDS: &[u8] = b"coffer-vmm: a device touched a page that the guest has not shared: on hardware it would have read ciphertext\n";
        // SAFETY: both calls may be made in a signal handler.
        unsafe {
            libc::write(2, WORDS.as_ptr().cast(), WORDS.len());
            libc::_exit(i32::from(crate::end::EMULATION));
        }
    }
    // SAFETY: the handler makes only calls that a handler may make, and does not return.
    unsafe {
        libc::signal(libc::SIGSEGV, ended as *const () as libc::sighandler_t);
    }
}
