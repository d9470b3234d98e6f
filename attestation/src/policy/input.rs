//! Input documents: what a policy sees of a request.
//!
//! Owns: the form. Members of `OCI` and `process` are named as in Kata's agent. The same code makes them in the guest
//! that decides and on the owner's machine that writes a policy.

use serde_json::{Map, Value, json};

/// File systems that the guest's kernel makes by itself. What any other has inside, the host decides.
const KERNELS: [&str; 9] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs", "ramfs"];

/// An image that the guest verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifiedImage<'a> {
    /// Digest of its manifest or index.
    pub digest: &'a str,
    /// What the host calls it. A signature policy has looked at it where there is one; otherwise it is only the host's word.
    pub name: Option<&'a str>,
}

/// `CreateContainerRequest`. `image` is what the root is, if not the host's.
#[must_use]
pub fn create_input(id: &str, spec: &Value, image: Option<VerifiedImage<'_>>) -> Value {
    let none = Vec::new();
    let mounts = spec.get("mounts").and_then(Value::as_array).unwrap_or(&none);
    let mounts: Vec<Value> = mounts.iter().map(mount).collect();
    let linux = spec.get("linux").unwrap_or(&Value::Null);
    let namespaces: Vec<&Value> = linux
        .get("namespaces")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|n| n.get("type"))
        .collect();
    json!({
        "container_id": id,
        "host_root": image.is_none(),
        "image": image.map(|image| image.digest),
        "image_name": image.and_then(|image| image.name),
        "OCI": {
            "Process": process(spec.get("process").unwrap_or(&Value::Null)),
            "Root": { "Readonly": spec.pointer("/root/readonly").and_then(Value::as_bool).unwrap_or(false) },
            "Hostname": spec.get("hostname"),
            "Mounts": mounts,
            "Linux": {
                "Devices": linux.get("devices").cloned().unwrap_or_else(|| json!([])),
                "Namespaces": namespaces,
                "Sysctl": linux.get("sysctl").cloned().unwrap_or_else(|| json!({})),
                "Seccomp": linux.get("seccomp").is_some_and(|s| !s.is_null()),
                "MaskedPaths": linux.get("maskedPaths").cloned().unwrap_or_else(|| json!([])),
                "ReadonlyPaths": linux.get("readonlyPaths").cloned().unwrap_or_else(|| json!([])),
            },
        },
    })
}

/// `ExecProcessRequest`.
#[must_use]
pub fn process_input(id: &str, exec_id: &str, spec: &Value) -> Value {
    json!({ "container_id": id, "exec_id": exec_id, "process": process(spec) })
}

/// What a further process's request is told of its container, out of the `CreateContainerRequest` that let it in.
#[must_use]
pub fn container_input(create: &Value) -> Value {
    let process = &create["OCI"]["Process"];
    json!({ "image": create["image"], "Args": process["Args"], "User": process["User"] })
}

/// Adds to an `ExecProcessRequest` what its container is (`container_input`): the guest took that from the verified image, and of an id alone
/// a policy learns nothing. `None` where the guest does not know the container.
#[must_use]
pub fn with_container(mut input: Value, container: Option<&Value>) -> Value {
    if let Some(container) = container {
        input["container"] = container.clone();
    }
    input
}

fn mount(mount: &Value) -> Value {
    let options: Vec<&str> = mount
        .get("options")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    // Of words that say opposite things the last counts, and one for all below counts for the mount itself.
    let last = |of: [&str; 2]| options.iter().rev().find(|o| of.contains(o)).map(|o| *o == of[0]);
    let writable = !last(["rro", "rrw"]).or(last(["ro", "rw"])).unwrap_or(false);
    let from_host = is_bind(mount) || !is_kernels(mount);
    json!({
        "destination": mount.get("destination"),
        "type_": mount.get("type"),
        "from_host": from_host,
        "writable": writable,
        "options": options,
    })
}

/// Shows what lies elsewhere in the guest: in the host's share, where the guest lets no other be named.
pub(super) fn is_bind(mount: &Value) -> bool {
    let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
    let bound = options.filter_map(Value::as_str).any(|o| matches!(o, "bind" | "rbind"));
    bound || mount.get("type").and_then(Value::as_str).is_none_or(|kind| kind == "bind")
}

/// Of a type that the guest's kernel makes by itself.
pub(super) fn is_kernels(mount: &Value) -> bool {
    mount.get("type").and_then(Value::as_str).is_some_and(|kind| KERNELS.contains(&kind))
}

fn process(process: &Value) -> Value {
    let get = |name: &str, default: Value| process.get(name).cloned().unwrap_or(default);
    let user = process.get("user").unwrap_or(&Value::Null);
    let number = |name: &str| user.get(name).and_then(Value::as_u64).unwrap_or(0);
    let sets = process.get("capabilities").and_then(Value::as_object);
    let capabilities: Map<String, Value> = ["bounding", "effective", "inheritable", "permitted", "ambient"]
        .into_iter()
        .map(|set| {
            let name = set[..1].to_uppercase() + &set[1..];
            (name, sets.and_then(|s| s.get(set)).cloned().unwrap_or_else(|| json!([])))
        })
        .collect();
    json!({
        "Args": get("args", json!([])),
        "Env": get("env", json!([])),
        "Cwd": get("cwd", json!("/")),
        "Terminal": get("terminal", json!(false)),
        "NoNewPrivileges": get("noNewPrivileges", json!(false)),
        "User": {
            "UID": number("uid"),
            "GID": number("gid"),
            "AdditionalGids": user.get("additionalGids").cloned().unwrap_or_else(|| json!([])),
        },
        "Capabilities": capabilities,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_only_as_the_kernel_will_have_it() {
        for (words, writable) in [
            (json!(["ro"]), false),
            (json!(["rbind", "rro"]), false),
            (json!(["ro", "rw"]), true),
            (json!(["rw", "ro"]), false),
            (json!(["ro", "rrw"]), true),
            (json!(["rro", "rw"]), false),
            (json!([]), true),
            (Value::Null, true),
        ] {
            assert_eq!(mount(&json!({ "type": "bind", "options": words }))["writable"], writable, "{words}");
        }
    }

    #[test]
    fn a_policy_sees_what_a_container_would_get() {
        let spec = json!({
            "process": { "args": ["sh"], "env": ["A=1"], "cwd": "/w", "user": { "uid": 5, "gid": 6 },
                         "capabilities": { "bounding": ["CAP_CHOWN"] } },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" },
                       { "destination": "/d", "type": "bind", "source": "/x", "options": ["rbind", "ro"] }],
            "linux": { "namespaces": [{ "type": "pid" }] }
        });
        let input = create_input("c", &spec, None);
        assert_eq!(input["host_root"], true);
        assert_eq!(input["OCI"]["Process"]["User"]["UID"], 5);
        assert_eq!(input["OCI"]["Process"]["Capabilities"]["Bounding"][0], "CAP_CHOWN");
        let mount = &input["OCI"]["Mounts"][1];
        assert_eq!((&mount["from_host"], &mount["writable"]), (&json!(true), &json!(false)));
        assert_eq!(input["OCI"]["Linux"]["Namespaces"], json!(["pid"]));
        assert_eq!(input["OCI"]["Mounts"][0]["from_host"], false);
        // Nothing at all is something that a policy can be asked about too.
        let image = VerifiedImage { digest: "sha256:0", name: Some("r.io/a") };
        assert_eq!(create_input("c", &Value::Null, Some(image))["host_root"], false);
        assert_eq!(create_input("c", &Value::Null, Some(image))["image_name"], "r.io/a");
    }
}
