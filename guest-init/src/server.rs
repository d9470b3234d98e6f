//! The control protocol's guest side: one thread, one loop.
//!
//! Owns: sessions, containers, reaping, the decision that the pod is over. Does not own: how a container is made.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use coffer_layout::mark;
use coffer_protocol::{
    CreateContainer, Ended, ErrorKind, Exec, Frame, Kind, Reply, Request, Sandbox, SignalTarget, VERSION,
    WindowSize, signal,
};
use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        socket::{SockFlag, accept4},
        time::TimeSpec,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    time::{ClockId, clock_settime},
    unistd::Pid,
};
use oci_spec::runtime::Spec;
use thiserror::Error;

use crate::{
    boot,
    confidential::Confidential,
    container::{self, Cgroup, ContainerError, Files, Sync},
    image::{self, Images, Room},
    network, random,
    session::{Part, Session, Streams},
    stdio::{Process, Stdio, unblock},
};

/// Most connections at once; the host's further ones are closed.
const MOST_SESSIONS: usize = 512;

/// The server cannot go on.
#[derive(Debug, Error)]
#[error("{stage}: {source}")]
pub struct ServerError {
    stage: &'static str,
    source: io::Error,
}

fn at<E: Into<io::Error>>(stage: &'static str) -> impl FnOnce(E) -> ServerError {
    move |e| ServerError { stage, source: e.into() }
}

struct Container {
    pid: i32,
    spec: Spec,
    cgroup: Cgroup,
    /// Until it is started.
    sync: Option<Sync>,
    ended: bool,
    /// What its verified image wants in place of `TERM`.
    stop_signal: Option<u32>,
}

impl Container {
    /// The signal that its first process gets for what the host sends.
    fn signal(&self, sent: u32) -> u32 {
        if sent == signal::TERM { self.stop_signal.unwrap_or(sent) } else { sent }
    }
}

/// The server.
pub struct Server {
    listener: OwnedFd,
    signals: SignalFd,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
    containers: BTreeMap<String, Container>,
    /// From the first request on, which sets the pod up.
    confidential: Option<Confidential>,
    images: Images,
    /// A container was there once: without one now the pod is over.
    had_container: bool,
    over: bool,
}

fn image_error(error: &image::ImageError) -> ContainerError {
    ContainerError::new(ErrorKind::Guest, error.to_string())
}

fn no_container(id: &str) -> ContainerError {
    ContainerError::new(ErrorKind::NoContainer, format!("container {id:?} does not exist"))
}

