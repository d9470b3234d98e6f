//! Which devices of a configuration a guest gets.
//!
//! Owns: telling the guest's devices from the host's. Does not own: nodes and the rules for their use, which are init's.

use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};
use serde_json::Value;

use crate::error::Error;

/// Character devices that the guest's kernel has itself, as major and minor number: null, zero, full, random, urandom, kmsg,
/// tty, console, ptmx, tun, fuse. 136 and up are terminals.
const GUEST_DEVICES: [(i64, i64); 11] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229)];

/// There is a device of this number on the host, or a node for one whose driver is loaded when somebody opens it.
pub(crate) fn is_of_the_host(device: &LinuxDevice) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let block = device.typ() == LinuxDeviceType::B;
    let kind = if block { "block" } else { "char" };
    let number = (u32::try_from(device.major()), u32::try_from(device.minor()));
    let (Ok(major), Ok(minor)) = number else { return true };
    let is_node = |meta: std::fs::Metadata| {
        let kind = meta.file_type();
        (if block { kind.is_block_device() } else { kind.is_char_device() })
            && meta.rdev() == libc::makedev(major, minor)
    };
    let nodes = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    Path::new(&format!("/sys/dev/{kind}/{major}:{minor}")).exists()
        || nodes.filter_map(|entry| entry.metadata().ok()).any(is_node)
}

/// Refuses devices that only the host has. A container that may use every device (`--privileged`) asked for none in
/// particular: it gets those that the guest has. A number that nobody has a device for makes a node, as it would on a host.
pub(crate) fn keep_guests(
    value: &mut Value,
    spec: &Spec,
    is_hosts: impl Fn(&LinuxDevice) -> bool,
) -> Result<(), Error> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let rules = linux.resources().as_ref().and_then(|r| r.devices().as_ref());
    let all = rules.into_iter().flatten().any(|r| r.allow() && r.major().is_none() && r.minor().is_none());
    let mut kept = Vec::new();
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        let here = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => {
                GUEST_DEVICES.contains(&(device.major(), device.minor())) || device.major() == 136
            }
            LinuxDeviceType::P => true,
            _ => false,
        } || !is_hosts(device);
        if here {
            kept.push(value["linux"]["devices"][index].clone());
        } else if !all {
            return Err(Error::Bundle(format!(
                "config.json: device {} ({}:{}) is the host's, and a VM has none of those: run without it",
                device.path().display(),
                device.major(),
                device.minor()
            )));
        }
    }
    if linux.devices().is_some() {
        value["linux"]["devices"] = Value::from(kept);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_device_of_the_host_is_refused_unless_all_were_allowed() {
        let with = |rules: Value| {
            let linux = json!({
                "devices": [
                    { "path": "/dev/null2", "type": "c", "major": 1, "minor": 3 },
                    { "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 },
                    { "path": "/dev/none", "type": "c", "major": 10, "minor": 666 }
                ],
                "resources": { "devices": rules }
            });
            let mut value = json!({ "ociVersion": "1.0.2", "linux": linux });
            let spec: Spec = serde_json::from_value(value.clone()).unwrap();
            keep_guests(&mut value, &spec, |device| device.major() != 10).map(|()| value)
        };
        let one = json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "b", "major": 8, "minor": 0 }]);
        assert!(with(one).unwrap_err().to_string().contains("device /dev/sda (8:0) is the host's"));
        let every = with(json!([{ "allow": true, "access": "rwm" }])).unwrap();
        let paths: Vec<&Value> =
            every["linux"]["devices"].as_array().unwrap().iter().map(|d| &d["path"]).collect();
        // What neither side has is a node like any other.
        assert_eq!(paths, ["/dev/null2", "/dev/none"]);
    }
}
