//! ocicrypt's key provider protocol: what skopeo, podman and containerd ask a program that wraps keys.
//!
//! Owns: one request on standard input, one answer on standard output (ocicrypt, `keywrap/keyprovider`), for
//! `cmd` providers. With it skopeo 1.18 encrypts for a KBS and decrypts what `coffer image encrypt` made.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use thiserror::Error;
use zeroize::Zeroizing;

use super::packet::{Packet, PacketError};

/// The request cannot be answered.
#[derive(Debug, Error)]
pub enum ProviderError {
    /// Not a request.
    #[error("key provider: request: {0}")]
    Request(String),
    /// The parameters do not name a key.
    #[error("key provider: parameters: {0}: want keyid=kbs:///…::keypath=FILE")]
    Parameters(String),
    /// The key's file.
    #[error("key provider: {0}: {1}")]
    KeyFile(String, String),
    /// The packet.
    #[error("key provider: {0}")]
    Packet(#[from] PacketError),
}

#[derive(Deserialize)]
struct Request {
    op: String,
    #[serde(default)]
    keywrapparams: Option<WrapParameters>,
    #[serde(default)]
    keyunwrapparams: Option<UnwrapParameters>,
}

#[derive(Deserialize)]
struct WrapParameters {
    ec: Option<Parameters>,
    optsdata: Option<Bytes>,
}

#[derive(Deserialize)]
struct UnwrapParameters {
    dc: Option<Parameters>,
    annotation: Option<Bytes>,
}

#[derive(Deserialize)]
struct Parameters {
    #[serde(rename = "Parameters", default)]
    parameters: Option<BTreeMap<String, Vec<String>>>,
}

/// Go writes bytes as base64, Rust's ocicrypt as a list of numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Bytes {
    Text(String),
    Numbers(Vec<u8>),
}

impl Bytes {
    fn get(self) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
        match self {
            Self::Text(text) => STANDARD
                .decode(text)
                .map(Zeroizing::new)
                .map_err(|_| ProviderError::Request("optsdata or annotation is not base64".into())),
            Self::Numbers(numbers) => Ok(Zeroizing::new(numbers)),
        }
    }
}

/// Reads a key's file: 32 raw bytes, or their base64.
///
/// # Errors
/// [`ProviderError::KeyFile`].
pub fn read_key(path: &str) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
    let bad = |why: String| ProviderError::KeyFile(path.into(), why);
    let bytes = Zeroizing::new(std::fs::read(path).map_err(|e| bad(e.to_string()))?);
    if bytes.len() == 32 {
        return Ok(bytes);
    }
    let text = std::str::from_utf8(&bytes).map(str::trim).unwrap_or_default();
    match STANDARD.decode(text) {
        Ok(key) if key.len() == 32 => Ok(Zeroizing::new(key)),
        _ => Err(bad("neither 32 bytes nor their base64".into())),
    }
}

/// `keyid=…::keypath=…`, each in base64, the first that names a key.
fn named(
    parameters: Option<Parameters>,
    provider: &str,
) -> Result<(Option<String>, Option<String>), ProviderError> {
    let values =
        parameters.and_then(|p| p.parameters).and_then(|mut p| p.remove(provider)).unwrap_or_default();
    let (mut id, mut path) = (None, None);
    for value in values {
        let text = STANDARD.decode(&value).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let text =
            text.ok_or_else(|| ProviderError::Parameters(format!("{value:?} is not base64 of text")))?;
        for pair in text.split("::").filter(|pair| !pair.is_empty() && *pair != provider) {
            match pair.split_once('=') {
                Some(("keyid", value)) => id = Some(value.to_owned()),
                Some(("keypath", value)) => path = Some(value.to_owned()),
                Some(("sample" | "algorithm" | "provider", _)) | None => {}
                Some((other, _)) => return Err(ProviderError::Parameters(format!("{other:?} is unknown"))),
            }
        }
    }
    Ok((id, path))
}

/// Answers one request for the provider of this name (`attestation-agent` in skopeo's configuration).
/// `default_key` is the file used when the request's parameters name none.
///
/// # Errors
/// [`ProviderError`].
pub fn answer(request: &[u8], provider: &str, default_key: Option<&str>) -> Result<String, ProviderError> {
    let request: Request =
        serde_json::from_slice(request).map_err(|e| ProviderError::Request(e.to_string()))?;
    let missing = |what: &str| ProviderError::Request(format!("{what} is missing"));
    let key_file = |path: Option<String>| {
        let path = path.or_else(|| default_key.map(str::to_owned));
        let path = path.ok_or_else(|| ProviderError::Parameters("no keypath".into()))?;
        read_key(&path)
    };
    match request.op.as_str() {
        "keywrap" => {
            let wrap = request.keywrapparams.ok_or_else(|| missing("keywrapparams"))?;
            let (id, path) = named(wrap.ec, provider)?;
            let id = id.ok_or_else(|| ProviderError::Parameters("no keyid".into()))?;
            let options = wrap.optsdata.ok_or_else(|| missing("optsdata"))?.get()?;
            let packet = Packet::wrap(&id, &key_file(path)?, &options)?;
            let annotation = STANDARD.encode(packet.to_json());
            Ok(serde_json::json!({"keywrapresults": {"annotation": annotation}}).to_string())
        }
        "keyunwrap" => {
            let unwrap = request.keyunwrapparams.ok_or_else(|| missing("keyunwrapparams"))?;
            let (_, path) = named(unwrap.dc, provider)?;
            let packet = Packet::parse(&unwrap.annotation.ok_or_else(|| missing("annotation"))?.get()?)?;
            let options = STANDARD.encode(packet.open(&key_file(path)?)?);
            Ok(serde_json::json!({"keyunwrapresults": {"optsdata": options}}).to_string())
        }
        other => Err(ProviderError::Request(format!("op {other:?} is neither keywrap nor keyunwrap"))),
    }
}
