//! What a configuration asks for and a VM cannot give: refused before anything is made, one line each.
//!
//! Owns: naming the field, the reason and, where there is one, the way round it. Does not own: what the guest checks
//! itself. Pure. A runtime that cannot apply a property must fail (OCI runtime specification, runtime.md, "Errors").

use std::{collections::BTreeSet, path::Path};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, LinuxSeccompAction, Process, Spec};
use serde_json::Value;

use crate::{commands::CAPABILITIES, error::Error, log, plan};

fn wrong(field: &str, why: &str) -> Error {
    Error::Bundle(format!("config.json: {field}: {why}"))
}

/// Checks a configuration; `value` is the same, for what the types leave out.
///
/// # Errors
/// [`Error::Bundle`], naming the field.
pub fn check(spec: &Spec, value: &Value) -> Result<(), Error> {
    version(spec.version())?;
    if let Some(process) = spec.process() {
        self::process(process)?;
    }
    hooks(value)?;
    mounts(spec)?;
    vm(value)?;
    names(spec)?;
    let Some(linux) = spec.linux() else { return Ok(()) };
    namespaces(spec)?;
    sysctls(spec)?;
    for (field, list) in
        [("linux.maskedPaths", linux.masked_paths()), ("linux.readonlyPaths", linux.readonly_paths())]
    {
        if let Some(path) = list.iter().flatten().find(|path| !path.starts_with('/')) {
            return Err(wrong(field, &format!("{path:?} is not absolute")));
        }
    }
    let offsets = linux.time_offsets().as_ref().is_some_and(|o| !o.is_empty());
    if offsets && plan::namespace(spec, LinuxNamespaceType::Time).is_none() {
        return Err(wrong("linux.timeOffsets", "they are a time namespace's, and there is none"));
    }
    if linux.intel_rdt().is_some() {
        return Err(wrong(
            "linux.intelRdt",
            "a VM has no share of the host's cache or memory bandwidth to set",
        ));
    }
    if linux.memory_policy().is_some() {
        return Err(wrong("linux.memoryPolicy", "a VM has one memory node"));
    }
    if linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()) {
        return Err(wrong("linux.netDevices", "a device of the host cannot be moved into a VM"));
    }
    if let Some(seccomp) = linux.seccomp() {
        let notify = LinuxSeccompAction::ScmpActNotify;
        let rules = seccomp.syscalls().iter().flatten();
        if seccomp.default_action() == notify
            || seccomp.listener_path().is_some()
            || rules.into_iter().any(|r| r.action() == notify)
        {
            let why = "SCMP_ACT_NOTIFY wants an agent that reads the process's memory, and a VM's cannot be read from the host";
            return Err(wrong("linux.seccomp", why));
        }
    }
    linux.resources().as_ref().map_or(Ok(()), |r| resources(r, "config.json: linux.resources"))
}

/// The pod's other containers, and its VM, have their own.
fn names(spec: &Spec) -> Result<(), Error> {
    for (field, name) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        let is_said = name.as_ref().is_some_and(|name| !name.is_empty());
        if is_said && plan::namespace(spec, LinuxNamespaceType::Uts).is_none() {
            return Err(wrong(field, &format!("unable to set {field} without a private UTS namespace")));
        }
    }
    Ok(())
}

/// What fields of their own set, and what is the VM's and not the container's: runc and crun refuse the same.
fn sysctls(spec: &Spec) -> Result<(), Error> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let has_ipc =
        linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::Ipc);
    for (name, value) in linux.sysctl().iter().flatten() {
        let why = match name.replace('/', ".").as_str() {
            "kernel.hostname" => "is the field hostname's to set",
            "kernel.domainname" if spec.domainname().as_ref().is_some_and(|field| field != value) => {
                "is not what the field domainname says"
            }
            plain if !has_ipc && IPC_SYSCTLS.iter().any(|ipc| plain.starts_with(ipc)) => {
                "is of an IPC namespace, and the container has none of its own"
            }
            // It becomes a path below /proc/sys: `..` would lead to another one than was looked at.
            plain if plain.split('.').any(str::is_empty) => {
                "contains an invalid path: names with one `.` or `/` between them are wanted"
            }
            _ => continue,
        };
        return Err(wrong("linux.sysctl", &format!("{name} {why}")));
    }
    Ok(())
}

/// Beginnings of the names that an IPC namespace has its own values for (ipc_namespaces(7)).
const IPC_SYSCTLS: [&str; 4] = ["kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."];

