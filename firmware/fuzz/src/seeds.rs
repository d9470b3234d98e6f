//! Honest inputs, from which mutations start.

use coffer_layout::{
    PAGE,
    boot::{COMMAND_LINE, Handoff, MEMORY_MAP_MAX, Platform, Region, RegionKind},
    snp::{CPUID_COHERENT, PAYLOAD, SEV_STATUS_SNP},
};
use coffer_shim::honest::{MILAN, cpuid_page, parameter_page};

/// SHA-384 of 4096 zero bytes, of which all memory of the checking machine consists (`head -c 4096 /dev/zero | sha384sum`).
const PAGE_OF_ZEROS: [u8; 48] = [
    0xc0, 0xe5, 0x9a, 0x3e, 0x3f, 0xfb, 0xd3, 0xb5, 0xc7, 0x54, 0x28, 0xfb, 0x36, 0x43, 0x2f, 0xac, 0xab,
    0xc7, 0x45, 0x94, 0x42, 0x96, 0xff, 0x51, 0x5f, 0x73, 0x7c, 0x4f, 0xef, 0x4e, 0xfc, 0x64, 0x58, 0x68,
    0x09, 0xf7, 0xa1, 0x6f, 0x56, 0x35, 0x4a, 0x1e, 0xae, 0xcf, 0x2a, 0xa8, 0xd7, 0x74,
];
/// Likewise of 100.
const LINE_OF_ZEROS: [u8; 48] = [
    0x6c, 0xfd, 0x86, 0x5e, 0x53, 0xe2, 0xa7, 0x30, 0xa0, 0x09, 0x3f, 0xb2, 0x61, 0x52, 0xdc, 0xee, 0xa3,
    0x34, 0x0c, 0x35, 0x65, 0xca, 0xc6, 0x7c, 0x33, 0x26, 0x26, 0xc3, 0x14, 0x3f, 0xfd, 0x22, 0x86, 0x0b,
    0xed, 0xa5, 0x9e, 0xee, 0x6d, 0x46, 0x94, 0xda, 0xf5, 0xd7, 0xb0, 0x65, 0x19, 0x19,
];

/// An image of four pages.
#[must_use]
pub fn handoff() -> Handoff {
    let region = |page: u64, destination, kind| Region {
        source: PAYLOAD + page * PAGE,
        destination,
        length: PAGE,
        memory: PAGE,
        kind,
        sha384: PAGE_OF_ZEROS,
    };
    let mut handoff = Handoff {
        platform: Platform::Snp,
        kernel_entry: 0x100_0000,
        kernel_start: 0x100_0000,
        kernel_end: 0x100_3000,
        initramfs_start: 0x120_0000,
        initramfs_size: PAGE,
        command_line_size: 99,
        launch_end: 0x1_5000,
        sev_status: SEV_STATUS_SNP,
        c_bit: 51,
        region_count: 4,
        ..Handoff::default()
    };
    handoff.regions[0] = Region {
        length: 100,
        memory: 100,
        sha384: LINE_OF_ZEROS,
        ..region(0, COMMAND_LINE, RegionKind::CommandLine)
    };
    handoff.regions[1] = Region { memory: 2 * PAGE, ..region(1, 0x100_0000, RegionKind::Kernel) };
    handoff.regions[2] = region(2, 0x100_2000, RegionKind::Kernel);
    handoff.regions[3] = region(3, 0x120_0000, RegionKind::Initramfs);
    handoff
}

/// Two processors, 32 MiB and a GiB above 4 GiB.
#[must_use]
pub fn parameters() -> [u8; PAGE as usize] {
    parameter_page(2, &[(0, 0x2000, 0), (0x10_0000, 0x4_0000, 0)])
}

/// As many ranges as a page holds.
#[must_use]
pub fn full_parameters() -> [u8; PAGE as usize] {
    let range = |index: u64| (0x10_0000 + 2 * index, 1, (index % 2) as u16);
    let map: Vec<_> = [(0, 0x2000, 0)].into_iter().chain((1..MEMORY_MAP_MAX as u64).map(range)).collect();
    parameter_page(2, &map)
}

/// A guest on Milan whose hardware keeps caches coherent.
#[must_use]
pub fn cpuid() -> [u8; PAGE as usize] {
    let mut leaves = MILAN;
    leaves[8][3] |= CPUID_COHERENT;
    cpuid_page(&leaves)
}

/// What KVM answers to the shim's exits, in order: information, features, registration, a mark.
#[must_use]
pub fn answers() -> [u8; 32] {
    let words = [2 << 48 | 1 << 32 | 51 << 24 | 0x001, 3 << 12 | 0x081, 0xc000_0013, 0u64];
    let mut bytes = [0; 32];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}
