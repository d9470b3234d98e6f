//! The pod's containers and their processes: made, started, signalled, reaped, forgotten.
//!
//! Owns: a container's states and which request fits which. Does not own: how a process is made (`container`), the connection that it
//! belongs to (`session`).

use std::io;

use coffer_layout::mark;
use coffer_protocol::{
    CreateContainer, Ended, ErrorKind, Exec, Exit, NamespaceKind, Request, SignalTarget, signal,
};
use oci_spec::runtime::Spec;
use serde_json::Value;

use super::{
    Server,
    beginning::{As, Beginning},
    beside::{Beside, Job, open},
};
use crate::{
    boot,
    confidential::Confidential,
    container::{self, Cgroup, ContainerError, Files, Making, NotifySocket},
    image::{self, Unpacked},
    session::Streams,
    stdio::Process,
};

/// A container, from its making to its end.
pub(super) struct Container {
    pub(super) pid: i32,
    spec: Spec,
    pub(super) cgroup: Cgroup,
    /// Until it is started.
    making: Option<Making>,
    pub(super) ended: bool,
    /// What its verified image wants in place of `TERM`.
    stop_signal: Option<u32>,
    /// What ended it before it was started.
    ended_by: Option<u32>,
}

/// Signals that can be caught and end what waits to be started, as they end `runc init`. The kernel drops them: it is the first process of its
/// namespace, and has no handlers.
const ENDING: [i32; 5] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGABRT, libc::SIGTERM];

impl Container {
    /// Whether this signal ended it, as it waits to be started.
    fn ends_waiting(&mut self, sent: u32) -> io::Result<bool> {
        let ends = self.making.is_some() && ENDING.iter().any(|signal| *signal as u32 == sent);
        if ends {
            send_signal(self.pid, libc::SIGKILL as u32)?;
            self.ended_by = Some(sent);
        }
        Ok(ends)
    }

    /// The signal that its first process gets for what the host sends.
    pub(super) fn signal(&self, sent: u32) -> u32 {
        if sent == signal::TERM { self.stop_signal.unwrap_or(sent) } else { sent }
    }
}

/// A container whose first process is being made.
pub(super) struct New {
    spec: Spec,
    cgroup: Cgroup,
    stop_signal: Option<u32>,
}

pub(super) fn image_error(error: &image::ImageError) -> ContainerError {
    ContainerError::new(ErrorKind::Guest, error.to_string())
}

pub(super) fn no_container(id: &str) -> ContainerError {
    ContainerError::new(ErrorKind::NoContainer, format!("container {id:?} does not exist"))
}

impl Server {
    pub(super) fn get(&self, id: &str) -> Result<&Container, ContainerError> {
        self.containers.get(id).ok_or_else(|| no_container(id))
    }

    /// Begins to make a container, or to unpack its image. The answer comes when that has ended.
    pub(super) fn create(&mut self, key: u64, create: CreateContainer) -> Result<(), ContainerError> {
        let id = create.id.clone();
        if !container::is_id(&id) {
            return Err(ContainerError::new(ErrorKind::Invalid, format!("invalid container ID {id:?}")));
        }
        if self.containers.contains_key(&id) || self.is_made(&id) {
            return Err(ContainerError::new(
                ErrorKind::WrongState,
                format!("container {id:?} exists already"),
            ));
        }
        if let Some(source) = &create.image {
            self.confidential()?;
            let image = self.images.unpack(&id, source).map_err(|e| image_error(&e))?;
            self.beside = Some(Beside::new(key, Job::Image { create, image }));
            return Ok(());
        }
        self.make(key, create, None)
    }

    /// Begins to make a container, whose image is there if it has one.
    pub(super) fn make(
        &mut self,
        key: u64,
        create: CreateContainer,
        unpacked: Option<Unpacked>,
    ) -> Result<(), ContainerError> {
        let id = create.id.clone();
        // What was unpacked and opened for one that is not made would stay for the pod's life.
        self.open(key, create, unpacked).inspect_err(|_| self.clear(&id))
    }

