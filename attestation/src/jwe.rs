//! JSON Web Encryption, flattened (RFC 7516 section 7.2.2), as a KBS sends resources.
//!
//! Owns: ECDH-ES+A256KW, RSA-OAEP-256, A256GCM, nothing else. Does not own: the keys (`key`).

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Payload},
};
use aes_kw::KwAes256;
use p256::elliptic_curve::{Generate, sec1::ToSec1Point};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    encoding::{from_base64url, to_base64url},
    key::{ECDH_ES_A256KW, PublicJwk, PublicKey, RSA_OAEP_256, TeeKey, ec_jwk},
};

const A256GCM: &str = "A256GCM";
const KEY: usize = 32;
const IV: usize = 12;
const TAG: usize = 16;

/// An encrypted message, every part as it travels: unpadded URL-safe Base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jwe {
    /// The header; its text is authenticated as it is here, never written anew.
    pub protected: String,
    /// Content key, wrapped.
    pub encrypted_key: String,
    /// 12 bytes.
    pub iv: String,
    /// Of the content's length.
    pub ciphertext: String,
    /// 16 bytes.
    pub tag: String,
    /// Further authenticated data; Trustee sends none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<String>,
}

/// Why a message was not encrypted or decrypted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum JweError {
    /// It is not of the form.
    #[error("JWE: {0}")]
    Form(String),
    /// It asks for what this side does not do.
    #[error("JWE: {field} is {value:?}: {wanted} is what this key takes")]
    Unsupported {
        /// Header member.
        field: &'static str,
        /// As the sender has it.
        value: String,
        /// As it would have to be.
        wanted: &'static str,
    },
    /// The key does not fit, or somebody changed the message.
    #[error("JWE: does not decrypt: it was made for another key, or changed on its way")]
    Refused,
}

fn form(what: impl std::fmt::Display) -> JweError {
    JweError::Form(what.to_string())
}

/// The order of members is serde's in kbs-types: peers there hash the header as they write it anew.
#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    enc: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epk: Option<EphemeralKey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    apu: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    apv: Option<String>,
    // Extensions that change the meaning are refused by name.
    #[serde(default, skip_serializing)]
    crit: Option<serde_json::Value>,
    #[serde(default, skip_serializing)]
    zip: Option<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
struct EphemeralKey {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

/// Concat KDF with SHA-256 for one block of output (RFC 7518 section 4.6.2, NIST SP 800-56A).
fn concat_kdf(secret: &[u8], algorithm: &str, apu: &[u8], apv: &[u8]) -> Zeroizing<[u8; KEY]> {
    let mut hash = Sha256::new();
    hash.update(1u32.to_be_bytes());
    hash.update(secret);
    for part in [algorithm.as_bytes(), apu, apv] {
        hash.update((part.len() as u32).to_be_bytes());
        hash.update(part);
    }
    hash.update((KEY as u32 * 8).to_be_bytes());
    Zeroizing::new(hash.finalize().into())
}

fn additional(protected: &str, aad: Option<&str>) -> Vec<u8> {
    match aad {
        None => protected.as_bytes().to_vec(),
        Some(aad) => format!("{protected}.{aad}").into_bytes(),
    }
}

/// Random bytes of the system.
///
/// # Errors
/// [`JweError::Form`] when it gives none.
pub fn random<const N: usize>() -> Result<[u8; N], JweError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| form(format!("the system gives no random bytes: {e}")))?;
    Ok(bytes)
}

