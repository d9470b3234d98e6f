//! The limits of a pod's cgroup on the host.
//!
//! A host of these tests need not have a memory controller of version 2: `/sys/fs/cgroup` is a directory in memory, whose files take what is written. What is
//! asked of the guest may fail then, after the host's limits are set.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use coffer_replay::{Bench, config, gave};
use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};

const HIERARCHY: &str = "/sys/fs/cgroup";

/// A container's cgroup `NAME/c`, real, for who is in it, and as plain files, in a mount namespace of this thread's own.
struct Group {
    name: String,
    real: PathBuf,
    /// Of the real one, which the files hide.
    processes: File,
}

impl Group {
    fn new(name: &str) -> Self {
        let mount = |source: Option<&str>, target: &str, flags| {
            mount(source, target, source, flags, None::<&str>)
                .unwrap_or_else(|error| panic!("{target}: {error}"));
        };
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None, "/", MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        let name = format!("coffer-replay.{name}.{}", std::process::id());
        let roots = [HIERARCHY, "/sys/fs/cgroup/unified"].map(Path::new);
        let root = roots.into_iter().find(|root| root.join("cgroup.controllers").exists());
        let real = root.expect("cgroups of version 2").join(&name);
        fs::create_dir_all(real.join("c")).unwrap();
        let processes = File::options().write(true).open(real.join("c/cgroup.procs")).unwrap();
        mount(Some("tmpfs"), HIERARCHY, MsFlags::empty());
        fs::write(Path::new(HIERARCHY).join("cgroup.controllers"), "memory pids").unwrap();
        Self { name, real, processes }
    }

    fn path(&self) -> PathBuf {
        Path::new(HIERARCHY).join(&self.name)
    }

    fn config(&self) -> Value {
        let mut config = config(&["sleep", "1000"]);
        config["linux"]["cgroupsPath"] = json!(format!("/{}/c", self.name));
        config
    }

    /// What it starts is really in the cgroup.
    fn inside<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let mut processes = self.processes.try_clone().unwrap();
        // SAFETY: one system call, and no memory is taken.
        unsafe { command.pre_exec(move || processes.write_all(b"0")) }
    }

    fn limit_mib(&self) -> u64 {
        let text = fs::read_to_string(self.path().join("c/memory.max")).unwrap();
        text.parse::<u64>().unwrap_or_else(|_| panic!("{text}")) >> 20
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = umount(HIERARCHY);
        remove(&self.real);
    }
}

/// A cgroup, once nobody is in it and in those below.
fn remove(group: &Path) {
    for below in fs::read_dir(group).into_iter().flatten().flatten() {
        if below.path().is_dir() {
            remove(&below.path());
        }
    }
    let began = Instant::now();
    while fs::remove_dir(group).is_err() && began.elapsed() < Duration::from_secs(5) {
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_hosts_memory_limit_has_what_the_guest_has_beyond_the_containers() {
    let group = Group::new("create");
    for (annotation, value, mib) in [
        // As many as the VMM and a guest's kernel need.
        ("io.coffer.none", "", 100 + 192),
        // 7 for each GiB.
        ("io.coffer.scratch", "16G", 100 + 192 + 7 * 16),
        ("io.coffer.memory-mib", "1024", 100 + 192 + 1024 - 164),
        // The guest is smaller than its container may be.
        ("io.coffer.memory-mib", "128", 100 + 192),
    ] {
        let bench = Bench::new();
        let mut config = group.config();
        config["linux"]["resources"]["memory"]["limit"] = json!(100 << 20);
        config["annotations"][annotation] = json!(value);
        let bundle = bench.bundle("c", &config);
        let mut create = bench.command(&["create", "--bundle", bundle.to_str().unwrap(), "c"]);
        let out = File::create(bench.path("out")).unwrap();
        let _ = group.inside(&mut create).stdout(out.try_clone().unwrap()).stderr(out).status().unwrap();
        assert_eq!(group.limit_mib(), mib, "{annotation}={value}");
        let _ = bench.call(&["delete", "--force", "c"]);
        fs::remove_file(group.path().join("c/memory.max")).unwrap();
    }
}

#[test]
fn an_update_of_a_containers_memory_leaves_the_host_what_the_guest_has_beyond_it() {
    let group = Group::new("update");
    let bench = Bench::new();
    let mut config = group.config();
    config["annotations"]["io.coffer.scratch"] = json!("16G");
    // Without limits that the guest may be unable to keep; it has 512 MiB.
    config["linux"]["resources"] = json!({});
    let bundle = bench.bundle("c", &config);
    let out = || File::create(bench.path("out")).unwrap();
    let mut create = bench.command(&["create", "--bundle", bundle.to_str().unwrap(), "c"]);
    let created = group.inside(&mut create).stdout(out()).stderr(out()).status().unwrap();
    assert!(created.success(), "{}", bench.read("out"));
    let update = |mib: u32| gave(&mut bench.command(&["update", "--memory", &format!("{mib}m"), "c"]));
    let said = update(1024);
    assert_eq!(group.limit_mib(), 1024 + 192 + 7 * 16, "{}", said.err);
    let _ = bench.call(&["delete", "--force", "c"]);
}
