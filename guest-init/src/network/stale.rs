//! What the pod's interfaces have and its host does not say any more: a network may change between create and start.
//!
//! Owns: which addresses and routes go. Does not own: those that the kernel made itself, which go with what they were made for, and those that a
//! container made.

use std::net::IpAddr;

use coffer_protocol::{Network, Route};

use super::{
    Indices, NetworkError, VIA, address, address_message, index_of, is_v6,
    netlink::{Entry, Netlink},
    prefixed, route_message,
};

/// Bytes of `struct ifaddrmsg` and `struct rtmsg`.
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
/// Bytes before the address in `struct rtvia`.
const FAMILY: usize = 2;
/// The metric that the kernel gives a route of IPv6 without one (`IP6_RT_PRIO_USER`).
const METRIC_V6: u32 = 1024;

/// Removes them.
pub(super) fn remove(netlink: &Netlink, network: &Network, indices: &Indices) -> Result<(), NetworkError> {
    for (interface, (name, index)) in network.interfaces.iter().zip(indices) {
        let wanted = interface.addresses.iter().map(|text| prefixed(text)).collect::<Result<Vec<_>, _>>()?;
        for (host, prefix) in addresses(netlink, *index)?.into_iter().filter(|has| !wanted.contains(has)) {
            let message = address_message(libc::RTM_DELADDR, (host, prefix), *index);
            gone(netlink.ask(message, format!("take {host}/{prefix} from {name}")))?;
        }
    }
    let wanted = network.routes.iter().map(|route| Key::of(route, indices)).collect::<Result<Vec<_>, _>>()?;
    for (key, route) in routes(netlink, indices)?.into_iter().filter(|(key, _)| !wanted.contains(key)) {
        let words = format!("take route {:?} from {}", key.destination, route.interface);
        gone(netlink.ask(route_message(libc::RTM_DELROUTE, &route, indices)?, words))?;
    }
    Ok(())
}

/// What went along with something else is removed, too.
fn gone(done: Result<(), NetworkError>) -> Result<(), NetworkError> {
    match done {
        Err(NetworkError::Kernel { source, .. })
            if matches!(source.raw_os_error(), Some(libc::ESRCH | libc::EADDRNOTAVAIL)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Addresses of a device that reach beyond its link: the others are the kernel's.
fn addresses(netlink: &Netlink, index: u32) -> Result<Vec<(IpAddr, u8)>, NetworkError> {
    let all = netlink.list(libc::RTM_GETADDR, &[0; ADDRESS], "list addresses")?;
    let of_device = all.iter().filter(|entry| {
        entry.word(4) == index && entry.byte(3) == libc::RT_SCOPE_UNIVERSE && !is_temporary(entry)
    });
    let read = |entry: &Entry| {
        let value =
            entry.attribute(ADDRESS, libc::IFA_LOCAL).or(entry.attribute(ADDRESS, libc::IFA_ADDRESS))?;
        Some((ip(value)?, entry.byte(1)))
    };
    Ok(of_device.filter_map(read).collect())
}

/// One that the kernel made from a router's word.
fn is_temporary(entry: &Entry) -> bool {
    u32::from(entry.byte(2)) & libc::IFA_F_PERMANENT == 0
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// What tells routes apart.
#[derive(Debug, PartialEq, Eq)]
struct Key {
    is_v6: bool,
    index: u32,
    /// None: everything.
    destination: Option<(IpAddr, u8)>,
    gateway: Option<IpAddr>,
    metric: u32,
}

impl Key {
    fn of(route: &Route, indices: &Indices) -> Result<Self, NetworkError> {
        let destination = route.destination.as_deref().map(prefixed).transpose()?;
        let gateway = route.gateway.as_deref().map(address).transpose()?;
        let is_v6 = is_v6(route, destination.map(|d| d.0), None);
        let metric = route.metric.unwrap_or(if is_v6 { METRIC_V6 } else { 0 });
        let destination = destination.filter(|(_, prefix)| *prefix > 0);
        Ok(Self { is_v6, index: index_of(&route.interface, indices)?, destination, gateway, metric })
    }
}

/// Routes by the pod's devices that init made.
fn routes(netlink: &Netlink, indices: &Indices) -> Result<Vec<(Key, Route)>, NetworkError> {
    let all = netlink.list(libc::RTM_GETROUTE, &[0; ROUTE], "list routes")?;
    let of_init = all.iter().filter(|entry| {
        (entry.byte(4), entry.byte(5), entry.byte(7))
            == (libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, libc::RTN_UNICAST)
    });
    let read = |entry: &Entry| {
        let index = entry.number(ROUTE, libc::RTA_OIF)?;
        let (interface, _) = indices.iter().find(|(_, known)| *known == index)?;
        let destination =
            entry.attribute(ROUTE, libc::RTA_DST).and_then(ip).map(|host| (host, entry.byte(1)));
        let via = || entry.attribute(ROUTE, VIA).and_then(|value| value.get(FAMILY..));
        let gateway = entry.attribute(ROUTE, libc::RTA_GATEWAY).or_else(via).and_then(ip);
        let metric = entry.number(ROUTE, libc::RTA_PRIORITY).unwrap_or(0);
        let is_v6 = i32::from(entry.byte(0)) == libc::AF_INET6;
        let route = Route {
            interface: interface.clone(),
            destination: destination.map(|(host, prefix)| format!("{host}/{prefix}")),
            gateway: gateway.map(|host| host.to_string()),
            source: None,
            metric: Some(metric),
            ipv6: is_v6,
            on_link: false,
        };
        Some((Key { is_v6, index, destination, gateway, metric }, route))
    };
    Ok(of_init.filter_map(read).collect())
}
