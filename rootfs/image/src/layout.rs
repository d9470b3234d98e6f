//! Where blobs lie: an OCI image layout (image-spec, image-layout.md) or whatever else serves them by digest.
//!
//! Owns: finding a blob and reading a small one whole, checked; who may change a layout beside whom. Does not own: what is in it.
//!
//! Two locks (flock(2)), on directories, since other tools ask what an unknown file in a layout is. The layout's own is shared by
//! all who fill it, and alone with who removes: blobs come before the index names them. That of `blobs` is held while the index changes.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::retry_on_intr,
};
use serde_json::json;
use thiserror::Error;

use crate::{
    digest::{Digest, Hasher},
    manifest::{Descriptor, Document, Index, MOST_MANIFESTS, ManifestError},
};

/// Largest manifest, index or configuration in bytes: registries take no more either.
pub const MOST_DOCUMENT: u64 = 4 << 20;
/// The annotation that holds a tag in `index.json`.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A blob could not be had.
#[derive(Debug, Error)]
pub enum BlobError {
    /// It is not there or cannot be read.
    #[error("blob {0}: {1}")]
    Read(Digest, io::Error),
    /// It is not what its name says.
    #[error("blob {want}: what came has digest {got}: it was changed on its way or on disk")]
    Digest {
        /// By its reference.
        want: Digest,
        /// By its bytes.
        got: Digest,
    },
    /// Too long for a document, or not as long as its reference says.
    #[error("blob {digest}: {got} bytes or more, want {want}")]
    Size {
        /// Which.
        digest: Digest,
        /// By its reference, or the bound.
        want: u64,
        /// That came.
        got: u64,
    },
    /// The layout itself.
    #[error("layout {0}: {1}")]
    Layout(PathBuf, String),
    /// The layout's index.
    #[error("layout {0}: {1}")]
    Index(PathBuf, ManifestError),
}

/// Serves blobs by digest. What comes is not trusted: readers check it.
pub trait Blobs: Sync {
    /// A blob's bytes, from the first.
    ///
    /// # Errors
    /// The source's.
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + Send>>;
}

/// A small blob, whole and checked against its digest, and its size where that is known.
///
/// # Errors
/// [`BlobError`].
pub fn document(blobs: &dyn Blobs, digest: &Digest, size: Option<u64>) -> Result<Vec<u8>, BlobError> {
    let most = size.unwrap_or(MOST_DOCUMENT);
    if most > MOST_DOCUMENT {
        return Err(BlobError::Size { digest: digest.clone(), want: MOST_DOCUMENT, got: most });
    }
    let read = |e| BlobError::Read(digest.clone(), e);
    let mut bytes = Vec::new();
    blobs.open(digest).map_err(read)?.take(most + 1).read_to_end(&mut bytes).map_err(read)?;
    let got = bytes.len() as u64;
    if got > most || size.is_some_and(|size| size != got) {
        return Err(BlobError::Size { digest: digest.clone(), want: most, got });
    }
    let is = digest.again(&bytes);
    if is != *digest {
        return Err(BlobError::Digest { want: digest.clone(), got: is });
    }
    Ok(bytes)
}

/// A directory in the OCI layout.
#[derive(Clone, Debug)]
pub struct Layout {
    path: PathBuf,
}

