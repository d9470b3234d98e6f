//! From a bundle to what is to be done: pure.
//!
//! Owns: sizes of the VM, the configuration in the guest's terms. Does not own: doing it.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use coffer_protocol::{BindSource, ImageSource, SHARE_DIR};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::Value;

use crate::{
    confidential::Confidential,
    devices,
    error::Error,
    image,
    notify::{self, Notify},
    scratch, support, volumes,
};

/// MiB of a guest without a memory limit.
pub(crate) const DEFAULT_MEMORY_MIB: u64 = 512;
/// MiB that the guest's kernel and init need beside the container.
pub(crate) const GUEST_OVERHEAD_MIB: u64 = 64;
/// Says a VM's memory outright, in MiB.
pub(crate) const MEMORY_ANNOTATION: &str = "io.coffer.memory-mib";
/// MiB that no guest is smaller than.
pub(crate) const LEAST_MEMORY_MIB: u64 = 128;
pub(crate) const MOST_VCPUS: u32 = 64;
/// Says a VM's processors outright.
pub(crate) const VCPUS_ANNOTATION: &str = "io.coffer.vcpus";
/// Names the processors that a VM can have, when it boots with fewer.
pub(crate) const MOST_VCPUS_ANNOTATION: &str = "io.coffer.vcpus-max";
/// Where a debug image's serial console goes: an absolute path.
pub(crate) const CONSOLE_ANNOTATION: &str = "io.coffer.console";
/// As many as resolv.conf(5) has.
const MOST_NAME_SERVERS: usize = 3;

/// A host directory or file that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// Below the shared directory.
    pub target: PathBuf,
    /// Writes are refused on the host too.
    pub read_only: bool,
    /// What is mounted below it comes along.
    pub recursive: bool,
}

/// What a container needs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// As in the bundle.
    pub spec: Spec,
    /// What the guest gets.
    pub guest_spec: Value,
    /// Which of its mounts are files.
    pub bind_sources: Vec<BindSource>,
    /// What to show to the guest, the root first, an image's blobs last.
    pub binds: Vec<Bind>,
    /// The image that the guest unpacks in place of the root.
    pub image: Option<ImageSource>,
    /// What protects the pod.
    pub confidential: Confidential,
    /// Addresses of the name servers in the resolv.conf that the container gets.
    pub name_servers: Vec<String>,
    /// Bytes of a disk for what the guest unpacks.
    pub scratch: Option<u64>,
    /// The root on the host.
    pub rootfs: PathBuf,
    /// Guest RAM.
    pub memory_mib: u64,
    /// The configuration says how much that is.
    pub memory_is_said: bool,
    /// Processors that it boots with.
    pub vcpus: u32,
    /// Processors that it can have; those beyond [`Self::vcpus`] wait.
    pub most_vcpus: u32,
    /// A terminal is wanted.
    pub terminal: bool,
    /// The IGVM file to boot from, where the configuration names one (`vm.kernel.path`).
    pub igvm: Option<PathBuf>,
    /// The container notifies a service manager, as far as the configuration says.
    pub notify: Option<Notify>,
}

impl Plan {
    /// The file for the guest's console, where somebody wants one. Only a debug image writes there.
    #[must_use]
    pub fn console(&self) -> Option<&Path> {
        annotation(&self.spec, CONSOLE_ANNOTATION).map(Path::new)
    }
}

/// Reads `config.json`, without what nobody knows: both of these, for what the types leave out.
///
/// # Errors
/// [`Error::Bundle`], with the parser's words.
pub fn read(config: &[u8]) -> Result<(Value, Spec), Error> {
    let wrong = |e: serde_json::Error| Error::Bundle(format!("config.json: {e}"));
    let mut value: Value = serde_json::from_slice(config).map_err(wrong)?;
    if let Some(process) = value.get_mut("process") {
        support::known_capabilities(process);
    }
    let spec = serde_json::from_value(value.clone()).map_err(wrong)?;
    Ok((value, spec))
}

/// The capabilities that [`read`] leaves out.
#[must_use]
pub fn unknown_capabilities(config: &[u8]) -> BTreeSet<String> {
    let mut value: Value = serde_json::from_slice(config).unwrap_or_default();
    value.get_mut("process").map(support::known_capabilities).unwrap_or_default()
}

