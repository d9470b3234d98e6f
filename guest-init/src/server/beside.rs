//! What a thread does beside PID 1's loop for one request, and the requests that wait for its end.
//!
//! Owns: that PID 1 serves the pod's other containers meanwhile, and which requests go beside. Does not own: what the thread does (`image`,
//! `confidential`), what a container is made of afterwards (`containers`).

use std::os::fd::{AsFd, AsRawFd};

use coffer_protocol::{CreateContainer, Exec, Reply, Request};
use serde_json::Value;

use super::{Server, containers::image_error};
use crate::{container::ContainerError, image, thread::Thread};

/// A configuration or process with what a KBS gave.
pub(super) type Opening = Thread<Result<Value, ContainerError>>;

/// What becomes of what the thread makes.
pub(super) enum Job {
    /// A container's image.
    Image { create: CreateContainer, image: image::Unpacking },
    /// The configuration of a container, which is without it meanwhile.
    Container { create: CreateContainer, stop_signal: Option<u32>, opening: Opening },
    /// A further process, likewise.
    Process { exec: Exec, opening: Opening },
}

/// What a thread does.
pub(super) struct Beside {
    /// The connection that waits for the answer.
    key: u64,
    job: Job,
}

impl Beside {
    pub(super) fn new(key: u64, job: Job) -> Self {
        Self { key, job }
    }

    /// What to wait for.
    pub(super) fn fd(&self) -> i32 {
        match &self.job {
            Job::Image { image, .. } => image.as_fd().as_raw_fd(),
            Job::Container { opening, .. } | Job::Process { opening, .. } => opening.as_fd().as_raw_fd(),
        }
    }
}

/// What makes a process waits while there is a second thread: a child of PID 1 goes on with that one's locks as they happen to be. All other
/// requests are no image's and no KBS's business.
fn waits(request: &Request) -> bool {
    matches!(request, Request::Create(_) | Request::Exec(_) | Request::Sandbox(_))
}

/// A thread that opens something sealed.
pub(super) fn open(
    work: impl FnOnce() -> Result<Value, ContainerError> + Send + 'static,
) -> Result<Opening, ContainerError> {
    Thread::begin("kbs", work)
        .map_err(|e| ContainerError::guest("ask the KBS beside the pod's containers", e))
}

impl Server {
    /// Does what a request says, now or later.
    pub(super) fn ask(&mut self, key: u64, request: Request) {
        if self.beside.is_some() && waits(&request) {
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

    /// The connection that wanted it is gone: it is not worth its time.
    pub(super) fn not_wanted(&self, key: u64) {
        if let Some(Beside { key: of, job: Job::Image { image, .. } }) = &self.beside
            && *of == key
        {
            image.give_up();
        }
    }

    /// The thread has ended: goes on with what it made, then does what waited for that.
    pub(super) fn beside_ended(&mut self) {
        let Some(Beside { key, job }) = self.beside.take() else { return };
        let wanted = self.sessions.contains_key(&key);
        let begun = self.go_on(key, wanted, job);
        self.answer(key, begun.map(|()| None));
        self.frames(key);
        for (key, request) in std::mem::take(&mut self.waiting) {
            // One that was given up meanwhile is not done for nobody.
            if self.sessions.contains_key(&key) {
                self.ask(key, request);
                self.frames(key);
            }
        }
    }

    /// Whoever wanted it may be gone: then nothing is left of it.
    fn go_on(&mut self, key: u64, wanted: bool, job: Job) -> Result<(), ContainerError> {
        let ended = |e| ContainerError::guest("a thread of init", e);
        match job {
            Job::Image { create, image } => match image.end().map_err(ended)? {
                Ok(image) if wanted => self.make(key, create, Some(image)),
                Ok(_) => {
                    self.clear(&create.id);
                    Ok(())
                }
                Err(error) => {
                    self.clear(&create.id);
                    Err(image_error(&error))
                }
            },
            Job::Container { mut create, stop_signal, opening } => {
                let id = create.id.clone();
                let opened = opening.end().map_err(ended).and_then(|opened| opened);
                let made = opened.and_then(|spec| {
                    create.spec = spec;
                    if wanted { self.launch(key, create, stop_signal) } else { Ok(()) }
                });
                if made.is_err() || !wanted {
                    self.clear(&id);
                }
                made
            }
            Job::Process { mut exec, opening } => {
                exec.process = opening.end().map_err(ended)??;
                if wanted { self.further(key, exec) } else { Ok(()) }
            }
        }
    }
}

#[cfg(all(test, feature = "confidential"))]
mod tests {
    use std::{
        os::unix::net::{UnixListener, UnixStream},
        time::{Duration, Instant},
    };

    use coffer_protocol::CreateContainer;

    use super::*;

    #[test]
    fn an_image_whose_connection_is_gone_is_not_unpacked_to_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let mut server = Server::new(UnixListener::bind(&path).unwrap().into()).unwrap();
        let host = UnixStream::connect(&path).unwrap();
        server.turn().unwrap();
        let key = *server.sessions.keys().next().unwrap();
        let create = CreateContainer {
            id: "c".into(),
            spec: Value::Null,
            window: None,
            binds: Vec::new(),
            shared: Vec::new(),
            image: None,
            notify: None,
            streams: Vec::new(),
        };
        let image = image::Unpacking::endless();
        server.beside = Some(Beside::new(key, Job::Image { create, image }));
        drop(host);
        let began = Instant::now();
        while server.beside.is_some() && began.elapsed() < Duration::from_secs(20) {
            server.turn().unwrap();
        }
        assert!(server.beside.is_none(), "it goes on for nobody");
    }
}
