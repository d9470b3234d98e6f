//! One requirement of a policy: what an image has to have to run.
//!
//! Owns: the JSON of the four kinds, read strictly, and their keys. What the format has and this cannot check (Fulcio, PKI, Rekor, key
//! types other than OpenPGP's) is read, and refused where it would decide: a policy may have it for other images. It is never passed over.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, de::Error as _};

use super::{identity::Identity, sigstore::PublicKey};
use crate::openpgp::Ring;

/// Most keys of one requirement.
const MOST_KEYS: usize = 64;

const KEY_TYPE: &str = "signedBy with a keyType other than GPGKeys is what nothing checks, skopeo neither: write GPGKeys and list keys";
const CERTIFICATES: &str = "sigstoreSigned with fulcio or pki asks for a certificate, which a pod cannot check: sign with a key, and \
     write keyPath or keyData";
const LOG: &str = "sigstoreSigned with rekorPublicKey… asks for an entry in a transparency log, which a pod cannot check: leave it \
     out, and the key alone decides";

/// A requirement.
#[derive(Clone, Debug)]
pub(super) enum Requirement {
    Accept,
    Reject,
    /// A sigstore signature by one of the keys, for this name.
    Signed {
        keys: Vec<Key<PublicKey>>,
        identity: Identity,
    },
    /// Simple signing by a key of one of the rings, for this name.
    SignedBy {
        keys: Vec<Key<Ring>>,
        identity: Identity,
    },
    /// Known, not to be checked here: why, and what to write in its place.
    Unchecked(&'static str),
}

/// Where a public key, or a ring of them, is.
#[derive(Clone, Debug)]
pub(super) enum Key<K> {
    Path(String),
    Read(K),
}

/// As it stands in the file. Braces: serde lets a variant without them have any members.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
enum Written {
    InsecureAcceptAnything {},
    Reject {},
    #[serde(rename_all = "camelCase")]
    SigstoreSigned {
        key_path: Option<String>,
        key_paths: Option<Vec<String>>,
        key_data: Option<String>,
        key_datas: Option<Vec<String>>,
        fulcio: Option<serde_json::Value>,
        pki: Option<serde_json::Value>,
        rekor_public_key_path: Option<String>,
        rekor_public_key_paths: Option<Vec<String>>,
        rekor_public_key_data: Option<String>,
        rekor_public_key_datas: Option<Vec<String>>,
        #[serde(default)]
        signed_identity: Identity,
    },
    #[serde(rename_all = "camelCase")]
    SignedBy {
        key_type: String,
        key_path: Option<String>,
        key_paths: Option<Vec<String>>,
        key_data: Option<String>,
        #[serde(default)]
        signed_identity: Identity,
    },
}

impl<'de> Deserialize<'de> for Requirement {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Written::deserialize(d)?.try_into().map_err(D::Error::custom)
    }
}

/// Exactly one of several members is there.
fn one<const N: usize>(what: &str, present: [bool; N]) -> Result<(), String> {
    match present.iter().filter(|there| **there).count() {
        1 => Ok(()),
        0 => Err(format!("{what}: no key: write one of keyPath, keyPaths, keyData, keyDatas")),
        _ => Err(format!("{what}: more than one of keyPath, keyPaths, keyData, keyDatas, fulcio, pki")),
    }
}

fn read(data: &str) -> Result<Key<PublicKey>, String> {
    let pem = STANDARD.decode(data).map_err(|e| format!("sigstoreSigned: keyData: {e}"))?;
    PublicKey::from_pem_bytes(&pem).map(Key::Read).map_err(|e| format!("sigstoreSigned: keyData: {e}"))
}

fn read_ring(data: &str) -> Result<Key<Ring>, String> {
    let bytes = STANDARD.decode(data).map_err(|e| format!("signedBy: keyData: {e}"))?;
    Ring::parse(&bytes).map(Key::Read).map_err(|e| format!("signedBy: keyData: {e}"))
}

/// Some, and not too many.
fn counted<K>(what: &str, keys: Vec<Key<K>>) -> Result<Vec<Key<K>>, String> {
    match keys.len() {
        0 => Err(format!("{what}: an empty list of keys")),
        1..=MOST_KEYS => Ok(keys),
        n => Err(format!("{what}: {n} keys, more than {MOST_KEYS}")),
    }
}

impl TryFrom<Written> for Requirement {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::InsecureAcceptAnything {} => Ok(Self::Accept),
            Written::Reject {} => Ok(Self::Reject),
            Written::SignedBy { key_type, key_path, key_paths, key_data, signed_identity } => {
                if !["GPGKeys", "signedByGPGKeys", "X509Certificates", "signedByX509CAs"]
                    .contains(&key_type.as_str())
                {
                    return Err(format!("signedBy: keyType {key_type:?} is unknown"));
                }
                one("signedBy", [key_path.is_some(), key_paths.is_some(), key_data.is_some()])?;
                signed_identity.check()?;
                if key_type != "GPGKeys" {
                    return Ok(Self::Unchecked(KEY_TYPE));
                }
                let paths = key_path.into_iter().chain(key_paths.into_iter().flatten());
                let keys: Vec<Key<Ring>> = paths
                    .map(|path| Ok(Key::Path(path)))
                    .chain(key_data.iter().map(|data| read_ring(data)))
                    .collect::<Result<_, String>>()?;
                Ok(Self::SignedBy { keys: counted("signedBy", keys)?, identity: signed_identity })
            }
            Written::SigstoreSigned {
                key_path,
                key_paths,
                key_data,
                key_datas,
                fulcio,
                pki,
                rekor_public_key_path,
                rekor_public_key_paths,
                rekor_public_key_data,
                rekor_public_key_datas,
                signed_identity,
            } => {
                one(
                    "sigstoreSigned",
                    [
                        key_path.is_some(),
                        key_paths.is_some(),
                        key_data.is_some(),
                        key_datas.is_some(),
                        fulcio.is_some(),
                        pki.is_some(),
                    ],
                )?;
                signed_identity.check()?;
                if fulcio.is_some() || pki.is_some() {
                    return Ok(Self::Unchecked(CERTIFICATES));
                }
                if rekor_public_key_path.is_some()
                    || rekor_public_key_paths.is_some()
                    || rekor_public_key_data.is_some()
                    || rekor_public_key_datas.is_some()
                {
                    return Ok(Self::Unchecked(LOG));
                }
                let paths = key_path.into_iter().chain(key_paths.into_iter().flatten());
                let datas = key_data.into_iter().chain(key_datas.into_iter().flatten());
                let keys: Vec<Key<PublicKey>> = paths
                    .map(|path| Ok(Key::Path(path)))
                    .chain(datas.map(|data| read(&data)))
                    .collect::<Result<_, String>>()?;
                Ok(Self::Signed { keys: counted("sigstoreSigned", keys)?, identity: signed_identity })
            }
        }
    }
}
