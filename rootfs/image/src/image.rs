//! A whole image: from one digest to a tree that a container may see.
//!
//! Owns: the chain of digests (index, manifest, configuration, layers), the rule that an encrypted image needs a
//! pin or a policy, and that the tree appears in one step after everything held.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, mkdirat, openat, renameat_with};
use thiserror::Error;

use crate::{
    config::{ConfigError, ImageConfig},
    digest::Digest,
    layout::{BlobError, Blobs, document},
    manifest::{Document, Manifest, ManifestError, layer_type},
    ocicrypt::{KeySource, marks},
    pipeline::{Layer, LayerError, run},
    policy::{PolicyError, Verdict, sigstore::SignatureError},
    unpack::{Options, Report, Unpacker},
};

/// An image was refused.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A document.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The signature policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The signatures that the host shows.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// Nothing vouches for the manifest.
    #[error(
        "trust: the image is encrypted, and encryption does not protect its manifest and configuration: \
         name it by digest (…@sha256:…) or give a signature policy"
    )]
    Unpinned,
    /// A layer that was encrypted and is not said to be.
    #[error("manifest: layer {0} has encryption annotations but media type {1:?}")]
    Marked(Digest, String),
    /// The index points to another index.
    #[error("index {0}: it points to another index")]
    Nested(Digest),
    /// The place for it.
    #[error("unpack to {0}: {1}")]
    Place(PathBuf, io::Error),
}

/// Why the manifest is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Its owner named it by digest, over a way that the host cannot change.
    Pinned,
    /// A signature policy accepted it.
    Signed,
    /// Nobody did.
    Unchecked,
}

impl From<Verdict> for Trust {
    /// An image that a policy lets run unsigned is one that nobody vouches for.
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Signed => Self::Signed,
            Verdict::Accepted => Self::Unchecked,
        }
    }
}

/// An image whose manifest and configuration were checked against their digests.
#[derive(Clone, Debug)]
pub struct Image {
    /// The manifest's digest; for an index, of the one chosen from it.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// The configuration.
    pub config: ImageConfig,
}

impl Image {
    /// Loads what `digest` names: a manifest, or an index from which this machine's is chosen.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn load(blobs: &dyn Blobs, digest: &Digest, trust: Trust) -> Result<Self, ImageError> {
        Self::judged(blobs, digest, |_| Ok(trust))
    }

    /// As [`Image::load`], where trust is found out from the digests that name the image: `digest`, and for an index the
    /// chosen manifest's. Nothing that they name is read before.
    ///
    /// # Errors
    /// [`ImageError`], the judge's among them.
    pub fn judged(
        blobs: &dyn Blobs,
        digest: &Digest,
        judge: impl FnOnce(&[Digest]) -> Result<Trust, ImageError>,
    ) -> Result<Self, ImageError> {
        let (names, manifest) = resolve(blobs, digest)?;
        let trust = judge(&names)?;
        for layer in &manifest.layers {
            let (_, encrypted) = layer_type(layer)?;
            if encrypted && trust == Trust::Unchecked {
                return Err(ImageError::Unpinned);
            }
            if !encrypted && marks(&layer.annotations) {
                return Err(ImageError::Marked(layer.digest.clone(), layer.media_type.clone()));
            }
        }
        let config = document(blobs, &manifest.config.digest, Some(manifest.config.size))?;
        let config = ImageConfig::parse(&config, manifest.layers.len())?;
        let digest = names.last().unwrap_or(digest).clone();
        Ok(Self { digest, manifest: *manifest, config })
    }

    /// Whether any layer is encrypted.
    #[must_use]
    pub fn encrypted(&self) -> bool {
        self.manifest.layers.iter().any(|layer| layer.media_type.ends_with(crate::manifest::ENCRYPTED))
    }

    /// Bytes of all layers as they travel.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.manifest.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add)
    }

    /// Unpacks the layers to `place`, which must not exist: it appears when all of them held, and not before.
    /// `progress` counts bytes of blobs, up to [`Image::size`].
    ///
    /// # Errors
    /// [`ImageError`]; then `place` does not exist and nothing is left beside it.
    pub fn unpack(
        &self,
        blobs: &dyn Blobs,
        keys: &dyn KeySource,
        place: &Path,
        options: Options,
        progress: &AtomicU64,
    ) -> Result<Report, ImageError> {
        let failed = |e: io::Error| ImageError::Place(place.to_owned(), e);
        let name = place.file_name().ok_or_else(|| failed(io::Error::other("not a name")))?;
        let mut staging = name.to_owned();
        staging.push(".partial");
        let staging = place.with_file_name(staging);
        mkdirat(CWD, &staging, Mode::from_raw_mode(0o700)).map_err(|e| failed(e.into()))?;
        // Only what was made here is removed: an image whose name ends like this is another's.
        let staging = Staging(staging);
        let tree = staging.0.join("tree");
        mkdirat(CWD, &tree, Mode::from_raw_mode(0o755)).map_err(|e| failed(e.into()))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = openat(CWD, &tree, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let mut unpacker = Unpacker::new(root, options);
        for (layer, diff_id) in self.manifest.layers.iter().zip(&self.config.rootfs.diff_ids) {
            let (compression, encrypted) = layer_type(layer)?;
            let layer = Layer { descriptor: layer, compression, encrypted, diff_id };
            run(blobs, &layer, keys, &mut unpacker, progress)?;
        }
        renameat_with(CWD, &tree, CWD, place, RenameFlags::NOREPLACE).map_err(|e| failed(e.into()))?;
        Ok(unpacker.report())
    }
}

/// The digests that name an image, the manifest's last, which may be the only one; and the manifest.
///
/// # Errors
/// [`ImageError`].
pub fn resolve(blobs: &dyn Blobs, digest: &Digest) -> Result<(Vec<Digest>, Box<Manifest>), ImageError> {
    let bytes = document(blobs, digest, None)?;
    let index = match Document::parse(&bytes, None)? {
        Document::Manifest(manifest) => return Ok((vec![digest.clone()], manifest)),
        Document::Index(index) => index,
    };
    let chosen = index.choose()?;
    let bytes = document(blobs, &chosen.digest, Some(chosen.size))?;
    match Document::parse(&bytes, Some(&chosen.media_type))? {
        Document::Manifest(manifest) => Ok((vec![digest.clone(), chosen.digest.clone()], manifest)),
        Document::Index(_) => Err(ImageError::Nested(digest.clone())),
    }
}

/// Removed with all that is in it, however unpacking ends.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed is in a directory that only its owner may enter.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests;
