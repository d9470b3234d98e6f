//! Inputs that earlier runs have found, which are many and small: a target's lie in one archive, `corpus/TARGET.cpio.gz` (`zcat FILE | cpio -it`).
//!
//! Owns: the archive. Does not own: which inputs are in it.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use cpio::{NewcBuilder, NewcReader, newc};
use flate2::{Compression, bufread::GzDecoder, write::GzEncoder};

/// What is in it, in order; nothing when there is none.
pub(crate) fn read(archive: &Path) -> io::Result<Vec<Vec<u8>>> {
    let file = match File::open(archive) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut inputs = Vec::new();
    let mut rest = GzDecoder::new(io::BufReader::new(file));
    loop {
        let mut reader = NewcReader::new(rest)?;
        if reader.entry().is_trailer() {
            return Ok(inputs);
        }
        let mut input = Vec::new();
        reader.read_to_end(&mut input)?;
        inputs.push(input);
        rest = reader.finish()?;
    }
}

/// Writes it anew. The same inputs make the same file.
pub(crate) fn write(archive: &Path, inputs: &[Vec<u8>]) -> io::Result<()> {
    let mut out = GzEncoder::new(Vec::new(), Compression::best());
    for (n, input) in inputs.iter().enumerate() {
        let length = u32::try_from(input.len()).map_err(io::Error::other)?;
        let mut entry = NewcBuilder::new(&format!("{n:05}")).mode(0o100_644).ino(n as u32).write(out, length);
        entry.write_all(input)?;
        out = entry.finish()?;
    }
    fs::write(archive, newc::trailer(out)?.finish()?)
}
