//! Starting processes: clone, a socket between PID 1 and the child, stdio.
//!
//! Owns: what PID 1 does around `child`. The child tells over the socket that it is ready, or why not; PID 1 tells it
//! to go; the socket closes by itself when the program runs.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use coffer_protocol::{ErrorKind, MAX_STREAMS, NamespaceKind, STDIN_WINDOW, Stream, WindowSize};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, send, socketpair,
    },
    unistd::pipe2,
};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::{Cgroup, ContainerError, child, notify, user};
use crate::stdio::{Further, Input, Stdio, unblock};

/// From <linux/sched.h>; libc's constant is of a type that cannot hold it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Longest message of a child.
const LONGEST: usize = 4096;

/// The child's end is a program once this reads its end.
#[derive(Debug)]
pub struct Sync(pub(super) OwnedFd, i32);

/// The socket to a child failed: the child is gone.
#[derive(Debug)]
pub struct SyncError;

/// A namespace of another container.
#[derive(Debug)]
pub struct Shared {
    kind: NamespaceKind,
    file: std::fs::File,
}

impl Shared {
    /// The namespace of a process.
    ///
    /// # Errors
    /// [`ContainerError`] when the process is gone.
    pub fn of(pid: i32, kind: NamespaceKind) -> Result<Self, ContainerError> {
        let name = match kind {
            NamespaceKind::Pid => "pid",
            NamespaceKind::Ipc => "ipc",
            NamespaceKind::Uts => "uts",
        };
        let file = std::fs::File::open(format!("/proc/{pid}/ns/{name}"))
            .map_err(|e| ContainerError::guest(&format!("open the other container's {name} namespace"), e))?;
        Ok(Self { kind, file })
    }

    /// Enters it, unless that is for children only.
    pub(super) fn enter(&self) -> Result<(), ContainerError> {
        let flag = match self.kind {
            NamespaceKind::Pid => return Ok(()),
            NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
            NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
        };
        setns(&self.file, flag).map_err(system("join another container's namespace"))
    }

    /// The next children will be in it. Returns this process's own, to go back.
    fn enter_for_children(&self) -> Result<std::fs::File, ContainerError> {
        let own = std::fs::File::open("/proc/self/ns/pid")
            .map_err(|e| ContainerError::guest("open this namespace of processes", e))?;
        setns(&self.file, CloneFlags::CLONE_NEWPID).map_err(system("join another container's processes"))?;
        Ok(own)
    }
}

/// A process that waits to be let go.
#[derive(Debug)]
pub struct Launched {
    /// In PID 1's namespace.
    pub pid: i32,
    /// To let it go.
    pub sync: Sync,
    pub(crate) stdio: Stdio,
}

/// What a process's open files are to be, beside stdin, stdout and stderr.
#[derive(Debug, Default)]
pub struct Files {
    /// A terminal's first size.
    pub window: Option<WindowSize>,
    /// From 3 on.
    pub streams: Vec<Stream>,
    /// Path of the notification socket.
    pub notify: Option<String>,
}

/// A child's ends.
pub(super) struct Theirs {
    /// 0, 1 and 2; none for a terminal.
    pub(super) stdio: Vec<OwnedFd>,
    /// From 3 on; a number that is not open is `None`.
    pub(super) further: Vec<Option<OwnedFd>>,
    pub(super) window: Option<WindowSize>,
    pub(super) notify: Option<String>,
    pub(super) sync: OwnedFd,
}

/// What a child says: one byte of kind, then text.
pub(super) mod message {
    pub(in super::super) const READY: u8 = b'r';
    pub(in super::super) const PID: u8 = b'p';
    /// In a new user namespace, whose maps are to be written.
    pub(in super::super) const MAP: u8 = b'm';
    /// With the notification socket.
    pub(in super::super) const NOTIFY: u8 = b's';
    pub(in super::super) const NOT_FOUND: u8 = b'n';
    pub(in super::super) const NOT_EXECUTABLE: u8 = b'x';
    pub(in super::super) const FAILED: u8 = b'f';
}

fn system(stage: &str) -> impl FnOnce(nix::Error) -> ContainerError {
    move |e| ContainerError::guest(stage, io::Error::from(e))
}

