//! Talking to init: a connection through the VMM's socket, one request, one reply.
//!
//! Owns: the handshake with the VMM and the first two frames. Does not own: what follows on a process's connection.

use std::{
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use coffer_protocol::{
    CONTROL_PORT, Decoder, Frame, Kind, Reply, Request, encode,
    vm::{LONGEST_ANSWER, Line, NetAnswer, SizeAnswer, VmSize, parse_mac},
};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use oci_spec::runtime::Hook;

use crate::error::{Error, host};

/// How long the VMM may take to make its socket.
pub const SOCKET_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest may take to boot and to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// The same, when it has layers to unpack or a KBS to ask meanwhile. A VM that ends is noticed at once all the same.
const LONG_ANSWER_LIMIT: Duration = Duration::from_secs(20 * 60);

/// The same for what works without the guest, too: SIGKILL, and that it forgets a container.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a guest's words that are shown.
const MOST_WORDS: usize = 4096;

/// How long the answer to a request may take. `waits` is whether something in its pod may have to wait for a KBS or an image: init does what
/// is asked for one container after what it does so for another.
fn limit(request: &Request, waits: bool) -> Duration {
    match request {
        Request::Signal { signal, .. } if *signal == libc::SIGKILL as u32 => KILL_LIMIT,
        Request::Delete { .. } => KILL_LIMIT,
        Request::Create(_) | Request::Exec(_) if waits => LONG_ANSWER_LIMIT,
        _ => ANSWER_LIMIT,
    }
}

/// How long a container with these hooks of its own may take to start: what they may take themselves, which is no limit for one that has
/// none, and what a start takes.
pub fn hooks_limit(hooks: &[Hook]) -> Option<Duration> {
    let of = |hook: &Hook| hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0);
    hooks.iter().try_fold(ANSWER_LIMIT, |sum, hook| sum.checked_add(Duration::from_secs(of(hook)?)))
}

fn no_answer(limit: Duration) -> Error {
    Error::Vm(format!("the guest did not answer within {} s", limit.as_secs()))
}

/// A connection to init.
#[derive(Debug)]
pub struct Connection {
    /// The bytes.
    pub stream: UnixStream,
    /// What was read already.
    pub decoder: Decoder,
}

/// When something must have come, and how long that is; or that it may take for ever.
#[derive(Clone, Copy, Debug)]
struct Deadline(Option<(Duration, Instant)>);

impl Deadline {
    const NONE: Self = Self(None);

    fn after(limit: Duration) -> Self {
        // One past the end of all time is none.
        Self(Instant::now().checked_add(limit).map(|end| (limit, end)))
    }

    /// Has the next read take no longer.
    fn bound(self, stream: &UnixStream) -> Result<(), Error> {
        let left = self.0.map(|(limit, end)| (limit, end.saturating_duration_since(Instant::now())));
        if let Some((limit, Duration::ZERO)) = left {
            return Err(no_answer(limit));
        }
        stream.set_read_timeout(left.map(|(_, left)| left)).map_err(host("set a time limit"))
    }
}

/// The VMM is gone: only it knows why.
fn gone() -> Error {
    Error::VmGone
}

impl Connection {
    /// Connects. While a VM boots its socket may not be there yet; `alive` says whether to go on waiting for it.
    ///
    /// # Errors
    /// [`Error::VmGone`] when there is no VM.
    pub fn open(socket: &Path, alive: impl FnMut() -> bool) -> Result<Self, Error> {
        Self::open_until(socket, Deadline::after(ANSWER_LIMIT), alive)
    }

    fn open_until(socket: &Path, deadline: Deadline, mut alive: impl FnMut() -> bool) -> Result<Self, Error> {
        let began = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if alive() && began.elapsed() < SOCKET_LIMIT => {
                    thread::sleep(Duration::from_millis(1))
                }
                Err(_) => return Err(gone()),
            }
        };
        stream.write_all(Line::Connect(CONTROL_PORT).to_string().as_bytes()).map_err(|_| gone())?;
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() < 32 {
            deadline.bound(&stream)?;
            match stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) => line.push(byte[0]),
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                _ => return Err(gone()),
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(gone());
        }
        Ok(Self { stream, decoder: Decoder::default() })
    }

    /// Sends the request and takes the reply.
    ///
    /// # Errors
    /// [`Error::Guest`] when init refuses, [`Error::Vm`] when there is no answer, [`Error::VmGone`] when there is no VM.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        self.ask_of(request, false)
    }

    /// The same in a pod of which something may wait for a KBS or an image, or nothing.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn ask_of(&mut self, request: &Request, waits: bool) -> Result<Reply, Error> {
        self.ask_within(request, Some(limit(request, waits)))
    }

    /// The same with another limit, or with none.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn ask_within(&mut self, request: &Request, limit: Option<Duration>) -> Result<Reply, Error> {
        self.ask_until(request, limit.map_or(Deadline::NONE, Deadline::after))
    }

    fn ask_until(&mut self, request: &Request, deadline: Deadline) -> Result<Reply, Error> {
        let mut bytes = Vec::new();
        encode(Kind::Request, &request.to_payload(), &mut bytes);
        self.stream.write_all(&bytes).map_err(|_| gone())?;
        let frame = self.frame(deadline)?.ok_or_else(gone)?;
        let wrong = |e: coffer_protocol::FrameError| Error::Vm(format!("the guest's answer: {e}"));
        if frame.kind != Kind::Reply {
            return Err(Error::Vm("the guest answered out of order".into()));
        }
        match Reply::from_payload(&frame.payload).map_err(wrong)? {
            Reply::Failed { kind, mut message } => {
                message.truncate(message.floor_char_boundary(MOST_WORDS));
                Err(Error::Guest { kind, message })
            }
            reply => Ok(reply),
        }
    }

    /// The next frame; `None` at the end. The limit is for all of it: a guest may send a byte now and then.
    fn frame(&mut self, deadline: Deadline) -> Result<Option<Frame>, Error> {
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(frame) =
                self.decoder.next_frame().map_err(|e| Error::Vm(format!("the guest's answer: {e}")))?
            {
                return Ok(Some(frame));
            }
            deadline.bound(&self.stream)?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(_) => return Ok(None),
            }
        }
    }
}

