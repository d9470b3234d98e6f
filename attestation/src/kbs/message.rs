//! Bodies of the protocol's messages.
//!
//! Owns: their fields and names, which mix kebab-case and snake_case as upstream does.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PROTOCOL_VERSION;
use crate::{evidence::Composite, key::PublicJwk};

/// `POST /auth`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct AuthBody<'a> {
    version: &'a str,
    tee: &'a str,
    extra_params: ExtraParams,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ExtraParams {
    supported_hash_algorithms: [&'static str; 3],
}

impl<'a> AuthBody<'a> {
    pub(super) fn new(tee: &'a str) -> Self {
        let supported_hash_algorithms = ["sha256", "sha384", "sha512"];
        Self { version: PROTOCOL_VERSION, tee, extra_params: ExtraParams { supported_hash_algorithms } }
    }
}

/// Answer to `POST /auth`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Challenge {
    /// Padded Base64 of random bytes; hashed as the text that it is.
    pub nonce: String,
    /// `""`, or an object.
    #[serde(default)]
    pub extra_params: Value,
}

/// `POST /attest`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct AttestBody<'a> {
    pub(super) init_data: Option<InitDataBody<'a>>,
    pub(super) runtime_data: RuntimeDataBody<'a>,
    pub(super) tee_evidence: &'a Composite,
}

#[derive(Serialize)]
pub(super) struct InitDataBody<'a> {
    pub(super) format: &'static str,
    pub(super) body: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct RuntimeDataBody<'a> {
    pub(super) nonce: &'a str,
    pub(super) tee_pubkey: &'a PublicJwk,
}

/// Answer to `POST /attest`.
#[derive(Clone, Debug, Deserialize)]
pub struct TokenBody {
    /// Compact JWS.
    pub token: String,
}

/// Body of everything that is no success.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ErrorBody {
    /// `https://github.com/confidential-containers/kbs/errors/<Variant>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For people.
    pub detail: String,
}

impl ErrorBody {
    /// One line of a server's words, without control characters and not endless.
    #[must_use]
    pub fn line(body: &[u8]) -> String {
        let clean = |text: &str| -> String {
            text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
        };
        match serde_json::from_slice::<Self>(body) {
            Ok(error) => {
                let variant = error.kind.rsplit('/').next().unwrap_or_default();
                format!("{}: {}", clean(variant), clean(&error.detail))
            }
            Err(_) => "no reason given".into(),
        }
    }
}
