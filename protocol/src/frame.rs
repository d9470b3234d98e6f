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

/// Turns a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete frame, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`] when the stream is not frames; every later call returns the same error.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((header, body)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let kind = Kind::from_byte(header[0]).ok_or(FrameError::UnknownKind(header[0]))?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let Some(payload) = body.get(..length) else { return Ok(None) };
        let frame = Frame { kind, payload: payload.to_vec() };
        self.start += HEADER + length;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_kind() -> impl Strategy<Value = Kind> {
        (1u8..=12).prop_map(|byte| Kind::from_byte(byte).expect("1 to 12 are kinds"))
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