    /// Has what is sealed of an allowed container opened first, by a thread.
    fn open(
        &mut self,
        key: u64,
        mut create: CreateContainer,
        unpacked: Option<Unpacked>,
    ) -> Result<(), ContainerError> {
        let stop_signal = self.allow(&mut create, unpacked)?;
        let Some(sealed) = self.confidential()?.sealed(&create.spec)? else {
            return self.launch(key, create, stop_signal);
        };
        let (id, mut spec) = (create.id.clone(), create.spec.take());
        let opening = open(move || sealed.open(&id, &mut spec).map(|()| spec))?;
        self.beside = Some(Beside::new(key, Job::Container { create, stop_signal, opening }));
        Ok(())
    }

    /// Begins to make a container of what may run, with its secrets.
    pub(super) fn launch(
        &mut self,
        key: u64,
        create: CreateContainer,
        stop_signal: Option<u32>,
    ) -> Result<(), ContainerError> {
        let CreateContainer { id, mut spec, window, binds: _, shared, image: _, notify, streams } = create;
        let confidential = self.confidential()?;
        confidential.show_credentials(&mut spec);
        let only_there = confidential.has_owner();
        let notify = notify.map(|path| NotifySocket { path, only_there });
        container::prepare_shared_memory(&mut spec)?;
        let spec = container::parse_spec(spec)?;
        let shared = shared
            .iter()
            .map(|s| match self.get(&s.container)? {
                // Its process's number may be another's by now.
                other if other.ended => {
                    let message =
                        format!("container {:?}, whose namespaces are wanted, has ended", s.container);
                    Err(ContainerError::new(ErrorKind::WrongState, message))
                }
                other => container::Shared::of(other.pid, s.kind),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let cgroup = Cgroup::create(&id)?;
        let made = (|| {
            if let Some(resources) = spec.linux().as_ref().and_then(|l| l.resources().as_ref()) {
                cgroup.apply(resources)?;
                cgroup.allow_devices(resources)?;
            }
            container::enter_volumes(&spec);
            container::launch(&id, &spec, &cgroup, &shared, &Files { window, streams, notify })
        })();
        self.had_container = true;
        let making = made.inspect_err(|_| cgroup.remove())?;
        let new = As::First(Box::new(New { spec, cgroup, stop_signal }));
        self.beginnings.insert(key, Beginning::new(id, new, making));
        Ok(())
    }

    /// A container's first process waits to be let go.
    pub(super) fn created(
        &mut self,
        key: u64,
        id: String,
        new: New,
        mut making: Making,
    ) -> Result<(), ContainerError> {
        let New { spec, cgroup, stop_signal } = new;
        let pid = making.pid().unwrap_or_default();
        self.attach(key, &id, Process::new(pid, making.take_stdio()))?;
        let making = Some(making);
        let container = Container { pid, spec, cgroup, making, ended: false, stop_signal, ended_by: None };
        self.containers.insert(id, container);
        Ok(())
    }

    /// Forgets a container that does not come to be.
    pub(super) fn undo(&mut self, id: &str, new: &New) {
        new.cgroup.remove();
        self.clear(id);
    }

    /// From what the host sent to what may run: the image's words put in, the owner asked. The stop signal of the image.
    fn allow(
        &mut self,
        create: &mut CreateContainer,
        unpacked: Option<Unpacked>,
    ) -> Result<Option<u32>, ContainerError> {
        let CreateContainer { id, spec, shared, notify, .. } = create;
        // Of what the host sent; the owner's words come first.
        let places = container::check_places(spec);
        // With another container's processes it has none to itself, and the owner's policy is not told that it does.
        if shared.iter().any(|s| s.kind == NamespaceKind::Pid)
            && let Some(list) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut)
        {
            list.retain(|namespace| namespace["type"] != "pid");
        }
        let (mut stop_signal, mut images_signal) = (None, None);
        let source = create.image.as_ref().filter(|_| unpacked.is_some());
        if let (Some(source), Some(unpacked)) = (source, unpacked) {
            stop_signal = unpacked.stop_signal(spec);
            images_signal = unpacked.images_stop_signal();
            let hosts_process = self.confidential()?.allows_host_process(id, spec, source);
            unpacked.apply(spec, hosts_process).map_err(|e| image_error(&e))?;
        }
        let confidential = self.confidential()?;
        confidential.check_container(id, spec, source, shared)?;
        confidential.remember_stop_signal(id, images_signal);
        places?;
        if let Some(path) = notify {
            confidential.check_notify(id, path, spec)?;
        }
        if let Some(process) = spec.get_mut("process") {
            confidential.forbid_cores(process);
        }
        Ok(stop_signal)
    }

    /// Forgets the image and the secrets of a container that is not, or no longer.
    pub(super) fn clear(&mut self, id: &str) {
        self.images.remove(id);
        if let Some(confidential) = &mut self.confidential {
            confidential.forget(id);
        }
    }

    /// Lets a container's process go. The answer comes when its hooks have run and it is its program.
    pub(super) fn start(&mut self, key: u64, id: String) -> Result<(), ContainerError> {
        let container = self.containers.get_mut(&id).ok_or_else(|| no_container(&id))?;
        let wrong = |what: &str| {
            ContainerError::new(ErrorKind::WrongState, format!("cannot start a container that has {what}"))
        };
        if container.ended {
            return Err(wrong("stopped"));
        }
        let mut making = container.making.take().ok_or_else(|| wrong("been started"))?;
        self.had_start = true;
        boot::tell(mark::CONTAINER_STARTED);
        making.go()?;
        self.beginnings.insert(key, Beginning::new(id, As::Started, making));
        Ok(())
    }

    /// Gives a process to its connection, with the streams that the owner's policy allows.
    pub(super) fn attach(&mut self, key: u64, id: &str, process: Process) -> Result<(), ContainerError> {
        let confidential = self.confidential()?;
        let streams =
            Streams { stdin: confidential.allows_stdin(id), output: confidential.allows_output(id) };
        if let Some(session) = self.sessions.get_mut(&key) {
            session.attach(id, process, streams);
        }
        Ok(())
    }

    /// Begins to make one more process of a container. The answer comes when it is its program.
    pub(super) fn exec(&mut self, key: u64, mut exec: Exec) -> Result<(), ContainerError> {
        self.runs(&exec.id)?;
        let confidential = self.confidential()?;
        confidential.forbid_cores(&mut exec.process);
        let Some(sealed) = confidential.sealed_process(&exec.process)? else {
            return self.further(key, exec);
        };
        let mut process = exec.process.take();
        let opening = open(move || sealed.open_process(&mut process).map(|()| process))?;
        self.beside = Some(Beside::new(key, Job::Process { exec, opening }));
        Ok(())
    }

    /// What a further process does not say of its rights and limits is as the container has it. Of limits runc has its
    /// caller's own there, and none of the host's are here: what neither says is PID 1's.
    pub(super) fn complete(&self, exec: &mut Exec) {
        let first = self.containers.get(&exec.id).and_then(|container| container.spec.process().as_ref());
        let first = first.and_then(|process| serde_json::to_value(process).ok());
        let (Some(Value::Object(first)), Some(process)) = (first, exec.process.as_object_mut()) else {
            return;
        };
        if first.get("noNewPrivileges") == Some(&Value::Bool(true))
            && self.confidential.as_ref().is_some_and(Confidential::has_owner)
        {
            // A caller may take that away from a further process, and with it would gain what the container was kept from.
            process.insert("noNewPrivileges".into(), true.into());
        }
        for name in ["capabilities", "rlimits", "oomScoreAdj"] {
            let is_said =
                |value: &Value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty());
            if let (Some(value), false) = (first.get(name), process.get(name).is_some_and(is_said)) {
                process.insert(name.to_owned(), value.clone());
            }
        }
    }

