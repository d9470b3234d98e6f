//! Processes that are not their programs yet: those that are made, and those that were let go and whose hooks run.
//!
//! Owns: that PID 1 serves the pod meanwhile, who gets the answer, what becomes of a process whose host has gone. Does not own: what is
//! said with the process (`container`), what containers there are (`containers`).

use std::{
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use coffer_layout::mark;
use coffer_protocol::{Exit, Reply};

use super::{Server, containers::New};
use crate::{
    boot,
    container::{ContainerError, Making, Stage},
    stdio::Process,
};

/// How often a process that says nothing is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What a process begins as.
pub(super) enum As {
    /// A container's first one, up to its program.
    First(Box<New>),
    /// The same, which was let go.
    Started,
    /// A further one.
    Further,
}

/// A process that is not its program yet.
pub(super) struct Beginning {
    container: String,
    what: As,
    making: Making,
    /// It has ended, and nobody had it yet who could be told.
    exit: Option<Exit>,
    looked: Instant,
}

impl Beginning {
    pub(super) fn new(container: String, what: As, making: Making) -> Self {
        Self { container, what, making, exit: None, looked: Instant::now() }
    }

    /// A container's process that was let go may stand still for as long as its engine wants it to.
    fn is_looked_at(&self) -> bool {
        !matches!(self.what, As::Started)
    }
}

impl Server {
    /// What to wait for, by the connection that gets the answer.
    pub(super) fn beginnings(&self) -> impl Iterator<Item = (u64, i32)> {
        self.beginnings.iter().map(|(key, begun)| (*key, begun.making.as_fd().as_raw_fd()))
    }

    /// How long to wait at most, in milliseconds as poll takes them.
    pub(super) fn patience(&self) -> i32 {
        if self.beginnings.values().any(Beginning::is_looked_at) { LOOK.as_millis() as i32 } else { -1 }
    }

    /// Whether a container of this id is being made.
    pub(super) fn is_made(&self, id: &str) -> bool {
        self.beginnings.values().any(|b| matches!(b.what, As::First(_)) && b.container == id)
    }

    /// A process says something, or is its program.
    pub(super) fn heard(&mut self, key: u64) {
        let Some(begun) = self.beginnings.get_mut(&key) else { return };
        match (begun.making.hear(), &begun.what) {
            (Ok(Stage::Made | Stage::Goes), _) => {}
            (Ok(Stage::Waits), As::Further) => {
                if let Err(error) = begun.making.go() {
                    self.begun(key, Err(error));
                }
            }
            (Ok(Stage::Waits | Stage::Runs), _) => self.begun(key, Ok(())),
            (Err(error), _) => self.begun(key, Err(error)),
        }
    }

    /// A process has come as far as it was to come, or to nothing: what waits for it is answered.
    fn begun(&mut self, key: u64, ended: Result<(), ContainerError>) {
        let Some(Beginning { container: id, what, mut making, exit, .. }) = self.beginnings.remove(&key)
        else {
            return;
        };
        let done = match (ended, what) {
            (Ok(()), As::First(new)) => {
                boot::tell(mark::CONTAINER_CREATED);
                self.created(key, id, *new, making)
            }
            (Ok(()), As::Started) => Ok(()),
            (Ok(()), As::Further) => {
                let mut process = Process::new(making.pid().unwrap_or_default(), making.take_stdio());
                process.ended = exit.map(Into::into);
                self.attach(key, &id, process)
            }
            (Err(error), As::First(new)) => {
                self.undo(&id, &new);
                Err(error)
            }
            (Err(error), _) => Err(error),
        };
        self.answer(key, done.map(|()| Some(Reply::Done)));
        self.frames(key);
    }

    /// Ends what is stopped while it is made.
    pub(super) fn look(&mut self) {
        let due = |b: &&mut Beginning| b.is_looked_at() && b.looked.elapsed() >= LOOK;
        let mut stopped = Vec::new();
        for (key, begun) in &mut self.beginnings {
            if let Some(begun) = Some(begun).filter(due) {
                begun.looked = Instant::now();
                stopped.extend(begun.making.end_if_stopped().err().map(|error| (*key, error)));
            }
        }
        for (key, error) in stopped {
            self.begun(key, Err(error));
        }
    }

    /// The connection that wanted a process is gone: it does not come to be. A container that was let go is not that connection's.
    pub(super) fn give_up(&mut self, key: u64) {
        if self.beginnings.get(&key).is_none_or(|begun| matches!(begun.what, As::Started)) {
            return;
        }
        let Some(mut begun) = self.beginnings.remove(&key) else { return };
        // It may have said its number.
        let _ = begun.making.hear();
        begun.making.give_up();
        if let As::First(new) = begun.what {
            self.undo(&begun.container, &new);
        }
    }

    /// One that is still to be told of has ended.
    pub(super) fn ended_early(&mut self, pid: i32, exit: Exit) {
        if let Some(begun) = self.beginnings.values_mut().find(|b| b.making.pid() == Some(pid)) {
            begun.exit = Some(exit);
        }
    }
}
