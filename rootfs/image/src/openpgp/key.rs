//! A public key packet (RFC 9580, 5.5.2) and the arithmetic of its signatures.
//!
//! Owns: RSA, ECDSA over P-256 and P-384, and EdDSA over Ed25519 as gpg writes it. Does not own: whether the key may be used (`ring`).

use ed25519_dalek::VerifyingKey as Ed25519;
use p256::ecdsa::{VerifyingKey as P256, signature::hazmat::PrehashVerifier as _};
use p384::ecdsa::VerifyingKey as P384;
use rsa::{BoxedUint, pkcs1v15, traits::PublicKeyParts as _};
use sha1::Sha1;
use sha2::{Digest as _, Sha256, Sha384, Sha512};

use super::{Fingerprint, OpenPgpError, packet::Cursor};

/// Smallest RSA modulus in bits (NIST SP 800-131A).
const LEAST_RSA: usize = 2048;

/// Public key algorithms (RFC 9580, 9.1) and curves (9.2), each an object identifier without its tag.
mod abi {
    pub(super) const RSA: u8 = 1;
    pub(super) const RSA_SIGN: u8 = 3;
    pub(super) const ECDSA: u8 = 19;
    pub(super) const EDDSA: u8 = 22;
    pub(super) const P256: [u8; 8] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    pub(super) const P384: [u8; 5] = [0x2b, 0x81, 0x04, 0x00, 0x22];
    pub(super) const ED25519: [u8; 9] = [0x2b, 0x06, 0x01, 0x04, 0x01, 0xda, 0x47, 0x0f, 0x01];
}

/// Hashes that a signature may be over (RFC 9580, 9.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// By its number.
    pub(super) fn numbered(number: u8) -> Result<Self, OpenPgpError> {
        match number {
            8 => Ok(Self::Sha256),
            9 => Ok(Self::Sha384),
            10 => Ok(Self::Sha512),
            other => Err(OpenPgpError::Unsupported {
                object: "signature",
                what: match other {
                    1 => "MD5".into(),
                    2 => "SHA-1".into(),
                    11 => "SHA-224".into(),
                    other => format!("hash {other}"),
                },
                remedy: "sign with gpg --digest-algo SHA512, and a key whose self-signatures have that as well",
            }),
        }
    }

    /// Over all parts, one after the other.
    pub(super) fn over<'a>(self, parts: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
        fn run<'a, D: sha2::Digest>(parts: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
            let mut hasher = D::new();
            parts.for_each(|part| hasher.update(part));
            hasher.finalize().to_vec()
        }
        match self {
            Self::Sha256 => run::<Sha256>(parts),
            Self::Sha384 => run::<Sha384>(parts),
            Self::Sha512 => run::<Sha512>(parts),
        }
    }
}

/// What checks signatures.
#[derive(Clone, Debug)]
enum Material {
    Rsa(Box<rsa::PublicKey>),
    P256(P256),
    P384(P384),
    Ed25519(Ed25519),
    /// Such as a key for encryption: what it is.
    Other(String),
}

/// A key.
#[derive(Clone, Debug)]
pub(super) struct Key {
    /// What is hashed of it: its packet, in the one framing that hashes have (RFC 9580, 5.2.4).
    pub(super) hashed: Vec<u8>,
    material: Material,
    algorithm: u8,
    /// Seconds since 1970.
    pub(super) created: u32,
    pub(super) fingerprint: Fingerprint,
}