    /// A container that further processes can join.
    fn runs(&self, id: &str) -> Result<&Container, ContainerError> {
        let container = self.get(id)?;
        if container.ended {
            return Err(ContainerError::new(ErrorKind::WrongState, "cannot exec in a stopped container"));
        }
        // It would be stopped before it is made.
        if container.cgroup.is_frozen() {
            return Err(ContainerError::new(ErrorKind::WrongState, "cannot exec in a paused container"));
        }
        Ok(container)
    }

    /// Begins to make one more process, whose secrets are open.
    pub(super) fn further(&mut self, key: u64, exec: Exec) -> Result<(), ContainerError> {
        let container = self.runs(&exec.id)?;
        let process: oci_spec::runtime::Process = serde_json::from_value(exec.process)
            .map_err(|e| ContainerError::new(ErrorKind::Invalid, format!("process: {e}")))?;
        container::check_process(&process)?;
        let files = Files { window: exec.window, streams: exec.streams, notify: None };
        let making = container::exec(
            &process,
            container.pid,
            &container.cgroup,
            &container.spec,
            exec.cgroup.as_deref(),
            &files,
        )?;
        self.beginnings.insert(key, Beginning::new(exec.id, As::Further, making));
        Ok(())
    }

    pub(super) fn signal(&mut self, target: &SignalTarget, signal: u32) -> Result<(), ContainerError> {
        let (SignalTarget::Init(id) | SignalTarget::All(id)) = target;
        let container = self.containers.get_mut(id).ok_or_else(|| no_container(id))?;
        if container.ended {
            return Err(ContainerError::new(ErrorKind::WrongState, "container not running"));
        }
        let failed = |e| ContainerError::guest(&format!("signal {signal}"), e);
        if container.ends_waiting(signal).map_err(failed)? {
            return Ok(());
        }
        let sent = match target {
            SignalTarget::Init(_) => send_signal(container.pid, container.signal(signal)),
            // The kernel leaves out none that is made meanwhile.
            SignalTarget::All(_) if signal == libc::SIGKILL as u32 && container.cgroup.kill().is_ok() => {
                Ok(())
            }
            SignalTarget::All(_) => send_to_all(&container.cgroup.processes(), signal),
        };
        sent.map_err(failed)
    }

