//! A thread beside PID 1's loop, for what waits on others: keys and blobs may take their time, and the pod goes on.
//!
//! Owns: that the loop can wait for its end along with everything else. Does not own: what it does, or that no process is made meanwhile
//! (`server::beside`).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread::{Builder, JoinHandle},
};

use nix::{fcntl::OFlag, unistd::pipe2};

/// What becomes a `T`.
pub(crate) struct Thread<T> {
    thread: JoinHandle<T>,
    /// Ends when the thread does.
    end: OwnedFd,
}

impl<T: Send + 'static> Thread<T> {
    /// Begins.
    ///
    /// # Errors
    /// The system's, without a thread.
    pub(crate) fn begin(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let (end, open) = pipe2(OFlag::O_CLOEXEC)?;
        let work = move || {
            let _open = open;
            work()
        };
        Ok(Self { thread: Builder::new().name(name.into()).spawn(work)?, end })
    }

    /// What it became. Waits, unless [`Self::as_fd`] can be read.
    ///
    /// # Errors
    /// When it panicked.
    pub(crate) fn end(self) -> io::Result<T> {
        self.thread.join().map_err(|_| io::Error::other("the thread panicked"))
    }
}

impl<T> AsFd for Thread<T> {
    /// Readable once there is an end.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}
