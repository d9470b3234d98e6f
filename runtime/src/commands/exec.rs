//! `exec`: one more process in a container, with a stub of its own.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use coffer_protocol::{Exec, Outbox, Request};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::wait::waitpid,
    unistd::{Pid, pipe2},
};
use serde_json::{Value, json};

use super::{config, create, find, foreground, network, pod, process::process, terminal};
use crate::{
    cgroup,
    cli::Call,
    client::Connection,
    descriptors::{self, Carried},
    error::{Error, host},
    pid::set_oom_score_adj,
    spawn,
    state::{self, Status},
    stub::{self, Relay, Terminal},
    title,
};

/// What the stub hears when the guest has the process: this, and what came with the guest's answer.
const GO: u8 = b'g';

/// Runs it. With `--detach` this returns when the process runs; otherwise its exit code is ours.
pub(super) fn exec(call: &Call, root: &Path) -> Result<i32, Error> {
    let carried = descriptors::take(descriptors::count(call.value("preserve-fds"), false)?)?;
    let (directory, record) = find(root, call.id()?)?;
    match directory.status(&record) {
        Status::Created | Status::Running => {}
        // Its processes are stopped, the new one would be as well: the guest says so.
        Status::Paused if call.has("ignore-paused") => {}
        Status::Paused => {
            return Err(Error::State("cannot exec in a paused container (resume it first)".into()));
        }
        Status::Creating => {
            return Err(Error::State("cannot exec in a container that is being created".into()));
        }
        Status::Stopped => return Err(Error::State("cannot exec in a stopped container".into())),
    }
    let owner = record.stub.ok_or(Error::NotRunning)?;
    network::look_again(&directory, &record);
    let process = process(call, &directory)?;
    let wants_terminal = process["terminal"].as_bool().unwrap_or(false) || call.has("tty");
    let console = call.value("console-socket").map(PathBuf::from);
    if wants_terminal && call.has("detach") && console.is_none() {
        return Err(Error::Usage(
            "cannot allocate a terminal with --detach and without --console-socket".into(),
        ));
    }
    // As under runc the container's, whatever the process's own says.
    let own: Value = serde_json::from_slice(&config(&directory)?).unwrap_or_default();
    let score = own["process"]["oomScoreAdj"].as_i64().and_then(|score| i32::try_from(score).ok());
    let pty = if wants_terminal && console.is_some() { Some(terminal::open()?) } else { None };
    let own = if wants_terminal && pty.is_none() { foreground::terminal()? } else { None };
    if let Some((_, slave)) = &pty {
        terminal::size(slave, serde_json::from_value(process["consoleSize"].clone()).ok());
    }
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
    let window = pty.as_ref().map(|(_, slave)| slave).or(own.as_ref()).and_then(stub::window);
    let exec_id = format!("{}", std::process::id());
    let words: Vec<String> = serde_json::from_value(process["args"].clone()).unwrap_or_default();
    let streams = carried.iter().map(|c| c.stream).collect();
    let (id, cgroup) = (record.id.clone(), below(call)?);
    let waits = pod::waits(root, &record);
    let signals = if call.has("detach") { None } else { Some(foreground::Signals::hold()?) };
    let request = Request::Exec(Box::new(Exec { id, cgroup, exec_id, process, window, streams }));
    let (ready, tell_ready) = pipe2(OFlag::O_CLOEXEC).map_err(host("make a pipe"))?;
    let (go, tell_to_go) = pipe2(OFlag::O_CLOEXEC).map_err(host("make a pipe"))?;
    let reports = File::open(directory.file("")).ok();
    let vmm = record.vmm.open().ok();
    // The child is in the container's namespace of processes, as callers expect who look there.
    setns(&namespaces[0], CloneFlags::CLONE_NEWPID).map_err(host("join the container's namespaces"))?;
    let (master, slave) = match (pty, &own) {
        (Some((master, slave)), _) => (Some(master), Some(Terminal::Made(slave))),
        (None, Some(own)) => {
            (None, Some(Terminal::Callers(own.try_clone().map_err(host("take this terminal"))?)))
        }
        (None, None) => (None, None),
    };
    let Some(pid) = spawn::clone(0).map_err(host("fork the stub"))? else {
        drop((ready, master, tell_to_go));
        let ready = File::from(tell_ready);
        let set_up = || -> std::io::Result<_> {
            nix::unistd::setsid()?;
            title::show(&words);
            let kept = [ready.as_raw_fd(), go.as_raw_fd(), connection.stream.as_raw_fd()];
            let others = slave.iter().map(AsRawFd::as_raw_fd).chain(vmm.iter().map(AsRawFd::as_raw_fd));
            let others = others.chain(reports.iter().map(AsRawFd::as_raw_fd));
            let others = others.chain(carried.iter().filter_map(Carried::number));
            create::close_others(
                &kept
                    .into_iter()
                    .chain(others)
                    .chain(namespaces.iter().map(AsRawFd::as_raw_fd))
                    .collect::<Vec<_>>(),
            );
            let signals = stub::take_signals()?;
            stub::take_outputs(slave.as_ref(), &carried);
            for file in &namespaces[1..] {
                setns(file, CloneFlags::empty())?;
            }
            if let Some(slave) = &slave {
                stub::take_terminal(slave);
            }
            stub::drop_rights();
            Ok(signals)
        };
        let signals = set_up();
        drop(namespaces);
        let mut connection = connection;
        stub::go_on(ready, signals, |signals| {
            let mut received = Vec::new();
            let _ = File::from(go).read_to_end(&mut received);
            match received.split_first() {
                Some((&GO, received)) => connection.decoder.push(received),
                // The guest refused, and the caller says so.
                _ => std::process::exit(1),
            }
            Relay {
                out: Outbox::default(),
                connection,
                signals,
                terminal: slave,
                reports,
                vmm,
                oom: Vec::new(),
                own: None,
                teller: None,
                further: carried.into_iter().map(Into::into).collect(),
            }
        })
    };
    drop((tell_ready, go, slave, carried));
    if let Some(path) = &record.cgroup {
        cgroup::join(path, pid)?;
    }
    set_oom_score_adj(pid, score);
    let mut word = Vec::new();
    let _ = File::from(ready).read_to_end(&mut word);
    if word != b"k" {
        return Err(Error::State(format!("set up the stub: {}", String::from_utf8_lossy(&word))));
    }
    let _raw = own.map(foreground::Raw::new).transpose()?;
    // Not before the stub is there: what runs may end the container at once, and with it every process in the host's namespace of it.
    if let Err(error) = connection.ask_of(&request, waits) {
        drop(tell_to_go);
        let _ = waitpid(Pid::from_raw(pid), None);
        return Err(error);
    }
    // A stub that hears nothing has ended so by now: whoever waits for it sees that it was killed.
    let _ = File::from(tell_to_go).write_all(&[&[GO], connection.decoder.rest()].concat());
    let told = || {
        if let (Some(master), Some(console)) = (master, console) {
            terminal::give(&console, &master)?;
        }
        let path = call.value("pid-file");
        path.map_or(Ok(()), |path| state::write_whole(Path::new(path), pid.to_string().as_bytes()))
    };
    told().inspect_err(|_| {
        // The process runs, and nobody would know of it: it ends with its stub.
        // SAFETY: signals our own child, which was not reaped.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let _ = waitpid(Pid::from_raw(pid), None);
    })?;
    signals.map_or(Ok(0), |signals| foreground::wait(pid, &signals))
}

/// The cgroup below the container's that `--cgroup` names. The hierarchy has one tree, so that no controller is named with it.
fn below(call: &Call) -> Result<Option<String>, Error> {
    let Some(path) = call.value("cgroup") else { return Ok(None) };
    if path.contains(':') {
        return Err(Error::Usage(format!(
            "exec: --cgroup {path}: guests have cgroup version 2, whose paths are for all controllers"
        )));
    }
    Ok(Some(path.to_owned()))
}
