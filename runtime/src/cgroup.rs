//! The host's cgroup of a pod (version 2): its processes in one place, with the pod's limits.
//!
//! Owns: making it, its limits with what the VMM needs beside the container, removing it. Without a unified hierarchy
//! there is none.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use coffer_protocol::limits;
use oci_spec::runtime::{LinuxResources, Spec};

use crate::{
    error::{Error, host},
    plan,
};

/// The weight by io.cost, and that by BFQ, which has the configuration's own scale and goes first where it is, as under runc.
const WEIGHT: &str = "io.weight";
const BFQ_WEIGHT: &str = "io.bfq.weight";
const PIDS: &str = "pids.max";
const SWAP: &str = "memory.swap.max";
/// Where the hierarchy is.
pub const ROOT: &str = "/sys/fs/cgroup";
/// What a VM needs of the host beside the container's own limit: guest kernel, page cache of shared files, the VMM.
const OVERHEAD: i64 = 192 << 20;
/// Tasks that a VM needs of the host beside those that the container's own limit counts in the guest: processors (at most 64), the VMM's and
/// the kernel's other threads, stubs of processes that the guest refuses in the end.
const TASKS: i64 = 256;

/// The cgroup that the configuration names. `None` when it names none, or the host has no version 2.
///
/// # Errors
/// [`Error::Bundle`] when it leads elsewhere.
pub fn path(spec: &Spec) -> Result<Option<PathBuf>, Error> {
    let Some(wanted) = spec.linux().as_ref().and_then(|l| l.cgroups_path().clone()) else { return Ok(None) };
    let inside = wanted.strip_prefix("/").unwrap_or(&wanted);
    if inside.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
        return Err(Error::Bundle(format!(
            "config.json: linux.cgroupsPath {} is not a plain path",
            wanted.display()
        )));
    }
    Ok(is_unified().then(|| Path::new(ROOT).join(inside)))
}

/// The host has version 2 alone.
#[must_use]
pub fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// Makes a cgroup of [`path`], and its limits, as [`settings`] has them.
///
/// # Errors
/// The system's, naming the directory.
pub fn create(path: &Path, spec: &Spec, guest_mib: Option<u64>) -> Result<(), Error> {
    let mut so_far = PathBuf::from(ROOT);
    for part in path.strip_prefix(ROOT).unwrap_or(path) {
        delegate(&so_far);
        so_far.push(part);
        if let Err(e) = fs::create_dir(&so_far)
            && e.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(host(format!("make cgroup {}", so_far.display()))(e));
        }
    }
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    resources.map_or(Ok(()), |r| apply(path, r, guest_mib))
}

/// Turns the controllers on that limits below need. One that cannot be is noticed when its limit is set.
fn delegate(path: &Path) {
    for name in ["memory", "cpu", "pids", "cpuset", "io"] {
        let _ = fs::write(path.join("cgroup.subtree_control"), format!("+{name}"));
    }
}

/// Sets what the host can enforce of these limits, as [`settings`] has them.
///
/// # Errors
/// The system's, naming file and value.
pub fn apply(path: &Path, resources: &LinuxResources, guest_mib: Option<u64>) -> Result<(), Error> {
    let bfq = weight(resources).filter(|_| path.join(BFQ_WEIGHT).exists());
    for (file, value) in settings(resources, &bandwidth(path), guest_mib) {
        // Without the controller there is no limit.
        if (file, value.as_str()) == (PIDS, "max") && !path.join(PIDS).exists() {
            continue;
        }
        // A host without swap has no such file, and every limit of it holds.
        if file == SWAP && !path.join(SWAP).exists() {
            continue;
        }
        let (file, value) = match bfq {
            Some(weight) if file == WEIGHT => (BFQ_WEIGHT, weight.to_string()),
            _ => (file, value),
        };
        fs::write(path.join(file), &value)
            .map_err(host(format!("set {file} to {value} in {}", path.display())))?;
    }
    Ok(())
}

