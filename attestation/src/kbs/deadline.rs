//! One limit on time for all of an exchange, whatever lies between it and the socket.
//!
//! Owns: that no read and no write of a TCP connection goes on after it. A limit for each read would not do: whoever is in the
//! middle sends a byte before each is over, and TLS reads many times for one of its own. Does not own: how long it is.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

/// When it has to be over.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    end: Instant,
    patience: Duration,
}

impl Deadline {
    /// After so long from now.
    #[must_use]
    pub fn after(patience: Duration) -> Self {
        Self { end: Instant::now() + patience, patience }
    }

    /// What is left of it, which is more than nothing.
    ///
    /// # Errors
    /// `TimedOut` when nothing is.
    pub fn left(&self) -> io::Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.passed()) } else { Ok(left) }
    }

    fn passed(&self) -> io::Error {
        let message = format!("it took longer than {} s", self.patience.as_secs_f32());
        io::Error::new(io::ErrorKind::TimedOut, message)
    }

    /// A socket's limit on one wait ends it as if it did not block.
    fn named(&self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::WouldBlock { self.passed() } else { error }
    }
}

/// A connection that is used no longer than that.
#[derive(Debug)]
pub(super) struct Timed {
    stream: TcpStream,
    pub(super) limit: Deadline,
}

impl Timed {
    pub(super) fn new(stream: TcpStream, limit: Deadline) -> Self {
        Self { stream, limit }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.limit.left()?))?;
        self.stream.read(buffer).map_err(|e| self.limit.named(e))
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.limit.left()?))?;
        self.stream.write(bytes).map_err(|e| self.limit.named(e))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
