//! Images of a layout as a whole: which blobs each needs, and removing one without what others need.
//!
//! Owns: what an image reaches (index, manifests, configuration, layers), whose a signature is, the order of a removal. Does not own:
//! who holds the layout meanwhile ([`Layout::hold_alone`]), what the user calls an image.
//!
//! An image is what the index names, and also a manifest among the blobs that nothing names: a pod names an image by its digest alone,
//! and what was pulled for that by older versions, or lost its tag to a newer image, is in no index. Only blobs of what is removed go,
//! so that those of a copy that another tool (which knows no lock) has not finished stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::{
    digest::Digest,
    layout::{BlobError, Layout, MOST_DOCUMENT, REF_NAME, document},
    manifest::{Descriptor, Document, Manifest, ManifestError},
    policy::sigstore,
};

/// How deep `signatures` is looked through: a repository's path has fewer parts.
const MOST_DEPTH: usize = 64;

/// Nothing was removed, but for [`RemovalError::Gone`]. One line.
#[derive(Debug, Error)]
pub enum RemovalError {
    /// The layout, or a document that cannot be read whole: what it needs is not known.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A document that is neither a manifest nor an index.
    #[error("blob {0}: {1}: what it needs is not known")]
    Document(Digest, ManifestError),
    /// A file or a directory.
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    /// The index names the image no more, but something of it is left.
    #[error("{0}: {1}: no longer in the index: remove it again by its digest")]
    Gone(PathBuf, io::Error),
}

/// One name of an image, or a manifest that has none.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The manifest's or index's.
    pub digest: Digest,
    /// In the index.
    pub tag: Option<String>,
    /// The index names it; else it is only among the blobs.
    pub listed: bool,
    /// What it signs, where it is a manifest of signatures.
    signs: Vec<Digest>,
}

/// What a layout holds, read once.
#[derive(Debug)]
pub struct Contents {
    layout: Layout,
    /// All names, then what has none.
    entries: Vec<Entry>,
    documents: BTreeMap<Digest, Document>,
    /// Directories of simple signatures, each with its image's `sha256=HEX`.
    folders: Vec<(PathBuf, String)>,
}

/// What a removal takes away.
#[derive(Debug, Default)]
pub struct Removal {
    /// Names in the index, its signatures' among them.
    pub tags: Vec<String>,
    /// Images that are gone, and manifests of signatures.
    pub images: Vec<Digest>,
    /// Blobs, those that others name from within last.
    blobs: Vec<Digest>,
    folders: Vec<PathBuf>,
    entries: Vec<(Digest, Option<String>)>,
    /// How many blobs.
    pub count: usize,
    /// Their bytes, and those of the signatures beside them.
    pub bytes: u64,
}

impl Contents {
    /// Reads all documents of a layout.
    ///
    /// # Errors
    /// [`RemovalError`], where what an image needs cannot be found out.
    pub fn read(layout: &Layout) -> Result<Self, RemovalError> {
        let index = layout.index()?;
        let mut documents = BTreeMap::new();
        for digest in small_blobs(layout)? {
            // What is no document, or changed on disk, is nobody's image; where the index names it that is said below.
            if let Ok(Some(document)) = parsed(layout, &digest) {
                documents.insert(digest, document);
            }
        }
        let mut contents =
            Self { layout: layout.clone(), entries: Vec::new(), documents, folders: Vec::new() };
        for descriptor in &index.manifests {
            contents.check(&descriptor.digest)?;
        }
        let within: BTreeSet<_> = contents.documents.values().flat_map(within).cloned().collect();
        let named: BTreeSet<_> = index.manifests.iter().map(|d| &d.digest).collect();
        let alone = |digest: &&Digest| !named.contains(digest) && !within.contains(digest);
        let unlisted: Vec<Digest> = contents.documents.keys().filter(alone).cloned().collect();
        let mut entries = Vec::new();
        for descriptor in &index.manifests {
            entries.push(contents.entry(&descriptor.digest, Some(descriptor)));
        }
        for digest in &unlisted {
            contents.check(digest)?;
            entries.push(contents.entry(digest, None));
        }
        contents.entries = entries;
        folders(&layout.path().join("signatures"), MOST_DEPTH, &mut contents.folders)?;
        Ok(contents)
    }

    /// Names, and manifests without one. Those of signatures are left out where their image is there.
    pub fn images(&self) -> impl Iterator<Item = &Entry> {
        let is_there = |entry: &&Entry| !entry.signs.iter().any(|digest| self.documents.contains_key(digest));
        self.entries.iter().filter(is_there)
    }

