//! The kernel without its zeros: what is copied and hashed at every boot.
//!
//! Owns: cutting segments where many pages of zeros lie, which a region's end clears without reading them. A vmlinux holds
//! megabytes: its bss is in the file when a section with contents follows.

use coffer_layout::PAGE;

use super::is_zero;
use crate::kernel::Segment;

/// Pages of zeros from which on a cut is worth a region.
const GAP: usize = 16;

/// Cuts the segments into at most `most` pieces; `None` when there are more segments than that.
pub(super) fn of(segments: &[Segment], most: usize) -> Option<Vec<Segment>> {
    if segments.len() > most {
        return None;
    }
    let mut gap = GAP;
    loop {
        let pieces: Vec<Segment> = segments.iter().flat_map(|segment| cut(segment, gap)).collect();
        if pieces.len() <= most {
            return Some(pieces);
        }
        gap *= 2;
    }
}

/// Cuts at every run of at least `gap` pages of zeros. Each piece has at least one byte of data.
fn cut(segment: &Segment, gap: usize) -> Vec<Segment> {
    let page = PAGE as usize;
    // First and last page of each piece; the first begins with the segment.
    let mut runs = vec![(0, 0)];
    for (index, _) in segment.data.chunks(page).enumerate().filter(|(_, bytes)| !is_zero(bytes)) {
        match runs.last_mut() {
            Some((_, last)) if index - *last <= gap => *last = index,
            _ => runs.push((index, index)),
        }
    }
    let starts: Vec<u64> = runs.iter().map(|(first, _)| (first * page) as u64).collect();
    let ends = starts.iter().skip(1).copied().chain([segment.size]);
    let piece = |((first, last), end): (&(usize, usize), u64)| {
        let start = (first * page) as u64;
        let bytes = segment.data.get(first * page..).unwrap_or_default();
        let mut data = bytes[..bytes.len().min((last + 1 - first) * page)].to_vec();
        if data.is_empty() {
            data.push(0);
        }
        Segment { address: segment.address + start, data, size: end - start }
    };
    runs.iter().zip(ends).map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Memory as the pieces make it.
    fn memory(pieces: &[Segment], start: u64, size: u64) -> Vec<u8> {
        let mut memory = vec![0xff; size as usize];
        for piece in pieces {
            let at = (piece.address - start) as usize;
            memory[at..at + piece.data.len()].copy_from_slice(&piece.data);
            memory[at + piece.data.len()..at + piece.size as usize].fill(0);
        }
        memory
    }

    proptest! {
        #[test]
        fn pieces_make_the_segments_memory(pages in prop::collection::vec(prop::bool::weighted(0.2), 0..200), tail in 0u64..9000, most in 1usize..15) {
            let mut data: Vec<u8> = pages.iter().flat_map(|full| vec![u8::from(*full); PAGE as usize]).collect();
            data.truncate(data.len().saturating_sub(100));
            let size = data.len() as u64 + tail + 1;
            let segment = Segment { address: 0x100_0000, data: data.clone(), size };
            let pieces = of(&[segment], most).unwrap();
            prop_assert!(pieces.len() <= most);
            prop_assert!(pieces.iter().all(|p| !p.data.is_empty() && p.data.len() as u64 <= p.size && p.address.is_multiple_of(PAGE)));
            data.resize(size as usize, 0);
            prop_assert_eq!(memory(&pieces, 0x100_0000, size), data);
        }
    }

    #[test]
    fn many_zeros_are_left_out_and_few_are_not() {
        let page = PAGE as usize;
        let mut data = vec![0; 100 * page];
        for full in [0, 3, 60, 99] {
            data[full * page] = 1;
        }
        let pieces = of(&[Segment { address: 0, data, size: 0x10_0000 }], 14).unwrap();
        let shape: Vec<_> = pieces.iter().map(|p| (p.address, p.data.len() / page, p.size)).collect();
        assert_eq!(shape, [(0, 4, 0x3c000), (0x3c000, 1, 0x27000), (0x63000, 1, 0x9d000)]);
    }
}