/// Reads `config.json` and plans.
///
/// # Errors
/// [`Error::Bundle`], naming the field.
pub fn plan(bundle: &Path, id: &str, config: &[u8]) -> Result<Plan, Error> {
    let wrong = |message: String| Error::Bundle(message);
    let (mut value, spec) = read(config)?;
    support::check(&spec, &value)?;
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| wrong("config.json: no root: a container needs a root file system".into()))?;
    let rootfs = bundle.join(root.path());
    let process = spec.process().as_ref().ok_or_else(|| wrong("config.json: no process".into()))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(wrong("config.json: process.args is empty".into()));
    }
    let terminal = process.terminal().unwrap_or(false);
    devices::keep_guests(&mut value, &spec, devices::is_of_the_host)?;
    let config = value.clone();
    let notify = notify::mounted(&mut value, &spec, bundle);
    let (mut binds, bind_sources) =
        rewrite(&mut value, &spec, bundle, id, &rootfs, notify.as_ref().map(|(mount, _)| *mount));
    let image = image::source(&spec, id)?.map(|(image, blobs)| {
        binds.push(blobs);
        image
    });
    let vcpus = match hardware(&config, "vcpus") {
        Some(count) => u32::try_from(count).unwrap_or(u32::MAX).clamp(1, MOST_VCPUS),
        None => vcpus(&spec)?,
    };
    Ok(Plan {
        guest_spec: value,
        bind_sources,
        binds,
        image,
        confidential: Confidential::of(&spec)?,
        name_servers: name_servers(&spec, bundle),
        scratch: scratch::wanted(&spec)?,
        rootfs,
        memory_mib: match hardware(&config, "memory") {
            Some(bytes) => bytes.div_ceil(1 << 20).next_multiple_of(2).clamp(LEAST_MEMORY_MIB, 1 << 20),
            None => memory_mib(&spec)?,
        },
        memory_is_said: hardware(&config, "memory").is_some()
            || annotation(&spec, MEMORY_ANNOTATION).is_some()
            || memory_limit(&spec).is_some(),
        vcpus,
        most_vcpus: most_vcpus(&spec, vcpus)?,
        terminal,
        igvm: config["vm"]["kernel"]["path"].as_str().map(PathBuf::from),
        notify: notify.map(|(_, notify)| notify),
        spec,
    })
}

/// Puts the configuration into the guest's terms. The mount `own` is that already.
fn rewrite(
    value: &mut Value,
    spec: &Spec,
    bundle: &Path,
    id: &str,
    rootfs: &Path,
    own: Option<usize>,
) -> (Vec<Bind>, Vec<BindSource>) {
    value["root"]["path"] = Value::from(format!("{SHARE_DIR}/{id}/rootfs"));
    let target = PathBuf::from(id).join("rootfs");
    let mut binds = vec![Bind { source: rootfs.to_owned(), target, read_only: false, recursive: true }];
    let mut sources = Vec::new();
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let options = mount.options().clone().unwrap_or_default();
        let has = |word: &str| options.iter().any(|o| o == word);
        let bind = has("bind") || has("rbind") || mount.typ().as_deref() == Some("bind");
        if !bind || own == Some(index) {
            continue;
        }
        let Some(source) = mount.source() else { continue };
        let source = bundle.join(source);
        if let Some(kib) = shared_memory(mount.destination(), &source) {
            value["mounts"][index] = shared_memory_mount(&shared_name(&source), kib);
            continue;
        }
        sources.push(BindSource { mount: index, directory: source.is_dir() });
        let (read_only, recursive) = (has("ro") || has("rro"), has("rbind"));
        let target = volumes::place(&source, read_only, recursive)
            .unwrap_or_else(|| PathBuf::from(id).join("mounts").join(index.to_string()));
        value["mounts"][index]["source"] = Value::from(format!("{SHARE_DIR}/{}", target.display()));
        binds.push(Bind { source, target, read_only, recursive });
    }
    // What only the host can do, or must not be known.
    if let Some(object) = value.as_object_mut() {
        object.remove("vm");
    }
    let last = value["hooks"]["startContainer"].take();
    if let Some(object) = value.as_object_mut() {
        object.remove("hooks");
        // The one that runs inside the container.
        if last.as_array().is_some_and(|list| !list.is_empty()) {
            object.insert("hooks".into(), serde_json::json!({ "startContainer": last }));
        }
    }
    if let Some(linux) = value.get_mut("linux").and_then(Value::as_object_mut) {
        linux.remove("cgroupsPath");
        if let Some(Value::Array(namespaces)) = linux.get_mut("namespaces") {
            for namespace in namespaces {
                if let Some(object) = namespace.as_object_mut() {
                    object.remove("path");
                }
            }
        }
        // Limits of the host's block devices are its own to keep.
        if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut)
            && let Some(io) = resources.get_mut("blockIO").and_then(Value::as_object_mut)
        {
            io.retain(|name, _| !name.starts_with("throttle"));
        }
    }
    (binds, sources)
}

