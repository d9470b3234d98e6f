//! `fuzz-firmware`: the targets of this crate on the command line.

use std::process::ExitCode;

use coffer_firmware_fuzz::{TARGETS, seeds};
use coffer_fuzz::{Fuzz, Seed};

/// A page and a little.
const LONGEST: usize = 4200;

fn main() -> ExitCode {
    Fuzz { longest: LONGEST, seeds: honest, ..Fuzz::new(env!("CARGO_MANIFEST_DIR"), &TARGETS) }.main()
}

fn honest() -> Vec<Seed> {
    let seeds = vec![
        ("parameters", "honest", seeds::parameters().to_vec()),
        ("parameters", "full", seeds::full_parameters().to_vec()),
        ("hash-page", "honest", seeds::handoff().to_page().to_vec()),
        ("cpuid-page", "honest", seeds::cpuid().to_vec()),
        ("ghcb", "honest", seeds::answers().to_vec()),
    ];
    // Zeros at the end are what a shorter input has anyway.
    let shortened = |bytes: Vec<u8>| {
        let length = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        bytes[..length].to_vec()
    };
    seeds.into_iter().map(|(target, file, bytes)| (target, file, shortened(bytes))).collect()
}
