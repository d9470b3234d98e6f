//! A container's own clocks (OCI runtime specification, config-linux.md, "Offset for Time Namespace").
//!
//! Owns: the offsets in the kernel's words, and entering. Does not own: the guest's clocks, which come from the VM.

use std::fs::{self, File};

use coffer_protocol::ErrorKind;
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::ContainerError;

/// nix has no name for it.
pub(super) const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
/// As time_namespaces(7) has it; the kernel refuses more.
const NANOSECONDS: u32 = 1_000_000_000;

/// Whether the container has some of its own.
pub(super) fn wanted(spec: &Spec) -> bool {
    let list = spec.linux().iter().flat_map(|l| l.namespaces().iter().flatten());
    list.into_iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Time)
}

/// What `timens_offsets` takes, a clock in each line.
pub(super) fn offsets(spec: &Spec) -> Result<String, ContainerError> {
    let mut lines = Vec::new();
    for (clock, offset) in spec.linux().iter().flat_map(|l| l.time_offsets().iter().flatten()) {
        let nanoseconds = offset.nanosecs().unwrap_or(0);
        if !["monotonic", "boottime"].contains(&clock.as_str()) || nanoseconds >= NANOSECONDS {
            let message = format!("config.json: linux.timeOffsets: {} is not one", clock.escape_debug());
            return Err(ContainerError::new(ErrorKind::Invalid, message));
        }
        lines.push(format!("{clock} {} {nanoseconds}\n", offset.secs().unwrap_or(0)));
    }
    lines.sort();
    Ok(lines.concat())
}

/// Checks what [`enter`] will do.
///
/// # Errors
/// [`ContainerError`] of kind `Invalid`.
pub(super) fn check(spec: &Spec) -> Result<(), ContainerError> {
    let text = offsets(spec)?;
    if !text.is_empty() && !wanted(spec) {
        let message = "config.json: linux.timeOffsets: they are a time namespace's, and there is none";
        return Err(ContainerError::new(ErrorKind::Invalid, message));
    }
    Ok(())
}

/// This process, with `/proc` of the guest, gets the container's clocks. Offsets can be set until the first process is in.
pub(super) fn enter(spec: &Spec) -> Result<(), ContainerError> {
    if !wanted(spec) {
        return Ok(());
    }
    unshare(NEW_TIME).map_err(|e| ContainerError::guest("make a time namespace", e))?;
    let text = offsets(spec)?;
    if !text.is_empty() {
        fs::write("/proc/self/timens_offsets", text)
            .map_err(|e| ContainerError::guest("set linux.timeOffsets", e))?;
    }
    let own = File::open("/proc/self/ns/time_for_children")
        .map_err(|e| ContainerError::guest("open the time namespace", e))?;
    setns(own, NEW_TIME).map_err(|e| ContainerError::guest("enter the time namespace", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(namespaces: &Value, offsets: &Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0", "linux": { "namespaces": namespaces, "timeOffsets": offsets }
        }))
        .unwrap()
    }

    #[test]
    fn offsets_are_the_kernels_lines_and_want_a_namespace() {
        let time = json!([{ "type": "time" }]);
        let both = json!({ "monotonic": { "secs": -1, "nanosecs": 2 }, "boottime": { "secs": 3 } });
        let whole = spec(&time, &both);
        check(&whole).unwrap();
        assert_eq!(offsets(&whole).unwrap(), "boottime 3 0\nmonotonic -1 2\n");
        check(&spec(&time, &json!({}))).unwrap();
        check(&spec(&json!([]), &json!({}))).unwrap();
        assert!(check(&spec(&json!([]), &both)).unwrap_err().message.contains("there is none"));
        for wrong in [
            json!({ "realtime": { "secs": 1 } }),
            json!({ "monotonic": { "nanosecs": 1_000_000_000 } }),
            json!({ "boottime 1 1\nmonotonic": { "secs": 1 } }),
        ] {
            assert!(check(&spec(&time, &wrong)).unwrap_err().message.contains("linux.timeOffsets"));
        }
    }
}
