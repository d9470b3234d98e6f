//! Linux's boot_params ("zero page"), from Documentation/arch/x86/{boot,zero-page}.rst.
//!
//! Owns: its bytes. Does not own: what RAM there is.

use coffer_layout::{
    PAGE,
    boot::{COMMAND_LINE, HIGH_START, LOW_END},
};

use crate::plan::Plan;

const E820_COUNT: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
const E820_MAX: usize = 128;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const COMMAND_LINE_SIZE: usize = 0x238;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;

const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Fills a zeroed page.
pub fn write(plan: &Plan<'_>, page: &mut [u8; PAGE as usize]) {
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(HEADER, b"HdrS");
    put(VERSION, &0x20fu16.to_le_bytes());
    put(LOADER, &[0xff]);
    put(LOADFLAGS, &[1]);
    put(KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
    put(COMMAND_LINE_POINTER, &(COMMAND_LINE as u32).to_le_bytes());
    put(COMMAND_LINE_SIZE, &(plan.handoff.command_line_size as u32).to_le_bytes());
    if plan.handoff.initramfs_size > 0 {
        let (start, size) = (plan.handoff.initramfs_start, plan.handoff.initramfs_size);
        put(RAMDISK_IMAGE, &(start as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(size as u32).to_le_bytes());
        put(EXT_RAMDISK_IMAGE, &((start >> 32) as u32).to_le_bytes());
        put(EXT_RAMDISK_SIZE, &((size >> 32) as u32).to_le_bytes());
    }
    let mut count = 0;
    let mut entry = |start: u64, end: u64, kind: u32| {
        if count < E820_MAX {
            let at = E820_TABLE + count * E820_ENTRY;
            put(at, &start.to_le_bytes());
            put(at + 8, &(end - start).to_le_bytes());
            put(at + 16, &kind.to_le_bytes());
            count += 1;
        }
    };
    entry(LOW_END, HIGH_START, RESERVED);
    for range in plan.usable() {
        entry(range.start, range.end, RAM);
    }
    page[E820_COUNT] = count as u8;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{
        plan,
        tests::{handoff, parameters},
    };

    #[test]
    fn the_page_says_what_the_plan_says() {
        let (handoff, parameters) = (handoff(), parameters(1, &[(0, 0x10000, 0)]));
        let plan = plan(&handoff, &parameters).unwrap();
        let mut page = [0; PAGE as usize];
        write(&plan, &mut page);
        // Offsets of struct boot_params as in <asm/bootparam.h>, spelled out by hand.
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(&page[0x218..0x220], &[0, 0, 0x80, 1, 0x34, 0x12, 0, 0]);
        assert_eq!(&page[0x228..0x22c], &[0, 0x20, 2, 0]);
        assert_eq!(page[0x1e8], 3);
        assert_eq!(&page[0x2d0..0x2d8], &0x9_fc00u64.to_le_bytes());
        assert_eq!(&page[0x2d0 + 20..0x2d0 + 28], &0u64.to_le_bytes());
        assert_eq!(&page[0x2d0 + 28..0x2d0 + 36], &0x9_fc00u64.to_le_bytes());
        assert_eq!(page[0x2d0 + 36], 1);
    }

    #[test]
    fn more_ranges_than_fit_are_left_out() {
        let map: Vec<_> = (0..160u64)
            .map(|i| (if i == 0 { 0 } else { 0x10000 + i * 2 }, if i == 0 { 0x10000 } else { 1 }, 0))
            .collect();
        let (handoff, parameters) = (handoff(), parameters(1, &map));
        let plan = plan(&handoff, &parameters).unwrap();
        let mut page = [0; PAGE as usize];
        write(&plan, &mut page);
        assert_eq!(page[0x1e8], 128);
    }
}
