//! The pod's network on the host's side: what its namespace has, and a tap for each interface of it.
//!
//! Owns: reading the namespace. Does not own: its taps (`tap`), the guest's side.
//!
//! `ip` and `tc` of iproute2 do the work: every host with podman and a bridge network has them, and their JSON is a
//! stable interface.

mod tap;

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

use coffer_protocol::{Interface, Neighbour, Network, Route};
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

pub(crate) use self::tap::open_tap;
pub use self::tap::{Tap, glance, tie, untie};
use crate::error::{Error, host};

/// A network namespace that was looked at.
#[derive(Debug)]
pub struct Seen {
    /// Interfaces, routes and neighbours, as the guest is to have them.
    pub network: Network,
    /// The number that the kernel knows each interface by.
    indices: Vec<u32>,
    /// Names of taps.
    taps: Vec<String>,
}

const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Runs a program of iproute2 in this process's network namespace. The environment may be empty.
fn run(program: &str, arguments: &[&str], input: &str) -> Result<Vec<u8>, Error> {
    let path = DIRECTORIES.iter().map(|d| Path::new(d).join(program)).find(|p| p.exists());
    let path =
        path.ok_or_else(|| Error::State(format!("{program} is not installed: apt-get install iproute2")))?;
    let failed = || host(format!("run {program}"));
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed())?;
    // Some words, which fit a pipe; one that does not read them says why.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(failed())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Error::State(format!("{program} {}: {}", arguments.join(" "), words.trim().replace('\n', "; "))))
}

