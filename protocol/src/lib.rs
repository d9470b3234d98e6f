//! The messages between the host (`coffer`, its stubs) and the guest's init, over vsock.
//!
//! Owns: message types, the frame format, port numbers. Does not own: sockets, I/O, what a message does.
//!
//! Every connection is made by the host to [`CONTROL_PORT`] and begins with one [`Request`] frame. The guest answers
//! with one [`Reply`] frame. After [`Request::Create`] and [`Request::Exec`] the connection stays open and belongs to
//! that process: stdio, signals, window sizes and the exit status travel on it as frames, and when the host's end
//! closes, the guest kills the process.
#![forbid(unsafe_code)]

mod account;
mod frame;
pub mod limits;
mod message;
pub mod notification;
pub mod shell;
pub mod signal;
pub mod vm;

pub use account::{CpuStats, Device, MemoryStats, ProcessInfo, Stats};
pub use frame::{Decoder, Frame, FrameError, Kind, MAX_PAYLOAD, Outbox, encode};
pub use message::{
    BindSource, CreateContainer, Ended, ErrorKind, Exec, Exit, ImageSource, Interface, NamespaceKind,
    Neighbour, Network, Reply, Request, Route, Sandbox, SharedNamespace, SignalTarget, Stream, WindowSize,
};

/// Version of everything in this crate; sent in [`Sandbox`] and refused by init when it differs.
pub const VERSION: u32 = 6;

/// Guest port on which init listens for the host.
pub const CONTROL_PORT: u32 = 1024;

/// Host port (CID 2) that init connects to once it listens on [`CONTROL_PORT`]. The VMM answers it itself: host
/// connections wait until then.
pub const READY_PORT: u32 = 1;

/// Tag of the virtio-fs device through which root file systems and bind mounts reach the guest.
pub const SHARE_TAG: &str = "coffer";

/// Where init mounts [`SHARE_TAG`]; guest paths in a spec that the host rewrote lie below it.
pub const SHARE_DIR: &str = "/run/coffer/share";

/// MAC address, until the pod gives it another, of a network device in a machine that was saved as a template; by position.
#[must_use]
pub fn template_mac(position: usize) -> String {
    format!("02:c0:ff:e4:00:{:02x}", position & 0xff)
}

/// The guest may have received this many bytes of stdin that its process has not read yet; the host stops sending
/// there and goes on after [`Kind::StdinCredit`]. The same for each further stream, and [`Kind::StreamCredit`].
pub const STDIN_WINDOW: usize = 256 * 1024;

/// Longest notification, in bytes: what systemd takes (PIPE_BUF).
pub const MAX_NOTIFICATION: usize = 4096;

/// Most further descriptors of a process.
pub const MAX_STREAMS: usize = 64;
