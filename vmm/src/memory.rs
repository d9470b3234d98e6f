//! Guest RAM: anonymous, on demand, split around the hole for devices.
//!
//! Owns: where RAM lies and its backing. Does not own: what is loaded into it, the region by which it grows (`growth`).

mod ram;

pub use self::ram::{BLOCK, Plugged, Ram, Region};
use coffer_layout::{HIGH_RAM, LOW_RAM_END, PAGE};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion};

/// A huge page of x86-64.
const HUGE: u64 = 2 << 20;

/// Why there is no RAM.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size makes no guest.
    #[error("memory of {0} MiB: give between 32 and 1048576 MiB")]
    Size(u64),
    /// The host refused.
    #[error("reserve {mib} MiB of guest memory: {reason}; lower --memory-mib or free memory on the host")]
    Host {
        /// Size asked for.
        mib: u64,
        /// The host's words.
        reason: String,
    },
}

/// Where RAM of `bytes` lies: `(first address, bytes)`, sorted.
#[must_use]
pub fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, bytes.min(LOW_RAM_END))];
    if bytes > LOW_RAM_END {
        ranges.push((HIGH_RAM, bytes - LOW_RAM_END));
    }
    ranges
}

/// Reserves RAM. Pages come when they are touched, above the first 2 MiB in huge pages where the host has them.
///
/// # Errors
/// [`MemoryError`].
pub fn reserve(mib: u64) -> Result<Ram, MemoryError> {
    if !(32..=1 << 20).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let host = |reason: String| MemoryError::Host { mib, reason };
    let ranges: Vec<_> =
        layout(mib << 20).into_iter().map(|(start, size)| (GuestAddress(start), size as usize)).collect();
    let memory = Ram::from_ranges(&ranges).map_err(|e| host(e.to_string()))?;
    for region in memory.iter() {
        for (offset, length, advice) in advice(region.start_addr().0, region.len()) {
            let address = region.get_host_address(vm_memory::MemoryRegionAddress(offset));
            let address = address.map_err(|e| host(e.to_string()))?;
            // SAFETY: `advice` splits the region and nothing else, so that the range is this region's own mapping; the advice
            // changes no contents. A host without huge pages refuses it, and then there are none.
            unsafe { libc::madvise(address.cast(), length as usize, advice) };
        }
    }
    Ok(memory)
}

/// Which pages a region of `length` bytes at `start` shall have: `(offset, bytes, madvise's advice)`, without gaps.
///
/// Below 2 MiB lie the shim, its tables and parameters, some twenty pages: a huge page there is 2 MiB to clear before the first
/// instruction, for memory that the kernel hardly uses later.
fn advice(start: u64, length: u64) -> Vec<(u64, u64, i32)> {
    let small = HUGE.saturating_sub(start).min(length);
    let parts = [(0, small, libc::MADV_NOHUGEPAGE), (small, length - small, libc::MADV_HUGEPAGE)];
    parts.into_iter().filter(|&(_, bytes, _)| bytes > 0).collect()
}

/// Pages of a byte count that is a multiple of one.
#[must_use]
pub fn pages(bytes: u64) -> u64 {
    bytes / PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_skips_the_hole_below_4_gib() {
        assert_eq!(layout(256 << 20), [(0, 256 << 20)]);
        assert_eq!(layout(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn only_the_first_2_mib_are_of_small_pages() {
        let (small, huge) = (libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE);
        assert_eq!(advice(0, 128 << 20), [(0, 2 << 20, small), (2 << 20, 126 << 20, huge)]);
        assert_eq!(advice(0, 1 << 20), [(0, 1 << 20, small)]);
        assert_eq!(advice(4 << 30, 1 << 30), [(0, 1 << 30, huge)]);
    }

    #[test]
    fn a_page_below_2_mib_that_is_touched_brings_itself_alone() {
        use vm_memory::Bytes;
        let memory = reserve(64).unwrap();
        memory.write_slice(&[1], GuestAddress(64 << 10)).unwrap();
        let start =
            memory.iter().next().unwrap().get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap();
        let mut resident = [0_u8; 512];
        // SAFETY: the first 2 MiB of a mapping of 64 MiB, and a byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(start.cast(), 2 << 20, resident.as_mut_ptr()) }, 0);
        assert_eq!(resident.iter().filter(|&&page| page & 1 == 1).count(), 1);
    }

    #[test]
    fn sizes_that_make_no_guest_are_refused() {
        assert!(matches!(reserve(0), Err(MemoryError::Size(0))));
        assert!(matches!(reserve(u64::MAX), Err(MemoryError::Size(_))));
    }

    #[test]
    fn reserved_memory_is_as_long_as_asked() {
        let memory = reserve(64).unwrap();
        assert_eq!(memory.iter().map(|r| r.len()).sum::<u64>(), 64 << 20);
    }
}