/// What `ip` lists: the entries of all its arrays.
fn list(arguments: &[&str], input: &str) -> Result<Vec<Value>, Error> {
    let bytes = run("ip", arguments, input)?;
    let mut entries = Vec::new();
    for array in serde_json::Deserializer::from_slice(&bytes).into_iter::<Vec<Value>>() {
        entries.extend(array.map_err(|e| Error::State(format!("ip {}: {e}", arguments.join(" "))))?);
    }
    Ok(entries)
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// What this process's network namespace has, as the guest is to have it.
///
/// # Errors
/// When `ip` fails.
pub fn look() -> Result<Seen, Error> {
    // One process for what needs no family of its own; each entry says by its fields what it is.
    let entries = list(&["-j", "-b", "-"], "addr show\nroute show\nneigh show nud permanent\n")?;
    Ok(seen(&entries, &list(&["-j", "-6", "route", "show"], "")?))
}

fn seen(entries: &[Value], routes_v6: &[Value]) -> Seen {
    let (links, others): (Vec<&Value>, Vec<&Value>) = entries.iter().partition(|e| e["ifname"].is_string());
    let (neighbours, routes_v4): (Vec<&Value>, Vec<&Value>) =
        others.into_iter().partition(|e| e["lladdr"].is_string());
    let (interfaces, indices): (Vec<Interface>, Vec<u32>) =
        links.iter().filter_map(|entry| interface(entry)).unzip();
    let mut routes = routes(routes_v4, false, &interfaces);
    routes.extend(self::routes(routes_v6.iter().collect(), true, &interfaces));
    // What is on the link first: a gateway must be reachable before it is named.
    routes.sort_by_key(|r| r.gateway.is_some());
    let neighbours = neighbours.into_iter().filter_map(|entry| neighbour(entry, &interfaces)).collect();
    let taps = links.iter().filter_map(|entry| text(&entry["ifname"])).filter(|name| is_ours(name)).collect();
    Seen { network: Network { interfaces, routes, neighbours }, indices, taps }
}

/// An interface that the guest is to have, and its number.
fn interface(entry: &Value) -> Option<(Interface, u32)> {
    if entry["link_type"] != "ether" || entry["ifname"].as_str().is_none_or(is_ours) {
        return None;
    }
    let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
    let addresses = entry["addr_info"].as_array().into_iter().flatten().filter(|a| a["scope"] != "link");
    let interface = Interface {
        name: text(&entry["ifname"])?,
        mac: text(&entry["address"])?,
        mtu: number(&entry["mtu"])?,
        addresses: addresses
            .filter_map(|a| Some(format!("{}/{}", a["local"].as_str()?, a["prefixlen"])))
            .collect(),
    };
    Some((interface, number(&entry["ifindex"])?))
}

/// An entry that stays: what the kernel learns itself, the guest's does too.
fn neighbour(entry: &Value, interfaces: &[Interface]) -> Option<Neighbour> {
    let interface = text(&entry["dev"]).filter(|name| interfaces.iter().any(|i| i.name == *name))?;
    Some(Neighbour { interface, address: text(&entry["dst"])?, mac: text(&entry["lladdr"])? })
}

/// Taps, this one's or those of another VM.
fn is_ours(name: &str) -> bool {
    name.starts_with("coffer")
}

fn routes(entries: Vec<&Value>, ipv6: bool, interfaces: &[Interface]) -> Vec<Route> {
    entries
        .into_iter()
        // Of several next hops the first: the others share the load, and lead to the same place.
        .map(|e| (e, e["nexthops"].get(0).unwrap_or(e)))
        .filter(|(_, hop)| interfaces.iter().any(|i| hop["dev"] == i.name.as_str()))
        .filter(|(e, _)| {
            !ipv6 || !e["dst"].as_str().is_some_and(|d| d.starts_with("fe80:") || d.starts_with("ff"))
        })
        // The kernel of the guest makes these itself from the addresses.
        .filter(|(e, _)| e["protocol"] != "kernel")
        .filter_map(|(e, hop)| {
            let destination = text(&e["dst"])?;
            let length = if ipv6 { 128 } else { 32 };
            let destination = match destination.as_str() {
                "default" => None,
                whole if whole.contains('/') => Some(whole.to_owned()),
                single => Some(format!("{single}/{length}")),
            };
            Some(Route {
                interface: text(&hop["dev"])?,
                destination,
                // `via`: of the other family.
                gateway: text(&hop["gateway"]).or_else(|| text(&hop["via"]["host"])),
                source: text(&e["prefsrc"]),
                metric: e["metric"].as_u64().and_then(|m| u32::try_from(m).ok()),
                ipv6,
                on_link: hop["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == "onlink")),
            })
        })
        .collect()
}

/// Whether a network namespace is the one that this process, and so the host's or its caller's network, is in.
pub fn is_own(namespace: &Path) -> bool {
    let number = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    number(namespace).is_some_and(|given| number(Path::new("/proc/self/ns/net")) == Some(given))
}

/// Waits until nobody else ties interfaces of a namespace or tells its VM of them; others wait until this is dropped. Of two containers of one pod
/// that start at one moment the second finds what the first has done.
///
/// # Errors
/// The system's.
pub fn turn(namespace: &Path) -> Result<Flock<fs::File>, Error> {
    let file = fs::File::open(namespace);
    let file = file.map_err(host(format!("open network namespace {}", namespace.display())))?;
    let wait = "wait for others that change the network";
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| host(wait)(e))
}

/// Runs something in another network namespace; afterwards this process, which has one thread, is back in its own.
///
/// # Errors
/// The system's, or what the work gave.
pub fn inside<T>(namespace: &Path, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    use nix::sched::{CloneFlags, setns};
    let home = fs::File::open("/proc/self/ns/net").map_err(host("open this network namespace"))?;
    let other =
        fs::File::open(namespace).map_err(host(format!("open network namespace {}", namespace.display())))?;
    setns(&other, CloneFlags::CLONE_NEWNET)
        .map_err(host(format!("enter network namespace {}", namespace.display())))?;
    let result = work();
    setns(&home, CloneFlags::CLONE_NEWNET).map_err(host("leave the pod's network namespace"))?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_ip_shows_becomes_the_guests_network() {
        let entries = [
            json!({ "ifindex": 1, "ifname": "lo", "link_type": "loopback", "address": "00:00:00:00:00:00", "mtu": 65536, "addr_info": [] }),
            json!({ "ifindex": 9, "ifname": "coffer2", "link_type": "ether", "address": "aa:bb:cc:00:00:01", "mtu": 1500, "addr_info": [] }),
            json!({ "ifindex": 2, "ifname": "eth0", "link_type": "ether", "address": "aa:bb:cc:dd:ee:ff", "mtu": 1450, "addr_info": [
                { "local": "10.88.0.2", "prefixlen": 16, "scope": "global" },
                { "local": "fe80::1", "prefixlen": 64, "scope": "link" }
            ] }),
            json!({ "ifindex": 26, "ifname": "late", "link_type": "ether", "address": "aa:bb:cc:dd:ee:01", "mtu": 1500, "addr_info": [] }),
            json!({ "dst": "default", "gateway": "10.88.0.1", "dev": "eth0", "flags": [] }),
            json!({ "dst": "10.88.0.0/16", "dev": "eth0", "protocol": "kernel", "prefsrc": "10.88.0.2" }),
            json!({ "dst": "10.99.0.0/16", "gateway": "10.77.7.7", "dev": "eth0", "flags": ["onlink"] }),
            json!({ "dst": "10.97.0.0/16", "via": { "family": "inet6", "host": "fd77::1" }, "dev": "eth0", "metric": 7, "flags": [] }),
            json!({ "dst": "10.96.0.0/16", "flags": [], "nexthops": [
                { "gateway": "10.88.0.3", "dev": "eth0", "weight": 2, "flags": ["onlink"] },
                { "gateway": "10.88.0.4", "dev": "eth0", "weight": 1, "flags": [] }
            ] }),
            json!({ "dst": "1.2.3.4", "dev": "other0" }),
            json!({ "dst": "10.88.0.1", "dev": "eth0", "lladdr": "aa:bb:cc:00:00:02", "state": ["PERMANENT"] }),
            json!({ "dst": "10.88.0.1", "dev": "other0", "lladdr": "aa:bb:cc:00:00:02", "state": ["PERMANENT"] }),
        ];
        let seen = seen(&entries, &[json!({ "dst": "fd00::/8", "dev": "late" })]);
        let Network { interfaces, routes, neighbours } = &seen.network;
        assert_eq!(interfaces.len(), 2);
        assert_eq!(
            (interfaces[0].name.as_str(), interfaces[0].mtu, &interfaces[0].addresses),
            ("eth0", 1450, &vec!["10.88.0.2/16".to_owned()])
        );
        let routes: Vec<_> =
            routes.iter().map(|r| (r.destination.as_deref(), r.gateway.as_deref(), r.on_link)).collect();
        let by_gateway = [
            (None, Some("10.88.0.1"), false),
            (Some("10.99.0.0/16"), Some("10.77.7.7"), true),
            (Some("10.97.0.0/16"), Some("fd77::1"), false),
            (Some("10.96.0.0/16"), Some("10.88.0.3"), true),
        ];
        assert_eq!((routes[0], &routes[1..]), ((Some("fd00::/8"), None, false), &by_gateway[..]));
        let mac = "aa:bb:cc:00:00:02".into();
        let wanted = Neighbour { interface: "eth0".into(), address: "10.88.0.1".into(), mac };
        assert_eq!(neighbours, &[wanted]);
        let untied: Vec<_> =
            seen.untied().map(|(interface, number)| (interface.name.as_str(), number)).collect();
        assert_eq!(untied, [("late", 26)]);
    }
}
