//! The control protocol's guest side: one loop. It is PID 1's only thread but while an image is unpacked or a KBS asked.
//!
//! Owns: connections, waiting, which frame goes where, the decision that the pod is over. Does not own: what a request does
//! (`requests`), the pod's containers and their states (`containers`), processes that are not their programs yet (`beginning`), what waits
//! for an image or a KBS (`beside`).

mod beginning;
mod beside;
mod containers;
mod requests;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use beginning::Beginning;
use beside::Beside;
use coffer_protocol::{ErrorKind, Frame, Kind, Reply, Request};
use containers::Container;
use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        socket::{SockFlag, SockaddrStorage, accept4, getpeername},
    },
    unistd::Pid,
};
use thiserror::Error;

use crate::{
    confidential::Confidential,
    image::Images,
    session::{Part, Session},
    stdio::unblock,
};

/// Most connections at once; the host's further ones are closed.
const MOST_SESSIONS: usize = 512;

/// Nobody but the host may ask, whatever ways the kernel has for a container to reach this machine's own sockets.
fn is_of_the_host(peer: &OwnedFd) -> bool {
    let address = getpeername::<SockaddrStorage>(peer.as_raw_fd());
    match address.as_ref().map(SockaddrStorage::as_vsock_addr) {
        Ok(Some(address)) => address.cid() == libc::VMADDR_CID_HOST,
        // No such socket: a test's, or the stand-in's.
        Ok(None) => true,
        Err(_) => false,
    }
}

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

/// The server.
pub struct Server {
    listener: OwnedFd,
    signals: SignalFd,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
    containers: BTreeMap<String, Container>,
    /// By the connection that waits for the answer.
    beginnings: BTreeMap<u64, Beginning>,
    /// From the first request on, which sets the pod up.
    confidential: Option<Confidential>,
    images: Images,
    beside: Option<Beside>,
    /// Requests that wait for its end, as they came.
    waiting: Vec<(u64, Request)>,
    /// A container was there once: without one now the pod is over.
    had_container: bool,
    /// A container's process was let go: what is in the machine may be its doing.
    had_start: bool,
    over: bool,
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
            beginnings: BTreeMap::new(),
            confidential: None,
            images: Images::default(),
            beside: None,
            waiting: Vec::new(),
            had_container: false,
            had_start: false,
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
            // poll passes over what is no descriptor.
            entry(self.beside.as_ref().map_or(-1, Beside::fd), libc::POLLIN),
        ];
        let mut owners = Vec::new();
        for (key, session) in &self.sessions {
            for (part, fd, events) in session.interests() {
                owners.push((*key, part));
                waits.push(entry(fd, events));
            }
        }
        let begun: Vec<(u64, i32)> = self.beginnings().collect();
        waits.extend(begun.iter().map(|(_, fd)| entry(*fd, libc::POLLIN)));
        let patience = self.patience();
        // SAFETY: `waits` is a vector of valid entries of this length.
        let ready = unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, patience) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(at("poll")(error)) };
        }
        for ((key, part), wait) in owners.iter().zip(&waits[3..]) {
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
        // Behind their ends, so that one that has ended is not taken for one that goes on.
        for ((key, _), wait) in begun.iter().zip(&waits[3 + owners.len()..]) {
            if wait.revents != 0 {
                self.heard(*key);
            }
        }
        self.look();
        if waits[2].revents != 0 {
            self.beside_ended();
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
            if self.sessions.len() < MOST_SESSIONS && is_of_the_host(&fd) {
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
            let Some(session) = self.sessions.get_mut(&key).filter(|s| !s.paused) else { return };
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
        if frame.kind != Kind::Request || session.process.is_some() || session.finishing {
            let signalled = session.process_frame(frame);
            let of = session.process.as_ref().map(|process| process.pid).zip(signalled);
            if let Some((pid, sent)) = of {
                let id = session.container.clone();
                self.hand_on(pid, id, sent);
            }
            return;
        }
        match Request::from_payload(&frame.payload) {
            Ok(request) => self.ask(key, request),
            Err(error) => {
                session.reply(&Reply::Failed { kind: ErrorKind::Invalid, message: error.to_string() })
            }
        }
    }

    /// Closes what is done. A process whose host is gone goes too; a container's end closes its account.
    fn drop_finished(&mut self) {
        let done: Vec<u64> = self.sessions.iter().filter(|(_, s)| s.is_done()).map(|(k, _)| *k).collect();
        for key in done {
            let Some(session) = self.sessions.remove(&key) else { continue };
            self.give_up(key);
            self.not_wanted(key);
            let Some(process) = session.process else { continue };
            if process.ended.is_none() {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            // Its number may be another container's by now, when it has ended.
            if self.containers.get(&session.container).is_some_and(|c| c.pid == process.pid) {
                self.forget(&session.container);
            }
        }
        if self.had_container
            && self.containers.is_empty()
            && self.beginnings.is_empty()
            && self.beside.is_none()
            && self.sessions.values().all(|s| s.process.is_none() && !s.finishing)
        {
            self.over = true;
        }
    }
}

#[cfg(all(test, feature = "confidential"))]
mod tests {
    use std::{
        os::unix::{net::UnixListener, process::ExitStatusExt},
        process::Command,
    };

    use coffer_attestation::evidence::{Attesters, Sample};

    use super::*;

    #[test]
    fn a_connections_signals_are_the_owners_to_allow() {
        let directory = tempfile::tempdir().unwrap();
        let mut server = Server::new(UnixListener::bind(directory.path().join("s")).unwrap().into()).unwrap();
        let rules = "package agent_policy\nimport rego.v1\nSignalProcessRequest if input.signal == 15\n";
        let text = format!(
            "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''\n{rules}'''\n"
        );
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id() as i32;
        server.hand_on(pid, "c".into(), 9);
        server.confidential = Some(Confidential::with(Some(&text), Attesters::of(Sample)).unwrap());
        server.hand_on(pid, "c".into(), 9);
        server.hand_on(pid, "c".into(), 15);
        assert_eq!(child.wait().unwrap().signal(), Some(15));
    }
}
