//! ocicrypt's layer encryption: annotations, wrapped keys, and the key that a layer's annotations give.
//!
//! Owns: from a layer's annotations to [`LayerKey`] and back. Formats as containers/ocicrypt 1.1 writes them
//! (`spec/spec.go`, `blockcipher/blockcipher.go`); wraps `jwe` and `provider.attestation-agent`. Does not own:
//! fetching a key ([`KeySource`]), nor the manifest's authenticity, which this format does not give.

pub mod cipher;
pub mod jwe;
pub mod keyprovider;
pub mod packet;

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use self::{jwe::PrivateKey, packet::Packet};

/// The only layer cipher that there is.
pub const CIPHER: &str = "AES_256_CTR_HMAC_SHA256";
/// Annotation: cipher and HMAC, public.
pub const PUBLIC: &str = "org.opencontainers.image.enc.pubopts";
/// Annotation prefix: wrapped keys.
pub const KEYS: &str = "org.opencontainers.image.enc.keys.";
/// Annotation: the key wrapped for CoCo's key provider.
pub const ATTESTATION_AGENT: &str = "org.opencontainers.image.enc.keys.provider.attestation-agent";
/// Annotation: the key wrapped by JWE.
pub const JWE: &str = "org.opencontainers.image.enc.keys.jwe";
/// Most wraps of one layer that are tried.
const MOST_WRAPS: usize = 32;
/// Longest annotation, in bytes.
const MOST_ANNOTATION: usize = 64 << 10;

/// A layer's key could not be had.
#[derive(Debug, Error)]
pub enum KeyError {
    /// An annotation is missing or broken.
    #[error("layer key: annotation {0}: {1}")]
    Annotation(String, String),
    /// Another cipher.
    #[error("layer key: cipher {0:?}: only {CIPHER} is known")]
    Cipher(String),
    /// No wrap could be opened.
    #[error("layer key: no wrap could be opened: {0}")]
    NoKey(String),
    /// What was unwrapped is no layer key.
    #[error("layer key: unwrapped options: {0}")]
    Options(&'static str),
}

/// What encrypts one layer: AES-256-CTR's key and counter block, and HMAC-SHA256 (same key) of the ciphertext.
#[derive(Clone)]
pub struct LayerKey {
    /// Both the cipher's and the MAC's.
    pub key: Zeroizing<[u8; 32]>,
    /// The first counter block.
    pub nonce: [u8; 16],
    /// HMAC-SHA256 over the ciphertext.
    pub hmac: [u8; 32],
}

/// What a key travels in: wiped when it is dropped.
pub type KeyBytes = Zeroizing<Vec<u8>>;

/// Gives keys to open wraps with.
pub trait KeySource {
    /// The key that a packet's `kid` names, `kbs:///repository/type/tag`: 32 bytes for A256GCM.
    ///
    /// # Errors
    /// In words, without the key.
    fn resource(&self, kid: &str) -> Result<Zeroizing<Vec<u8>>, String>;

    /// Private keys to try on JWE wraps.
    ///
    /// # Errors
    /// In words.
    fn private_keys(&self) -> Result<Vec<PrivateKey>, String> {
        Ok(Vec::new())
    }
}

/// A source without keys: images that are not encrypted need none.
pub struct NoKeys;

impl KeySource for NoKeys {
    fn resource(&self, _: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        Err("no key source is configured".into())
    }
}

#[derive(Serialize, Deserialize)]
struct Public {
    cipher: String,
    hmac: String,
    cipheroptions: BTreeMap<String, String>,
}

/// ocicrypt's private layer block cipher options, in Go's order.
#[derive(Serialize, Deserialize)]
struct Private {
    symkey: Zeroizing<String>,
    digest: String,
    cipheroptions: BTreeMap<String, String>,
}

fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let bytes = Zeroizing::new(STANDARD.decode(text).ok()?);
    bytes.as_slice().try_into().ok()
}

impl LayerKey {
    /// A new key; its HMAC is filled in when the layer has been encrypted.
    ///
    /// # Errors
    /// [`KeyError::Options`] when the kernel gives no random bytes.
    pub fn generate() -> Result<Self, KeyError> {
        let mut made = Self { key: Zeroizing::new([0; 32]), nonce: [0; 16], hmac: [0; 32] };
        let random = |_| KeyError::Options("no random bytes from the kernel");
        getrandom::fill(&mut *made.key).map_err(random)?;
        getrandom::fill(&mut made.nonce).map_err(random)?;
        Ok(made)
    }

