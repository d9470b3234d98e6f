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

/// Eight counters at once: most are zero, and they are looked at for every input.
fn words(all: &'static [AtomicU8]) -> (&'static [AtomicU8], &'static [AtomicU64], &'static [AtomicU8]) {
    // SAFETY: any bytes are an AtomicU64, and `align_to` aligns it.
    unsafe { all.align_to() }
}

/// All counters to zero.
pub(crate) fn clear() {
    for all in COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let (before, words, after) = words(all);
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        before.iter().chain(after).for_each(|counter| counter.store(0, Ordering::Relaxed));
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
        let (mut new, mut at) = (false, 0);
        let mut look = |at: usize, count: u8| {
            if let Some(bit) = count.checked_ilog2().map(|power| 1 << power) {
                new |= self.0[at] & bit == 0;
                self.0[at] |= bit;
            }
        };
        for all in COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let (before, words, after) = words(all);
            for counter in before {
                look(at, counter.load(Ordering::Relaxed));
                at += 1;
            }
            for word in words {
                let word = word.load(Ordering::Relaxed);
                if word != 0 {
                    word.to_ne_bytes().into_iter().enumerate().for_each(|(i, count)| look(at + i, count));
                }
                at += 8;
            }
            for counter in after {
                look(at, counter.load(Ordering::Relaxed));
                at += 1;
            }
        }
        new
    }
}
