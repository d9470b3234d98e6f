//! Makes all RAM valid, each page once.
//!
//! Owns: which pages and in which size. No page changes its state: the VMM has made all RAM private, and what is shared
//! lies elsewhere.

use coffer_layout::{PAGE, boot::Refusal};

use super::{Hardware, PageSize};
use crate::plan::Ram;

const LARGE: u64 = 2 << 20;
/// PVALIDATE: the RMP has the page in another size.
const SIZE_MISMATCH: u32 = 6;

/// Validates `ram` but for the pages that the launch validated.
///
/// # Errors
/// [`Refusal::AlreadyValid`] when a page was valid: the host has put one page of its memory at two places, or taken one
/// away and brought it back. [`Refusal::Pvalidate`].
pub fn all(
    hardware: &mut impl Hardware,
    ram: impl Iterator<Item = Ram>,
    launched: Ram,
    coherent: bool,
) -> Result<(), Refusal> {
    for range in ram {
        let before = Ram { start: range.start, end: range.end.min(launched.start) };
        let behind = Ram { start: range.start.max(launched.end), end: range.end };
        for part in [before, behind] {
            one(hardware, part, coherent)?;
        }
    }
    Ok(())
}

fn one(hardware: &mut impl Hardware, range: Ram, coherent: bool) -> Result<(), Refusal> {
    let mut at = range.start;
    while at < range.end {
        let large = at.is_multiple_of(LARGE) && range.end - at >= LARGE;
        let size = if large && validate(hardware, at, PageSize::Large)? {
            LARGE
        } else if large {
            // KVM's private memory is in pages of 4 KiB today.
            for page in 0..LARGE / PAGE {
                small(hardware, at + page * PAGE)?;
            }
            LARGE
        } else {
            small(hardware, at)?;
            PAGE
        };
        if !coherent {
            // CVE-2025-38560: lines that the host left in the cache are evicted by reading a page's first and last.
            for page in 0..size / PAGE {
                hardware.touch(at + page * PAGE);
            }
        }
        at += size;
    }
    Ok(())
}

fn small(hardware: &mut impl Hardware, gpa: u64) -> Result<(), Refusal> {
    if validate(hardware, gpa, PageSize::Small)? { Ok(()) } else { Err(Refusal::Pvalidate) }
}

/// False when the size is not the RMP's.
fn validate(hardware: &mut impl Hardware, gpa: u64, size: PageSize) -> Result<bool, Refusal> {
    let result = hardware.pvalidate(gpa, size);
    match result.code {
        0 if result.unchanged => Err(Refusal::AlreadyValid),
        0 => Ok(true),
        SIZE_MISMATCH => Ok(false),
        _ => Err(Refusal::Pvalidate),
    }
}
