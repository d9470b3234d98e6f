//! What the shim finds in memory, and where: shared by the image tool, which writes it, and the shim, which reads it.
//!
//! Owns: addresses of the shim's own pages, and what the VMM tells it. Does not own: Linux's boot_params, the handoff
//! page's format ([`crate::handoff`]), what only SEV-SNP has ([`crate::snp`]).
//!
//! Everything lies below 640 KiB, one thing after the other, so that a measured image holds few pages.

use core::mem::{offset_of, size_of};

use crate::PAGE;
pub use crate::{
    handoff::{Handoff, Platform, Region, RegionKind},
    refusal::Refusal,
};

/// Where the shim is loaded; its first instruction is its first byte. It is the last of the pages that a TEE's launch
/// measures, so that a shorter shim makes fewer of them.
pub const SHIM_BASE: u64 = 0x10000;
/// Longest shim, in bytes.
pub const SHIM_MAX: u64 = 32 * 1024;
/// The shim's stack: zero pages right below this address.
pub const STACK_TOP: u64 = SHIM_BASE;
/// Bytes of stack.
pub const STACK_SIZE: u64 = 2 * PAGE;
/// The measured page that says what the image holds: [`Handoff`]. Each platform has its own.
pub const HANDOFF: u64 = 0xb000;
/// The page that the VMM fills: [`VP_COUNT_OFFSET`] and [`MEMORY_MAP_OFFSET`]. Hostile input under a TEE.
pub const PARAMETERS: u64 = 0xa000;
/// Native page tables: PML4, PDPT and four page directories map the first 4 GiB to themselves by 2 MiB pages.
pub const PAGE_TABLES: u64 = SHIM_BASE + SHIM_MAX;
/// Pages of native page tables.
pub const PAGE_TABLE_PAGES: u64 = 6;
/// The kernel's command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x22000;
/// Longest command line with its NUL, in bytes.
pub const COMMAND_LINE_MAX: u64 = PAGE / 2;
/// Linux's boot_params, written by the shim.
pub const BOOT_PARAMS: u64 = COMMAND_LINE + PAGE;
/// Intel MP configuration table, written by the shim; room for 64 processors.
pub const MP_TABLE: u64 = BOOT_PARAMS + PAGE;
/// Bytes of room for it.
pub const MP_TABLE_MAX: u64 = PAGE;
/// Where Linux looks for the pointer to that table: the last KiB of 640.
pub const MP_POINTER: u64 = 0x9_fc00;
/// End of usable memory below 1 MiB.
pub const LOW_END: u64 = MP_POINTER;
/// The kernel and the initramfs lie from here on.
pub const HIGH_START: u64 = 0x10_0000;

/// ACPI tables, written by the shim where there is no MP table: room for 64 processors.
pub const ACPI: u64 = 0x26000;
/// Bytes of room for them.
pub const ACPI_MAX: u64 = PAGE;

/// Offset in [`PARAMETERS`] of the number of processors, u32.
pub const VP_COUNT_OFFSET: u32 = 0;
/// Offset in [`PARAMETERS`] of the memory map: [`MapEntry`]s, ended by one of no pages or by the page's end.
pub const MEMORY_MAP_OFFSET: u32 = 64;
/// Most entries that fit.
pub const MEMORY_MAP_MAX: usize = (PAGE as usize - MEMORY_MAP_OFFSET as usize) / size_of::<MapEntry>();
/// Most processors that any profile starts.
pub const VP_MAX: u32 = 64;

/// One range of the memory map, as IGVM defines it (IGVM_VHS_MEMORY_MAP_ENTRY).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MapEntry {
    /// First page.
    pub page: u64,
    /// Number of pages.
    pub pages: u64,
    /// [`MapEntry::MEMORY`] or something that is not RAM.
    pub kind: u16,
    /// Not used.
    pub flags: u16,
    /// Zero.
    pub reserved: u32,
}

impl MapEntry {
    /// Usable RAM.
    pub const MEMORY: u16 = 0;
}

const _: () = {
    assert!(size_of::<MapEntry>() == 24);
    assert!(offset_of!(MapEntry, kind) == 16);
    assert!(ACPI + ACPI_MAX <= LOW_END && MP_TABLE + MP_TABLE_MAX <= ACPI);
    assert!(HANDOFF < STACK_TOP - STACK_SIZE && PARAMETERS < HANDOFF);
    assert!(PAGE_TABLES + PAGE_TABLE_PAGES * PAGE <= COMMAND_LINE);
};
