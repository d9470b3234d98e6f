//! Guest memory as devices reach it: RAM that is there from the start, and a region of which only plugged blocks are.
//!
//! Owns: which accesses are let through. Does not own: who plugs (`devices::virtio::mem`), what the guest's processors reach
//! (KVM's slots).

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap,
    GuestUsize, MemoryRegionAddress, MmapRegion, ReadVolatile, VolatileSlice, WriteVolatile, bitmap::BS,
    mmap::FromRangesError,
};

type Access<T> = Result<T, GuestMemoryError>;

/// Bytes of a block, which is there or not as a whole: what a huge page has.
pub const BLOCK: u64 = 2 << 20;

/// Which blocks of a region are there.
#[derive(Debug)]
pub struct Plugged {
    words: Box<[AtomicU64]>,
    blocks: u64,
}

impl Plugged {
    /// None of `blocks` is.
    #[must_use]
    pub fn none(blocks: u64) -> Self {
        let words = blocks.div_ceil(64) as usize;
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), blocks }
    }

    fn word(&self, block: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get((block / 64) as usize).filter(|_| block < self.blocks)?;
        Some((word, 1 << (block % 64)))
    }

    /// Whether a block is there. One beyond the region is not.
    #[must_use]
    pub fn has(&self, block: u64) -> bool {
        self.word(block).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Says that a block is there, or is not.
    pub fn set(&self, block: u64, there: bool) {
        let Some((word, bit)) = self.word(block) else { return };
        if there {
            word.fetch_or(bit, Ordering::AcqRel);
        } else {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Whether all of a range is there. One of no bytes is where its address is.
    fn holds(&self, offset: u64, count: usize) -> bool {
        let Some(last) = offset.checked_add((count as u64).max(1) - 1) else { return false };
        (offset / BLOCK..=last / BLOCK).all(|block| self.has(block))
    }
}

/// A range of guest memory.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap<()>,
    /// `None`: all of it is there.
    plugged: Option<Plugged>,
}

impl Region {
    /// Which blocks are there; `None` where all are.
    #[must_use]
    pub fn plugged(&self) -> Option<&Plugged> {
        self.plugged.as_ref()
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, at: MemoryRegionAddress) -> Access<*mut u8> {
        self.mapping.get_host_address(at)
    }

    fn get_slice(&self, at: MemoryRegionAddress, count: usize) -> Access<VolatileSlice<'_, BS<'_, ()>>> {
        match &self.plugged {
            Some(plugged) if !plugged.holds(at.0, count) => Err(GuestMemoryError::InvalidBackendAddress),
            _ => self.mapping.get_slice(at, count),
        }
    }
}

/// Through [`GuestMemoryRegion::get_slice`] of what is accessed, so that its check holds for all of them.
impl Bytes<MemoryRegionAddress> for Region {
    type E = GuestMemoryError;

    fn write(&self, bytes: &[u8], at: MemoryRegionAddress) -> Access<usize> {
        Ok(self.get_slice(at, bytes.len())?.write(bytes, 0)?)
    }

    fn read(&self, bytes: &mut [u8], at: MemoryRegionAddress) -> Access<usize> {
        Ok(self.get_slice(at, bytes.len())?.read(bytes, 0)?)
    }

    fn write_slice(&self, bytes: &[u8], at: MemoryRegionAddress) -> Access<()> {
        Ok(self.get_slice(at, bytes.len())?.write_slice(bytes, 0)?)
    }

    fn read_slice(&self, bytes: &mut [u8], at: MemoryRegionAddress) -> Access<()> {
        Ok(self.get_slice(at, bytes.len())?.read_slice(bytes, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        from: &mut F,
        count: usize,
    ) -> Access<usize> {
        Ok(self.get_slice(at, count)?.read_volatile_from(0, from, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        from: &mut F,
        count: usize,
    ) -> Access<()> {
        Ok(self.get_slice(at, count)?.read_exact_volatile_from(0, from, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Access<usize> {
        Ok(self.get_slice(at, count)?.write_volatile_to(0, to, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Access<()> {
        Ok(self.get_slice(at, count)?.write_all_volatile_to(0, to, count)?)
    }

    fn store<T: AtomicAccess>(&self, value: T, at: MemoryRegionAddress, order: Ordering) -> Access<()> {
        Ok(self.get_slice(at, size_of::<T>())?.store(value, 0, order)?)
    }

    fn load<T: AtomicAccess>(&self, at: MemoryRegionAddress, order: Ordering) -> Access<T> {
        Ok(self.get_slice(at, size_of::<T>())?.load(0, order)?)
    }
}

/// All memory of a guest. A region can be added once, while everybody uses it.
#[derive(Debug)]
pub struct Ram {
    /// Sorted, apart.
    fixed: Vec<Region>,
    added: OnceLock<Region>,
}

impl Ram {
    /// Anonymous memory at these addresses, `(first address, bytes)`, sorted.
    ///
    /// # Errors
    /// The system's, or that two overlap.
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self, FromRangesError> {
        let region = |(start, size): &(GuestAddress, usize)| GuestRegionMmap::from_range(*start, *size, None);
        Self::from_regions(ranges.iter().map(region).collect::<Result<_, _>>()?)
    }

    /// Memory that is mapped already, sorted by address.
    ///
    /// # Errors
    /// That two overlap.
    pub fn from_regions(regions: Vec<GuestRegionMmap<()>>) -> Result<Self, FromRangesError> {
        let apart = |pair: &[GuestRegionMmap<()>]| pair[0].last_addr() < pair[1].start_addr();
        if regions.is_empty() || !regions.windows(2).all(apart) {
            return Err(FromRangesError::InvalidGuestRegion);
        }
        let fixed = regions.into_iter().map(|mapping| Region { mapping, plugged: None }).collect();
        Ok(Self { fixed, added: OnceLock::new() })
    }

    /// Adds a region above all others, of which nothing is there yet: address space, and no page. `start` and `size` are
    /// multiples of [`BLOCK`].
    ///
    /// # Errors
    /// The system's; that there is one already, or that it does not lie above the rest.
    pub fn add(&self, start: u64, size: u64) -> io::Result<&Region> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let free = self.fixed.last().is_none_or(|last| last.last_addr().0 < start);
        let whole = size > 0 && start.is_multiple_of(BLOCK) && size.is_multiple_of(BLOCK);
        if !free || !whole || start.checked_add(size).is_none() {
            return Err(wrong("a region that does not lie above the rest"));
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = MmapRegion::build(None, size as usize, libc::PROT_READ | libc::PROT_WRITE, flags);
        let mapping = mapping.map_err(|e| io::Error::other(e.to_string()))?;
        // SAFETY: the range is this mapping, of which nothing is used yet; the advice changes no contents. A host without huge
        // pages refuses it, and then there are none.
        unsafe { libc::madvise(mapping.as_ptr().cast(), size as usize, libc::MADV_HUGEPAGE) };
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(start));
        let mapping = mapping.ok_or_else(|| wrong("a region that wraps around"))?;
        let region = Region { mapping, plugged: Some(Plugged::none(size / BLOCK)) };
        self.added.set(region).map_err(|_| wrong("a region was added already"))?;
        self.added.get().ok_or_else(|| wrong("no region was added"))
    }

    /// The region that was added.
    #[must_use]
    pub fn added(&self) -> Option<&Region> {
        self.added.get()
    }
}

impl GuestMemory for Ram {
    type R = Region;

    fn find_region(&self, at: GuestAddress) -> Option<&Region> {
        let holds = |region: &&Region| region.start_addr() <= at && at <= region.last_addr();
        self.fixed.iter().find(holds).or_else(|| self.added.get().filter(holds))
    }

    fn num_regions(&self) -> usize {
        self.iter().count()
    }

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.fixed.iter().chain(self.added.get())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 4 << 30;

    fn ram() -> Ram {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(2 << 20), 1 << 20)];
        Ram::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn an_added_region_is_there_block_by_block() {
        let ram = ram();
        assert_eq!(ram.num_regions(), 2);
        assert!(ram.write_slice(&[1], GuestAddress(START)).is_err());
        let plugged = ram.add(START, 8 * BLOCK).unwrap().plugged().unwrap();
        let write =
            |offset: u64, count: usize| ram.write_slice(&vec![7; count], GuestAddress(START + offset));
        assert!(write(0, 1).is_err());
        plugged.set(1, true);
        write(BLOCK, BLOCK as usize).unwrap();
        assert!(write(BLOCK - 1, 1).is_err() && write(2 * BLOCK, 1).is_err());
        assert!(write(2 * BLOCK - 1, 2).is_err(), "its second byte is in a block that is not there");
        plugged.set(2, true);
        write(2 * BLOCK - 1, 2).unwrap();
        plugged.set(1, false);
        assert!(ram.read_obj::<u8>(GuestAddress(START + BLOCK)).is_err());
        assert!(ram.load::<u32>(GuestAddress(START + BLOCK), Ordering::Relaxed).is_err());
        assert_eq!(ram.read_obj::<u8>(GuestAddress(START + 2 * BLOCK)).unwrap(), 7);
    }

    #[test]
    fn a_region_is_added_once_and_above_the_rest() {
        let ram = ram();
        for (start, size) in [(0, BLOCK), (START + 1, BLOCK), (START, BLOCK + 1), (START, 0)] {
            assert!(ram.add(start, size).is_err(), "{start:#x} {size:#x}");
        }
        assert!(ram.add(u64::MAX - BLOCK + 1, 2 * BLOCK).is_err());
        ram.add(START, BLOCK).unwrap();
        assert!(ram.add(START + (1 << 30), BLOCK).is_err());
    }

    #[test]
    fn ranges_that_overlap_are_refused() {
        let ranges = [(GuestAddress(0), 2 << 20), (GuestAddress(1 << 20), 1 << 20)];
        assert!(Ram::from_ranges(&ranges).is_err());
        assert!(Ram::from_ranges(&[]).is_err());
    }

    proptest! {
        #[test]
        fn an_access_is_let_through_where_each_of_its_bytes_is(
            blocks in prop::collection::btree_set(0u64..4, 0..4),
            offset in 0u64..4 * BLOCK + 10,
            count in prop_oneof![0usize..20, 0usize..(3 * BLOCK) as usize],
        ) {
            let ram = ram();
            let plugged = ram.add(START, 4 * BLOCK).unwrap().plugged().unwrap();
            blocks.iter().for_each(|block| plugged.set(*block, true));
            let first = offset / BLOCK;
            let last = (offset + count.max(1) as u64 - 1) / BLOCK;
            let there = (first..=last).all(|block| blocks.contains(&block));
            let got = ram.get_slice(GuestAddress(START + offset), count);
            prop_assert_eq!(got.is_ok(), there);
        }
    }
}
