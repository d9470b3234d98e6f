//! The pod's network: interfaces, addresses and routes by netlink.
//!
//! Owns: rtnetlink messages (rtnetlink(7)) as far as they are needed here. Does not own: what the pod's network is.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use coffer_protocol::{Interface, Network, Route, template_mac};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use thiserror::Error;

/// Why the network is not as asked.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The kernel refused.
    #[error("network: {what}: {source}")]
    Kernel {
        /// What was to be done.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// The host's description is wrong.
    #[error("network: {0} is not {1}")]
    Invalid(String, &'static str),
    /// No such device.
    #[error(
        "network: no device with address {0} in this guest: devices cannot be added to a running pod yet"
    )]
    NoDevice(String),
}

const LOOPBACK: &str = "lo";

/// A message being built: header, fixed part, attributes.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&((flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> Result<Self, NetworkError> {
        let fd =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        fd.map(Self).map_err(|e| NetworkError::Kernel { what: "open netlink".into(), source: e.into() })
    }

    /// Sends a message that adds something and waits for its acknowledgement. What exists counts as done: the host may say
    /// things twice.
    fn add(&self, message: Message, what: String) -> Result<(), NetworkError> {
        match self.ask(message, what) {
            Err(NetworkError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Sends a message and waits for its acknowledgement.
    fn ask(&self, message: Message, what: String) -> Result<(), NetworkError> {
        let failed = |what: String, e: nix::Error| NetworkError::Kernel { what, source: e.into() };
        send(self.0.as_raw_fd(), &message.finish(), MsgFlags::empty())
            .map_err(|e| failed(what.clone(), e))?;
        let mut answer = [0; 8192];
        let count =
            recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(|e| failed(what.clone(), e))?;
        let code = answer[..count].get(16..20).map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
        match -code {
            0 => Ok(()),
            errno => Err(NetworkError::Kernel { what, source: io::Error::from_raw_os_error(errno) }),
        }
    }

    fn link(
        &self,
        index: u32,
        up: bool,
        attributes: &[(u16, &[u8])],
        what: String,
    ) -> Result<(), NetworkError> {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        if up {
            fixed[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
            fixed[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        }
        let message = attributes
            .iter()
            .fold(Message::new(libc::RTM_NEWLINK, 0, &fixed), |m, (k, v)| m.attribute(*k, v));
        self.ask(message, what)
    }
}

/// Brings `lo` up.
///
/// # Errors
/// [`NetworkError`].
pub fn loopback_up() -> Result<(), NetworkError> {
    Netlink::open()?.link(1, true, &[], "bring lo up".into())
}

fn bytes(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(a) => (libc::AF_INET as u8, a.octets().to_vec()),
        IpAddr::V6(a) => (libc::AF_INET6 as u8, a.octets().to_vec()),
    }
}

fn address(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Invalid(text.into(), "an address"))
}

/// `address/prefix`.
fn prefixed(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let wrong = || NetworkError::Invalid(text.into(), "an address with a prefix");
    let (host, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let (host, prefix) = (address(host)?, prefix.parse::<u8>().map_err(|_| wrong())?);
    if prefix > if host.is_ipv4() { 32 } else { 128 } {
        return Err(wrong());
    }
    Ok((host, prefix))
}

/// Applies everything; saying the same again changes nothing.
///
/// # Errors
/// [`NetworkError`], naming the interface, address or route.
pub fn apply(network: &Network) -> Result<(), NetworkError> {
    if network.interfaces.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open()?;
    let mut present = devices();
    for (index, mac) in adopt(&mut present, &network.interfaces) {
        netlink.link(
            index,
            false,
            &[(libc::IFLA_ADDRESS, &mac)],
            format!("give device {index} its address"),
        )?;
    }
    let plan = names(&present, &network.interfaces)?;
    for Rename { index, from, to } in plan.renames {
        let text = [to.as_bytes(), b"\0"].concat();
        netlink.link(index, false, &[(libc::IFLA_IFNAME, &text)], format!("name {from} {to}"))?;
    }
    for (interface, index) in network.interfaces.iter().zip(plan.indices) {
        set_interface(&netlink, interface, index)?;
    }
    network.routes.iter().try_for_each(|route| set_route(&netlink, route))
}

/// A network device of this guest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    index: u32,
    name: String,
    mac: String,
}

/// All but the loopback, which is no pod's.
fn devices() -> Vec<Device> {
    let entries = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let device = |entry: std::fs::DirEntry| {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
        Some(Device {
            index: read("ifindex")?.trim().parse().ok()?,
            name: entry.file_name().into_string().ok()?,
            mac: read("address")?.trim().to_owned(),
        })
    };
    entries.filter_map(device).filter(|d| d.name != LOOPBACK).collect()
}

/// Devices of a machine that was started from a template have the template's addresses: in the order of the pod's interfaces
/// they get theirs. Gives `(device, address)` of those, which are then `present` by it.
fn adopt(present: &mut [Device], wanted: &[Interface]) -> Vec<(u32, [u8; 6])> {
    let mut adopted = Vec::new();
    for (position, interface) in wanted.iter().enumerate() {
        if present.iter().any(|d| d.mac.eq_ignore_ascii_case(&interface.mac)) {
            continue;
        }
        let of_template = template_mac(position);
        let device = present.iter_mut().find(|d| d.mac.eq_ignore_ascii_case(&of_template));
        if let (Some(device), Some(mac)) = (device, mac_bytes(&interface.mac)) {
            device.mac.clone_from(&interface.mac);
            adopted.push((device.index, mac));
        }
    }
    adopted
}

fn mac_bytes(text: &str) -> Option<[u8; 6]> {
    let parts = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')));
    parts.collect::<Option<Vec<u8>>>()?.try_into().ok()
}

#[derive(Debug, PartialEq, Eq)]
struct Rename {
    index: u32,
    from: String,
    to: String,
}

/// Which device each wanted interface is, and the renames that give all of them their names, in order.
struct Names {
    indices: Vec<u32>,
    renames: Vec<Rename>,
}

/// Devices come in the order in which the host's network made its interfaces, which is not the order of their names: one
/// may have the name that another is to get, and the kernel refuses a name that is taken. It goes aside first.
fn names(present: &[Device], wanted: &[Interface]) -> Result<Names, NetworkError> {
    let mut chosen: Vec<&Device> = Vec::new();
    for (position, interface) in wanted.iter().enumerate() {
        if !is_name(&interface.name) {
            return Err(NetworkError::Invalid(interface.name.clone(), "an interface's name"));
        }
        if wanted[..position].iter().any(|other| other.name == interface.name) {
            return Err(NetworkError::Invalid(interface.name.clone(), "the name of one interface only"));
        }
        let device = present.iter().find(|d| d.mac.eq_ignore_ascii_case(&interface.mac));
        let device = device.ok_or_else(|| NetworkError::NoDevice(interface.mac.clone()))?;
        if chosen.contains(&device) {
            return Err(NetworkError::Invalid(interface.mac.clone(), "the address of one interface only"));
        }
        chosen.push(device);
    }
    let is_taken =
        |name: &str| present.iter().any(|d| d.name == name) || wanted.iter().any(|w| w.name == name);
    let mut spare = (0u32..).map(|n| format!("aside{n}")).filter(|name| !is_taken(name));
    let mut current: Vec<(u32, String)> = present.iter().map(|d| (d.index, d.name.clone())).collect();
    let mut renames = Vec::new();
    let mut rename = |index: u32, to: String| {
        if let Some((_, name)) = current.iter_mut().find(|(i, _)| *i == index) {
            renames.push(Rename { index, from: std::mem::replace(name, to.clone()), to });
        }
    };
    for device in present {
        let owner = wanted.iter().position(|w| w.name == device.name).map(|p| chosen[p]);
        if owner.is_some_and(|owner| owner != device)
            && let Some(name) = spare.next()
        {
            rename(device.index, name);
        }
    }
    for (device, interface) in chosen.iter().zip(wanted) {
        if device.name != interface.name {
            rename(device.index, interface.name.clone());
        }
    }
    Ok(Names { indices: chosen.iter().map(|d| d.index).collect(), renames })
}

fn index(name: &str) -> Option<u32> {
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && name != LOOPBACK
        && name != "."
        && name != ".."
        && name.chars().all(|c| c.is_ascii_graphic() && c != '/')
}

fn set_interface(netlink: &Netlink, wanted: &Interface, index: u32) -> Result<(), NetworkError> {
    let name = &wanted.name;
    // No duplicate address detection: the host's side has done it, and it takes a second.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
    let mtu = wanted.mtu.to_ne_bytes();
    netlink.link(
        index,
        true,
        &[(libc::IFLA_MTU, &mtu)],
        format!("bring {name} up with MTU {}", wanted.mtu),
    )?;
    for text in &wanted.addresses {
        netlink.add(address_message(text, index)?, format!("add {text} to {name}"))?;
    }
    Ok(())
}

fn address_message(text: &str, index: u32) -> Result<Message, NetworkError> {
    let (host, prefix) = prefixed(text)?;
    let (family, value) = bytes(host);
    let mut fixed = [0; 8];
    (fixed[0], fixed[1], fixed[2]) = (family, prefix, libc::IFA_F_NODAD as u8);
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed);
    message = message.attribute(libc::IFA_LOCAL, &value).attribute(libc::IFA_ADDRESS, &value);
    if let IpAddr::V4(host) = host
        && prefix < 31
    {
        let broadcast = u32::from(host) | u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        message = message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
    }
    Ok(message)
}

fn set_route(netlink: &Netlink, route: &Route) -> Result<(), NetworkError> {
    let name = &route.interface;
    let index = index(name)
        .filter(|_| is_name(name))
        .ok_or_else(|| NetworkError::Invalid(name.clone(), "an interface of this pod"))?;
    let target = route.destination.as_deref().unwrap_or("default");
    netlink.add(route_message(route, index)?, format!("add route {target} by {name}"))
}

fn route_message(route: &Route, index: u32) -> Result<Message, NetworkError> {
    let destination = route.destination.as_deref().map(prefixed).transpose()?;
    let gateway = route.gateway.as_deref().map(address).transpose()?;
    let source = route.source.as_deref().map(address).transpose()?;
    let is_v6 =
        route.ipv6 || [destination.map(|d| d.0), gateway, source].into_iter().flatten().any(|a| a.is_ipv6());
    let mut fixed = [0; 12];
    fixed[0] = if is_v6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    fixed[1] = destination.map_or(0, |d| d.1);
    fixed[4] = libc::RT_TABLE_MAIN;
    fixed[5] = libc::RTPROT_BOOT;
    fixed[6] = if gateway.is_some() || is_v6 { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
    fixed[7] = libc::RTN_UNICAST;
    let mut message = Message::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed);
    for (kind, value) in
        [(libc::RTA_DST, destination.map(|d| d.0)), (libc::RTA_GATEWAY, gateway), (libc::RTA_PREFSRC, source)]
    {
        if let Some(value) = value {
            message = message.attribute(kind, &bytes(value).1);
        }
    }
    if let Some(metric) = route.metric {
        message = message.attribute(libc::RTA_PRIORITY, &metric.to_ne_bytes());
    }
    Ok(message.attribute(libc::RTA_OIF, &index.to_ne_bytes()))
}

/// For fuzz targets: the renames, from and to, and the messages to the kernel for a network in a guest with these devices, by index,
/// name and address.
///
/// # Errors
/// [`NetworkError`], as [`apply`].
#[cfg(feature = "fuzz")]
pub fn plan(present: &[(u32, &str, &str)], network: &Network) -> Result<Plan, NetworkError> {
    let device = |(index, name, mac): &(u32, &str, &str)| Device {
        index: *index,
        name: (*name).to_owned(),
        mac: (*mac).to_owned(),
    };
    let mut present: Vec<Device> = present.iter().map(device).collect();
    let adopted = adopt(&mut present, &network.interfaces);
    let names = names(&present, &network.interfaces)?;
    let mut messages = Vec::new();
    for (interface, index) in network.interfaces.iter().zip(&names.indices) {
        for text in &interface.addresses {
            messages.push(address_message(text, *index)?.finish());
        }
    }
    for route in &network.routes {
        messages.push(route_message(route, 1)?.finish());
    }
    let renames = names.renames.into_iter().map(|r| (r.index, r.from, r.to)).collect();
    Ok(Plan { indices: names.indices, adopted: adopted.len(), renames, messages })
}

/// What [`plan`] gives.
#[cfg(feature = "fuzz")]
#[expect(missing_docs, reason = "said there")]
pub struct Plan {
    pub indices: Vec<u32>,
    pub adopted: usize,
    pub renames: Vec<(u32, String, String)>,
    pub messages: Vec<Vec<u8>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_need_a_prefix_that_fits() {
        assert_eq!(prefixed("10.88.0.2/16").unwrap().1, 16);
        for wrong in ["10.88.0.2", "10.88.0.2/33", "x/8", "fe80::1/129", ""] {
            assert!(prefixed(wrong).is_err(), "{wrong}");
        }
    }

    fn device(index: u32, name: &str) -> Device {
        Device { index, name: name.into(), mac: format!("02:00:00:00:00:{index:02x}") }
    }

    fn interface(name: &str, index: u32) -> Interface {
        let mac = format!("02:00:00:00:00:{index:02X}");
        Interface { name: name.into(), mac, mtu: 1500, addresses: Vec::new() }
    }

    /// What the kernel does with renames: a name that is taken is refused.
    fn rename_all(present: &[Device], plan: &Names) -> Vec<Device> {
        let mut devices = present.to_vec();
        for Rename { index, from, to } in &plan.renames {
            assert!(devices.iter().all(|d| d.name != *to), "{from} cannot get the name {to}, which is taken");
            let device = devices.iter_mut().find(|d| d.index == *index).unwrap();
            assert_eq!(device.name, *from);
            device.name = to.clone();
        }
        devices
    }

    #[test]
    fn two_devices_can_swap_their_names() {
        // CNI made the second network's interface first: the guest's eth0 is the pod's eth1.
        let present = [device(2, "eth0"), device(3, "eth1")];
        let plan = names(&present, &[interface("eth1", 2), interface("eth0", 3)]).unwrap();
        assert_eq!(plan.indices, [2, 3]);
        assert_eq!(rename_all(&present, &plan), [device(2, "eth1"), device(3, "eth0")]);
        // Said again, it changes nothing.
        let plan =
            names(&[device(2, "eth1"), device(3, "eth0")], &[interface("eth1", 2), interface("eth0", 3)]);
        assert!(plan.unwrap().renames.is_empty());
    }

    #[test]
    fn devices_of_a_template_get_the_pods_addresses_and_others_keep_theirs() {
        let saved = |index, name, position| Device { mac: template_mac(position), ..device(index, name) };
        let wanted = [interface("eth0", 12), interface("net", 13)];
        let mut present = [saved(2, "eth0", 0), saved(3, "eth1", 1)];
        let bytes = |text: &str| mac_bytes(text).unwrap();
        assert_eq!(adopt(&mut present, &wanted), [(2, bytes(&wanted[0].mac)), (3, bytes(&wanted[1].mac))]);
        let plan = names(&present, &wanted).unwrap();
        assert_eq!(plan.indices, [2, 3]);
        // Said again, and in a machine that booted: nothing is to be done.
        assert!(adopt(&mut present, &wanted).is_empty());
        assert!(adopt(&mut [device(12, "eth0"), device(13, "eth1")], &wanted).is_empty());
        for text in ["", "0:1:2:3:4:5", "00:00:00:00:00:gg", "00:00:00:00:00:00:00", "+1:00:00:00:00:00"] {
            assert_eq!(mac_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn names_and_addresses_that_are_said_twice_or_are_the_loopbacks_are_refused() {
        let present = [device(2, "eth0"), device(3, "eth1")];
        for wanted in [
            [interface("eth0", 2), interface("eth0", 3)],
            [interface("eth0", 2), interface("eth1", 2)],
            [interface("eth0", 2), interface("lo", 3)],
            [interface("eth0", 2), interface("eth1", 4)],
        ] {
            assert!(names(&present, &wanted).is_err(), "{wanted:?}");
        }
    }

    proptest! {
        #[test]
        fn any_devices_get_any_names(
            before in Just(["eth0", "eth1", "eth2", "net", "aside0", "aside1"]).prop_shuffle(),
            after in Just(["eth0", "eth1", "eth2", "net", "aside0", "other"]).prop_shuffle(),
            count in 0usize..=4,
        ) {
            let present: Vec<Device> = before.iter().take(4).zip(2..).map(|(name, index)| device(index, name)).collect();
            let wanted: Vec<Interface> =
                after.iter().take(count).zip(2..).map(|(name, index)| interface(name, index)).collect();
            let plan = names(&present, &wanted).unwrap();
            let devices = rename_all(&present, &plan);
            for (interface, index) in wanted.iter().zip(&plan.indices) {
                let device = devices.iter().find(|d| d.index == *index).unwrap();
                prop_assert_eq!(&device.name, &interface.name);
                prop_assert!(device.mac.eq_ignore_ascii_case(&interface.mac));
            }
        }

        #[test]
        fn messages_are_padded_and_say_their_length(values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let message = values.iter().fold(Message::new(16, 0, &[0; 16]), |m, v| m.attribute(3, v)).finish();
            prop_assert_eq!(message.len() % 4, 0);
            prop_assert_eq!(u32::from_ne_bytes(message[..4].try_into().unwrap()) as usize, message.len());
        }

        #[test]
        fn no_text_of_the_host_makes_it_panic(text in "\\PC{0,40}") {
            let _ = prefixed(&text);
            let _ = is_name(&text);
        }
    }
}
