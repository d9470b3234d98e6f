//! The middle stage: gzip (any number of members) and zstd (any number of frames, skippable ones too).
//!
//! Owns: the bounds. A zstd frame may ask for a window of 8 MiB, which RFC 8878 (3.1.1.1.2) recommends decoders
//! to support, and not for more: the decoder's memory is most of what a layer costs.

use std::io::{BufRead, Read};

use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use super::queue::{Receiver, Sender, Stopped};
use crate::manifest::Compression;

/// Largest zstd window in bytes.
pub const MOST_WINDOW: u64 = 8 << 20;

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
    let broken = |e: &dyn std::fmt::Display| Failure::Broken(e.to_string());
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MOST_WINDOW);
    while !from.fill_buf().map_err(|e| broken(&e))?.is_empty() {
        match decoder.init(&mut from) {
            Ok(()) => {}
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length, ..
            })) => {
                let skipped = std::io::copy(&mut (&mut from).take(length.into()), &mut std::io::sink());
                if skipped.map_err(|e| broken(&e))? != u64::from(length) {
                    return Err(Failure::Broken("it ends in a skippable frame".into()));
                }
                continue;
            }
            Err(e) => return Err(broken(&e)),
        }
        loop {
            let finished = decoder.is_finished();
            if !finished {
                decoder
                    .decode_blocks(&mut from, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(|e| broken(&e))?;
            }
            while decoder.can_collect() > 0 {
                let mut chunk = to.buffer();
                let n = decoder.read(&mut chunk).map_err(|e| broken(&e))?;
                *left = left.checked_sub(n as u64).ok_or(Failure::Bomb(most))?;
                chunk.truncate(n);
                to.send(chunk)?;
            }
            if finished {
                break;
            }
        }
    }
    Ok(())
}