impl Key {
    /// From a packet's body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, OpenPgpError> {
        let mut cursor = Cursor::new(body, "key");
        let (version, length) = (cursor.u8()?, u16::try_from(body.len()));
        let (4, Ok(length)) = (version, length) else {
            return Err(OpenPgpError::Unsupported {
                object: "key",
                what: format!("version {version} with {} bytes", body.len()),
                remedy: "make a version 4 key, as gpg 2.2 does",
            });
        };
        let (created, algorithm) = (cursor.u32()?, cursor.u8()?);
        let material = match algorithm {
            abi::RSA | abi::RSA_SIGN => rsa_key(cursor)?,
            abi::ECDSA | abi::EDDSA => curve_key(algorithm, cursor)?,
            other => Material::Other(format!("algorithm {other}")),
        };
        let hashed = [&[0x99][..], &length.to_be_bytes(), body].concat();
        let fingerprint = Fingerprint(Sha1::digest(&hashed).into());
        Ok(Self { hashed, material, algorithm, created, fingerprint })
    }

    /// Whether `values`, the integers of a signature packet, are by this key over `digest`.
    ///
    /// # Errors
    /// [`OpenPgpError::Forged`], or that the key makes no signatures that are understood.
    pub(super) fn check(
        &self,
        algorithm: u8,
        digest: &[u8],
        hash: Hash,
        values: &[u8],
    ) -> Result<(), OpenPgpError> {
        let forged = || OpenPgpError::Forged(self.fingerprint);
        if let Material::Other(what) = &self.material {
            return Err(OpenPgpError::Unsupported {
                object: "key",
                what: what.clone(),
                remedy: "sign with RSA (2048 bits or more), Ed25519, or ECDSA over P-256 or P-384",
            });
        }
        if algorithm != self.algorithm {
            return Err(forged());
        }
        let mut cursor = Cursor::new(values, "signature");
        let holds = match &self.material {
            Material::Rsa(key) => {
                let value = cursor.integer()?;
                let width = key.n().bit_width_vartime().div_ceil(8) as usize;
                padded(value, width).is_some_and(|value| rsa_holds(key, digest, hash, &value))
            }
            Material::P256(key) => {
                let [r, s] = scalars::<32>(&mut cursor)?;
                p256::ecdsa::Signature::from_scalars(r, s)
                    .is_ok_and(|signature| key.verify_prehash(digest, &signature).is_ok())
            }
            Material::P384(key) => {
                let [r, s] = scalars::<48>(&mut cursor)?;
                p384::ecdsa::Signature::from_scalars(r, s)
                    .is_ok_and(|signature| key.verify_prehash(digest, &signature).is_ok())
            }
            Material::Ed25519(key) => {
                // Two strings of 32 bytes, written as integers (draft-koch-eddsa-for-openpgp, 4).
                let [r, s] = scalars::<32>(&mut cursor)?;
                key.verify_strict(digest, &ed25519_dalek::Signature::from_components(r, s)).is_ok()
            }
            Material::Other(_) => false,
        };
        cursor.end()?;
        if holds { Ok(()) } else { Err(forged()) }
    }
}

fn rsa_key(mut cursor: Cursor<'_>) -> Result<Material, OpenPgpError> {
    let (n, e) = (cursor.integer()?, cursor.integer()?);
    cursor.end()?;
    let other = || Ok(Material::Other(format!("RSA with {} bits", n.len() * 8)));
    if n.len() * 8 < LEAST_RSA || e.is_empty() {
        return other();
    }
    let key = rsa::PublicKey::new(BoxedUint::from_be_slice_vartime(n), BoxedUint::from_be_slice_vartime(e));
    match key {
        Ok(key) if key.n().bit_width_vartime() as usize >= LEAST_RSA => Ok(Material::Rsa(Box::new(key))),
        _ => other(),
    }
}

fn curve_key(algorithm: u8, mut cursor: Cursor<'_>) -> Result<Material, OpenPgpError> {
    let length = usize::from(cursor.u8()?);
    let curve = cursor.take(length)?;
    let point = cursor.integer()?;
    cursor.end()?;
    let wrong = || OpenPgpError::Form("key", "its point is not on its curve");
    let other = || Ok(Material::Other(format!("algorithm {algorithm} over another curve")));
    match algorithm {
        abi::ECDSA if curve == abi::P256 => {
            P256::from_sec1_bytes(point).map(Material::P256).map_err(|_| wrong())
        }
        abi::ECDSA if curve == abi::P384 => {
            P384::from_sec1_bytes(point).map(Material::P384).map_err(|_| wrong())
        }
        // The prefix says that the point is in its native form.
        abi::EDDSA if curve == abi::ED25519 => match point.split_first() {
            Some((0x40, native)) => Ed25519::try_from(native).map(Material::Ed25519).map_err(|_| wrong()),
            _ => Err(OpenPgpError::Form("key", "its point is in no known form")),
        },
        _ => other(),
    }
}

/// Integers lose their leading zeros on the way.
fn padded(value: &[u8], width: usize) -> Option<Vec<u8>> {
    let zeros = width.checked_sub(value.len())?;
    Some([&vec![0; zeros], value].concat())
}

fn scalars<const N: usize>(cursor: &mut Cursor<'_>) -> Result<[[u8; N]; 2], OpenPgpError> {
    let mut one = || {
        let value = padded(cursor.integer()?, N).and_then(|value| value.try_into().ok());
        value.ok_or(OpenPgpError::Form("signature", "an integer is longer than its curve's"))
    };
    Ok([one()?, one()?])
}

fn rsa_holds(key: &rsa::PublicKey, digest: &[u8], hash: Hash, value: &[u8]) -> bool {
    let Ok(signature) = pkcs1v15::Signature::try_from(value) else { return false };
    let key = key.clone();
    match hash {
        Hash::Sha256 => pkcs1v15::VerifyingKey::<Sha256>::new(key).verify_prehash(digest, &signature),
        Hash::Sha384 => pkcs1v15::VerifyingKey::<Sha384>::new(key).verify_prehash(digest, &signature),
        Hash::Sha512 => pkcs1v15::VerifyingKey::<Sha512>::new(key).verify_prehash(digest, &signature),
    }
    .is_ok()
}
