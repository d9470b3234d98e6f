//! Which of the guest's network devices is which of the pod's interfaces, and under what name.
//!
//! Owns: listing them, having the kernel look for those that came since boot, names. Does not own: addresses and routes.

use std::path::Path;

use coffer_layout::slot;
use coffer_protocol::{Interface, template_mac, vm::parse_mac};

use super::{LOOPBACK, NetworkError, netlink::Netlink};
use crate::slots;

/// Bytes of `struct ifinfomsg`, and where its index stands.
const LINK: usize = 16;
const LINK_INDEX: usize = 4;
/// Devices without their counters (`RTEXT_FILTER_SKIP_STATS`, linux/rtnetlink.h).
const SKIP_COUNTERS: u32 = 1 << 3;

/// A network device of this guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) index: u32,
    name: String,
    mac: [u8; 6],
}

impl Device {
    fn is_of(&self, interface: &Interface) -> bool {
        parse_mac(&interface.mac) == Some(self.mac)
    }
}

/// All but the loopback, which is no pod's.
pub(super) fn list(netlink: &Netlink) -> Result<Vec<Device>, NetworkError> {
    let mut fixed = [0; LINK + 8];
    fixed[LINK..LINK + 2].copy_from_slice(&8u16.to_ne_bytes());
    fixed[LINK + 2..LINK + 4].copy_from_slice(&libc::IFLA_EXT_MASK.to_ne_bytes());
    fixed[LINK + 4..].copy_from_slice(&SKIP_COUNTERS.to_ne_bytes());
    let links = netlink.list(libc::RTM_GETLINK, &fixed, "list devices")?;
    let device = |link: &super::netlink::Entry| {
        let name = link.attribute(LINK, libc::IFLA_IFNAME)?.strip_suffix(b"\0")?;
        let mac: [u8; 6] = link.attribute(LINK, libc::IFLA_ADDRESS)?.try_into().ok()?;
        Some(Device { index: link.word(LINK_INDEX), name: std::str::from_utf8(name).ok()?.to_owned(), mac })
    };
    Ok(links.iter().filter_map(device).filter(|device| device.name != LOOPBACK).collect())
}

/// For fuzz targets: devices by index, name and address; what has none has zeros.
#[cfg(feature = "fuzz")]
pub(super) fn of(present: &[(u32, &str, &str)]) -> Vec<Device> {
    let device = |(index, name, mac): &(u32, &str, &str)| Device {
        index: *index,
        name: (*name).to_owned(),
        mac: parse_mac(mac).unwrap_or_default(),
    };
    present.iter().map(device).collect()
}

/// Whether every wanted interface has its device.
pub(super) fn are_all_there(present: &[Device], wanted: &[Interface]) -> bool {
    wanted.iter().all(|interface| present.iter().any(|device| device.is_of(interface)))
}

/// Has the kernel look at the places for network devices again. The host names none of them: one that is still empty, or used, stays as
/// it is, and whatever it puts there has to have an address that was announced.
pub(super) fn look_for_more(root: &Path) {
    for place in slot::NET..slot::NET + slot::NETS {
        // An empty one is no error: who waits for a device names what is missing.
        let _ = slots::look_again(root, place);
    }
}

/// Devices of a machine that was started from a template have the template's addresses: in the order of the pod's interfaces
/// they get theirs. Gives `(device, address)` of those, which are then `present` by it.
pub(super) fn adopt(present: &mut [Device], wanted: &[Interface]) -> Vec<(u32, [u8; 6])> {
    let mut adopted = Vec::new();
    for (position, interface) in wanted.iter().enumerate() {
        if present.iter().any(|d| d.is_of(interface)) {
            continue;
        }
        let of_template = parse_mac(&template_mac(position));
        let device = present.iter_mut().find(|d| Some(d.mac) == of_template);
        if let (Some(device), Some(mac)) = (device, parse_mac(&interface.mac)) {
            device.mac = mac;
            adopted.push((device.index, mac));
        }
    }
    adopted
}

