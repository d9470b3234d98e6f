//! `coffer image list` and `coffer image remove`: what a layout keeps.
//!
//! Owns: how an image is named there, what is printed. Does not own: which blobs go, which is coffer-layers' removal.
//!
//! As with podman's rmi, a name of several goes alone, and the image with its last; a digest means all of its names. In the shared layout a
//! name has its digest within (`REGISTRY/REPOSITORY:TAG@sha256:…`), since pods name images so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use coffer_layers::{
    digest::Digest,
    layout::Layout,
    policy::Name,
    reference::Reference,
    removal::{Contents, Entry},
};

use super::{Error, arguments::Arguments, print};
use crate::{image::SHARED, storage};

/// What a word names.
#[derive(Debug, PartialEq, Eq)]
enum Which {
    /// A name in the index, whatever it names, or only where it names this.
    Tag(String, Option<Digest>),
    /// A name of the shared layout without the digest at its end.
    Undigested(String),
    /// All names, or a manifest that has none.
    Digest(Digest),
}

/// An image's layout and its name there.
fn parse(text: &str) -> Result<(PathBuf, Which), Error> {
    let shared = |which| Ok((PathBuf::from(SHARED), which));
    if text.starts_with("docker://") {
        let name = Name::of_image(text)?;
        let digest = name.digest().cloned();
        let text = name.to_string();
        return shared(digest.map_or(Which::Undigested(text.clone()), |d| Which::Tag(text, Some(d))));
    }
    if text.starts_with(storage::PREFIX) {
        let digest = text.rsplit_once('@').and_then(|(_, digest)| digest.parse().ok());
        let tag = text.to_owned();
        return shared(digest.map_or(Which::Undigested(tag.clone()), |d| Which::Tag(tag, Some(d))));
    }
    if text.starts_with("sha256:") || text.starts_with("sha512:") {
        return shared(Which::Digest(text.parse().map_err(coffer_layers::reference::ReferenceError::from)?));
    }
    let reference: Reference = text.parse()?;
    let which = match (reference.tag, reference.digest) {
        (Some(tag), digest) => Which::Tag(tag, digest),
        (None, Some(digest)) => Which::Digest(digest),
        (None, None) => {
            let want = "remove: want LAYOUT:TAG, LAYOUT@sha256:…, docker://NAME or sha256:…";
            return Err(Error::Usage(format!("{want}, not {text:?}")));
        }
    };
    Ok((reference.path, which))
}

/// The entries that a word means.
fn find<'a>(contents: &'a Contents, which: &Which, word: &str, path: &Path) -> Result<Vec<&'a Entry>, Error> {
    let all = contents.entries();
    let found: Vec<_> = match which {
        Which::Digest(digest) => all.iter().filter(|entry| entry.digest == *digest).collect(),
        Which::Tag(tag, digest) => {
            let here = |entry: &&Entry| digest.as_ref().is_none_or(|digest| entry.digest == *digest);
            let named = all.iter().filter(|entry| entry.tag.as_ref() == Some(tag)).filter(here);
            let found: Vec<_> = named.collect();
            // As it was printed: the tag is a newer image's now, or an older version gave it none.
            let bare = |entry: &&Entry| digest.as_ref() == Some(&entry.digest) && !entry.listed;
            if found.is_empty() { all.iter().filter(bare).collect() } else { found }
        }
        Which::Undigested(name) => {
            let is = |tag: &str| tag.rsplit_once('@').is_some_and(|(of, _)| of == name);
            let found: Vec<_> = all.iter().filter(|entry| entry.tag.as_deref().is_some_and(is)).collect();
            if found.len() > 1 {
                let tags: Vec<_> = found.iter().map(|entry| shown(path, entry)).take(16).collect();
                let why = format!("remove: {word} is several, name one: {}", tags.join(", "));
                return Err(Error::Usage(why));
            }
            found
        }
    };
    if found.is_empty() { Err(Error::Unknown(word.to_owned(), path.to_owned())) } else { Ok(found) }
}

/// A name as `remove` takes it back, and a pod with the digest.
fn shown(path: &Path, entry: &Entry) -> String {
    match &entry.tag {
        Some(tag) => shown_tag(path, tag),
        None => format!("{}@{}", path.display(), entry.digest),
    }
}

fn shown_tag(path: &Path, tag: &str) -> String {
    if path != Path::new(SHARED) || !tag.contains('@') {
        return format!("{}:{tag}", path.display());
    }
    if tag.starts_with(storage::PREFIX) { tag.to_owned() } else { format!("docker://{tag}") }
}

/// `coffer image list [LAYOUT]`.
pub(super) fn list(arguments: &Arguments) -> Result<(), Error> {
    let place: Reference = arguments.words().first().map_or(SHARED, String::as_str).parse()?;
    if let Some(more) = place.tag.as_ref().map(ToString::to_string).or(place.digest.map(|d| d.to_string())) {
        return Err(Error::Usage(format!("list: want a LAYOUT, without {more}")));
    }
    print(&listed(&place.path)?)
}

fn listed(path: &Path) -> Result<String, Error> {
    // Nothing has come yet.
    let empty = match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    };
    if empty {
        return Ok(String::new());
    }
    let layout = Layout::open(path)?;
    let _held = layout.hold()?;
    let contents = Contents::read(&layout)?;
    let mut images: BTreeMap<&Digest, Vec<String>> = BTreeMap::new();
    for entry in contents.images() {
        images.entry(&entry.digest).or_default().push(shown(path, entry));
    }
    let mut text = String::new();
    for (digest, names) in images {
        let frees = contents.without(|entry| entry.digest == *digest)?.bytes;
        text += &format!("{digest} {} {frees} {}\n", contents.bytes(digest)?, names.join(" "));
    }
    Ok(text)
}