/// What of the host's swap the VM may have: by `unified`, or `memory.swap` without `memory.limit`, of which it is the sum with swap.
fn swap(resources: &LinuxResources) -> Option<String> {
    if let Some(value) = resources.unified().as_ref().and_then(|files| files.get(SWAP)) {
        return Some(value.clone());
    }
    let memory = resources.memory().as_ref()?;
    match (memory.swap().filter(|swap| *swap != 0), memory.limit().filter(|limit| *limit != 0)) {
        // As runc: swap has no limit either then, unless it is said.
        (None, Some(..0)) | (Some(..0), _) => Some("max".to_owned()),
        (Some(swap), Some(limit @ 1..)) => Some(swap.saturating_sub(limit).max(0).to_string()),
        _ => None,
    }
}

/// The share of the devices' time.
fn weight(resources: &LinuxResources) -> Option<u16> {
    resources.block_io().as_ref().and_then(|io| io.weight()).filter(|weight| *weight != 0)
}

/// The cgroup of a process, where the host has version 2 alone.
#[must_use]
pub fn of(pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    is_unified().then(|| Path::new(ROOT).join(path))
}

/// Raises a memory limit by so many bytes, or lowers it. A cgroup without a limit stays so.
///
/// # Errors
/// The system's, naming the directory.
pub fn widen(path: &Path, bytes: i64) -> Result<(), Error> {
    let file = path.join("memory.max");
    let limit = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<i64>().ok());
    let Some(limit) = limit.filter(|_| bytes != 0) else { return Ok(()) };
    let value = limit.saturating_add(bytes).max(0).to_string();
    fs::write(&file, &value).map_err(host(format!("set memory.max to {value} in {}", path.display())))
}

/// The CPU time that a cgroup may have now, as its file says it.
#[must_use]
pub fn bandwidth(path: &Path) -> String {
    fs::read_to_string(path.join("cpu.max")).unwrap_or_default()
}

/// Bytes of RAM that a guest has beyond what it would have by its container's limit alone: for a scratch disk, for other containers of its pod,
/// because its configuration says so, or because it keeps what it booted with. It may use them, and the host would kill it for that.
fn beyond(limit: i64, guest_mib: u64) -> i64 {
    let by_limit = plan::vm_memory_mib(limit.unsigned_abs(), 0);
    i64::try_from(guest_mib.saturating_sub(by_limit).saturating_mul(1 << 20)).unwrap_or(i64::MAX)
}

/// Files and what is written into them. `now` is what [`bandwidth`] says, `guest_mib` the RAM of the guest whose VMM is in this cgroup, if one is.
#[must_use]
pub fn settings(
    resources: &LinuxResources,
    now: &str,
    guest_mib: Option<u64>,
) -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    if let Some(limit) = resources.memory().as_ref().and_then(|m| m.limit()).filter(|l| *l != 0) {
        let whole = || limit.saturating_add(OVERHEAD).saturating_add(beyond(limit, guest_mib.unwrap_or(0)));
        list.push(("memory.max", if limit < 0 { "max".to_owned() } else { whole().to_string() }));
    }
    list.extend(swap(resources).map(|most| (SWAP, most)));
    if let Some(io) = resources.block_io() {
        for (devices, word) in [
            (io.throttle_read_bps_device(), "rbps"),
            (io.throttle_write_bps_device(), "wbps"),
            (io.throttle_read_iops_device(), "riops"),
            (io.throttle_write_iops_device(), "wiops"),
        ] {
            for device in devices.iter().flatten() {
                let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
                list.push(("io.max", format!("{}:{} {word}={rate}", device.major(), device.minor())));
            }
        }
    }
    if let Some(reservation) = resources.memory().as_ref().and_then(|m| m.reservation()).filter(|r| *r != 0) {
        let kept = if reservation < 0 { "max".to_owned() } else { reservation.to_string() };
        list.push(("memory.low", kept));
    }
    // The guest holds the container to its limit. This one holds a VMM to what its container can be worth. Zero is none, as in the guest.
    if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()) {
        let whole = if limit <= 0 { "max".to_owned() } else { limit.saturating_add(TASKS).to_string() };
        list.push((PIDS, whole));
    }
    if let Some(weight) = weight(resources) {
        list.push((WEIGHT, limits::block_weight(weight).to_string()));
    }
    let Some(cpu) = resources.cpu() else { return list };
    if let Some(idle) = cpu.idle() {
        list.push(("cpu.idle", idle.to_string()));
    }
    // The kernel takes no weight for a group that is idle.
    if let Some(shares) = cpu.shares().filter(|s| *s != 0 && cpu.idle() != Some(1)) {
        list.push(("cpu.weight", limits::cpu_weight(shares).to_string()));
    }
    if let Some(bandwidth) = limits::bandwidth(now, cpu.quota(), cpu.period()) {
        list.push(("cpu.max", bandwidth));
    }
    if let Some(burst) = cpu.burst() {
        list.push(("cpu.max.burst", burst.to_string()));
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
            list.push((file, value.clone()));
        }
    }
    list
}

