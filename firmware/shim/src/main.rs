//! The shim's entry and everything that touches the machine: ports, fixed addresses, the jump.
//!
//! Owns: the instructions. Does not own: decisions, which are the library's and tested on the host.
#![no_std]
#![no_main]

use core::{
    arch::{asm, global_asm},
    panic::PanicInfo,
    ptr,
};

use coffer_layout::{
    MARK_PORT, PAGE,
    boot::{
        BOOT_PARAMS, HANDOFF, Handoff, MP_POINTER, MP_TABLE, MP_TABLE_MAX, PARAMETERS, Refusal, STACK_TOP,
    },
    mark,
};
use coffer_shim::{boot_params, mp_table, plan};

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
    tell(mark::SHIM_ENTRY);
    match prepare() {
        Ok(entry) => {
            tell(mark::KERNEL_ENTRY);
            // SAFETY: `entry` is the kernel's 64-bit entry in RAM, mapped by the identity tables; boot_params is complete.
            unsafe {
                asm!("cli", "jmp {entry}", entry = in(reg) entry, in("rsi") BOOT_PARAMS, options(noreturn))
            }
        }
        Err(refusal) => refuse(refusal),
    }
}

/// Builds everything and returns the kernel's entry.
fn prepare() -> Result<u64, Refusal> {
    // SAFETY: the image puts both pages there; nothing writes to them while the shim runs.
    let (page, parameters) =
        unsafe { (&*(HANDOFF as *const [u8; PAGE as usize]), &*(PARAMETERS as *const [u8; PAGE as usize])) };
    let handoff = Handoff::from_page(page).ok_or(Refusal::Handoff)?;
    let plan = plan::plan(&handoff, parameters)?;
    // SAFETY: this page is the shim's, lies in RAM and has no other reference.
    let page = unsafe { &mut *(BOOT_PARAMS as *mut [u8; PAGE as usize]) };
    page.fill(0);
    boot_params::write(&plan, page);
    // SAFETY: likewise.
    let table = unsafe { &mut *(MP_TABLE as *mut [u8; MP_TABLE_MAX as usize]) };
    mp_table::write(plan.processors, table);
    for (index, byte) in mp_table::pointer().into_iter().enumerate() {
        // SAFETY: 16 bytes of RAM that the memory map keeps from Linux.
        unsafe { ptr::write_volatile((MP_POINTER as *mut u8).add(index), byte) };
    }
    Ok(handoff.kernel_entry)
}

fn refuse(refusal: Refusal) -> ! {
    tell(mark::SHIM_REFUSED);
    tell(refusal as u8);
    loop {
        // SAFETY: nothing is left to do; interrupts are off, so this is for ever.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

fn tell(byte: u8) {
    // SAFETY: the port is the VMM's mark port and has no effect on memory.
    unsafe { asm!("out dx, al", in("dx") MARK_PORT, in("al") byte, options(nomem, nostack, preserves_flags)) }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    refuse(Refusal::Internal)
}

// What the compiler calls for copies and fills; there is no C library here.

/// # Safety
/// As C's memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise is C's: both ranges are valid and do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's memset.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise is C's: the range is valid.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's memcmp.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller's promise is C's: both ranges are valid.
        let (x, y) = unsafe { (ptr::read(a.add(index)), ptr::read(b.add(index))) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}
