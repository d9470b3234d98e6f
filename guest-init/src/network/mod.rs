//! The pod's network: interfaces, addresses, routes and neighbours by netlink.
//!
//! Owns: what each of them is in netlink's terms, in which order they are set, what is removed when it is not said any more. Does not own: messages'
//! form (`netlink`), which device is which interface (`devices`), what the pod's network is.

mod devices;
mod netlink;
mod stale;

use std::{io, net::IpAddr, path::Path};

use coffer_protocol::{Interface, Neighbour, Network, Route, vm::parse_mac};
use thiserror::Error;

use self::{
    devices::{Rename, adopt, are_all_there, look_for_more, names, readdress},
    netlink::{Message, Netlink},
};

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
    #[error("network: no device with address {0} in this guest")]
    NoDevice(String),
}

const LOOPBACK: &str = "lo";
/// Attributes of a neighbour (`NDA_DST`, `NDA_LLADDR`) and the state of one that stays (`NUD_PERMANENT`, linux/neighbour.h).
const NEIGHBOUR_ADDRESS: u16 = 1;
const NEIGHBOUR_MAC: u16 = 2;
const PERMANENT: u16 = 0x80;
/// `RTA_VIA`: a gateway of the other family, `struct rtvia` (linux/rtnetlink.h).
const VIA: u16 = 18;
/// `RTNH_F_ONLINK` (linux/rtnetlink.h).
const ON_LINK: u32 = 4;

/// Which device each of the pod's interfaces is: `(name, index)`.
type Indices = [(String, u32)];

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

/// Applies everything, to devices that came since boot too; saying the same again changes nothing.
///
/// # Errors
/// [`NetworkError`], naming the interface, address, route or neighbour.
pub fn apply(network: &Network) -> Result<(), NetworkError> {
    set(network, false)
}

/// As [`apply`], and removes the addresses and routes of these interfaces that are not said any more.
///
/// # Errors
/// As there.
pub fn renew(network: &Network) -> Result<(), NetworkError> {
    set(network, true)
}

fn set(network: &Network, again: bool) -> Result<(), NetworkError> {
    if network.interfaces.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open()?;
    let mut present = devices::list(&netlink)?;
    give(&netlink, &adopt(&mut present, &network.interfaces))?;
    if !are_all_there(&present, &network.interfaces) {
        look_for_more(Path::new("/"));
        present = devices::list(&netlink)?;
    }
    if again {
        give(&netlink, &readdress(&mut present, &network.interfaces))?;
    }
    let plan = names(&present, &network.interfaces)?;
    for Rename { index, from, to } in plan.renames {
        let text = [to.as_bytes(), b"\0"].concat();
        netlink.link(index, false, &[(libc::IFLA_IFNAME, &text)], format!("name {from} {to}"))?;
    }
    let indices: Vec<(String, u32)> =
        network.interfaces.iter().map(|interface| interface.name.clone()).zip(plan.indices).collect();
    if again {
        stale::remove(&netlink, network, &indices)?;
    }
    for (interface, (_, index)) in network.interfaces.iter().zip(&indices) {
        set_interface(&netlink, interface, *index)?;
    }
    for route in &network.routes {
        netlink.add(
            route_message(libc::RTM_NEWROUTE, route, &indices)?,
            format!("add {}", route_words(route)),
        )?;
    }
    for neighbour in &network.neighbours {
        let words = format!("add neighbour {} by {}", neighbour.address, neighbour.interface);
        netlink.add(neighbour_message(neighbour, &indices)?, words)?;
    }
    Ok(())
}

/// Gives devices, by index, these addresses.
fn give(netlink: &Netlink, addresses: &[(u32, [u8; 6])]) -> Result<(), NetworkError> {
    addresses.iter().try_for_each(|(index, mac)| {
        netlink.link(*index, false, &[(libc::IFLA_ADDRESS, mac)], format!("give device {index} its address"))
    })
}

