//! One connection of the host: bytes in and out, and the stdio of the process that it belongs to.
//!
//! Owns: buffers with their limits, what is waited for. Does not own: what a request does, the process's descriptors.

use std::os::fd::{AsRawFd, OwnedFd};

use coffer_protocol::{
    Decoder, ErrorKind, Frame, FrameError, Kind, MAX_NOTIFICATION, MAX_PAYLOAD, Outbox, Reply, STDIN_WINDOW,
    WindowSize, notification,
};
use nix::errno::Errno;

use crate::{
    container::set_window,
    stdio::{Process, read_some},
};

/// A process's output is read only while less than this waits for the host.
const OUTPUT_LIMIT: usize = 256 * 1024;
/// What a process may leave in a pipe at most: the kernel's own limit for those that users make larger.
const MOST_LEFT: usize = 1024 * 1024;
/// Read at once.
const CHUNK: usize = 64 * 1024;

/// What the host may do with a process's stdio.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: bool,
    pub(crate) output: bool,
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) fd: OwnedFd,
    decoder: Decoder,
    out: Outbox,
    pub(crate) process: Option<Process>,
    /// Whose process that is.
    pub(crate) container: String,
    streams: Streams,
    /// Its request waits, and whatever it has sent behind that.
    pub(crate) paused: bool,
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
    /// One of the process's descriptors from 3 on, by its number in frames.
    Further(u8),
    /// Its notification socket.
    Notify,
}