/// A descriptor of a child that must not be where its further streams will be.
fn above(fd: OwnedFd, streams: usize) -> Result<OwnedFd, ContainerError> {
    use nix::fcntl::{FcntlArg, fcntl};
    if streams == 0 {
        return Ok(fd);
    }
    let least = 3 + streams as RawFd;
    let moved = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(least)).map_err(system("move a descriptor"))?;
    // SAFETY: fcntl returned a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

/// Descriptors of both sides: ours to keep, and the child's.
fn files(terminal: bool, wanted: &Files) -> Result<(Stdio, OwnedFd, Theirs), ContainerError> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let count = wanted.streams.len();
    if count > MAX_STREAMS {
        let message = format!("{count} further streams: at most {MAX_STREAMS} are possible");
        return Err(ContainerError::new(ErrorKind::Invalid, message));
    }
    wanted.notify.as_deref().map_or(Ok(()), notify::check)?;
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(system("make a pipe"));
    // A process that opens /dev/stdout again must be allowed to, whoever it is.
    let open_up = |fd: &OwnedFd| {
        let _ = nix::sys::stat::fchmod(fd, nix::sys::stat::Mode::from_bits_truncate(0o666));
    };
    let (sync, their_sync) = socket_pair()?;
    let mut ours = Stdio::default();
    let mut stdio = Vec::new();
    if !terminal {
        let (stdin, our_stdin) = pipe()?;
        let (our_stdout, stdout) = pipe()?;
        let (our_stderr, stderr) = pipe()?;
        for fd in [&our_stdin, &our_stdout] {
            // So much may wait for either side anyway; a kernel that gives no more than it did has it in smaller pieces.
            let _ = fcntl(fd, FcntlArg::F_SETPIPE_SZ(STDIN_WINDOW as i32));
        }
        for fd in [&our_stdin, &our_stdout, &our_stderr] {
            unblock(fd).map_err(system("make a pipe non-blocking"))?;
        }
        for fd in [stdin, stdout, stderr] {
            open_up(&fd);
            stdio.push(above(fd, count)?);
        }
        ours = Stdio {
            stdin: Some(our_stdin),
            stdout: Some(our_stdout),
            stderr: Some(our_stderr),
            ..Stdio::default()
        };
    }
    let mut further = Vec::new();
    for stream in &wanted.streams {
        if !stream.read && !stream.write {
            ours.further.push(Further { fd: None, input: None, output: false });
            further.push(None);
            continue;
        }
        let (our, their) = match stream {
            Stream { read: true, write: true } => {
                socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
                    .map_err(system("make a socket pair"))?
            }
            Stream { read: true, .. } => pipe().map(|(reads, writes)| (writes, reads))?,
            Stream { .. } => pipe()?,
        };
        unblock(&our).map_err(system("make a stream non-blocking"))?;
        open_up(&their);
        ours.further.push(Further {
            fd: Some(our),
            input: stream.read.then(Input::default),
            output: stream.write,
        });
        further.push(Some(above(their, count)?));
    }
    let theirs = Theirs {
        stdio,
        further,
        window: wanted.window,
        notify: wanted.notify.clone(),
        sync: above(their_sync, count)?,
    };
    Ok((ours, sync, theirs))
}

/// Forks with these clone flags, into a cgroup. `None` in the child. PID 1 has one thread then (`server::unpacking`), so this is as safe as fork.
pub(super) fn fork(flags: i32, cgroup: Option<RawFd>, signal: i32) -> io::Result<Option<i32>> {
    // SAFETY: clone_args is plain data for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64;
    args.exit_signal = signal as u64;
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd as u64;
    }
    // SAFETY: without CLONE_VM the child has a copy of everything, and there is no other thread whose locks it could miss.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match pid {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(pid as i32)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd), ContainerError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("make a socket pair"))
}

