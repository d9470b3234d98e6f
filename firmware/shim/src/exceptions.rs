//! Exceptions: none is expected, and each ends in a refusal instead of a triple fault.
//!
//! Owns: the shim's GDT and IDT. They last until the kernel loads its own.

use core::{
    arch::{asm, global_asm},
    cell::UnsafeCell,
};

use coffer_layout::boot::Refusal;

use crate::hardware;

const CODE_SELECTOR: u64 = 0x10;
const VECTORS: usize = 32;
const PAGE_FAULT: usize = 14;
const VMM_COMMUNICATION: usize = 29;

/// Null, unused, 64-bit code at 0x10, data at 0x18: the selectors with which the first processor starts.
static GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[repr(C, align(16))]
struct Idt(UnsafeCell<[[u64; 2]; VECTORS]>);

// SAFETY: one processor runs the shim, and writes the table once.
unsafe impl Sync for Idt {}

static IDT: Idt = Idt(UnsafeCell::new([[0; 2]; VECTORS]));

#[repr(C, packed)]
struct Register {
    limit: u16,
    base: u64,
}

global_asm!(
    ".globl shim_page_fault, shim_vmm_communication, shim_exception",
    "shim_page_fault:",
    "mov edi, {page_fault}",
    "jmp 2f",
    "shim_vmm_communication:",
    "mov edi, {vmm_communication}",
    "jmp 2f",
    "shim_exception:",
    "mov edi, {exception}",
    "2:",
    "and rsp, -16",
    "call {stop}",
    "ud2",
    page_fault = const Refusal::PageFault as u32,
    vmm_communication = const Refusal::VmmCommunication as u32,
    exception = const Refusal::Exception as u32,
    stop = sym stop,
);

unsafe extern "C" {
    fn shim_page_fault();
    fn shim_vmm_communication();
    fn shim_exception();
}

extern "C" fn stop(code: u8) -> ! {
    hardware::terminate(code)
}

/// Loads both tables.
pub(crate) fn catch() {
    let handlers = (0..VECTORS).map(|vector| match vector {
        PAGE_FAULT => shim_page_fault as *const () as u64,
        VMM_COMMUNICATION => shim_vmm_communication as *const () as u64,
        _ => shim_exception as *const () as u64,
    });
    let table = IDT.0.get().cast::<[u64; 2]>();
    for (vector, handler) in handlers.enumerate() {
        // Present, interrupt gate, ring 0; the offset in three parts.
        let low = handler & 0xffff | CODE_SELECTOR << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
        // SAFETY: `vector` is below the table's length, and nothing else refers to the table.
        unsafe { table.add(vector).write([low, handler >> 32]) };
    }
    let gdt = Register { limit: size_of_val(&GDT) as u16 - 1, base: (&raw const GDT) as u64 };
    let idt = Register { limit: size_of::<Idt>() as u16 - 1, base: table as u64 };
    // SAFETY: both tables are static and complete; the selectors in use mean the same as before.
    unsafe {
        asm!("lgdt [{gdt}]", "lidt [{idt}]", gdt = in(reg) &raw const gdt, idt = in(reg) &raw const idt, options(nostack, preserves_flags));
    }
}