impl Session {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            decoder: Decoder::default(),
            out: Outbox::default(),
            process: None,
            container: String::new(),
            streams: Streams { stdin: true, output: true },
            paused: false,
            finishing: false,
            dead: false,
        }
    }

    /// Takes a container's process. Input that the owner's policy keeps from the host is at its end at once.
    pub(crate) fn attach(&mut self, container: &str, process: Process, streams: Streams) {
        container.clone_into(&mut self.container);
        let count = process.stdio.further.len();
        self.process = Some(process);
        self.streams = streams;
        if !streams.stdin {
            self.end_stdin();
            (0..count).for_each(|number| self.end_stream(&[number as u8]));
        }
    }

    fn waiting(&self) -> usize {
        self.out.waiting().len()
    }

    /// What to wait for.
    pub(crate) fn interests(&self) -> Vec<(Part, i32, i16)> {
        let mut list = Vec::with_capacity(4);
        let out = if self.waiting() > 0 { libc::POLLOUT } else { 0 };
        let requests = if self.paused { 0 } else { libc::POLLIN };
        list.push((Part::Host, self.fd.as_raw_fd(), requests | out));
        let Some(process) = &self.process else { return list };
        let reads = if self.waiting() < OUTPUT_LIMIT { libc::POLLIN } else { 0 };
        let writes = |waiting: usize| if waiting == 0 { 0 } else { libc::POLLOUT };
        let input = writes(process.stdin.waiting());
        let stdio = &process.stdio;
        let mut add = |part, fd: &Option<OwnedFd>, events: i16| {
            if let Some(fd) = fd
                && events != 0
            {
                list.push((part, fd.as_raw_fd(), events));
            }
        };
        add(Part::Stdin, &stdio.stdin, input);
        add(Part::Stdout, &stdio.stdout, reads);
        add(Part::Stderr, &stdio.stderr, reads);
        add(Part::Terminal, &stdio.terminal, input | reads);
        add(Part::Notify, &stdio.notify, reads);
        for (number, further) in stdio.further.iter().enumerate() {
            let input = further.input.as_ref().map_or(0, |i| writes(i.waiting()));
            add(Part::Further(number as u8), &further.fd, input | if further.output { reads } else { 0 });
        }
        list
    }

    /// Reads from the host. Frames come from [`Self::next_frame`].
    pub(crate) fn read_host(&mut self) {
        if self.paused {
            // Nothing was waited for but its end.
            self.dead = true;
            return;
        }
        match read_some(&self.fd, self.decoder.space(CHUNK)) {
            Ok(Some(0)) | Err(_) => self.dead = true,
            Ok(Some(count)) => self.decoder.filled(count),
            Ok(None) => {}
        }
    }

    /// The next whole frame but those with bytes for the process, which go to it from where they were received.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let next = self.next_of(&mut decoder);
        self.decoder = decoder;
        next
    }

    fn next_of(&mut self, decoder: &mut Decoder) -> Result<Option<Frame>, FrameError> {
        while let Some((kind, payload)) = decoder.lend()? {
            match (kind, &self.process) {
                (Kind::Stdin, Some(_)) => self.take_stdin(payload),
                (Kind::Stream, Some(_)) => self.take_stream(payload),
                _ => return Ok(Some(Frame { kind, payload: payload.to_vec() })),
            }
        }
        Ok(None)
    }

    /// What a frame says to the process, but for those that [`Self::next_frame`] keeps. A signal is given back: who may send it is
    /// decided elsewhere.
    pub(crate) fn process_frame(&mut self, frame: &Frame) -> Option<u32> {
        match (frame.kind, &self.process) {
            (Kind::StdinEnd, Some(_)) => self.end_stdin(),
            (Kind::StreamEnd, Some(_)) => self.end_stream(&frame.payload),
            (Kind::Signal, Some(process)) => {
                let word = <[u8; 4]>::try_from(frame.payload.as_slice()).map(u32::from_le_bytes);
                return word.ok().filter(|_| process.ended.is_none());
            }
            (Kind::Resize, Some(process)) => {
                if let (Ok(size), Some(terminal)) =
                    (WindowSize::from_payload(&frame.payload), &process.stdio.terminal)
                {
                    set_window(terminal, size);
                }
            }
            // Out of order: this host is not one of ours.
            _ => self.dead = true,
        }
        None
    }

    pub(crate) fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.out.push(kind, payload);
    }

    /// Answers a request; without a process the connection has done its work.
    pub(crate) fn reply(&mut self, reply: &Reply) {
        let mut payload = reply.to_payload();
        if payload.len() > MAX_PAYLOAD {
            // A denial, say, of as much as the host has asked.
            let message = format!("an answer of {} bytes, more than {MAX_PAYLOAD}", payload.len());
            payload = Reply::Failed { kind: ErrorKind::Guest, message }.to_payload();
        }
        self.send(Kind::Reply, &payload);
        self.finishing = self.process.is_none();
    }

    pub(crate) fn write_host(&mut self) {
        while self.waiting() > 0 {
            match nix::unistd::write(&self.fd, self.out.waiting()) {
                Ok(count) => self.out.sent(count),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    self.dead = true;
                    return;
                }
            }
        }
    }

    /// Nothing more is to be said here. A process's host closes the connection once it has its end: until then this machine
    /// must go on, because what the kernel has taken to send is lost when the machine ends.
    pub(crate) fn is_done(&self) -> bool {
        self.dead || self.finishing && self.waiting() == 0 && self.process.is_none()
    }

    /// Bytes of the host for stdin. A host that ignores the window is cut off.
    fn take_stdin(&mut self, bytes: &[u8]) {
        if !self.streams.stdin {
            // They go nowhere, but the host may send on.
            self.send(Kind::StdinCredit, &(bytes.len() as u32).to_le_bytes());
            return;
        }
        let Some(process) = &mut self.process else { return };
        if process.stdin.waiting() + bytes.len() > STDIN_WINDOW {
            self.dead = true;
            return;
        }
        self.feed_stdin(bytes);
    }

    pub(crate) fn end_stdin(&mut self) {
        let Some(process) = &mut self.process else { return };
        process.stdin.ends = true;
        self.feed_stdin(&[]);
    }

    /// Writes to the process what it takes, and gives the host credit for it.
    pub(crate) fn feed_stdin(&mut self, bytes: &[u8]) {
        let Some(Process { stdio, stdin, .. }) = &mut self.process else { return };
        let taken = stdin.take(stdio.stdin.as_ref().or(stdio.terminal.as_ref()), bytes);
        let credit = stdin.owe(taken.bytes) as u32;
        if taken.done {
            stdio.stdin = None;
        }
        if credit > 0 {
            self.send(Kind::StdinCredit, &credit.to_le_bytes());
        }
    }

    /// Bytes of the host for a further stream: its number, then they. The same window holds.
    fn take_stream(&mut self, payload: &[u8]) {
        let Some((number, bytes)) = payload.split_first() else { return self.dead = true };
        let waiting = self.further(*number).map(|f| f.input.as_ref().map_or(0, |i| i.waiting()));
        match waiting {
            Some(waiting) if waiting + bytes.len() <= STDIN_WINDOW => self.feed_stream(*number, bytes),
            _ => self.dead = true,
        }
    }

    pub(crate) fn end_stream(&mut self, payload: &[u8]) {
        let &[number] = payload else { return self.dead = true };
        match self.further(number) {
            Some(further) => {
                if let Some(input) = &mut further.input {
                    input.ends = true;
                }
                self.feed_stream(number, &[]);
            }
            None => self.dead = true,
        }
    }

    fn further(&mut self, number: u8) -> Option<&mut crate::stdio::Further> {
        self.process.as_mut()?.stdio.further.get_mut(usize::from(number))
    }

    /// As [`Self::feed_stdin`].
    pub(crate) fn feed_stream(&mut self, number: u8, bytes: &[u8]) {
        let count = self.further(number).map_or(0, |f| f.take(bytes)) as u32;
        if count > 0 {
            let [a, b, c, d] = count.to_le_bytes();
            self.send(Kind::StreamCredit, &[number, a, b, c, d]);
        }
    }

    /// Reads what one of the process's outputs has, as far as the host keeps up.
    pub(crate) fn read_output(&mut self, part: Part) {
        while self.read_once(part) == CHUNK && self.waiting() < OUTPUT_LIMIT {}
    }

    /// Reads once, straight into what goes to the host. Zero: nothing now, or the end.
    fn read_once(&mut self, part: Part) -> usize {
        let Some(Process { stdio, .. }) = &mut self.process else { return 0 };
        if part == Part::Notify {
            return self.read_notification();
        }
        // A further stream's frames begin with its number.
        let (kind, number) = match part {
            Part::Stdout | Part::Terminal => (Kind::Stdout, None),
            Part::Stderr => (Kind::Stderr, None),
            Part::Further(number) => (Kind::Stream, Some(number)),
            Part::Host | Part::Stdin | Part::Notify => return 0,
        };
        let fd = match part {
            Part::Stdout => stdio.stdout.as_ref(),
            Part::Stderr => stdio.stderr.as_ref(),
            Part::Terminal => stdio.terminal.as_ref(),
            _ => {
                let further = number.and_then(|n| stdio.further.get(usize::from(n)));
                further.filter(|f| f.output).and_then(|f| f.fd.as_ref())
            }
        };
        let Some(fd) = fd else { return 0 };
        let space = self.out.space(CHUNK + 1);
        let from = usize::from(number.is_some());
        space[0] = number.unwrap_or_default();
        match read_some(fd, &mut space[from..from + CHUNK]) {
            Ok(Some(count)) if count > 0 => {
                if self.streams.output {
                    self.out.filled(kind, from + count);
                }
                count
            }
            Ok(None) => 0,
            Ok(Some(_)) | Err(_) => {
                self.end_output(part);
                0
            }
        }
    }

    /// One message. What a sender passes along is closed, which is what one that waits for it waits for (`BARRIER=1`).
    fn read_notification(&mut self) -> usize {
        let fd = self.process.as_ref().and_then(|p| p.stdio.notify.as_ref());
        let Some(fd) = fd else { return 0 };
        // One byte more than is allowed, to see what is too long; that is left out, as systemd does.
        let space = self.out.space(MAX_NOTIFICATION + 1);
        let count = nix::sys::socket::recv(fd.as_raw_fd(), space, nix::sys::socket::MsgFlags::MSG_DONTWAIT);
        let count = count.unwrap_or(0);
        if (1..=MAX_NOTIFICATION).contains(&count) {
            // What the host's side would leave out it need not see.
            let told = notification::told(&space[..count]);
            if !told.is_empty() {
                space[..told.len()].copy_from_slice(told.as_bytes());
                self.out.filled(Kind::Notification, told.len());
            }
        }
        count
    }

    /// Whoever reads on the host learns of an output's end, as from a pipe.
    fn end_output(&mut self, part: Part) {
        let Some(Process { stdio, .. }) = &mut self.process else { return };
        match part {
            Part::Stdout => {
                stdio.stdout = None;
                self.send(Kind::StdoutEnd, &[]);
            }
            Part::Stderr => {
                stdio.stderr = None;
                self.send(Kind::StderrEnd, &[]);
            }
            Part::Terminal => stdio.terminal = None,
            Part::Further(number) => {
                if let Some(further) = stdio.further.get_mut(usize::from(number)) {
                    further.end_output();
                }
                self.send(Kind::StreamEnd, &[number]);
            }
            Part::Host | Part::Stdin | Part::Notify => {}
        }
    }

    /// Once the process has ended: takes what it left, then says how it ended. What a grandchild may still write into an
    /// inherited pipe is not waited for; of output that goes nowhere it could go on for ever.
    pub(crate) fn finish_process(&mut self) {
        let Some(ended) = self.process.as_ref().and_then(|p| p.ended) else { return };
        if self.finishing {
            return;
        }
        let further = self.process.as_ref().map_or(0, |p| p.stdio.further.len());
        let further = (0..further).map(|number| Part::Further(number as u8));
        for part in [Part::Notify, Part::Stdout, Part::Stderr, Part::Terminal].into_iter().chain(further) {
            let mut dropped = 0;
            while self.streams.output || dropped < MOST_LEFT {
                if self.waiting() >= OUTPUT_LIMIT {
                    return;
                }
                match self.read_once(part) {
                    0 => break,
                    count => dropped += count,
                }
            }
        }
        self.send(Kind::Ended, &ended.to_payload());
        self.finishing = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::{Stdio, unblock};
    use coffer_protocol::Exit;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_process_session_is_over_when_the_host_has_its_end_and_not_before() {
        let (ours, host) = UnixStream::pair().unwrap();
        unblock(&ours).unwrap();
        let mut session = Session::new(ours.into());
        session.process = Some(Process::new(4711, Stdio::default()));
        session.process.as_mut().unwrap().ended = Some(Exit::Code(3).into());
        session.finish_process();
        session.write_host();
        assert!(session.finishing && session.waiting() == 0 && !session.is_done());
        drop(host);
        // A child of another test may have its other end, too, until it is its program.
        for _ in 0..500 {
            session.read_host();
            if session.is_done() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the host is gone, and the session is not");
    }

    #[test]
    fn of_what_a_program_writes_to_its_notification_socket_the_host_gets_how_it_is() {
        let (ours, _host) = UnixStream::pair().unwrap();
        let (socket, program) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut session = Session::new(ours.into());
        let stdio = Stdio { notify: Some(socket.into()), ..Stdio::default() };
        session.attach("c", Process::new(4711, stdio), Streams { stdin: true, output: true });
        for message in
            [b"<14>login: password hunter2".as_slice(), b"READY=1\nTOKEN=hunter2", b"MAINPID=1", b"STATUS=up"]
        {
            program.send(message).unwrap();
        }
        for _ in 0..4 {
            session.read_output(Part::Notify);
        }
        let mut decoder = Decoder::default();
        decoder.push(session.out.waiting());
        let mut told = Vec::new();
        while let Some(frame) = decoder.next_frame().unwrap() {
            told.push((frame.kind, String::from_utf8(frame.payload).unwrap()));
        }
        let both = ["READY=1\n", "STATUS=up\n"].map(|text| (Kind::Notification, text.to_owned()));
        assert_eq!(told, both);
    }

    #[test]
    fn of_output_that_the_owner_denies_no_byte_reaches_the_host() {
        use std::io::{Read, Write};
        for allowed in [false, true] {
            let (ours, mut host) = UnixStream::pair().unwrap();
            let (stdout, mut program) = UnixStream::pair().unwrap();
            let (stderr, mut complaints) = UnixStream::pair().unwrap();
            let (further, mut other) = UnixStream::pair().unwrap();
            [&ours, &stdout, &stderr, &further].iter().for_each(|fd| unblock(fd).unwrap());
            unblock(&host).unwrap();
            let mut session = Session::new(ours.into());
            let further = crate::stdio::Further { fd: Some(further.into()), input: None, output: true };
            let stdio = Stdio {
                stdout: Some(stdout.into()),
                stderr: Some(stderr.into()),
                further: vec![further],
                ..Stdio::default()
            };
            session.attach("c", Process::new(4711, stdio), Streams { stdin: true, output: allowed });
            let mut received = Vec::new();
            for round in 0..2 {
                for stream in [&mut program, &mut complaints, &mut other] {
                    stream.write_all(&[b"SECRET".as_slice(), &[b'x'; 70_000][..7 * round]].concat()).unwrap();
                }
                for part in [Part::Stdout, Part::Stderr, Part::Further(0)] {
                    session.read_output(part);
                }
                session.write_host();
                let _ = host.read_to_end(&mut received);
            }
            // That it ended is no secret.
            drop((program, complaints, other));
            for part in [Part::Stdout, Part::Stderr, Part::Further(0)] {
                session.read_output(part);
            }
            session.process.as_mut().unwrap().ended = Some(Exit::Code(0).into());
            session.finish_process();
            session.write_host();
            let _ = host.read_to_end(&mut received);
            let seen = received.windows(6).filter(|bytes| bytes == b"SECRET").count();
            assert_eq!(seen, if allowed { 6 } else { 0 });
            let mut decoder = Decoder::default();
            decoder.push(&received);
            let mut kinds = Vec::new();
            while let Some(frame) = decoder.next_frame().unwrap() {
                kinds.push(frame.kind);
            }
            let content = [Kind::Stdout, Kind::Stderr, Kind::Stream];
            assert_eq!(kinds.iter().any(|kind| content.contains(kind)), allowed);
            assert!(kinds.ends_with(&[Kind::Ended]) && kinds.contains(&Kind::StdoutEnd));
        }
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

    #[test]
    fn one_that_goes_on_to_write_what_nobody_gets_keeps_no_process_from_its_end() {
        use std::io::Write;
        let (ours, _host) = UnixStream::pair().unwrap();
        let (stdout, mut left) = UnixStream::pair().unwrap();
        unblock(&stdout).unwrap();
        let mut session = Session::new(ours.into());
        let stdio = Stdio { stdout: Some(stdout.into()), ..Stdio::default() };
        session.attach("c", Process::new(4711, stdio), Streams { stdin: true, output: false });
        session.process.as_mut().unwrap().ended = Some(Exit::Code(0).into());
        // Until nobody can read it.
        let writer = std::thread::spawn(move || while left.write_all(&[0; CHUNK]).is_ok() {});
        session.finish_process();
        assert!(session.finishing);
        drop(session);
        writer.join().unwrap();
    }

    #[test]
    fn an_answer_that_no_frame_holds_is_a_short_one_that_says_so() {
        let (ours, _host) = UnixStream::pair().unwrap();
        let mut session = Session::new(ours.into());
        session.reply(&Reply::Failed { kind: ErrorKind::Invalid, message: "\u{1}".repeat(MAX_PAYLOAD / 2) });
        let mut decoder = Decoder::default();
        decoder.push(session.out.waiting());
        let frame = decoder.next_frame().unwrap().unwrap();
        match Reply::from_payload(&frame.payload).unwrap() {
            Reply::Failed { message, .. } => assert!(message.contains("an answer of"), "{message}"),
            other => panic!("{other:?}"),
        }
    }
}
