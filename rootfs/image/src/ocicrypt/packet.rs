//! The annotation packet of CoCo's key provider: a layer's key wrapped under a KBS resource.
//!
//! Owns: versions 1 and 2 of its JSON (guest-components, `annotation_packet/{v1,v2}.rs`) and A256GCM with empty
//! additional data. `A256CTR` and KMS providers are refused: the first does not authenticate, the others are not here.

use std::collections::BTreeMap;

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Nonce},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use super::Raw;

const WRAP: &str = "A256GCM";

/// A packet cannot be made or opened.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PacketError {
    /// Not a packet.
    #[error("annotation packet: {0}")]
    Json(String),
    /// Of something else.
    #[error("annotation packet: {0} {1:?} is not supported")]
    Unsupported(&'static str, String),
    /// A member has the wrong length or is not base64.
    #[error("annotation packet: {0}")]
    Member(&'static str),
    /// The key does not fit.
    #[error(
        "annotation packet: the key named {0} does not open it: it was wrapped under another, or changed"
    )]
    Open(String),
    /// The key has the wrong length.
    #[error("annotation packet: the key has {0} bytes, want 32")]
    Key(usize),
    /// No random bytes.
    #[error("annotation packet: no random bytes from the kernel")]
    Random,
}

/// A wrapped key.
#[derive(Debug, Serialize, Deserialize)]
pub struct Packet {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provider: Option<String>,
    kid: String,
    wrapped_data: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wrap_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provider_settings: Option<BTreeMap<String, Raw>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, Raw>>,
}

impl Packet {
    /// Reads either version.
    ///
    /// # Errors
    /// [`PacketError`] when it is something else.
    pub fn parse(bytes: &[u8]) -> Result<Self, PacketError> {
        let packet: Self = serde_json::from_slice(bytes).map_err(|e| PacketError::Json(e.to_string()))?;
        for (what, said, want) in
            [("version", &packet.version, "0.1.0"), ("provider", &packet.provider, "kbs")]
        {
            if let Some(said) = said
                && said != want
            {
                return Err(PacketError::Unsupported(what, said.clone()));
            }
        }
        match packet.wrap_type.as_deref() {
            Some(WRAP) => {}
            other => return Err(PacketError::Unsupported("wrap_type", other.unwrap_or("(none)").into())),
        }
        if packet.kid.is_empty() || packet.kid.len() > 1024 {
            return Err(PacketError::Member("kid: want 1 to 1024 bytes"));
        }
        Ok(packet)
    }

    /// The resource that holds the key.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// Wraps `data` under a key of 32 bytes. Version 1, which every reader knows.
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn wrap(kid: &str, key: &[u8], data: &[u8]) -> Result<Self, PacketError> {
        let mut iv = [0; 12];
        getrandom::fill(&mut iv).map_err(|_| PacketError::Random)?;
        let wrapped = cipher(key)?
            .encrypt(&Nonce::<Aes256Gcm>::from(iv), data)
            .map_err(|_| PacketError::Member("data is too long"))?;
        Ok(Self {
            version: None,
            provider: None,
            kid: kid.into(),
            wrapped_data: STANDARD.encode(wrapped),
            iv: Some(STANDARD.encode(iv)),
            wrap_type: Some(WRAP.into()),
            provider_settings: None,
            annotations: None,
        })
    }

    /// Its JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// What was wrapped.
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn open(&self, key: &[u8]) -> Result<Zeroizing<Vec<u8>>, PacketError> {
        let iv = self.iv.as_deref().ok_or(PacketError::Member("no iv"))?;
        let iv: [u8; 12] = super::decode(iv).ok_or(PacketError::Member("iv: want 12 bytes in base64"))?;
        let wrapped = STANDARD
            .decode(&self.wrapped_data)
            .map_err(|_| PacketError::Member("wrapped_data: not base64"))?;
        cipher(key)?
            .decrypt(&Nonce::<Aes256Gcm>::from(iv), wrapped.as_slice())
            .map(Zeroizing::new)
            .map_err(|_| PacketError::Open(self.kid.clone()))
    }
}

fn cipher(key: &[u8]) -> Result<Aes256Gcm, PacketError> {
    Aes256Gcm::new_from_slice(key).map_err(|_| PacketError::Key(key.len()))
}