/// Encrypts for the holder of `key`.
///
/// # Errors
/// [`JweError::Form`] when `key` is no key.
pub fn encrypt(key: &PublicJwk, content: &[u8]) -> Result<Jwe, JweError> {
    let content_key = Zeroizing::new(random::<KEY>()?);
    let iv = random::<IV>()?;
    let (alg, epk, wrapped) = match PublicKey::from_jwk(key).map_err(form)? {
        PublicKey::P256(theirs) => {
            let ours = p256::SecretKey::try_generate().map_err(form)?;
            let secret = ours.diffie_hellman(&theirs);
            let epk = ec_jwk("P-256", ours.public_key().to_sec1_point(false).as_bytes());
            (ECDH_ES_A256KW, Some(epk), wrap(secret.raw_secret_bytes(), &content_key)?)
        }
        PublicKey::P521(theirs) => {
            let ours = p521::SecretKey::try_generate().map_err(form)?;
            let secret = ours.diffie_hellman(&theirs);
            let epk = ec_jwk("P-521", ours.public_key().to_sec1_point(false).as_bytes());
            (ECDH_ES_A256KW, Some(epk), wrap(secret.raw_secret_bytes(), &content_key)?)
        }
        PublicKey::Rsa(theirs) => {
            (RSA_OAEP_256, None, theirs.oaep_encrypt::<Sha256>(content_key.as_slice()).map_err(form)?)
        }
    };
    let epk = epk.and_then(|jwk| match jwk {
        PublicJwk::EC { crv, x, y, .. } => Some(EphemeralKey { crv, kty: "EC".into(), x, y }),
        PublicJwk::RSA { .. } => None,
    });
    let header =
        Header { alg: alg.into(), enc: A256GCM.into(), epk, apu: None, apv: None, crit: None, zip: None };
    let protected = to_base64url(&serde_json::to_vec(&header).map_err(form)?);
    let cipher = Aes256Gcm::new(&(*content_key).into());
    let payload = Payload { msg: content, aad: protected.as_bytes() };
    let mut ciphertext = cipher.encrypt(&iv.into(), payload).map_err(form)?;
    let tag = ciphertext.split_off(ciphertext.len() - TAG);
    Ok(Jwe {
        protected,
        encrypted_key: to_base64url(&wrapped),
        iv: to_base64url(&iv),
        ciphertext: to_base64url(&ciphertext),
        tag: to_base64url(&tag),
        aad: None,
    })
}

fn wrap(secret: &[u8], content_key: &[u8; KEY]) -> Result<Vec<u8>, JweError> {
    let key = concat_kdf(secret, ECDH_ES_A256KW, &[], &[]);
    let mut wrapped = vec![0; KEY + aes_kw::IV_LEN];
    KwAes256::new(&(*key).into()).wrap_key(content_key, &mut wrapped).map_err(form)?;
    Ok(wrapped)
}

/// Decrypts with a TEE key.
///
/// # Errors
/// [`JweError`]: without a word on which check failed, once the form is right.
pub fn decrypt(key: &TeeKey, message: &Jwe) -> Result<Zeroizing<Vec<u8>>, JweError> {
    let part =
        |name: &'static str, text: &str| from_base64url(text).map_err(|e| form(format!("{name}: {e}")));
    let header: Header = serde_json::from_slice(&part("protected", &message.protected)?)
        .map_err(|e| form(format!("protected header: {e}")))?;
    for (field, value) in [("crit", &header.crit), ("zip", &header.zip)] {
        if let Some(value) = value {
            return Err(JweError::Unsupported { field, value: value.to_string(), wanted: "none" });
        }
    }
    if header.enc != A256GCM {
        return Err(JweError::Unsupported { field: "enc", value: header.enc, wanted: A256GCM });
    }
    let wanted = if matches!(key, TeeKey::Rsa(_)) { RSA_OAEP_256 } else { ECDH_ES_A256KW };
    if header.alg != wanted {
        return Err(JweError::Unsupported { field: "alg", value: header.alg, wanted });
    }
    let wrapped = part("encrypted_key", &message.encrypted_key)?;
    let content_key = match key {
        TeeKey::Rsa(key) => {
            let bytes = Zeroizing::new(key.oaep_decrypt::<Sha256>(&wrapped).map_err(|_| JweError::Refused)?);
            Zeroizing::new(<[u8; KEY]>::try_from(bytes.as_slice()).map_err(|_| JweError::Refused)?)
        }
        TeeKey::P256(_) | TeeKey::P521(_) => {
            let wrapping_key = agree(key, &header)?;
            unwrap_a256kw(&wrapping_key, &wrapped)?
        }
    };
    let iv: [u8; IV] = part("iv", &message.iv)?.try_into().map_err(|_| form("iv: A256GCM wants 12 bytes"))?;
    let tag = part("tag", &message.tag)?;
    if tag.len() != TAG {
        return Err(form("tag: A256GCM wants 16 bytes"));
    }
    let mut sealed = part("ciphertext", &message.ciphertext)?;
    sealed.extend_from_slice(&tag);
    let aad = additional(&message.protected, message.aad.as_deref());
    Aes256Gcm::new(&(*content_key).into())
        .decrypt(&iv.into(), Payload { msg: &sealed, aad: &aad })
        .map(Zeroizing::new)
        .map_err(|_| JweError::Refused)
}

