//! The TEE key: made in the guest for one session with a KBS, its public half bound into the evidence.
//!
//! Owns: the three kinds of key, their JWK and PEM forms. Does not own: what is encrypted to them (`jwe`).

use p256::elliptic_curve::{Generate, sec1::ToSec1Point};
use rsa::{
    BoxedUint, PrivateKey as RsaPrivateKey, PublicKey as RsaPublicKey,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, LineEnding},
    traits::PublicKeyParts,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::encoding::{from_base64url, to_base64url};

/// Key agreement with AES key wrap, RFC 7518 section 4.6.
pub const ECDH_ES_A256KW: &str = "ECDH-ES+A256KW";
/// RSA key encryption, RFC 7518 section 4.3.
pub const RSA_OAEP_256: &str = "RSA-OAEP-256";
/// Bits of an RSA key that we make, and bounds of those that we read.
const RSA_BITS: usize = 2048;
const RSA_MOST_BITS: usize = 4096;

/// Which kind of TEE key. The names are those of `aa.toml`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum KeyAlgorithm {
    /// Upstream's default.
    #[default]
    #[serde(rename = "ECDH-ES+A256KW-P256")]
    P256,
    /// The larger curve.
    #[serde(rename = "ECDH-ES+A256KW-P521")]
    P521,
    /// RSA of 2048 bits.
    #[serde(rename = "RSA-OAEP-256")]
    Rsa,
}

/// A public key as JWK (RFC 7517), with the members that kbs-types has and no others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kty")]
pub enum PublicJwk {
    /// Elliptic curve; coordinates at the field's full length.
    EC {
        /// `P-256` or `P-521`.
        crv: String,
        /// [`ECDH_ES_A256KW`].
        alg: String,
        /// Unpadded URL-safe Base64.
        x: String,
        /// Unpadded URL-safe Base64.
        y: String,
    },
    /// RSA.
    RSA {
        /// [`RSA_OAEP_256`].
        alg: String,
        /// Modulus, unpadded URL-safe Base64.
        n: String,
        /// Exponent, unpadded URL-safe Base64.
        e: String,
    },
}

/// A key that cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("key: {0}")]
pub struct KeyError(pub String);

fn wrong(message: impl Into<String>) -> KeyError {
    KeyError(message.into())
}

/// A TEE key, both halves.
pub enum TeeKey {
    /// On P-256.
    P256(p256::SecretKey),
    /// On P-521.
    P521(p521::SecretKey),
    /// RSA.
    Rsa(Box<RsaPrivateKey>),
}

impl std::fmt::Debug for TeeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TeeKey").field(&self.algorithm()).finish()
    }
}

impl TeeKey {
    /// Makes a key from the system's randomness.
    ///
    /// # Errors
    /// [`KeyError`] when there is none.
    pub fn generate(algorithm: KeyAlgorithm) -> Result<Self, KeyError> {
        let no_randomness = |e| wrong(format!("the system gives no random bytes: {e}"));
        Ok(match algorithm {
            KeyAlgorithm::P256 => Self::P256(p256::SecretKey::try_generate().map_err(no_randomness)?),
            KeyAlgorithm::P521 => Self::P521(p521::SecretKey::try_generate().map_err(no_randomness)?),
            KeyAlgorithm::Rsa => {
                let key = RsaPrivateKey::new(&mut getrandom::SysRng, RSA_BITS)
                    .map_err(|e| wrong(format!("RSA: {e}")))?;
                Self::Rsa(Box::new(key))
            }
        })
    }

    /// Its kind.
    #[must_use]
    pub fn algorithm(&self) -> KeyAlgorithm {
        match self {
            Self::P256(_) => KeyAlgorithm::P256,
            Self::P521(_) => KeyAlgorithm::P521,
            Self::Rsa(_) => KeyAlgorithm::Rsa,
        }
    }

    /// The public half.
    ///
    /// # Panics
    /// Never: a public key of a secret key is not the point at infinity.
    #[must_use]
    pub fn public(&self) -> PublicJwk {
        match self {
            Self::P256(key) => ec_jwk("P-256", key.public_key().to_sec1_point(false).as_bytes()),
            Self::P521(key) => ec_jwk("P-521", key.public_key().to_sec1_point(false).as_bytes()),
            Self::Rsa(key) => PublicJwk::RSA {
                alg: RSA_OAEP_256.into(),
                n: to_base64url(&key.n().to_be_bytes_trimmed_vartime()),
                e: to_base64url(&key.e().to_be_bytes_trimmed_vartime()),
            },
        }
    }

    /// PKCS #8 in PEM, as `/aa/token` hands it to the workload.
    ///
    /// # Errors
    /// [`KeyError`]; not for keys made here.
    pub fn to_pem(&self) -> Result<Zeroizing<String>, KeyError> {
        let failed = |e| wrong(format!("cannot be written as PEM: {e}"));
        match self {
            Self::P256(key) => key.to_pkcs8_pem(LineEnding::LF).map_err(failed),
            Self::P521(key) => key.to_pkcs8_pem(LineEnding::LF).map_err(failed),
            Self::Rsa(key) => key.to_pkcs8_pem(LineEnding::LF).map_err(failed),
        }
    }

