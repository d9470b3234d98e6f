//! What an honest host writes, for tests and fuzz targets of several crates: the pages from which lies and mutations start.
//!
//! Owns: the writer's side of the CPUID page and the parameter page. Not in the shim itself; what reads is tested against
//! these bytes, whose offsets are the specifications' and not the reader's.

use coffer_layout::PAGE;

/// Leaf, subleaf, EAX, EBX, ECX, EDX of a guest on Milan, as far as they matter. Its caches are not coherent.
pub const MILAN: [[u32; 6]; 9] = [
    [0, 0, 0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
    [1, 0, 0x00a0_0f11, 0x0001_0800, 0xfed8_3203, 0x178b_fbff],
    [7, 0, 0, 0x219c_97a9, 0x0040_069c, 0],
    [0xd, 0, 0x207, 0x240, 0x988, 0],
    [0x4000_0000, 0, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
    [0x8000_0000, 0, 0x8000_001f, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
    [0x8000_0001, 0, 0x00a0_0f11, 0x4000_0000, 0x0040_01f7, 0x2fd3_fbff],
    [0x8000_0008, 0, 0x3030, 0x1104_d205, 0, 0],
    [0x8000_001f, 0, 0x1a, 0x0173, 0, 0],
];

/// A CPUID page (AMD 56860, 8.17): a count, then entries of 48 bytes from byte 16.
#[must_use]
pub fn cpuid_page(leaves: &[[u32; 6]]) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    page[..4].copy_from_slice(&(leaves.len() as u32).to_le_bytes());
    for (bytes, [leaf, subleaf, registers @ ..]) in page[16..].chunks_exact_mut(48).zip(leaves) {
        bytes[..4].copy_from_slice(&leaf.to_le_bytes());
        bytes[4..8].copy_from_slice(&subleaf.to_le_bytes());
        for (to, value) in bytes[24..40].chunks_exact_mut(4).zip(registers) {
            to.copy_from_slice(&value.to_le_bytes());
        }
    }
    page
}

/// A parameter page: the number of processors, then from byte 64 on a memory map (`IGVM_VHS_MEMORY_MAP_ENTRY`, 24 bytes)
/// of `(first page, pages, type)`, as much of it as fits.
#[must_use]
pub fn parameter_page(processors: u32, map: &[(u64, u64, u16)]) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    page[..4].copy_from_slice(&processors.to_le_bytes());
    for (bytes, (first, pages, kind)) in page[64..].chunks_exact_mut(24).zip(map) {
        bytes[..8].copy_from_slice(&first.to_le_bytes());
        bytes[8..16].copy_from_slice(&pages.to_le_bytes());
        bytes[16..18].copy_from_slice(&kind.to_le_bytes());
    }
    page
}
