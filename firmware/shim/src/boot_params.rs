//! Linux's boot_params ("zero page"), from Documentation/arch/x86/{boot,zero-page}.rst.
//!
//! Owns: its bytes. Does not own: what RAM there is.

use coffer_layout::{
    PAGE,
    boot::{ACPI, ACPI_MAX, COMMAND_LINE, HIGH_START, LOW_END, PARAMETERS, Platform},
    snp::{CC_BLOB_OFFSET, CC_DATA, CPUID, SECRETS},
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
const ACPI_RSDP: usize = 0x070;
const SETUP_DATA: usize = 0x250;

const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI_DATA: u32 = 3;

/// `SETUP_CC_BLOB`, a type of setup_data.
const SETUP_CC_BLOB: u32 = 7;
/// `CC_BLOB_SEV_HDR_MAGIC`: "AMDE".
const CC_BLOB_MAGIC: u32 = 0x4544_4d41;
/// Bytes of `cc_blob_sev_info`, and of what comes before the data of a setup_data.
const CC_BLOB_SIZE: u64 = 40;
const SETUP_DATA_HEADER: u64 = 16;

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
    if plan.handoff.platform == Platform::Snp {
        // Where entries overlap, Linux takes the higher type. CC_DATA stays RAM: Linux keeps setup_data by itself, and maps
        // what is reserved without the C-bit (`__ioremap_check_encrypted`).
        entry(SECRETS, PARAMETERS, RESERVED);
        entry(ACPI, ACPI + ACPI_MAX, ACPI_DATA);
    }
    for range in plan.usable() {
        entry(range.start, range.end, RAM);
    }
    if plan.handoff.platform == Platform::Snp {
        put(SETUP_DATA, &CC_DATA.to_le_bytes());
        put(ACPI_RSDP, &ACPI.to_le_bytes());
    }
    page[E820_COUNT] = count as u8;
}

/// Fills the zeroed page at [`CC_DATA`]: `cc_setup_data`, then `cc_blob_sev_info` (Linux `<asm/sev.h>`).
pub fn write_cc_data(page: &mut [u8; PAGE as usize]) {
    let mut put = |at: u64, bytes: &[u8]| page[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    // No next entry (8 bytes of zeros), type, length, address of the blob. The length covers the blob, so that Linux keeps
    // that too.
    put(8, &SETUP_CC_BLOB.to_le_bytes());
    put(12, &((CC_BLOB_OFFSET + CC_BLOB_SIZE - SETUP_DATA_HEADER) as u32).to_le_bytes());
    put(16, &((CC_DATA + CC_BLOB_OFFSET) as u32).to_le_bytes());
    // Magic, version and reserved (zeros), then address, length and zeros of secrets and CPUID page.
    put(CC_BLOB_OFFSET, &CC_BLOB_MAGIC.to_le_bytes());
    put(CC_BLOB_OFFSET + 8, &SECRETS.to_le_bytes());
    put(CC_BLOB_OFFSET + 16, &(PAGE as u32).to_le_bytes());
    put(CC_BLOB_OFFSET + 24, &CPUID.to_le_bytes());
    put(CC_BLOB_OFFSET + 32, &(PAGE as u32).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        honest::parameter_page as parameters,
        plan::{plan, tests::handoff},
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
    fn an_snp_guest_is_told_where_secrets_cpuid_and_acpi_are() {
        let handoff = coffer_layout::boot::Handoff { platform: Platform::Snp, ..handoff() };
        let parameters = parameters(1, &[(0, 0x10000, 0)]);
        let plan = plan(&handoff, &parameters).unwrap();
        let mut page = [0; PAGE as usize];
        write(&plan, &mut page);
        assert_eq!(&page[0x070..0x078], &0x26000u64.to_le_bytes());
        assert_eq!(&page[0x250..0x258], &0x25000u64.to_le_bytes());
        assert_eq!(page[0x1e8], 5);
        let entry = |index: usize| {
            let bytes = &page[0x2d0 + 20 * index..][..20];
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            (word(0), word(8), bytes[16])
        };
        assert_eq!(entry(1), (0x8000, 0x2000, 2));
        assert_eq!(entry(2), (0x26000, 0x1000, 3));
        let mut cc = [0; PAGE as usize];
        write_cc_data(&mut cc);
        // struct cc_setup_data: type 7, length 0x118, address; struct cc_blob_sev_info: magic, secrets, CPUID.
        assert_eq!(&cc[..20], &[0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0x18, 1, 0, 0, 0, 0x51, 2, 0]);
        assert_eq!(&cc[0x100..0x108], b"AMDE\0\0\0\0");
        assert_eq!(&cc[0x108..0x118], &[0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&cc[0x118..0x128], &[0, 0x90, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
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
