//! A user namespace that a configuration names by a path: another container's, or one that somebody made on the host.
//!
//! Owns: finding its maps, which the container's own in the guest gets. Does not own: that namespace in the guest (init). No process of the
//! host is in it: a stub has no rights in either.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::wait::waitpid,
    unistd::{Pid as NixPid, pipe2},
};
use serde_json::{Value, json};

use crate::{
    commands::config,
    error::{Error, host},
    spawn::clone,
    state,
};

/// This process's.
const OWN: &str = "/proc/self/ns/user";
/// Word of a process that is in it.
const ENTERED: &[u8] = b"entered";
/// In `linux` of a configuration, and of a process's files.
const MAPS: [(&str, &str); 2] = [("uidMappings", "uid_map"), ("gidMappings", "gid_map")];

/// A configuration with the maps of the namespace that it names by a path, in the place of its own. What it is that cannot be read is said by
/// who reads it next.
///
/// # Errors
/// [`Error::Bundle`] when there are no maps to have.
pub(super) fn with_maps(text: Vec<u8>, root: &Path) -> Result<Vec<u8>, Error> {
    let Ok(mut value) = serde_json::from_slice::<Value>(&text) else { return Ok(text) };
    let Some(path) = path(&value).map(str::to_owned) else { return Ok(text) };
    let linux = match of_container(root, &path) {
        // One without has the guest's, and so has this one.
        Some(linux) if !has_user(&linux) => {
            let list = value["linux"]["namespaces"].as_array_mut();
            list.into_iter().for_each(|list| list.retain(|entry| entry["type"] != "user"));
            Value::Null
        }
        Some(linux) => linux,
        None => of_host(&path)?,
    };
    for (field, _) in MAPS {
        value["linux"][field] = match &linux[field] {
            Value::Null => json!([]),
            maps => maps.clone(),
        };
    }
    Ok(value.to_string().into_bytes())
}

fn namespaces(linux: &Value) -> impl Iterator<Item = &Value> {
    linux["namespaces"].as_array().into_iter().flatten()
}

fn has_user(linux: &Value) -> bool {
    namespaces(linux).any(|entry| entry["type"] == "user")
}

fn path(value: &Value) -> Option<&str> {
    let mut entries = namespaces(&value["linux"]).filter(|entry| entry["type"] == "user");
    entries.find_map(|entry| entry["path"].as_str()).filter(|path| !path.is_empty())
}

/// `linux` of the container whose stub a path names. What the path leads to is of no use: stubs are in the host's namespace.
fn of_container(root: &Path, path: &str) -> Option<Value> {
    let pid: i32 = path.strip_prefix("/proc/")?.strip_suffix("/ns/user")?.parse().ok()?;
    let mut all = state::all(root).into_iter();
    let (directory, _) = all.find(|(_, r)| r.stub.is_some_and(|stub| stub.pid == pid && stub.is_alive()))?;
    let value: Value = serde_json::from_slice(&config(&directory).ok()?).ok()?;
    Some(value["linux"].clone())
}

/// The maps of a namespace of the host.
fn of_host(path: &str) -> Result<Value, Error> {
    let wrong = |why: &str| Error::Bundle(format!("config.json: linux.namespaces: user: {path}: {why}"));
    let failed = || host(format!("read the maps of {path}"));
    let namespace = File::open(path).map_err(host(format!("open namespace {path}")))?;
    let of = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    if namespace.metadata().ok().map(of) == fs::metadata(OWN).ok().map(of) {
        return Err(wrong("this is the host's own: run without a user namespace"));
    }
    // A process in it shows them, whether or not there is another.
    let (ready, tell_ready) = pipe2(OFlag::O_CLOEXEC).map_err(failed())?;
    let (go, tell_to_go) = pipe2(OFlag::O_CLOEXEC).map_err(failed())?;
    let Some(child) = clone(0).map_err(host(format!("read the maps of {path}")))? else {
        drop((ready, tell_to_go));
        let entered = setns(&namespace, CloneFlags::CLONE_NEWUSER);
        let word = entered.map_or_else(|e| e.desc().as_bytes().to_vec(), |()| ENTERED.to_vec());
        let _ = File::from(tell_ready).write_all(&word);
        let _ = File::from(go).read(&mut [0]);
        std::process::exit(0);
    };
    drop((tell_ready, go));
    let mut word = Vec::new();
    let _ = File::from(ready).read_to_end(&mut word);
    let read =
        |(field, file)| Some((field, maps(&fs::read_to_string(format!("/proc/{child}/{file}")).ok()?)?));
    let maps: Option<Vec<(&str, Value)>> = MAPS.into_iter().map(read).collect();
    drop(tell_to_go);
    let _ = waitpid(NixPid::from_raw(child), None);
    if word != ENTERED {
        return Err(wrong(&String::from_utf8_lossy(&word)));
    }
    let maps = maps.ok_or_else(|| wrong("it has no maps, or none that can be read"))?;
    Ok(maps.into_iter().map(|(field, list)| (field.to_owned(), list)).collect())
}

/// Lines of user_namespaces(7) as the specification has them. `None` when there are none.
fn maps(text: &str) -> Option<Value> {
    let line = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        Some(json!({ "containerID": next()?, "hostID": next()?, "size": next()? }))
    };
    let list = text.lines().map(line).collect::<Option<Vec<_>>>()?;
    (!list.is_empty()).then(|| list.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespaces_lines_become_maps() {
        let one = json!([{ "containerID": 0, "hostID": 0, "size": u32::MAX }]);
        assert_eq!(maps("         0          0 4294967295\n"), Some(one));
        let two = json!([
            { "containerID": 0, "hostID": 100_000, "size": 1000 }, { "containerID": 1000, "hostID": 7, "size": 1 }
        ]);
        assert_eq!(maps("0 100000 1000\n1000 7 1\n"), Some(two));
        for none in ["", "0 1\n", "a b c\n"] {
            assert_eq!(maps(none), None, "{none:?}");
        }
    }

    #[test]
    fn what_names_no_path_stays_to_the_byte() {
        for text in [
            r#"{ "linux": {"namespaces":[{"type":"user"}]} }"#,
            "{",
            r#"{"linux":{"namespaces":[{"type":"pid","path":"/x"}]}}"#,
        ] {
            assert_eq!(with_maps(text.into(), Path::new("/no/root")).unwrap(), text.as_bytes());
        }
    }
}
