//! Signatures as cosign stores them: a simple-signing payload and an ECDSA P-256 or Ed25519 signature over it.
//!
//! Owns: the payload (containers/image, "simple signing"; cosign's SIGNATURE_SPEC.md), keys, and finding signatures in a layout by
//! the tag `sha256-<hex>.sig`. Does not own: transparency logs or certificates, which a pinned key does without.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use ed25519_dalek::pkcs8::DecodePublicKey as _;
use p256::{
    ecdsa::{
        DerSignature, SigningKey, VerifyingKey,
        signature::{Signer as _, Verifier as _},
    },
    pkcs8::DecodePrivateKey as _,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    digest::Digest,
    layout::{BlobError, Blobs, Layout, document},
    manifest::{Descriptor, Document, MANIFEST, ManifestError},
};

/// Media type of a payload.
pub const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation: the signature, DER or raw, in base64.
pub const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const KIND: &str = "cosign container image signature";
/// Most signatures of one image that are looked at.
const MOST_SIGNATURES: usize = 64;

/// A signature cannot be read or made, or does not hold.
#[derive(Debug, Error)]
pub enum SignatureError {
    /// A key.
    #[error("want a PEM with a P-256 or Ed25519 key")]
    Pem,
    /// The arithmetic.
    #[error("signature: it is not by this key, or the payload was changed")]
    Forged,
    /// The payload.
    #[error("signature: payload: {0}")]
    Payload(#[from] serde_json::Error),
    /// Of another kind.
    #[error("signature: its type is {0:?}, want {KIND:?}")]
    Kind(String),
    /// For another image.
    #[error("signature: it is for {0}")]
    Other(Digest),
    /// A blob.
    #[error("signature: {0}")]
    Blob(#[from] BlobError),
    /// The manifest that lists signatures.
    #[error("signature: {0}")]
    Manifest(#[from] ManifestError),
}

/// Checks signatures.
#[derive(Clone, Debug)]
pub enum PublicKey {
    /// ECDSA over SHA-256, cosign's own.
    P256(VerifyingKey),
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
        ed25519_dalek::VerifyingKey::from_public_key_pem(text)
            .map(Self::Ed25519)
            .map_err(|_| SignatureError::Pem)
    }

    fn verify(&self, payload: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        let held = match self {
            Self::P256(key) => {
                DerSignature::from_bytes(signature).is_ok_and(|s| key.verify(payload, &s).is_ok())
            }
            Self::Ed25519(key) => ed25519_dalek::Signature::from_slice(signature)
                .is_ok_and(|s| key.verify_strict(payload, &s).is_ok()),
        };
        if held { Ok(()) } else { Err(SignatureError::Forged) }
    }
}

#[derive(Serialize, Deserialize)]
struct Payload {
    critical: Critical,
    #[serde(default)]
    optional: Option<BTreeMap<String, serde_json::Value>>,
}

#[derive(Serialize, Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    #[serde(rename = "docker-reference")]
    reference: String,
}

#[derive(Serialize, Deserialize)]
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

    /// Whether it holds for one of these digests; gives the reference that it names. The payload is read only after
    /// the signature held.
    ///
    /// # Errors
    /// [`SignatureError`].
    pub fn check(&self, key: &PublicKey, digests: &[Digest]) -> Result<String, SignatureError> {
        key.verify(&self.payload, &self.signature)?;
        let payload: Payload = serde_json::from_slice(&self.payload)?;
        if payload.critical.kind != KIND {
            return Err(SignatureError::Kind(payload.critical.kind));
        }
        if !digests.contains(&payload.critical.image.digest) {
            return Err(SignatureError::Other(payload.critical.image.digest));
        }
        Ok(payload.critical.identity.reference)
    }

    /// Signs for `reference` with a P-256 key (PKCS#8 PEM).
    ///
    /// # Errors
    /// [`SignatureError::Pem`].
    pub fn sign(private: &str, reference: &str, digest: &Digest) -> Result<Self, SignatureError> {
        let key = SigningKey::from_pkcs8_pem(private).map_err(|_| SignatureError::Pem)?;
        let payload = Payload {
            critical: Critical {
                identity: Identity { reference: reference.into() },
                image: Image { digest: digest.clone() },
                kind: KIND.into(),
            },
            optional: None,
        };
        let payload = serde_json::to_vec(&payload)?;
        let signature: DerSignature = key.sign(&payload);
        Ok(Self { signature: signature.as_bytes().to_vec(), payload })
    }
}

/// The tag under which cosign keeps an image's signatures.
#[must_use]
pub fn tag(digest: &Digest) -> String {
    format!("{}-{}.sig", digest.algorithm(), digest.hex())
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
    for layer in manifest.layers.iter().filter(|layer| layer.media_type == PAYLOAD).take(MOST_SIGNATURES) {
        let payload = document(blobs, &layer.digest, Some(layer.size))?;
        let text = layer.annotations.get(SIGNATURE).map(String::as_str).unwrap_or_default();
        // One that is not base64 is no signature, and the others may hold.
        signatures.push(Signature { payload, signature: STANDARD.decode(text).unwrap_or_default() });
    }
    Ok(signatures)
}

/// An image's signatures in a layout; none when it has no such tag.
///
/// # Errors
/// [`SignatureError`].
pub fn find(layout: &Layout, digest: &Digest) -> Result<Vec<Signature>, SignatureError> {
    match layout.tagged(Some(&tag(digest))) {
        Ok(descriptor) => read(layout, &descriptor.digest),
        Err(BlobError::Layout(..)) => Ok(Vec::new()),
        Err(e) => Err(e.into()),
    }
}

/// Adds a signature to a layout, beside those that are there.
///
/// # Errors
/// [`SignatureError`].
pub fn store(layout: &Layout, digest: &Digest, signature: &Signature) -> Result<(), SignatureError> {
    let mut all = find(layout, digest)?;
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
