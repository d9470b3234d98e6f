//! Scopes of systemd (`--systemd-cgroup`): a container's cgroup that systemd makes, below a slice of its.
//!
//! Owns: the three-part form of `linux.cgroupsPath`, the conversation with systemd over the system's bus. Does not own: limits in
//! the cgroup's files, which `cgroup` sets: the scope is delegated.

mod annotations;
mod message;

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::{linux::net::SocketAddrExt, unix::net::SocketAddr, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use message::{FIXED, Kind, Message, Method, Reader, Value, Writer};
use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::{cgroup, error::Error, log, plan};

const BUS: &str = "/run/dbus/system_bus_socket";
/// How long systemd may take for a scope.
const LIMIT: Duration = Duration::from_secs(25);
/// Most messages that are not for us, before the one that is.
const MOST_NEWS: usize = 10_000;

/// A scope and where its cgroup is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// Such as `libpod-0123.scope`.
    pub unit: String,
    /// Such as `machine.slice`.
    pub slice: String,
}

fn failed(what: &str, why: impl std::fmt::Display) -> Error {
    Error::State(format!(
        "--systemd-cgroup: {what}: {why}: where systemd does not run, use podman --cgroup-manager=cgroupfs, or SystemdCgroup = false of containerd"
    ))
}

impl Scope {
    /// The scope of a configuration.
    ///
    /// # Errors
    /// As [`Self::parse`]; [`Error::State`] on a host whose hierarchy is not of version 2 alone.
    pub fn of(spec: &Spec, id: &str) -> Result<Self, Error> {
        let path = spec.linux().as_ref().and_then(|l| l.cgroups_path().as_ref());
        let scope = Self::parse(path.and_then(|p| p.to_str()), id)?;
        if !cgroup::is_unified() {
            return Err(failed("this host's cgroups", "they are not of version 2 alone"));
        }
        Ok(scope)
    }

    /// Reads `SLICE:PREFIX:NAME`; without a path, a scope of the system's slice.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it has another form.
    pub fn parse(path: Option<&str>, id: &str) -> Result<Self, Error> {
        let path = path.filter(|p| !p.is_empty());
        let fallback = format!("system.slice:coffer:{id}");
        let text = path.unwrap_or(&fallback);
        let wrong = |why: &str| {
            Error::Bundle(format!(
                "config.json: linux.cgroupsPath {text:?}: with --systemd-cgroup it is SLICE:PREFIX:NAME{why}"
            ))
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [slice, prefix, name] = parts.as_slice() else { return Err(wrong("")) };
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let unit = match prefix {
            _ if name.ends_with(".slice") => return Err(wrong(", of which a container's is not a slice")),
            &"" => format!("{name}.scope"),
            _ => format!("{prefix}-{name}.scope"),
        };
        let good = |c: char| c.is_ascii_alphanumeric() || "_.-@\\+:".contains(c);
        let plain = |text: &str| text.len() < 256 && !text.starts_with('.') && text.chars().all(good);
        if name.is_empty() || !plain(&unit) || !plain(slice) || slices(slice).is_none() {
            return Err(wrong(", in names that systemd takes"));
        }
        Ok(Self { unit, slice: slice.to_owned() })
    }

    /// Its cgroup's directory.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(cgroup::ROOT).join(slices(&self.slice).unwrap_or_default()).join(&self.unit)
    }

    /// Has systemd make it, with a process in it: without one there is none. Limits are as [`cgroup::settings`] has them.
    ///
    /// # Errors
    /// [`Error::State`] in systemd's words.
    pub fn start(&self, pid: i32, id: &str, spec: &Spec, guest_mib: Option<u64>) -> Result<(), Error> {
        let begin = self.begin(pid, id, spec, guest_mib)?;
        let mut bus = Bus::system()?;
        let rule = "type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved',path='/org/freedesktop/systemd1'";
        bus.ask(&ADD_MATCH, |w| w.string(rule))?;
        bus.ask(&SUBSCRIBE, |_| {})?;
        let answer = bus.ask(&START, begin)?;
        let job = text(&answer, "o", 1)?;
        loop {
            let news = bus.news()?;
            if news.member.as_deref() != Some("JobRemoved") {
                continue;
            }
            // id, job, unit, result
            let mut body = Reader::new(&news.body);
            let read = |e| failed("systemd's answer", e);
            let _ = body.u32().map_err(read)?;
            if body.string().map_err(read)? != job {
                continue;
            }
            let _ = body.string().map_err(read)?;
            return match body.string().map_err(read)? {
                "done" => Ok(()),
                other => Err(failed(&format!("systemd starts {}", self.unit), other)),
            };
        }
    }

