//! Encrypting an image of a layout for its recipients: what `coffer image encrypt` does on the owner's machine.
//!
//! Owns: new blobs for layers, new manifests and index; blobs that do not change are copied. Each layer gets a
//! key of its own.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    digest::{Digest, Hasher},
    layout::{BlobError, Blobs, Layout, document},
    manifest::{
        Compression, Descriptor, Document, ENCRYPTED, INDEX, MANIFEST, Manifest, ManifestError, UNPACKED,
        layer_type,
    },
    ocicrypt::{
        ATTESTATION_AGENT, JWE, KeyError, LayerKey, PUBLIC,
        cipher::Stream,
        jwe::{Jwe, JweError, PublicKey},
        packet::{Packet, PacketError},
    },
    pipeline::{decompress, queue},
    tar::Archive,
    unpack::cost,
};

/// The image cannot be encrypted.
#[derive(Debug, Error)]
pub enum EncryptError {
    /// A blob.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A wrap.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// A wrap.
    #[error(transparent)]
    Jwe(#[from] JweError),
    /// Reading or writing.
    #[error("encrypt layer {0}: {1}")]
    Io(Digest, io::Error),
    /// JSON.
    #[error("encrypt: {0}")]
    Json(#[from] serde_json::Error),
    /// There is nothing to do.
    #[error("encrypt: no recipient: give --key or --jwe")]
    NoRecipient,
    /// It is encrypted already.
    #[error("encrypt: layer {0} is encrypted already")]
    Already(Digest),
}

/// Who can open the layers.
pub enum Recipient {
    /// Whoever the KBS gives this resource to.
    Resource {
        /// `kbs:///repository/type/tag`.
        kid: String,
        /// What the KBS holds there: 32 bytes.
        key: Zeroizing<Vec<u8>>,
    },
    /// Whoever has the private key.
    Jwe(PublicKey),
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encrypted {
    /// Of the new manifest or index: what a pod's annotation pins.
    pub digest: Digest,
    /// Layers that were encrypted.
    pub layers: usize,
}

/// Encrypts `from`'s image into the layout `to` under `tag`. `progress` counts bytes of layers.
///
/// # Errors
/// [`EncryptError`].
pub fn encrypt(
    from: &Layout,
    image: &Descriptor,
    to: &Layout,
    tag: &str,
    recipients: &[Recipient],
    progress: &AtomicU64,
) -> Result<Encrypted, EncryptError> {
    if recipients.is_empty() {
        return Err(EncryptError::NoRecipient);
    }
    let mut work = Work { from, to, recipients, progress, done: BTreeMap::new() };
    let bytes = document(from, &image.digest, Some(image.size))?;
    let made = match Document::parse(&bytes, Some(&image.media_type))? {
        Document::Manifest(manifest) => work.manifest(*manifest)?,
        Document::Index(mut index) => {
            for entry in &mut index.manifests {
                let bytes = document(from, &entry.digest, Some(entry.size))?;
                let Document::Manifest(manifest) = Document::parse(&bytes, Some(&entry.media_type))? else {
                    return Err(ManifestError::MediaType("an index in an index".into()).into());
                };
                // Build attestations travel in the index as manifests of no platform; they stay as they are.
                let made = if manifest.layers.iter().all(|layer| layer_type(layer).is_ok()) {
                    work.manifest(*manifest)?
                } else {
                    for blob in manifest.layers.iter().chain([&manifest.config]) {
                        work.copy(blob)?;
                    }
                    to.put(&entry.media_type, &bytes)?
                };
                (entry.digest, entry.size, entry.media_type) = (made.digest, made.size, made.media_type);
            }
            index.media_type = Some(INDEX.into());
            to.put(INDEX, &serde_json::to_vec(&index)?)?
        }
    };
    to.tag(made.clone(), tag)?;
    Ok(Encrypted { digest: made.digest, layers: work.done.len() })
}

struct Work<'a> {
    from: &'a Layout,
    to: &'a Layout,
    recipients: &'a [Recipient],
    progress: &'a AtomicU64,
    done: BTreeMap<Digest, Descriptor>,
}

impl Work<'_> {
    fn manifest(&mut self, mut manifest: Manifest) -> Result<Descriptor, EncryptError> {
        for layer in &mut manifest.layers {
            *layer = match self.done.get(&layer.digest) {
                Some(done) => done.clone(),
                None => {
                    let made = self.layer(layer)?;
                    self.done.insert(layer.digest.clone(), made.clone());
                    made
                }
            };
        }
        self.copy(&manifest.config)?;
        manifest.media_type = Some(MANIFEST.into());
        manifest.config.media_type = "application/vnd.oci.image.config.v1+json".into();
        Ok(self.to.put(MANIFEST, &serde_json::to_vec(&manifest)?)?)
    }

    fn layer(&self, layer: &Descriptor) -> Result<Descriptor, EncryptError> {
        let (compression, encrypted) = layer_type(layer)?;
        if encrypted {
            return Err(EncryptError::Already(layer.digest.clone()));
        }
        let mut key = LayerKey::generate()?;
        let mut stream = Stream::new(&key);
        let (digest, size) = self.stream(layer, |chunk| stream.encrypt(chunk))?;
        key.hmac = stream.mac();
        let mut annotations = layer.annotations.clone();
        // What is no archive is encrypted all the same: whoever unpacks it says what is wrong with it.
        if let Some(cost) = self.cost(layer, compression) {
            annotations.insert(UNPACKED.into(), cost.to_string());
        }
        annotations.insert(PUBLIC.into(), key.public_options());
        let private = key.private_options(&layer.digest.to_string());
        let mut packets = Vec::new();
        let mut publics = Vec::new();
        for recipient in self.recipients {
            match recipient {
                Recipient::Resource { kid, key } => {
                    packets.push(STANDARD.encode(Packet::wrap(kid, key, &private)?.to_json()));
                }
                Recipient::Jwe(key) => publics.push(key.clone()),
            }
        }
        if !packets.is_empty() {
            annotations.insert(ATTESTATION_AGENT.into(), packets.join(","));
        }
        if !publics.is_empty() {
            annotations.insert(JWE.into(), STANDARD.encode(Jwe::encrypt(&private, &publics)?));
        }
        let packed = match compression {
            Compression::None => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{packed}{ENCRYPTED}");
        Ok(Descriptor { media_type, digest, size, annotations, ..layer.clone() })
    }

    /// Bytes that the layer takes unpacked.
    fn cost(&self, layer: &Descriptor, compression: Compression) -> Option<u64> {
        let mut source = self.from.open(&layer.digest).ok()?;
        let ((give, take), (out, result)) = (queue(), queue());
        thread::scope(|scope| {
            scope.spawn(move || {
                loop {
                    let mut chunk = give.buffer();
                    let n = source.read(&mut chunk).unwrap_or(0);
                    chunk.truncate(n);
                    if n == 0 || give.send(chunk).is_err() {
                        break;
                    }
                }
                give.finish();
            });
            scope.spawn(move || drop(decompress(compression, take, &out, u64::MAX)));
            cost(&mut Archive::new(result)).ok()
        })
    }

    /// Copies a blob as it is.
    fn copy(&self, blob: &Descriptor) -> Result<(), EncryptError> {
        if !self.to.has(&blob.digest) {
            self.stream(blob, |_| ())?;
        }
        Ok(())
    }

    /// Reads a blob, checks it, and writes what `change` makes of it.
    fn stream(
        &self,
        blob: &Descriptor,
        mut change: impl FnMut(&mut [u8]),
    ) -> Result<(Digest, u64), EncryptError> {
        let failed = |e| EncryptError::Io(blob.digest.clone(), e);
        let mut source = self.from.open(&blob.digest).map_err(failed)?.take(blob.size + 1);
        let mut writer = self.to.writer()?;
        let mut hasher = Hasher::like(&blob.digest);
        let mut chunk = vec![0; 1 << 20];
        let mut got = 0;
        loop {
            let n = source.read(&mut chunk).map_err(failed)?;
            if n == 0 {
                break;
            }
            got += n as u64;
            hasher.update(&chunk[..n]);
            change(&mut chunk[..n]);
            writer.write_all(&chunk[..n]).map_err(failed)?;
            self.progress.fetch_add(n as u64, Ordering::Relaxed);
        }
        let is = hasher.end();
        if is != blob.digest || got != blob.size {
            return Err(BlobError::Digest { want: blob.digest.clone(), got: is }.into());
        }
        writer.finish().map_err(failed)
    }
}
