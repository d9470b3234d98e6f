//! `fuzz-init`: the targets of this crate on the command line.

use std::process::ExitCode;

use coffer_fuzz::Fuzz;
use coffer_init_fuzz::{TARGETS, seeds};

fn main() -> ExitCode {
    Fuzz { seeds: seeds::all, ..Fuzz::new(env!("CARGO_MANIFEST_DIR"), &TARGETS) }.main()
}
