//! Shared memory of a pod: one tmpfs for all containers that callers gave the same one on the host.
//!
//! Owns: making it, and turning the mounts of a configuration into binds of it. It lasts as long as the pod.

use std::{fs, path::PathBuf};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use super::ContainerError;

const PLACE: &str = "/run/coffer/shm";
/// What the host calls such a tmpfs, before the name that tells it from others.
const PREFIX: &str = "shm-";

/// Where shared memory is looked for, and the only place that is shared: in any other a policy lets a container have a tmpfs to itself.
const DESTINATION: &str = "/dev/shm";

/// The name of a shared one, when a mount is that.
fn name(mount: &Value) -> Option<&str> {
    let is_it = mount["type"] == "tmpfs" && mount["destination"] == DESTINATION;
    let source = mount["source"].as_str().filter(|_| is_it)?;
    let rest = source.strip_prefix(PREFIX)?;
    let plain =
        !rest.is_empty() && rest.len() <= 64 && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    plain.then_some(source)
}

/// Makes what is not there yet, and rewrites the mounts.
pub(super) fn prepare(spec: &mut Value) -> Result<(), ContainerError> {
    let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) else { return Ok(()) };
    for entry in mounts {
        let Some(name) = name(entry) else { continue };
        let place = PathBuf::from(PLACE).join(name);
        let mut size = entry["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let size = size.rfind(|o| o.starts_with("size=")).unwrap_or("size=64m").to_owned();
        if !place.exists() {
            let failed = |e: std::io::Error| ContainerError::guest("make shared memory", e);
            fs::create_dir_all(&place).map_err(failed)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let data = format!("mode=1777,{size}");
            mount(Some("shm"), &place, Some("tmpfs"), flags, Some(data.as_str()))
                .map_err(|e| failed(e.into()))?;
        }
        *entry = json!({
            "destination": entry["destination"], "type": "bind", "source": place,
            "options": ["bind", "nosuid", "nodev", "noexec"]
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_own_words_name_a_shared_one() {
        let at = |destination: &str, kind: &str, source: &str| {
            name(&json!({ "destination": destination, "type": kind, "source": source })).map(str::to_owned)
        };
        let of = |kind: &str, source: &str| at("/dev/shm", kind, source);
        assert_eq!(at("/tmp", "tmpfs", "shm-12-34"), None);
        assert_eq!(of("tmpfs", "shm-12-34"), Some("shm-12-34".to_owned()));
        for (kind, source) in
            [("bind", "shm-1"), ("tmpfs", "shm"), ("tmpfs", "shm-"), ("tmpfs", "shm-../x"), ("tmpfs", "x")]
        {
            assert_eq!(of(kind, source), None, "{kind} {source}");
        }
    }
}
