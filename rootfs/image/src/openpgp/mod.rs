//! Signed OpenPGP messages: whether one is by a key of a ring, and what it says. It checks and never signs, encrypts or keeps a key.
//!
//! Why it exists: `signedBy` of containers-policy.json(5) wants OpenPGP, and no well-kept crate for it could be had where this was
//! written. One such as rpgp shall take its place; until then this reads what gpg 2.2 writes, by RFC 4880 and RFC 9580 (version 4
//! packets), and refuses everything else in words: what it does not understand could have meant "revoked".
//!
//! Owns: packets ([`packet`]), armour of keys, signatures, key rings with their bindings and revocations. Does not own: what the message
//! says of an image (`policy::simple`), nor trust in a key, which is the owner's policy's.
//!
//! Expiry is by the caller's clock. In a pod the host sets that: it can make an expired key good again, but not a revoked one.

mod armor;
mod key;
mod message;
mod packet;
mod ring;
mod signature;

use std::fmt;

use thiserror::Error;

pub use self::{
    message::check,
    ring::{MOST_RING, Ring},
};

/// Largest content of a message in bytes, packed or not. A payload has some 250.
pub const MOST_MESSAGE: usize = 64 << 10;

/// Why a message or a key ring is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OpenPgpError {
    /// Not of the form.
    #[error("OpenPGP: {0}: {1}")]
    Form(&'static str, &'static str),
    /// Of a form that is not read here.
    #[error("OpenPGP: {object}: {what} is not supported: {remedy}")]
    Unsupported {
        /// What it was found in.
        object: &'static str,
        /// What was found.
        what: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The arithmetic.
    #[error("OpenPGP: signature: it is not by key {0}, or what it signs was changed")]
    Forged(Fingerprint),
    /// Its key is not there.
    #[error("OpenPGP: signature: it is by key {0}, which is none of the rule's")]
    Stranger(String),
    /// Its key may not sign, or did not when it was made.
    #[error("OpenPGP: key {0}: {1}")]
    Key(Fingerprint, String),
    /// The signature's own time.
    #[error("OpenPGP: signature: {0}")]
    Time(&'static str),
}

/// Names a key: SHA-1 over its packet (RFC 9580, 5.5.4.2). An attacker who finds a second key with the same name gains nothing: what
/// counts is in the ring.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 20]);

impl Fingerprint {
    /// Its last eight bytes, by which older packets name the key.
    fn id(&self) -> [u8; 8] {
        let mut id = [0; 8];
        id.copy_from_slice(&self.0[12..]);
        id
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02X}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests;
