//! A shell: this process before a pod is there for it. It waits for one request, which brings the rest of its command line and the
//! descriptors that a parent would have left it, and is then what a process started with those would be.
//!
//! Owns: the socket, who may ask, when a request is taken, joining the pod's namespaces. Does not own: the request's bytes
//! (`coffer-protocol`), what was made ahead (`machine::Prepared`).
//!
//! One thread waits and serves one connection at a time, and what is taken leaves the socket: no two takers get one shell. Nothing is
//! done before all of a request was checked; one that is refused, broken or never comes leaves the shell as it was.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::{
            fs::MetadataExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use coffer_protocol::shell::{
    FIRST_DESCRIPTOR, GO, MOST_ANSWER, MOST_DESCRIPTORS, NAMESPACES, ShellError, TAKEN, decode, length_of,
};
use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::{
    args::{self, Args, ArgsError, Command},
    trace,
};

/// The socket's name in the shell's directory.
const SOCKET: &str = "socket";
/// How long a taker may be silent: it makes what the pod is to have once it is connected.
const SILENCE: Duration = Duration::from_secs(60);
/// Between two looks at whether the socket is still there.
const LOOKS: Duration = Duration::from_secs(5);

/// A shell cannot wait any longer.
#[derive(Debug, Error)]
#[error("shell: {what}: {source}")]
pub struct WaitError {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> WaitError {
    move |source| WaitError { what, source }
}

/// Why a request is not taken.
#[derive(Debug, Error)]
enum Refusal {
    #[error(transparent)]
    Request(#[from] ShellError),
    #[error("the request is not whole: {0}")]
    Unfinished(io::Error),
    #[error(transparent)]
    Args(#[from] ArgsError),
    #[error("the request is not for a machine")]
    NoMachine,
    #[error("the request comes with {0} descriptors, {NAMESPACES} namespaces at least are wanted")]
    Descriptors(usize),
    #[error("the request names descriptor {0}, which did not come with it, or names it twice")]
    Descriptor(RawFd),
    #[error("{0}")]
    DoesNotFit(String),
}

/// A request that is taken.
#[derive(Debug)]
pub struct Taken {
    /// As on a command line.
    pub args: Box<Args>,
    /// When the request came (CLOCK_MONOTONIC).
    pub began_ns: u64,
}

/// The socket of a shell.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    directory: PathBuf,
    socket: (u64, u64),
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Door {
    /// Opens it in a directory into which nobody but this user may look.
    ///
    /// # Errors
    /// The system's.
    pub fn open(directory: &Path) -> Result<Self, WaitError> {
        let path = directory.join(SOCKET);
        let listener = UnixListener::bind(&path).map_err(failed("make the socket"))?;
        let socket = fs::symlink_metadata(&path).map_err(failed("look at the socket"))?;
        Ok(Self { listener, directory: directory.to_owned(), socket: identity(&socket) })
    }

    /// Waits for a request that `fits`, joins its namespaces, and waits for its taker's word to go on. `None` when the socket was taken
    /// away, so that nobody can ask any more, or the taker is gone.
    ///
    /// # Errors
    /// The system's, after which this process is nobody's.
    pub fn wait(self, fits: impl Fn(&Args) -> Result<(), String>) -> Result<Option<Taken>, WaitError> {
        loop {
            if !self.is_knocked_at()? {
                if self.is_there() {
                    continue;
                }
                return Ok(None);
            }
            let Ok((mut stream, _)) = self.listener.accept() else { continue };
            // Who is somebody else, or goes without a word, is no taker: the list of shells looks like that.
            if !is_this_user(&stream) || stream.set_read_timeout(Some(SILENCE)).is_err() {
                continue;
            }
            let received = receive(&stream);
            // Not when the taker connected: what the pod is to have, it made since.
            let began_ns = trace::now_ns();
            let (args, descriptors) = match received.transpose() {
                None => continue,
                Some(request) => match request.and_then(|request| check(request, &fits)) {
                    Ok(request) => request,
                    Err(refusal) => {
                        answer(&mut stream, &refusal.to_string());
                        continue;
                    }
                },
            };
            // From here on this is the pod's, or nobody's.
            let joined = join(descriptors);
            let _ = fs::remove_dir_all(&self.directory);
            return match joined {
                Ok(()) => {
                    let mut word = [0];
                    let said = stream.write_all(TAKEN.as_bytes()).and_then(|()| stream.read_exact(&mut word));
                    Ok((said.is_ok() && word == [GO]).then_some(Taken { args, began_ns }))
                }
                Err(error) => {
                    answer(&mut stream, &error.to_string());
                    Err(error)
                }
            };
        }
    }

    fn is_knocked_at(&self) -> Result<bool, WaitError> {
        let mut wait = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry.
        match unsafe { libc::poll(&raw mut wait, 1, LOOKS.as_millis() as i32) } {
            0 => Ok(false),
            ready if ready > 0 => Ok(true),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
                error => Err(failed("wait")(error)),
            },
        }
    }

    fn is_there(&self) -> bool {
        fs::symlink_metadata(self.directory.join(SOCKET)).is_ok_and(|now| identity(&now) == self.socket)
    }
}

fn is_this_user(stream: &UnixStream) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the buffer is a ucred of the size that is given.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut size,
        )
    };
    // SAFETY: has no arguments and cannot fail.
    got == 0 && peer.uid == unsafe { libc::geteuid() }
}