/// `coffer image remove IMAGE...`.
pub(super) fn remove(arguments: &Arguments) -> Result<(), Error> {
    arguments.word(0, "IMAGE")?;
    let mut layouts: BTreeMap<PathBuf, Vec<(&str, Which)>> = BTreeMap::new();
    for word in arguments.words() {
        let (path, which) = parse(word)?;
        layouts.entry(path).or_default().push((word, which));
    }
    for (path, wanted) in layouts {
        print(&removed(&path, &wanted)?)?;
    }
    Ok(())
}

/// All of these of one layout, or none.
fn removed(path: &Path, wanted: &[(&str, Which)]) -> Result<String, Error> {
    let layout = Layout::open(path)?;
    let _alone = layout.hold_alone(|| {
        eprintln!("image: remove: waits for who fills or reads {}", path.display());
    })?;
    let contents = Contents::read(&layout)?;
    let mut goes = BTreeSet::new();
    for (word, which) in wanted {
        goes.extend(find(&contents, which, word, path)?.iter().map(|entry| (&entry.digest, &entry.tag)));
    }
    let removal = contents.without(|entry| goes.contains(&(&entry.digest, &entry.tag)))?;
    contents.remove(&removal)?;
    let mut text = String::new();
    removal.tags.iter().for_each(|tag| text += &format!("untagged  {}\n", shown_tag(path, tag)));
    removal.images.iter().for_each(|image| text += &format!("deleted   {image}\n"));
    text += &format!("freed     {} bytes, {} blobs\n", removal.bytes, removal.count);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_layers::manifest::{Descriptor, MANIFEST};

    fn image(layout: &Layout, text: &str) -> Descriptor {
        let layer = layout.put("x", text.as_bytes()).unwrap();
        let config = layout.put("x", b"{}").unwrap();
        let text = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        layout.put(MANIFEST, text.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn an_image_is_named_as_pull_prints_it() {
        let d = Digest::sha256(b"");
        let shared = PathBuf::from(SHARED);
        for (text, path, which) in [
            (format!("docker://r.io/a:1@{d}"), &shared, Which::Tag(format!("r.io/a:1@{d}"), Some(d.clone()))),
            ("docker://r.io/a".into(), &shared, Which::Undigested("r.io/a:latest".into())),
            ("containers-storage:app".into(), &shared, Which::Undigested("containers-storage:app".into())),
            (d.to_string(), &shared, Which::Digest(d.clone())),
            (format!("{SHARED}@{d}"), &shared, Which::Digest(d.clone())),
            ("/l:tag".into(), &"/l".into(), Which::Tag("tag".into(), None)),
            (format!("oci:/l:tag@{d}"), &"/l".into(), Which::Tag("tag".into(), Some(d.clone()))),
        ] {
            assert_eq!(parse(&text).unwrap(), (path.clone(), which), "{text}");
        }
        for bad in ["/l", "sha256:00", "docker://R io"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_the_shared_layout_have_their_digest() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let (one, two, bare) = (image(&layout, "one"), image(&layout, "two"), image(&layout, "bare").digest);
        for image in [&one, &two] {
            layout.tag(image.clone(), &format!("r.io/a:1@{}", image.digest)).unwrap();
        }
        layout.tag(one.clone(), &format!("r.io/b:1@{}", one.digest)).unwrap();
        let contents = Contents::read(&layout).unwrap();
        let found = |text: &str| {
            find(&contents, &parse(text).unwrap().1, text, Path::new(SHARED))
                .map(|found| found.iter().map(|entry| shown(Path::new(SHARED), entry)).collect::<Vec<_>>())
        };
        let named = format!("docker://r.io/a:1@{}", one.digest);
        assert_eq!(found(&named).unwrap(), [named]);
        assert_eq!(found(&one.digest.to_string()).unwrap().len(), 2);
        assert_eq!(found("docker://r.io/b:1").unwrap(), [format!("docker://r.io/b:1@{}", one.digest)]);
        let said = found("docker://r.io/a:1").unwrap_err().to_string();
        assert!(said.contains("is several, name one: docker://r.io/a:1@"), "{said}");
        // What an older version pulled has no name.
        assert_eq!(found(&format!("docker://r.io/c:1@{bare}")).unwrap(), [format!("{SHARED}@{bare}")]);
        let said = found("docker://r.io/c:1").unwrap_err().to_string();
        assert!(
            said.starts_with("image: docker://r.io/c:1: it is not in /var/lib/coffer/images: "),
            "{said}"
        );
        found(&format!("docker://r.io/c:1@{}", one.digest)).unwrap_err();
    }

    #[test]
    fn several_go_together_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        for tag in ["one", "two"] {
            layout.tag(image(&layout, tag), tag).unwrap();
        }
        let both = listed(dir.path()).unwrap();
        let tag = |tag: &str| Which::Tag(tag.into(), None);
        removed(dir.path(), &[("one", tag("one")), ("none", tag("none"))]).unwrap_err();
        assert_eq!(listed(dir.path()).unwrap(), both);
        removed(dir.path(), &[("one", tag("one")), ("two", tag("two"))]).unwrap();
        assert_eq!(listed(dir.path()).unwrap(), "");
        assert_eq!(listed(&dir.path().join("missing")).unwrap(), "");
    }
}