    /// Reads what [`Self::to_pem`] writes.
    ///
    /// # Errors
    /// [`KeyError`] when it is none of the three kinds.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        p256::SecretKey::from_pkcs8_pem(pem)
            .map(Self::P256)
            .or_else(|_| p521::SecretKey::from_pkcs8_pem(pem).map(Self::P521))
            .or_else(|_| RsaPrivateKey::from_pkcs8_pem(pem).map(|key| Self::Rsa(Box::new(key))))
            .map_err(|_| wrong("not a PKCS #8 PEM of a P-256, P-521 or RSA key"))
    }
}

/// From an uncompressed point: 0x04, x, y.
pub(crate) fn ec_jwk(curve: &str, point: &[u8]) -> PublicJwk {
    let coordinates = point.get(1..).unwrap_or_default();
    let (x, y) = coordinates.split_at(coordinates.len() / 2);
    PublicJwk::EC { crv: curve.into(), alg: ECDH_ES_A256KW.into(), x: to_base64url(x), y: to_base64url(y) }
}

/// An uncompressed point from coordinates of exactly `length` bytes.
pub(crate) fn point(x: &str, y: &str, length: usize) -> Result<Vec<u8>, KeyError> {
    let read = |name: &str, text: &str| {
        let bytes = from_base64url(text).map_err(|e| wrong(format!("coordinate {name}: {e}")))?;
        if bytes.len() == length {
            Ok(bytes)
        } else {
            Err(wrong(format!("coordinate {name} has {} bytes, the curve wants {length}", bytes.len())))
        }
    };
    Ok([vec![4], read("x", x)?, read("y", y)?].concat())
}

/// A public key that something can be encrypted to, or a signature checked with.
pub(crate) enum PublicKey {
    P256(p256::PublicKey),
    P521(p521::PublicKey),
    Rsa(RsaPublicKey),
}

impl PublicKey {
    pub(crate) fn from_jwk(jwk: &PublicJwk) -> Result<Self, KeyError> {
        let off_curve = |_| wrong("the point is not on the curve");
        match jwk {
            PublicJwk::EC { crv, x, y, .. } => match crv.as_str() {
                "P-256" => {
                    p256::PublicKey::from_sec1_bytes(&point(x, y, 32)?).map(Self::P256).map_err(off_curve)
                }
                "P-521" => {
                    p521::PublicKey::from_sec1_bytes(&point(x, y, 66)?).map(Self::P521).map_err(off_curve)
                }
                _ => Err(wrong(format!("curve {crv:?} is not known: use P-256 or P-521"))),
            },
            PublicJwk::RSA { n, e, .. } => {
                let number = |name: &str, text: &str| {
                    let bytes = from_base64url(text).map_err(|e| wrong(format!("{name}: {e}")))?;
                    if bytes.len() * 8 > RSA_MOST_BITS {
                        return Err(wrong(format!("{name} is longer than {RSA_MOST_BITS} bits")));
                    }
                    Ok(BoxedUint::from_be_slice_vartime(&bytes))
                };
                let key = RsaPublicKey::new(number("modulus", n)?, number("exponent", e)?)
                    .map_err(|e| wrong(format!("RSA: {e}")))?;
                if key.size() * 8 < RSA_BITS {
                    return Err(wrong(format!("RSA of {} bits: at least {RSA_BITS}", key.size() * 8)));
                }
                Ok(Self::Rsa(key))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_of_key_survives_its_pem() {
        for algorithm in [KeyAlgorithm::P256, KeyAlgorithm::P521, KeyAlgorithm::Rsa] {
            let key = TeeKey::generate(algorithm).unwrap();
            let again = TeeKey::from_pem(&key.to_pem().unwrap()).unwrap();
            assert_eq!(again.public(), key.public());
            assert_eq!(again.algorithm(), algorithm);
            PublicKey::from_jwk(&key.public()).unwrap();
        }
    }

    #[test]
    fn the_jwk_is_what_kbs_types_reads() {
        let key = TeeKey::generate(KeyAlgorithm::P521).unwrap();
        let ours = serde_json::to_value(key.public()).unwrap();
        let theirs: kbs_types::TeePubKey = serde_json::from_value(ours.clone()).unwrap();
        assert_eq!(serde_json::to_value(theirs).unwrap(), ours);
        let PublicJwk::EC { x, .. } = key.public() else { panic!("a curve") };
        assert_eq!(x.len(), 88, "66 bytes, full length");
    }

    #[test]
    fn a_short_coordinate_or_a_point_off_the_curve_is_refused() {
        let jwk = |x: &[u8], y: &[u8]| PublicJwk::EC {
            crv: "P-256".into(),
            alg: ECDH_ES_A256KW.into(),
            x: to_base64url(x),
            y: to_base64url(y),
        };
        let message = |jwk| PublicKey::from_jwk(&jwk).err().unwrap().to_string();
        assert!(message(jwk(&[1; 31], &[1; 32])).contains("31 bytes"));
        assert!(message(jwk(&[1; 32], &[1; 32])).contains("not on the curve"));
    }

    proptest! {
        #[test]
        fn any_members_are_a_key_or_an_error(
            crv in "P-256|P-521|P-384|",
            x in "[A-Za-z0-9_-]{0,90}",
            y in "[A-Za-z0-9_-]{0,90}",
        ) {
            let _ = PublicKey::from_jwk(&PublicJwk::EC { crv, alg: String::new(), x: x.clone(), y: y.clone() });
            let _ = PublicKey::from_jwk(&PublicJwk::RSA { alg: String::new(), n: x, e: y });
        }
    }
}
