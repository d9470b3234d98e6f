//! Guest RAM: anonymous, on demand, split around the hole for devices.
//!
//! Owns: where RAM lies and its backing. Does not own: what is loaded into it, the region by which it grows (`growth`).

mod ram;

pub use self::ram::{BLOCK, Plugged, Ram, Region};
use coffer_layout::{HIGH_RAM, LOW_RAM_END, PAGE};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion};

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

/// Reserves RAM. Pages come when they are touched, 2 MiB at once where the host has huge pages.
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
        let address =
            region.get_host_address(vm_memory::MemoryRegionAddress(0)).map_err(|e| host(e.to_string()))?;
        // SAFETY: the range is this region's own mapping; the advice changes no contents. A host without huge pages refuses
        // it, and then there are none.
        unsafe { libc::madvise(address.cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
    Ok(memory)
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
