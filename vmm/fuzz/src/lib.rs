//! Fuzz targets: everything that the VMM reads and somebody else may have written.
//!
//! Owns: the targets and what must hold whatever the bytes are. Each takes any bytes, and panics when something is wrong.

pub mod devices;
pub mod emulated;
pub mod image;
pub mod input;
pub mod seeds;
pub mod template;

use coffer_fuzz::Target;

/// The targets by name.
pub const TARGETS: [Target; 11] = [
    ("igvm", image::igvm),
    ("parameter-page", image::parameter_page),
    ("ghcb", emulated::ghcb),
    ("messages", emulated::messages),
    ("rng", devices::rng),
    ("vsock", devices::vsock),
    ("blk", devices::blk),
    ("fs", devices::fs),
    ("net", devices::net),
    ("mem", devices::mem),
    ("template", template::state),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_takes_nothing_and_its_seeds() {
        for (name, target) in TARGETS {
            target(&[]);
            let seeds: Vec<_> = seeds::all().into_iter().filter(|(of, ..)| *of == name).collect();
            assert!(!seeds.is_empty(), "{name}");
            seeds.iter().for_each(|(_, _, bytes)| target(bytes));
        }
    }
}
