//! Frames: one byte of kind, four bytes of payload length (little endian), the payload.
//!
//! Owns: the byte format and its limits. Does not own: what a payload means.

use thiserror::Error;

/// Longest payload, in bytes. A longer one is refused before anything of it is kept.
pub const MAX_PAYLOAD: usize = 4 * 1024 * 1024;

const HEADER: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host to guest, first frame: a [`crate::Request`] as JSON.
    Request = 1,
    /// Guest to host, first frame: a [`crate::Reply`] as JSON.
    Reply = 2,
    /// Host to guest: bytes for the process's stdin (or its terminal).
    Stdin = 3,
    /// Host to guest: no more stdin; no payload.
    StdinEnd = 4,
    /// Guest to host: bytes of stdout (or of the terminal).
    Stdout = 5,
    /// Guest to host: bytes of stderr.
    Stderr = 6,
    /// Guest to host: this many more bytes of stdin were read by the process, u32 little endian.
    StdinCredit = 7,
    /// Host to guest: send this signal to the process, u32 little endian.
    Signal = 8,
    /// Host to guest: a [`crate::WindowSize`] as JSON.
    Resize = 9,
    /// Guest to host, last frame: an [`crate::Ended`] as JSON. All output was sent before it.
    Ended = 10,
    /// Guest to host: nobody has stdout open any more; no payload.
    StdoutEnd = 11,
    /// Guest to host: nobody has stderr open any more; no payload.
    StderrEnd = 12,
    /// Guest to host: what a process said to its service manager, one message of at most [`crate::MAX_NOTIFICATION`] bytes
    /// (sd_notify(3)).
    Notification = 13,
    /// Either way: bytes of one of the process's further streams, after one byte with its number ([`crate::Stream`]).
    Stream = 14,
    /// Either way: no more of it; one byte with its number.
    StreamEnd = 15,
    /// Guest to host: the process has read this many more bytes of a further stream; its number, u32 little endian.
    StreamCredit = 16,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Request,
            2 => Self::Reply,
            3 => Self::Stdin,
            4 => Self::StdinEnd,
            5 => Self::Stdout,
            6 => Self::Stderr,
            7 => Self::StdinCredit,
            8 => Self::Signal,
            9 => Self::Resize,
            10 => Self::Ended,
            11 => Self::StdoutEnd,
            12 => Self::StderrEnd,
            13 => Self::Notification,
            14 => Self::Stream,
            15 => Self::StreamEnd,
            16 => Self::StreamCredit,
            _ => return None,
        })
    }
}

/// One frame, as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame. The connection cannot be used any more.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// The kind byte has no meaning.
    #[error("frame of unknown kind {0}: the other side speaks another protocol version")]
    UnknownKind(u8),
    /// The announced length is over the limit.
    #[error("frame of {0} bytes: at most {MAX_PAYLOAD} are accepted")]
    TooLong(usize),
    /// A payload is not what its kind promises.
    #[error("frame payload: {0}")]
    Payload(String),
}

/// Appends a frame to `out`.
///
/// # Panics
/// When `payload` is longer than [`MAX_PAYLOAD`]: callers split streams and bound messages before.
pub fn encode(kind: Kind, payload: &[u8], out: &mut Vec<u8>) {
    assert!(payload.len() <= MAX_PAYLOAD, "frame payload of {} bytes", payload.len());
    out.reserve(HEADER + payload.len());
    out.push(kind as u8);
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
}

/// Makes a buffer at least this long. At first it is the allocator's own zeroes: memory that is never read to is never touched.
fn grow(buffer: &mut Vec<u8>, length: usize) {
    if buffer.is_empty() {
        *buffer = vec![0; length];
    } else if buffer.len() < length {
        buffer.resize(length, 0);
    }
}