/// The key-encryption key that both sides of an ECDH agree on.
fn agree(key: &TeeKey, header: &Header) -> Result<Zeroizing<[u8; KEY]>, JweError> {
    let epk = header.epk.as_ref().ok_or_else(|| form("protected header: no epk"))?;
    if epk.kty != "EC" {
        return Err(JweError::Unsupported { field: "epk.kty", value: epk.kty.clone(), wanted: "EC" });
    }
    let jwk = PublicJwk::EC { crv: epk.crv.clone(), alg: String::new(), x: epk.x.clone(), y: epk.y.clone() };
    let party = |name: &'static str, text: &Option<String>| match text {
        None => Ok(Vec::new()),
        Some(text) => from_base64url(text).map_err(|e| form(format!("{name}: {e}"))),
    };
    let (apu, apv) = (party("apu", &header.apu)?, party("apv", &header.apv)?);
    match (key, PublicKey::from_jwk(&jwk).map_err(|e| form(format!("epk: {e}")))?) {
        (TeeKey::P256(ours), PublicKey::P256(theirs)) => {
            Ok(concat_kdf(ours.diffie_hellman(&theirs).raw_secret_bytes(), &header.alg, &apu, &apv))
        }
        (TeeKey::P521(ours), PublicKey::P521(theirs)) => {
            Ok(concat_kdf(ours.diffie_hellman(&theirs).raw_secret_bytes(), &header.alg, &apu, &apv))
        }
        _ => Err(JweError::Unsupported {
            field: "epk.crv",
            value: epk.crv.clone(),
            wanted: "the TEE key's curve",
        }),
    }
}

/// A256GCM with an explicit key, as sealed secrets and wrapped image keys use it: `sealed` ends with the tag.
///
/// # Errors
/// [`JweError::Refused`].
pub fn open_a256gcm(
    key: &[u8; KEY],
    iv: &[u8; IV],
    sealed: &[u8],
    aad: &[u8],
) -> Result<Zeroizing<Vec<u8>>, JweError> {
    Aes256Gcm::new(&(*key).into())
        .decrypt(&(*iv).into(), Payload { msg: sealed, aad })
        .map(Zeroizing::new)
        .map_err(|_| JweError::Refused)
}

