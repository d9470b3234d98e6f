//! PID 1 of the guest: one process, no shell, no other program.
//!
//! Owns: devices and mounts at boot, the control protocol's guest side, containers. Everything from the host is hostile
//! input: it is checked, and what is wrong is answered, not obeyed.

pub mod boot;
pub mod confidential;
pub mod container;
pub mod image;
pub mod network;
pub mod owner;
pub mod server;
mod session;