/// Whether a configuration asks for a terminal.
#[must_use]
pub fn wants_terminal(config: &[u8]) -> bool {
    serde_json::from_slice::<Value>(config).is_ok_and(|c| c["process"]["terminal"] == true)
}

/// KiB of a container's shared memory, which callers make as a tmpfs on the host. The guest gets a tmpfs of its own of
/// that size: memory is shared between processes of one kernel, and not through files of the host. What is the host's own
/// `/dev/shm` stays a bind.
fn shared_memory(destination: &Path, source: &Path) -> Option<u64> {
    if destination != Path::new("/dev/shm") || source == Path::new("/dev/shm") {
        return None;
    }
    let system = nix::sys::statfs::statfs(source).ok()?;
    let bytes = system.blocks().checked_mul(u64::try_from(system.block_size()).ok()?)?;
    (system.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC).then_some(bytes / 1024)
}

/// Who the guest asks for names before its container runs: as resolv.conf(5) says, of the file that callers make for it.
fn name_servers(spec: &Spec, bundle: &Path) -> Vec<String> {
    let mounts = spec.mounts().iter().flatten();
    let file =
        mounts.filter(|m| m.destination() == Path::new("/etc/resolv.conf")).find_map(|m| m.source().clone());
    let text = file.and_then(|path| std::fs::read_to_string(bundle.join(path)).ok()).unwrap_or_default();
    let words = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let addresses = words.map(str::trim).filter(|word| word.parse::<std::net::IpAddr>().is_ok());
    addresses.take(MOST_NAME_SERVERS).map(str::to_owned).collect()
}

/// The guest's own in its place.
#[must_use]
pub fn shared_memory_mount(name: &str, kib: u64) -> Value {
    serde_json::json!({
        "destination": "/dev/shm", "type": "tmpfs", "source": name,
        "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={kib}k")],
    })
}

/// A name for it that all containers of a pod have which were given the same one.
fn shared_name(source: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(source).map_or("shm".into(), |m| format!("shm-{}-{}", m.dev(), m.ino()))
}

/// A configuration with annotations that it does not have yet; those that it has stay.
///
/// # Errors
/// [`Error::Bundle`] when it is no configuration.
pub fn annotate(config: Vec<u8>, annotations: &[(String, String)]) -> Result<Vec<u8>, Error> {
    if annotations.is_empty() {
        return Ok(config);
    }
    let wrong = |message: String| Error::Bundle(format!("config.json: {message}"));
    let mut value: Value = serde_json::from_slice(&config).map_err(|e| wrong(e.to_string()))?;
    let all = value.as_object_mut().ok_or_else(|| wrong("not an object".into()))?;
    let had = all.entry("annotations").or_insert_with(|| Value::Object(Default::default()));
    if had.is_null() {
        *had = Value::Object(Default::default());
    }
    let had = had.as_object_mut().ok_or_else(|| wrong("annotations are not an object".into()))?;
    for (key, text) in annotations {
        had.entry(key).or_insert_with(|| text.as_str().into());
    }
    Ok(value.to_string().into_bytes())
}

pub(crate) fn annotation<'a>(spec: &'a Spec, key: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(key).map(String::as_str)
}

/// A number of `vm.hwConfig` (config-vm.md): `memory` in bytes, `vcpus`.
fn hardware(config: &Value, field: &str) -> Option<u64> {
    config["vm"]["hwConfig"][field].as_u64().filter(|n| *n > 0)
}

fn memory_mib(spec: &Spec) -> Result<u64, Error> {
    if let Some(text) = annotation(spec, MEMORY_ANNOTATION) {
        let wrong = || {
            Error::Bundle(format!("annotation {MEMORY_ANNOTATION}={text} is not a number of MiB, 32 or more"))
        };
        return text.parse().ok().filter(|n| *n >= 32).ok_or_else(wrong);
    }
    let Some(limit) = memory_limit(spec) else { return Ok(DEFAULT_MEMORY_MIB) };
    Ok(vm_memory_mib(limit as u64, scratch::wanted(spec)?.map_or(0, scratch::memory_mib)))
}

/// Bytes that the pod's containers, or this one, may have.
fn memory_limit(spec: &Spec) -> Option<i64> {
    let limit = resources(spec).and_then(|r| r.memory().as_ref()).and_then(|m| m.limit()).filter(|l| *l > 0);
    of_the_pod(spec, "memory").or(limit)
}