impl Layout {
    /// Opens a layout that exists.
    ///
    /// # Errors
    /// [`BlobError::Layout`] when its `oci-layout` is missing or of another version.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, BlobError> {
        let path = path.into();
        let bad = |why: String| BlobError::Layout(path.clone(), why);
        let text = std::fs::read_to_string(path.join("oci-layout"))
            .map_err(|e| bad(format!("not an OCI layout: oci-layout: {e}")))?;
        let version = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|v| v["imageLayoutVersion"].as_str().map(str::to_owned));
        match version.as_deref() {
            Some("1.0.0") => Ok(Self { path }),
            other => Err(bad(format!("imageLayoutVersion {other:?}, want 1.0.0"))),
        }
    }

    /// Opens a layout, or makes an empty one.
    ///
    /// # Errors
    /// [`BlobError::Layout`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, BlobError> {
        let path = path.into();
        if path.join("oci-layout").exists() {
            return Self::open(path);
        }
        let bad = |e: io::Error| BlobError::Layout(path.clone(), e.to_string());
        std::fs::create_dir_all(path.join("blobs/sha256")).map_err(bad)?;
        let made = Self { path: path.clone() };
        let _held = made.lock("blobs", FlockOperation::LockExclusive)?;
        // Another may have made it meanwhile, and have named an image in it. `oci-layout` comes last: with it the index is there.
        if !path.join("oci-layout").exists() {
            if !path.join("index.json").exists() {
                made.replace(
                    "index.json",
                    json!({"schemaVersion": 2, "manifests": []}).to_string().as_bytes(),
                )?;
            }
            made.replace("oci-layout", json!({"imageLayoutVersion": "1.0.0"}).to_string().as_bytes())?;
        }
        Self::open(path)
    }

    /// Holds the layout as one of those that fill it, or that read it twice: nobody removes blobs meanwhile.
    ///
    /// # Errors
    /// [`BlobError::Layout`].
    pub fn hold(&self) -> Result<Held, BlobError> {
        self.lock("", FlockOperation::LockShared)
    }

    /// Holds the layout alone, as who removes blobs does. `waits` is called where others hold it.
    ///
    /// # Errors
    /// [`BlobError::Layout`].
    pub fn hold_alone(&self, waits: impl FnOnce()) -> Result<Held, BlobError> {
        self.lock("", FlockOperation::NonBlockingLockExclusive).or_else(|_| {
            waits();
            self.lock("", FlockOperation::LockExclusive)
        })
    }

    fn lock(&self, folder: &str, how: FlockOperation) -> Result<Held, BlobError> {
        let bad = |e: io::Error| BlobError::Layout(self.path.clone(), format!("lock: {e}"));
        let directory = File::open(self.path.join(folder)).map_err(bad)?;
        retry_on_intr(|| flock(&directory, how)).map_err(|e| bad(e.into()))?;
        Ok(Held(directory))
    }

    /// Writes a file of the layout in one step. Under the lock of `blobs`, which keeps the temporary name one's own.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), BlobError> {
        let bad = |e: io::Error| BlobError::Layout(self.path.clone(), e.to_string());
        let temporary = self.path.join(format!(".{name}.partial"));
        std::fs::write(&temporary, bytes).map_err(bad)?;
        std::fs::rename(temporary, self.path.join(name)).map_err(bad)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its index.
    ///
    /// # Errors
    /// [`BlobError`].
    pub fn index(&self) -> Result<Index, BlobError> {
        let bad = |why: String| BlobError::Layout(self.path.clone(), why);
        let mut bytes = Vec::new();
        File::open(self.path.join("index.json"))
            .and_then(|file| file.take(MOST_DOCUMENT + 1).read_to_end(&mut bytes))
            .map_err(|e| bad(format!("index.json: {e}")))?;
        if bytes.len() as u64 > MOST_DOCUMENT {
            return Err(bad(format!("index.json has more than {MOST_DOCUMENT} bytes")));
        }
        match Document::parse(&bytes, None) {
            Ok(Document::Index(index)) => Ok(index),
            Ok(Document::Manifest(_)) => Err(bad("index.json is a manifest".into())),
            Err(e) => Err(BlobError::Index(self.path.clone(), e)),
        }
    }

    /// The manifest or index that a tag names, or the only one there is.
    ///
    /// # Errors
    /// [`BlobError::Layout`], listing the tags that exist.
    pub fn tagged(&self, tag: Option<&str>) -> Result<Descriptor, BlobError> {
        let index = self.index()?;
        let name = |d: &Descriptor| d.annotations.get(REF_NAME).cloned();
        let found = match tag {
            Some(tag) => index.manifests.iter().find(|d| name(d).as_deref() == Some(tag)),
            None if index.manifests.len() == 1 => index.manifests.first(),
            None => None,
        };
        found.cloned().ok_or_else(|| {
            let tags: Vec<_> = index.manifests.iter().filter_map(name).take(16).collect();
            let wanted = tag.map_or("no tag given".to_owned(), |tag| format!("no tag {tag:?}"));
            BlobError::Layout(self.path.clone(), format!("{wanted}: it has {}", tags.join(", ")))
        })
    }

    /// Where a blob's file is, or would be.
    #[must_use]
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    /// Whether a blob's file is there.
    #[must_use]
    pub fn has(&self, digest: &Digest) -> bool {
        self.blob(digest).is_file()
    }

    /// Whether a blob's file is there and has its length.
    #[must_use]
    pub fn has_sized(&self, digest: &Digest, size: u64) -> bool {
        std::fs::symlink_metadata(self.blob(digest)).is_ok_and(|m| m.is_file() && m.len() == size)
    }

    /// Stores a document and describes it.
    ///
    /// # Errors
    /// [`BlobError`].
    pub fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, BlobError> {
        let mut writer = self.writer()?;
        let failed = |e| BlobError::Read(Digest::sha256(bytes), e);
        writer.write_all(bytes).map_err(failed)?;
        let (digest, size) = writer.finish().map_err(failed)?;
        Ok(Descriptor {
            media_type: media_type.into(),
            digest,
            size,
            urls: Vec::new(),
            annotations: Default::default(),
            platform: None,
            artifact_type: None,
        })
    }

    /// A blob whose digest is known when it has been written.
    ///
    /// # Errors
    /// [`BlobError::Layout`].
    pub fn writer(&self) -> Result<BlobWriter, BlobError> {
        let folder = self.path.join("blobs/sha256");
        let bad = |e: io::Error| BlobError::Layout(self.path.clone(), e.to_string());
        std::fs::create_dir_all(&folder).map_err(bad)?;
        let temporary = folder.join(format!(".partial-{}-{:p}", std::process::id(), &folder));
        let file = File::create(&temporary).map_err(bad)?;
        Ok(BlobWriter { folder, temporary, file, hasher: Hasher::like(&Digest::Sha256([0; 32])), size: 0 })
    }

    /// Points a tag at a manifest; what the tag named before stays as a blob.
    ///
    /// # Errors
    /// [`BlobError`].
    pub fn tag(&self, mut descriptor: Descriptor, tag: &str) -> Result<(), BlobError> {
        self.edit(|manifests| {
            manifests.retain(|d| d.annotations.get(REF_NAME).map(String::as_str) != Some(tag));
            descriptor.annotations.insert(REF_NAME.into(), tag.into());
            manifests.push(descriptor);
        })
    }

    /// Changes what the index names, in one step, and nobody else's change is lost.
    ///
    /// # Errors
    /// [`BlobError`]; then the index is as it was.
    pub fn edit(&self, change: impl FnOnce(&mut Vec<Descriptor>)) -> Result<(), BlobError> {
        let _held = self.lock("blobs", FlockOperation::LockExclusive)?;
        let mut index = self.index()?;
        change(&mut index.manifests);
        let bad = |why: String| BlobError::Layout(self.path.clone(), why);
        // It could not be read any more.
        if index.manifests.len() > MOST_MANIFESTS {
            return Err(bad(format!("its index would name more than {MOST_MANIFESTS} images")));
        }
        let text = serde_json::to_vec(&index).map_err(|e| bad(e.to_string()))?;
        if text.len() as u64 > MOST_DOCUMENT {
            return Err(bad(format!("index.json would have more than {MOST_DOCUMENT} bytes")));
        }
        self.replace("index.json", &text)
    }
}

