//! SEV-SNP: from an image to a launch plan, and the plan's execution through KVM.
//!
//! Owns: what is launched in which order. Does not own: page conversions at run time, the emulation.

pub mod abi;
pub mod cpuid;
pub mod digest;
pub mod launch;
pub mod plan;
pub mod preflight;
pub mod status;
pub mod vmsa;