/// MiB of a VM whose containers may have so many bytes together, with a scratch disk that takes so many MiB of memory.
pub(crate) fn vm_memory_mib(limit: u64, scratch_mib: u64) -> u64 {
    let mib = limit.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB + scratch_mib);
    mib.min(1 << 20).next_multiple_of(2).max(LEAST_MEMORY_MIB)
}

/// The limits.
#[must_use]
pub fn resources(spec: &Spec) -> Option<&oci_spec::runtime::LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// How soon the container's processes end when memory is short, those of the host as those of the guest.
#[must_use]
pub fn oom_score_adj(spec: &Spec) -> Option<i32> {
    spec.process().as_ref()?.oom_score_adj()
}

fn vcpus(spec: &Spec) -> Result<u32, Error> {
    if let Some(text) = annotation(spec, VCPUS_ANNOTATION) {
        let wrong = || {
            Error::Bundle(format!(
                "annotation {VCPUS_ANNOTATION}={text} is not a number from 1 to {MOST_VCPUS}"
            ))
        };
        return text.parse().ok().filter(|n| (1..=MOST_VCPUS).contains(n)).ok_or_else(wrong);
    }
    let pod = of_the_pod(spec, "cpu-quota").map(|quota| quota_in(quota, of_the_pod(spec, "cpu-period")));
    let cpu = resources(spec).and_then(|r| r.cpu().as_ref());
    let set = || Some(count_cpus(cpu?.cpus().as_deref()?));
    Ok(pod.or_else(|| quota_vcpus(cpu?)).or_else(set).unwrap_or(1).clamp(1, MOST_VCPUS))
}

/// What containerd says with the sandbox that all its containers together may have. It writes 0 where the kubelet said nothing.
fn of_the_pod(spec: &Spec, what: &str) -> Option<i64> {
    let text = annotation(spec, &format!("io.kubernetes.cri.sandbox-{what}"))?;
    text.parse().ok().filter(|number| *number > 0)
}

/// Processors that a VM can have which boots with so many.
fn most_vcpus(spec: &Spec, boot: u32) -> Result<u32, Error> {
    let Some(text) = annotation(spec, MOST_VCPUS_ANNOTATION) else { return Ok(boot) };
    let tee = annotation(spec, "io.coffer.tee").unwrap_or("none");
    if tee != "none" {
        return Err(Error::Bundle(format!(
            "annotation {MOST_VCPUS_ANNOTATION}={text} with io.coffer.tee={tee}: a TEE measures how many processors the kernel starts; give all by io.coffer.vcpus"
        )));
    }
    let count = text.parse().ok().filter(|n| (boot..=MOST_VCPUS).contains(n));
    count.ok_or_else(|| {
        Error::Bundle(format!("annotation {MOST_VCPUS_ANNOTATION}={text} is not a number from {boot}, which the VM boots with, to {MOST_VCPUS}"))
    })
}

/// Processors that a quota is worth, rounded up.
pub(crate) fn quota_vcpus(cpu: &oci_spec::runtime::LinuxCpu) -> Option<u32> {
    let period = cpu.period().and_then(|period| i64::try_from(period).ok());
    Some(quota_in(cpu.quota().filter(|quota| *quota > 0)?, period))
}

/// The same of a quota that is one. Without a period it is the kernel's usual one.
fn quota_in(quota: i64, period: Option<i64>) -> u32 {
    let period = period.filter(|period| *period > 0).unwrap_or(100_000);
    u32::try_from(quota.unsigned_abs().div_ceil(period.unsigned_abs())).unwrap_or(u32::MAX)
}

/// Processors in a list such as `0-3,8`.
fn count_cpus(list: &str) -> u32 {
    let part = |text: &str| -> Option<u32> {
        match text.trim().split_once('-') {
            Some((first, last)) => last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1),
            None => text.trim().parse::<u32>().ok().map(|_| 1),
        }
    };
    list.split(',').filter_map(part).fold(0, u32::saturating_add)
}