/// A lock on a layout, until it is dropped.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "the lock goes with it")] File);

impl Blobs for Layout {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + Send>> {
        open(&self.blob(digest))
    }
}

/// A layout's `blobs` directory alone: what a pod's guest sees of it.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Blobs for Folder {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + Send>> {
        open(&self.0.join(digest.algorithm()).join(digest.hex()))
    }
}

/// Whoever made the folder could have put a pipe or a link there; neither is followed or waited for.
fn open(path: &Path) -> io::Result<Box<dyn Read + Send>> {
    let flags = rustix::fs::OFlags::NOFOLLOW.union(rustix::fs::OFlags::NONBLOCK);
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(Box::new(file))
}

/// A blob being written; its file gets its name in [`BlobWriter::finish`].
pub struct BlobWriter {
    folder: PathBuf,
    temporary: PathBuf,
    file: File,
    hasher: Hasher,
    size: u64,
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl BlobWriter {
    /// Names the blob; returns its digest and size in bytes.
    ///
    /// # Errors
    /// The file system's.
    pub fn finish(self) -> io::Result<(Digest, u64)> {
        let digest = self.hasher.clone().end();
        std::fs::rename(&self.temporary, self.folder.join(digest.hex()))?;
        Ok((digest, self.size))
    }
}

impl BlobWriter {
    /// Names the blob if it is this one.
    ///
    /// # Errors
    /// [`BlobError::Digest`], and nothing is left of what was written; the file system's.
    pub fn finish_as(self, want: &Digest) -> Result<(), BlobError> {
        let got = self.hasher.clone().end();
        if got != *want {
            return Err(BlobError::Digest { want: want.clone(), got });
        }
        self.finish().map(drop).map_err(|e| BlobError::Read(want.clone(), e))
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // Gone already after finish().
        let _ = std::fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path().join("l")).unwrap();
        let d = layout.put("text/plain", b"hello").unwrap();
        assert_eq!(document(&layout, &d.digest, Some(5)).unwrap(), b"hello");
        assert!(matches!(document(&layout, &d.digest, Some(4)), Err(BlobError::Size { .. })));
        assert!(matches!(document(&layout, &d.digest, Some(1 << 40)), Err(BlobError::Size { .. })));
        assert!(layout.has_sized(&d.digest, 5) && !layout.has_sized(&d.digest, 4));
        let mut writer = layout.writer().unwrap();
        writer.write_all(b"other").unwrap();
        assert!(matches!(writer.finish_as(&d.digest), Err(BlobError::Digest { .. })));
        assert_eq!(std::fs::read_dir(layout.path().join("blobs/sha256")).unwrap().count(), 1);
        std::fs::write(layout.blob(&d.digest), b"hellO").unwrap();
        assert!(matches!(document(&layout, &d.digest, None), Err(BlobError::Digest { .. })));
        std::fs::remove_file(layout.blob(&d.digest)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", layout.blob(&d.digest)).unwrap();
        assert!(matches!(document(&layout, &d.digest, None), Err(BlobError::Read(..))));
    }

