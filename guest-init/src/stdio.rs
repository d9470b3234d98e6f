//! A process's open files as PID 1 has them: the other ends of its pipes, terminal, further streams and notification socket.
//!
//! Owns: descriptors, and what waits to be written into each. Does not own: frames, or what the owner's policy allows.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use coffer_protocol::{Ended, STDIN_WINDOW};
use nix::errno::Errno;

/// Descriptors of a process, ours to use.
#[derive(Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// For a terminal: all three in one.
    pub(crate) terminal: Option<OwnedFd>,
    /// The process's descriptors from 3 on.
    pub(crate) further: Vec<Further>,
    /// Where its notifications arrive, for a container's first process.
    pub(crate) notify: Option<OwnedFd>,
}

/// A process that a connection owns.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) stdio: Stdio,
    pub(crate) ended: Option<Ended>,
    pub(crate) stdin: Input,
}

impl Process {
    pub(crate) fn new(pid: i32, stdio: Stdio) -> Self {
        Self { pid, stdio, ended: None, stdin: Input::default() }
    }
}

/// A descriptor from 3 on: a pipe, or a socket when the process may both read and write it.
#[derive(Debug)]
pub(crate) struct Further {
    pub(crate) fd: Option<OwnedFd>,
    /// While the process may read it.
    pub(crate) input: Option<Input>,
    /// While the process may write it.
    pub(crate) output: bool,
}

impl Further {
    /// Writes what waits, then `bytes`. Returns how many bytes the host may send again.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> usize {
        let Some(input) = &mut self.input else { return bytes.len() };
        let taken = input.take(self.fd.as_ref(), bytes);
        let credit = input.owe(taken.bytes);
        if taken.done {
            self.input = None;
            if self.output {
                // The socket's other direction goes on.
                let end = nix::sys::socket::Shutdown::Write;
                let _ = self
                    .fd
                    .as_ref()
                    .map(|fd| nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(fd), end));
            } else {
                self.fd = None;
            }
        }
        credit
    }

    /// The process has closed its end for writing.
    pub(crate) fn end_output(&mut self) {
        self.output = false;
        if self.input.is_none() {
            self.fd = None;
        }
    }
}

/// Bytes of the host on their way into a process.
#[derive(Debug, Default)]
pub(crate) struct Input {
    buffer: Vec<u8>,
    /// What of it was written already.
    start: usize,
    /// Taken, and the host was not told yet.
    owed: usize,
    /// Nothing comes after them.
    pub(crate) ends: bool,
}

/// What [`Input::take`] did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// So much is no longer here.
    pub(crate) bytes: usize,
    /// Nothing can or will follow: the descriptor may be closed.
    pub(crate) done: bool,
}

impl Input {
    pub(crate) fn waiting(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// How many bytes the host may send again, now that so many more were taken: none until that is worth a frame. Less than a
    /// quarter of the window is held back, so that a host without credit waits only for bytes that are still here.
    pub(crate) fn owe(&mut self, taken: usize) -> usize {
        self.owed += taken;
        if self.owed < STDIN_WINDOW / 4 { 0 } else { std::mem::take(&mut self.owed) }
    }

    /// Writes what waits and then `bytes`, as far as the process takes them; the rest waits. Without a reader everything goes
    /// nowhere.
    pub(crate) fn take(&mut self, fd: Option<&OwnedFd>, mut bytes: &[u8]) -> Taken {
        let (mut taken, mut broken) = (0, fd.is_none());
        if let Some(fd) = fd {
            let count = write_some(fd, &self.buffer[self.start..], &mut broken);
            self.start += count;
            taken = count;
            if self.waiting() == 0 && !broken {
                let count = write_some(fd, bytes, &mut broken);
                bytes = &bytes[count..];
                taken += count;
            }
        }
        if broken {
            taken += self.waiting() + bytes.len();
            (self.start, bytes) = (self.buffer.len(), &[]);
        }
        if self.waiting() == 0 || !bytes.is_empty() {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
        Taken { bytes: taken, done: broken || self.ends && self.waiting() == 0 }
    }
}

/// Writes until nothing more is taken now.
fn write_some(fd: &OwnedFd, bytes: &[u8], broken: &mut bool) -> usize {
    let mut taken = 0;
    while taken < bytes.len() {
        match nix::unistd::write(fd, &bytes[taken..]) {
            Ok(count) => taken += count,
            Err(Errno::EAGAIN) => break,
            Err(Errno::EINTR) => {}
            Err(_) => {
                *broken = true;
                break;
            }
        }
    }
    taken
}

/// Reads what is there now. `Ok(None)`: nothing now; zero: the end.
pub(crate) fn read_some(fd: &impl AsFd, bytes: &mut [u8]) -> io::Result<Option<usize>> {
    match nix::unistd::read(fd, bytes) {
        Ok(count) => Ok(Some(count)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        // The last slave of a terminal was closed.
        Err(Errno::EIO) => Ok(Some(0)),
        Err(e) => Err(e.into()),
    }
}

/// Makes a descriptor non-blocking.
pub(crate) fn unblock(fd: &impl AsFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    fn pair() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        unblock(&ours).unwrap();
        (ours.into(), theirs)
    }

    #[test]
    fn what_is_not_taken_waits_and_keeps_its_place() {
        let (ours, mut theirs) = pair();
        let mut input = Input::default();
        let large = vec![7; 1 << 20];
        let first = input.take(Some(&ours), &large).bytes;
        assert!(first < large.len() && input.waiting() == large.len() - first);
        input.ends = true;
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all
        });
        let mut taken = first + input.take(Some(&ours), b"last").bytes;
        while input.waiting() > 0 {
            taken += input.take(Some(&ours), b"").bytes;
        }
        assert_eq!(taken, large.len() + 4);
        drop(ours);
        let all = reader.join().unwrap();
        assert!(all.len() == taken && all.ends_with(b"last") && all.starts_with(&large));
    }

    #[test]
    fn a_host_is_told_of_a_quarter_of_its_window_at_once() {
        let mut input = Input::default();
        assert_eq!((input.owe(STDIN_WINDOW / 4 - 1), input.owe(1), input.owe(1)), (0, STDIN_WINDOW / 4, 0));
    }

    #[test]
    fn without_a_reader_bytes_go_nowhere_and_the_host_may_send_on() {
        let (ours, theirs) = pair();
        drop(theirs);
        assert_eq!(Input::default().take(Some(&ours), b"abc"), Taken { bytes: 3, done: true });
        assert_eq!(Input::default().take(None, b"abc"), Taken { bytes: 3, done: true });
    }

    #[test]
    fn a_sockets_directions_end_one_after_the_other() {
        let (ours, mut theirs) = pair();
        let mut further = Further { fd: Some(ours), input: Some(Input::default()), output: true };
        assert_eq!(further.take(b"in"), 0, "the host has credit enough");
        further.input.as_mut().unwrap().ends = true;
        assert_eq!(further.take(b""), 0);
        let mut all = String::new();
        theirs.read_to_string(&mut all).unwrap();
        assert_eq!(all, "in");
        theirs.write_all(b"out").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(read_some(further.fd.as_ref().unwrap(), &mut bytes).unwrap(), Some(3));
        further.end_output();
        assert!(further.fd.is_none());
        assert_eq!(further.take(b"late"), 4);
    }
}
