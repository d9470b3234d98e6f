//! Kernel, initramfs and command line: from shared pages into private ones, and compared with the measured hashes.
//!
//! Owns: that nothing of a region is used which was not hashed. The source is read once, into private memory; the hash is
//! of the private copy, so that a host that changes the source in between changes nothing.

use coffer_layout::{
    PAGE,
    boot::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_START, Handoff, Refusal, Region, RegionKind},
    handoff::REGIONS_MAX,
    snp::{PAYLOAD, SHARED_BASE, SHARED_END},
};

use super::Hardware;
use crate::{plan::Ram, sha384::Sha384};

/// Checks that the regions are what the handoff page's other fields say, and disjoint. The page is measured; this is for
/// images that were built wrongly.
///
/// # Errors
/// [`Refusal::HashPage`].
pub fn check(handoff: &Handoff) -> Result<(), Refusal> {
    let regions = handoff.used_regions();
    if handoff.region_count as usize > REGIONS_MAX {
        return Err(Refusal::HashPage);
    }
    let (mut lines, mut initramfses) = (0, 0);
    for (index, region) in regions.iter().enumerate() {
        let to = destination(region).ok_or(Refusal::HashPage)?;
        let placed = match region.kind {
            RegionKind::Kernel => handoff.kernel_start <= to.start && to.end <= handoff.kernel_end,
            RegionKind::Initramfs => {
                initramfses += 1;
                to.start == handoff.initramfs_start
                    && region.length == handoff.initramfs_size
                    && region.memory == region.length
            }
            RegionKind::CommandLine => {
                lines += 1;
                to.start == COMMAND_LINE
                    && region.length == handoff.command_line_size + 1
                    && region.memory <= COMMAND_LINE_MAX
            }
        };
        let overlaps = |other: &Region| {
            destination(other).is_some_and(|other| other.start < to.end && to.start < other.end)
        };
        if !placed || regions[..index].iter().any(overlaps) {
            return Err(Refusal::HashPage);
        }
    }
    let starts = |r: &Region| {
        r.kind == RegionKind::Kernel
            && (r.destination..r.destination + r.length).contains(&handoff.kernel_entry)
    };
    let complete =
        lines == 1 && initramfses == u32::from(handoff.initramfs_size > 0) && regions.iter().any(starts);
    if complete { Ok(()) } else { Err(Refusal::HashPage) }
}

/// Where a region goes; `None` when its numbers are not a region's.
fn destination(region: &Region) -> Option<Ram> {
    let source_end = region.source.checked_add(region.length)?;
    let end = region.destination.checked_add(region.memory)?;
    let sound = region.length > 0
        && region.length <= region.memory
        && region.source.is_multiple_of(PAGE)
        && region.destination.is_multiple_of(PAGE)
        && region.source >= PAYLOAD
        && source_end <= SHARED_END
        && (region.destination >= HIGH_START || region.kind == RegionKind::CommandLine)
        && end <= SHARED_BASE;
    sound.then_some(Ram { start: region.destination, end })
}

/// Copies and compares one region that [`check`] accepted.
///
/// # Errors
/// The refusal of the region's kind.
pub fn load(hardware: &mut impl Hardware, region: &Region) -> Result<(), Refusal> {
    let mut hash = Sha384::default();
    let mut done = 0;
    // A page at a time: it is still in the cache when it is hashed.
    while done < region.length {
        let length = (region.length - done).min(PAGE) as usize;
        hardware.copy(region.source + done, region.destination + done, length);
        hash.update(hardware.private(region.destination + done, length));
        done += length as u64;
    }
    if hash.finish() != region.sha384 {
        return Err(match region.kind {
            RegionKind::Kernel => Refusal::KernelHash,
            RegionKind::Initramfs => Refusal::InitramfsHash,
            RegionKind::CommandLine => Refusal::CommandLineHash,
        });
    }
    // Memory that was just validated holds whatever the host left there.
    hardware.clear(region.destination + region.length, region.memory - region.length);
    Ok(())
}
