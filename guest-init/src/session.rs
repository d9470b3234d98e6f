//! One connection of the host: bytes in and out, and the stdio of the process that it belongs to.
//!
//! Owns: buffers with their limits, descriptors. Does not own: what a request does.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use coffer_protocol::{Decoder, Ended, Frame, FrameError, Kind, Reply, STDIN_WINDOW, encode};
use nix::errno::Errno;

/// A process's output is read only while less than this waits for the host.
const OUTPUT_LIMIT: usize = 256 * 1024;
const CHUNK: usize = 32 * 1024;

/// Descriptors of a process's stdio, ours to use.
#[derive(Debug, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// For a terminal: all three in one.
    pub(crate) terminal: Option<OwnedFd>,
}

/// A process that this connection owns.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) stdio: Stdio,
    pub(crate) ended: Option<Ended>,
    stdin_waiting: Vec<u8>,
    stdin_ends: bool,
}

/// What the host may do with a process's stdio.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: bool,
    pub(crate) output: bool,
}

impl Process {
    pub(crate) fn new(pid: i32, stdio: Stdio) -> Self {
        Self { pid, stdio, ended: None, stdin_waiting: Vec::new(), stdin_ends: false }
    }
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) fd: OwnedFd,
    decoder: Decoder,
    out: Vec<u8>,
    written: usize,
    pub(crate) process: Option<Process>,
    streams: Streams,
    /// Everything was said: close once it is written.
    pub(crate) finishing: bool,
    /// The host is gone, or broke the protocol.
    pub(crate) dead: bool,
}

/// Which descriptor of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Host,
    Stdin,
    Stdout,
    Stderr,
    Terminal,
}

/// Reads what is there now. `Ok(None)`: nothing now; an empty vector: the end.
fn read_some(fd: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; CHUNK];
    match nix::unistd::read(fd, &mut bytes) {
        Ok(count) => {
            bytes.truncate(count);
            Ok(Some(bytes))
        }
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        // The last slave of a terminal was closed.
        Err(Errno::EIO) => Ok(Some(Vec::new())),
        Err(e) => Err(e.into()),
    }
}

