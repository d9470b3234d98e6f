//! Simple signing: an OpenPGP message that says which image it is for. What `skopeo copy --sign-by` and podman make, and `signedBy` asks for.
//!
//! Owns: where such signatures lie, and what a message says (containers/image, docs/containers-signature.5.md). Does not own: OpenPGP.
//!
//! Files are numbered from `signature-1`, as in a lookaside server. Beside a layout's `blobs` they lie in `signatures/sha256=HEX/`, or in
//! `signatures/REPOSITORY@sha256=HEX/`, where skopeo puts them when registries.d names `file://LAYOUT/signatures` for a registry.

use std::{
    fs::OpenOptions,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustix::fs::OFlags;

use super::{Name, sigstore::SignatureError};
use crate::{
    digest::Digest,
    layout::Layout,
    openpgp::{self, Ring},
    policy::sigstore,
};

const KIND: &str = "atomic container signature";
/// Most signatures of an image that are looked at.
pub const MOST_SIGNATURES: usize = 32;
/// Largest of them in bytes. They have some 700.
pub const MOST_SIGNATURE: usize = 16 << 10;

/// One signed message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature(Vec<u8>);

impl Signature {
    /// From a file's bytes.
    #[must_use]
    pub fn new(message: Vec<u8>) -> Self {
        Self(message)
    }

    /// As the host shows it to the guest: in base64.
    #[must_use]
    pub fn to_text(&self) -> String {
        STANDARD.encode(&self.0)
    }

    /// Back from [`Self::to_text`]. Of what is not base64 nothing is left, which is no signature: the others may hold.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        Self(STANDARD.decode(text).unwrap_or_default())
    }

    /// Whether it is by a key of these rings that may sign at `now` (seconds since 1970), for one of these digests; gives the reference
    /// that it names. What it says is read only after the signature held.
    ///
    /// # Errors
    /// [`SignatureError`].
    pub fn check(&self, rings: &[Ring], digests: &[Digest], now: u64) -> Result<String, SignatureError> {
        let payload = openpgp::check(&self.0, rings, now)?;
        reference(&payload, digests)
    }
}

/// The reference that a payload names, if it is for one of these digests. Only for bytes whose signature held.
///
/// # Errors
/// [`SignatureError`].
pub fn reference(payload: &[u8], digests: &[Digest]) -> Result<String, SignatureError> {
    sigstore::named(payload, KIND, digests)
}

/// An image's signatures beside a layout's blobs, at most [`MOST_SIGNATURES`]. `name` is what the image is called in a registry.
///
/// # Errors
/// [`SignatureError::File`].
pub fn find(
    layout: &Layout,
    name: Option<&Name>,
    digests: &[Digest],
) -> Result<Vec<Signature>, SignatureError> {
    let mut all = Vec::new();
    for digest in digests {
        let folder = format!("{}={}", digest.algorithm(), digest.hex());
        let with_name = name.and_then(|name| name.repository().split_once('/'));
        let with_name = with_name.map(|(_, path)| format!("{path}@{folder}"));
        for folder in [Some(folder), with_name].into_iter().flatten() {
            read_all(&layout.path().join("signatures").join(folder), &mut all)?;
        }
    }
    Ok(all)
}

/// `signature-1` and so on, until one is missing.
fn read_all(folder: &Path, all: &mut Vec<Signature>) -> Result<(), SignatureError> {
    for number in 1.. {
        let path = folder.join(format!("signature-{number}"));
        match read(&path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => break,
            Err(e) => return Err(SignatureError::File(path, e)),
            Ok(_) if all.len() == MOST_SIGNATURES => {
                let why = format!("more than {MOST_SIGNATURES} signatures of one image");
                return Err(SignatureError::File(path, io::Error::other(why)));
            }
            Ok(bytes) => all.push(Signature(bytes)),
        }
    }
    Ok(())
}

fn read(path: &PathBuf) -> io::Result<Vec<u8>> {
    // Neither a pipe nor a device is waited for.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MOST_SIGNATURE as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MOST_SIGNATURE {
        return Err(io::Error::other(format!("more than {MOST_SIGNATURE} bytes")));
    }
    Ok(bytes)
}