/// One request on a connection of its own. All of it takes no longer than the request may.
///
/// # Errors
/// As [`Connection::ask`].
pub fn ask(socket: &Path, request: &Request) -> Result<Reply, Error> {
    let deadline = Deadline::after(limit(request, false));
    Connection::open_until(socket, deadline, || false)?.ask_until(request, deadline)
}

/// How large a VM is, after its VMM was told how many MiB more than at boot it shall have.
///
/// # Errors
/// [`Error::State`] with the VMM's reason to leave it as it is, [`Error::VmGone`] when there is no VM.
pub fn vm_size(socket: &Path, wanted_mib: Option<u32>) -> Result<VmSize, Error> {
    let text = question(socket, Line::Memory(wanted_mib), None)?;
    match SizeAnswer::parse(&text) {
        Some(SizeAnswer::Size(size)) => Ok(size),
        Some(SizeAnswer::Refused(words)) => Err(Error::State(words)),
        None => Err(Error::Vm("the VMM's answer about its size is none".into())),
    }
}

/// Has the VMM make a network device with this address, on this tap.
///
/// # Errors
/// [`Error::State`] with the VMM's reason to make none, [`Error::VmGone`] when there is no VM.
pub fn add_net(socket: &Path, mac: &str, tap: &OwnedFd) -> Result<(), Error> {
    let mac = parse_mac(mac).ok_or_else(|| Error::State(format!("{mac} is no MAC address")))?;
    match NetAnswer::parse(&question(socket, Line::Net(mac), Some(tap.as_raw_fd()))?) {
        Some(NetAnswer::Added) => Ok(()),
        Some(NetAnswer::Refused(words)) => Err(Error::State(words)),
        None => Err(Error::Vm("the VMM's answer about a network device is none".into())),
    }
}

/// Asks the VMM something about the VM itself; its answer.
fn question(socket: &Path, line: Line, descriptor: Option<RawFd>) -> Result<String, Error> {
    let stream = UnixStream::connect(socket).map_err(|_| gone())?;
    stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(host("set a time limit"))?;
    let line = line.to_string();
    let rights = descriptor.as_slice();
    let along = if rights.is_empty() { &[][..] } else { &[ControlMessage::ScmRights(rights)] };
    // A line is short: it goes whole.
    sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(line.as_bytes())],
        along,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(|_| gone())?;
    let mut text = String::new();
    match stream.take(LONGEST_ANSWER as u64).read_to_string(&mut text) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(no_answer(ANSWER_LIMIT)),
        Err(_) | Ok(0) => Err(gone()),
        Ok(_) => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_protocol::SignalTarget;
    use serde_json::{Value, json};

    #[test]
    fn a_container_or_process_of_a_pod_that_may_wait_may_take_long_and_nothing_else() {
        let create = json!({ "id": "c", "spec": {}, "window": null, "binds": [], "shared": [] });
        let create = Request::Create(serde_json::from_value(create).unwrap());
        let exec = json!({ "id": "c", "exec_id": "e", "process": {}, "window": null });
        let exec = Request::Exec(serde_json::from_value(exec).unwrap());
        let start = Request::Start { id: "c".into() };
        let delete = Request::Delete { id: "c".into() };
        let signal =
            |signal: i32| Request::Signal { target: SignalTarget::Init("c".into()), signal: signal as u32 };
        for (request, at_once, waits) in [
            (&create, 60, 1200),
            (&exec, 60, 1200),
            (&start, 60, 60),
            (&delete, 10, 10),
            (&signal(libc::SIGTERM), 60, 60),
            (&signal(libc::SIGKILL), 10, 10),
        ] {
            assert_eq!(limit(request, false).as_secs(), at_once, "{request:?}");
            assert_eq!(limit(request, true).as_secs(), waits, "{request:?}");
        }
    }

    #[test]
    fn a_start_may_take_as_long_as_its_hooks_may() {
        let of = |list: &Value| {
            let hooks: Vec<Hook> = serde_json::from_value(list.clone()).unwrap();
            hooks_limit(&hooks).map(|limit| limit.as_secs())
        };
        let hook = |timeout: i64| json!({ "path": "/h", "timeout": timeout });
        assert_eq!(of(&json!([])), Some(60));
        assert_eq!(of(&json!([hook(100), hook(7)])), Some(167));
        for without in [json!({ "path": "/h" }), hook(0), hook(-1)] {
            assert_eq!(of(&json!([hook(100), without])), None);
        }
    }
}
