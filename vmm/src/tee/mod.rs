//! Trusted execution environments: how a guest is launched in one, and one that is played for development.
//!
//! Owns: SEV-SNP's launch ([`snp`]) and its emulation ([`emulated`]). Does not own: devices, the image's format.

pub mod emulated;
pub mod snp;
