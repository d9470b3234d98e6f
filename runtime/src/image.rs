//! The image that the guest unpacks itself: which blobs it is shown, and which of them are signatures.
//!
//! Owns: `io.coffer.image` and `io.coffer.image.name`, the layout that all pods share. Does not own: whether the image may run, which the
//! guest decides; what the host says here only helps it to find what it checks. Filling that layout is `coffer image pull`'s: an engine
//! does not wait as long as a download may last.

use std::path::{Path, PathBuf};

use coffer_layers::{
    image::resolve,
    layout::Layout,
    policy::{Name, sigstore, simple},
    reference::Reference,
};
use coffer_protocol::{ImageSource, SHARE_DIR};
use oci_spec::runtime::Spec;

use crate::{
    error::Error,
    plan::{Bind, annotation},
};

/// The layout of images that pods name as a registry does.
pub const SHARED: &str = "/var/lib/coffer/images";

/// The annotation that names the image of a pod: `LAYOUT[:TAG]@sha256:…`, or `docker://REGISTRY/REPOSITORY[:TAG]@sha256:…`.
const IMAGE: &str = "io.coffer.image";
/// The annotation with the image's name in a registry.
const NAME: &str = "io.coffer.image.name";

/// What other tools write before the name of an image that is no layout, and why that cannot be shown to a guest.
const OTHERS: [(&str, &str); 3] = [
    ("containers-storage:", "podman's storage keeps layers unpacked, not the blobs that a manifest names"),
    ("docker-archive:", "an archive has no blobs by digest"),
    ("dir:", "a dir: is no OCI layout"),
];

/// The image that the configuration names, and its blobs for the guest.
///
/// # Errors
/// [`Error::Bundle`], naming the annotation.
pub fn source(spec: &Spec, id: &str) -> Result<Option<(ImageSource, Bind)>, Error> {
    source_in(spec, id, Path::new(SHARED))
}

fn source_in(spec: &Spec, id: &str, shared: &Path) -> Result<Option<(ImageSource, Bind)>, Error> {
    let wrong =
        |name: &str, text: &str, why: String| Error::Bundle(format!("annotation {name}={text}: {why}"));
    let name = annotation(spec, NAME);
    if let Some(text) = name {
        Name::of_image(text).map_err(|e| wrong(NAME, text, e.to_string()))?;
    }
    let Some(text) = annotation(spec, IMAGE) else {
        let why = || format!("there is no annotation {IMAGE} whose name it could be");
        return name.map_or(Ok(None), |text| Err(wrong(NAME, text, why())));
    };
    let wrong = |why: String| wrong(IMAGE, text, why);
    if let Some((scheme, why)) = OTHERS.iter().find(|(scheme, _)| text.starts_with(scheme)) {
        let rest = text.trim_start_matches(scheme);
        return Err(wrong(format!(
            "{why}: skopeo copy {scheme}{rest} oci:DIRECTORY:TAG, and name DIRECTORY@sha256:…"
        )));
    }
    let (reference, pulled) = match text.strip_prefix("docker://") {
        None => (text.parse::<Reference>().map_err(|e| wrong(format!("{e}")))?, None),
        Some(text) => {
            let name = text.parse::<Name>().map_err(|e| wrong(e.to_string()))?;
            (Reference { path: shared.to_owned(), tag: None, digest: name.digest().cloned() }, Some(name))
        }
    };
    let digest =
        reference.digest.ok_or_else(|| wrong("an image is named by its digest: …@sha256:…".into()))?;
    if !reference.path.is_absolute() {
        return Err(wrong("the layout's path is not absolute".into()));
    }
    if let Some(name) = &pulled
        && !Layout::open(&reference.path).is_ok_and(|layout| layout.has(&digest))
    {
        return Err(wrong(format!("it is not in {}: coffer image pull {name}", reference.path.display())));
    }
    let blobs = Bind {
        source: reference.path.join("blobs"),
        target: PathBuf::from(id).join("image"),
        read_only: true,
        recursive: false,
    };
    let source = ImageSource {
        blobs: format!("{SHARE_DIR}/{id}/image"),
        digest: digest.to_string(),
        name: name.map(str::to_owned).or(pulled.map(|name| name.to_string())),
        signatures: Vec::new(),
        simple_signatures: Vec::new(),
    };
    Ok(Some((source, blobs)))
}

