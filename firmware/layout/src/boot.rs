//! What the shim finds in memory, and where: shared by the image tool, which writes it, and the shim, which reads it.
//!
//! Owns: addresses and formats of the shim's own pages. Does not own: Linux's boot_params.

/// Where the shim is loaded and entered; at most [`SHIM_MAX`] bytes.
pub const SHIM_BASE: u64 = 0x10000;
/// Longest shim, in bytes.
pub const SHIM_MAX: u64 = 32 * 1024;
