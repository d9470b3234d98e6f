//! The process that `exec` adds: from a file, or the container's own with what the command line changes.

use serde::Serialize;
use serde_json::{Value, json};

use super::config;
use crate::{
    cli::Call,
    error::{Error, host},
    state::Directory,
    support,
};

/// OCI `process`.
///
/// # Errors
/// [`Error::Usage`], naming the option or file.
pub(super) fn process(call: &Call, directory: &Directory) -> Result<Value, Error> {
    let mut process = read(call, directory)?;
    support::warn_of_unknown(&support::known_capabilities(&mut process));
    let typed =
        serde_json::from_value(process.clone()).map_err(|e| Error::Usage(format!("exec: process: {e}")))?;
    support::process(&typed)?;
    Ok(process)
}

fn read(call: &Call, directory: &Directory) -> Result<Value, Error> {
    if let Some(path) = call.value("process") {
        let text = std::fs::read(path).map_err(host(format!("read {path}")))?;
        return serde_json::from_slice(&text).map_err(|e| Error::Usage(format!("exec: {path}: {e}")));
    }
    let spec: Value = serde_json::from_slice(&config(directory)?)
        .map_err(|e| Error::Bundle(format!("config.json: {e}")))?;
    if call.words.len() < 2 {
        return Err(Error::Usage("exec: a command is missing: see coffer --help".into()));
    }
    changed(call, spec["process"].clone())
}

/// The container's process with other words, and what flags say.
fn changed(call: &Call, mut process: Value) -> Result<Value, Error> {
    process["args"] = json!(call.words[1..]);
    process["terminal"] = json!(call.has("tty"));
    if let Some(cwd) = call.value("cwd") {
        process["cwd"] = json!(cwd);
    }
    if let Some(user) = call.value("user") {
        let (uid, gid) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
        process["user"]["uid"] = json!(number("user", uid)?);
        if let Some(gid) = gid {
            process["user"]["gid"] = json!(number("user", gid)?);
        }
    }
    let groups: Vec<u32> = call
        .values("additional-gids")
        .iter()
        .flat_map(|v| v.split(','))
        .map(|text| number("additional-gids", text))
        .collect::<Result<_, _>>()?;
    // Beside the container's own, as under runc.
    extend(&mut process["user"]["additionalGids"], &groups);
    extend(&mut process["env"], call.values("env"));
    for capability in call.values("cap") {
        let name = capability.to_ascii_uppercase();
        let name = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
        for set in ["bounding", "effective", "permitted"] {
            extend(&mut process["capabilities"][set], std::slice::from_ref(&name));
        }
    }
    if call.has("no-new-privs") {
        process["noNewPrivileges"] = json!(true);
    }
    Ok(process)
}

/// Adds to a list that need not be there.
fn extend<T: Serialize>(list: &mut Value, more: &[T]) {
    if more.is_empty() {
        return;
    }
    if !list.is_array() {
        *list = json!([]);
    }
    if let Value::Array(list) = list {
        list.extend(more.iter().map(|word| json!(word)));
    }
}

fn number(flag: &str, text: &str) -> Result<u32, Error> {
    text.parse().map_err(|_| {
        Error::Usage(format!("exec: --{flag} {text}: a number is wanted, names are the caller's to look up"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    fn of(line: &str) -> Result<Value, String> {
        let call = cli::parse(line.split_whitespace().map(str::to_owned)).unwrap();
        let own = json!({ "args": ["sh"], "cwd": "/", "env": ["A=1"], "user": { "uid": 0, "gid": 0 } });
        changed(&call, own).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_change_the_containers_own_process() {
        let line =
            "exec -u 5:6 -g 7,8 -g 9 --cwd /srv -e B=2 --cap cap_net_raw --cap KILL --no-new-privs c ls -l";
        let process = of(line).unwrap();
        assert_eq!(process["args"], json!(["ls", "-l"]));
        assert_eq!(process["user"], json!({ "uid": 5, "gid": 6, "additionalGids": [7, 8, 9] }));
        assert_eq!(process["env"], json!(["A=1", "B=2"]));
        assert_eq!(process["capabilities"]["effective"], json!(["CAP_NET_RAW", "CAP_KILL"]));
        assert_eq!((&process["cwd"], &process["noNewPrivileges"]), (&json!("/srv"), &json!(true)));
        assert_eq!(of("exec -t c ls").unwrap()["terminal"], json!(true));
    }

    #[test]
    fn more_groups_come_beside_the_containers() {
        let groups = |line: &str| {
            let call = cli::parse(line.split_whitespace().map(str::to_owned)).unwrap();
            let own = json!({ "args": ["sh"], "user": { "uid": 0, "gid": 0, "additionalGids": [5, 6] } });
            changed(&call, own).unwrap()["user"]["additionalGids"].clone()
        };
        assert_eq!(groups("exec -g 7 -g 8 c id"), json!([5, 6, 7, 8]));
        assert_eq!(groups("exec -u 1:2 c id"), json!([5, 6]));
    }

    #[test]
    fn a_name_is_no_number() {
        assert!(of("exec --user app c ls").unwrap_err().contains("--user app"));
        assert!(of("exec -g x c ls").unwrap_err().contains("--additional-gids x"));
    }
}
