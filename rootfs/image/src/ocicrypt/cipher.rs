//! AES-256-CTR with HMAC-SHA256 of the ciphertext under the same key, as a stream.
//!
//! Owns: the arithmetic of one layer. What comes out is not authentic before [`Stream::finish`] said so.

use aes::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;
use zeroize::Zeroizing;

use super::LayerKey;

/// The ciphertext is not what was encrypted.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("HMAC of the ciphertext does not hold: the layer was changed or its key is another layer's")]
pub struct HmacError;

/// HMAC takes a whole block as its key; a shorter one is padded with zeros (RFC 2104).
fn mac(key: &[u8; 32]) -> Hmac<Sha256> {
    let mut block = Zeroizing::new([0; 64]);
    block[..32].copy_from_slice(key);
    Hmac::new(&(*block).into())
}

/// One layer on its way.
pub struct Stream {
    cipher: ctr::Ctr128BE<aes::Aes256>,
    mac: Hmac<Sha256>,
    expected: [u8; 32],
}

impl Stream {
    /// At the layer's first byte.
    #[must_use]
    pub fn new(key: &LayerKey) -> Self {
        Self {
            cipher: ctr::Ctr128BE::new(&(*key.key).into(), &key.nonce.into()),
            mac: mac(&key.key),
            expected: key.hmac,
        }
    }

    /// Turns the next bytes of ciphertext into plaintext, in place.
    pub fn decrypt(&mut self, bytes: &mut [u8]) {
        self.mac.update(bytes);
        self.cipher.apply_keystream(bytes);
    }

    /// Turns the next bytes of plaintext into ciphertext, in place.
    pub fn encrypt(&mut self, bytes: &mut [u8]) {
        self.cipher.apply_keystream(bytes);
        self.mac.update(bytes);
    }

    /// After the last byte of a layer that was decrypted: whether it was authentic, in constant time.
    ///
    /// # Errors
    /// [`HmacError`].
    pub fn finish(self) -> Result<(), HmacError> {
        self.mac.verify(&self.expected.into()).map_err(|_| HmacError)
    }

    /// After the last byte of a layer that was encrypted: its HMAC.
    #[must_use]
    pub fn mac(self) -> [u8; 32] {
        self.mac.finalize().into_bytes().into()
    }
}
