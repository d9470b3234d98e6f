//! Taps: one for each interface of the pod's namespace, tied to it.
//!
//! Owns: making them, sending what arrives on one to the other, whether there is something to tie. Does not own: what else interfaces have,
//! who uses the tap.
//!
//! A tap bears the number of its interface in its name, so that the namespace itself says which have one. It goes when nobody has it open any more;
//! what tied it then drops everything until it is tied anew.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use coffer_protocol::Interface;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{Seen, is_ours, run};
use crate::error::{Error, host};

/// A tap device for one interface of the guest.
#[derive(Debug)]
pub struct Tap {
    /// To read and write packets.
    pub fd: OwnedFd,
    /// The guest's address.
    pub mac: String,
}

/// How `tc` writes that a filter's target is gone.
const GONE: &str = "Redirect to device *";

fn name(index: u32) -> String {
    // In 15 bytes, whatever the number.
    format!("coffer{index:x}")
}

impl Seen {
    /// Interfaces without a tap, and their numbers.
    pub fn untied(&self) -> impl Iterator<Item = (&Interface, u32)> {
        let all = self.network.interfaces.iter().zip(self.indices.iter().copied());
        all.filter(|(_, index)| !self.taps.contains(&name(*index)))
    }

    /// Makes a tap for each interface in this process's namespace, and ties the two together.
    ///
    /// # Errors
    /// An interface that another VM has; the system's, or `tc`'s words.
    pub fn taps(&self) -> Result<Vec<Tap>, Error> {
        let untied: Vec<_> = self.untied().collect();
        let all = &self.network.interfaces;
        if let Some(taken) = all.iter().find(|i| !untied.iter().any(|(free, _)| free.name == i.name)) {
            return Err(Error::State(format!("network: interface {} is another VM's", taken.name)));
        }
        untied.into_iter().map(|(interface, index)| tie(interface, index)).collect()
    }
}

/// What there is of Ethernet interfaces in this process's namespace, without the programs and their milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Glance {
    /// One at least.
    pub any: bool,
    /// One without a tap.
    pub untied: bool,
}

/// Looks whether a namespace has something for a guest.
///
/// # Errors
/// The system's.
pub fn glance() -> Result<Glance, Error> {
    let table = fs::read_to_string("/proc/self/net/dev").map_err(host("look at the container's network"))?;
    let names = table.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
    let (taps, others): (Vec<&str>, Vec<&str>) = names.partition(|name| is_ours(name));
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
    let socket = socket.map_err(host("look at the container's network"))?;
    let mut glance = Glance::default();
    for name in others {
        // One that has gone meanwhile is none.
        let Some(index) = ethernet(&socket, name) else { continue };
        glance.any = true;
        glance.untied |= !taps.contains(&self::name(index).as_str());
    }
    Ok(glance)
}

/// The number of an Ethernet interface.
fn ethernet(socket: &OwnedFd, name: &str) -> Option<u32> {
    let ask = |kind: libc::c_ulong| {
        let mut request = request(name);
        // SAFETY: the request outlives the call.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), kind, &raw mut request) };
        (done >= 0).then_some(request)
    };
    let address = ask(libc::SIOCGIFHWADDR)?;
    // SAFETY: the call filled this part.
    let kind = unsafe { address.ifr_ifru.ifru_hwaddr.sa_family };
    let index = ask(libc::SIOCGIFINDEX)?;
    // SAFETY: as above.
    let index = unsafe { index.ifr_ifru.ifru_ifindex };
    (kind == libc::ARPHRD_ETHER).then(|| u32::try_from(index).ok())?
}

/// A request about a device.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *target = byte as libc::c_char;
    }
    request
}

/// Makes a tap for an interface without one, by its number, and ties the two together.
///
/// # Errors
/// The system's, or `tc`'s words.
pub fn tie(interface: &Interface, index: u32) -> Result<Tap, Error> {
    let name = name(index);
    let fd = open_tap(&name).map_err(host(format!("make tap {name}")))?;
    run("ip", &["link", "set", &name, "mtu", &interface.mtu.to_string(), "up"], "")?;
    let device = interface.name.as_str();
    ingress(device)?;
    let all = || {
        run("tc", &["qdisc", "add", "dev", &name, "ingress"], "")?;
        redirect(device, &name)?;
        redirect(&name, device)
    };
    all().inspect_err(|_| untie(interface))?;
    Ok(Tap { fd, mac: interface.mac.clone() })
}

/// Has what arrives at an interface looked at. What tied it to a tap that is gone goes, too.
fn ingress(device: &str) -> Result<(), Error> {
    let add = || run("tc", &["qdisc", "add", "dev", device, "ingress"], "").map(drop);
    let Err(error) = add() else { return Ok(()) };
    let filters = run("tc", &["filter", "show", "dev", device, "parent", "ffff:"], "")?;
    if !String::from_utf8_lossy(&filters).contains(GONE) {
        return Err(error);
    }
    run("tc", &["qdisc", "del", "dev", device, "ingress"], "")?;
    add()
}

/// Sends everything that arrives at one to the other, whatever its protocol, before the host's own stack sees it.
fn redirect(from: &str, to: &str) -> Result<(), Error> {
    let target = ["match", "u8", "0", "0", "action", "mirred", "egress", "redirect", "dev", to];
    let filter = ["filter", "add", "dev", from, "parent", "ffff:", "protocol", "all", "u32"];
    run("tc", &[&filter[..], &target[..]].concat(), "").map(drop)
}

/// Lets an interface's packets reach the host's own stack again. Its tap goes with its descriptors.
pub fn untie(interface: &Interface) {
    let _ = run("tc", &["qdisc", "del", "dev", &interface.name, "ingress"], "");
}

/// A tap with a virtio header before each packet; it goes when the last descriptor of it is closed.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
