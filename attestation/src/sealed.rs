//! Sealed secrets: environment values and files that name a secret, or carry one in an envelope.
//!
//! Owns: the form `sealed.` + compact JWS, its checks in the right order. Does not own: fetching from a KBS; the caller
//! gives the means.
//!
//! Source: guest-components `confidential-data-hub/hub/src/secret`. The old form without a signature is not accepted.

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    encoding::from_base64,
    jwe::{open_a256gcm, unwrap_a256kw},
    jws::{JwsError, Unverified},
    kbs::{ResourceUri, UriError},
    key::{PublicJwk, PublicKey},
};

/// What a sealed value begins with.
pub const PREFIX: &str = "sealed.";
/// Below it upstream has the public keys of those signers that `kid` names by file.
pub const SIGNERS: &str = "/run/confidential-containers/cdh/sealed-secret";
const VERSION: &str = "0.1.0";

/// Why a secret stays sealed. No message says anything of the secret.
#[derive(Debug, Error)]
pub enum SealedError {
    /// Not of the form.
    #[error("sealed secret: {0}")]
    Form(String),
    /// Of the form, but not by the key that it names.
    #[error("sealed secret: {0}")]
    Signature(#[from] JwsError),
    /// Its signer's key is a file that the owner did not name.
    #[error(
        "sealed secret: header: kid {0:?} is a file: say what it is by [[credentials]] of cdh.toml with path = \"{SIGNERS}/{0}\""
    )]
    NoFile(String),
    /// What it names is not a resource.
    #[error("sealed secret: {0}")]
    Uri(#[from] UriError),
    /// The key or the secret did not come.
    #[error("sealed secret: {what} {uri}: {message}")]
    Fetch {
        /// `key` or `secret`.
        what: &'static str,
        /// Resource.
        uri: String,
        /// Why.
        message: String,
    },
    /// The envelope does not open with this key.
    #[error("sealed secret: the envelope does not open with key {0}")]
    Envelope(String),
}

fn form(what: impl std::fmt::Display) -> SealedError {
    SealedError::Form(what.to_string())
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Content {
    Vault {
        version: String,
        provider: String,
        name: String,
    },
    Envelope {
        version: String,
        provider: String,
        key_id: String,
        encrypted_key: String,
        encrypted_data: String,
        wrap_type: String,
        iv: String,
    },
}

/// Gets a resource of the KBS, or says why not.
pub type Fetch<'a> = dyn FnMut(&ResourceUri) -> Result<Zeroizing<Vec<u8>>, String> + 'a;

/// The resource that a file is, by the file's absolute path: what the owner's `[[credentials]]` say.
pub type Files<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// True when a value is sealed.
#[must_use]
pub fn is_sealed(value: &str) -> bool {
    value.starts_with(PREFIX)
}

/// Opens a sealed value. `fetch` gets a resource of the KBS; it is called for the signer's key first, and for anything
/// that the payload names only once the signature holds. A signer's key that is named by file, below [`SIGNERS`], is the resource that
/// `files` says it is: a guest has no other files there, and needs none of them to be written first.
///
/// # Errors
/// [`SealedError`].
pub fn unseal(
    value: &str,
    files: &Files<'_>,
    fetch: &mut Fetch<'_>,
) -> Result<Zeroizing<Vec<u8>>, SealedError> {
    let token = value.strip_prefix(PREFIX).ok_or_else(|| form("does not begin with sealed."))?;
    let unverified = Unverified::parse(token)?;
    let kid = unverified.header.get("kid").and_then(Value::as_str).ok_or_else(|| form("header: no kid"))?;
    let mut get = |what: &'static str, uri: &str| {
        let parsed: ResourceUri = uri.parse()?;
        fetch(&parsed).map_err(|message| SealedError::Fetch { what, uri: parsed.to_string(), message })
    };
    let key = if kid.starts_with("kbs:") {
        get("key", kid)?
    } else {
        // No name with `..` or an empty part in it is a credential's path (`Credential::check`).
        get("key", &files(&format!("{SIGNERS}/{kid}")).ok_or_else(|| SealedError::NoFile(kid.into()))?)?
    };
    let payload = unverified.verify(&signing_jwk(&key)?)?;
    let content: Content = serde_json::from_slice(&payload).map_err(|e| form(format!("payload: {e}")))?;
    let (Content::Vault { version, provider, .. } | Content::Envelope { version, provider, .. }) = &content;
    if version != VERSION {
        return Err(form(format!("version {version:?} is not known: only {VERSION} is")));
    }
    if provider != "kbs" {
        return Err(form(format!("provider {provider:?} is not supported: use kbs")));
    }
    match content {
        Content::Vault { name, .. } => get("secret", &name),
        Content::Envelope { key_id, encrypted_key, encrypted_data, wrap_type, iv, .. } => {
            if wrap_type != "A256GCM" {
                return Err(form(format!("wrap_type {wrap_type:?} is not supported: use A256GCM")));
            }
            let part = |name: &str, text: &str| from_base64(text).map_err(|e| form(format!("{name}: {e}")));
            let wrapped = part("encrypted_key", &encrypted_key)?;
            let data = part("encrypted_data", &encrypted_data)?;
            let iv: [u8; 12] = part("iv", &iv)?.try_into().map_err(|_| form("iv: A256GCM wants 12 bytes"))?;
            let kek = get("key", &key_id)?;
            let kek: &[u8; 32] = kek.as_slice().try_into().map_err(|_| form("key_id: not 32 bytes"))?;
            let refused = |_| SealedError::Envelope(key_id.clone());
            let data_key = unwrap_a256kw(kek, &wrapped).map_err(refused)?;
            open_a256gcm(&data_key, &iv, &data, &[]).map_err(refused)
        }
    }
}