/// `MAJOR.MINOR.PATCH` of version 1, with or without more after a `-` or `+`.
fn version(text: &str) -> Result<(), Error> {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<Option<u32>> = core.split('.').map(|n| n.parse().ok()).collect();
    match numbers.as_slice() {
        [Some(1), Some(_), Some(_)] => Ok(()),
        _ => Err(Error::Bundle(format!("config.json: ociVersion {} is not 1.x.y", text.escape_debug()))),
    }
}

/// Checks a process, a container's first or one of `exec`.
///
/// # Errors
/// [`Error::Bundle`], naming the field.
pub fn process(process: &Process) -> Result<(), Error> {
    let limits: Vec<_> = process.rlimits().iter().flatten().map(|l| l.typ()).collect();
    if let Some((_, twice)) = limits.iter().enumerate().find(|(n, l)| limits[..*n].contains(l)) {
        return Err(wrong("process.rlimits", &format!("{twice} is there twice")));
    }
    let affinity = process.exec_cpu_affinity().as_ref();
    if affinity.is_some_and(|a| a.initial().is_some() || a.cpu_affinity_final().is_some()) {
        return Err(wrong("process.execCPUAffinity", "its processors are the host's, and a VM has its own"));
    }
    Ok(())
}

/// Leaves out capabilities whose names nobody knows: a newer engine may know more than this guest's kernel. Returns them, for a
/// warning (OCI runtime specification, config.md, "Linux Process").
pub fn known_capabilities(process: &mut Value) -> BTreeSet<String> {
    let mut unknown = BTreeSet::new();
    for list in process.get_mut("capabilities").and_then(Value::as_object_mut).into_iter().flatten() {
        if let Value::Array(names) = list.1 {
            names.retain(|name| {
                let name = name.as_str().unwrap_or_default();
                let short = name.strip_prefix("CAP_").unwrap_or(name);
                let known = CAPABILITIES.contains(&short.to_ascii_uppercase().as_str());
                if !known {
                    unknown.insert(name.to_owned());
                }
                known
            });
        }
    }
    unknown
}

/// The warning about them.
pub fn warn_of_unknown(capabilities: &BTreeSet<String>) {
    if !capabilities.is_empty() {
        let names: Vec<&str> = capabilities.iter().map(String::as_str).collect();
        log::warn(&format!("process.capabilities: {}: unknown, left out", names.join(", ").escape_debug()));
    }
}

fn hooks(value: &Value) -> Result<(), Error> {
    for (point, list) in value["hooks"].as_object().into_iter().flatten() {
        for path in list.as_array().into_iter().flatten().filter_map(|hook| hook["path"].as_str()) {
            if !path.starts_with('/') {
                return Err(wrong(&format!("hooks.{point}"), &format!("path {path:?} is not absolute")));
            }
        }
    }
    Ok(())
}

fn mounts(spec: &Spec) -> Result<(), Error> {
    for mount in spec.mounts().iter().flatten() {
        let word = |w: &String| matches!(w.split('=').next(), Some("idmap" | "ridmap"));
        let mapped = mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty())
            || mount.gid_mappings().as_ref().is_some_and(|m| !m.is_empty())
            || mount.options().iter().flatten().any(word);
        if mapped {
            let field = format!("mounts: {}", mount.destination().display());
            return Err(wrong(
                &field,
                "the share of a VM has no idmapped mounts: run without idmap and mappings",
            ));
        }
    }
    Ok(())
}

