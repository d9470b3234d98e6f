//! A container's cgroup (version 2): limits, its processes, freezing, what ended for want of memory.
//!
//! Owns: the directory below `/sys/fs/cgroup`. Does not own: which limits the host's side adds.

use std::{
    fs,
    io::{self, Write},
    path::{Component, Path, PathBuf},
};

use coffer_protocol::{ErrorKind, limits};
use oci_spec::runtime::LinuxResources;

use super::{ContainerError, device_rules};

const ROOT: &str = "/sys/fs/cgroup";
/// Most cgroups below a container's that are looked at; the container makes them.
const MOST_BELOW: usize = 4096;

/// Files of what no guest's kernel has, neither huge pages nor swap: without them every limit holds already. A kubelet sets both to zero.
const OF_NOTHING: [&str; 3] = ["hugetlb.", "memory.swap.", "memory.zswap."];

/// One container's cgroup.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

/// Files and their contents for these limits, in the order to write. `now` is what `cpu.max` says.
pub(super) fn settings(
    resources: &LinuxResources,
    now: &str,
) -> Result<Vec<(String, String)>, ContainerError> {
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
            set("cpu.weight", limits::cpu_weight(shares).to_string());
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string());
        }
        if let Some(bandwidth) = limits::bandwidth(now, cpu.quota(), cpu.period()) {
            set("cpu.max", bandwidth);
        }
        if let Some(burst) = cpu.burst() {
            set("cpu.max.burst", burst.to_string());
        }
        // cpuset.cpus and cpuset.mems name the host's processors; how many the guest has follows from them.
    }
    // As runc: none is no limit, and zero says nothing.
    if let Some(pids) = resources.pids().map(|pids| pids.limit()).filter(|v| *v != 0) {
        set("pids.max", limit(pids));
    }
    // blockIO.weight is of the host's devices, which the VMM reads and writes: its cgroup has it.
    for page in resources.hugepage_limits().iter().flatten() {
        let size = page.page_size();
        if size.is_empty() || !size.chars().all(|c| c.is_ascii_alphanumeric()) {
            let message = format!("config.json: linux.resources.hugepageLimits: {size:?} is no page size");
            return Err(ContainerError::new(ErrorKind::Invalid, message));
        }
        set(&format!("hugetlb.{size}.max"), limit(page.limit()));
    }
    for (file, value) in resources.unified().iter().flatten() {
        // A controller's file and nothing else: the name becomes part of a path, and core files move processes.
        let plain =
            file.contains('.') && file.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !plain || file.starts_with('.') || file.starts_with("cgroup.") {
            // crun's words, which its users look for.
            let message = format!(
                "config.json: linux.resources.unified: the specified key has not the form CONTROLLER.VALUE `{}`",
                file.escape_debug()
            );
            return Err(ContainerError::new(ErrorKind::Invalid, message));
        }
        set(file, value.clone());
    }
    Ok(list)
}

/// Writes a file that is there: a hierarchy answers the wish to make one with EPERM, which says nothing.
fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::File::options().write(true).open(path)?.write_all(value.as_bytes())
}

fn stands_still(group: &Path) -> bool {
    let events = fs::read_to_string(group.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "frozen 1")
}

/// A cgroup and those below it, each after the one that it is in.
fn tree(path: &Path) -> Vec<PathBuf> {
    let mut list = vec![path.to_owned()];
    let mut next = 0;
    while let Some(group) = list.get(next) {
        let entries = fs::read_dir(group).into_iter().flatten().flatten();
        let below = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
        let below: Vec<PathBuf> = below.take(MOST_BELOW.saturating_sub(list.len())).collect();
        list.extend(below);
        next += 1;
    }
    list
}

