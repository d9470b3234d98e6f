//! From the two input pages to a plan, or a refusal.
//!
//! Owns: checking. The parameter page is the host's and may say anything. Does not own: writing to memory.

use coffer_layout::{
    PAGE,
    boot::{
        COMMAND_LINE_MAX, HIGH_START, Handoff, LOW_END, MEMORY_MAP_MAX, MEMORY_MAP_OFFSET, MapEntry, Refusal,
        VP_COUNT_OFFSET, VP_MAX,
    },
};

/// A range of usable RAM, in bytes; `end` is exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ram {
    /// First byte.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
}

/// What the shim will do. It refers to both pages: the shim's stack is small, and under a TEE nobody else can write to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan<'a> {
    /// What the image says.
    pub handoff: &'a Handoff,
    /// Processors.
    pub processors: u32,
    parameters: &'a [u8; PAGE as usize],
    /// Entries of the memory map.
    entries: usize,
}

impl Plan<'_> {
    /// RAM as the host gives it, sorted.
    pub fn ram(&self) -> impl Iterator<Item = Ram> + '_ {
        (0..self.entries)
            .map(|index| map_entry(self.parameters, index))
            .filter(|entry| entry.kind == MapEntry::MEMORY)
            .filter_map(|entry| entry.bytes())
    }

    /// RAM for Linux: the host's ranges without what no PC has as RAM, the end of the first MiB.
    pub fn usable(&self) -> impl Iterator<Item = Ram> + '_ {
        self.ram()
            .flat_map(|r| {
                [
                    Ram { start: r.start, end: r.end.min(LOW_END) },
                    Ram { start: r.start.max(HIGH_START), end: r.end },
                ]
            })
            .filter(|r| r.start < r.end)
    }
}

/// Reads and checks both pages.
///
/// # Errors
/// The [`Refusal`] that is to be reported.
pub fn plan<'a>(handoff: &'a Handoff, parameters: &'a [u8; PAGE as usize]) -> Result<Plan<'a>, Refusal> {
    if handoff.command_line_size >= COMMAND_LINE_MAX {
        return Err(Refusal::CommandLine);
    }
    let processors = u32_at(parameters, VP_COUNT_OFFSET as usize);
    if processors == 0 || processors > VP_MAX {
        return Err(Refusal::Processors);
    }
    let (mut end, mut entries, mut has_ram) = (0, 0, false);
    while entries < MEMORY_MAP_MAX {
        let entry = map_entry(parameters, entries);
        if entry.pages == 0 {
            break;
        }
        let range = entry.bytes().ok_or(Refusal::MemoryMap)?;
        if range.start < end {
            return Err(Refusal::MemoryMap);
        }
        end = range.end;
        has_ram |= entry.kind == MapEntry::MEMORY;
        entries += 1;
    }
    if !has_ram {
        return Err(Refusal::MemoryMap);
    }
    let plan = Plan { handoff, processors, parameters, entries };
    let kernel = Ram { start: handoff.kernel_start, end: handoff.kernel_end };
    let initramfs = Ram {
        start: handoff.initramfs_start,
        end: handoff.initramfs_start.checked_add(handoff.initramfs_size).ok_or(Refusal::Handoff)?,
    };
    let entry = Ram { start: handoff.kernel_entry, end: handoff.kernel_entry.saturating_add(1) };
    if !inside(entry, kernel) {
        return Err(Refusal::Handoff);
    }
    let fits = |what: Ram| plan.usable().any(|ram| inside(what, ram));
    if !fits(kernel) || handoff.initramfs_size > 0 && !fits(initramfs) {
        return Err(Refusal::DoesNotFit);
    }
    Ok(plan)
}

trait Bytes {
    fn bytes(&self) -> Option<Ram>;
}

impl Bytes for MapEntry {
    /// The entry in bytes, when it does not wrap around.
    fn bytes(&self) -> Option<Ram> {
        let start = self.page.checked_mul(PAGE)?;
        Some(Ram { start, end: start.checked_add(self.pages.checked_mul(PAGE)?)? })
    }
}

fn inside(what: Ram, ram: Ram) -> bool {
    what.start < what.end && ram.start <= what.start && what.end <= ram.end
}

