//! The OCI command line `coffer` and the stub: what podman, containerd and CRI-O run in place of runc.
//!
//! Owns: bundle to pod, state on disk, the processes of the host's side, console, signals. Never talks to KVM.

pub mod cgroup;
pub mod cli;
pub mod client;
pub mod clock;
pub mod commands;
pub mod confidential;
pub mod descriptors;
mod devices;
pub mod doctor;
pub mod error;
pub mod home;
pub mod image;
pub mod interrupt;
pub mod log;
pub mod network;
pub mod notify;
pub mod pid;
pub mod plan;
pub mod pool;
pub mod program;
pub mod registry;
pub mod resize;
pub mod scratch;
pub mod spawn;
pub mod start;
pub mod state;
pub mod storage;
pub mod stub;
pub mod support;
pub mod systemd;
pub mod template;
mod title;
pub mod volumes;