    /// What systemd is asked for a scope with.
    fn begin(
        &self,
        pid: i32,
        id: &str,
        spec: &Spec,
        guest_mib: Option<u64>,
    ) -> Result<impl FnOnce(&mut Writer), Error> {
        let none = HashMap::new();
        let (named, others) = annotations::properties(spec.annotations().as_ref().unwrap_or(&none))?;
        for name in others {
            log::warn(&format!("annotation org.systemd.property.{name}: it is left out"));
        }
        let mut properties = vec![
            ("Description", Value::Text(format!("coffer container {id}"))),
            ("Slice", Value::Text(self.slice.clone())),
            ("PIDs", Value::Numbers(vec![pid as u32])),
            ("Delegate", Value::Switch(true)),
            ("DefaultDependencies", Value::Switch(false)),
        ];
        let accounts = ["CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting"];
        properties.extend(accounts.map(|name| (name, Value::Switch(true))));
        properties.extend(plan::resources(spec).map(|r| limits(r, "", guest_mib)).unwrap_or_default());
        properties.extend(named);
        Ok(move |w: &mut Writer| {
            w.string(&self.unit);
            w.string("replace");
            w.properties(&properties);
            w.array(8, |_| {});
        })
    }

    /// Tells systemd of changed limits, which it would undo otherwise when it sets its own again.
    ///
    /// # Errors
    /// [`Error::State`] in systemd's words.
    pub fn update(&self, resources: &LinuxResources, guest_mib: Option<u64>) -> Result<(), Error> {
        let limits = limits(resources, &cgroup::bandwidth(&self.path()), guest_mib);
        if limits.is_empty() {
            return Ok(());
        }
        let change = |w: &mut Writer| {
            w.string(&self.unit);
            // Until the scope ends.
            w.u32(1);
            w.properties(&limits);
        };
        Bus::system()?.ask(&SET_PROPERTIES, change).map(drop)
    }

    /// Has systemd forget it. One that has gone by itself is as well.
    pub fn stop(&self) {
        let stop = |method: &Method, mode: Option<&str>| {
            Bus::system()?.ask(method, |w| {
                w.string(&self.unit);
                mode.into_iter().for_each(|mode| w.string(mode));
            })
        };
        let _ = stop(&STOP, Some("replace"));
        let _ = stop(&RESET, None);
    }
}

/// The directories of a slice: each dash is a level (systemd.slice(5)). `None` when it is no slice.
fn slices(name: &str) -> Option<PathBuf> {
    let stem = name.strip_suffix(".slice")?;
    if stem == "-" {
        return Some(PathBuf::new());
    }
    let (mut path, mut so_far) = (PathBuf::new(), String::new());
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        so_far += part;
        path.push(format!("{so_far}.slice"));
        so_far.push('-');
    }
    Some(path)
}

/// Limits as systemd's properties: those that it would otherwise reset.
fn limits(resources: &LinuxResources, now: &str, guest_mib: Option<u64>) -> Vec<(&'static str, Value)> {
    let mut list = Vec::new();
    for (file, value) in cgroup::settings(resources, now, guest_mib) {
        match file {
            "memory.max" => list.push(("MemoryMax", Value::Number(value.parse().unwrap_or(u64::MAX)))),
            "memory.low" => list.push(("MemoryLow", Value::Number(value.parse().unwrap_or(u64::MAX)))),
            // A number with a unit is the kernel's to read, and its file has it.
            "memory.swap.max" if value == "max" => list.push(("MemorySwapMax", Value::Number(u64::MAX))),
            "memory.swap.max" => {
                list.extend(value.parse().map(|most| ("MemorySwapMax", Value::Number(most))))
            }
            "pids.max" => list.push(("TasksMax", Value::Number(value.parse().unwrap_or(u64::MAX)))),
            "io.weight" => list.push(("IOWeight", Value::Number(value.parse().unwrap_or(100)))),
            "cpu.weight" => list.push(("CPUWeight", Value::Number(value.parse().unwrap_or(100)))),
            "cpu.max" => {
                let mut words = value.split(' ').map(|word| word.parse::<u64>().ok());
                let (quota, period) = (words.next().flatten(), words.next().flatten().unwrap_or(100_000));
                let second = quota.map_or(u64::MAX, |q| q.saturating_mul(1_000_000).div_ceil(period.max(1)));
                list.push(("CPUQuotaPerSecUSec", Value::Number(second)));
                list.push(("CPUQuotaPeriodUSec", Value::Number(period)));
            }
            _ => {}
        }
    }
    list
}

const fn manager(member: &'static str, signature: &'static str) -> Method {
    Method {
        destination: "org.freedesktop.systemd1",
        path: "/org/freedesktop/systemd1",
        interface: "org.freedesktop.systemd1.Manager",
        member,
        signature,
    }
}