/// The device of an interface that the host names: one of those that it has announced.
fn index_of(name: &str, indices: &Indices) -> Result<u32, NetworkError> {
    let known = indices.iter().find(|(known, _)| known == name).map(|(_, index)| *index);
    known.ok_or_else(|| NetworkError::Invalid(name.into(), "an interface of this pod"))
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
        let message = address_message(libc::RTM_NEWADDR, prefixed(text)?, index);
        netlink.add(message, format!("add {text} to {name}"))?;
    }
    Ok(())
}

fn address_message(kind: u16, (host, prefix): (IpAddr, u8), index: u32) -> Message {
    let (family, value) = bytes(host);
    let mut fixed = [0; 8];
    (fixed[0], fixed[1], fixed[2]) = (family, prefix, libc::IFA_F_NODAD as u8);
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut message = Message::new(kind, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed);
    message = message.attribute(libc::IFA_LOCAL, &value).attribute(libc::IFA_ADDRESS, &value);
    if let IpAddr::V4(host) = host
        && prefix < 31
    {
        let broadcast = u32::from(host) | u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        message = message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
    }
    message
}

fn route_words(route: &Route) -> String {
    format!("route {} by {}", route.destination.as_deref().unwrap_or("default"), route.interface)
}

/// Which table a route is of. Its gateway does not say so: one of IPv6 may lead to what is IPv4's.
fn is_v6(route: &Route, destination: Option<IpAddr>, source: Option<IpAddr>) -> bool {
    route.ipv6 || [destination, source].into_iter().flatten().any(|a| a.is_ipv6())
}

fn route_message(kind: u16, route: &Route, indices: &Indices) -> Result<Message, NetworkError> {
    let index = index_of(&route.interface, indices)?;
    let destination = route.destination.as_deref().map(prefixed).transpose()?;
    let gateway = route.gateway.as_deref().map(address).transpose()?;
    let source = route.source.as_deref().map(address).transpose()?;
    let is_v6 = is_v6(route, destination.map(|d| d.0), source);
    let mut fixed = [0; 12];
    fixed[0] = if is_v6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    fixed[1] = destination.map_or(0, |d| d.1);
    fixed[4] = libc::RT_TABLE_MAIN;
    fixed[5] = libc::RTPROT_BOOT;
    fixed[6] = if gateway.is_some() || is_v6 { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
    fixed[7] = libc::RTN_UNICAST;
    if route.on_link {
        fixed[8..12].copy_from_slice(&ON_LINK.to_ne_bytes());
    }
    let mut message = Message::new(kind, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed);
    for (kind, value) in [(libc::RTA_DST, destination.map(|d| d.0)), (libc::RTA_PREFSRC, source)] {
        if let Some(value) = value {
            message = message.attribute(kind, &bytes(value).1);
        }
    }
    if let Some(gateway) = gateway {
        let (family, value) = bytes(gateway);
        message = if gateway.is_ipv6() == is_v6 {
            message.attribute(libc::RTA_GATEWAY, &value)
        } else {
            message.attribute(VIA, &[&u16::from(family).to_ne_bytes()[..], &value].concat())
        };
    }
    if let Some(metric) = route.metric {
        message = message.attribute(libc::RTA_PRIORITY, &metric.to_ne_bytes());
    }
    Ok(message.attribute(libc::RTA_OIF, &index.to_ne_bytes()))
}

fn neighbour_message(neighbour: &Neighbour, indices: &Indices) -> Result<Message, NetworkError> {
    let index = index_of(&neighbour.interface, indices)?;
    let (family, value) = bytes(address(&neighbour.address)?);
    let mac = parse_mac(&neighbour.mac);
    let mac = mac.ok_or_else(|| NetworkError::Invalid(neighbour.mac.clone(), "a MAC address"))?;
    let mut fixed = [0; 12];
    fixed[0] = family;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
    let message = Message::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, &fixed);
    Ok(message.attribute(NEIGHBOUR_ADDRESS, &value).attribute(NEIGHBOUR_MAC, &mac))
}

