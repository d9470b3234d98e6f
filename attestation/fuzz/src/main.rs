//! `fuzz-attestation`: the targets of this crate on the command line.

use std::process::ExitCode;

use coffer_attestation_fuzz::{TARGETS, seeds};
use coffer_fuzz::Fuzz;

fn main() -> ExitCode {
    Fuzz { seeds: seeds::all, ..Fuzz::new(env!("CARGO_MANIFEST_DIR"), &TARGETS) }.main()
}