/// Removes it and those below it, as far as they are empty.
fn remove_tree(path: &Path) {
    for group in tree(path).iter().rev() {
        let _ = fs::remove_dir(group);
    }
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
            remove_tree(&path);
            if !path.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        fs::create_dir(&path).map_err(|e| ContainerError::guest("make the container's cgroup", e))?;
        Ok(Self(path))
    }

    /// Any directory, in place of one.
    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self(path.to_owned())
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
        let now = fs::read_to_string(self.0.join("cpu.max")).unwrap_or_default();
        for (file, value) in settings(resources, &now)? {
            if OF_NOTHING.iter().any(|of| file.starts_with(of)) && !self.0.join(&file).exists() {
                continue;
            }
            write(&self.0.join(&file), &value).map_err(|e| {
                let name = file.split('.').next().unwrap_or_default();
                let stage = if e.kind() == io::ErrorKind::NotFound && !self.has_controller(name) {
                    format!("set {file}: the requested cgroup controller `{name}` is not available")
                } else {
                    format!("set {file} to {value}")
                };
                ContainerError::guest(&stage, e)
            })?;
        }
        Ok(())
    }

    fn has_controller(&self, name: &str) -> bool {
        let list = fs::read_to_string(self.0.join("cgroup.controllers")).unwrap_or_default();
        list.split_whitespace().any(|controller| controller == name)
    }

    /// Has the kernel hold its processes to the rules for devices.
    ///
    /// # Errors
    /// [`ContainerError`], naming the rule or the kernel's call.
    pub fn allow_devices(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        device_rules::apply(&self.0, resources.devices().as_deref().unwrap_or_default())
    }

    /// Opens it, or one that the container has made below it: a path that starts there, with or without `/`.
    ///
    /// # Errors
    /// [`ContainerError`] when the path leads elsewhere or to nothing.
    pub fn open(&self, below: Option<&str>) -> Result<fs::File, ContainerError> {
        let inside = Path::new(below.unwrap_or_default().trim_start_matches('/'));
        if inside.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
            let message =
                format!("exec: --cgroup {}: it leads out of the container's cgroup", inside.display());
            return Err(ContainerError::new(ErrorKind::Invalid, message));
        }
        // A hierarchy of cgroups has no links that could lead elsewhere.
        let path = self.0.join(inside);
        fs::File::open(&path).map_err(|e| match below {
            Some(below) => ContainerError::guest(&format!("exec: --cgroup {below}"), e),
            None => ContainerError::guest("open the cgroup", e),
        })
    }

    /// Opens the one that a process is in.
    ///
    /// # Errors
    /// [`ContainerError`] when the process is gone.
    pub fn open_of(pid: i32) -> Result<fs::File, ContainerError> {
        let failed = |e| ContainerError::guest("open the cgroup of the container's process", e);
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(failed)?;
        let inside = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
        fs::File::open(Path::new(ROOT).join(inside)).map_err(failed)
    }

    /// Processes in it and in those below it.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mut list = Vec::new();
        for group in tree(&self.0) {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            list.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
        }
        list
    }

    /// What it uses.
    #[must_use]
    pub fn stats(&self) -> coffer_protocol::Stats {
        super::accounting::stats(&self.0)
    }

    /// What is known of its processes, with their command lines or without.
    #[must_use]
    pub fn list(&self, command_lines: bool) -> Vec<coffer_protocol::ProcessInfo> {
        super::accounting::processes(&self.processes(), command_lines)
    }

    /// Stops all processes, or lets them go on.
    ///
    /// # Errors
    /// The system's.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Its processes are to be stopped.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// All its processes are stopped: one that the kernel works for does so later than it is told.
    #[must_use]
    pub fn stands_still(&self) -> bool {
        stands_still(&self.0)
    }

    /// Whether the processes of the cgroup that a process is in are stopped, by whomever.
    #[must_use]
    pub fn stops(pid: i32) -> bool {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let inside = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
        stands_still(&Path::new(ROOT).join(inside))
    }

    /// True when the kernel killed something here for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Kills everything in it and in those below it.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&self) -> io::Result<()> {
        write(&self.0.join("cgroup.kill"), "1")
    }

    /// Kills everything in it and removes it.
    pub fn remove(&self) {
        let _ = self.kill();
        // Its processes are children of PID 1 and reaped there; the directory goes once they are.
        remove_tree(&self.0);
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
        let list = settings(&resources, "max 100000").unwrap();
        let list: Vec<(&str, &str)> = list.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
        assert_eq!(
            list,
            [
                ("memory.max", "1048576"),
                ("memory.low", "max"),
                ("cpu.weight", "39"),
                ("cpu.max", "150000 100000"),
                ("pids.max", "100"),
                ("hugetlb.2MB.max", "4194304")
            ]
        );
    }

    #[test]
    fn no_number_of_processes_leaves_the_limit_as_it_is() {
        let of = |limit: i64| {
            let value = serde_json::json!({ "pids": { "limit": limit } });
            settings(&serde_json::from_value(value).unwrap(), "").unwrap()
        };
        let set = |value: &str| vec![("pids.max".to_owned(), value.to_owned())];
        assert_eq!((of(0), of(-1), of(7)), (Vec::new(), set("max"), set("7")));
    }

    #[test]
    fn unified_limits_are_files_of_controllers_and_nothing_else() {
        let of = |name: &str| {
            let value = serde_json::json!({ "unified": { name: "7" } });
            settings(&serde_json::from_value(value).unwrap(), "")
        };
        assert_eq!(of("memory.high").unwrap(), [("memory.high".to_owned(), "7".to_owned())]);
        for name in ["../x/pids.max", "cgroup.procs", "memory", ".", "a/b.c", ""] {
            assert!(of(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_limit_without_a_file_is_named_as_missing() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        fs::write(root.path().join("memory.high"), "").unwrap();
        let group = Cgroup(root.path().to_owned());
        let set = |name: &str| {
            let value = serde_json::json!({ "unified": { name: "7" } });
            group.apply(&serde_json::from_value(value).unwrap()).map_err(|e| e.message)
        };
        set("memory.high").unwrap();
        assert_eq!(fs::read_to_string(root.path().join("memory.high")).unwrap(), "7");
        let missing = set("memory.none").unwrap_err();
        assert!(missing.contains("set memory.none to 7") && missing.contains("No such file"), "{missing}");
        let controller = set("foo.bar").unwrap_err();
        assert!(controller.contains("cgroup controller `foo` is not available"), "{controller}");
        assert!(set("CAPITALS").unwrap_err().contains("has not the form CONTROLLER.VALUE `CAPITALS`"));
        assert!(!root.path().join("memory.none").exists());
    }

    /// A kubelet says that a container gets no huge pages and no swap, and a guest's kernel has neither.
    #[test]
    fn a_limit_of_what_a_guest_has_nothing_of_needs_no_file() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        fs::write(root.path().join("pids.max"), "").unwrap();
        let group = Cgroup(root.path().to_owned());
        let resources = serde_json::from_value(serde_json::json!({
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }, { "pageSize": "1GB", "limit": 1_073_741_824 }],
            "unified": { "memory.swap.max": "0", "memory.zswap.max": "0", "hugetlb.2MB.rsvd.max": "0", "pids.max": "7" }
        }))
        .unwrap();
        group.apply(&resources).map_err(|e| e.message).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join(file)).ok();
        assert_eq!((read("pids.max").as_deref(), read("memory.swap.max")), (Some("7"), None));
        // Where there is one it is written.
        for file in ["memory.swap.max", "hugetlb.2MB.max"] {
            fs::write(root.path().join(file), "").unwrap();
        }
        group.apply(&resources).map_err(|e| e.message).unwrap();
        assert_eq!((read("memory.swap.max"), read("hugetlb.2MB.max")), (Some("0".into()), Some("0".into())));
    }

    #[test]
    fn a_cgroup_below_is_one_of_the_containers_own() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("c/a/b")).unwrap();
        fs::create_dir(root.path().join("other")).unwrap();
        let group = Cgroup(root.path().join("c"));
        for there in [None, Some("/"), Some(""), Some("."), Some("a"), Some("/a/b")] {
            group.open(there).unwrap();
        }
        for elsewhere in ["..", "/../other", "a/../../other"] {
            let message = group.open(Some(elsewhere)).unwrap_err().message;
            assert!(message.contains("leads out"), "{message}");
        }
        assert!(group.open(Some("none")).unwrap_err().message.starts_with("exec: --cgroup none"));
    }

    #[test]
    fn to_be_stopped_is_not_yet_to_stand_still() {
        let root = tempfile::tempdir().unwrap();
        let group = Cgroup(root.path().to_owned());
        group.freeze(true).unwrap();
        for (events, still) in [("populated 1\nfrozen 0\n", false), ("populated 1\nfrozen 1\n", true)] {
            fs::write(root.path().join("cgroup.events"), events).unwrap();
            assert_eq!((group.is_frozen(), group.stands_still()), (true, still));
        }
    }

    #[test]
    fn those_below_are_found_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let group = Cgroup(root.path().join("c"));
        fs::create_dir_all(group.0.join("a/b")).unwrap();
        fs::create_dir_all(group.0.join("d")).unwrap();
        for (below, pids) in [("", ""), ("a", "5\n"), ("a/b", "6\n7\n"), ("d", "8\n")] {
            fs::write(group.0.join(below).join("cgroup.procs"), pids).unwrap();
        }
        let mut list = group.processes();
        list.sort_unstable();
        assert_eq!(list, [5, 6, 7, 8]);
        // In a hierarchy of cgroups these files are no obstacle.
        for group in tree(&group.0) {
            fs::remove_file(group.join("cgroup.procs")).unwrap();
        }
        group.remove();
        assert!(!root.path().join("c/a").exists() && !root.path().join("c/d").exists());
    }
}
