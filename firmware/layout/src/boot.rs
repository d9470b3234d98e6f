//! What the shim finds in memory, and where: shared by the image tool, which writes it, and the shim, which reads it.
//!
//! Owns: addresses and formats of the shim's own pages. Does not own: Linux's boot_params.
//!
//! Everything lies below 640 KiB, one thing after the other, so that a measured image holds few pages.

use core::mem::{offset_of, size_of};

use crate::PAGE;

/// Where the shim is loaded; its first instruction is its first byte.
pub const SHIM_BASE: u64 = 0x10000;
/// Longest shim, in bytes.
pub const SHIM_MAX: u64 = 32 * 1024;
/// The shim's stack: zero pages right below this address.
pub const STACK_TOP: u64 = SHIM_BASE + SHIM_MAX + STACK_SIZE;
/// Bytes of stack.
pub const STACK_SIZE: u64 = 2 * PAGE;
/// PML4, PDPT and four page directories: the first 4 GiB, mapped to themselves by 2 MiB pages.
pub const PAGE_TABLES: u64 = STACK_TOP;
/// Pages of page tables.
pub const PAGE_TABLE_PAGES: u64 = 6;
/// The measured page that says where kernel, command line and initramfs are: [`Handoff`].
pub const HANDOFF: u64 = PAGE_TABLES + PAGE_TABLE_PAGES * PAGE;
/// The page that the VMM fills: [`VP_COUNT_OFFSET`] and [`MEMORY_MAP_OFFSET`]. Hostile input under a TEE.
pub const PARAMETERS: u64 = HANDOFF + PAGE;
/// The kernel's command line, NUL-terminated.
pub const COMMAND_LINE: u64 = PARAMETERS + PAGE;
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

/// The measured page: what the image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Handoff {
    /// [`Handoff::MAGIC`].
    pub magic: u64,
    /// Physical address of the kernel's 64-bit entry.
    pub kernel_entry: u64,
    /// First byte of the kernel.
    pub kernel_start: u64,
    /// First byte behind the kernel, its bss included.
    pub kernel_end: u64,
    /// First byte of the initramfs; 0 when there is none.
    pub initramfs_start: u64,
    /// Bytes of the initramfs.
    pub initramfs_size: u64,
    /// Bytes of the command line, without the NUL.
    pub command_line_size: u64,
}

impl Handoff {
    /// `COFFER` and a format version.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"COFFER\0\x01");
}

/// Why the shim does not go on. The VMM prints the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// The handoff page is not one of this shim's.
    Handoff = 1,
    /// No processors, or more than there may be.
    Processors = 2,
    /// The memory map is empty, unsorted, overlapping or wraps around.
    MemoryMap = 3,
    /// Kernel or initramfs do not lie in RAM.
    DoesNotFit = 4,
    /// The command line is too long.
    CommandLine = 5,
    /// The shim itself failed.
    Internal = 6,
}

impl Refusal {
    /// What the code on the mark port means, in words.
    #[must_use]
    pub const fn words(code: u8) -> &'static str {
        match code {
            1 => "the image's handoff page is not this shim's: build the image again with one coffer-image",
            2 => "the number of processors is 0 or over 64",
            3 => "the memory map is empty, unsorted, overlapping or wraps around",
            4 => "the kernel or the initramfs does not lie in RAM: give the guest more memory",
            5 => "the command line is too long",
            6 => "the shim failed",
            _ => "an unknown reason",
        }
    }
}

const _: () = {
    assert!(size_of::<MapEntry>() == 24);
    assert!(offset_of!(MapEntry, kind) == 16);
    assert!(size_of::<Handoff>() == 56);
    assert!(offset_of!(Handoff, command_line_size) == 48);
    assert!(MP_TABLE + MP_TABLE_MAX <= LOW_END);
    assert!(PAGE_TABLES.is_multiple_of(PAGE) && HANDOFF == 0x20000);
};