/// AES key unwrap (RFC 3394) of a 32-byte key.
///
/// # Errors
/// [`JweError::Refused`].
pub fn unwrap_a256kw(key: &[u8; KEY], wrapped: &[u8]) -> Result<Zeroizing<[u8; KEY]>, JweError> {
    let mut content_key = Zeroizing::new([0; KEY]);
    let unwrapped = KwAes256::new(&(*key).into())
        .unwrap_key(wrapped, content_key.as_mut_slice())
        .map_err(|_| JweError::Refused)?;
    if unwrapped.len() == KEY { Ok(content_key) } else { Err(JweError::Refused) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyAlgorithm;
    use proptest::prelude::*;
    use std::sync::OnceLock;

    const ALL: [KeyAlgorithm; 3] = [KeyAlgorithm::P256, KeyAlgorithm::P521, KeyAlgorithm::Rsa];

    fn p256_key() -> &'static TeeKey {
        static KEY: OnceLock<TeeKey> = OnceLock::new();
        KEY.get_or_init(|| TeeKey::generate(KeyAlgorithm::P256).unwrap())
    }

    #[test]
    fn what_is_encrypted_for_a_key_decrypts_with_it_and_no_other() {
        for algorithm in ALL {
            let key = TeeKey::generate(algorithm).unwrap();
            let message = encrypt(&key.public(), b"secret").unwrap();
            assert_eq!(decrypt(&key, &message).unwrap().as_slice(), b"secret");
            let other = TeeKey::generate(algorithm).unwrap();
            assert_eq!(decrypt(&other, &message), Err(JweError::Refused));
        }
    }

    #[test]
    fn kdf_is_rfc_7518_appendix_c() {
        // Z, and the 128-bit key for A128GCM: the same construction with another length, checked over its whole input.
        let z = [
            158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156, 251, 49, 110, 163,
            218, 128, 106, 72, 246, 218, 167, 121, 140, 254, 144, 196,
        ];
        let mut hash = Sha256::new();
        hash.update([0, 0, 0, 1]);
        hash.update(z);
        hash.update([0, 0, 0, 7]);
        hash.update(b"A128GCM");
        hash.update([0, 0, 0, 5]);
        hash.update(b"Alice");
        hash.update([0, 0, 0, 3]);
        hash.update(b"Bob");
        hash.update([0, 0, 0, 128]);
        assert_eq!(to_base64url(&hash.finalize()[..16]), "VqqN6vgjbSBcIijNcacQGg");
        // Ours differs in the length word only.
        let mut hash = Sha256::new();
        hash.update([0, 0, 0, 1]);
        hash.update(z);
        hash.update([0, 0, 0, 7]);
        hash.update(b"A128GCM");
        hash.update([0, 0, 0, 5]);
        hash.update(b"Alice");
        hash.update([0, 0, 0, 3]);
        hash.update(b"Bob");
        hash.update([0, 0, 1, 0]);
        assert_eq!(concat_kdf(&z, "A128GCM", b"Alice", b"Bob").as_slice(), hash.finalize().as_slice());
    }

    #[test]
    fn the_header_is_byte_for_byte_what_kbs_types_writes_anew() {
        let message = encrypt(&p256_key().public(), b"x").unwrap();
        let theirs: kbs_types::Response =
            serde_json::from_value(serde_json::to_value(&message).unwrap()).unwrap();
        assert_eq!(theirs.protected.generate_aad().unwrap(), message.protected.as_bytes());
        assert_eq!(
            serde_json::to_value(&theirs).unwrap()["ciphertext"],
            serde_json::to_value(&message).unwrap()["ciphertext"]
        );
    }

    #[test]
    fn what_a_key_does_not_take_is_named() {
        let mut message = encrypt(&p256_key().public(), b"x").unwrap();
        message.protected = to_base64url(br#"{"alg":"dir","enc":"A256GCM"}"#);
        assert_eq!(
            decrypt(p256_key(), &message).unwrap_err().to_string(),
            "JWE: alg is \"dir\": ECDH-ES+A256KW is what this key takes"
        );
        message.protected = to_base64url(br#"{"alg":"ECDH-ES+A256KW","enc":"A256GCM","zip":"DEF"}"#);
        assert!(decrypt(p256_key(), &message).unwrap_err().to_string().contains("zip"));
    }

    proptest! {
        #[test]
        fn one_changed_character_anywhere_is_refused(place in any::<prop::sample::Index>(), which in 0usize..5) {
            let mut message = encrypt(&p256_key().public(), b"some secret").unwrap();
            let part = [
                &mut message.protected,
                &mut message.encrypted_key,
                &mut message.iv,
                &mut message.ciphertext,
                &mut message.tag,
            ].into_iter().nth(which).unwrap();
            let at = place.index(part.len());
            let other = if &part[at..=at] == "A" { "B" } else { "A" };
            part.replace_range(at..=at, other);
            prop_assert!(decrypt(p256_key(), &message).is_err());
        }

        #[test]
        fn any_parts_are_refused_without_a_panic(
            header in "\\PC{0,80}",
            parts in prop::collection::vec("[A-Za-z0-9_-]{0,60}", 4),
        ) {
            let message = Jwe {
                protected: to_base64url(header.as_bytes()),
                encrypted_key: parts[0].clone(),
                iv: parts[1].clone(),
                ciphertext: parts[2].clone(),
                tag: parts[3].clone(),
                aad: None,
            };
            prop_assert!(decrypt(p256_key(), &message).is_err());
        }
    }
}
