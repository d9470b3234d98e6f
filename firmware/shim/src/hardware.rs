//! The instructions behind the library's decisions.
//!
//! Owns: MSRs, VMGEXIT, PVALIDATE, the mark port, accesses to memory that is not Rust's. PVALIDATE and VMGEXIT stand in
//! one place each, in functions that are not inlined: an emulated machine replaces them there.

use core::{
    arch::asm,
    ptr, slice,
    sync::atomic::{AtomicBool, Ordering},
};

use coffer_layout::{
    MARK_PORT, PAGE, mark,
    snp::{GHCB, MSR_GHCB, MSR_SEV_STATUS, termination},
};
use coffer_shim::snp::{Hardware, PageSize, Validation, ghcb::EXIT_INFO_1};

/// Whether this is an SEV-SNP guest, as the measured handoff page says.
static IS_SNP: AtomicBool = AtomicBool::new(false);

/// From here on refusals go through the GHCB MSR.
pub(crate) fn set_snp() {
    IS_SNP.store(true, Ordering::Relaxed);
}

/// Tells the VMM why the shim stops, and stops.
pub(crate) fn terminate(code: u8) -> ! {
    let is_snp = IS_SNP.load(Ordering::Relaxed);
    if !is_snp {
        port_write(mark::SHIM_REFUSED);
        port_write(code);
    }
    loop {
        if is_snp {
            write_msr(MSR_GHCB, termination(code));
            vmgexit();
        }
        // SAFETY: nothing is left to do; interrupts are off, so this is for ever. Under SEV-SNP HLT may be intercepted, and
        // then the exception's handler comes back here.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// Writes to the mark port of a plain VM.
pub(crate) fn port_write(byte: u8) {
    // SAFETY: the port is the VMM's mark port and has no effect on memory.
    unsafe { asm!("out dx, al", in("dx") MARK_PORT, in("al") byte, options(nomem, nostack, preserves_flags)) }
}

fn read_msr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: callers read MSRs that every SEV-SNP guest has.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

fn write_msr(index: u32, value: u64) {
    // SAFETY: the one MSR that is written, the GHCB's, changes nothing but what VMGEXIT means.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

#[inline(never)]
fn vmgexit() {
    // SAFETY: the hypervisor may write to the GHCB, which is read through volatile accesses only.
    unsafe { asm!(".byte 0xf3, 0x0f, 0x01, 0xd9", options(nostack)) }
}

#[inline(never)]
fn pvalidate(address: u64, size: PageSize) -> Validation {
    let (code, carry): (u64, u8);
    // SAFETY: makes a page of RAM valid; contents that nothing refers to yet may change.
    unsafe {
        asm!(
            ".byte 0xf2, 0x0f, 0x01, 0xff",
            "setc {carry}",
            carry = out(reg_byte) carry,
            inlateout("rax") address => code,
            in("ecx") size as u32,
            in("edx") 1,
            options(nostack),
        );
    }
    Validation { code: code as u32, unchanged: carry != 0 }
}

/// The machine under SEV-SNP: memory is mapped to itself, shared where the layout says so.
pub(crate) struct Snp;

impl Hardware for Snp {
    fn sev_status(&mut self) -> u64 {
        read_msr(MSR_SEV_STATUS)
    }

    fn exchange(&mut self, request: u64) -> u64 {
        write_msr(MSR_GHCB, request);
        vmgexit();
        read_msr(MSR_GHCB)
    }

    fn exit(&mut self, fields: &[(u16, u64)]) -> u64 {
        let at = |offset: u16| (GHCB + u64::from(offset)) as *mut u64;
        for (offset, value) in fields {
            // SAFETY: offsets are the GHCB's fields; the page is shared and only accessed like this.
            unsafe { ptr::write_volatile(at(*offset), *value) };
        }
        write_msr(MSR_GHCB, GHCB);
        vmgexit();
        // SAFETY: likewise.
        unsafe { ptr::read_volatile(at(EXIT_INFO_1)) }
    }

    fn pvalidate(&mut self, gpa: u64, size: PageSize) -> Validation {
        pvalidate(gpa, size)
    }

    fn touch(&mut self, gpa: u64) {
        for address in [gpa, gpa + PAGE - 1] {
            // SAFETY: a byte of RAM that was just validated; the value is not used.
            unsafe {
                asm!("mov {byte}, [{address}]", byte = out(reg_byte) _, address = in(reg) address, options(readonly, nostack, preserves_flags))
            }
        }
    }

    fn copy(&mut self, from: u64, to: u64, length: usize) {
        // SAFETY: the library checked that `from` lies in the shared window and `to` in RAM that is valid and holds
        // nothing yet; the copy is by instruction, so that no byte of the source is read twice.
        unsafe {
            asm!("rep movsb", inout("rcx") length => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
        }
    }

    fn private(&self, gpa: u64, length: usize) -> &[u8] {
        // SAFETY: RAM that `copy` has filled and that nobody else writes to; it is read before the next copy.
        unsafe { slice::from_raw_parts(gpa as *const u8, length) }
    }

    fn clear(&mut self, gpa: u64, length: u64) {
        // SAFETY: as for `copy`.
        unsafe {
            asm!("rep stosb", inout("rcx") length => _, inout("rdi") gpa => _, in("al") 0u8, options(nostack, preserves_flags));
        }
    }
}
