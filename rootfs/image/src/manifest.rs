//! Manifests and indexes (image-spec 1.1 and Docker's schema 2), read strictly.
//!
//! Owns: their JSON, media types, and the choice of a platform. Does not check digests: [`crate::layout`] does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::Digest;

/// Most layers of an image: Docker's own bound is 127.
pub const MOST_LAYERS: usize = 512;
/// Most manifests in an index.
pub const MOST_MANIFESTS: usize = 1024;

/// A layer's annotation with the bytes that it takes unpacked, in decimal. A hint for who makes room: nobody checks it before the layer came.
pub const UNPACKED: &str = "io.coffer.layer.unpacked";

/// A manifest cannot be used.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Not JSON of the wanted shape.
    #[error("manifest: {0}")]
    Json(#[from] serde_json::Error),
    /// Schema 1 or something newer.
    #[error("manifest: schemaVersion {0}: only 2 is supported: push the image again with a current tool")]
    Schema(u32),
    /// The media type is no image's.
    #[error("manifest: media type {0:?} is neither an image manifest nor an index")]
    MediaType(String),
    /// Too many layers or manifests.
    #[error("manifest: {count} {what}, more than {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// So many.
        count: usize,
        /// The bound.
        most: usize,
    },
    /// No manifest for this machine.
    #[error("index: no manifest for linux/{arch}: it has {has}")]
    Platform {
        /// Of this machine.
        arch: &'static str,
        /// What the index offers.
        has: String,
    },
    /// A layer's media type is unknown.
    #[error("layer {0}: media type {1:?} is not a tar, gzip or zstd layer")]
    LayerType(Digest, String),
}

/// A reference from one blob to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub urls: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

/// What an index says of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct Manifest {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
}

/// Manifests of one image for several platforms, or a layout's `index.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the image specification's names")]
pub struct Index {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    pub manifests: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
}

/// Go writes an empty list or map as `null`.
fn nullable<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// What a blob that a reference names turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Box<Manifest>),
    /// Several.
    Index(Index),
}

/// OCI's image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI's index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

impl Document {
    /// Reads a manifest or an index. `media_type` is what the reference to it says: a document that calls
    /// itself something else is refused, because one blob must not be read in two ways.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            schema_version: u32,
            media_type: Option<String>,
            config: Option<serde::de::IgnoredAny>,
            layers: Option<serde::de::IgnoredAny>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let probe: Probe = serde_json::from_slice(bytes)?;
        if probe.schema_version != 2 {
            return Err(ManifestError::Schema(probe.schema_version));
        }
        let said = probe.media_type.as_deref().or(media_type);
        if let (Some(inner), Some(outer)) = (&probe.media_type, media_type)
            && inner != outer
        {
            return Err(ManifestError::MediaType(format!("{outer} that calls itself {inner}")));
        }
        let image = probe.config.is_some() && probe.layers.is_some();
        match said {
            Some(MANIFEST | DOCKER_MANIFEST) | None if image && probe.manifests.is_none() => {
                let manifest: Box<Manifest> = serde_json::from_slice(bytes)?;
                bound("layers", manifest.layers.len(), MOST_LAYERS)?;
                Ok(Self::Manifest(manifest))
            }
            Some(INDEX | DOCKER_LIST) | None if probe.manifests.is_some() && !image => {
                let index: Index = serde_json::from_slice(bytes)?;
                bound("manifests", index.manifests.len(), MOST_MANIFESTS)?;
                Ok(Self::Index(index))
            }
            other => Err(ManifestError::MediaType(other.unwrap_or("(none)").to_owned())),
        }
    }
}

fn bound(what: &'static str, count: usize, most: usize) -> Result<(), ManifestError> {
    if count > most { Err(ManifestError::TooMany { what, count, most }) } else { Ok(()) }
}

/// This machine's architecture in the specification's (Go's) words.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl Index {
    /// The manifest for this machine: the first for linux and its architecture, as other tools choose. One that asks for more than every such
    /// machine has (`amd64/v3`) is only chosen where there is no other.
    ///
    /// # Errors
    /// [`ManifestError::Platform`], listing what there is.
    pub fn choose(&self) -> Result<&Descriptor, ManifestError> {
        let fits = |d: &&Descriptor| {
            d.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture())
        };
        let everywhere = |d: &&Descriptor| {
            let variant = d.platform.as_ref().and_then(|p| p.variant.as_deref());
            match variant {
                None | Some("" | "v1") => true,
                Some(variant) => variant == "v8" && architecture() == "arm64",
            }
        };
        let ours = || self.manifests.iter().filter(fits);
        ours().find(everywhere).or_else(|| ours().next()).ok_or_else(|| {
            let name = |d: &Descriptor| {
                d.platform.as_ref().map_or("(no platform)".into(), |p| format!("{}/{}", p.os, p.architecture))
            };
            let mut has: Vec<_> = self.manifests.iter().take(16).map(name).collect();
            has.sort();
            ManifestError::Platform { arch: architecture(), has: has.join(", ") }
        })
    }
}

/// How a layer's tar is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
}

/// The suffix of an encrypted layer's media type (ocicrypt, spec/spec.go).
pub const ENCRYPTED: &str = "+encrypted";

/// A layer's media type: how it is packed and whether it is encrypted.
///
/// # Errors
/// [`ManifestError::LayerType`].
pub fn layer_type(layer: &Descriptor) -> Result<(Compression, bool), ManifestError> {
    let unknown = || ManifestError::LayerType(layer.digest.clone(), layer.media_type.clone());
    let (plain, encrypted) = match layer.media_type.strip_suffix(ENCRYPTED) {
        Some(plain) => (plain, true),
        None => (layer.media_type.as_str(), false),
    };
    let packed = plain
        .strip_prefix("application/vnd.oci.image.layer.v1.")
        .or_else(|| plain.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1."))
        .or_else(|| plain.strip_prefix("application/vnd.docker.image.rootfs.diff."))
        .or_else(|| plain.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff."))
        .ok_or_else(unknown)?;
    let compression = match packed {
        "tar" => Compression::None,
        "tar+gzip" | "tar.gzip" => Compression::Gzip,
        "tar+zstd" | "tar.zstd" => Compression::Zstd,
        _ => return Err(unknown()),
    };
    Ok((compression, encrypted))
}

#[cfg(test)]
mod tests;
