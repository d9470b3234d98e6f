//! The middle stage: gzip (any number of members) and zstd (any number of frames, skippable ones too).
//!
//! Owns: the bounds. A zstd frame may ask for a window of 8 MiB, which RFC 8878 (3.1.1.1.2) recommends decoders
//! to support, and not for more: the decoder's memory is most of what a layer costs.

use std::io::{BufRead, Read};

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::queue::{Receiver, Sender, Stopped};
use crate::manifest::Compression;

/// Largest zstd window in bytes.
pub const MOST_WINDOW: u64 = 8 << 20;

/// `ZSTD_error_frameParameter_windowTooLarge` (zstd_errors.h), as a result: the negative number.
const WINDOW_TOO_LARGE: usize = 16_usize.wrapping_neg();

/// Why the stage ended early.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// What came is no such stream.
    Broken(String),
    /// More than so many bytes came out.
    Bomb(u64),
    /// The stage behind is gone.
    Stopped,
}

impl From<Stopped> for Failure {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

/// Decompresses one stream into another, at most `most` bytes.
///
/// # Errors
/// [`Failure`].
pub fn decompress(compression: Compression, from: Receiver, to: &Sender, most: u64) -> Result<(), Failure> {
    let mut left = most;
    match compression {
        Compression::None => pass(from, to, &mut left, most)?,
        Compression::Gzip => pass(flate2::bufread::MultiGzDecoder::new(from), to, &mut left, most)?,
        Compression::Zstd => zstd(from, to, &mut left, most)?,
    }
    to.finish();
    Ok(())
}

fn pass(mut from: impl Read, to: &Sender, left: &mut u64, most: u64) -> Result<(), Failure> {
    loop {
        let mut chunk = to.buffer();
        let n = super::fill(&mut from, &mut chunk).map_err(|e| Failure::Broken(e.to_string()))?;
        if n == 0 {
            return Ok(());
        }
        *left = left.checked_sub(n as u64).ok_or(Failure::Bomb(most))?;
        chunk.truncate(n);
        to.send(chunk)?;
    }
}

fn zstd(mut from: Receiver, to: &Sender, left: &mut u64, most: u64) -> Result<(), Failure> {
    let broken = |code| match code {
        WINDOW_TOO_LARGE => Failure::Broken(format!("a frame wants a window of over {MOST_WINDOW} bytes")),
        _ => Failure::Broken(zstd_safe::get_error_name(code).to_owned()),
    };
    let mut decoder =
        DCtx::try_create().ok_or_else(|| Failure::Broken("no memory for zstd's decoder".into()))?;
    decoder.set_parameter(DParameter::WindowLogMax(MOST_WINDOW.ilog2())).map_err(broken)?;
    let (mut chunk, mut filled, mut within_a_frame) = (to.buffer(), 0, false);
    loop {
        let bytes = from.fill_buf().map_err(|e| Failure::Broken(e.to_string()))?;
        let (ended, mut input) = (bytes.is_empty(), InBuffer::around(bytes));
        let mut output = OutBuffer::around_pos(&mut chunk[..], filled);
        let still_wanted = decoder.decompress_stream(&mut output, &mut input).map_err(broken)?;
        let (read, now) = (input.pos(), output.pos());
        let new = now - filled;
        from.consume(read);
        *left = left.checked_sub(new as u64).ok_or(Failure::Bomb(most))?;
        // Without bytes of either kind the answer is about a frame that may follow.
        if read > 0 || new > 0 {
            within_a_frame = still_wanted != 0;
        }
        filled = now;
        if filled == chunk.len() {
            to.send(std::mem::replace(&mut chunk, to.buffer()))?;
            filled = 0;
        } else if ended {
            break;
        }
    }
    if within_a_frame {
        return Err(Failure::Broken("it ends within a zstd frame".into()));
    }
    if filled > 0 {
        chunk.truncate(filled);
        to.send(chunk)?;
    }
    Ok(())
}