    /// Signals a process for its stub, whose word is the host's like any other: what the owner's policy denies is dropped.
    pub(super) fn hand_on(&mut self, pid: i32, id: String, sent: u32) {
        let first = self.containers.get(&id).filter(|container| container.pid == pid);
        let signal = first.map_or(sent, |container| container.signal(sent));
        let asked = Request::Signal { target: SignalTarget::Init(id), signal: sent };
        match self.confidential().and_then(|pod| pod.check(&asked)) {
            // It may have ended meanwhile.
            Ok(()) => {
                let first = self.containers.values_mut().find(|container| container.pid == pid);
                if !first.is_some_and(|container| container.ends_waiting(sent).unwrap_or(true)) {
                    let _ = send_signal(pid, signal);
                }
            }
            Err(error) => boot::complain(&format!("coffer-init: {}", error.message)),
        }
    }

    /// Takes the status of every child that ended, ours or an orphan's.
    pub(super) fn reap(&mut self) {
        loop {
            let mut status = 0;
            // nix would take a status of a realtime signal from the kernel, and then say that there is no such signal.
            // SAFETY: the pointer is to an int that outlives the call.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                break;
            }
            if let Some(exit) = exit(status) {
                self.end(pid, exit);
            }
        }
    }

    /// A process has ended. Whether its container ran out of memory is told with the first one's end, whichever process the kernel has
    /// chosen to kill, and whatever became of this one: as conmon tells it of a cgroup of the host's.
    fn end(&mut self, pid: i32, exit: Exit) {
        let mut ended = Ended::from(exit);
        if let Some(container) = self.containers.values_mut().find(|c| c.pid == pid && !c.ended) {
            container.ended = true;
            if let Some(signal) = container.ended_by.and_then(|signal| u8::try_from(signal).ok()) {
                ended.exit = Exit::Signal(signal);
            }
            ended.oom_kills = container.cgroup.oom_kills();
        }
        let owner = self
            .sessions
            .values_mut()
            .filter_map(|s| s.process.as_mut())
            .find(|p| p.pid == pid && p.ended.is_none());
        match owner {
            Some(process) => process.ended = Some(ended),
            None => self.ended_early(pid, exit),
        }
    }

    /// Gives back what a container that has ended had.
    pub(super) fn forget(&mut self, id: &str) {
        if let Some(container) = self.containers.remove(id) {
            container.cgroup.remove();
            self.clear(id);
        }
    }
}

