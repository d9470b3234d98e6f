//! Compact JSON Web Signatures with ES256: attestation tokens and sealed secrets.
//!
//! Owns: the form, signing and checking. Does not own: what the payload says.

use p256::ecdsa::{
    Signature, SigningKey, VerifyingKey,
    signature::{Signer, Verifier},
};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    encoding::{from_base64url, to_base64url},
    key::{PublicJwk, PublicKey},
};

/// Longest token that is looked at, in characters.
pub const LONGEST: usize = 1 << 20;

/// Why a token is not accepted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum JwsError {
    /// It is not of the form.
    #[error("JWS: {0}")]
    Form(String),
    /// Only ES256 is accepted.
    #[error("JWS: alg is {0:?}: only ES256 is accepted")]
    Algorithm(String),
    /// Not signed by this key.
    #[error("JWS: the signature is not by this key, or the token was changed")]
    Signature,
}

/// A token whose signature was not looked at yet.
#[derive(Clone, Debug)]
pub struct Unverified<'a> {
    /// Its header.
    pub header: Map<String, Value>,
    payload: Vec<u8>,
    signed: &'a str,
    signature: [u8; 64],
}

impl<'a> Unverified<'a> {
    /// Takes a compact token apart.
    ///
    /// # Errors
    /// [`JwsError::Form`] or [`JwsError::Algorithm`].
    pub fn parse(token: &'a str) -> Result<Self, JwsError> {
        let form = |what: &str| JwsError::Form(what.into());
        if token.len() > LONGEST {
            return Err(form("longer than 1 MiB"));
        }
        let (signed, signature) = token.rsplit_once('.').ok_or_else(|| form("no signature"))?;
        let (header, payload) = signed.split_once('.').ok_or_else(|| form("no payload"))?;
        let part =
            |name: &str, text: &str| from_base64url(text).map_err(|e| JwsError::Form(format!("{name}: {e}")));
        let header: Map<String, Value> = serde_json::from_slice(&part("header", header)?)
            .map_err(|e| JwsError::Form(format!("header: {e}")))?;
        let algorithm = header.get("alg").and_then(Value::as_str).unwrap_or_default();
        if algorithm != "ES256" {
            return Err(JwsError::Algorithm(algorithm.to_owned()));
        }
        if header.contains_key("crit") {
            return Err(form("header: crit is not supported"));
        }
        let signature =
            part("signature", signature)?.try_into().map_err(|_| form("signature: ES256 has 64 bytes"))?;
        Ok(Self { header, payload: part("payload", payload)?, signed, signature })
    }

    /// What it says, not to be believed.
    #[must_use]
    pub fn claims(&self) -> &[u8] {
        &self.payload
    }

    /// The payload, once the signature holds.
    ///
    /// # Errors
    /// [`JwsError::Signature`], or [`JwsError::Form`] when `key` is not a P-256 key.
    pub fn verify(self, key: &PublicJwk) -> Result<Vec<u8>, JwsError> {
        let PublicKey::P256(key) = PublicKey::from_jwk(key).map_err(|e| JwsError::Form(e.to_string()))?
        else {
            return Err(JwsError::Form("ES256 wants a key on P-256".into()));
        };
        let signature = Signature::from_slice(&self.signature).map_err(|_| JwsError::Signature)?;
        VerifyingKey::from(key)
            .verify(self.signed.as_bytes(), &signature)
            .map_err(|_| JwsError::Signature)?;
        Ok(self.payload)
    }
}

/// Signs a payload.
///
/// # Panics
/// Never: headers are plain data.
#[must_use]
pub fn sign(key: &p256::SecretKey, header: &Map<String, Value>, payload: &[u8]) -> String {
    let header = serde_json::to_vec(header).expect("plain data always serialises");
    let signed = format!("{}.{}", to_base64url(&header), to_base64url(payload));
    let signature: Signature = SigningKey::from(key).sign(signed.as_bytes());
    format!("{signed}.{}", to_base64url(&signature.to_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyAlgorithm, TeeKey};
    use proptest::prelude::*;
    use serde_json::json;

    fn header() -> Map<String, Value> {
        json!({ "alg": "ES256" }).as_object().unwrap().clone()
    }

    #[test]
    fn rfc_7515_appendix_a3_verifies() {
        let token = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
        let key = PublicJwk::EC {
            crv: "P-256".into(),
            alg: "ES256".into(),
            x: "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU".into(),
            y: "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0".into(),
        };
        let payload = Unverified::parse(token).unwrap().verify(&key).unwrap();
        assert!(payload.starts_with(b"{\"iss\":\"joe\""));
    }

    #[test]
    fn an_unsigned_or_foreign_token_is_refused() {
        let TeeKey::P256(key) = TeeKey::generate(KeyAlgorithm::P256).unwrap() else { unreachable!() };
        let token = sign(&key, &header(), b"{}");
        let other = TeeKey::generate(KeyAlgorithm::P256).unwrap().public();
        assert_eq!(Unverified::parse(&token).unwrap().verify(&other), Err(JwsError::Signature));
        let none = format!("{}.e30.", to_base64url(br#"{"alg":"none"}"#));
        assert_eq!(Unverified::parse(&none).unwrap_err(), JwsError::Algorithm("none".into()));
    }

    proptest! {
        #[test]
        fn one_changed_character_is_refused(place in any::<prop::sample::Index>()) {
            let key = TeeKey::generate(KeyAlgorithm::P256).unwrap();
            let TeeKey::P256(secret) = &key else { unreachable!() };
            let mut token = sign(secret, &header(), b"{\"a\":1}");
            let at = place.index(token.len());
            let other = if &token[at..=at] == "A" { "B" } else { "A" };
            token.replace_range(at..=at, other);
            let accepted = Unverified::parse(&token).is_ok_and(|t| t.verify(&key.public()).is_ok());
            prop_assert!(!accepted);
        }

        #[test]
        fn any_text_is_a_token_or_an_error(text in "[A-Za-z0-9_.-]{0,120}") {
            let _ = Unverified::parse(&text);
        }
    }
}
