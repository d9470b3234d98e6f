//! Everything that the guest can talk to.

pub mod board;
pub mod serial;
pub mod virtio;
