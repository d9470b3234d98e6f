//! A container's user namespace: the identifiers of the configuration, in the guest as they would be on the host, so that
//! files of the share belong to whom they belong there.
//!
//! Owns: checking and writing the maps. PID 1 writes them; the child has made the namespace.

use std::{fmt::Write, fs, sync::LazyLock};

use coffer_protocol::ErrorKind;
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType, Spec};

use super::{ContainerError, path::Owner};

/// The kernel's own limit (user_namespaces(7)).
const MOST_LINES: usize = 340;

/// Every identifier is itself: for a namespace without maps, as crun has it. In one without any nobody could be anybody.
static SAME: LazyLock<Vec<LinuxIdMapping>> = LazyLock::new(|| {
    let all = LinuxIdMappingBuilder::default().container_id(0_u32).host_id(0_u32).size(u32::MAX).build();
    all.into_iter().collect()
});

/// Whether the configuration wants one of its own.
pub(super) fn wanted(spec: &Spec) -> bool {
    let list = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    list.is_some_and(|list| list.iter().any(|n| n.typ() == LinuxNamespaceType::User))
}

pub(super) fn mappings(spec: &Spec) -> [&[LinuxIdMapping]; 2] {
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|l| l.uid_mappings().as_ref()).map_or(&[][..], Vec::as_slice);
    let gids = linux.and_then(|l| l.gid_mappings().as_ref()).map_or(&[][..], Vec::as_slice);
    match uids.is_empty() && gids.is_empty() && wanted(spec) {
        true => [&SAME, &SAME],
        false => [uids, gids],
    }
}

/// Refuses a namespace with a map for users or groups only, or with maps that the kernel would refuse.
pub(super) fn check(spec: &Spec) -> Result<(), ContainerError> {
    let invalid =
        |message: String| ContainerError::new(ErrorKind::Invalid, format!("config.json: {message}"));
    let lists = mappings(spec);
    if !wanted(spec) {
        return match lists.iter().all(|l| l.is_empty()) {
            true => Ok(()),
            false => Err(invalid("linux.uidMappings without a user namespace".into())),
        };
    }
    for (name, list) in ["linux.uidMappings", "linux.gidMappings"].into_iter().zip(lists) {
        if list.is_empty() || list.len() > MOST_LINES {
            return Err(invalid(format!(
                "{name}: 1 to {MOST_LINES} entries are wanted for a user namespace"
            )));
        }
        let wraps = |first: u32, size: u32| first.checked_add(size).is_none();
        if list
            .iter()
            .any(|m| m.size() == 0 || wraps(m.container_id(), m.size()) || wraps(m.host_id(), m.size()))
        {
            return Err(invalid(format!("{name}: an entry is empty or goes past the last identifier")));
        }
    }
    Ok(())
}

pub(super) fn lines(list: &[LinuxIdMapping]) -> String {
    list.iter().fold(String::new(), |mut text, m| {
        let _ = writeln!(text, "{} {} {}", m.container_id(), m.host_id(), m.size());
        text
    })
}

/// The texts of both files, users first.
#[derive(Debug)]
pub(super) struct Maps([String; 2]);

impl Maps {
    pub(super) fn of(spec: &Spec) -> Self {
        Self(mappings(spec).map(lines))
    }

    /// Writes them for a child that waits in its new namespace.
    pub(super) fn write(&self, pid: i32) -> Result<(), ContainerError> {
        for (file, text) in ["uid_map", "gid_map"].into_iter().zip(&self.0) {
            fs::write(format!("/proc/{pid}/{file}"), text)
                .map_err(|e| ContainerError::guest(&format!("write {file} of the user namespace"), e))?;
        }
        // The pod's network belongs to the guest's first user namespace, not to this one as it would on a host: its root may
        // listen on ports below 1024 all the same.
        let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
        Ok(())
    }
}

/// The identifier outside that a user of the container has.
pub(super) fn outside(spec: &Spec, uid: u32) -> Option<u32> {
    let [uids, _] = mappings(spec);
    mapped(spec, uids, uid)
}

/// The same of a group.
pub(super) fn outside_group(spec: &Spec, gid: u32) -> Option<u32> {
    let [_, gids] = mappings(spec);
    mapped(spec, gids, gid)
}

fn mapped(spec: &Spec, list: &[LinuxIdMapping], id: u32) -> Option<u32> {
    if !wanted(spec) {
        return Some(id);
    }
    list.iter().find_map(|m| {
        let offset = id.checked_sub(m.container_id()).filter(|o| *o < m.size())?;
        m.host_id().checked_add(offset)
    })
}

/// Who outside, user and group, the root of a container with a user namespace is. What this init makes in its stead is to be that one's.
pub(super) fn root(spec: &Spec) -> Option<Owner> {
    match wanted(spec) {
        true => Some((outside(spec, 0)?, outside_group(spec, 0)?)),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(uids: serde_json::Value) -> Spec {
        let linux = json!({
            "namespaces": [{ "type": "user" }], "uidMappings": uids,
            "gidMappings": [{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]
        });
        serde_json::from_value(json!({ "ociVersion": "1.0.2", "linux": linux })).unwrap()
    }

    #[test]
    fn a_users_identifier_outside_follows_the_maps() {
        let spec = spec(json!([
            { "containerID": 0, "hostID": 100_000, "size": 1000 }, { "containerID": 1000, "hostID": 7, "size": 1 }
        ]));
        check(&spec).unwrap();
        assert_eq!(
            (outside(&spec, 5), outside(&spec, 1000), outside(&spec, 1001)),
            (Some(100_005), Some(7), None)
        );
        assert_eq!((outside_group(&spec, 5), outside_group(&spec, 65_536)), (Some(100_005), None));
        assert_eq!(root(&spec), Some((100_000, 100_000)));
        assert_eq!(lines(mappings(&spec)[0]), "0 100000 1000\n1000 7 1\n");
    }

    #[test]
    fn without_maps_everybody_is_who_they_are_outside() {
        let value = json!({ "ociVersion": "1.0.2", "linux": { "namespaces": [{ "type": "user" }] } });
        let spec: Spec = serde_json::from_value(value).unwrap();
        check(&spec).unwrap();
        assert_eq!(lines(mappings(&spec)[1]), "0 0 4294967295\n");
        assert_eq!((outside(&spec, 1000), root(&spec)), (Some(1000), Some((0, 0))));
    }

    #[test]
    fn maps_that_cannot_be_are_named() {
        for wrong in [json!([]), json!([{ "containerID": 0, "hostID": u32::MAX, "size": 2 }])] {
            assert!(check(&spec(wrong)).unwrap_err().message.contains("uidMappings"));
        }
        let mut without = spec(json!([{ "containerID": 0, "hostID": 1, "size": 1 }]));
        without.linux_mut().as_mut().unwrap().set_namespaces(None);
        assert!(check(&without).is_err());
        assert_eq!(root(&without), None);
    }
}