/// For fuzz targets: the renames, from and to, and the messages to the kernel for a network in a guest with these devices, by index,
/// name and address.
///
/// # Errors
/// [`NetworkError`], as [`apply`].
#[cfg(feature = "fuzz")]
pub fn plan(present: &[(u32, &str, &str)], network: &Network) -> Result<Plan, NetworkError> {
    let mut present = devices::of(present);
    let adopted = adopt(&mut present, &network.interfaces);
    let names = names(&present, &network.interfaces)?;
    let mut messages = Vec::new();
    let indices: Vec<(String, u32)> =
        network.interfaces.iter().map(|i| i.name.clone()).zip(names.indices.iter().copied()).collect();
    for (interface, (_, index)) in network.interfaces.iter().zip(&indices) {
        for text in &interface.addresses {
            messages.push(address_message(libc::RTM_NEWADDR, prefixed(text)?, *index).finish());
        }
    }
    for route in &network.routes {
        messages.push(route_message(libc::RTM_NEWROUTE, route, &indices)?.finish());
    }
    for neighbour in &network.neighbours {
        messages.push(neighbour_message(neighbour, &indices)?.finish());
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
    use super::{devices::is_name, *};
    use proptest::prelude::*;

    #[test]
    fn addresses_need_a_prefix_that_fits() {
        assert_eq!(prefixed("10.88.0.2/16").unwrap().1, 16);
        for wrong in ["10.88.0.2", "10.88.0.2/33", "x/8", "fe80::1/129", ""] {
            assert!(prefixed(wrong).is_err(), "{wrong}");
        }
    }

    fn route(text: &str) -> Route {
        let (interface, text) = (text.to_owned(), Some(text.to_owned()));
        Route {
            interface,
            destination: text.clone(),
            gateway: text.clone(),
            source: text,
            metric: Some(1),
            ipv6: false,
            on_link: false,
        }
    }

    proptest! {
        #[test]
        fn only_interfaces_that_were_announced_get_routes_and_neighbours(
            interface in "eth[0-3]|lo", destination in "10\\.[1-9][0-9]?\\.0\\.0/16", gateway in prop::option::of("10\\.0\\.0\\.[1-9]"),
            mac: [u8; 6], metric: Option<u32>,
        ) {
            let indices = [("eth1".to_owned(), 7), ("eth2".to_owned(), 8)];
            let index = indices.iter().find(|(name, _)| *name == interface).map(|(_, index)| *index);
            let text = coffer_protocol::vm::Line::Net(mac).to_string();
            let neighbour =
                Neighbour { interface: interface.clone(), address: "10.0.0.1".into(), mac: text[4..].trim_end().into() };
            let route =
                Route { interface, destination: Some(destination), gateway, source: None, metric, ipv6: false, on_link: false };
            let said = [route_message(libc::RTM_NEWROUTE, &route, &indices), neighbour_message(&neighbour, &indices)];
            for message in said {
                let Some(index) = index else {
                    prop_assert!(matches!(message, Err(NetworkError::Invalid(..))));
                    continue;
                };
                let bytes = message.unwrap().finish();
                prop_assert!(bytes.windows(4).any(|four| four == index.to_ne_bytes()));
            }
        }

        #[test]
        fn no_text_of_the_host_makes_it_panic(text in "\\PC{0,40}") {
            let _ = prefixed(&text);
            let _ = is_name(&text);
            let indices = [(text.clone(), 1)];
            let _ = route_message(libc::RTM_NEWROUTE, &route(&text), &indices);
            let neighbour = Neighbour { interface: text.clone(), address: text.clone(), mac: text };
            let _ = neighbour_message(&neighbour, &indices);
        }
    }
}