fn map_entry(page: &[u8; PAGE as usize], index: usize) -> MapEntry {
    let at = MEMORY_MAP_OFFSET as usize + index * size_of::<MapEntry>();
    let u64_at = |o: usize| u64::from(u32_at(page, o)) | u64::from(u32_at(page, o + 4)) << 32;
    MapEntry {
        page: u64_at(at),
        pages: u64_at(at + 8),
        kind: u32_at(page, at + 16) as u16,
        flags: (u32_at(page, at + 16) >> 16) as u16,
        reserved: u32_at(page, at + 20),
    }
}

fn u32_at(page: &[u8; PAGE as usize], offset: usize) -> u32 {
    u32::from_le_bytes([page[offset], page[offset + 1], page[offset + 2], page[offset + 3]])
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::honest::parameter_page as parameters;
    use proptest::prelude::*;

    pub(crate) fn handoff() -> Handoff {
        Handoff {
            kernel_entry: 0x100_0000,
            kernel_start: 0x100_0000,
            kernel_end: 0x180_0000,
            initramfs_start: 0x180_0000,
            initramfs_size: 0x1234,
            command_line_size: 10,
            ..Handoff::default()
        }
    }

    #[test]
    fn ram_is_what_the_host_gives_without_the_end_of_the_first_mebibyte() {
        let (handoff, page) = (handoff(), parameters(2, &[(0, 0x10000, 0), (0x10_0000, 0x1000, 0)]));
        let plan = plan(&handoff, &page).unwrap();
        let ram: Vec<Ram> = plan.usable().collect();
        assert_eq!(
            ram,
            [
                Ram { start: 0, end: 0x9_fc00 },
                Ram { start: 0x10_0000, end: 0x1000_0000 },
                Ram { start: 0x1_0000_0000, end: 0x1_0100_0000 }
            ]
        );
    }

    #[test]
    fn a_lying_parameter_page_is_refused() {
        let refused = |processors, map: &[_]| plan(&handoff(), &parameters(processors, map)).unwrap_err();
        assert_eq!(refused(0, &[(0, 0x10000, 0)]), Refusal::Processors);
        assert_eq!(refused(65, &[(0, 0x10000, 0)]), Refusal::Processors);
        assert_eq!(refused(1, &[]), Refusal::MemoryMap);
        assert_eq!(refused(1, &[(0, 0x10000, 1)]), Refusal::MemoryMap);
        assert_eq!(refused(1, &[(0, 0x10000, 0), (0xffff, 1, 0)]), Refusal::MemoryMap);
        assert_eq!(refused(1, &[(1, u64::MAX >> 12, 0)]), Refusal::MemoryMap);
        assert_eq!(refused(1, &[(u64::MAX, 1, 0)]), Refusal::MemoryMap);
        assert_eq!(refused(1, &[(0, 0x1700, 0)]), Refusal::DoesNotFit);
    }

    #[test]
    fn a_wrong_handoff_page_is_refused() {
        let page = parameters(1, &[(0, 0x10000, 0)]);
        let with = |change: fn(&mut Handoff)| {
            let mut changed = handoff();
            change(&mut changed);
            plan(&changed, &page).unwrap_err()
        };
        assert_eq!(with(|h| h.kernel_entry = 0), Refusal::Handoff);
        assert_eq!(with(|h| h.initramfs_size = u64::MAX), Refusal::Handoff);
        assert_eq!(with(|h| h.command_line_size = 4096), Refusal::CommandLine);
    }

    proptest! {
        #[test]
        fn no_page_makes_it_panic_and_ram_is_always_sorted(bytes in prop::collection::vec(any::<u8>(), PAGE as usize)) {
            let page: [u8; PAGE as usize] = bytes.try_into().unwrap();
            if let Ok(plan) = plan(&handoff(), &page) {
                let ram: Vec<Ram> = plan.usable().collect();
                prop_assert!(ram.windows(2).all(|w| w[0].end <= w[1].start));
            }
        }

        #[test]
        fn sorted_maps_that_hold_the_kernel_are_accepted(extra in prop::collection::vec((1u64..100, 1u64..1000, 0u16..4), 0..60)) {
            let mut map = vec![(0, 0x10000, 0)];
            let mut next = 0x10000;
            for (gap, pages, kind) in extra {
                map.push((next + gap, pages, kind));
                next += gap + pages;
            }
            prop_assert!(plan(&handoff(), &parameters(1, &map)).is_ok());
        }
    }
}
