//! Feedback: which edges of the code an input went along, when the build counts them.
//!
//! Owns: the counters that LLVM's `sancov-module` pass puts into each object, and what of them was seen before. Without that
//! pass there are none, and nothing is ever new.

use std::{
    ptr, slice,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

/// Each object's counters. Filled before `main`.
static COUNTERS: Mutex<Vec<&'static [AtomicU8]>> = Mutex::new(Vec::new());

/// Called by each instrumented object's constructor, with the whole program's counters.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    if start.is_null() || end <= start {
        return;
    }
    // SAFETY: LLVM hands over its section of counters, which is there as long as the program and written with plain
    // instructions of one byte each, so that an atomic of that size may look at it.
    let all = unsafe { slice::from_raw_parts(start.cast::<AtomicU8>(), end.offset_from_unsigned(start)) };
    let mut counters = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    if !counters.iter().any(|known| ptr::eq(*known, all)) {
        counters.push(all);
    }
}

/// Counters that are looked at together: nearly all are zero, for every input. A loop over them would itself be counted, step by step.
const BLOCK: usize = 1024;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

fn is_zero(block: &[AtomicU8]) -> bool {
    // SAFETY: both have at least `block.len()` bytes, as blocks are no longer than [`BLOCK`]. A thread that counts meanwhile, as the
    // one that waits for inputs without end may, writes single bytes, of which any value will do.
    unsafe { libc::memcmp(block.as_ptr().cast(), ZEROS.as_ptr().cast(), block.len()) == 0 }
}

/// All counters to zero.
pub(crate) fn clear() {
    for all in COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        // SAFETY: the section is there as long as the program and may be written, as its code does; other threads as in `is_zero`.
        unsafe { libc::memset(all.as_ptr().cast_mut().cast(), 0, all.len()) };
    }
}

/// What was seen.
pub(crate) struct Coverage(Vec<u8>);

impl Coverage {
    pub(crate) fn new() -> Self {
        let counters = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
        Self(vec![0; counters.iter().map(|all| all.len()).sum()])
    }

    /// Counters in the program.
    pub(crate) fn size(&self) -> usize {
        self.0.len()
    }

    /// Counters that were ever above zero.
    pub(crate) fn seen(&self) -> usize {
        self.0.iter().filter(|bits| **bits != 0).count()
    }

    /// True if since [`clear`] an edge was taken that never was, or more often than ever, by powers of two.
    pub(crate) fn is_new(&mut self) -> bool {
        let (mut new, mut start) = (false, 0);
        for all in COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for (number, block) in all.chunks(BLOCK).enumerate().filter(|(_, block)| !is_zero(block)) {
                // SAFETY: any bytes are an AtomicU64, and `align_to` aligns it.
                let (before, words, after) = unsafe { block.align_to::<AtomicU64>() };
                let mut at = start + number * BLOCK;
                for counter in before {
                    new |= self.look(at, counter.load(Ordering::Relaxed));
                    at += 1;
                }
                for word in words {
                    let counts = word.load(Ordering::Relaxed);
                    if counts != 0 {
                        for (i, count) in counts.to_ne_bytes().into_iter().enumerate() {
                            new |= self.look(at + i, count);
                        }
                    }
                    at += 8;
                }
                for counter in after {
                    new |= self.look(at, counter.load(Ordering::Relaxed));
                    at += 1;
                }
            }
            start += all.len();
        }
        new
    }

    fn look(&mut self, at: usize, count: u8) -> bool {
        let bit = count.checked_ilog2().map_or(0, |power| 1 << power);
        let new = self.0[at] & bit != bit;
        self.0[at] |= bit;
        new
    }
}