/// Makes the container's first process, up to its program.
///
/// # Errors
/// [`ContainerError`], of kind `NotFound` or `NotExecutable` for the program; the child is gone then.
pub fn launch(
    id: &str,
    spec: &Spec,
    cgroup: &Cgroup,
    shared: &[Shared],
    wanted: &Files,
) -> Result<Launched, ContainerError> {
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| ContainerError::new(ErrorKind::Invalid, "config.json: no process"))?;
    let (stdio, ours, theirs) = files(process.terminal().unwrap_or(false), wanted)?;
    let directory =
        std::fs::File::open(cgroup.path()).map_err(|e| ContainerError::guest("open the cgroup", e))?;
    let mut flags = libc::CLONE_NEWNS;
    let is_shared = |kind: NamespaceKind| shared.iter().find(|s| s.kind == kind);
    for namespace in spec.linux().iter().flat_map(|l| l.namespaces().iter().flatten()) {
        flags |= match namespace.typ() {
            LinuxNamespaceType::Pid if is_shared(NamespaceKind::Pid).is_some() => 0,
            LinuxNamespaceType::Uts if is_shared(NamespaceKind::Uts).is_some() => 0,
            LinuxNamespaceType::Ipc if is_shared(NamespaceKind::Ipc).is_some() => 0,
            LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
            LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
            LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
            // The guest's network is the pod's.
            _ => 0,
        };
    }
    // The container sees its own cgroup as the root, as it would under a runtime on a host with version 2.
    flags |= libc::CLONE_NEWCGROUP;
    // Only children of this process enter another namespace of processes; the next ones are to be in its own again.
    let own = is_shared(NamespaceKind::Pid).map(|other| other.enter_for_children()).transpose()?;
    let forked = fork(flags, Some(directory.as_raw_fd()), libc::SIGCHLD);
    if let (Some(own), false) = (&own, matches!(forked, Ok(None))) {
        setns(own, CloneFlags::CLONE_NEWPID).map_err(system("return to the first namespace of processes"))?;
    }
    match forked.map_err(|e| ContainerError::guest("fork", e))? {
        None => {
            // A directory outside of the container's root is a way there.
            drop((ours, directory));
            child::first(id, shared, spec, process, &theirs)
        }
        Some(pid) => {
            drop(theirs);
            let mut stdio = stdio;
            let terminal = wait_ready(&ours, pid, spec, &mut stdio.notify)?;
            finish(pid, ours, stdio, terminal)
        }
    }
}

/// Makes one more process in the namespaces of `target`, in the container's cgroup or one `below` it.
///
/// # Errors
/// As [`launch`].
pub fn exec(
    process: &Process,
    target: i32,
    cgroup: &Cgroup,
    spec: &Spec,
    below: Option<&str>,
    wanted: &Files,
) -> Result<Launched, ContainerError> {
    let (stdio, ours, theirs) = files(process.terminal().unwrap_or(false), wanted)?;
    let directory = cgroup.open(below)?;
    let mut forked = fork(0, Some(directory.as_raw_fd()), libc::SIGCHLD);
    if below.is_none() && matches!(&forked, Err(e) if e.raw_os_error() == Some(libc::EBUSY)) {
        // The container has moved its processes below and turned controllers on there, as systemd does: where they are then.
        forked = fork(0, Some(Cgroup::open_of(target)?.as_raw_fd()), libc::SIGCHLD);
    }
    match forked.map_err(|e| ContainerError::guest("fork", e))? {
        None => {
            drop((ours, directory));
            child::further(process, spec, target, &theirs)
        }
        Some(middle) => {
            drop(theirs);
            let (pid, terminal) = wait_child(&ours, middle)?;
            finish(pid, ours, stdio, terminal)
        }
    }
}

/// The number of a child's child from the one, and that it is ready from the other. Either may be first.
fn wait_child(socket: &OwnedFd, middle: i32) -> Result<(i32, Option<OwnedFd>), ContainerError> {
    let (mut pid, mut ready) = (None, None);
    loop {
        match receive(socket, pid.unwrap_or(middle))? {
            (message::PID, text, _) => pid = text.parse().ok(),
            (message::READY, _, terminal) => ready = Some(terminal),
            (kind, text, _) => return Err(refusal(kind, text)),
        }
        if let (Some(pid), Some(_)) = (pid, &ready) {
            return Ok((pid, ready.flatten()));
        }
    }
}

fn finish(
    pid: i32,
    sync: OwnedFd,
    mut stdio: Stdio,
    terminal: Option<OwnedFd>,
) -> Result<Launched, ContainerError> {
    if let Some(fd) = &terminal {
        unblock(fd).map_err(system("make the terminal non-blocking"))?;
    }
    stdio.terminal = terminal;
    Ok(Launched { pid, sync: Sync(sync, pid), stdio })
}