/// Lists the signatures that lie beside the image, of its index and of the manifest for this machine. What cannot be read is left
/// out: the guest says what it misses.
pub fn find_signatures(image: &mut ImageSource, binds: &[Bind]) {
    let Some(path) = binds.last().and_then(|blobs| blobs.source.parent()) else { return };
    let Ok(layout) = Layout::open(path) else { return };
    let Ok(digest) = image.digest.parse() else { return };
    let Ok((digests, _)) = resolve(&layout, &digest) else { return };
    let manifests = sigstore::manifests(&layout, &digests).unwrap_or_default();
    image.signatures = manifests.iter().map(ToString::to_string).collect();
    let name = image.name.as_deref().and_then(|name| Name::of_image(name).ok());
    let simple = simple::find(&layout, name.as_ref(), &digests).unwrap_or_default();
    image.simple_signatures = simple.iter().map(simple::Signature::to_text).collect();
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use coffer_layers::digest::Digest;
    use serde_json::json;

    fn spec(annotations: &[(&str, &str)]) -> Spec {
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect();
        serde_json::from_value(json!({"ociVersion": "1.0.2", "annotations": annotations})).unwrap()
    }

    #[test]
    fn an_image_is_named_by_digest() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let image = format!("/images/a:latest@{digest}");
        let (made, blobs) = source(&spec(&[(IMAGE, &image), (NAME, "r.io/a:1")]), "c").unwrap().unwrap();
        assert_eq!((made.blobs, made.digest), (format!("{SHARE_DIR}/c/image"), digest.clone()));
        assert_eq!(made.name.as_deref(), Some("r.io/a:1"));
        assert_eq!((blobs.source.to_str(), blobs.read_only), (Some("/images/a/blobs"), true));
        assert!(source(&spec(&[]), "c").unwrap().is_none());
        for (annotations, words) in [
            (vec![(IMAGE, "/a:latest")], "by its digest"),
            (vec![(IMAGE, &*format!("a@{digest}"))], "not absolute"),
            (vec![(IMAGE, "containers-storage:app")], "skopeo copy containers-storage:app oci:DIRECTORY"),
            (vec![(IMAGE, "docker://r.io/a:1")], "by its digest"),
            (vec![(IMAGE, &image), (NAME, "R io")], "is no image name"),
            (vec![(NAME, "r.io/a")], "whose name it could be"),
        ] {
            let message = source(&spec(&annotations), "c").unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn a_name_of_a_registry_is_looked_for_in_the_shared_layout() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let image = layout.put("x", b"manifest").unwrap().digest;
        let named = |digest: &Digest, more: &[(&str, &str)]| {
            let text = format!("docker://r.io/team/a:1@{digest}");
            source_in(&spec(&[&[(IMAGE, text.as_str())], more].concat()), "c", dir.path())
        };
        let (made, blobs) = named(&image, &[]).unwrap().unwrap();
        assert_eq!((made.digest, blobs.source), (image.to_string(), dir.path().join("blobs")));
        assert_eq!(made.name, Some(format!("r.io/team/a:1@{image}")));
        let (made, _) = named(&image, &[(NAME, "r.io/b:2")]).unwrap().unwrap();
        assert_eq!(made.name.as_deref(), Some("r.io/b:2"));
        let other = Digest::sha256(b"other");
        let said = named(&other, &[]).unwrap_err().to_string();
        assert!(said.ends_with(&format!("coffer image pull r.io/team/a:1@{other}")), "{said}");
    }

    #[test]
    fn signatures_beside_it_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let manifest = layout.put("application/octet-stream", br#"{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0},"layers":[]}"#).unwrap();
        let mark = layout.put("application/octet-stream", b"signatures").unwrap();
        layout.tag(mark.clone(), &sigstore::tag(&manifest.digest)).unwrap();
        layout.tag(mark.clone(), &sigstore::tag(&Digest::sha256(b"another"))).unwrap();
        let listed = |path: &Path, digest: &Digest| {
            let text = format!("{}@{digest}", path.display());
            let (mut image, blobs) = source(&spec(&[(IMAGE, &text)]), "c").unwrap().unwrap();
            find_signatures(&mut image, &[blobs]);
            image.signatures
        };
        assert_eq!(listed(dir.path(), &manifest.digest), [mark.digest.to_string()]);
        // Simple signing's, by the image's digest and by its name.
        let folders =
            [format!("sha256={}", manifest.digest.hex()), format!("team/a@sha256={}", manifest.digest.hex())];
        for (number, folder) in folders.iter().enumerate() {
            let folder = dir.path().join("signatures").join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("signature-1"), [number as u8]).unwrap();
            std::fs::write(folder.join("signature-3"), "not reached").unwrap();
        }
        let text = format!("{}@{}", dir.path().display(), manifest.digest);
        for (name, found) in [
            (None, vec!["AA=="]),
            (Some("r.io/team/a:1"), vec!["AA==", "AQ=="]),
            (Some("r.io/b"), vec!["AA=="]),
        ] {
            let (mut image, blobs) = source(&spec(&[(IMAGE, &text)]), "c").unwrap().unwrap();
            image.name = name.map(str::to_owned);
            find_signatures(&mut image, &[blobs]);
            assert_eq!(image.simple_signatures, found);
        }
        assert_eq!(listed(dir.path(), &Digest::sha256(b"none")), [""; 0]);
        assert_eq!(listed(Path::new("/nowhere"), &manifest.digest), [""; 0]);
    }
}