const fn driver(member: &'static str, signature: &'static str) -> Method {
    Method {
        destination: "org.freedesktop.DBus",
        path: "/org/freedesktop/DBus",
        interface: "org.freedesktop.DBus",
        member,
        signature,
    }
}

const HELLO: Method = driver("Hello", "");
const ADD_MATCH: Method = driver("AddMatch", "s");
const SUBSCRIBE: Method = manager("Subscribe", "");
const START: Method = manager("StartTransientUnit", "ssa(sv)a(sa(sv))");
const SET_PROPERTIES: Method = manager("SetUnitProperties", "sba(sv)");
const STOP: Method = manager("StopUnit", "ss");
const RESET: Method = manager("ResetFailedUnit", "s");

/// A connection to the bus.
struct Bus {
    stream: UnixStream,
    serial: u32,
    /// What came while an answer was waited for.
    news: Vec<Message>,
}

impl Bus {
    /// The system's: engines call without an environment, so the usual place it is, unless the variable says another.
    fn system() -> Result<Self, Error> {
        let named = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_default();
        let find =
            |key: &str| named.strip_prefix("unix:")?.split(',').find_map(|part| part.strip_prefix(key));
        let stream = match (find("path="), find("abstract=")) {
            (None, Some(name)) => {
                SocketAddr::from_abstract_name(name).and_then(|a| UnixStream::connect_addr(&a))
            }
            (path, _) => UnixStream::connect(path.unwrap_or(BUS)),
        };
        Self::greet(stream.map_err(|e| failed("connect to the system's bus", e))?)
    }

    /// Says who this is (D-Bus specification, "Authentication Protocol"), and takes a name.
    fn greet(stream: UnixStream) -> Result<Self, Error> {
        let io = |e: std::io::Error| failed("talk to the system's bus", e);
        stream.set_read_timeout(Some(LIMIT)).map_err(io)?;
        stream.set_write_timeout(Some(LIMIT)).map_err(io)?;
        let mut bus = Self { stream, serial: 0, news: Vec::new() };
        let user: String = nix::unistd::geteuid().to_string().bytes().map(|b| format!("{b:02x}")).collect();
        bus.stream.write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes()).map_err(io)?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") && line.len() < 1024 {
            let mut byte = [0];
            bus.stream.read_exact(&mut byte).map_err(io)?;
            line.push(byte[0]);
        }
        if !line.starts_with(b"OK ") {
            return Err(failed("the system's bus", "it does not take this user"));
        }
        bus.stream.write_all(b"BEGIN\r\n").map_err(io)?;
        bus.ask(&HELLO, |_| {})?;
        Ok(bus)
    }

    /// Calls and waits for the answer.
    fn ask(&mut self, method: &Method, fill: impl FnOnce(&mut Writer)) -> Result<Message, Error> {
        let io = |e: std::io::Error| failed("talk to the system's bus", e);
        self.serial += 1;
        let mut body = Writer::default();
        fill(&mut body);
        self.stream.write_all(&message::call(method, self.serial, body)).map_err(io)?;
        for _ in 0..MOST_NEWS {
            let message = self.receive()?;
            match message.kind {
                Kind::Return if message.answers == Some(self.serial) => return Ok(message),
                Kind::Error if message.answers == Some(self.serial) => {
                    let words = text(&message, "s", 0).unwrap_or_default();
                    let name = message.error.unwrap_or_default();
                    return Err(failed(method.member, format!("{name}: {words}")));
                }
                Kind::Signal => self.news.push(message),
                _ => {}
            }
        }
        Err(failed(method.member, "no answer among much other news"))
    }

    /// The next signal.
    fn news(&mut self) -> Result<Message, Error> {
        if !self.news.is_empty() {
            return Ok(self.news.remove(0));
        }
        loop {
            let message = self.receive()?;
            if message.kind == Kind::Signal {
                return Ok(message);
            }
        }
    }

    fn receive(&mut self) -> Result<Message, Error> {
        let io = |e: std::io::Error| failed("hear from the system's bus", e);
        let wrong = |e: message::MessageError| failed("hear from the system's bus", e);
        let mut fixed = [0; FIXED];
        self.stream.read_exact(&mut fixed).map_err(io)?;
        let mut whole = vec![0; message::length(&fixed).map_err(wrong)?];
        whole[..FIXED].copy_from_slice(&fixed);
        self.stream.read_exact(&mut whole[FIXED..]).map_err(io)?;
        message::read(&whole).map_err(wrong)
    }
}

