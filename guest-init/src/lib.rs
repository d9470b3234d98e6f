//! PID 1 of the guest: one program, no shell, no other. A second process of it answers the workload, where initdata gives it something
//! to answer (`confidential`).
//!
//! Owns: devices and mounts at boot, the control protocol's guest side, containers. Everything from the host is hostile
//! input: it is checked, and what is wrong is answered, not obeyed.

pub mod boot;
#[cfg(feature = "confidential")]
pub mod confidential;
pub mod container;
#[cfg(feature = "fuzz")]
pub mod fuzz;
#[cfg(feature = "confidential")]
pub mod image;
mod memory;
pub mod network;
#[cfg(feature = "confidential")]
pub mod owner;
#[cfg(not(feature = "confidential"))]
mod plain;
mod processors;
mod random;
#[cfg(feature = "confidential")]
pub mod scratch;
#[cfg(feature = "confidential")]
pub mod sealed;
#[cfg(feature = "confidential")]
pub mod secrets;
pub mod server;
mod session;
mod slots;
mod stdio;
mod thread;

#[cfg(not(feature = "confidential"))]
pub use plain::{confidential, image};
