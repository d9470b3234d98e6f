//! Everything that the guest can talk to.

pub mod virtio;
