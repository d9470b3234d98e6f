//! An image that podman has already, into a layout.
//!
//! Owns: the call of skopeo, which knows containers-storage and puts each layer's archive together again from its tree. Does not own: whether
//! what came is what a pod names, which the guest checks. The storage has no blobs of the registry's manifest any more, so that this
//! is another one, of archives that are not compressed: every machine with the same image gets the same.

use std::{
    io,
    path::PathBuf,
    process::{Command, Stdio},
};

use coffer_layers::{
    image::{Image, ImageError, Trust},
    layout::{BlobError, Layout},
    manifest::{Descriptor, MANIFEST, Manifest, ManifestError},
};
use thiserror::Error;

/// What stands before the name of such an image (containers-transports(5)).
pub const PREFIX: &str = "containers-storage:";
/// The tag in the index that skopeo writes; it is read once.
const TAG: &str = "image";
/// A layer that is not compressed.
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image of the storage was not had. One line.
#[derive(Debug, Error)]
pub enum StorageError {
    /// There is no skopeo, or it does not start.
    #[error("containers-storage: skopeo, which reads it: {0}: apt-get install skopeo")]
    Program(io::Error),
    /// It has failed.
    #[error("{PREFIX}{image}: {words}")]
    Refused {
        /// Which image.
        image: String,
        /// What skopeo said last.
        words: String,
    },
    /// The directory for its index.
    #[error("{0}: {1}")]
    Directory(PathBuf, io::Error),
    /// The layout.
    #[error(transparent)]
    Layout(#[from] BlobError),
    /// What skopeo has written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// Puts an image's blobs into a layout, whose index stays as it is.
///
/// # Errors
/// [`StorageError`].
pub fn pull(image: &str, layout: &Layout) -> Result<Descriptor, StorageError> {
    let directory = layout.path().join(format!(".pull-{}", std::process::id()));
    std::fs::create_dir(&directory).map_err(|e| StorageError::Directory(directory.clone(), e))?;
    let copied = copy(image, layout, &directory);
    let _ = std::fs::remove_dir_all(&directory);
    let Image { manifest, config, .. } = Image::load(layout, &copied?.digest, Trust::Pinned)?;
    let mut manifest = Manifest { media_type: Some(MANIFEST.into()), ..manifest };
    // skopeo 1.9 writes the registry's compression beside an archive that has none any more.
    for (layer, diff_id) in manifest.layers.iter_mut().zip(&config.rootfs.diff_ids) {
        if layer.digest == *diff_id {
            layer.media_type = TAR.into();
        }
    }
    let bytes = serde_json::to_vec(&manifest).map_err(ManifestError::from).map_err(ImageError::from)?;
    Ok(layout.put(MANIFEST, &bytes)?)
}

fn copy(image: &str, layout: &Layout, directory: &PathBuf) -> Result<Descriptor, StorageError> {
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--dest-oci-accept-uncompressed-layers", "--dest-shared-blob-dir"]);
    command.arg(layout.path().join("blobs")).arg(format!("{PREFIX}{image}"));
    let mut target = std::ffi::OsString::from("oci:");
    target.push(directory);
    target.push(format!(":{TAG}"));
    let output = command.arg(target).stdin(Stdio::null()).output().map_err(StorageError::Program)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("skopeo says nothing");
        // Its line begins with a time and a level.
        let words = last.split_once("msg=").map_or(last, |(_, words)| words);
        return Err(StorageError::Refused { image: image.to_owned(), words: words.to_owned() });
    }
    Ok(Layout::open(directory)?.tagged(Some(TAG))?)
}
