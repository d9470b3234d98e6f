//! `exec`: one more process in a container, with a stub of its own.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use coffer_protocol::{Exec, Request};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    unistd::pipe2,
};
use serde_json::{Value, json};

use super::{config, create, find, terminal};
use crate::{
    cgroup,
    cli::Call,
    client::Connection,
    error::{Error, host},
    state::{self, Status},
    stub::{self, Relay},
};

/// The process: from a file, or from the container's with what the command line changes.
fn process(call: &Call, bundle: &Path) -> Result<Value, Error> {
    if let Some(path) = call.value("process") {
        let text = std::fs::read(path).map_err(host(format!("read {path}")))?;
        return serde_json::from_slice(&text).map_err(|e| Error::Usage(format!("exec: {path}: {e}")));
    }
    let spec: Value =
        serde_json::from_slice(&config(bundle)?).map_err(|e| Error::Bundle(format!("config.json: {e}")))?;
    let mut process = spec["process"].clone();
    if call.words.len() < 2 {
        return Err(Error::Usage("exec: a command is missing: see coffer --help".into()));
    }
    process["args"] = json!(call.words[1..]);
    process["terminal"] = json!(call.has("tty"));
    if let Some(cwd) = call.value("cwd") {
        process["cwd"] = json!(cwd);
    }
    if let Some(user) = call.value("user") {
        let number = |text: &str| {
            text.parse::<u32>()
                .map_err(|_| Error::Usage(format!("exec: --user {user}: numbers UID[:GID] are wanted")))
        };
        let (uid, gid) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
        process["user"]["uid"] = json!(number(uid)?);
        if let Some(gid) = gid {
            process["user"]["gid"] = json!(number(gid)?);
        }
    }
    if let Value::Array(env) = &mut process["env"] {
        env.extend(call.values("env").iter().map(|e| json!(e)));
    }
    for capability in call.values("cap") {
        for set in ["bounding", "effective", "permitted"] {
            if let Value::Array(list) = &mut process["capabilities"][set] {
                list.push(json!(capability));
            }
        }
    }
    if call.has("no-new-privs") {
        process["noNewPrivileges"] = json!(true);
    }
    Ok(process)
}

/// Runs it. With `--detach` this returns when the process runs; otherwise its exit code is ours.
pub(super) fn exec(call: &Call, root: &Path) -> Result<i32, Error> {
    let (directory, record) = find(root, call.id()?)?;
    match directory.status(&record) {
        Status::Created | Status::Running => {}
        Status::Paused if call.has("ignore-paused") => {}
        Status::Paused => {
            return Err(Error::State(
                "cannot exec in a paused container (use --ignore-paused to override)".into(),
            ));
        }
        Status::Stopped => return Err(Error::State("cannot exec in a stopped container".into())),
    }
    let owner = record.stub.ok_or(Error::NotRunning)?;
    let process = process(call, &record.bundle)?;
    let wants_terminal = process["terminal"].as_bool().unwrap_or(false) || call.has("tty");
    let console = call.value("console-socket").map(PathBuf::from);
    let pty = if wants_terminal && console.is_some() { Some(terminal::open()?) } else { None };
    let mut process = process;
    process["terminal"] = json!(wants_terminal);
    let names = ["pid", "net", "ipc", "uts", "cgroup", "mnt"];
    let open = |name: &&str| File::open(format!("/proc/{}/ns/{name}", owner.pid));
    let namespaces = names
        .iter()
        .map(open)
        .collect::<Result<Vec<_>, _>>()
        .map_err(host("open the container's namespaces"))?;
    let mut connection = Connection::open(&directory.socket(), || false)?;
    let window = pty.as_ref().and_then(|(_, slave)| stub::window(slave));
    let exec_id = format!("{}", std::process::id());
    connection.ask(&Request::Exec(Box::new(Exec { id: record.id.clone(), exec_id, process, window })))?;
    let (ready, tell_ready) = pipe2(OFlag::O_CLOEXEC).map_err(host("make a pipe"))?;
    let reports = File::open(directory.file("")).ok();
    // The child is in the container's namespace of processes, as callers expect who look there.
    setns(&namespaces[0], CloneFlags::CLONE_NEWPID).map_err(host("join the container's namespaces"))?;
    let (master, slave) = pty.map_or((None, None), |(m, s)| (Some(m), Some(s)));
    let Some(pid) = create::clone(0).map_err(host("fork the stub"))? else {
        drop((ready, master));
        let mut ready = File::from(tell_ready);
        let set_up = || -> std::io::Result<_> {
            nix::unistd::setsid()?;
            let kept = [ready.as_raw_fd(), connection.stream.as_raw_fd()];
            let others = slave.iter().map(AsRawFd::as_raw_fd).chain(reports.iter().map(AsRawFd::as_raw_fd));
            create::close_others(
                &kept
                    .into_iter()
                    .chain(others)
                    .chain(namespaces.iter().map(AsRawFd::as_raw_fd))
                    .collect::<Vec<_>>(),
            );
            let signals = stub::take_signals()?;
            for file in &namespaces[1..] {
                setns(file, CloneFlags::empty())?;
            }
            if let Some(slave) = &slave {
                // SAFETY: makes the slave this session's terminal, so that its size changes are signalled.
                unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) };
            }
            stub::drop_rights();
            Ok(signals)
        };
        match set_up() {
            Ok(signals) => {
                let _ = ready.write_all(b"k");
                drop((ready, namespaces));
                std::process::exit(Relay { connection, signals, terminal: slave, reports }.run())
            }
            Err(error) => {
                let _ = ready.write_all(error.to_string().as_bytes());
                std::process::exit(1)
            }
        }
    };
    drop((tell_ready, connection, slave));
    if let Some(path) = &record.cgroup {
        cgroup::join(path, pid)?;
    }
    let mut word = Vec::new();
    let _ = File::from(ready).read_to_end(&mut word);
    if word != b"k" {
        return Err(Error::State(format!("set up the stub: {}", String::from_utf8_lossy(&word))));
    }
    if let (Some(master), Some(console)) = (master, console) {
        terminal::give(&console, &master)?;
    }
    if let Some(path) = call.value("pid-file") {
        state::write_whole(Path::new(path), pid.to_string().as_bytes())?;
    }
    if call.has("detach") { Ok(0) } else { create::wait(pid) }
}
