//! Packets (RFC 9580, 4) and what they are made of.
//!
//! Owns: lengths, old and new, partial ones; multiprecision integers; decompression of one packet, bounded. Does not own: what a packet
//! means.

use std::borrow::Cow;

use flate2::{Decompress, FlushDecompress, Status};

use super::{MOST_MESSAGE, OpenPgpError};

/// Most packets of one message or ring.
const MOST_PACKETS: usize = 4096;
/// The first part of a body in parts has that many bytes at least (4.2.1.4).
const LEAST_FIRST_PART: usize = 512;

/// Packet types (RFC 9580, 5).
pub(super) mod tag {
    pub(crate) const SIGNATURE: u8 = 2;
    pub(crate) const ONE_PASS: u8 = 4;
    pub(crate) const SECRET_KEY: u8 = 5;
    pub(crate) const PUBLIC_KEY: u8 = 6;
    pub(crate) const SECRET_SUBKEY: u8 = 7;
    pub(crate) const COMPRESSED: u8 = 8;
    pub(crate) const LITERAL: u8 = 11;
    pub(crate) const USER_ID: u8 = 13;
    pub(crate) const PUBLIC_SUBKEY: u8 = 14;
    pub(crate) const USER_ATTRIBUTE: u8 = 17;
}

/// Compression algorithms (RFC 9580, 9.4).
mod compression {
    pub(super) const ZIP: u8 = 1;
    pub(super) const ZLIB: u8 = 2;
}

/// Takes bytes from the front, never more than there are.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    /// `what` is said when the bytes end early.
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], OpenPgpError> {
        let (taken, rest) =
            self.bytes.split_at_checked(n).ok_or(OpenPgpError::Form(self.what, "it ends early"))?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], OpenPgpError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, OpenPgpError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, OpenPgpError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, OpenPgpError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// A length that fits memory.
    pub(super) fn length(&mut self) -> Result<usize, OpenPgpError> {
        // A length that does not fit is longer than the bytes that there are.
        Ok(usize::try_from(self.u32()?).unwrap_or(usize::MAX))
    }

    /// A multiprecision integer, big-endian, in the only way that it may be written: its length in bits is that of its first bit.
    pub(super) fn integer(&mut self) -> Result<&'a [u8], OpenPgpError> {
        let bits = usize::from(self.u16()?);
        let bytes = self.take(bits.div_ceil(8))?;
        let zeros = bytes.first().map_or(0, |first| first.leading_zeros() as usize);
        if bytes.len() * 8 - zeros != bits {
            return Err(OpenPgpError::Form(self.what, "an integer has not the length that it says"));
        }
        Ok(bytes)
    }

    /// Nothing may follow.
    pub(super) fn end(self) -> Result<(), OpenPgpError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(OpenPgpError::Form(self.what, "something follows its end"))
        }
    }
}

/// One packet.
pub(super) struct Packet<'a> {
    pub(super) tag: u8,
    pub(super) body: Cow<'a, [u8]>,
}

/// All packets of `bytes`, to the last byte.
pub(super) fn packets<'a>(bytes: &'a [u8], what: &'static str) -> Result<Vec<Packet<'a>>, OpenPgpError> {
    let mut cursor = Cursor::new(bytes, what);
    let mut all = Vec::new();
    while !cursor.is_empty() {
        if all.len() == MOST_PACKETS {
            return Err(OpenPgpError::Form(what, "too many packets"));
        }
        all.push(packet(&mut cursor, what)?);
    }
    Ok(all)
}

fn packet<'a>(cursor: &mut Cursor<'a>, what: &'static str) -> Result<Packet<'a>, OpenPgpError> {
    let first = cursor.u8()?;
    if first & 0x80 == 0 {
        return Err(OpenPgpError::Form(what, "a byte where a packet should begin"));
    }
    if first & 0x40 != 0 {
        let tag = first & 0x3f;
        return Ok(Packet { tag, body: new_body(cursor, tag, what)? });
    }
    let tag = (first >> 2) & 0xf;
    let body = match first & 3 {
        0 => {
            let length = usize::from(cursor.u8()?);
            cursor.take(length)?
        }
        1 => {
            let length = usize::from(cursor.u16()?);
            cursor.take(length)?
        }
        2 => {
            let length = cursor.length()?;
            cursor.take(length)?
        }
        // To the end of all: gpg compresses what it does not know the length of.
        _ if tag == tag::COMPRESSED => cursor.rest(),
        _ => return Err(OpenPgpError::Form(what, "a packet without a length")),
    };
    Ok(Packet { tag, body: body.into() })
}

/// A body with a new length, which may come in parts where it is data.
fn new_body<'a>(cursor: &mut Cursor<'a>, tag: u8, what: &'static str) -> Result<Cow<'a, [u8]>, OpenPgpError> {
    let mut parts = Vec::new();
    loop {
        let first = cursor.u8()?;
        let (length, last) = match first {
            0..=191 => (usize::from(first), true),
            192..=223 => ((usize::from(first) - 192) * 256 + usize::from(cursor.u8()?) + 192, true),
            224..=254 => (1 << (first & 0x1f), false),
            255 => (cursor.length()?, true),
        };
        let data = matches!(tag, tag::COMPRESSED | tag::LITERAL);
        if !last && (!data || (parts.is_empty() && length < LEAST_FIRST_PART)) {
            return Err(OpenPgpError::Form(what, "a packet in parts that may not be"));
        }
        let part = cursor.take(length)?;
        if last && parts.is_empty() {
            return Ok(part.into());
        }
        parts.extend_from_slice(part);
        if last {
            return Ok(parts.into());
        }
    }
}

/// What is in a compressed packet (RFC 9580, 5.6), at most [`MOST_MESSAGE`] bytes.
pub(super) fn decompress(body: &[u8]) -> Result<Vec<u8>, OpenPgpError> {
    let (&algorithm, packed) =
        body.split_first().ok_or(OpenPgpError::Form("compressed data", "it ends early"))?;
    let zlib = match algorithm {
        compression::ZIP => false,
        compression::ZLIB => true,
        other => {
            return Err(OpenPgpError::Unsupported {
                object: "compressed data",
                what: format!("algorithm {other}"),
                remedy: "sign with gpg --compress-algo zip",
            });
        }
    };
    let mut plain = Vec::with_capacity(MOST_MESSAGE);
    let mut inflate = Decompress::new(zlib);
    match inflate.decompress_vec(packed, &mut plain, FlushDecompress::Finish) {
        Ok(Status::StreamEnd) if inflate.total_in() == packed.len() as u64 => Ok(plain),
        Ok(Status::StreamEnd) => Err(OpenPgpError::Form("compressed data", "something follows its end")),
        _ => Err(OpenPgpError::Form("compressed data", "it is broken, or more than 64 KiB")),
    }
}