    /// All of [`Self::images`], and the signatures.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Bytes of all blobs that an image needs and the layout has.
    ///
    /// # Errors
    /// [`RemovalError`].
    pub fn bytes(&self, digest: &Digest) -> Result<u64, RemovalError> {
        self.reach(digest).iter().map(|digest| self.size(digest)).sum()
    }

    /// What goes with these entries.
    ///
    /// # Errors
    /// [`RemovalError`].
    pub fn without(&self, goes: impl Fn(&Entry) -> bool) -> Result<Removal, RemovalError> {
        let mut gone: Vec<bool> = self.entries.iter().map(goes).collect();
        let reach = |wanted: &dyn Fn(usize, &Entry) -> bool| -> BTreeSet<Digest> {
            let entries = self.entries.iter().enumerate().filter(|(at, entry)| wanted(*at, entry));
            entries.flat_map(|(_, entry)| self.reach(&entry.digest)).collect()
        };
        // A signature keeps no image.
        let kept = reach(&|at, entry| !gone[at] && entry.signs.is_empty());
        let away = &reach(&|at, _| gone[at]) - &kept;
        for (at, entry) in self.entries.iter().enumerate() {
            let other = |digest: &Digest| self.documents.contains_key(digest) && !away.contains(digest);
            gone[at] |=
                entry.signs.iter().any(|digest| away.contains(digest)) && !entry.signs.iter().any(other);
        }
        let kept = reach(&|at, _| !gone[at]);
        let mut blobs: Vec<_> = (&reach(&|at, _| gone[at]) - &kept).into_iter().collect();
        // What it is found by goes last: a removal that is cut off can be asked for again.
        blobs.sort_by_key(|digest| match self.documents.get(digest) {
            None => 0,
            Some(Document::Manifest(_)) => 1,
            Some(Document::Index(_)) => 2,
        });
        let mut removal = Removal::default();
        for entry in self.entries.iter().zip(&gone).filter_map(|(entry, gone)| gone.then_some(entry)) {
            if entry.listed {
                removal.entries.push((entry.digest.clone(), entry.tag.clone()));
            }
            removal.tags.extend(entry.tag.clone());
            if !kept.contains(&entry.digest) && !removal.images.contains(&entry.digest) {
                removal.images.push(entry.digest.clone());
            }
        }
        for blob in &blobs {
            removal.bytes += self.size(blob)?;
            removal.count += usize::from(self.layout.has(blob));
        }
        let names: BTreeSet<_> = blobs.iter().map(folder).collect();
        for (path, _) in self.folders.iter().filter(|(_, of)| names.contains(of)) {
            removal.bytes += files(path)?;
            removal.folders.push(path.clone());
        }
        removal.blobs = blobs;
        Ok(removal)
    }

    /// Does it: the index first, so that it never names what is not there.
    ///
    /// # Errors
    /// [`RemovalError`].
    pub fn remove(&self, removal: &Removal) -> Result<(), RemovalError> {
        if !removal.entries.is_empty() {
            let tag = |d: &Descriptor| d.annotations.get(REF_NAME).cloned();
            self.layout.edit(|manifests| {
                manifests.retain(|d| !removal.entries.contains(&(d.digest.clone(), tag(d))))
            })?;
        }
        let done = |path: PathBuf, result: io::Result<()>| match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RemovalError::Gone(path, e)),
            _ => Ok(()),
        };
        for folder in &removal.folders {
            done(folder.clone(), fs::remove_dir_all(folder))?;
        }
        for blob in &removal.blobs {
            let path = self.layout.blob(blob);
            let removed = fs::remove_file(&path);
            done(path, removed)?;
        }
        Ok(())
    }

    /// What the image names from within is known as far as it is there: of an index a pull brings this machine's manifest alone.
    fn check(&self, digest: &Digest) -> Result<(), RemovalError> {
        let mut left = vec![digest];
        while let Some(digest) = left.pop() {
            match self.documents.get(digest) {
                Some(document) => left.extend(within(document)),
                None => parsed(&self.layout, digest).map(drop)?,
            }
        }
        Ok(())
    }

    fn reach(&self, digest: &Digest) -> BTreeSet<Digest> {
        let (mut all, mut left) = (BTreeSet::new(), vec![digest]);
        while let Some(digest) = left.pop() {
            if !all.insert(digest.clone()) {
                continue;
            }
            match self.documents.get(digest) {
                Some(Document::Manifest(manifest)) => all.extend(parts(manifest).map(|d| d.digest.clone())),
                Some(index) => left.extend(within(index)),
                None => {}
            }
        }
        all
    }

    fn entry(&self, digest: &Digest, descriptor: Option<&Descriptor>) -> Entry {
        let tag = descriptor.and_then(|d| d.annotations.get(REF_NAME)).cloned();
        let signs = match &tag {
            Some(tag) => sigstore::signed(tag).into_iter().collect(),
            // `cosign save` says it in the payloads alone, as does what `coffer image sign` has replaced.
            None => match self.documents.get(digest) {
                Some(Document::Manifest(manifest)) => sigstore::said(&self.layout, manifest),
                _ => Vec::new(),
            },
        };
        Entry { digest: digest.clone(), tag, listed: descriptor.is_some(), signs }
    }

    fn size(&self, digest: &Digest) -> Result<u64, RemovalError> {
        size(&self.layout.blob(digest))
    }
}