/// The path of a namespace of this type: `None` when the list has no such entry, `Some(None)` for a new one.
#[must_use]
pub fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
    let list = spec.linux().as_ref()?.namespaces().as_ref()?;
    list.iter().find(|n| n.typ() == kind).map(|n| n.path().clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn config(extra: Value) -> Vec<u8> {
        let mut value = json!({
            "ociVersion": "1.0.2-dev",
            "root": { "path": "/merged" },
            "process": { "cwd": "/", "args": ["sh"], "user": { "uid": 0, "gid": 0 } },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/data", "type": "bind", "source": "/no/such/place", "options": ["rbind", "ro"] }
            ],
            "hooks": { "poststop": [{ "path": "/bin/true" }], "startContainer": [{ "path": "/bin/in" }] },
            "linux": { "cgroupsPath": "/x", "namespaces": [{ "type": "network", "path": "/run/netns/a" }] }
        });
        for (key, entry) in extra.as_object().unwrap() {
            value[key] = entry.clone();
        }
        serde_json::to_vec(&value).unwrap()
    }

    #[test]
    fn the_guest_gets_its_own_paths_and_nothing_of_the_hosts() {
        let plan = plan(Path::new("/b"), "c1", &config(json!({}))).unwrap();
        assert_eq!(plan.guest_spec["root"]["path"], "/run/coffer/share/c1/rootfs");
        assert_eq!(plan.guest_spec["mounts"][1]["source"], "/run/coffer/share/c1/mounts/1");
        assert_eq!(plan.guest_spec["mounts"][0]["source"], "proc");
        assert_eq!(plan.guest_spec["hooks"], json!({ "startContainer": [{ "path": "/bin/in" }] }));
        assert!(
            !plan.guest_spec.to_string().contains("/run/netns")
                && !plan.guest_spec.to_string().contains("/merged")
        );
        assert_eq!(plan.binds[0].source, Path::new("/merged"));
        assert_eq!(
            plan.binds[1],
            Bind {
                source: "/no/such/place".into(),
                target: "c1/mounts/1".into(),
                read_only: true,
                recursive: true
            }
        );
    }

    #[test]
    fn the_vm_is_sized_by_the_limits() {
        let sized = |resources: Value| {
            let plan =
                plan(Path::new("/b"), "c1", &config(json!({ "linux": { "resources": resources } }))).unwrap();
            (plan.memory_mib, plan.vcpus)
        };
        assert_eq!(sized(json!({})), (512, 1));
        assert_eq!(sized(json!({ "memory": { "limit": 268435456 } })), (320, 1));
        assert_eq!(
            sized(json!({ "memory": { "limit": -1 }, "cpu": { "quota": 150000, "period": 100000 } })),
            (512, 2)
        );
        assert_eq!(sized(json!({ "cpu": { "cpus": "0-2,5" } })), (512, 4));
    }

    #[test]
    fn the_vm_of_a_kubernetes_pod_is_sized_by_what_the_pod_has() {
        let sized = |annotations: Value| {
            // The sandbox's own container, which has next to nothing.
            let own = json!({ "memory": { "limit": 1 << 20 }, "cpu": { "quota": 2000, "period": 100000 } });
            let config = config(json!({ "annotations": annotations, "linux": { "resources": own } }));
            let plan = plan(Path::new("/b"), "c1", &config).unwrap();
            (plan.memory_mib, plan.vcpus)
        };
        let cri = |memory: &str, quota: &str, period: &str| {
            json!({ "io.kubernetes.cri.sandbox-memory": memory, "io.kubernetes.cri.sandbox-cpu-quota": quota,
                "io.kubernetes.cri.sandbox-cpu-period": period, "io.kubernetes.cri.sandbox-cpu-shares": "2" })
        };
        assert_eq!(sized(cri("1073741824", "250000", "100000")), (1024 + 64, 3));
        assert_eq!(sized(cri("1073741824", "250000", "50000")), (1024 + 64, 5));
        // A kubelet without limits, and what is no number.
        assert_eq!(sized(cri("0", "0", "100000")), (128, 1));
        assert_eq!(sized(cri("x", "-1", "")), (128, 1));
        let mut outright = cri("1073741824", "250000", "100000");
        outright["io.coffer.vcpus"] = json!("2");
        outright["io.coffer.memory-mib"] = json!("256");
        assert_eq!(sized(outright), (256, 2));
    }

    #[test]
    fn processors_that_wait_are_asked_for_and_come_with_no_tee() {
        let with = |annotations: Value| {
            let cpu = json!({ "resources": { "cpu": { "quota": 200000, "period": 100000 } } });
            let config = config(json!({ "annotations": annotations, "linux": cpu }));
            plan(Path::new("/b"), "c1", &config).map(|p| (p.vcpus, p.most_vcpus)).map_err(|e| e.to_string())
        };
        assert_eq!(with(json!({})), Ok((2, 2)));
        assert_eq!(with(json!({ "io.coffer.vcpus-max": "8" })), Ok((2, 8)));
        for wrong in ["1", "65", "x", ""] {
            assert!(with(json!({ "io.coffer.vcpus-max": wrong })).unwrap_err().contains("from 2, which"));
        }
        let tee = with(json!({ "io.coffer.vcpus-max": "8", "io.coffer.tee": "snp" })).unwrap_err();
        assert!(tee.contains("a TEE measures"), "{tee}");
    }

    #[test]
    fn what_a_scratch_disk_takes_of_memory_is_added_to_the_limit() {
        let with = json!({ "annotations": { "io.coffer.scratch": "2G" },
            "linux": { "resources": { "memory": { "limit": 268435456 } } } });
        let plan = plan(Path::new("/b"), "c1", &config(with)).unwrap();
        assert_eq!((plan.scratch, plan.memory_mib), (Some(2 << 30), 256 + 64 + 14));
    }

    #[test]
    fn name_servers_are_those_of_the_containers_own_file() {
        let dir = tempfile::tempdir().unwrap();
        let text =
            "# nameserver 9.9.9.9\nsearch a\nnameserver 10.88.0.1\nnameserver\tfd00::1\nnameserver x\n";
        std::fs::write(dir.path().join("resolv.conf"), text).unwrap();
        let mounts = json!([{ "destination": "/etc/resolv.conf", "type": "bind", "source": "resolv.conf", "options": ["bind"] }]);
        let plan = plan(dir.path(), "c1", &config(json!({ "mounts": mounts }))).unwrap();
        assert_eq!(plan.name_servers, ["10.88.0.1", "fd00::1"]);
    }

    #[test]
    fn the_vm_section_says_image_and_size() {
        let vm =
            json!({ "kernel": { "path": "/i/own.igvm" }, "hwConfig": { "vcpus": 3, "memory": 1 << 30 } });
        let plan = plan(Path::new("/b"), "c1", &config(json!({ "vm": vm }))).unwrap();
        assert_eq!((plan.memory_mib, plan.vcpus), (1024, 3));
        assert_eq!(plan.igvm.as_deref(), Some(Path::new("/i/own.igvm")));
        assert!(plan.guest_spec.get("vm").is_none());
    }

    #[test]
    fn a_bundle_without_root_or_program_is_named() {
        let message = |extra| plan(Path::new("/b"), "c", &config(extra)).unwrap_err().to_string();
        assert!(message(json!({ "root": null })).starts_with("bundle: config.json: no root"));
        assert!(
            message(json!({ "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": [] } }))
                .contains("process.args")
        );
        assert!(plan(Path::new("/b"), "c", b"{").unwrap_err().to_string().contains("config.json"));
    }

    #[test]
    fn shared_memory_is_the_guests_own_in_the_same_size() {
        let kind = nix::sys::statfs::statfs("/dev/shm").unwrap();
        if kind.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC {
            return;
        }
        let source = tempfile::tempdir_in("/dev/shm").unwrap();
        let kib = shared_memory(Path::new("/dev/shm"), source.path()).unwrap();
        assert_eq!(kib, kind.blocks() * kind.block_size() as u64 / 1024);
        assert_eq!(shared_memory(Path::new("/data"), source.path()), None);
        assert_eq!(shared_memory(Path::new("/dev/shm"), Path::new("/proc")), None);
    }

    #[test]
    fn annotations_of_the_command_line_are_for_who_has_none() {
        let given = [("io.coffer.tee".to_owned(), "snp".to_owned())];
        let read = |config: Value| -> Value {
            serde_json::from_slice(&annotate(config.to_string().into_bytes(), &given).unwrap()).unwrap()
        };
        let key = "io.coffer.tee";
        for without in [json!({}), json!({"annotations": null}), json!({"annotations": {"a": "b"}})] {
            assert_eq!(read(without)["annotations"][key], "snp");
        }
        assert_eq!(read(json!({"annotations": {(key): "none"}}))["annotations"], json!({(key): "none"}));
        for broken in ["[]", "{\"annotations\": 1}", "{"] {
            assert!(annotate(broken.into(), &given).is_err(), "{broken}");
        }
        // Nothing is given: not even read.
        assert_eq!(annotate(b"{".to_vec(), &[]).unwrap(), b"{");
    }

    proptest! {
        #[test]
        fn no_list_of_processors_makes_it_panic(text in "[0-9,-]{0,30}") {
            let _ = count_cpus(&text);
        }
    }
}
