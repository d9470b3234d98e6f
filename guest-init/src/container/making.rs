//! PID 1's side of the conversation with a process on its way to its program.
//!
//! Owns: what the process may say, in which order, and what follows from it. Does not own: waiting. What a container decides (its hooks,
//! a file system that it serves itself, a signal) may hold such a process for as long as it likes, and PID 1 has others to serve.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use coffer_protocol::ErrorKind;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, send};

use super::{Cgroup, ContainerError, process::system, user};
use crate::stdio::{Stdio, unblock};

/// Longest message of a child.
const LONGEST: usize = 4096;

/// What a child says: one byte of kind, then text.
pub(super) mod message {
    /// Up to its program, which runs once PID 1 says so. With the terminal, if it has one.
    pub(in super::super) const READY: u8 = b'r';
    pub(in super::super) const PID: u8 = b'p';
    /// In a new user namespace, whose maps are to be written.
    pub(in super::super) const MAP: u8 = b'm';
    /// With the notification socket.
    pub(in super::super) const NOTIFY: u8 = b's';
    /// Its hooks have run: the socket's end is the program's beginning, which closes it.
    pub(in super::super) const LAST: u8 = b'l';
    pub(in super::super) const NOT_FOUND: u8 = b'n';
    pub(in super::super) const NOT_EXECUTABLE: u8 = b'x';
    pub(in super::super) const FAILED: u8 = b'f';
}

/// How far a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It makes its namespaces, mounts and all that.
    Made,
    /// It waits to be let go.
    Waits,
    /// It was let go: hooks may run.
    Goes,
    /// It is its program.
    Runs,
}

/// A process that is not its program yet.
#[derive(Debug)]
pub struct Making {
    socket: OwnedFd,
    /// In PID 1's namespace. A further process's is not known before it was said.
    pid: Option<i32>,
    /// Whom PID 1 made, where that is not the process itself.
    middle: Option<i32>,
    stage: Stage,
    ready: bool,
    last: bool,
    stdio: Stdio,
    /// Of its user namespace.
    maps: Option<user::Maps>,
}

enum Heard {
    Nothing,
    Message(u8, String, Option<OwnedFd>),
    End,
}

impl Making {
    /// Of a container's first process.
    pub(super) fn first(socket: OwnedFd, pid: i32, stdio: Stdio, maps: Option<user::Maps>) -> Self {
        Self { maps, ..Self::of(socket, Some(pid), None, stdio) }
    }

    /// Of a further one, which is this one's child.
    pub(super) fn further(socket: OwnedFd, middle: i32, stdio: Stdio) -> Self {
        Self::of(socket, None, Some(middle), stdio)
    }

    fn of(socket: OwnedFd, pid: Option<i32>, middle: Option<i32>, stdio: Stdio) -> Self {
        Self { socket, pid, middle, stage: Stage::Made, ready: false, last: false, stdio, maps: None }
    }

    /// Its number, once it is known.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Its descriptors, to be taken once.
    pub(crate) fn take_stdio(&mut self) -> Stdio {
        std::mem::take(&mut self.stdio)
    }

    /// Takes what it says. Does not wait: [`Self::as_fd`] can be read when there is something.
    ///
    /// # Errors
    /// [`ContainerError`], of kind `NotFound` or `NotExecutable` for the program; the process ends then.
    pub fn hear(&mut self) -> Result<Stage, ContainerError> {
        loop {
            match (receive(&self.socket)?, self.stage) {
                (Heard::Nothing, _) => return Ok(self.stage),
                (Heard::End, Stage::Goes) if self.last => {
                    self.stage = Stage::Runs;
                    return Ok(self.stage);
                }
                (Heard::End, _) => {
                    let pid = self.pid.or(self.middle).unwrap_or_default();
                    return Err(ContainerError::new(
                        ErrorKind::Guest,
                        format!("process {pid} died while it was made"),
                    ));
                }
                (Heard::Message(kind, text, fd), stage) => self.message(stage, kind, text, fd)?,
            }
        }
    }

    fn message(
        &mut self,
        stage: Stage,
        kind: u8,
        text: String,
        fd: Option<OwnedFd>,
    ) -> Result<(), ContainerError> {
        match (stage, kind) {
            // A further process may be ready before the one in the middle has said its number.
            (Stage::Made, message::PID) => self.pid = text.parse().ok(),
            (Stage::Made, message::READY) => {
                if let Some(terminal) = &fd {
                    unblock(terminal).map_err(system("make the terminal non-blocking"))?;
                }
                self.stdio.terminal = fd;
                self.ready = true;
            }
            (Stage::Made, message::NOTIFY) => self.stdio.notify = fd,
            (Stage::Made, message::MAP) => {
                if let (Some(maps), Some(pid)) = (&self.maps, self.pid) {
                    maps.write(pid)?;
                }
                send(self.socket.as_raw_fd(), b"m", MsgFlags::MSG_NOSIGNAL)
                    .map_err(system("answer the child"))?;
            }
            (Stage::Goes, message::LAST) => self.last = true,
            (_, kind) => return Err(refusal(kind, text)),
        }
        if self.ready && self.pid.is_some() && self.stage == Stage::Made {
            self.stage = Stage::Waits;
        }
        Ok(())
    }

    /// Lets it go.
    ///
    /// # Errors
    /// [`ContainerError`] when it is gone.
    pub fn go(&mut self) -> Result<(), ContainerError> {
        let gone = |_| ContainerError::new(ErrorKind::WrongState, "the container's process has ended");
        send(self.socket.as_raw_fd(), b"g", MsgFlags::MSG_NOSIGNAL).map_err(gone)?;
        self.stage = Stage::Goes;
        Ok(())
    }

