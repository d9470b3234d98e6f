//! ASCII armour of public keys (RFC 9580, 6).
//!
//! Owns: its lines. Does not own: the packets. The checksum is not looked at, as RFC 9580 asks: it protects nothing.

use base64::{Engine, engine::general_purpose::STANDARD};

use super::OpenPgpError;

const BEGIN: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
const END: &str = "-----END PGP PUBLIC KEY BLOCK-----";
const WHAT: &str = "armoured key";

/// Whether it is text. A packet's first byte has its highest bit set.
pub(super) fn is_armoured(bytes: &[u8]) -> bool {
    bytes.first().is_some_and(u8::is_ascii)
}

/// The packets of all blocks, one after the other.
pub(super) fn open(bytes: &[u8]) -> Result<Vec<u8>, OpenPgpError> {
    let text = std::str::from_utf8(bytes).map_err(|_| OpenPgpError::Form(WHAT, "it is no text"))?;
    let mut lines = text.lines().map(str::trim_end).skip_while(|line| line.is_empty()).peekable();
    let mut packets = Vec::new();
    while let Some(line) = lines.next() {
        match line {
            "" => continue,
            BEGIN => {}
            // Such as a private key, or a key after a comment.
            _ => return Err(OpenPgpError::Form(WHAT, "want -----BEGIN PGP PUBLIC KEY BLOCK-----")),
        }
        // Headers say nothing that counts; an empty line ends them.
        for header in lines.by_ref() {
            if header.is_empty() {
                break;
            }
            if !header.contains(": ") {
                return Err(OpenPgpError::Form(WHAT, "no empty line before its data"));
            }
        }
        let mut block = String::new();
        loop {
            match lines.next() {
                Some(END) => break,
                Some(line) if line.starts_with('=') && lines.peek() == Some(&END) => {}
                Some(line) => block.push_str(line),
                None => return Err(OpenPgpError::Form(WHAT, "it has no end")),
            }
        }
        packets
            .extend(STANDARD.decode(block).map_err(|_| OpenPgpError::Form(WHAT, "its data are not base64"))?);
    }
    Ok(packets)
}