/// A document that is there; `None` where it is not.
fn parsed(layout: &Layout, digest: &Digest) -> Result<Option<Document>, RemovalError> {
    match document(layout, digest, None) {
        Err(BlobError::Read(_, e)) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
        Ok(bytes) => {
            Document::parse(&bytes, None).map(Some).map_err(|e| RemovalError::Document(digest.clone(), e))
        }
    }
}

/// The documents that a document names.
fn within(document: &Document) -> impl Iterator<Item = &Digest> {
    let manifests = match document {
        Document::Index(index) => index.manifests.as_slice(),
        Document::Manifest(_) => &[],
    };
    manifests.iter().map(|d| &d.digest)
}

fn parts(manifest: &Manifest) -> impl Iterator<Item = &Descriptor> {
    std::iter::once(&manifest.config).chain(&manifest.layers)
}

/// Blobs that may be documents.
fn small_blobs(layout: &Layout) -> Result<Vec<Digest>, RemovalError> {
    let mut found = Vec::new();
    for algorithm in ["sha256", "sha512"] {
        let folder = layout.path().join("blobs").join(algorithm);
        for path in list(&folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Ok(digest) = format!("{algorithm}:{name}").parse::<Digest>() else { continue };
            if size(&path)? <= MOST_DOCUMENT && begins(&path)? {
                found.push(digest);
            }
        }
    }
    Ok(found)
}

/// Whether a file may be a JSON object, so that small layers are not read whole. A link is none, as for who opens a blob.
fn begins(path: &Path) -> Result<bool, RemovalError> {
    let failed = |e| RemovalError::File(path.to_owned(), e);
    if !fs::symlink_metadata(path).map_err(failed)?.is_file() {
        return Ok(false);
    }
    let mut start = [0; 64];
    let read =
        fs::File::open(path).and_then(|mut file| io::Read::read(&mut file, &mut start)).map_err(failed)?;
    let first = start[..read].iter().find(|byte| !byte.is_ascii_whitespace());
    // Sixty-four spaces may stand before one.
    Ok(first.is_none_or(|byte| *byte == b'{'))
}

/// A directory's entries, in order; none where it is missing.
fn list(folder: &Path) -> Result<Vec<PathBuf>, RemovalError> {
    let failed = |e| RemovalError::File(folder.to_owned(), e);
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut paths: Vec<_> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>().map_err(failed)?;
    paths.sort();
    Ok(paths)
}

fn size(path: &Path) -> Result<u64, RemovalError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
        metadata => Ok(metadata.map_err(|e| RemovalError::File(path.to_owned(), e))?.len()),
    }
}

/// Bytes of a directory's files.
fn files(folder: &Path) -> Result<u64, RemovalError> {
    list(folder)?.iter().map(|path| size(path)).sum()
}

/// How a directory of simple signatures names its image.
fn folder(digest: &Digest) -> String {
    format!("{}={}", digest.algorithm(), digest.hex())
}

/// Finds `sha256=HEX` and `REPOSITORY@sha256=HEX`. Links are not followed: what they lead to is another's.
fn folders(place: &Path, deep: usize, found: &mut Vec<(PathBuf, String)>) -> Result<(), RemovalError> {
    for path in list(place)? {
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let of = name.rsplit_once('@').map_or(&*name, |(_, of)| of).to_owned();
        if of.contains('=') {
            found.push((path, of));
        } else if deep > 0 {
            folders(&path, deep - 1, found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