fn answer(stream: &mut UnixStream, words: &str) {
    let mut line = words.replace('\n', " ");
    line.truncate(line.floor_char_boundary(MOST_ANSWER - 1));
    // Nobody may listen any more.
    let _ = stream.write_all((line + "\n").as_bytes());
}

/// A request as it came.
type Request = (Vec<String>, Vec<OwnedFd>);

/// Reads a request; `None` when there is not one byte of it.
fn receive(stream: &UnixStream) -> Result<Option<Request>, Refusal> {
    let (mut head, mut numbers) = ([0; 4], [0; MOST_DESCRIPTORS]);
    let mut parts = [libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() }];
    // SAFETY: the one buffer is writable, as long as said, and outlives the call.
    let (count, came) = match unsafe { stream.recv_with_fds(&mut parts, &mut numbers) } {
        Ok(received) => received,
        Err(error) => return Err(Refusal::Unfinished(io::Error::from_raw_os_error(error.errno()))),
    };
    // SAFETY: the kernel has just made these descriptors for this process, and nobody else has them.
    let descriptors = numbers[..came].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
    if count == 0 {
        return Ok(None);
    }
    let mut stream = stream;
    stream.read_exact(&mut head[count..]).map_err(Refusal::Unfinished)?;
    let mut body = vec![0; length_of(head)?];
    stream.read_exact(&mut body).map_err(Refusal::Unfinished)?;
    Ok(Some((decode(&body)?, descriptors)))
}

/// Whether a request is one that this shell can take. Changes nothing.
fn check(
    (words, descriptors): Request,
    fits: impl Fn(&Args) -> Result<(), String>,
) -> Result<(Box<Args>, Vec<OwnedFd>), Refusal> {
    let Command::Run(args) = args::parse(words)? else { return Err(Refusal::NoMachine) };
    let came = descriptors.len().checked_sub(NAMESPACES).ok_or(Refusal::Descriptors(descriptors.len()))?;
    let mut numbers: BTreeSet<RawFd> = (FIRST_DESCRIPTOR..).take(came).collect();
    for fd in args.lifeline.into_iter().chain(args.nets.iter().map(|net| net.fd)) {
        if !numbers.remove(&fd) {
            return Err(Refusal::Descriptor(fd));
        }
    }
    fits(&args).map_err(Refusal::DoesNotFit)?;
    Ok((args, descriptors))
}

/// Joins the namespaces, and gives the other descriptors their numbers.
fn join(descriptors: Vec<OwnedFd>) -> Result<(), WaitError> {
    let mut descriptors = descriptors.into_iter();
    // A thread of KVM's in this process would share the directories that a mount namespace changes.
    // SAFETY: changes nothing but what this thread shares with others.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(failed("stand alone")(io::Error::last_os_error()));
    }
    for (kind, what) in [
        (libc::CLONE_NEWNS, "join the pod's mount namespace"),
        (libc::CLONE_NEWNET, "join the pod's network namespace"),
    ] {
        let Some(namespace) = descriptors.next() else { break };
        // SAFETY: has no pointers; the kernel refuses a descriptor of anything else.
        if unsafe { libc::setns(namespace.as_raw_fd(), kind) } < 0 {
            return Err(failed(what)(io::Error::last_os_error()));
        }
    }
    for (descriptor, number) in descriptors.zip(FIRST_DESCRIPTOR..) {
        // SAFETY: makes a new descriptor or fails; none that is open is replaced.
        let placed = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
        if placed < 0 {
            return Err(failed("take the pod's descriptors")(io::Error::last_os_error()));
        }
        // SAFETY: the call made it, and nobody else has it.
        let placed = unsafe { File::from_raw_fd(placed) };
        if placed.as_raw_fd() != number {
            return Err(failed("take the pod's descriptors")(io::ErrorKind::AlreadyExists.into()));
        }
        // Its number is its owner's from here on, as with one that was inherited.
        let _ = placed.into_raw_fd();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
