//! SEV-SNP: from an image to a launch plan, and the plan's execution through KVM.
//!
//! Owns: what is launched in which order, page conversions at run time. Does not own: the emulation.

pub mod abi;
pub mod conversion;
pub mod cpuid;
pub mod digest;
pub mod guest;
pub mod kvm;
pub mod launch;
pub mod plan;
pub mod preflight;
pub mod status;
pub mod vmsa;