impl Server {
    /// Takes a listening socket.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn new(listener: OwnedFd) -> Result<Self, ServerError> {
        unblock(&listener).map_err(at("listen"))?;
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        set.thread_block().map_err(at("block SIGCHLD"))?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(at("wait for SIGCHLD"))?;
        Ok(Self {
            listener,
            signals,
            sessions: BTreeMap::new(),
            next_session: 0,
            containers: BTreeMap::new(),
            confidential: None,
            images: Images::default(),
            had_container: false,
            over: false,
        })
    }

    /// Serves until the pod is over.
    ///
    /// # Errors
    /// [`ServerError`] when waiting itself fails.
    pub fn run(&mut self) -> Result<(), ServerError> {
        while !self.over {
            self.turn()?;
        }
        Ok(())
    }

    /// Waits once and handles what came.
    fn turn(&mut self) -> Result<(), ServerError> {
        let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut waits = vec![
            entry(self.listener.as_raw_fd(), libc::POLLIN),
            entry(self.signals.as_raw_fd(), libc::POLLIN),
        ];
        let mut owners = Vec::new();
        for (key, session) in &self.sessions {
            for (part, fd, events) in session.interests() {
                owners.push((*key, part));
                waits.push(entry(fd, events));
            }
        }
        // SAFETY: `waits` is a vector of valid entries of this length.
        let ready = unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, -1) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(at("poll")(error)) };
        }
        for ((key, part), wait) in owners.iter().zip(&waits[2..]) {
            if wait.revents != 0 {
                self.handle(*key, *part, wait.revents);
            }
        }
        if waits[0].revents != 0 {
            self.accept();
        }
        if waits[1].revents != 0 {
            while let Ok(Some(_)) = self.signals.read_signal() {}
            self.reap();
        }
        for session in self.sessions.values_mut() {
            session.finish_process();
            session.write_host();
        }
        self.drop_finished();
        Ok(())
    }

    fn accept(&mut self) {
        use std::os::fd::FromRawFd;
        while let Ok(fd) =
            accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
        {
            // SAFETY: accept4 returned a new descriptor that nobody else has.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            if self.sessions.len() < MOST_SESSIONS {
                self.sessions.insert(self.next_session, Session::new(fd));
                self.next_session += 1;
            }
        }
    }

    fn handle(&mut self, key: u64, part: Part, events: i16) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let readable = events & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0;
        match part {
            Part::Host => {
                if readable {
                    session.read_host();
                    self.frames(key);
                }
            }
            Part::Stdin => session.feed_stdin(&[]),
            Part::Terminal if events & libc::POLLOUT != 0 => {
                session.feed_stdin(&[]);
                if readable {
                    session.read_output(part);
                }
            }
            Part::Further(number) => {
                if events & (libc::POLLOUT | libc::POLLERR | libc::POLLHUP) != 0 {
                    session.feed_stream(number, &[]);
                }
                if readable {
                    session.read_output(part);
                }
            }
            Part::Stdout | Part::Stderr | Part::Terminal | Part::Notify => session.read_output(part),
        }
    }

    fn frames(&mut self, key: u64) {
        loop {
            let Some(session) = self.sessions.get_mut(&key) else { return };
            match session.next_frame() {
                Ok(Some(frame)) => self.frame(key, &frame),
                Ok(None) => return,
                Err(_) => {
                    session.dead = true;
                    return;
                }
            }
        }
    }

    fn frame(&mut self, key: u64, frame: &Frame) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let word = || <[u8; 4]>::try_from(frame.payload.as_slice()).map(u32::from_le_bytes).ok();
        match (frame.kind, &session.process) {
            (Kind::Request, None) if !session.finishing => match Request::from_payload(&frame.payload) {
                Ok(request) => {
                    let reply = self
                        .request(key, request)
                        .unwrap_or_else(|e| Reply::Failed { kind: e.kind, message: e.message });
                    if let Some(session) = self.sessions.get_mut(&key) {
                        session.reply(&reply);
                    }
                }
                Err(error) => {
                    session.reply(&Reply::Failed { kind: ErrorKind::Invalid, message: error.to_string() })
                }
            },
            (Kind::StdinEnd, Some(_)) => session.end_stdin(),
            (Kind::StreamEnd, Some(_)) => session.end_stream(&frame.payload),
            (Kind::Signal, Some(process)) => {
                if let Some(sent) = word()
                    && process.ended.is_none()
                {
                    let first = self.containers.values().find(|container| container.pid == process.pid);
                    let _ = send_signal(process.pid, first.map_or(sent, |container| container.signal(sent)));
                }
            }
            (Kind::Resize, Some(process)) => {
                if let (Ok(size), Some(terminal)) =
                    (WindowSize::from_payload(&frame.payload), &process.stdio.terminal)
                {
                    container::set_window(terminal, size);
                }
            }
            // Out of order: this host is not one of ours.
            _ => session.dead = true,
        }
    }

    fn request(&mut self, key: u64, request: Request) -> Result<Reply, ContainerError> {
        let request = self.admit(request)?;
        match request {
            Request::Sandbox(sandbox) => {
                set_up(&sandbox)?;
                self.confidential()?.serve_workload()?;
            }
            Request::Network(wanted) => {
                network::apply(&wanted).map_err(|e| ContainerError::new(ErrorKind::Guest, e.to_string()))?
            }
            Request::Create(create) => self.create(key, *create)?,
            Request::Start { id } => self.start(&id)?,
            Request::Exec(exec) => self.exec(key, *exec)?,
            Request::Signal { target, signal } => self.signal(&target, signal)?,
            Request::Freeze { id, frozen } => {
                self.get(&id)?
                    .cgroup
                    .freeze(frozen)
                    .map_err(|e| ContainerError::guest("freeze the container", e))?;
            }
            Request::Update { id, resources } => {
                let resources = serde_json::from_value(resources)
                    .map_err(|e| ContainerError::new(ErrorKind::Invalid, format!("resources: {e}")))?;
                self.get(&id)?.cgroup.apply(&resources)?;
            }
            Request::Processes { id } => {
                return Ok(Reply::Processes { list: self.get(&id)?.cgroup.list() });
            }
            Request::Stats { id } => return Ok(Reply::Stats(Box::new(self.get(&id)?.cgroup.stats()))),
            Request::Delete { id } => {
                let container = self.containers.get(&id).ok_or_else(|| no_container(&id))?;
                if !container.ended {
                    return Err(ContainerError::new(
                        ErrorKind::WrongState,
                        format!("container {id:?} is running"),
                    ));
                }
                self.forget(&id);
            }
            Request::Shutdown => self.over = true,
        }
        Ok(Reply::Done)
    }

    /// Lets a request in: after the pod's setting up, and when the owner's policy allows it. The owner's word holds for the
    /// pod's life: a host that sends another is refused.
    fn admit(&mut self, request: Request) -> Result<Request, ContainerError> {
        if let Request::Sandbox(sandbox) = &request {
            check_version(sandbox)?;
            if self.confidential.is_some() {
                return Err(ContainerError::new(ErrorKind::WrongState, "the pod is set up already"));
            }
            if let Some(entropy) = &sandbox.entropy {
                // Before anything that draws a random number, a key above all.
                random::reseed(entropy)
                    .map_err(|e| ContainerError::guest("reseed the random number generator", e))?;
            }
            let mut confidential = Confidential::new(sandbox.initdata.as_deref())?;
            confidential.check(&request)?;
            confidential.ask_for_names(&sandbox.name_servers);
            let room = if sandbox.scratch { Room::Disk } else { Room::Memory };
            self.images = Images::new(confidential.owner()?, room);
            self.confidential = Some(confidential);
        } else if self.confidential.is_some() || !matches!(request, Request::Shutdown) {
            // A machine in which nothing is yet may be ended by anybody.
            self.confidential()?.check(&request)?;
        }
        Ok(request)
    }

    fn confidential(&mut self) -> Result<&mut Confidential, ContainerError> {
        let none = || ContainerError::new(ErrorKind::WrongState, "the pod is not set up");
        self.confidential.as_mut().ok_or_else(none)
    }

    fn get(&self, id: &str) -> Result<&Container, ContainerError> {
        self.containers.get(id).ok_or_else(|| no_container(id))
    }

    fn create(&mut self, key: u64, create: CreateContainer) -> Result<(), ContainerError> {
        let CreateContainer { id, mut spec, window, binds: _, shared, image, notify, streams } = create;
        if !container::is_id(&id) {
            return Err(ContainerError::new(ErrorKind::Invalid, format!("invalid container ID {id:?}")));
        }
        if self.containers.contains_key(&id) {
            return Err(ContainerError::new(
                ErrorKind::WrongState,
                format!("container {id:?} exists already"),
            ));
        }
        let mut stop_signal = None;
        if let Some(source) = &image {
            let unpacked = self.images.unpack(&id, source).map_err(|e| image_error(&e))?;
            stop_signal = unpacked.stop_signal(&spec);
            unpacked.apply(&mut spec).map_err(|e| image_error(&e))?;
        }
        let confidential = self.confidential()?;
        confidential.check_container(&id, &spec, image.as_ref())?;
        if notify.is_some() {
            confidential.check_notify(&id)?;
        }
        if let Some(process) = spec.get_mut("process") {
            confidential.unseal(process)?;
        }
        confidential.open_files(&id, &mut spec)?;
        container::prepare_shared_memory(&mut spec)?;
        let spec = container::parse_spec(spec)?;
        let shared = shared
            .iter()
            .map(|s| {
                let other = self.get(&s.container)?;
                container::Shared::of(other.pid, s.kind)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let cgroup = Cgroup::create(&id)?;
        let made = (|| {
            if let Some(resources) = spec.linux().as_ref().and_then(|l| l.resources().as_ref()) {
                cgroup.apply(resources)?;
            }
            container::launch(&id, &spec, &cgroup, &shared, &Files { window, streams, notify })
        })();
        self.had_container = true;
        let launched = match made {
            Ok(launched) => launched,
            Err(error) => {
                cgroup.remove();
                return Err(error);
            }
        };
        boot::tell(mark::CONTAINER_CREATED);
        self.attach(key, &id, launched.pid, launched.stdio)?;
        self.containers.insert(
            id,
            Container {
                pid: launched.pid,
                spec,
                cgroup,
                sync: Some(launched.sync),
                ended: false,
                stop_signal,
            },
        );
        Ok(())
    }

    fn start(&mut self, id: &str) -> Result<(), ContainerError> {
        let container = self.containers.get_mut(id).ok_or_else(|| no_container(id))?;
        let wrong = |what: &str| {
            ContainerError::new(ErrorKind::WrongState, format!("cannot start a container that has {what}"))
        };
        if container.ended {
            return Err(wrong("stopped"));
        }
        let sync = container.sync.take().ok_or_else(|| wrong("been started"))?;
        boot::tell(mark::CONTAINER_STARTED);
        sync.go()
    }

    /// Gives a process to its connection, with the streams that the owner's policy allows.
    fn attach(&mut self, key: u64, id: &str, pid: i32, stdio: Stdio) -> Result<(), ContainerError> {
        let confidential = self.confidential()?;
        let streams =
            Streams { stdin: confidential.allows_stdin(id), output: confidential.allows_output(id) };
        if let Some(session) = self.sessions.get_mut(&key) {
            session.attach(Process::new(pid, stdio), streams);
        }
        Ok(())
    }

    fn exec(&mut self, key: u64, mut exec: Exec) -> Result<(), ContainerError> {
        self.confidential()?.unseal(&mut exec.process)?;
        let container = self.get(&exec.id)?;
        if container.ended {
            return Err(ContainerError::new(ErrorKind::WrongState, "cannot exec in a stopped container"));
        }
        let process: oci_spec::runtime::Process = serde_json::from_value(exec.process)
            .map_err(|e| ContainerError::new(ErrorKind::Invalid, format!("process: {e}")))?;
        container::check_process(&process)?;
        let files = Files { window: exec.window, streams: exec.streams, notify: None };
        let launched = container::exec(&process, container.pid, &container.cgroup, &container.spec, &files)?;
        launched.sync.go()?;
        self.attach(key, &exec.id, launched.pid, launched.stdio)
    }

    fn signal(&self, target: &SignalTarget, signal: u32) -> Result<(), ContainerError> {
        let (SignalTarget::Init(id) | SignalTarget::All(id)) = target;
        let container = self.get(id)?;
        if container.ended {
            return Err(ContainerError::new(ErrorKind::WrongState, "container not running"));
        }
        let pids = match target {
            SignalTarget::Init(_) => vec![container.pid as u32],
            SignalTarget::All(_) => container.cgroup.processes(),
        };
        let signal = match target {
            SignalTarget::Init(_) => container.signal(signal),
            SignalTarget::All(_) => signal,
        };
        for pid in pids {
            send_signal(pid as i32, signal)
                .map_err(|e| ContainerError::guest(&format!("signal {signal}"), e))?;
        }
        Ok(())
    }

    /// Takes the status of every child that ended, ours or an orphan's.
    fn reap(&mut self) {
        loop {
            let (pid, mut ended) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), Ended::Exited(code as u8)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid.as_raw(), Ended::Signalled(signal as i32 as u8))
                }
                Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => break,
                Ok(_) | Err(_) => continue,
            };
            if let Some(container) = self.containers.values_mut().find(|c| c.pid == pid && !c.ended) {
                container.ended = true;
                if ended == Ended::Signalled(9) && container.cgroup.ran_out_of_memory() {
                    ended = Ended::OutOfMemory;
                }
            }
            let owner = self
                .sessions
                .values_mut()
                .filter_map(|s| s.process.as_mut())
                .find(|p| p.pid == pid && p.ended.is_none());
            if let Some(process) = owner {
                process.ended = Some(ended);
            }
        }
    }

    /// Closes what is done. A process whose host is gone goes too; a container's end closes its account.
    fn drop_finished(&mut self) {
        let done: Vec<u64> = self.sessions.iter().filter(|(_, s)| s.is_done()).map(|(k, _)| *k).collect();
        for key in done {
            let Some(session) = self.sessions.remove(&key) else { continue };
            let Some(process) = session.process else { continue };
            if process.ended.is_none() {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            let id = self.containers.iter().find(|(_, c)| c.pid == process.pid).map(|(id, _)| id.clone());
            if let Some(id) = id {
                self.forget(&id);
            }
        }
        if self.had_container
            && self.containers.is_empty()
            && self.sessions.values().all(|s| s.process.is_none() && !s.finishing)
        {
            self.over = true;
        }
    }

    fn forget(&mut self, id: &str) {
        if let Some(container) = self.containers.remove(id) {
            container.cgroup.remove();
            self.images.remove(id);
            if let Some(confidential) = &self.confidential {
                confidential.close_files(id);
            }
        }
    }
}

