//! `fuzz-vmm`: the targets of this crate on the command line.

use std::process::ExitCode;

use coffer_fuzz::Fuzz;
use coffer_vmm_fuzz::{TARGETS, seeds};

/// Headers of an image, or a few dozen steps of a guest.
const LONGEST: usize = 4096;

fn main() -> ExitCode {
    // A guest may make files as large as it likes; this machine's disk shall not be full of them.
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: the limit is valid and only read; ignoring a signal runs no code.
    unsafe {
        libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    Fuzz { longest: LONGEST, seeds: seeds::all, ..Fuzz::new(env!("CARGO_MANIFEST_DIR"), &TARGETS) }.main()
}