    /// The private options as ocicrypt writes them: what a wrap wraps. `plain` is the digest of the layer as
    /// it was before encryption.
    #[must_use]
    pub fn private_options(&self, plain: &str) -> Zeroizing<Vec<u8>> {
        let options = Private {
            symkey: Zeroizing::new(STANDARD.encode(*self.key)),
            digest: plain.into(),
            cipheroptions: [("nonce".to_owned(), STANDARD.encode(self.nonce))].into(),
        };
        Zeroizing::new(serde_json::to_vec(&options).unwrap_or_default())
    }

    /// The value of the public annotation.
    #[must_use]
    pub fn public_options(&self) -> String {
        let options = Public {
            cipher: CIPHER.into(),
            hmac: STANDARD.encode(self.hmac),
            cipheroptions: BTreeMap::new(),
        };
        STANDARD.encode(serde_json::to_vec(&options).unwrap_or_default())
    }

    fn from_options(private: &[u8], hmac: [u8; 32]) -> Result<Self, KeyError> {
        let options: Private =
            serde_json::from_slice(private).map_err(|_| KeyError::Options("not ocicrypt's JSON"))?;
        let nonce = options.cipheroptions.get("nonce").ok_or(KeyError::Options("no nonce"))?;
        Ok(Self {
            key: decode(&options.symkey)
                .map(Zeroizing::new)
                .ok_or(KeyError::Options("symkey: want 32 bytes"))?,
            nonce: decode(nonce).ok_or(KeyError::Options("nonce: want 16 bytes"))?,
            hmac,
        })
    }

    /// Opens a layer's annotations with the keys of `source`: every wrap that this reads is tried in turn.
    ///
    /// # Errors
    /// [`KeyError`]: what is missing, or why each wrap could not be opened.
    pub fn unwrap(annotations: &BTreeMap<String, String>, source: &dyn KeySource) -> Result<Self, KeyError> {
        let bad = |name: &str, why: &str| KeyError::Annotation(name.into(), why.into());
        let public = annotations.get(PUBLIC).ok_or_else(|| bad(PUBLIC, "missing"))?;
        let public = bounded(PUBLIC, public)?;
        let public = STANDARD.decode(public).map_err(|_| bad(PUBLIC, "not base64"))?;
        let public: Public = serde_json::from_slice(&public).map_err(|e| bad(PUBLIC, &e.to_string()))?;
        if public.cipher != CIPHER {
            return Err(KeyError::Cipher(public.cipher));
        }
        let hmac = decode(&public.hmac).ok_or_else(|| bad(PUBLIC, "hmac: want 32 bytes"))?;
        let mut whys = Vec::new();
        let mut tried = 0;
        for (name, value) in annotations.iter().filter(|(name, _)| name.starts_with(KEYS)) {
            for wrap in bounded(name, value)?.split(',') {
                tried += 1;
                if tried > MOST_WRAPS {
                    return Err(bad(name, "too many wraps"));
                }
                match open(name, wrap, source) {
                    Ok(private) => return Self::from_options(&private, hmac),
                    Err(why) => whys.push(format!("{}: {why}", &name[KEYS.len()..])),
                }
            }
        }
        Err(KeyError::NoKey(if whys.is_empty() { "it has none".into() } else { whys.join("; ") }))
    }
}

fn bounded<'a>(name: &str, value: &'a str) -> Result<&'a str, KeyError> {
    if value.len() > MOST_ANNOTATION {
        return Err(KeyError::Annotation(name.into(), format!("more than {MOST_ANNOTATION} bytes")));
    }
    Ok(value)
}

fn open(name: &str, wrap: &str, source: &dyn KeySource) -> Result<Zeroizing<Vec<u8>>, String> {
    let bytes = STANDARD.decode(wrap).map_err(|_| "not base64".to_owned())?;
    if name == JWE {
        let jwe = jwe::Jwe::parse(&bytes).map_err(|e| e.to_string())?;
        let keys = source.private_keys()?;
        if keys.is_empty() {
            return Err("no private key to try".into());
        }
        keys.iter()
            .find_map(|key| jwe.decrypt(key).ok())
            .ok_or_else(|| format!("none of {} private keys opens it", keys.len()))
    } else if name[KEYS.len()..].starts_with("provider.") {
        // guest-components opens a packet whatever the provider's name.
        let packet = Packet::parse(&bytes).map_err(|e| e.to_string())?;
        let key = source.resource(packet.kid())?;
        packet.open(&key).map_err(|e| e.to_string())
    } else {
        Err("this kind of wrap is not supported".into())
    }
}

/// Whether any annotation speaks of encryption: a layer that has them and no encrypted media type was tampered with.
#[must_use]
pub fn marks(annotations: &BTreeMap<String, String>) -> bool {
    annotations.keys().any(|name| name.starts_with("org.opencontainers.image.enc."))
}

/// Members whose shape belongs to others.
type Raw = serde_json::Value;

#[cfg(test)]
mod tests;