/// How often a child that says nothing is looked at, in milliseconds.
const LOOK: u8 = 250;

/// Waits until a child says something or is gone. In its container it can be stopped, by a signal or by the freezing of a cgroup; nobody
/// would let it go on again as long as PID 1 waits for it, so that it is ended.
fn wait(socket: &OwnedFd, pid: i32) -> Result<(), ContainerError> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        let mut entry = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut entry, PollTimeout::from(LOOK)) {
            Ok(0) if is_stopped(pid) || Cgroup::stops(pid) => {
                // SAFETY: signals a child of this process that it has not reaped yet.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                let message = format!("process {pid} was stopped in its container while it was made");
                return Err(ContainerError::new(ErrorKind::WrongState, message));
            }
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(system("wait for the child")(error)),
        }
    }
}

/// By a signal (proc(5), the third field of `/proc/PID/stat`).
fn is_stopped(pid: i32) -> bool {
    let text = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.rsplit_once(')')
        .is_some_and(|(_, after)| matches!(after.trim_start().chars().next(), Some('T' | 't')))
}

/// One message of the child, and the descriptor that came with it.
fn receive(socket: &OwnedFd, pid: i32) -> Result<(u8, String, Option<OwnedFd>), ContainerError> {
    wait(socket, pid)?;
    let mut bytes = [0; LONGEST];
    let mut space = nix::cmsg_space!(RawFd);
    let gone = || ContainerError::new(ErrorKind::Guest, format!("process {pid} died while it was made"));
    let (count, fd) = loop {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(received) => {
                let fds = received.cmsgs().ok().and_then(|mut list| match list.next() {
                    Some(ControlMessageOwned::ScmRights(fds)) => fds.first().copied(),
                    _ => None,
                });
                break (received.bytes, fds);
            }
            Err(nix::Error::EINTR) => {}
            Err(_) => return Err(gone()),
        }
    };
    // SAFETY: the kernel made this descriptor for us with the message.
    let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let (kind, text) = bytes[..count].split_first().ok_or_else(gone)?;
    Ok((*kind, String::from_utf8_lossy(text).into_owned(), fd))
}

fn refusal(kind: u8, text: String) -> ContainerError {
    let kind = match kind {
        message::NOT_FOUND => ErrorKind::NotFound,
        message::NOT_EXECUTABLE => ErrorKind::NotExecutable,
        _ => ErrorKind::Guest,
    };
    ContainerError::new(kind, text)
}

fn wait_ready(
    socket: &OwnedFd,
    pid: i32,
    spec: &Spec,
    notify: &mut Option<OwnedFd>,
) -> Result<Option<OwnedFd>, ContainerError> {
    loop {
        match receive(socket, pid)? {
            (message::READY, _, terminal) => return Ok(terminal),
            (message::NOTIFY, _, socket) => *notify = socket,
            (message::MAP, ..) => {
                user::write_maps(spec, pid)?;
                send(socket.as_raw_fd(), b"m", MsgFlags::MSG_NOSIGNAL).map_err(system("answer the child"))?;
            }
            (kind, text, _) => return Err(refusal(kind, text)),
        }
    }
}

impl Sync {
    /// Lets the process go and waits until its program runs.
    ///
    /// # Errors
    /// [`ContainerError`] when the program cannot be run after all.
    pub fn go(self) -> Result<(), ContainerError> {
        let gone = |_| ContainerError::new(ErrorKind::WrongState, "the container's process has ended");
        send(self.0.as_raw_fd(), b"g", MsgFlags::MSG_NOSIGNAL).map_err(gone)?;
        wait(&self.0, self.1)?;
        match receive(&self.0, self.1) {
            // The end of the socket: exec closed it.
            Err(_) => Ok(()),
            Ok((kind, text, _)) => Err(refusal(kind, text)),
        }
    }
}

impl AsFd for Sync {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_is_stopped_in_its_container_is_not_waited_for() {
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
                let message = receive(&ours, pid).unwrap_err().message;
                // The other end is open in the child as long as that lives.
                assert!(message.contains("was stopped in its container"), "{message}");
                let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
                assert!(
                    matches!(ended, nix::sys::wait::WaitStatus::Signaled(_, nix::sys::signal::SIGKILL, _)),
                    "{ended:?}"
                );
            }
        }
    }
}