fn namespaces(spec: &Spec) -> Result<(), Error> {
    let list = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref()).unwrap_or_default();
    for (number, namespace) in list.iter().enumerate() {
        // The specification's word; the type's own is the kernel's.
        let word = serde_json::to_value(namespace.typ()).unwrap_or_default();
        let field = || format!("linux.namespaces: {}", word.as_str().unwrap_or_default());
        if list[..number].iter().any(|other| other.typ() == namespace.typ()) {
            return Err(wrong(&field(), "it is there twice"));
        }
        match (namespace.typ(), namespace.path()) {
            (LinuxNamespaceType::Time, Some(_)) => {
                return Err(wrong(&field(), "the host's clocks cannot be a VM's: run without a path"));
            }
            (LinuxNamespaceType::Mount, Some(_)) => {
                return Err(wrong(&field(), "the host's mounts cannot be a VM's: run without a path"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Checks limits, of a configuration or of `update`.
///
/// # Errors
/// [`Error::Bundle`], naming the field below `place`.
pub fn resources(resources: &LinuxResources, place: &str) -> Result<(), Error> {
    let wrong = |field: &str, why: &str| Err(Error::Bundle(format!("{place}.{field}: {why}")));
    let gone = "cgroup version 2, which guests have, knows nothing of it";
    if let Some(cpu) = resources.cpu()
        && (cpu.realtime_runtime().is_some_and(|v| v != 0) || cpu.realtime_period().is_some_and(|v| v != 0))
    {
        return wrong("cpu.realtimeRuntime", gone);
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|v| v != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        return wrong("network", gone);
    }
    if resources.rdma().as_ref().is_some_and(|r| !r.is_empty()) {
        return wrong("rdma", "a VM has no such device");
    }
    if let Some(io) = resources.block_io()
        && (io.weight_device().as_ref().is_some_and(|d| !d.is_empty())
            || io.leaf_weight().is_some_and(|w| w != 0))
    {
        return wrong(
            "blockIO",
            "weights of the host's devices cannot be set for a VM: set blockIO.weight alone",
        );
    }
    Ok(())
}

/// The `vm` section (config-vm.md): what of it a coffer guest can have. It boots from one IGVM file.
fn vm(value: &Value) -> Result<(), Error> {
    let Some(vm) = value.get("vm").filter(|vm| !vm.is_null()) else { return Ok(()) };
    let filled = |value: &Value| match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    };
    let path = vm["kernel"]["path"].as_str().unwrap_or_default();
    if !Path::new(path).is_absolute() {
        return Err(wrong("vm.kernel.path", "the absolute path of an IGVM image is wanted"));
    }
    for field in ["parameters", "initrd"] {
        if filled(&vm["kernel"][field]) {
            let why = "it is part of the IGVM image, which is measured: build one with coffer-image";
            return Err(wrong(&format!("vm.kernel.{field}"), why));
        }
    }
    if filled(&vm["image"]) {
        return Err(wrong(
            "vm.image",
            "the root file system is root.path, or the image of annotation io.coffer.image",
        ));
    }
    let program = vm["hypervisor"]["path"].as_str().map(Path::new);
    if program.is_some_and(|p| p.file_name() != Some("coffer-vmm".as_ref()))
        || filled(&vm["hypervisor"]["parameters"])
    {
        return Err(wrong(
            "vm.hypervisor",
            "it is coffer-vmm, whose parameters follow from the configuration",
        ));
    }
    for field in ["deviceTree", "dtdevs", "iomems", "irqs"] {
        if filled(&vm["hwConfig"][field]) {
            return Err(wrong(&format!("vm.hwConfig.{field}"), "the machine is fixed"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(path: &str, entry: Value) -> String {
        let mut value = json!({
            "ociVersion": "1.0.2-dev", "root": { "path": "rootfs" },
            "process": { "cwd": "/", "args": ["sh"], "user": { "uid": 0, "gid": 0 } }, "linux": { "resources": {} },
            "hooks": {}
        });
        let (parent, key) = path.rsplit_once('/').unwrap();
        value.pointer_mut(parent).unwrap()[key] = entry;
        let spec = serde_json::from_value(value.clone()).unwrap();
        check(&spec, &value).map_or_else(|e| e.to_string(), |()| "fine".into())
    }

    #[test]
    fn what_a_vm_cannot_give_is_refused_by_its_name() {
        let device = json!([{ "major": 8, "minor": 0, "weight": 500 }]);
        for (path, entry, name) in [
            ("/ociVersion", json!("1.0"), "ociVersion"),
            ("/ociVersion", json!("2.0.0"), "ociVersion 2.0.0 "),
            ("/hostname", json!("x"), "hostname: unable to set hostname without a private UTS namespace"),
            ("/domainname", json!("x"), "domainname: unable to set domainname without a private UTS"),
            ("/linux/intelRdt", json!({ "closID": "x" }), "linux.intelRdt"),
            ("/linux/timeOffsets", json!({ "monotonic": { "secs": 1, "nanosecs": 0 } }), "linux.timeOffsets"),
            (
                "/linux/namespaces",
                json!([{ "type": "time", "path": "/proc/1/ns/time" }]),
                "linux.namespaces: time",
            ),
            ("/linux/namespaces", json!([{ "type": "pid" }, { "type": "pid" }]), "linux.namespaces: pid"),
            ("/linux/namespaces", json!([{ "type": "mount", "path": "/x" }]), "linux.namespaces: mount"),
            ("/linux/sysctl", json!({ "kernel.hostname": "x" }), "linux.sysctl"),
            ("/linux/sysctl", json!({ "kernel.msgmax": "8192" }), "kernel.msgmax is of an IPC namespace"),
            ("/linux/sysctl", json!({ "net/../kernel/sysrq": "1" }), "sysrq contains an invalid path"),
            ("/linux/sysctl", json!({ "/net/ipv4/ip_forward": "1" }), "contains an invalid path"),
            ("/linux/sysctl", json!({ ".net.ipv4.ip_forward": "1" }), "contains an invalid path"),
            ("/linux/sysctl", json!({ "": "1" }), "contains an invalid path"),
            ("/linux/sysctl", json!({ "fs/mqueue/queues_max": "9" }), "fs/mqueue/queues_max is of an IPC"),
            ("/linux/netDevices", json!({ "eth0": { "name": "eth1" } }), "linux.netDevices"),
            ("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "linux.seccomp"),
            (
                "/linux/seccomp",
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{ "names": ["mount"], "action": "SCMP_ACT_NOTIFY" }] }),
                "linux.seccomp",
            ),
            ("/linux/resources/network", json!({ "classID": 1 }), "linux.resources.network"),
            ("/linux/resources/cpu", json!({ "realtimeRuntime": 1 }), "linux.resources.cpu"),
            ("/linux/resources/rdma", json!({ "mlx5": { "hcaHandles": 1 } }), "linux.resources.rdma"),
            ("/linux/resources/blockIO", json!({ "weightDevice": device }), "linux.resources.blockIO"),
            (
                "/mounts",
                json!([{ "destination": "/d", "type": "bind", "source": "/s", "options": ["rbind", "ridmap"] }]),
                "mounts: /d",
            ),
            ("/hooks/poststop", json!([{ "path": "relative" }]), "hooks.poststop"),
            ("/linux/maskedPaths", json!(["/proc/kcore", "../proc"]), "linux.maskedPaths"),
            ("/linux/readonlyPaths", json!([""]), "linux.readonlyPaths"),
            (
                "/process/rlimits",
                json!([{ "type": "RLIMIT_CPU", "soft": 1, "hard": 1 }, { "type": "RLIMIT_CPU", "soft": 2, "hard": 2 }]),
                "process.rlimits",
            ),
            ("/process/execCPUAffinity", json!({ "initial": "0" }), "process.execCPUAffinity"),
            ("/vm", json!({ "kernel": { "path": "vmlinuz" } }), "vm.kernel.path"),
            ("/vm", json!({ "kernel": { "path": "/k", "parameters": ["quiet"] } }), "vm.kernel.parameters"),
            (
                "/vm",
                json!({ "kernel": { "path": "/k" }, "image": { "path": "/i", "format": "raw" } }),
                "vm.image",
            ),
            (
                "/vm",
                json!({ "kernel": { "path": "/k" }, "hypervisor": { "path": "/usr/bin/qemu" } }),
                "vm.hypervisor",
            ),
        ] {
            let words = said(path, entry.clone());
            assert!(words.contains(name) && !words.contains('\n'), "{path} {entry}: {words}");
        }
    }

    #[test]
    fn unknown_capabilities_are_left_out() {
        let mut process =
            json!({ "capabilities": { "bounding": ["CAP_KILL", "CAP_NO_SUCH"], "ambient": [] } });
        known_capabilities(&mut process);
        assert_eq!(process, json!({ "capabilities": { "bounding": ["CAP_KILL"], "ambient": [] } }));
        let mut none = json!({});
        known_capabilities(&mut none);
        assert_eq!(none, json!({}));
    }

    #[test]
    fn a_domain_name_is_said_once_or_twice_the_same() {
        let of = |field: &str, sysctl: &str| {
            let value = json!({
                "ociVersion": "1.0.2", "domainname": field,
                "linux": { "sysctl": { "kernel.domainname": sysctl }, "namespaces": [{ "type": "uts" }] }
            });
            check(&serde_json::from_value(value.clone()).unwrap(), &value)
        };
        of("same", "same").unwrap();
        assert!(of("one", "other").unwrap_err().to_string().contains("kernel.domainname"));
    }

    #[test]
    fn what_asks_for_nothing_is_fine() {
        for (path, entry) in [
            ("/ociVersion", json!("1.3.0")),
            ("/hostname", json!("")),
            ("/linux/timeOffsets", json!({})),
            ("/linux/namespaces", json!([{ "type": "time" }])),
            ("/linux/netDevices", json!({})),
            ("/linux/resources/network", json!({ "priorities": [] })),
            ("/linux/resources/cpu", json!({ "realtimeRuntime": 0, "realtimePeriod": 0 })),
            ("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_ALLOW" })),
            ("/process/rlimits", json!([{ "type": "RLIMIT_CPU", "soft": 1, "hard": 1 }])),
            ("/vm", json!({ "kernel": { "path": "/k.igvm", "parameters": [] }, "hwConfig": { "vcpus": 2 } })),
        ] {
            assert_eq!(said(path, entry.clone()), "fine", "{path} {entry}");
        }
    }
}