impl Session {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            decoder: Decoder::default(),
            out: Vec::new(),
            written: 0,
            process: None,
            streams: Streams { stdin: true, output: true },
            finishing: false,
            dead: false,
        }
    }

    /// Takes a process. Stdin that the owner's policy keeps from the host is at its end at once.
    pub(crate) fn attach(&mut self, process: Process, streams: Streams) {
        self.process = Some(process);
        self.streams = streams;
        if !streams.stdin {
            self.end_stdin();
        }
    }

    fn waiting(&self) -> usize {
        self.out.len() - self.written
    }

    /// What to wait for.
    pub(crate) fn interests(&self) -> Vec<(Part, i32, i16)> {
        let mut list = Vec::with_capacity(4);
        let out = if self.waiting() > 0 { libc::POLLOUT } else { 0 };
        list.push((Part::Host, self.fd.as_raw_fd(), libc::POLLIN | out));
        let Some(process) = &self.process else { return list };
        let room = self.waiting() < OUTPUT_LIMIT;
        let input = if process.stdin_waiting.is_empty() { 0 } else { libc::POLLOUT };
        if let Some(fd) = &process.stdio.stdin
            && input != 0
        {
            list.push((Part::Stdin, fd.as_raw_fd(), input));
        }
        for (part, fd) in [(Part::Stdout, &process.stdio.stdout), (Part::Stderr, &process.stdio.stderr)] {
            if let Some(fd) = fd
                && room
            {
                list.push((part, fd.as_raw_fd(), libc::POLLIN));
            }
        }
        if let Some(fd) = &process.stdio.terminal {
            let events = input | if room { libc::POLLIN } else { 0 };
            if events != 0 {
                list.push((Part::Terminal, fd.as_raw_fd(), events));
            }
        }
        list
    }

    /// Reads from the host. Frames come from [`Self::next_frame`].
    pub(crate) fn read_host(&mut self) {
        match read_some(self.fd.as_fd()) {
            Ok(Some(bytes)) if bytes.is_empty() => self.dead = true,
            Ok(Some(bytes)) => self.decoder.push(&bytes),
            Ok(None) => {}
            Err(_) => self.dead = true,
        }
    }

    /// The next whole frame.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        self.decoder.next_frame()
    }

    pub(crate) fn send(&mut self, kind: Kind, payload: &[u8]) {
        encode(kind, payload, &mut self.out);
    }

    /// Answers a request; without a process the connection has done its work.
    pub(crate) fn reply(&mut self, reply: &Reply) {
        self.send(Kind::Reply, &reply.to_payload());
        self.finishing = self.process.is_none();
    }

    pub(crate) fn write_host(&mut self) {
        while self.waiting() > 0 {
            match nix::unistd::write(&self.fd, &self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    self.dead = true;
                    return;
                }
            }
        }
        if self.waiting() == 0 {
            self.out.clear();
            self.written = 0;
        } else if self.written > OUTPUT_LIMIT {
            self.out.drain(..self.written);
            self.written = 0;
        }
    }

    /// Nothing more is to be said here. A process's host closes the connection once it has its end: until then this machine
    /// must go on, because what the kernel has taken to send is lost when the machine ends.
    pub(crate) fn is_done(&self) -> bool {
        self.dead || self.finishing && self.waiting() == 0 && self.process.is_none()
    }

    /// Bytes of the host for stdin. A host that ignores the window is cut off.
    pub(crate) fn take_stdin(&mut self, bytes: &[u8]) {
        if !self.streams.stdin {
            // They go nowhere, but the host may send on.
            self.send(Kind::StdinCredit, &(bytes.len() as u32).to_le_bytes());
            return;
        }
        let Some(process) = &mut self.process else { return };
        if process.stdin_waiting.len() + bytes.len() > STDIN_WINDOW {
            self.dead = true;
            return;
        }
        process.stdin_waiting.extend_from_slice(bytes);
        self.write_stdin();
    }

    pub(crate) fn end_stdin(&mut self) {
        let Some(process) = &mut self.process else { return };
        process.stdin_ends = true;
        self.write_stdin();
    }

    /// Writes to the process what it takes, and gives the host credit for it.
    pub(crate) fn write_stdin(&mut self) {
        let Some(process) = &mut self.process else { return };
        let mut taken = 0;
        let mut broken = process.stdio.stdin.is_none() && process.stdio.terminal.is_none();
        if let Some(fd) = process.stdio.stdin.as_ref().or(process.stdio.terminal.as_ref()) {
            while taken < process.stdin_waiting.len() {
                match nix::unistd::write(fd, &process.stdin_waiting[taken..]) {
                    Ok(count) => taken += count,
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR) => {}
                    Err(_) => {
                        broken = true;
                        break;
                    }
                }
            }
        }
        if broken {
            // Nobody reads any more: the host's bytes go nowhere, but it may send on.
            taken = process.stdin_waiting.len();
            process.stdio.stdin = None;
        }
        process.stdin_waiting.drain(..taken);
        if process.stdin_ends && process.stdin_waiting.is_empty() {
            process.stdio.stdin = None;
        }
        if taken > 0 {
            self.send(Kind::StdinCredit, &(taken as u32).to_le_bytes());
        }
    }

    /// Reads one of the process's outputs.
    pub(crate) fn read_output(&mut self, part: Part) {
        let Some(process) = &mut self.process else { return };
        let (slot, kind) = match part {
            Part::Stdout => (&mut process.stdio.stdout, Kind::Stdout),
            Part::Stderr => (&mut process.stdio.stderr, Kind::Stderr),
            Part::Terminal => (&mut process.stdio.terminal, Kind::Stdout),
            Part::Host | Part::Stdin => return,
        };
        let Some(fd) = slot else { return };
        match read_some(fd.as_fd()) {
            Ok(Some(bytes)) if !bytes.is_empty() && !self.streams.output => {}
            Ok(Some(bytes)) if !bytes.is_empty() => self.send(kind, &bytes),
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => {
                *slot = None;
                // Whoever reads on the host learns of it, as from a pipe.
                match part {
                    Part::Stdout => self.send(Kind::StdoutEnd, &[]),
                    Part::Stderr => self.send(Kind::StderrEnd, &[]),
                    Part::Host | Part::Stdin | Part::Terminal => {}
                }
            }
        }
    }

    /// Once the process has ended: takes what it left, then says how it ended. What a grandchild may still write into an
    /// inherited pipe is not waited for.
    pub(crate) fn finish_process(&mut self) {
        let Some(ended) = self.process.as_ref().and_then(|p| p.ended) else { return };
        if self.finishing {
            return;
        }
        for part in [Part::Stdout, Part::Stderr, Part::Terminal] {
            loop {
                if self.waiting() >= OUTPUT_LIMIT {
                    return;
                }
                let before = self.out.len();
                self.read_output(part);
                if self.out.len() == before {
                    break;
                }
            }
        }
        self.send(Kind::Ended, &ended.to_payload());
        self.finishing = true;
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
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_process_session_is_over_when_the_host_has_its_end_and_not_before() {
        let (ours, host) = UnixStream::pair().unwrap();
        unblock(&ours).unwrap();
        let mut session = Session::new(ours.into());
        session.process = Some(Process::new(4711, Stdio::default()));
        session.process.as_mut().unwrap().ended = Some(Ended::Exited(3));
        session.finish_process();
        session.write_host();
        assert!(session.finishing && session.waiting() == 0 && !session.is_done());
        drop(host);
        session.read_host();
        assert!(session.is_done());
    }

    #[test]
    fn a_request_session_is_over_when_its_reply_is_written() {
        let (ours, _host) = UnixStream::pair().unwrap();
        unblock(&ours).unwrap();
        let mut session = Session::new(ours.into());
        session.reply(&Reply::Done);
        assert!(!session.is_done());
        session.write_host();
        assert!(session.is_done());
    }
}
