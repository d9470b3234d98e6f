//! The boot-latency harness: starts VMMs, one boot each, and says when PID 1 ran and what the VMM cost.
//!
//! Owns: how a boot is measured, the peers' command lines, the statistics. Must not change the product for a benchmark.
//!
//! Every VMM is watched in the same way: init writes one byte to the mark port, the VMM passes it on through a pipe,
//! and the harness takes the time when it reads it. The window is always "exec of the VMM → init's first mark".

pub mod boot;
pub mod memory;
pub mod peers;
pub mod stats;
