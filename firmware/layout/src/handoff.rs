//! The handoff page: measured, it says what the image holds and, under a TEE, what the shim must find there.
//!
//! Owns: the page's format, both directions. Under SEV-SNP it is the hash page: kernel, initramfs and command line lie
//! in shared pages that nobody measures, and each is a [`Region`] with its SHA-384. Does not own: whether the regions
//! make sense; the shim checks that.

use crate::PAGE;

/// Most regions that a page lists.
pub const REGIONS_MAX: usize = 16;

const HEAD: usize = 88;
const REGION: usize = 88;

/// What the page is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Platform {
    /// A plain VM: everything lies where it is used, nothing is hashed.
    #[default]
    Native = 0,
    /// SEV-SNP, emulated or not.
    Snp = 1,
}

/// What a region holds; decides which refusal a wrong hash is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionKind {
    /// A segment of the kernel.
    #[default]
    Kernel = 1,
    /// The initramfs.
    Initramfs = 2,
    /// The command line with its NUL.
    CommandLine = 3,
}

/// Bytes in shared pages that become private.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address in the shared window, a multiple of a page.
    pub source: u64,
    /// Guest physical address in RAM, a multiple of a page.
    pub destination: u64,
    /// Bytes to copy and hash.
    pub length: u64,
    /// Bytes in memory; what lies behind `length` is zeroed.
    pub memory: u64,
    /// What it is.
    pub kind: RegionKind,
    /// SHA-384 of the `length` bytes.
    pub sha384: [u8; 48],
}

impl Default for Region {
    fn default() -> Self {
        Self { source: 0, destination: 0, length: 0, memory: 0, kind: RegionKind::default(), sha384: [0; 48] }
    }
}

/// The measured page: what the image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// What for.
    pub platform: Platform,
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
    /// First byte behind the pages that the launch measures; they begin at [`crate::snp::LAUNCH_START`].
    pub launch_end: u64,
    /// The one value of SEV_STATUS (MSR 0xC0010131) that the image accepts.
    pub sev_status: u64,
    /// Position of the C-bit in page table entries.
    pub c_bit: u32,
    /// How many of `regions` are used.
    pub region_count: u32,
    /// In the order in which they are copied.
    pub regions: [Region; REGIONS_MAX],
}

impl Default for Handoff {
    fn default() -> Self {
        Self {
            platform: Platform::Native,
            kernel_entry: 0,
            kernel_start: 0,
            kernel_end: 0,
            initramfs_start: 0,
            initramfs_size: 0,
            command_line_size: 0,
            launch_end: 0,
            sev_status: 0,
            c_bit: 0,
            region_count: 0,
            regions: [Region::default(); REGIONS_MAX],
        }
    }
}

impl Handoff {
    /// `COFFER` and a format version.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"COFFER\0\x02");

    /// The regions in use.
    #[must_use]
    pub fn used_regions(&self) -> &[Region] {
        self.regions.get(..self.region_count as usize).unwrap_or(&self.regions)
    }

    /// The page's bytes.
    #[must_use]
    pub fn to_page(&self) -> [u8; PAGE as usize] {
        let mut page = [0; PAGE as usize];
        let head = [
            Self::MAGIC,
            self.platform as u64 | u64::from(self.region_count) << 32,
            self.kernel_entry,
            self.kernel_start,
            self.kernel_end,
            self.initramfs_start,
            self.initramfs_size,
            self.command_line_size,
            self.launch_end,
            self.sev_status,
            u64::from(self.c_bit),
        ];
        for (bytes, word) in page.chunks_exact_mut(8).zip(head) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        for (bytes, region) in page[HEAD..].chunks_exact_mut(REGION).zip(self.used_regions()) {
            let words = [region.source, region.destination, region.length, region.memory, region.kind as u64];
            for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
            bytes[40..].copy_from_slice(&region.sha384);
        }
        page
    }

    /// Reads a page; `None` when it is not one of this format's.
    #[must_use]
    pub fn from_page(page: &[u8; PAGE as usize]) -> Option<Self> {
        if word(page, 0) != Self::MAGIC {
            return None;
        }
        let mut handoff = Self {
            platform: match word(page, 8) as u32 {
                0 => Platform::Native,
                1 => Platform::Snp,
                _ => return None,
            },
            region_count: (word(page, 8) >> 32) as u32,
            kernel_entry: word(page, 16),
            kernel_start: word(page, 24),
            kernel_end: word(page, 32),
            initramfs_start: word(page, 40),
            initramfs_size: word(page, 48),
            command_line_size: word(page, 56),
            launch_end: word(page, 64),
            sev_status: word(page, 72),
            c_bit: u32::try_from(word(page, 80)).ok()?,
            ..Self::default()
        };
        let count = handoff.region_count as usize;
        for (index, region) in handoff.regions.get_mut(..count)?.iter_mut().enumerate() {
            let at = HEAD + index * REGION;
            *region = Region {
                source: word(page, at),
                destination: word(page, at + 8),
                length: word(page, at + 16),
                memory: word(page, at + 24),
                kind: match word(page, at + 32) {
                    1 => RegionKind::Kernel,
                    2 => RegionKind::Initramfs,
                    3 => RegionKind::CommandLine,
                    _ => return None,
                },
                sha384: core::array::from_fn(|i| page[at + 40 + i]),
            };
        }
        Some(handoff)
    }
}

/// The little-endian word at an offset that is a constant or below [`REGIONS_MAX`] regions.
fn word(page: &[u8; PAGE as usize], at: usize) -> u64 {
    u64::from_le_bytes(core::array::from_fn(|i| page[at + i]))
}

const _: () = assert!(HEAD + REGIONS_MAX * REGION <= PAGE as usize);

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Handoff {
        let region = |i: u64| Region {
            source: i << 12,
            destination: i << 24,
            length: i + 1,
            memory: i + 2,
            kind: [RegionKind::Kernel, RegionKind::Initramfs, RegionKind::CommandLine][i as usize % 3],
            sha384: [i as u8 + 1; 48],
        };
        Handoff {
            platform: Platform::Snp,
            kernel_entry: 1,
            kernel_start: 2,
            kernel_end: 3,
            initramfs_start: 4,
            initramfs_size: 5,
            command_line_size: 6,
            launch_end: 7,
            sev_status: 8,
            c_bit: 51,
            region_count: REGIONS_MAX as u32,
            regions: core::array::from_fn(|i| region(i as u64)),
        }
    }

    #[test]
    fn a_full_page_comes_back() {
        assert_eq!(Handoff::from_page(&full().to_page()), Some(full()));
        assert_eq!(Handoff::from_page(&Handoff::default().to_page()), Some(Handoff::default()));
    }

    #[test]
    fn pages_of_another_format_are_not_read() {
        let with = |at: usize, byte: u8| {
            let mut page = full().to_page();
            page[at] = byte;
            Handoff::from_page(&page)
        };
        assert_eq!(with(7, 1), None, "version");
        assert_eq!(with(8, 9), None, "platform");
        assert_eq!(with(12, 17), None, "region count");
        assert_eq!(with(15, 0x80), None, "region count");
        assert_eq!(with(84, 1), None, "C-bit");
        assert_eq!(with(HEAD + 32, 0), None, "region kind");
    }
}
