//! The pod's network on the host's side: what its namespace has, and a tap for each interface of it.
//!
//! Owns: reading the namespace, taps, and sending what arrives on one to the other. Does not own: the guest's side.
//!
//! `ip` and `tc` of iproute2 do the work: every host with podman and a bridge network has them, and their JSON is a
//! stable interface.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    process::Command,
};

use coffer_protocol::{Interface, Network, Route};
use serde_json::Value;

use crate::error::{Error, host};

/// A tap device for one interface of the guest.
#[derive(Debug)]
pub struct Tap {
    /// To read and write packets.
    pub fd: OwnedFd,
    /// The guest's address.
    pub mac: String,
}

const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Runs a program of iproute2 in this process's network namespace. The environment may be empty.
fn run(program: &str, arguments: &[&str]) -> Result<Vec<u8>, Error> {
    let path = DIRECTORIES.iter().map(|d| Path::new(d).join(program)).find(|p| p.exists());
    let path =
        path.ok_or_else(|| Error::State(format!("{program} is not installed: apt-get install iproute2")))?;
    let output = Command::new(path).args(arguments).output().map_err(host(format!("run {program}")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Error::State(format!("{program} {}: {}", arguments.join(" "), words.trim().replace('\n', "; "))))
}

fn list(arguments: &[&str]) -> Result<Vec<Value>, Error> {
    let bytes = run("ip", arguments)?;
    if bytes.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&bytes).map_err(|e| Error::State(format!("ip {}: {e}", arguments.join(" "))))
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// Interfaces and routes of this process's network namespace, as the guest is to have them.
///
/// # Errors
/// When `ip` fails.
pub fn look() -> Result<Network, Error> {
    let interfaces = interfaces(&list(&["-j", "addr", "show"])?);
    let mut routes = routes(&list(&["-j", "-4", "route", "show"])?, false, &interfaces);
    routes.extend(self::routes(&list(&["-j", "-6", "route", "show"])?, true, &interfaces));
    // What is on the link first: a gateway must be reachable before it is named.
    routes.sort_by_key(|r| r.gateway.is_some());
    Ok(Network { interfaces, routes })
}

fn interfaces(entries: &[Value]) -> Vec<Interface> {
    let wanted =
        entries.iter().filter(|e| e["link_type"] == "ether" && !e["ifname"].as_str().is_none_or(is_ours));
    wanted
        .filter_map(|e| {
            let addresses = e["addr_info"].as_array().into_iter().flatten();
            let addresses = addresses.filter(|a| a["scope"] != "link");
            Some(Interface {
                name: text(&e["ifname"])?,
                mac: text(&e["address"])?,
                mtu: e["mtu"].as_u64().and_then(|m| u32::try_from(m).ok())?,
                addresses: addresses
                    .filter_map(|a| Some(format!("{}/{}", a["local"].as_str()?, a["prefixlen"])))
                    .collect(),
            })
        })
        .collect()
}

/// Taps that an earlier start made.
fn is_ours(name: &str) -> bool {
    name.starts_with("coffer")
}

fn routes(entries: &[Value], ipv6: bool, interfaces: &[Interface]) -> Vec<Route> {
    entries
        .iter()
        .filter(|e| interfaces.iter().any(|i| e["dev"] == i.name.as_str()))
        .filter(|e| {
            !ipv6 || !e["dst"].as_str().is_some_and(|d| d.starts_with("fe80:") || d.starts_with("ff"))
        })
        // The kernel of the guest makes these itself from the addresses.
        .filter(|e| e["protocol"] != "kernel")
        .filter_map(|e| {
            let destination = text(&e["dst"])?;
            let length = if ipv6 { 128 } else { 32 };
            let destination = match destination.as_str() {
                "default" => None,
                whole if whole.contains('/') => Some(whole.to_owned()),
                single => Some(format!("{single}/{length}")),
            };
            Some(Route {
                interface: text(&e["dev"])?,
                destination,
                gateway: text(&e["gateway"]),
                source: text(&e["prefsrc"]),
                metric: e["metric"].as_u64().and_then(|m| u32::try_from(m).ok()),
                ipv6,
            })
        })
        .collect()
}

/// Makes a tap for each interface in this process's namespace, and ties the two together.
///
/// # Errors
/// The system's, or `tc`'s words.
pub fn taps(network: &Network) -> Result<Vec<Tap>, Error> {
    network.interfaces.iter().enumerate().map(|(index, interface)| tap(index, interface)).collect()
}

fn tap(index: usize, interface: &Interface) -> Result<Tap, Error> {
    let name = format!("coffer{index}");
    let fd = open_tap(&name).map_err(host(format!("make tap {name}")))?;
    run("ip", &["link", "set", &name, "mtu", &interface.mtu.to_string(), "up"])?;
    for (from, to) in [(interface.name.as_str(), name.as_str()), (name.as_str(), interface.name.as_str())] {
        run("tc", &["qdisc", "add", "dev", from, "ingress"])?;
        // Everything, whatever its protocol, before the host's own stack sees it.
        let redirect = ["match", "u8", "0", "0", "action", "mirred", "egress", "redirect", "dev", to];
        let filter = ["filter", "add", "dev", from, "parent", "ffff:", "protocol", "all", "u32"];
        run("tc", &[&filter[..], &redirect[..]].concat())?;
    }
    Ok(Tap { fd, mac: interface.mac.clone() })
}

/// A tap with a virtio header before each packet; it goes when the last descriptor of it is closed.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *target = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// Whether a network namespace is the one that this process, and so the host's or its caller's network, is in.
pub fn is_own(namespace: &Path) -> bool {
    let number = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    number(namespace).is_some_and(|given| number(Path::new("/proc/self/ns/net")) == Some(given))
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
            json!({ "ifname": "lo", "link_type": "loopback", "address": "00:00:00:00:00:00", "mtu": 65536, "addr_info": [] }),
            json!({ "ifname": "coffer0", "link_type": "ether", "address": "aa:bb:cc:00:00:01", "mtu": 1500, "addr_info": [] }),
            json!({ "ifname": "eth0", "link_type": "ether", "address": "aa:bb:cc:dd:ee:ff", "mtu": 1450, "addr_info": [
                { "local": "10.88.0.2", "prefixlen": 16, "scope": "global" },
                { "local": "fe80::1", "prefixlen": 64, "scope": "link" }
            ] }),
        ];
        let found = interfaces(&entries);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].mtu, &found[0].addresses),
            ("eth0", 1450, &vec!["10.88.0.2/16".to_owned()])
        );
        let table = [
            json!({ "dst": "default", "gateway": "10.88.0.1", "dev": "eth0", "flags": [] }),
            json!({ "dst": "10.88.0.0/16", "dev": "eth0", "protocol": "kernel", "prefsrc": "10.88.0.2" }),
            json!({ "dst": "1.2.3.4", "dev": "other0" }),
        ];
        let routes = routes(&table, false, &found);
        assert_eq!(routes.len(), 1);
        assert_eq!((&routes[0].destination, routes[0].gateway.as_deref()), (&None, Some("10.88.0.1")));
    }
}
