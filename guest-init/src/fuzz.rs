//! For fuzz targets (`guest-init/fuzz`): a conversation with a process's host, and the owner's policy before a request.
//!
//! Owns: nothing of its own; the parts are those that the server uses.

use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use coffer_attestation::evidence::{Attesters, Sample};
use coffer_protocol::{ImageSource, Request};
use serde_json::Value;

use crate::{
    confidential::Confidential,
    container::ContainerError,
    session::{Session, Streams},
    stdio::{Further, Input, Process, Stdio, unblock},
};

/// What came of a conversation.
#[derive(Debug, Default)]
pub struct Conversation {
    /// What the process read from its stdin, and from the further stream with number 0.
    pub stdin: Vec<u8>,
    /// The same of that stream.
    pub stream: Vec<u8>,
    /// What the host was sent.
    pub answers: Vec<u8>,
    /// Signals that it wanted to send.
    pub signals: Vec<u32>,
    /// The connection was given up.
    pub dead: bool,
}

/// A host that has a process says this, in pieces of so many bytes. The process reads whatever comes.
///
/// # Panics
/// When the system has no sockets left, or a socket fails.
#[must_use]
pub fn converse(bytes: &[u8], piece: usize, stdin: bool) -> Conversation {
    let pair = || {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        unblock(&ours).and_then(|()| unblock(&theirs)).expect("non-blocking");
        (OwnedFd::from(ours), theirs)
    };
    let ((host, mut remote), (input, mut program), (both, mut other)) = (pair(), pair(), pair());
    let further = Further { fd: Some(both), input: Some(Input::default()), output: true };
    let stdio = Stdio { stdin: Some(input), further: vec![further], ..Stdio::default() };
    let mut session = Session::new(host);
    session.attach("c", Process::new(i32::MAX, stdio), Streams { stdin, output: true });
    let mut result = Conversation::default();
    for piece in bytes.chunks(piece.max(1)) {
        remote.write_all(piece).expect("room in a socket");
        session.read_host();
        loop {
            match session.next_frame() {
                Ok(Some(frame)) => result.signals.extend(session.process_frame(&frame)),
                Ok(None) => break,
                Err(_) => {
                    session.dead = true;
                    break;
                }
            }
        }
        drain(&mut program, &mut result.stdin);
        drain(&mut other, &mut result.stream);
        if session.dead {
            break;
        }
        session.feed_stdin(&[]);
        session.feed_stream(0, &[]);
        session.write_host();
        drain(&mut remote, &mut result.answers);
    }
    drain(&mut program, &mut result.stdin);
    drain(&mut other, &mut result.stream);
    result.dead = session.dead;
    result
}

fn drain(from: &mut UnixStream, into: &mut Vec<u8>) {
    let mut buffer = [0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        into.extend_from_slice(&buffer[..count]);
    }
}

/// A pod with an owner's policy.
pub struct Pod(Confidential);

impl Pod {
    /// With initdata; the evidence is the sample one.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn new(initdata: &str) -> Result<Self, ContainerError> {
        Confidential::with(Some(initdata), Attesters::of(Sample)).map(Self)
    }

    /// Whether the owner allows a request, and for a container what it would run.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn check(&mut self, request: &Request) -> Result<(), ContainerError> {
        self.0.check(request)?;
        match request {
            Request::Create(create) => self.container(&create.id, &create.spec, create.image.as_ref()),
            _ => Ok(()),
        }
    }

    /// Whether the owner allows a container.
    ///
    /// # Errors
    /// [`ContainerError`].
    pub fn container(
        &mut self,
        id: &str,
        spec: &Value,
        image: Option<&ImageSource>,
    ) -> Result<(), ContainerError> {
        self.0.check_container(id, spec, image, &[])
    }
}