    #[test]
    fn tags_are_found_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let message = layout.tagged(None).unwrap_err().to_string();
        assert!(message.contains("no tag given"), "{message}");
        for text in [b"1", b"2"] {
            layout.tag(layout.put("x", text).unwrap(), "latest").unwrap();
        }
        assert_eq!(layout.tagged(None).unwrap().digest, Digest::sha256(b"2"));
        assert_eq!(layout.tagged(Some("latest")).unwrap().digest, Digest::sha256(b"2"));
        let message = layout.tagged(Some("v1")).unwrap_err().to_string();
        assert!(message.ends_with("no tag \"v1\": it has latest"), "{message}");
    }

    #[test]
    fn tags_of_many_at_once_are_all_there() {
        let dir = tempfile::tempdir().unwrap();
        let tags: Vec<_> = (0..16).map(|number| format!("t{number}")).collect();
        std::thread::scope(|scope| {
            for tag in &tags {
                let dir = &dir;
                // Each makes the layout, too.
                scope.spawn(move || {
                    let layout = Layout::create(dir.path()).unwrap();
                    let _held = layout.hold().unwrap();
                    let described = Descriptor {
                        media_type: "x".into(),
                        digest: Digest::sha256(tag.as_bytes()),
                        size: 1,
                        urls: Vec::new(),
                        annotations: Default::default(),
                        platform: None,
                        artifact_type: None,
                    };
                    layout.tag(described, tag).unwrap();
                });
            }
        });
        let layout = Layout::open(dir.path()).unwrap();
        for tag in &tags {
            layout.tagged(Some(tag)).unwrap();
        }
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with('.')));
    }

    #[test]
    fn an_index_does_not_grow_beyond_what_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let one = layout.put("x", b"1").unwrap();
        let many = |count: usize| layout.edit(|manifests| *manifests = vec![one.clone(); count]);
        many(MOST_MANIFESTS).unwrap();
        let said = many(MOST_MANIFESTS + 1).unwrap_err().to_string();
        assert!(said.contains("more than 1024 images"), "{said}");
        assert_eq!(layout.index().unwrap().manifests.len(), MOST_MANIFESTS);
    }
}