/// Puts a process into it.
///
/// # Errors
/// The system's.
pub fn join(path: &Path, pid: i32) -> Result<(), Error> {
    fs::write(path.join("cgroup.procs"), pid.to_string())
        .map_err(host(format!("join cgroup {}", path.display())))
}

/// How long processes of ours may take to leave.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);

/// Removes it once those processes that are ours have left. One that somebody else uses stays.
pub fn remove(path: &Path) {
    let began = Instant::now();
    while let Err(e) = fs::remove_dir(path) {
        let busy = e.raw_os_error() == Some(libc::EBUSY);
        if !busy || began.elapsed() > LEAVE_LIMIT || !holds_ours(path) {
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// A process that ends has no name any more, but is still in its cgroup: it counts.
fn holds_ours(path: &Path) -> bool {
    let pids = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pids.trim().is_empty() || pids.lines().any(|pid| matches!(name(pid).trim(), "" | "coffer" | "coffer-vmm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_adds_what_the_vm_needs_to_memory_and_leaves_the_rest() {
        let of = |value| settings(&serde_json::from_value(value).unwrap(), "max 100000", None);
        assert_eq!(
            of(serde_json::json!({
                "memory": { "limit": 67_108_864 }, "cpu": { "quota": 50_000, "cpus": "0-1", "shares": 2 },
                "pids": { "limit": 3 }
            })),
            [
                ("memory.max", (67_108_864 + OVERHEAD).to_string()),
                // More than the container's own, or the VMM could not start.
                ("pids.max", (3 + TASKS).to_string()),
                // Between this VM and others; between its containers the guest weighs.
                ("cpu.weight", "1".to_owned()),
                ("cpu.max", "50000 100000".to_owned()),
                ("cpuset.cpus", "0-1".to_owned())
            ]
        );
        assert_eq!(
            of(serde_json::json!({ "memory": { "limit": -1 } })),
            [("memory.max", "max".to_owned()), ("memory.swap.max", "max".to_owned())]
        );
        // Files of the share are read and written by the VMM, on the host's devices.
        let io = serde_json::json!({ "throttleWriteBpsDevice": [{ "major": 8, "minor": 16, "rate": 1024 }] });
        assert_eq!(of(serde_json::json!({ "blockIO": io })), [("io.max", "8:16 wbps=1024".to_owned())]);
        let weight = serde_json::json!({ "blockIO": { "weight": 505 }, "pids": { "limit": -1 } });
        assert_eq!(of(weight), [("pids.max", "max".to_owned()), ("io.weight", "5000".to_owned())]);
        assert_eq!(of(serde_json::json!({ "blockIO": { "weight": 0 } })), []);
        assert_eq!(of(serde_json::json!({ "pids": { "limit": 0 } })), [("pids.max", "max".to_owned())]);
    }

    #[test]
    fn what_a_guest_has_beyond_its_containers_limit_the_host_allows_it() {
        let mib = |limit: i64, guest: u64| {
            let resources = serde_json::json!({ "memory": { "limit": limit } });
            let list = settings(&serde_json::from_value(resources).unwrap(), "", Some(guest));
            list[0].1.parse::<i64>().map(|bytes| bytes >> 20).map_err(|_| list[0].1.clone())
        };
        assert_eq!(mib(100 << 20, 164), Ok(100 + 192));
        // 1 TiB of a scratch disk.
        assert_eq!(mib(100 << 20, 164 + 7168), Ok(100 + 192 + 7168));
        assert_eq!(mib(1 << 20, 128), Ok(1 + 192), "no guest is smaller");
        assert_eq!(mib(1 << 30, 256), Ok(1024 + 192), "a guest that may grow");
        assert_eq!(mib(i64::MAX, u64::MAX), Ok(i64::MAX >> 20));
        assert_eq!(mib(-1, 1 << 20), Err("max".to_owned()));
    }

    #[test]
    fn a_limit_of_processes_goes_and_needs_no_controller_for_that() {
        let group = tempfile::tempdir().unwrap();
        let set = |limit: i64| {
            let resources = serde_json::json!({ "pids": { "limit": limit } });
            apply(group.path(), &serde_json::from_value(resources).unwrap(), None).unwrap();
            fs::read_to_string(group.path().join(PIDS)).ok()
        };
        assert_eq!(set(0), None);
        assert_eq!(set(3), Some((3 + TASKS).to_string()));
        assert_eq!(set(0).as_deref(), Some("max"));
    }

    /// As runc: the configuration's number is memory and swap together, the hierarchy's is swap.
    #[test]
    fn swap_is_what_it_is_more_than_memory() {
        let of = |resources: serde_json::Value| {
            let list = settings(&serde_json::from_value(resources).unwrap(), "", None);
            list.into_iter().find(|(file, _)| *file == SWAP).map(|(_, value)| value)
        };
        let memory = |limit: i64, swap: i64| {
            of(serde_json::json!({ "memory": { "limit": limit, "swap": swap } })).unwrap_or_default()
        };
        assert_eq!(memory(1 << 20, 3 << 20), (2 << 20).to_string());
        assert_eq!(memory(1 << 20, 1 << 20), "0");
        assert_eq!(
            (memory(1 << 20, -1), memory(-1, 0), memory(-1, -1)),
            ("max".into(), "max".into(), "max".into())
        );
        // Nothing is said of it.
        assert_eq!((memory(1 << 20, 0), memory(0, 3 << 20), memory(0, 0)), Default::default());
        assert_eq!(of(serde_json::json!({ "memory": { "limit": 1 << 20 } })), None);
        let unified =
            serde_json::json!({ "unified": { "memory.swap.max": "7" }, "memory": { "limit": 5, "swap": 5 } });
        assert_eq!(of(unified).as_deref(), Some("7"));
    }

    #[test]
    fn a_host_without_swap_needs_no_file_for_it() {
        let group = tempfile::tempdir().unwrap();
        let resources =
            serde_json::from_value(serde_json::json!({ "memory": { "limit": 5, "swap": 12 } })).unwrap();
        let read = || fs::read_to_string(group.path().join(SWAP)).ok();
        apply(group.path(), &resources, None).unwrap();
        assert_eq!(read(), None);
        fs::write(group.path().join(SWAP), "max").unwrap();
        apply(group.path(), &resources, None).unwrap();
        assert_eq!(read().as_deref(), Some("7"));
    }

    #[test]
    fn a_weight_is_bfqs_where_there_is_one() {
        let group = tempfile::tempdir().unwrap();
        let read = |file: &str| fs::read_to_string(group.path().join(file)).ok();
        let resources = serde_json::from_value(serde_json::json!({ "blockIO": { "weight": 505 } })).unwrap();
        apply(group.path(), &resources, None).unwrap();
        assert_eq!((read(WEIGHT).as_deref(), read(BFQ_WEIGHT)), (Some("5000"), None));
        fs::write(group.path().join(BFQ_WEIGHT), "default 100").unwrap();
        fs::remove_file(group.path().join(WEIGHT)).unwrap();
        apply(group.path(), &resources, None).unwrap();
        assert_eq!((read(WEIGHT), read(BFQ_WEIGHT).as_deref()), (None, Some("505")));
    }
}
