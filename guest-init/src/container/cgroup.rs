//! A container's cgroup (version 2): limits, its processes, freezing, what ended for want of memory.
//!
//! Owns: the directory below `/sys/fs/cgroup`. Does not own: which limits the host's side adds.

use std::{fs, io, path::PathBuf};

use oci_spec::runtime::LinuxResources;

use super::ContainerError;

const ROOT: &str = "/sys/fs/cgroup";

/// One container's cgroup.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

/// CPU shares of version 1 (2 to 262144) as a weight of version 2 (1 to 10000), as runc converts them.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Block weight of version 1 (10 to 1000) as one of version 2 (1 to 10000), as runc converts it.
fn block_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

/// Files and their contents for these limits, in the order to write.
fn settings(resources: &LinuxResources) -> Result<Vec<(String, String)>, ContainerError> {
    let mut list: Vec<(String, String)> = Vec::new();
    let mut set = |file: &str, value: String| list.push((file.to_owned(), value));
    let limit = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };
    if let Some(memory) = resources.memory() {
        if let Some(value) = memory.limit().filter(|v| *v != 0) {
            set("memory.max", limit(value));
        }
        if let Some(value) = memory.reservation().filter(|v| *v != 0) {
            set("memory.low", limit(value));
        }
        // A guest has no swap: memory and swap together are no further limit.
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            set("cpu.weight", weight(shares).to_string());
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string());
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = cpu.quota().filter(|q| *q > 0).map_or("max".to_owned(), |q| q.to_string());
            set("cpu.max", format!("{quota} {}", cpu.period().filter(|p| *p > 0).unwrap_or(100_000)));
        }
        if let Some(burst) = cpu.burst() {
            set("cpu.max.burst", burst.to_string());
        }
        // cpuset.cpus and cpuset.mems name the host's processors; how many the guest has follows from them.
    }
    if let Some(pids) = resources.pids() {
        let value = pids.limit();
        set("pids.max", if value <= 0 { "max".to_owned() } else { value.to_string() });
    }
    if let Some(weight) = resources.block_io().as_ref().and_then(|b| b.weight()).filter(|w| *w != 0) {
        set("io.weight", block_weight(weight).to_string());
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let size = page.page_size();
        if size.is_empty() || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
            let message = format!("config.json: linux.resources.hugepageLimits: {size:?} is no page size");
            return Err(ContainerError::new(coffer_protocol::ErrorKind::Invalid, message));
        }
        set(&format!("hugetlb.{size}.max"), limit(page.limit()));
    }
    for (file, value) in resources.unified().iter().flatten() {
        // A controller's file and nothing else: the name becomes part of a path, and core files move processes.
        let plain =
            file.contains('.') && file.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !plain || file.starts_with('.') || file.starts_with("cgroup.") {
            let message =
                format!("config.json: linux.resources.unified: {file:?} is not a controller's file");
            return Err(ContainerError::new(coffer_protocol::ErrorKind::Invalid, message));
        }
        set(file, value.clone());
    }
    Ok(list)
}

impl Cgroup {
    /// Makes it. The id was checked.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn create(id: &str) -> Result<Self, ContainerError> {
        let path = PathBuf::from(ROOT).join(id);
        // One of this name may not be gone yet: its processes were killed and have to end first.
        for _ in 0..200 {
            match fs::remove_dir(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                _ => break,
            }
        }
        fs::create_dir(&path).map_err(|e| ContainerError::guest("make the container's cgroup", e))?;
        Ok(Self(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.0
    }

    /// Sets limits.
    ///
    /// # Errors
    /// [`ContainerError`], naming the file.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        for (file, value) in settings(resources)? {
            fs::write(self.0.join(&file), &value)
                .map_err(|e| ContainerError::guest(&format!("set {file} to {value}"), e))?;
        }
        Ok(())
    }

    /// Processes in it.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    /// What it uses.
    #[must_use]
    pub fn stats(&self) -> coffer_protocol::Stats {
        super::accounting::stats(&self.0)
    }

    /// What is known of its processes.
    #[must_use]
    pub fn list(&self) -> Vec<coffer_protocol::ProcessInfo> {
        super::accounting::processes(&self.processes())
    }

    /// Stops all processes, or lets them go on.
    ///
    /// # Errors
    /// The system's.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// True when the kernel killed something here for want of memory.
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        let text = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        text.lines().any(|l| l.strip_prefix("oom_kill ").is_some_and(|n| n.trim() != "0"))
    }

    /// Kills everything in it and removes it.
    pub fn remove(&self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        // Its processes are children of PID 1 and reaped there; the directory goes once they are.
        let _ = fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_files_of_version_2() {
        let resources: LinuxResources = serde_json::from_value(serde_json::json!({
            "memory": { "limit": 1048576, "reservation": -1 },
            "cpu": { "shares": 1024, "quota": 150000, "period": 100000 },
            "pids": { "limit": 100 },
            "blockIO": { "weight": 505 }, "hugepageLimits": [{ "pageSize": "2MB", "limit": 4194304 }]
        }))
        .unwrap();
        let list = settings(&resources).unwrap();
        let list: Vec<(&str, &str)> = list.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
        assert_eq!(
            list,
            [
                ("memory.max", "1048576"),
                ("memory.low", "max"),
                ("cpu.weight", "39"),
                ("cpu.max", "150000 100000"),
                ("pids.max", "100"),
                ("io.weight", "5000"),
                ("hugetlb.2MB.max", "4194304")
            ]
        );
    }

    #[test]
    fn unified_limits_are_files_of_controllers_and_nothing_else() {
        let of = |name: &str| {
            let value = serde_json::json!({ "unified": { name: "7" } });
            settings(&serde_json::from_value(value).unwrap())
        };
        assert_eq!(of("memory.high").unwrap(), [("memory.high".to_owned(), "7".to_owned())]);
        for name in ["../x/pids.max", "cgroup.procs", "memory", ".", "a/b.c", ""] {
            assert!(of(name).is_err(), "{name:?}");
        }
    }
}
