//! The shim's entry and the order of its two ways: a plain VM, SEV-SNP.
//!
//! Owns: the entry, the jump to the kernel, how a refusal leaves. Does not own: decisions, which are the library's and
//! tested on the host; instructions ([`hardware`]); exceptions ([`exceptions`]).
#![no_std]
#![no_main]

mod exceptions;
mod hardware;
mod memory;

use core::{
    arch::{asm, global_asm},
    panic::PanicInfo,
    ptr,
};

use coffer_layout::{
    PAGE,
    boot::{
        ACPI, BOOT_PARAMS, HANDOFF, Handoff, MP_POINTER, MP_TABLE, PARAMETERS, Platform, Refusal, STACK_TOP,
    },
    mark,
    snp::{CC_DATA, CPUID},
};
use coffer_shim::{acpi, boot_params, mp_table, plan, snp};
use hardware::Snp;

global_asm!(
    ".section .text.entry, \"ax\"",
    ".globl _start",
    "_start:",
    "cld",
    "mov rsp, {stack}",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    stack = const STACK_TOP,
    main = sym shim_main,
);

extern "C" fn shim_main() -> ! {
    exceptions::catch();
    let prepared = match Handoff::from_page(page(HANDOFF)) {
        Some(handoff) if handoff.platform == Platform::Snp => {
            hardware::set_snp();
            prepare_snp(&handoff)
        }
        Some(handoff) => prepare_native(&handoff),
        None => Err(Refusal::Handoff),
    };
    match prepared {
        // SAFETY: `entry` is the kernel's 64-bit entry in RAM, mapped by the identity tables; boot_params is complete.
        Ok(entry) => unsafe {
            asm!("cli", "jmp {entry}", entry = in(reg) entry, in("rsi") BOOT_PARAMS, options(noreturn))
        },
        Err(refusal) => refuse(refusal),
    }
}

/// Builds everything where it lies and returns the kernel's entry.
fn prepare_native(handoff: &Handoff) -> Result<u64, Refusal> {
    hardware::port_write(mark::SHIM_ENTRY);
    let plan = plan::plan(handoff, page(PARAMETERS))?;
    boot_params::write(&plan, cleared(BOOT_PARAMS));
    mp_table::write(plan.processors, cleared(MP_TABLE));
    for (index, byte) in mp_table::pointer().into_iter().enumerate() {
        // SAFETY: 16 bytes of RAM that the memory map keeps from Linux.
        unsafe { ptr::write_volatile((MP_POINTER as *mut u8).add(index), byte) };
    }
    hardware::port_write(mark::KERNEL_ENTRY);
    Ok(handoff.kernel_entry)
}

/// Validates RAM, copies and compares, builds everything and returns the kernel's entry.
fn prepare_snp(handoff: &Handoff) -> Result<u64, Refusal> {
    let mut hardware = Snp;
    let plan = snp::prepare(&mut hardware, handoff, page(PARAMETERS), page(CPUID))?;
    boot_params::write(&plan, cleared(BOOT_PARAMS));
    boot_params::write_cc_data(cleared(CC_DATA));
    acpi::write(plan.processors, cleared(ACPI));
    snp::tell(&mut hardware, mark::KERNEL_ENTRY)?;
    Ok(handoff.kernel_entry)
}

/// A page that the image loaded.
fn page(address: u64) -> &'static [u8; PAGE as usize] {
    // SAFETY: callers name pages that the image loads; nothing writes to them while the shim runs, under a TEE because
    // they are private, and without one the host is trusted with everything anyway.
    unsafe { &*(address as *const [u8; PAGE as usize]) }
}

/// A page of RAM that is the shim's to fill.
fn cleared(address: u64) -> &'static mut [u8; PAGE as usize] {
    // SAFETY: callers name each of these pages once; they lie in RAM, which is valid by now, and apart from everything
    // else.
    let page = unsafe { &mut *(address as *mut [u8; PAGE as usize]) };
    page.fill(0);
    page
}

/// Says why, and stops.
fn refuse(refusal: Refusal) -> ! {
    hardware::terminate(refusal as u8)
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    refuse(Refusal::Internal)
}
