//! What of a configuration no rule is asked about, and what the host could do harm with.
//!
//! Owns: refusing it, whatever the policy says. A policy that was written before a member was known would otherwise let it pass.

use serde_json::Value;
use thiserror::Error;

use super::input::{is_bind, is_kernels};

/// What a system call can fail with (MAX_ERRNO in linux/err.h).
const ERRORS: std::ops::RangeInclusive<u64> = 1..=4095;

/// The guest runs no such container where an owner has a say.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("policy: CreateContainerRequest denied: {field} is {value}, allowed: {allowed}")]
pub struct Unseen {
    field: &'static str,
    value: String,
    allowed: &'static str,
}

/// Looks for programs that are not the container's, for file systems that the host wrote, and for a filter that tells the container's
/// program lies.
///
/// # Errors
/// [`Unseen`], in the words of a denial.
pub fn unseen(spec: &Value) -> Result<(), Unseen> {
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    };
    // A hook is a program of the host's choice, with the container's secrets in its environment and its files before it.
    let hooks = match spec.get("hooks") {
        None | Some(Value::Null) => None,
        Some(Value::Object(hooks)) => {
            hooks.iter().find(|(_, list)| !is_empty(list)).map(|(name, _)| name.clone())
        }
        Some(other) => Some(other.to_string()),
    };
    if let Some(name) = hooks {
        return Err(Unseen { field: "OCI.Hooks", value: format!("{name:?}"), allowed: "[]" });
    }
    // The guest's kernel would read what the host wrote, a disk's blocks above all.
    let mounts = spec.get("mounts").and_then(Value::as_array).into_iter().flatten();
    if let Some(mount) = mounts.into_iter().find(|mount| !is_bind(mount) && !is_kernels(mount)) {
        let value = format!("a mount of type {} at {}", mount["type"], mount["destination"]);
        return Err(Unseen {
            field: "OCI.Mounts",
            value,
            allowed: "binds, and the kernel's own file systems",
        });
    }
    let seccomp = spec.pointer("/linux/seccomp").unwrap_or(&Value::Null);
    let lies = |action: Option<&Value>, code: Option<&Value>| match action.and_then(Value::as_str) {
        // The kernel returns its last 16 bits: a call that did nothing has succeeded where those are 0, or are no error's.
        Some("SCMP_ACT_ERRNO") => {
            code.is_some_and(|code| !code.is_null() && !code.as_u64().is_some_and(|c| ERRORS.contains(&c)))
        }
        Some("SCMP_ACT_TRACE") => true,
        _ => false,
    };
    let groups = seccomp.get("syscalls").and_then(Value::as_array).into_iter().flatten();
    if lies(seccomp.get("defaultAction"), seccomp.get("defaultErrnoRet"))
        || groups.into_iter().any(|group| lies(group.get("action"), group.get("errnoRet")))
    {
        let value = "a filter that lets calls succeed which it keeps from happening".to_owned();
        return Err(Unseen { field: "OCI.Linux.Seccomp", value, allowed: "errors, and ends of the process" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn programs_of_the_host_and_filters_that_lie_are_refused() {
        let refused = |spec: Value| unseen(&spec).unwrap_err().to_string();
        let message = refused(json!({ "hooks": { "startContainer": [{ "path": "/bin/sh" }] } }));
        assert_eq!(
            message,
            "policy: CreateContainerRequest denied: OCI.Hooks is \"startContainer\", allowed: []"
        );
        refused(json!({ "hooks": [1] }));
        refused(json!({ "hooks": { "startContainer": {} } }));
        let group = |action: &str, code: Value| {
            json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["setuid"], "action": action, "errnoRet": code }] } } })
        };
        assert!(refused(group("SCMP_ACT_ERRNO", json!(0))).contains("OCI.Linux.Seccomp"));
        for masked in
            [json!(65536), json!(131_072), json!(4096), json!(u64::MAX), json!(-1), json!(0.0), json!("1")]
        {
            refused(group("SCMP_ACT_ERRNO", masked.clone()));
            let default = json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": masked });
            refused(json!({ "linux": { "seccomp": default } }));
        }
        refused(group("SCMP_ACT_TRACE", json!(1)));
        refused(
            json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 0 } } }),
        );
        let mount = |mount: Value| json!({ "mounts": [{ "destination": "/proc", "type": "proc" }, mount] });
        for kind in ["ext4", "erofs", "overlay", "virtiofs", "none", ""] {
            let message = refused(mount(json!({ "destination": "/run/.containerenv", "type": kind })));
            assert!(message.contains("OCI.Mounts is a mount of type"), "{message}");
        }
        for honest in [
            json!({}),
            mount(json!({ "destination": "/tmp", "type": "tmpfs" })),
            mount(json!({ "destination": "/etc/hosts", "type": "bind" })),
            mount(json!({ "destination": "/etc/hosts", "type": "none", "options": ["ro", "rbind"] })),
            mount(json!({ "destination": "/etc/hosts" })),
            json!({ "hooks": null }),
            json!({ "hooks": { "startContainer": [], "prestart": null } }),
            group("SCMP_ACT_ERRNO", json!(1)),
            group("SCMP_ACT_ERRNO", json!(4095)),
            group("SCMP_ACT_ERRNO", Value::Null),
            group("SCMP_ACT_KILL_PROCESS", json!(0)),
        ] {
            unseen(&honest).unwrap();
        }
    }
}
