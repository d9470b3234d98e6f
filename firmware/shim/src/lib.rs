//! What runs first in every guest: reads the measured handoff page and the VMM's parameters, builds what Linux expects.
//!
//! Owns: the decisions, as functions that run on the host too. Does not own: the entry, ports, memory (`main.rs`).
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot_params;
#[cfg(any(test, feature = "honest"))]
pub mod honest;
pub mod mp_table;
pub mod plan;
pub mod sha384;
pub mod snp;
