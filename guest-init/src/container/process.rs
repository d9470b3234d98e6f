//! Starting processes: clone, a socket between PID 1 and the child, stdio.
//!
//! Owns: what PID 1 does before there is a `child`. Does not own: what is said over the socket from then on (`making`).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use coffer_protocol::{ErrorKind, MAX_STREAMS, NamespaceKind, STDIN_WINDOW, Stream, WindowSize};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
    unistd::pipe2,
};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::{Cgroup, ContainerError, Making, child, notify, user};
use crate::stdio::{Further, Input, Stdio, unblock};

/// From <linux/sched.h>; libc's constant is of a type that cannot hold it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

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

/// What a process's open files are to be, beside stdin, stdout and stderr.
#[derive(Debug, Default)]
pub struct Files {
    /// A terminal's first size.
    pub window: Option<WindowSize>,
    /// From 3 on.
    pub streams: Vec<Stream>,
    /// The notification socket.
    pub notify: Option<notify::Socket>,
}

/// A child's ends.
pub(super) struct Theirs {
    /// 0, 1 and 2; none for a terminal.
    pub(super) stdio: Vec<OwnedFd>,
    /// From 3 on; a number that is not open is `None`.
    pub(super) further: Vec<Option<OwnedFd>>,
    pub(super) window: Option<WindowSize>,
    pub(super) notify: Option<notify::Socket>,
    pub(super) sync: OwnedFd,
}

pub(super) fn system(stage: &str) -> impl FnOnce(nix::Error) -> ContainerError {
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
    wanted.notify.as_ref().map_or(Ok(()), |socket| notify::check(&socket.path))?;
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

/// Forks with these clone flags, into a cgroup. `None` in the child. PID 1 has one thread then (`server::beside`), so this is as safe as fork.
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

pub(super) fn socket_pair() -> Result<(OwnedFd, OwnedFd), ContainerError> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("make a socket pair"))
}

/// Begins to make the container's first process.
///
/// # Errors
/// [`ContainerError`]; there is no process then.
pub fn launch(
    id: &str,
    spec: &Spec,
    cgroup: &Cgroup,
    shared: &[Shared],
    wanted: &Files,
) -> Result<Making, ContainerError> {
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
            let maps = user::wanted(spec).then(|| user::Maps::of(spec));
            Ok(Making::first(ours, pid, stdio, maps))
        }
    }
}

/// Begins to make one more process in the namespaces of `target`, in the container's cgroup or one `below` it.
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
) -> Result<Making, ContainerError> {
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
            Ok(Making::further(ours, middle, stdio))
        }
    }
}
