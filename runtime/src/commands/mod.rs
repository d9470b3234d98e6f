//! One function for each command.
//!
//! Owns: what each does to a container's state. Does not own: processes' insides (`stub`, `spawn`).

mod boot_chart;
mod create;
mod events;
mod exec;
mod features;
mod foreground;
mod hooks;
pub mod image;
mod listing;
mod network;
mod pod;
pub mod policy;
mod process;
mod shells;
mod spec;
mod templates;
mod terminal;
mod update;

pub(crate) use features::CAPABILITIES;
use std::{
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use coffer_protocol::{ErrorKind, Reply, Request, SignalTarget, signal};
use nix::sys::signal::SigSet;

use crate::{
    cgroup,
    cli::Call,
    client,
    error::{self, Error},
    notify, plan, resize,
    state::{self, DEFAULT_ROOT, Directory, Record, Status},
};

/// How long `start` waits for a `create` that is still at it: longer than a guest may take with an image to unpack.
const CREATE_LIMIT: Duration = Duration::from_secs(25 * 60);
/// How long `delete` and `kill` wait for the end of a container that runs: what has just ended in the guest ends here a moment later.
const END_LIMIT: Duration = Duration::from_secs(1);
/// How long a process may take to go after SIGKILL.
const DEATH_LIMIT: Duration = Duration::from_secs(10);

/// Runs a command. The number is the exit code.
///
/// # Errors
/// [`Error`]; the caller prints it.
pub fn run(call: &Call) -> Result<i32, Error> {
    let root = call.global.root.as_deref().unwrap_or(Path::new(DEFAULT_ROOT));
    // Processes that work elsewhere get paths below it.
    let root = std::path::absolute(root).map_err(error::host("find --root"))?;
    if matches!(call.command.as_str(), "list" | "features" | "spec" | "doctor") {
        call.no_words()?;
    }
    match call.command.as_str() {
        "create" => create::create(call, &root).map(|()| 0),
        "run" => create::run(call, &root),
        "exec" => exec::exec(call, &root),
        "start" => start(&root, call.id()?, Ready::Awaited).map(|()| 0),
        "state" => {
            let (directory, record) = find(&root, call.id()?)?;
            print(&state::json(&record, directory.status(&record)))
        }
        "kill" => kill(call, &root).map(|()| 0),
        "delete" => delete(&root, call.id()?, call.has("force")).map(|()| 0),
        "list" => listing::list(call, &root),
        "ps" => listing::ps(call, &root),
        "events" => events::events(call, &root),
        "pause" => freeze(&root, call.id()?, true).map(|()| 0),
        "resume" => freeze(&root, call.id()?, false).map(|()| 0),
        "update" => update::update(call, &root).map(|()| 0),
        "features" => print(&features::features()),
        "boot-chart" => boot_chart::boot_chart(call, &root).map(|()| 0),
        "spec" => spec::spec(call).map(|()| 0),
        "template" => templates::template(call, &root),
        "pool" => shells::pool(call, &root),
        "doctor" => Ok(crate::doctor::run()),
        other => Err(Error::Usage(format!("unknown command `{other}`: see coffer --help"))),
    }
}

fn print(value: &serde_json::Value) -> Result<i32, Error> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::State(e.to_string()))?;
    // A reader that has seen enough may close.
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(0)
}

fn find(root: &Path, id: &str) -> Result<(Directory, Record), Error> {
    let directory = Directory::of(root, id)?;
    let record = directory.read()?;
    Ok((directory, record))
}

/// The configuration as it was when the container was made: later changes of the bundle have no effect.
fn config(directory: &Directory) -> Result<Vec<u8>, Error> {
    let path = directory.file("config.json");
    std::fs::read(&path).map_err(|e| Error::Bundle(format!("{}: {e}", path.display())))
}

/// Who waits for the container to say that it is ready, where a service manager is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    /// This command, which ends then.
    Awaited,
    /// A thread of this command, which goes on.
    Behind,
}

