//! Signatures as cosign and skopeo store them: a simple-signing payload and a signature over it.
//!
//! Owns: the payload (containers/image, "simple signing"; cosign's SIGNATURE_SPEC.md), keys, and finding signatures in a layout: by
//! the tag `sha256-<hex>.sig`, or as `cosign save` leaves them. Does not own: transparency logs or certificates, which a pinned
//! key does without.

use std::{collections::BTreeMap, io, path::PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use ed25519_dalek::pkcs8::DecodePublicKey as _;
use p256::{
    ecdsa::{
        DerSignature, SigningKey, VerifyingKey,
        signature::{Signer as _, Verifier as _},
    },
    pkcs8::DecodePrivateKey as _,
};
use rsa::{pkcs1v15, traits::PublicKeyParts as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use thiserror::Error;

use crate::{
    digest::Digest,
    layout::{BlobError, Blobs, Layout, REF_NAME, document},
    manifest::{Descriptor, Document, MANIFEST, Manifest, ManifestError},
    openpgp::OpenPgpError,
};

/// Media type of a payload.
pub const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation: the signature, DER or raw, in base64.
pub const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const KIND: &str = "cosign container image signature";
/// Most signatures of one manifest of signatures that are looked at.
const MOST_SIGNATURES: usize = 64;
/// Most manifests of signatures of one image that are looked at.
pub const MOST_MANIFESTS: usize = 8;
/// Largest payload in bytes. They have some 250.
const MOST_PAYLOAD: u64 = 64 << 10;
/// Smallest RSA modulus in bits (NIST SP 800-131A).
const LEAST_RSA: u32 = 2048;
/// How `cosign save` marks a manifest of signatures in `index.json`.
const SAVED: (&str, &str) = ("kind", "dev.cosignproject.cosign/sigs");

/// A signature cannot be read or made, or does not hold.
#[derive(Debug, Error)]
pub enum SignatureError {
    /// A key.
    #[error("want a PEM with a P-256, RSA (2048 bits or more) or Ed25519 key")]
    Pem,
    /// The arithmetic.
    #[error("signature: it is not by the rule's key, or its payload was changed")]
    Forged,
    /// The payload.
    #[error("signature: payload: {0}")]
    Payload(#[from] serde_json::Error),
    /// Of another kind.
    #[error("signature: its type is {0:?}, want {1:?}")]
    Kind(String, &'static str),
    /// For another image.
    #[error("signature: it is for {0}")]
    Other(Digest),
    /// A blob.
    #[error("signature: {0}")]
    Blob(#[from] BlobError),
    /// The manifest that lists signatures.
    #[error("signature: {0}")]
    Manifest(#[from] ManifestError),
    /// Simple signing's message.
    #[error(transparent)]
    OpenPgp(#[from] OpenPgpError),
    /// A file beside the layout.
    #[error("signature: {0}: {1}")]
    File(PathBuf, io::Error),
}

/// Checks signatures.
#[derive(Clone, Debug)]
pub enum PublicKey {
    /// ECDSA over SHA-256, cosign's own.
    P256(VerifyingKey),
    /// PKCS#1 v1.5 over SHA-256.
    Rsa(Box<rsa::PublicKey>),
    /// Ed25519.
    Ed25519(ed25519_dalek::VerifyingKey),
}

impl PublicKey {
    /// A SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`SignatureError::Pem`].
    pub fn from_pem(text: &str) -> Result<Self, SignatureError> {
        if let Ok(key) = VerifyingKey::from_public_key_pem(text) {
            return Ok(Self::P256(key));
        }
        if let Ok(key) = rsa::PublicKey::from_public_key_pem(text) {
            let strong = key.n().bit_width_vartime() >= LEAST_RSA;
            return if strong { Ok(Self::Rsa(Box::new(key))) } else { Err(SignatureError::Pem) };
        }
        ed25519_dalek::VerifyingKey::from_public_key_pem(text)
            .map(Self::Ed25519)
            .map_err(|_| SignatureError::Pem)
    }

    /// As [`Self::from_pem`], from a file's bytes.
    ///
    /// # Errors
    /// [`SignatureError::Pem`].
    pub fn from_pem_bytes(bytes: &[u8]) -> Result<Self, SignatureError> {
        Self::from_pem(std::str::from_utf8(bytes).map_err(|_| SignatureError::Pem)?.trim())
    }

    fn holds(&self, payload: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::P256(key) => {
                DerSignature::from_bytes(signature).is_ok_and(|s| key.verify(payload, &s).is_ok())
            }
            Self::Rsa(key) => pkcs1v15::Signature::try_from(signature).is_ok_and(|s| {
                pkcs1v15::VerifyingKey::<Sha256>::new((**key).clone()).verify(payload, &s).is_ok()
            }),
            Self::Ed25519(key) => ed25519_dalek::Signature::from_slice(signature)
                .is_ok_and(|s| key.verify_strict(payload, &s).is_ok()),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    critical: Critical,
    #[serde(default)]
    optional: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    #[serde(rename = "docker-reference")]
    reference: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: Digest,
}

/// One signature and what it signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    payload: Vec<u8>,
    signature: Vec<u8>,
}

impl Signature {
    /// From its two halves.
    #[must_use]
    pub fn new(payload: Vec<u8>, signature: Vec<u8>) -> Self {
        Self { payload, signature }
    }

    /// Whether it is by one of these keys, for one of these digests; gives the reference that it names. The payload is
    /// read only after the signature held.
    ///
    /// # Errors
    /// [`SignatureError`].
    pub fn check(&self, keys: &[PublicKey], digests: &[Digest]) -> Result<String, SignatureError> {
        if !keys.iter().any(|key| key.holds(&self.payload, &self.signature)) {
            return Err(SignatureError::Forged);
        }
        reference(&self.payload, digests)
    }

    /// Signs for `reference` with a P-256 key (PKCS#8 PEM).
    ///
    /// # Errors
    /// [`SignatureError::Pem`].
    pub fn sign(private: &str, reference: &str, digest: &Digest) -> Result<Self, SignatureError> {
        let payload = Payload {
            critical: Critical {
                identity: Identity { reference: reference.into() },
                image: Image { digest: digest.clone() },
                kind: KIND.into(),
            },
            optional: None,
        };
        Self::over(private, serde_json::to_vec(&payload)?)
    }

    /// Signs any payload with a P-256 key (PKCS#8 PEM).
    ///
    /// # Errors
    /// [`SignatureError::Pem`].
    pub fn over(private: &str, payload: Vec<u8>) -> Result<Self, SignatureError> {
        let key = SigningKey::from_pkcs8_pem(private).map_err(|_| SignatureError::Pem)?;
        let signature: DerSignature = key.sign(&payload);
        Ok(Self { signature: signature.as_bytes().to_vec(), payload })
    }
}

/// The reference that a payload names, if it is for one of these digests. Only for bytes whose signature held.
///
/// # Errors
/// [`SignatureError`].
pub fn reference(payload: &[u8], digests: &[Digest]) -> Result<String, SignatureError> {
    named(payload, KIND, digests)
}

/// As [`reference`], of a payload of this kind: cosign's differs from simple signing's in the one word.
pub(super) fn named(
    payload: &[u8],
    kind: &'static str,
    digests: &[Digest],
) -> Result<String, SignatureError> {
    let payload: Payload = serde_json::from_slice(payload)?;
    if payload.critical.kind != kind {
        return Err(SignatureError::Kind(payload.critical.kind, kind));
    }
    if !digests.contains(&payload.critical.image.digest) {
        return Err(SignatureError::Other(payload.critical.image.digest));
    }
    Ok(payload.critical.identity.reference)
}

/// The tag under which cosign keeps an image's signatures.
#[must_use]
pub fn tag(digest: &Digest) -> String {
    format!("{}-{}.sig", digest.algorithm(), digest.hex())
}

/// The image that a tag of cosign's belongs to: `sha256-<hex>.sig`, and what it keeps beside (`.att`, `.sbom`).
#[must_use]
pub fn signed(tag: &str) -> Option<Digest> {
    let (name, _) = tag.split_once('.')?;
    let (algorithm, hex) = name.split_once('-')?;
    format!("{algorithm}:{hex}").parse().ok()
}

/// The images that a manifest of signatures says it signs, as nobody has checked; none where it is no such manifest or one of its
/// payloads cannot be read.
#[must_use]
pub fn said(blobs: &dyn Blobs, manifest: &Manifest) -> Vec<Digest> {
    let of = |layer: &Descriptor| -> Option<Digest> {
        if layer.media_type != PAYLOAD || layer.size > MOST_PAYLOAD {
            return None;
        }
        let payload = document(blobs, &layer.digest, Some(layer.size)).ok()?;
        Some(serde_json::from_slice::<Payload>(&payload).ok()?.critical.image.digest)
    };
    manifest.layers.iter().map(of).collect::<Option<_>>().unwrap_or_default()
}

/// The signatures that a manifest of signatures lists.
///
/// # Errors
/// [`SignatureError`].
pub fn read(blobs: &dyn Blobs, manifest: &Digest) -> Result<Vec<Signature>, SignatureError> {
    let bytes = document(blobs, manifest, None)?;
    let Document::Manifest(manifest) = Document::parse(&bytes, None)? else {
        return Err(ManifestError::MediaType("an index of signatures".into()).into());
    };
    let mut signatures = Vec::new();
    let small = |layer: &&Descriptor| layer.media_type == PAYLOAD && layer.size <= MOST_PAYLOAD;
    for layer in manifest.layers.iter().filter(small).take(MOST_SIGNATURES) {
        let payload = document(blobs, &layer.digest, Some(layer.size))?;
        let text = layer.annotations.get(SIGNATURE).map(String::as_str).unwrap_or_default();
        // One that is not base64 is no signature, and the others may hold.
        signatures.push(Signature { payload, signature: STANDARD.decode(text).unwrap_or_default() });
    }
    Ok(signatures)
}

/// The manifests of signatures of an image that these digests name, at most [`MOST_MANIFESTS`]; none where there are none.
/// `cosign save` leaves one without saying whose: whoever reads it compares.
///
/// # Errors
/// [`SignatureError`].
pub fn manifests(layout: &Layout, digests: &[Digest]) -> Result<Vec<Digest>, SignatureError> {
    let tags: Vec<String> = digests.iter().map(tag).collect();
    let index = layout.index()?;
    let of = |d: &&Descriptor| {
        d.annotations.get(REF_NAME).is_some_and(|name| tags.contains(name))
            || d.annotations.get(SAVED.0).is_some_and(|kind| kind == SAVED.1)
    };
    Ok(index.manifests.iter().filter(of).map(|d| d.digest.clone()).take(MOST_MANIFESTS).collect())
}

/// An image's signatures in a layout.
///
/// # Errors
/// [`SignatureError`].
pub fn find(layout: &Layout, digests: &[Digest]) -> Result<Vec<Signature>, SignatureError> {
    let mut all = Vec::new();
    for manifest in manifests(layout, digests)? {
        all.extend(read(layout, &manifest)?);
    }
    Ok(all)
}

/// Adds a signature to a layout, beside those that are there.
///
/// # Errors
/// [`SignatureError`].
pub fn store(layout: &Layout, digest: &Digest, signature: &Signature) -> Result<(), SignatureError> {
    let mut all = match layout.tagged(Some(&tag(digest))) {
        Ok(descriptor) => read(layout, &descriptor.digest)?,
        Err(BlobError::Layout(..)) => Vec::new(),
        Err(e) => return Err(e.into()),
    };
    all.push(signature.clone());
    let mut layers: Vec<Descriptor> = Vec::new();
    for one in &all {
        let mut layer = layout.put(PAYLOAD, &one.payload)?;
        layer.annotations.insert(SIGNATURE.into(), STANDARD.encode(&one.signature));
        layers.push(layer);
    }
    let ids: Vec<_> = layers.iter().map(|layer| layer.digest.clone()).collect();
    let config = serde_json::json!({"architecture": "", "os": "", "config": {},
        "rootfs": {"type": "layers", "diff_ids": ids}});
    let config = layout.put("application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
    let manifest =
        serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let manifest = layout.put(MANIFEST, &serde_json::to_vec(&manifest)?)?;
    Ok(layout.tag(manifest, &tag(digest))?)
}