/// The first argument of an answer, when its types begin so.
fn text(message: &Message, kind: &str, least: usize) -> Result<String, Error> {
    let wrong = |e: &dyn std::fmt::Display| failed("systemd's answer", e);
    if !message.signature.starts_with(kind) || message.body.len() < least {
        return Err(wrong(&"it has other arguments than expected"));
    }
    Reader::new(&message.body).string().map(str::to_owned).map_err(|e| wrong(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn podmans_and_containerds_paths_lead_where_systemd_puts_them() {
        for (path, wanted) in [
            (Some("machine.slice:libpod:0123"), "machine.slice/libpod-0123.scope"),
            (
                Some("machine-libpod_pod_ab.slice:libpod:0123"),
                "machine.slice/machine-libpod_pod_ab.slice/libpod-0123.scope",
            ),
            (Some("user-1000.slice:libpod:a"), "user.slice/user-1000.slice/libpod-a.scope"),
            (
                Some("kubepods-burstable-podx.slice:cri-containerd:b"),
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/cri-containerd-b.scope",
            ),
            (Some(":docker:c"), "system.slice/docker-c.scope"),
            (Some("-.slice::d"), "d.scope"),
            (None, "system.slice/coffer-id.scope"),
        ] {
            let scope = Scope::parse(path, "id").unwrap();
            assert_eq!(scope.path(), Path::new(cgroup::ROOT).join(wanted));
        }
    }

    #[test]
    fn what_is_no_scope_is_named() {
        let wrongs = [
            "/libpod_parent/x",
            "a:b",
            "machine.slice:libpod:",
            "machine:libpod:x",
            "a--b.slice:p:x",
            "a.slice:p:x/y",
            "a.slice:p:../x",
            "a.slice::x.slice",
        ];
        for wrong in wrongs {
            let message = Scope::parse(Some(wrong), "id").unwrap_err().to_string();
            assert!(
                message.contains(&format!("linux.cgroupsPath {wrong:?}: with --systemd-cgroup")),
                "{message}"
            );
        }
    }

    #[test]
    fn limits_are_systemds_too() {
        let limits = |value| limits(&serde_json::from_value(value).unwrap(), "", Some(164 + 112));
        let memory = serde_json::json!({ "memory": { "limit": 100 << 20 } });
        assert_eq!(limits(memory), [("MemoryMax", Value::Number((100 + 192 + 112) << 20))]);
        let with = serde_json::json!({ "memory": { "limit": -1 }, "cpu": { "shares": 1024, "quota": 50_000, "period": 200_000 },
            "pids": { "limit": -1 }, "blockIO": { "weight": 1000 } });
        assert_eq!(
            limits(with),
            [
                ("MemoryMax", Value::Number(u64::MAX)),
                ("MemorySwapMax", Value::Number(u64::MAX)),
                ("TasksMax", Value::Number(u64::MAX)),
                ("IOWeight", Value::Number(10_000)),
                ("CPUWeight", Value::Number(39)),
                ("CPUQuotaPerSecUSec", Value::Number(250_000)),
                ("CPUQuotaPeriodUSec", Value::Number(200_000)),
            ]
        );
        let swap = |most: &str| limits(serde_json::json!({ "unified": { "memory.swap.max": most } }));
        assert_eq!(swap("7"), [("MemorySwapMax", Value::Number(7))]);
        assert_eq!(swap("1G"), []);
    }

    #[test]
    fn a_scope_has_the_properties_that_annotations_name() {
        let spec: Spec = serde_json::from_value(serde_json::json!({ "ociVersion": "1.0.2", "annotations": {
            "org.systemd.property.TimeoutStopUSec": "uint64 5000000", "org.systemd.property.KillSignal": "int32 37",
            "org.systemd.property.CollectMode": "'inactive-or-failed'", "org.systemd.property.After": "['x.service']",
        } }))
        .unwrap();
        let scope = Scope::parse(Some(":p:c"), "c").unwrap();
        let mut body = Writer::default();
        scope.begin(4711, "c", &spec, None).unwrap()(&mut body);
        let bytes = message::call(&START, 3, body);
        let has = |words: &[u8]| bytes.windows(words.len()).any(|window| window == words);
        // Name, type, value, each where its type has it begin.
        assert!(has(b"\x0b\0\0\0CollectMode\0\x01s\0\0\x12\0\0\0inactive-or-failed\0"), "{bytes:x?}");
        assert!(has(b"\x0a\0\0\0KillSignal\0\x01i\0\0\0\x25\0\0\0"), "{bytes:x?}");
        assert!(has(b"\x0f\0\0\0TimeoutStopUSec\0\x01t\0"), "{bytes:x?}");
        assert!(has(&5_000_000_u64.to_le_bytes()) && !has(b"After"), "{bytes:x?}");
    }

    proptest! {
        #[test]
        fn no_path_leads_out_of_the_hierarchy(text in "[a-z.:/-]{0,40}") {
            if let Ok(scope) = Scope::parse(Some(&text), "id") {
                let path = scope.path();
                prop_assert!(path.starts_with(cgroup::ROOT));
                prop_assert!(path.components().all(|c| !matches!(c, std::path::Component::ParentDir)));
            }
        }
    }
}