/// Tells the manager of `NOTIFY_SOCKET` when the container is ready, as runc does. One that ends before is nothing to tell.
fn ready(directory: &Directory, record: &Record, ready: Ready) -> Result<(), Error> {
    let (Some(manager), Some(stub)) = (notify::manager(), record.stub) else { return Ok(()) };
    if !directory.file("notifies").exists() {
        return Ok(());
    }
    let directory = directory.file("");
    let tell = move || match notify::wait_ready(&directory, || stub.is_alive()) {
        true => notify::tell_manager(&manager, stub.pid),
        false => Ok(()),
    };
    match ready {
        Ready::Awaited => tell(),
        Ready::Behind => {
            // Signals are for this thread, which waits for the container.
            SigSet::all().thread_block().map_err(error::host("take signals"))?;
            std::thread::spawn(tell);
            Ok(())
        }
    }
}

/// Waits until another command has made a container, or has failed to. A VM boots longer than a process forks, and callers that
/// read `create`'s stdout to its end, which is the container's, call `start` without having waited for `create`.
fn wait_created(root: &Path, id: &str) -> Result<(), Error> {
    let directory = Directory::of(root, id)?;
    let began = Instant::now();
    while directory.is_being_made() && began.elapsed() < CREATE_LIMIT {
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn start(root: &Path, id: &str, waits: Ready) -> Result<(), Error> {
    let already = || Error::State("cannot start an already running container".into());
    wait_created(root, id)?;
    let (directory, record) = find(root, id)?;
    match directory.status(&record) {
        Status::Created => {}
        Status::Creating => {
            return Err(Error::State("cannot start a container that is being created".into()));
        }
        Status::Stopped => return Err(Error::State("cannot start a container that has stopped".into())),
        Status::Paused => return Err(Error::State("cannot start a container in the paused state".into())),
        Status::Running => return Err(already()),
    }
    let (_, spec) = plan::read(&config(&directory)?)?;
    network::renew(&directory, &record)?;
    let inside = spec.hooks().as_ref().and_then(|h| h.start_container().as_deref()).unwrap_or_default();
    let mut connection = client::Connection::open(&directory.socket(), || false)?;
    // Before its program runs, which may have ended, and whose container may be gone, by the time of the answer. Until then nobody is to
    // take it for one that waits, and end it.
    directory.mark_first("started")?.ok_or_else(already)?;
    let request = Request::Start { id: id.to_owned() };
    if let Err(error) = connection.ask_within(&request, client::hooks_limit(inside)) {
        // One that does not answer may have let it go.
        if matches!(error, Error::Guest { .. }) {
            let _ = directory.mark("started", false);
        }
        return Err(error);
    }
    let poststart = spec.hooks().as_ref().and_then(|h| h.poststart().as_ref());
    hooks::run(poststart, &record, Status::Running).inspect_err(|_| {
        // The container is stopped then (OCI runtime specification, runtime.md, "Lifecycle", step 9).
        let target = SignalTarget::All(id.to_owned());
        let _ = client::ask(&directory.socket(), &Request::Signal { target, signal: libc::SIGKILL as u32 });
    })?;
    ready(&directory, &record, waits)
}

fn kill(call: &Call, root: &Path) -> Result<(), Error> {
    let (directory, record) = find(root, call.id()?)?;
    let text = call.words.get(1).map_or("TERM", String::as_str);
    let signal = signal::parse(text).ok_or_else(|| Error::Usage(format!("unknown signal `{text}`")))?;
    let status = directory.status(&record);
    if signal == libc::SIGKILL as u32 && record.is_abandoned() {
        // podman takes a container without its conmon for gone once this has returned, and never calls `delete`.
        delete(root, &record.id, true)?;
        return if status == Status::Stopped { Err(Error::NotRunning) } else { Ok(()) };
    }
    if status == Status::Creating && record.stub.is_none() {
        // Nothing is there yet that could be signalled.
        return Err(Error::NotRunning);
    }
    if status == Status::Stopped {
        return if call.has("all") { Ok(()) } else { Err(Error::NotRunning) };
    }
    let id = record.id.clone();
    let target = if call.has("all") { SignalTarget::All(id) } else { SignalTarget::Init(id) };
    match client::ask(&directory.socket(), &Request::Signal { target, signal }) {
        Ok(_) => Ok(()),
        Err(Error::Guest { kind: ErrorKind::WrongState | ErrorKind::NoContainer, .. }) => {
            Err(Error::NotRunning)
        }
        // A guest that does not answer: init ends the process once it sees that its stub is gone, and the VM ends with the last of its stubs.
        Err(Error::Vm(_) | Error::VmGone) if signal == libc::SIGKILL as u32 => {
            record.stub.unwrap_or(record.vmm).signal(libc::SIGKILL);
            Ok(())
        }
        // It has ended meanwhile, and its stub a moment later.
        Err(Error::VmGone)
            if record.stub.is_none_or(|stub| stub.wait(END_LIMIT)) || !record.vmm.is_alive() =>
        {
            if call.has("all") { Ok(()) } else { Err(Error::NotRunning) }
        }
        Err(error) => Err(error),
    }
}

/// Ends everything of a container and removes it. Doing it again is fine.
fn delete(root: &Path, id: &str, force: bool) -> Result<(), Error> {
    let directory = Directory::of(root, id)?;
    // Who makes it would go on, and in the end take another of this id for its own.
    if let Some(maker) = directory.maker().filter(|maker| force && !maker.is_me()) {
        maker.signal(libc::SIGKILL);
        let _ = maker.wait(DEATH_LIMIT);
    }
    // Of two who delete it at once the slower must not take the next container of this id for this one.
    let Some(lock) = directory.lock()? else {
        return if force { Ok(()) } else { Err(Error::NoContainer) };
    };
    let record = match directory.read() {
        Ok(record) => record,
        // Half made, or gone already.
        Err(_) if force => return directory.remove(),
        Err(error) => {
            if directory.maker().is_some_and(|maker| !maker.is_alive()) {
                directory.remove()?;
            }
            return Err(error);
        }
    };
    let mut status = directory.status(&record);
    // The specification would have a created one refused; runc ends it, and containerd and others rely on that.
    let force = force || status == Status::Created;
    if status == Status::Running && !force && record.stub.is_some_and(|stub| stub.wait(END_LIMIT)) {
        status = Status::Stopped;
    }
    if status != Status::Stopped && !force {
        return Err(Error::State(format!(
            "cannot delete container {id} that is not stopped: {}",
            status.word()
        )));
    }
    // A pod's VM goes with the last of its containers.
    let others = pod::has_others(root, &record);
    let ours: Vec<_> = record.stub.into_iter().chain((!others).then_some(record.vmm)).collect();
    for process in &ours {
        process.signal(libc::SIGKILL);
    }
    for process in &ours {
        if !process.wait(DEATH_LIMIT) {
            return Err(Error::State(format!("process {} does not end", process.pid)));
        }
    }
    // The VM of a pod is in its first container's scope: that goes by itself when it is empty.
    if let (Some(scope), false) = (&record.scope, others) {
        scope.stop();
    }
    // The one that a VM is in which goes on stays for that: it goes with what is left of the VM.
    let of_vm = others && cgroup::of(record.vmm.pid) == record.cgroup;
    if let Some(path) = record.cgroup.as_ref().filter(|_| !of_vm) {
        cgroup::remove(path);
    }
    let spec = config(&directory).ok().and_then(|c| plan::read(&c).ok()).map(|(_, spec)| spec);
    if others {
        // A VM that keeps what it has is no reason to keep the container, and one that does not answer is not asked again.
        if forgotten(&directory, &record.id) {
            let _ = resize::give_back(root, &directory, &record);
        }
    }
    match (others, &record.share) {
        (false, _) => directory.remove()?,
        (true, Some(_)) => {
            pod::hide(root, &record);
            directory.remove()?;
        }
        (true, None) => pod::orphan(root, &directory, &record)?,
    }
    drop(lock);
    pod::sweep(root);
    let poststop = spec.as_ref().and_then(|s| s.hooks().as_ref()).and_then(|h| h.poststop().as_ref());
    // The container is gone whatever they say: each runs, and the caller hears of those that failed.
    hooks::run_all(poststop, &record, Status::Stopped);
    Ok(())
}

/// Waits until a guest that goes on has done with a container, so that its id can be used again at once. Whether it answers.
fn forgotten(directory: &Directory, id: &str) -> bool {
    let began = Instant::now();
    while began.elapsed() < DEATH_LIMIT {
        match client::ask(&directory.socket(), &Request::Delete { id: id.to_owned() }) {
            Err(Error::Guest { kind: ErrorKind::WrongState, .. }) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(Error::Vm(_) | Error::VmGone) => return false,
            _ => return true,
        }
    }
    true
}

/// Removes what nobody will ask for any more: containers that have stopped and whose bundle is gone, because their caller was
/// killed before it could delete them.
fn collect(root: &Path) {
    for (directory, record) in state::all(root) {
        let config = record.config.clone().unwrap_or_else(|| record.bundle.join("config.json"));
        if directory.status(&record) == Status::Stopped && !config.exists() {
            let _ = delete(root, &record.id, true);
        }
    }
}

/// Removes an earlier container of an id that has stopped and whose conmon was killed: podman starts such a container again
/// without deleting it first.
fn give_way(root: &Path, id: &str) {
    if let Ok((directory, record)) = find(root, id)
        && record.is_abandoned()
        && directory.status(&record) == Status::Stopped
    {
        let _ = delete(root, id, true);
    }
}

fn freeze(root: &Path, id: &str, frozen: bool) -> Result<(), Error> {
    let (directory, record) = find(root, id)?;
    match (directory.status(&record), frozen) {
        (Status::Stopped | Status::Creating, _) => return Err(Error::NotRunning),
        (Status::Paused, true) => return Err(Error::State("container is paused already".into())),
        (Status::Paused, false) | (_, true) => {}
        (_, false) => return Err(Error::State("container is not paused".into())),
    }
    let ask = |frozen| client::ask(&directory.socket(), &Request::Freeze { id: id.to_owned(), frozen });
    if let Err(error) = until_done(|| ask(frozen), STOP_LIMIT) {
        // Those that did stop go on, as nobody knows of a container that is half paused.
        if frozen {
            let _ = ask(false);
        }
        return Err(error);
    }
    directory.mark("paused", frozen)
}

/// How long a container's processes may take to stop, as under runc.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Asks until all the container's processes stand still. The guest does not wait for them: it serves the pod's other containers.
fn until_done(mut ask: impl FnMut() -> Result<Reply, Error>, limit: Duration) -> Result<(), Error> {
    let (began, mut pause) = (Instant::now(), Duration::from_millis(1));
    while let Reply::Stopping = ask()? {
        if began.elapsed() > limit {
            return Err(Error::State(format!(
                "the container's processes do not all stop within {} s",
                limit.as_secs()
            )));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pid::Pid;

    #[test]
    fn pause_waits_until_all_processes_stand_still_and_not_for_ever() {
        let after = |count: u32, limit| {
            let mut left = count;
            let asked = until_done(
                || {
                    left = left.saturating_sub(1);
                    Ok(if left > 0 { Reply::Stopping } else { Reply::Done })
                },
                limit,
            );
            (asked.map_err(|e| e.to_string()), left)
        };
        assert_eq!(after(4, STOP_LIMIT), (Ok(()), 0));
        let (said, left) = after(u32::MAX, Duration::from_millis(20));
        assert!(said.unwrap_err().contains("do not all stop") && left > 0);
        assert!(until_done(|| Err(Error::NotRunning), STOP_LIMIT).is_err());
    }

    #[test]
    fn what_stopped_is_collected_only_when_its_bundle_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), "{}").unwrap();
        let gone = Pid { pid: i32::MAX, start: 1 };
        let me = Pid::of(std::process::id() as i32).unwrap();
        for (id, kept, stub) in [("kept", true, gone), ("orphan", false, gone), ("alive", false, me)] {
            let directory = Directory::of(root.path(), id).unwrap();
            directory.create().unwrap();
            let record = serde_json::json!({
                "id": id, "oci_version": "1.0.2", "rootfs": "/", "annotations": {}, "created": "", "cgroup": null,
                "bundle": if kept { bundle.path() } else { Path::new("/no/such/bundle") }, "stub": stub, "vmm": gone,
            });
            directory.write(&serde_json::from_value(record).unwrap()).unwrap();
        }
        collect(root.path());
        let left: Vec<_> = state::all(root.path()).into_iter().map(|(_, record)| record.id).collect();
        assert_eq!(left, ["alive", "kept"]);
    }
}
