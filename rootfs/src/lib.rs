//! What the guest mounts: today the initramfs with init in it.
//!
//! Owns: the archive's contents and that the same init gives the same bytes. Does not run at boot.
#![forbid(unsafe_code)]

pub mod initramfs;
