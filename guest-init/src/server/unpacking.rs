//! The image that is being unpacked, and the requests that wait for its end.
//!
//! Owns: that PID 1 serves the pod's other containers meanwhile, and which requests go beside. Does not own: the thread and what it
//! does (`image`), what a container is made of afterwards (`containers`).

use std::os::fd::{AsFd, AsRawFd};

use coffer_protocol::{CreateContainer, Reply, Request};

use super::{Server, containers::image_error};
use crate::{container::ContainerError, image};

/// A container whose image is not there yet.
pub(super) struct Unpacking {
    /// Its connection, which waits for the answer.
    key: u64,
    create: CreateContainer,
    image: image::Unpacking,
}

impl Unpacking {
    pub(super) fn new(key: u64, create: CreateContainer, image: image::Unpacking) -> Self {
        Self { key, create, image }
    }

    /// What to wait for.
    pub(super) fn fd(&self) -> i32 {
        self.image.as_fd().as_raw_fd()
    }
}

/// What makes a process waits while there is a second thread: a child of PID 1 goes on with that one's locks as they happen to be. All other
/// requests are no image's business.
fn waits(request: &Request) -> bool {
    matches!(request, Request::Create(_) | Request::Exec(_) | Request::Sandbox(_))
}

impl Server {
    /// Does what a request says, now or later.
    pub(super) fn ask(&mut self, key: u64, request: Request) {
        if self.unpacking.is_some() && waits(&request) {
            self.answer(key, Ok(None));
            self.waiting.push((key, request));
            return;
        }
        let answer = self.request(key, request);
        self.answer(key, answer);
    }

    /// Answers a request; with `None` its connection waits.
    pub(super) fn answer(&mut self, key: u64, answer: Result<Option<Reply>, ContainerError>) {
        let Some(session) = self.sessions.get_mut(&key) else { return };
        let reply = answer.unwrap_or_else(|e| Some(Reply::Failed { kind: e.kind, message: e.message }));
        session.paused = reply.is_none();
        if let Some(reply) = reply {
            session.reply(&reply);
        }
    }

    /// The image's thread has ended: makes the container, then does what waited for that.
    pub(super) fn unpacked(&mut self) {
        let Some(Unpacking { key, create, image }) = self.unpacking.take() else { return };
        match image.end() {
            Ok(image) if self.sessions.contains_key(&key) => {
                let made = self.make(key, create, Some(image));
                self.answer(key, made.map(|()| None));
            }
            // Whoever wanted it is gone.
            Ok(_) => self.clear(&create.id),
            Err(error) => self.answer(key, Err(image_error(&error))),
        }
        self.frames(key);
        for (key, request) in std::mem::take(&mut self.waiting) {
            // One that was given up meanwhile is not done for nobody.
            if self.sessions.contains_key(&key) {
                self.ask(key, request);
                self.frames(key);
            }
        }
    }
}