fn send_signal(pid: i32, signal: u32) -> io::Result<()> {
    let signal =
        i32::try_from(signal).ok().filter(|s| (0..=64).contains(s)).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: sends a signal to a child of ours that was not reaped yet.
    if unsafe { libc::kill(pid, signal) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check_version(sandbox: &Sandbox) -> Result<(), ContainerError> {
    if sandbox.version == VERSION {
        return Ok(());
    }
    let message = format!(
        "the host speaks protocol version {}, this image version {VERSION}: build both from one source",
        sandbox.version
    );
    Err(ContainerError::new(ErrorKind::Invalid, message))
}

/// What makes this pod itself. Nothing of it may happen before init is ready: a machine that is saved then, and started many times,
/// has no share, no random numbers that were given out, no name and no time of its own.
fn set_up(sandbox: &Sandbox) -> Result<(), ContainerError> {
    if let Err(error) = boot::mount_share() {
        // A guest without a share has no root file systems from the host; create says so.
        boot::complain(&format!("coffer-init: {error}"));
    }
    if let Some(name) = &sandbox.hostname {
        nix::unistd::sethostname(name).map_err(|e| ContainerError::guest("set the host name", e))?;
    }
    let time = TimeSpec::from_duration(Duration::from_nanos(sandbox.unix_time_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|e| ContainerError::guest("set the clock", e))?;
    network::apply(&sandbox.network).map_err(|e| ContainerError::new(ErrorKind::Guest, e.to_string()))
}