/// An interface that has another address than when its device came: the device that bears its name gets that. What is given is as in
/// [`adopt`].
pub(super) fn readdress(present: &mut [Device], wanted: &[Interface]) -> Vec<(u32, [u8; 6])> {
    let mut given = Vec::new();
    for interface in wanted.iter().filter(|i| parse_mac(&i.mac).is_some()) {
        if present.iter().any(|d| d.is_of(interface)) {
            continue;
        }
        let named = |d: &&mut Device| d.name == interface.name && !wanted.iter().any(|w| d.is_of(w));
        if let (Some(device), Some(mac)) = (present.iter_mut().find(named), parse_mac(&interface.mac)) {
            device.mac = mac;
            given.push((device.index, mac));
        }
    }
    given
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rename {
    pub(super) index: u32,
    pub(super) from: String,
    pub(super) to: String,
}

/// Which device each wanted interface is, and the renames that give all of them their names, in order.
pub(super) struct Names {
    pub(super) indices: Vec<u32>,
    pub(super) renames: Vec<Rename>,
}

/// Devices come in the order in which the host's network made its interfaces, which is not the order of their names: one
/// may have the name that another is to get, and the kernel refuses a name that is taken. It goes aside first.
pub(super) fn names(present: &[Device], wanted: &[Interface]) -> Result<Names, NetworkError> {
    let mut chosen: Vec<&Device> = Vec::new();
    for (position, interface) in wanted.iter().enumerate() {
        if !is_name(&interface.name) {
            return Err(NetworkError::Invalid(interface.name.clone(), "an interface's name"));
        }
        if wanted[..position].iter().any(|other| other.name == interface.name) {
            return Err(NetworkError::Invalid(interface.name.clone(), "the name of one interface only"));
        }
        let device = present.iter().find(|d| d.is_of(interface));
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

pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && name != LOOPBACK
        && name != "."
        && name != ".."
        && name.chars().all(|c| c.is_ascii_graphic() && c != '/')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(index: u32, name: &str) -> Device {
        Device { index, name: name.into(), mac: [2, 0, 0, 0, 0, index as u8] }
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
        let saved = |index, name, position| Device {
            mac: parse_mac(&template_mac(position)).unwrap(),
            ..device(index, name)
        };
        let wanted = [interface("eth0", 12), interface("net", 13)];
        let mut present = [saved(2, "eth0", 0), saved(3, "eth1", 1)];
        let bytes = |text: &str| parse_mac(text).unwrap();
        assert_eq!(adopt(&mut present, &wanted), [(2, bytes(&wanted[0].mac)), (3, bytes(&wanted[1].mac))]);
        let plan = names(&present, &wanted).unwrap();
        assert_eq!(plan.indices, [2, 3]);
        // Said again, and in a machine that booted: nothing is to be done.
        assert!(adopt(&mut present, &wanted).is_empty());
        assert!(adopt(&mut [device(12, "eth0"), device(13, "eth1")], &wanted).is_empty());
    }

    #[test]
    fn an_interface_whose_address_changed_keeps_its_device() {
        let mut present = [device(2, "eth0"), device(3, "eth1")];
        // The second's device is there; the first's has another address by now, and no other device is touched.
        let wanted = [interface("eth0", 12), interface("eth1", 3)];
        assert_eq!(readdress(&mut present, &wanted), [(2, parse_mac(&wanted[0].mac).unwrap())]);
        assert_eq!(names(&present, &wanted).unwrap().indices, [2, 3]);
        // One that bears the name is somebody else's by its address; and nothing is taken from an interface that nobody knows.
        let mut present = [device(2, "eth0"), device(3, "eth1")];
        assert!(readdress(&mut present, &[interface("eth0", 12), interface("net", 2)]).is_empty());
        assert!(readdress(&mut present, &[interface("eth2", 12)]).is_empty());
    }

    #[test]
    fn places_for_network_devices_are_looked_at_and_no_others() {
        let root = tempfile::tempdir().unwrap();
        let driver = root.path().join("sys/bus/platform/drivers/virtio-mmio");
        std::fs::create_dir_all(&driver).unwrap();
        // A kernel takes one name at a time; this pipe keeps all of them.
        nix::unistd::mkfifo(&driver.join("bind"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut pipe = std::fs::File::options().read(true).write(true).open(driver.join("bind")).unwrap();
        std::fs::create_dir(driver.join("virtio-mmio.4")).unwrap();
        look_for_more(root.path());
        let mut names = [0; 100];
        let count = std::io::Read::read(&mut pipe, &mut names).unwrap();
        assert_eq!(&names[..count], b"virtio-mmio.3virtio-mmio.5");
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
                prop_assert!(device.is_of(interface));
            }
        }
    }
}
