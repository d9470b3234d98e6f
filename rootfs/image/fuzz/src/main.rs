//! `fuzz-layers`: the targets of this crate on the command line.

use std::process::ExitCode;

use coffer_fuzz::Fuzz;
use coffer_layers_fuzz::TARGETS;

fn main() -> ExitCode {
    Fuzz { repair: repair_sums, ..Fuzz::new(env!("CARGO_MANIFEST_DIR"), &TARGETS) }.main()
}

/// Makes the checksum of every block right that looks like a tar's header: most mutations break one, and all that is behind it
/// would go unread.
fn repair_sums(data: &mut [u8]) {
    for block in data.chunks_exact_mut(512).filter(|block| block.get(257..262) == Some(b"ustar".as_slice())) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
