//! What a container uses, as its guest counts it.
//!
//! Owns: names and units. What a guest does not count is zero, and a limit that is not set is `None`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A process in the guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct ProcessInfo {
    /// In the guest's first namespace.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Real user.
    pub uid: u32,
    /// Seconds since 1970, by the guest's clock.
    pub started: u64,
    /// Processor time, in milliseconds.
    pub cpu_ms: u64,
    /// Arguments with spaces between, or the name in square brackets.
    pub command: String,
}

/// All of a container's account.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Stats {
    /// Processor time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Processes and threads.
    pub pids: u64,
    /// Most of them.
    pub pids_limit: Option<u64>,
    /// Block devices.
    pub devices: Vec<Device>,
}

/// Processor time, in nanoseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
#[expect(missing_docs, reason = "as in cgroup-v2's cpu.stat")]
pub struct CpuStats {
    pub total_ns: u64,
    pub user_ns: u64,
    pub system_ns: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
}

/// Memory, in bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct MemoryStats {
    /// Now.
    pub usage: u64,
    /// Most that is allowed.
    pub limit: Option<u64>,
    /// Most that was.
    pub peak: u64,
    /// How often the limit was hit.
    pub failures: u64,
    /// Processes that were killed for want of it.
    pub oom_kills: u64,
    /// Swapped out now.
    pub swap: u64,
    /// Most that may be.
    pub swap_limit: Option<u64>,
    /// cgroup-v2's memory.stat.
    pub raw: BTreeMap<String, u64>,
}

/// A block device.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Device {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// Read and written.
    pub bytes: [u64; 2],
    /// Reads and writes.
    pub operations: [u64; 2],
}
