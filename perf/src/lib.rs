//! The boot-latency harness: starts VMMs and containers as a plan says, and tells when each stage was reached and what
//! it cost.
//!
//! Owns: how a start is measured, the peers' command lines, statistics, tables. Must not change the product for a benchmark.
//! Every time has a window (`record::Window`), and classes (`plan::Class`) are never put into one sample.

pub mod baseline;
pub mod boot;
pub mod container;
pub mod counts;
pub mod figures;
pub mod fingerprint;
pub mod fresh;
pub mod memory;
pub mod parallel;
pub mod peers;
pub mod plan;
pub mod record;
pub mod report;
pub mod run;
pub mod stats;
pub mod symbols;
pub mod terminal;
pub mod tiny;
pub mod tracepoint;