/// Turns a byte stream into frames. Bytes are read straight into its buffer and lent out of it, so that a stream costs no
/// copy here.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Zeroed once, then used again and again.
    buffer: Vec<u8>,
    /// What of it was received and not handed out yet.
    start: usize,
    end: usize,
}

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.filled(bytes.len());
    }

    /// Where to read to: at least this many bytes. Say with [`Self::filled`] how many came.
    pub fn space(&mut self, least: usize) -> &mut [u8] {
        if self.start > 0 && (self.start == self.end || self.buffer.len() - self.end < least) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        grow(&mut self.buffer, self.end + least);
        &mut self.buffer[self.end..]
    }

    /// This many bytes of [`Self::space`] were received.
    ///
    /// # Panics
    /// When there was less space.
    pub fn filled(&mut self, count: usize) {
        assert!(count <= self.buffer.len() - self.end, "{count} bytes in less space");
        self.end += count;
    }

    /// What was received and not handed out yet, for another decoder that goes on.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The next complete frame, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`] when the stream is not frames; every later call returns the same error.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        Ok(self.lend()?.map(|(kind, payload)| Frame { kind, payload: payload.to_vec() }))
    }

    /// The same, without a copy of the payload.
    ///
    /// # Errors
    /// As [`Self::next_frame`].
    pub fn lend(&mut self) -> Result<Option<(Kind, &[u8])>, FrameError> {
        let rest = &self.buffer[self.start..self.end];
        let Some((header, body)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let kind = Kind::from_byte(header[0]).ok_or(FrameError::UnknownKind(header[0]))?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let Some(payload) = body.get(..length) else { return Ok(None) };
        self.start += HEADER + length;
        Ok(Some((kind, payload)))
    }
}

/// Frames that wait to be sent. A stream's bytes are read straight into it.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Zeroed once, then used again and again.
    buffer: Vec<u8>,
    /// What of it was not sent yet.
    start: usize,
    end: usize,
}

impl Outbox {
    /// Adds a frame.
    ///
    /// # Panics
    /// As [`encode`].
    pub fn push(&mut self, kind: Kind, payload: &[u8]) {
        self.space(payload.len())[..payload.len()].copy_from_slice(payload);
        self.filled(kind, payload.len());
    }

    /// Where to put a payload of up to `most` bytes. [`Self::filled`] makes it a frame; without it, it is none.
    ///
    /// # Panics
    /// When `most` is over [`MAX_PAYLOAD`].
    pub fn space(&mut self, most: usize) -> &mut [u8] {
        assert!(most <= MAX_PAYLOAD, "frame payload of {most} bytes");
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && self.buffer.len() - self.end < HEADER + most {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let from = self.end + HEADER;
        grow(&mut self.buffer, from + most);
        &mut self.buffer[from..from + most]
    }

    /// The first `count` bytes of the space that was given are a frame's payload.
    ///
    /// # Panics
    /// When there was less space.
    pub fn filled(&mut self, kind: Kind, count: usize) {
        let whole = self.end + HEADER + count;
        assert!(whole <= self.buffer.len(), "{count} bytes in less space");
        self.buffer[self.end] = kind as u8;
        self.buffer[self.end + 1..self.end + HEADER].copy_from_slice(&(count as u32).to_le_bytes());
        self.end = whole;
    }

    /// What waits, in the order to send it.
    #[must_use]
    pub fn waiting(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// This many bytes of [`Self::waiting`] were sent.
    ///
    /// # Panics
    /// When that is more than waits.
    pub fn sent(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "{count} bytes sent of fewer");
        self.start += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_kind() -> impl Strategy<Value = Kind> {
        (1u8..=16).prop_map(|byte| Kind::from_byte(byte).expect("1 to 16 are kinds"))
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting_of_the_stream(
            frames in prop::collection::vec((any_kind(), prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            cut in 1usize..64,
        ) {
            let mut bytes = Vec::new();
            for (kind, payload) in &frames {
                encode(*kind, payload, &mut bytes);
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push((frame.kind, frame.payload));
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn an_outbox_holds_what_encode_makes_however_it_is_emptied(
            frames in prop::collection::vec((any_kind(), prop::collection::vec(any::<u8>(), 0..300), 0usize..400), 0..20),
        ) {
            let (mut wanted, mut sent) = (Vec::new(), Vec::new());
            let mut outbox = Outbox::default();
            for (kind, payload, now) in &frames {
                encode(*kind, payload, &mut wanted);
                // Space that is not used, and more than is used, leave nothing behind.
                outbox.space(7);
                let space = outbox.space(payload.len() + 9);
                space[..payload.len()].copy_from_slice(payload);
                outbox.filled(*kind, payload.len());
                let now = outbox.waiting().len().min(*now);
                sent.extend_from_slice(&outbox.waiting()[..now]);
                outbox.sent(now);
            }
            sent.extend_from_slice(outbox.waiting());
            prop_assert_eq!(sent, wanted);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_keep_more_than_it_was_given(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(frame)) = decoder.next_frame() {
                prop_assert!(frame.payload.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        let mut decoder = Decoder::default();
        decoder.push(&[Kind::Stdin as u8, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(0xffff_ffff)));
    }
}
