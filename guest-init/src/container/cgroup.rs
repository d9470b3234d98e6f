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

/// Files and their contents for these limits.
fn settings(resources: &LinuxResources) -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    let limit = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };
    if let Some(memory) = resources.memory() {
        if let Some(value) = memory.limit().filter(|v| *v != 0) {
            list.push(("memory.max", limit(value)));
        }
        if let Some(value) = memory.reservation().filter(|v| *v != 0) {
            list.push(("memory.low", limit(value)));
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            list.push(("cpu.weight", weight(shares).to_string()));
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = cpu.quota().filter(|q| *q > 0).map_or("max".to_owned(), |q| q.to_string());
            list.push(("cpu.max", format!("{quota} {}", cpu.period().unwrap_or(100_000))));
        }
    }
    if let Some(pids) = resources.pids() {
        let value = pids.limit();
        list.push(("pids.max", if value <= 0 { "max".to_owned() } else { value.to_string() }));
    }
    list
}

impl Cgroup {
    /// Makes it. The id was checked.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn create(id: &str) -> Result<Self, ContainerError> {
        let path = PathBuf::from(ROOT).join(id);
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
        for (file, value) in settings(resources) {
            fs::write(self.0.join(file), &value)
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
            "pids": { "limit": 100 }
        }))
        .unwrap();
        assert_eq!(
            settings(&resources),
            [
                ("memory.max", "1048576".to_owned()),
                ("memory.low", "max".to_owned()),
                ("cpu.weight", "39".to_owned()),
                ("cpu.max", "150000 100000".to_owned()),
                ("pids.max", "100".to_owned())
            ]
        );
    }
}
