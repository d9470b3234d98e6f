//! The bounded queue between two threads of the pipeline: chunks of bytes, read as a stream.
//!
//! Owns: the bound (eight chunks of 128 KiB) and the difference between an end and a break: a sender that is
//! dropped without [`Sender::finish`] gives its reader an error, so that nothing takes half a layer for a whole.

use std::{
    io::{self, BufRead, Read},
    sync::mpsc,
};

/// Bytes of a chunk.
pub const CHUNK: usize = 128 << 10;
const DEPTH: usize = 8;

enum Piece {
    Bytes(Vec<u8>),
    End,
}

/// Puts chunks in.
pub struct Sender {
    to: mpsc::SyncSender<Piece>,
    used: mpsc::Receiver<Vec<u8>>,
}

/// Takes bytes out.
pub struct Receiver {
    from: mpsc::Receiver<Piece>,
    used: mpsc::SyncSender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

/// The reader behind is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct Stopped;

/// A queue's two ends.
#[must_use]
pub fn queue() -> (Sender, Receiver) {
    let (to, from) = mpsc::sync_channel(DEPTH);
    let (give, used) = mpsc::sync_channel(DEPTH);
    (Sender { to, used }, Receiver { from, used: give, piece: Vec::new(), at: 0, ended: false })
}

impl Sender {
    /// A chunk to fill: one that came back, or a new one. Its old bytes are still there.
    #[must_use]
    pub fn buffer(&self) -> Vec<u8> {
        let mut chunk = self.used.try_recv().unwrap_or_default();
        chunk.resize(CHUNK, 0);
        chunk
    }

    /// Waits until there is room.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn send(&self, chunk: Vec<u8>) -> Result<(), Stopped> {
        self.to.send(Piece::Bytes(chunk)).map_err(|_| Stopped)
    }

    /// The stream ends well.
    pub fn finish(&self) {
        // A reader that is gone had its reason.
        let _ = self.to.send(Piece::End);
    }
}

impl Read for Receiver {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill_buf()?;
        let n = piece.len().min(buffer.len());
        buffer[..n].copy_from_slice(&piece[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Receiver {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.piece.len() && !self.ended {
            match self.from.recv() {
                Ok(Piece::Bytes(chunk)) => {
                    let old = std::mem::replace(&mut self.piece, chunk);
                    self.at = 0;
                    if old.capacity() > 0 {
                        // No room or nobody there: the chunk is simply freed.
                        let _ = self.used.try_send(old);
                    }
                }
                Ok(Piece::End) => self.ended = true,
                Err(_) => {
                    return Err(io::Error::new(
                        io::ErrorKind::BrokenPipe,
                        "the stage before this one failed",
                    ));
                }
            }
        }
        Ok(&self.piece[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at = (self.at + n).min(self.piece.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_break_is_not_an_end() {
        let (to, mut from) = queue();
        to.send(b"ab".to_vec()).unwrap();
        to.send(b"c".to_vec()).unwrap();
        to.finish();
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"abc");

        let (to, mut from) = queue();
        to.send(b"ab".to_vec()).unwrap();
        drop(to);
        assert_eq!(from.read_to_end(&mut Vec::new()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);

        let (to, from) = queue();
        drop(from);
        assert_eq!(to.send(Vec::new()), Err(Stopped));
    }
}