/// The signer's key, whose `alg` its owner may not have written. The value's writer, who may be the host, chose what was fetched, and hears
/// of the answer: whatever is no such key is refused in the same words, which say nothing of it.
fn signing_jwk(text: &[u8]) -> Result<PublicJwk, SealedError> {
    let read = || {
        let mut jwk: Value = serde_json::from_slice(text).ok()?;
        let object = jwk.as_object_mut()?;
        match object.get("alg") {
            None => drop(object.insert("alg".into(), "ES256".into())),
            Some(alg) if alg == "ES256" => {}
            Some(_) => return None,
        }
        let key: PublicJwk = serde_json::from_value(jwk).ok()?;
        matches!(PublicKey::from_jwk(&key), Ok(PublicKey::P256(_))).then_some(key)
    };
    read().ok_or_else(|| form("key: what kid names is no JWK of a P-256 key for ES256"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        encoding::to_base64,
        jws::sign,
        key::{KeyAlgorithm, TeeKey},
    };
    use aes_gcm::{Aes256Gcm, KeyInit, aead::Aead};
    use proptest::prelude::*;
    use serde_json::json;
    use std::collections::HashMap;

    struct Store(HashMap<String, Vec<u8>>, Vec<String>);

    impl Store {
        fn unseal(&mut self, value: &str) -> Result<Zeroizing<Vec<u8>>, SealedError> {
            let Self(map, asked) = self;
            let files = |path: &str| {
                (path == format!("{SIGNERS}/team/signer")).then(|| "kbs:///keys/signing/1".into())
            };
            unseal(value, &files, &mut |uri| {
                asked.push(uri.to_string());
                map.get(&uri.to_string()).cloned().map(Zeroizing::new).ok_or_else(|| "not there".into())
            })
        }
    }

    fn signer() -> (p256::SecretKey, Vec<u8>) {
        let key = TeeKey::generate(KeyAlgorithm::P256).unwrap();
        let mut jwk = serde_json::to_value(key.public()).unwrap();
        jwk.as_object_mut().unwrap().remove("alg");
        let TeeKey::P256(secret) = key else { unreachable!() };
        (secret, serde_json::to_vec(&jwk).unwrap())
    }

    fn sealed(key: &p256::SecretKey, payload: &Value) -> String {
        sealed_by("kbs:///keys/signing/1", key, payload)
    }

    fn sealed_by(kid: &str, key: &p256::SecretKey, payload: &Value) -> String {
        let header = json!({ "alg": "ES256", "kid": kid });
        format!("{PREFIX}{}", sign(key, header.as_object().unwrap(), payload.to_string().as_bytes()))
    }

    fn store(jwk: Vec<u8>) -> Store {
        let map = HashMap::from([
            ("kbs:///keys/signing/1".into(), jwk),
            ("kbs:///one/2/trois".into(), b"the secret".to_vec()),
            ("kbs:///keys/kek/1".into(), vec![7; 32]),
        ]);
        Store(map, Vec::new())
    }

    fn vault() -> Value {
        json!({ "version": "0.1.0", "type": "vault", "provider": "kbs", "name": "kbs:///one/2/trois",
                "provider_settings": {}, "annotations": {} })
    }

    #[test]
    fn a_vault_secret_is_fetched_after_its_signature_holds() {
        let (key, jwk) = signer();
        let mut store = store(jwk);
        assert_eq!(store.unseal(&sealed(&key, &vault())).unwrap().as_slice(), b"the secret");
        assert_eq!(store.1, ["kbs:///keys/signing/1", "kbs:///one/2/trois"]);
    }

    #[test]
    fn a_signer_named_by_file_is_the_owners_credential() {
        let (key, jwk) = signer();
        let mut store = store(jwk);
        assert_eq!(
            store.unseal(&sealed_by("team/signer", &key, &vault())).unwrap().as_slice(),
            b"the secret"
        );
        assert_eq!(store.1, ["kbs:///keys/signing/1", "kbs:///one/2/trois"]);
        for kid in ["signer", "../sealed-secret/team/signer", "/team/signer", "", "KBS:///keys/signing/1"] {
            let error = store.unseal(&sealed_by(kid, &key, &vault())).unwrap_err();
            assert!(matches!(error, SealedError::NoFile(_)), "{kid}: {error}");
        }
        let error = store.unseal(&sealed_by("team/signer", &signer().0, &vault())).unwrap_err();
        assert!(matches!(error, SealedError::Signature(JwsError::Signature)), "{error}");
    }

    /// Whoever wrote the value also chose what is fetched: any resource of the owner's.
    #[test]
    fn what_was_fetched_for_a_signer_and_is_none_is_not_described() {
        let (key, jwk) = signer();
        let whole: Value = serde_json::from_slice(&jwk).unwrap();
        let with = |name: &str, value: Value| {
            let mut jwk = whole.clone();
            jwk[name] = value;
            jwk.to_string().into_bytes()
        };
        let said: Vec<String> = [
            b"hunter2".to_vec(),
            Vec::new(),
            b"{\n \"a\": hunter2".to_vec(),
            b"[1]".to_vec(),
            b"{}".to_vec(),
            b"\xff".to_vec(),
            with("alg", json!("hunter2")),
            with("alg", json!(["hunter2"])),
            with("crv", json!("hunter2")),
            with("crv", json!("P-521")),
            with("kty", json!("hunter2")),
            with("x", json!("hunter2")),
            with("y", json!("AAAA")),
            with("x", whole["y"].clone()),
            json!({ "kty": "RSA", "alg": "ES256", "n": "AQAB", "e": "AQAB" }).to_string().into_bytes(),
        ]
        .into_iter()
        .map(|fetched| store(fetched).unseal(&sealed(&key, &vault())).unwrap_err().to_string())
        .collect();
        for one in &said {
            assert_eq!(one, &said[0]);
        }
        assert!(said[0].starts_with("sealed secret: key: "), "{}", said[0]);
    }

    #[test]
    fn a_foreign_signature_makes_nothing_be_fetched() {
        let (_, jwk) = signer();
        let mut store = store(jwk);
        let error = store.unseal(&sealed(&signer().0, &vault())).unwrap_err();
        assert!(matches!(error, SealedError::Signature(JwsError::Signature)), "{error}");
        assert_eq!(store.1, ["kbs:///keys/signing/1"]);
    }

    #[test]
    fn an_envelope_opens_with_its_key() {
        let (key, jwk) = signer();
        let mut wrapped = [0; 40];
        aes_kw::KwAes256::new(&[7; 32].into()).wrap_key(&[9; 32], &mut wrapped).unwrap();
        let data = Aes256Gcm::new(&[9; 32].into()).encrypt(&[3; 12].into(), b"enveloped".as_slice()).unwrap();
        let mut payload = json!({ "version": "0.1.0", "type": "envelope", "provider": "kbs",
            "key_id": "kbs:///keys/kek/1", "encrypted_key": to_base64(&wrapped), "encrypted_data": to_base64(&data),
            "wrap_type": "A256GCM", "iv": to_base64(&[3; 12]), "provider_settings": {}, "annotations": {} });
        assert_eq!(store(jwk.clone()).unseal(&sealed(&key, &payload)).unwrap().as_slice(), b"enveloped");
        payload["iv"] = to_base64(&[4; 12]).into();
        let error = store(jwk.clone()).unseal(&sealed(&key, &payload)).unwrap_err();
        assert!(matches!(error, SealedError::Envelope(_)));
        payload["provider"] = "aliyun".into();
        let message = store(jwk).unseal(&sealed(&key, &payload)).unwrap_err().to_string();
        assert!(message.contains("\"aliyun\" is not supported"));
    }

    proptest! {
        #[test]
        fn any_value_is_opened_or_refused(text in "(sealed\\.)?[A-Za-z0-9_.-]{0,120}") {
            let _ = store(Vec::new()).unseal(&text);
        }
    }
}