/// What wait(2) says of a process that has ended.
fn exit(status: i32) -> Option<Exit> {
    if libc::WIFEXITED(status) {
        Some(Exit::Code(libc::WEXITSTATUS(status) as u8))
    } else {
        libc::WIFSIGNALED(status).then(|| Exit::Signal(libc::WTERMSIG(status) as u8))
    }
}

/// Signals all of these; one that has ended since they were listed needs none.
fn send_to_all(pids: &[u32], signal: u32) -> io::Result<()> {
    for pid in pids {
        match send_signal(*pid as i32, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn send_signal(pid: i32, signal: u32) -> io::Result<()> {
    let signal =
        i32::try_from(signal).ok().filter(|s| (0..=64).contains(s)).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: sends a signal to a child of ours that was not reaped yet.
    if unsafe { libc::kill(pid, signal) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
        process::Command,
    };

    use super::*;
    use crate::{session::Session, stdio::Stdio};

    /// `--init` reports its child's end as its own, and a shell that of its last command; a killed worker may be nobody's last.
    #[test]
    fn a_container_whose_memory_ran_out_says_so_whichever_process_was_killed() {
        for (events, exit, oom_kills) in [
            ("oom 1\noom_kill 1\n", Exit::Signal(9), 1),
            ("oom 1\noom_kill 1\n", Exit::Code(137), 1),
            ("oom 4\noom_kill 2\n", Exit::Code(0), 2),
            ("oom 3\noom_kill 0\n", Exit::Signal(9), 0),
        ] {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join("memory.events"), events).unwrap();
            let listener = UnixListener::bind(directory.path().join("s")).unwrap();
            let mut server = Server::new(listener.into()).unwrap();
            for (key, pid) in [(0, 4711), (1, 4712)] {
                let mut session = Session::new(UnixStream::pair().unwrap().0.into());
                session.process = Some(Process::new(pid, Stdio::default()));
                server.sessions.insert(key, session);
            }
            let first = Container {
                pid: 4711,
                spec: Spec::default(),
                cgroup: Cgroup::at(directory.path()),
                making: None,
                ended: false,
                stop_signal: None,
                ended_by: None,
            };
            server.containers.insert("c".into(), first);
            let told = |server: &Server, key| server.sessions[&key].process.as_ref().unwrap().ended;
            // One of `exec`, whose end is not the container's.
            server.end(4712, exit);
            assert_eq!(told(&server, 1), Some(exit.into()), "{events} {exit:?}");
            server.end(4711, exit);
            assert_eq!(told(&server, 0), Some(Ended { exit, oom_kills }), "{events} {exit:?}");
        }
    }

    #[test]
    fn one_that_has_ended_keeps_no_signal_from_the_others() {
        let sleep = || Command::new("sleep").arg("1000").spawn().unwrap();
        let (mut gone, mut there) = (sleep(), sleep());
        gone.kill().unwrap();
        gone.wait().unwrap();
        send_to_all(&[gone.id(), there.id()], 15).unwrap();
        assert_eq!(there.wait().unwrap().signal(), Some(15));
        assert!(send_to_all(&[std::process::id()], 65).is_err());
    }
}
