//! The VMM as a library: boots an IGVM image on KVM and serves its devices. One process, one pod.
//!
//! Owns: KVM, guest memory, launch, devices. Does not know what an OCI bundle is.

pub mod devices;
