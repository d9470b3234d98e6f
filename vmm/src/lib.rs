//! The VMM as a library: boots an IGVM image on KVM and serves its devices. One process, one pod.
//!
//! Owns: KVM, guest memory, launch, devices. Does not know what an OCI bundle is.

pub mod args;
pub mod confine;
pub mod cpuid;
pub mod devices;
pub mod end;
pub mod igvm;
pub mod launch;
pub mod log;
pub mod machine;
pub mod memory;
pub mod output;
pub mod shell;
pub mod tee;
pub mod template;
pub mod trace;
pub mod vcpu;
