//! JWE in JSON form (RFC 7516, general and flattened), as go-jose writes it for ocicrypt.
//!
//! Owns: `RSA-OAEP`, `RSA-OAEP-256` and `ECDH-ES+A256KW` on P-256, P-384, P-521, with `A256GCM`. Anything else,
//! `zip` and `crit` included, is refused.

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Nonce, Payload},
};
use aes_kw::KwAes256;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use getrandom::{SysRng, rand_core::UnwrapErr};
use p256::elliptic_curve::Generate;
use rsa::{Oaep, traits::PaddingScheme};
use serde::{Deserialize, Serialize};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

use super::Raw;

mod keys;
pub use keys::{PrivateKey, PublicKey};

/// A JWE cannot be read, opened or made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum JweError {
    /// Not a JWE.
    #[error("JWE: {0}")]
    Json(String),
    /// A member is missing, not base64url, or of the wrong length.
    #[error("JWE: {0} is missing or broken")]
    Member(&'static str),
    /// An algorithm or extension that is not one of ours.
    #[error("JWE: {0} {1:?} is not supported")]
    Unsupported(&'static str, String),
    /// The key is for none of its recipients.
    #[error("JWE: the private key opens none of its {0} recipients")]
    NotForUs(usize),
    /// A PEM is no key.
    #[error("key: {0}: want a PEM with an RSA, P-256, P-384 or P-521 key")]
    Pem(&'static str),
    /// A public key could not be used.
    #[error("key: {0}")]
    Key(&'static str),
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Header {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alg: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    enc: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epk: Option<Jwk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    apu: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    apv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zip: Option<Raw>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crit: Option<Raw>,
}

/// An ephemeral public key.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Jwk {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

#[derive(Serialize, Deserialize)]
struct Recipient {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<Header>,
    encrypted_key: String,
}

#[derive(Default, Serialize, Deserialize)]
struct Json {
    protected: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unprotected: Option<Header>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<Header>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encrypted_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recipients: Option<Vec<Recipient>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    aad: Option<String>,
    iv: String,
    ciphertext: String,
    tag: String,
}

/// A JWE.
pub struct Jwe {
    json: Json,
    protected: Header,
}

const ENC: &str = "A256GCM";
const ECDH: &str = "ECDH-ES+A256KW";
/// Most recipients of one JWE.
const MOST_RECIPIENTS: usize = 32;

fn bytes(what: &'static str, text: &str) -> Result<Vec<u8>, JweError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| JweError::Member(what))
}

impl Jwe {
    /// Reads the JSON forms.
    ///
    /// # Errors
    /// [`JweError`].
    pub fn parse(text: &[u8]) -> Result<Self, JweError> {
        let broken = |e: serde_json::Error| JweError::Json(e.to_string());
        let mut json: Json = serde_json::from_slice(text).map_err(broken)?;
        let protected: Header =
            serde_json::from_slice(&bytes("protected", &json.protected)?).map_err(broken)?;
        // go-jose writes the first of several recipients' key at the top as well: it is in the list too.
        let key = json.encrypted_key.take();
        if json.recipients.as_ref().is_none_or(Vec::is_empty) {
            json.recipients =
                key.map(|encrypted_key| vec![Recipient { header: json.header.take(), encrypted_key }]);
        }
        match json.recipients.as_ref().map_or(0, Vec::len) {
            0 => return Err(JweError::Member("recipients")),
            n if n > MOST_RECIPIENTS => return Err(JweError::Json(format!("{n} recipients"))),
            _ => {}
        }
        Ok(Self { json, protected })
    }

    /// Decrypts with a private key.
    ///
    /// # Errors
    /// [`JweError::NotForUs`] when no recipient is this key's, or the content does not authenticate.
    pub fn decrypt(&self, key: &PrivateKey) -> Result<Zeroizing<Vec<u8>>, JweError> {
        let recipients = self.json.recipients.as_deref().unwrap_or_default();
        let mut last = JweError::NotForUs(recipients.len());
        for recipient in recipients {
            match self.recipient(recipient, key) {
                Ok(Some(plain)) => return Ok(plain),
                Ok(None) => {}
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn recipient(
        &self,
        recipient: &Recipient,
        key: &PrivateKey,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, JweError> {
        let headers = [Some(&self.protected), self.json.unprotected.as_ref(), recipient.header.as_ref()];
        let headers = || headers.iter().copied().flatten();
        let text = |get: fn(&Header) -> &Option<String>| headers().find_map(|h| get(h).as_deref());
        if headers().any(|h| h.zip.is_some() || h.crit.is_some()) {
            return Err(JweError::Unsupported("header member", "zip or crit".into()));
        }
        let alg = text(|h| &h.alg).ok_or(JweError::Member("alg"))?;
        let enc = text(|h| &h.enc).ok_or(JweError::Member("enc"))?;
        if enc != ENC {
            return Err(JweError::Unsupported("enc", enc.into()));
        }
        let wrapped = bytes("encrypted_key", &recipient.encrypted_key)?;
        let cek = match (alg, key) {
            ("RSA-OAEP", PrivateKey::Rsa(key)) => {
                Oaep::<Sha1>::new().decrypt(Some(&mut SysRng), key, &wrapped).ok().map(Zeroizing::new)
            }
            ("RSA-OAEP-256", PrivateKey::Rsa(key)) => {
                Oaep::<Sha256>::new().decrypt(Some(&mut SysRng), key, &wrapped).ok().map(Zeroizing::new)
            }
            (ECDH, _) => {
                let epk = headers().find_map(|h| h.epk.as_ref()).ok_or(JweError::Member("epk"))?;
                let Some(z) = key.agree(epk)? else { return Ok(None) };
                let party = |get| text(get).map_or(Ok(Vec::new()), |t| bytes("apu or apv", t));
                let kek = derive(&z, &party(|h| &h.apu)?, &party(|h| &h.apv)?);
                unwrap_key(&kek, &wrapped)
            }
            ("RSA-OAEP" | "RSA-OAEP-256", _) => None,
            _ => return Err(JweError::Unsupported("alg", alg.into())),
        };
        let Some(cek) = cek else { return Ok(None) };
        let cipher = Aes256Gcm::new_from_slice(&cek).map_err(|_| JweError::Member("encrypted_key"))?;
        let iv: [u8; 12] =
            bytes("iv", &self.json.iv)?.as_slice().try_into().map_err(|_| JweError::Member("iv"))?;
        let mut sealed = bytes("ciphertext", &self.json.ciphertext)?;
        let tag = bytes("tag", &self.json.tag)?;
        if tag.len() != 16 {
            return Err(JweError::Member("tag"));
        }
        sealed.extend(tag);
        let aad = match &self.json.aad {
            Some(aad) => format!("{}.{aad}", self.json.protected),
            None => self.json.protected.clone(),
        };
        let payload = Payload { msg: &sealed, aad: aad.as_bytes() };
        Ok(cipher.decrypt(&Nonce::<Aes256Gcm>::from(iv), payload).ok().map(Zeroizing::new))
    }

    /// Encrypts for one or more public keys, in the general form with one recipient each.
    ///
    /// # Errors
    /// [`JweError`].
    pub fn encrypt(plain: &[u8], keys: &[PublicKey]) -> Result<Vec<u8>, JweError> {
        let random = |_| JweError::Key("no random bytes from the kernel");
        let mut cek = Zeroizing::new([0; 32]);
        let mut iv = [0; 12];
        getrandom::fill(&mut *cek).map_err(random)?;
        getrandom::fill(&mut iv).map_err(random)?;
        let mut recipients = Vec::new();
        for key in keys {
            let (header, wrapped) = wrap(key, &cek)?;
            recipients
                .push(Recipient { header: Some(header), encrypted_key: URL_SAFE_NO_PAD.encode(wrapped) });
        }
        let protected = URL_SAFE_NO_PAD.encode(format!(r#"{{"enc":"{ENC}"}}"#));
        let mut sealed = Aes256Gcm::new(&(*cek).into())
            .encrypt(&Nonce::<Aes256Gcm>::from(iv), Payload { msg: plain, aad: protected.as_bytes() })
            .map_err(|_| JweError::Key("too much to encrypt"))?;
        let tag = sealed.split_off(sealed.len().saturating_sub(16));
        let json = Json {
            protected,
            recipients: Some(recipients),
            iv: URL_SAFE_NO_PAD.encode(iv),
            ciphertext: URL_SAFE_NO_PAD.encode(sealed),
            tag: URL_SAFE_NO_PAD.encode(tag),
            ..Json::default()
        };
        serde_json::to_vec(&json).map_err(|e| JweError::Json(e.to_string()))
    }
}

fn wrap(key: &PublicKey, cek: &[u8; 32]) -> Result<(Header, Vec<u8>), JweError> {
    if let PublicKey::Rsa(key) = key {
        let wrapped = Oaep::<Sha1>::new()
            .encrypt(&mut SysRng, key, cek)
            .map_err(|_| JweError::Key("this RSA key cannot encrypt"))?;
        return Ok((Header { alg: Some("RSA-OAEP".into()), ..Header::default() }, wrapped));
    }
    let (epk, z) = key.agree()?;
    let mut wrapped = [0; 40];
    KwAes256::new(&(*derive(&z, &[], &[])).into())
        .wrap_key(cek, &mut wrapped)
        .map_err(|_| JweError::Key("AES key wrap failed"))?;
    Ok((Header { alg: Some(ECDH.into()), epk: Some(epk), ..Header::default() }, wrapped.to_vec()))
}

fn unwrap_key(kek: &[u8; 32], wrapped: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut cek = Zeroizing::new(vec![0; 32]);
    if wrapped.len() != 40 {
        return None;
    }
    KwAes256::new(&(*kek).into()).unwrap_key(wrapped, &mut cek).ok()?;
    Some(cek)
}

/// Concat KDF for `ECDH-ES+A256KW` (RFC 7518, 4.6.2): one round of SHA-256 gives the 256 bits.
fn derive(z: &[u8], apu: &[u8], apv: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(1u32.to_be_bytes());
    hash.update(z);
    for part in [ECDH.as_bytes(), apu, apv] {
        hash.update((part.len() as u32).to_be_bytes());
        hash.update(part);
    }
    hash.update(256u32.to_be_bytes());
    Zeroizing::new(hash.finalize().into())
}