    /// Ends it if it is stopped, by a signal or by the freezing of its cgroup: its container may do that to it, and whoever wants the
    /// process would wait for nothing.
    ///
    /// # Errors
    /// [`ContainerError`] when it was.
    pub fn end_if_stopped(&self) -> Result<(), ContainerError> {
        match self.both().find(|pid| is_stopped(*pid) || Cgroup::stops(*pid)) {
            None => Ok(()),
            Some(pid) => {
                self.give_up();
                let message = format!("process {pid} was stopped in its container while it was made");
                Err(ContainerError::new(ErrorKind::WrongState, message))
            }
        }
    }

    /// Ends it.
    pub fn give_up(&self) {
        for pid in self.both().filter(|pid| is_child(*pid)) {
            // SAFETY: signals a child of this process that it has not reaped yet.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }

    fn both(&self) -> impl Iterator<Item = i32> {
        [self.pid, self.middle].into_iter().flatten()
    }
}

impl AsFd for Making {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether this number is that of a child of this process which it has not reaped yet.
fn is_child(pid: i32) -> bool {
    // SAFETY: siginfo_t is plain data for which zero is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the pointer is to a siginfo_t that outlives the call.
    unsafe { libc::waitid(libc::P_PID, pid as libc::id_t, &raw mut info, flags) == 0 }
}

/// By a signal (proc(5), the third field of `/proc/PID/stat`).
fn is_stopped(pid: i32) -> bool {
    let text = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.rsplit_once(')')
        .is_some_and(|(_, after)| matches!(after.trim_start().chars().next(), Some('T' | 't')))
}

/// What is there now of what a child says, and the descriptor that came with it.
fn receive(socket: &OwnedFd) -> Result<Heard, ContainerError> {
    let mut bytes = [0; LONGEST];
    let mut space = nix::cmsg_space!(RawFd);
    let (count, fd) = loop {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags) {
            Ok(received) => {
                let fds = received.cmsgs().ok().and_then(|mut list| match list.next() {
                    Some(ControlMessageOwned::ScmRights(fds)) => fds.first().copied(),
                    _ => None,
                });
                break (received.bytes, fds);
            }
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => return Ok(Heard::Nothing),
            // It ended with something of ours unread.
            Err(nix::Error::ECONNRESET) => return Ok(Heard::End),
            Err(error) => return Err(ContainerError::guest("hear a child", io::Error::from(error))),
        }
    };
    // SAFETY: the kernel made this descriptor for us with the message.
    let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(match bytes[..count].split_first() {
        Some((kind, text)) => Heard::Message(*kind, String::from_utf8_lossy(text).into_owned(), fd),
        None => Heard::End,
    })
}

fn refusal(kind: u8, text: String) -> ContainerError {
    let kind = match kind {
        message::NOT_FOUND => ErrorKind::NotFound,
        message::NOT_EXECUTABLE => ErrorKind::NotExecutable,
        _ => ErrorKind::Guest,
    };
    ContainerError::new(kind, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::process::{fork, socket_pair};
    use nix::{
        sys::{
            signal::Signal,
            socket::recv,
            wait::{WaitPidFlag, WaitStatus, waitpid},
        },
        unistd::Pid,
    };

    fn child(socket: OwnedFd, pid: i32) -> Making {
        Making::first(socket, pid, Stdio::default(), None)
    }

    #[test]
    fn a_child_that_is_stopped_in_its_container_is_ended() {
        let (ours, theirs) = socket_pair().unwrap();
        match fork(0, None, libc::SIGCHLD).unwrap() {
            None => {
                // SAFETY: stops this process, then ends it without more ado.
                unsafe {
                    libc::raise(libc::SIGSTOP);
                    libc::_exit(0)
                }
            }
            Some(pid) => {
                drop(theirs);
                let mut child = child(ours, pid);
                let number = Pid::from_raw(pid);
                waitpid(number, Some(WaitPidFlag::WUNTRACED)).unwrap();
                // The other end is open in the child as long as that lives.
                assert_eq!(child.hear(), Ok(Stage::Made));
                let message = child.end_if_stopped().unwrap_err().message;
                assert!(message.contains("was stopped in its container"), "{message}");
                let ended = waitpid(number, None).unwrap();
                assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{ended:?}");
                // Its number may be anybody's now.
                assert!(!is_child(pid));
            }
        }
    }

    #[test]
    fn the_end_of_the_socket_is_the_program_after_the_last_word_and_death_before() {
        for (said, wanted) in [(&b"l"[..], true), (b"", false)] {
            let (ours, theirs) = socket_pair().unwrap();
            let say = |bytes: &[u8]| {
                if !bytes.is_empty() {
                    send(theirs.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
                }
            };
            let mut making = Making::further(ours, i32::MAX, Stdio::default());
            assert_eq!(making.hear(), Ok(Stage::Made));
            say(b"r");
            assert_eq!(making.hear(), Ok(Stage::Made), "its number is not known yet");
            say(b"p4711");
            assert_eq!((making.hear(), making.pid()), (Ok(Stage::Waits), Some(4711)));
            making.go().unwrap();
            assert_eq!(making.hear(), Ok(Stage::Goes));
            assert_eq!(recv(theirs.as_raw_fd(), &mut [0], MsgFlags::empty()), Ok(1));
            say(said);
            drop(theirs);
            match making.hear() {
                Ok(stage) => assert!(wanted && stage == Stage::Runs),
                Err(error) => assert!(!wanted && error.message.contains("died while"), "{error}"),
            }
        }
    }
}
