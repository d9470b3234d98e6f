//! Keys of JWE recipients: PEM to RSA or one of three curves, and ECDH on them.

use p256::elliptic_curve::sec1::ToSec1Point;
use rsa::{
    pkcs1::{DecodeRsaPrivateKey, DecodeRsaPublicKey},
    pkcs8::{DecodePrivateKey, DecodePublicKey},
};

use super::{Engine, Generate, JweError, Jwk, SysRng, URL_SAFE_NO_PAD, UnwrapErr, Zeroizing};

/// A recipient's private key.
#[derive(Clone)]
#[expect(missing_docs, reason = "each is its kind")]
pub enum PrivateKey {
    Rsa(Box<rsa::PrivateKey>),
    P256(Box<p256::SecretKey>),
    P384(Box<p384::SecretKey>),
    P521(Box<p521::SecretKey>),
}

/// A recipient's public key.
#[derive(Clone)]
#[expect(missing_docs, reason = "each is its kind")]
pub enum PublicKey {
    Rsa(Box<rsa::PublicKey>),
    P256(Box<p256::PublicKey>),
    P384(Box<p384::PublicKey>),
    P521(Box<p521::PublicKey>),
}

impl PrivateKey {
    /// PKCS#1, PKCS#8 or SEC1.
    ///
    /// # Errors
    /// [`JweError::Pem`].
    pub fn from_pem(text: &str) -> Result<Self, JweError> {
        if let Ok(key) = rsa::PrivateKey::from_pkcs1_pem(text) {
            return Ok(Self::Rsa(Box::new(key)));
        }
        if let Ok(key) = rsa::PrivateKey::from_pkcs8_pem(text) {
            return Ok(Self::Rsa(Box::new(key)));
        }
        if let Ok(key) = p256::SecretKey::from_pem(text) {
            return Ok(Self::P256(Box::new(key)));
        }
        if let Ok(key) = p384::SecretKey::from_pem(text) {
            return Ok(Self::P384(Box::new(key)));
        }
        p521::SecretKey::from_pem(text)
            .map(|key| Self::P521(Box::new(key)))
            .map_err(|_| JweError::Pem("no private key"))
    }

    /// ECDH with an ephemeral key; `None` when it is for another curve.
    pub(super) fn agree(&self, epk: &Jwk) -> Result<Option<Zeroizing<Vec<u8>>>, JweError> {
        if epk.kty != "EC" {
            return Err(JweError::Unsupported("epk kty", epk.kty.clone()));
        }
        let broken = || JweError::Member("epk");
        let mut point = vec![4];
        for coordinate in [&epk.x, &epk.y] {
            point.extend(URL_SAFE_NO_PAD.decode(coordinate).map_err(|_| broken())?);
        }
        let z = match (self, epk.crv.as_str()) {
            (Self::P256(key), "P-256") => {
                let public = p256::PublicKey::from_sec1_bytes(&point).map_err(|_| broken())?;
                key.diffie_hellman(&public).raw_secret_bytes().to_vec()
            }
            (Self::P384(key), "P-384") => {
                let public = p384::PublicKey::from_sec1_bytes(&point).map_err(|_| broken())?;
                key.diffie_hellman(&public).raw_secret_bytes().to_vec()
            }
            (Self::P521(key), "P-521") => {
                let public = p521::PublicKey::from_sec1_bytes(&point).map_err(|_| broken())?;
                key.diffie_hellman(&public).raw_secret_bytes().to_vec()
            }
            _ => return Ok(None),
        };
        Ok(Some(Zeroizing::new(z)))
    }
}

impl PublicKey {
    /// PKCS#1 or a SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`JweError::Pem`].
    pub fn from_pem(text: &str) -> Result<Self, JweError> {
        if let Ok(key) = rsa::PublicKey::from_pkcs1_pem(text) {
            return Ok(Self::Rsa(Box::new(key)));
        }
        if let Ok(key) = rsa::PublicKey::from_public_key_pem(text) {
            return Ok(Self::Rsa(Box::new(key)));
        }
        if let Ok(key) = p256::PublicKey::from_public_key_pem(text) {
            return Ok(Self::P256(Box::new(key)));
        }
        if let Ok(key) = p384::PublicKey::from_public_key_pem(text) {
            return Ok(Self::P384(Box::new(key)));
        }
        p521::PublicKey::from_public_key_pem(text)
            .map(|key| Self::P521(Box::new(key)))
            .map_err(|_| JweError::Pem("no public key"))
    }

    /// An ephemeral key and what ECDH with it gives.
    pub(super) fn agree(&self) -> Result<(Jwk, Zeroizing<Vec<u8>>), JweError> {
        macro_rules! ecdh {
            ($curve:ident, $name:literal, $public:expr) => {{
                let ours = $curve::SecretKey::generate_from_rng(&mut UnwrapErr(SysRng));
                let point = ours.public_key().to_sec1_point(false);
                let z = ours.diffie_hellman($public).raw_secret_bytes().to_vec();
                ($name, point.x().map(|x| x.to_vec()), point.y().map(|y| y.to_vec()), z)
            }};
        }
        let (crv, x, y, z) = match self {
            Self::Rsa(_) => return Err(JweError::Key("RSA has no key agreement")),
            Self::P256(key) => ecdh!(p256, "P-256", key),
            Self::P384(key) => ecdh!(p384, "P-384", key),
            Self::P521(key) => ecdh!(p521, "P-521", key),
        };
        let text = |c: Option<Vec<u8>>| c.map(|c| URL_SAFE_NO_PAD.encode(c)).ok_or(JweError::Member("epk"));
        Ok((Jwk { crv: crv.into(), kty: "EC".into(), x: text(x)?, y: text(y)? }, Zeroizing::new(z)))
    }
}
