//! The image that the guest unpacks itself: which blobs it is shown, and which of them are signatures.
//!
//! Owns: `io.coffer.image` and `io.coffer.image.name`, the layout that all pods share. Does not own: whether the image may run, which the
//! guest decides; what the host says here only helps it to find what it checks. Filling that layout is `coffer image pull`'s: an engine
//! does not wait as long as a download may last.

use std::path::{Path, PathBuf};

use coffer_layers::{
    image::resolve,
    layout::Layout,
    manifest::{Manifest, UNPACKED},
    policy::{Name, sigstore, simple},
    reference::Reference,
};
use coffer_protocol::{ImageSource, SHARE_DIR};
use oci_spec::runtime::Spec;

use crate::{
    error::Error,
    plan::{Bind, GUEST_OVERHEAD_MIB, MEMORY_ANNOTATION, Plan, annotation},
    storage,
};

/// The layout of images that pods name as a registry does.
pub const SHARED: &str = "/var/lib/coffer/images";

/// The annotation that names the image of a pod: `LAYOUT[:TAG]@sha256:…`, or `docker://REGISTRY/REPOSITORY[:TAG]@sha256:…`.
pub const IMAGE: &str = "io.coffer.image";
/// The annotation with the image's name in a registry.
const NAME: &str = "io.coffer.image.name";

/// What other tools write before the name of an image that is no layout, why that cannot be shown to a guest, and what brings it into one.
const OTHERS: [(&str, &str, &str); 3] = [
    (
        storage::PREFIX,
        "podman's storage keeps layers unpacked, not the blobs that a manifest names",
        "coffer image pull NAME, and name what it prints",
    ),
    (
        "docker-archive:",
        "an archive has no blobs by digest",
        "skopeo copy NAME oci:DIRECTORY:TAG, and name DIRECTORY@sha256:…",
    ),
    ("dir:", "a dir: is no OCI layout", "skopeo copy NAME oci:DIRECTORY:TAG, and name DIRECTORY@sha256:…"),
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
    if let Some((_, why, then)) = OTHERS.iter().find(|(scheme, ..)| text.starts_with(scheme)) {
        return Err(wrong(format!("{why}: {}", then.replace("NAME", text))));
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

/// MiB that a guest leaves for programs, whatever an image takes (init's `RESERVE`).
const LEFT_MIB: u64 = 24;
/// MiB for programs beside an image of which nobody said how much memory its pod has.
const PROGRAMS_MIB: u64 = 256;

/// Makes room for the image in a VM of its own: nobody said how large that is, or what was said is enough as far as the manifest tells.
/// The manifest's sizes are a hint; the guest counts what really comes.
///
/// # Errors
/// [`Error::Bundle`] when the image cannot fit.
pub fn make_room(plan: &mut Plan) -> Result<(), Error> {
    let Some(bytes) = plan.image.as_ref().and_then(|image| unpacked(image, &plan.binds)) else {
        return Ok(());
    };
    let mib = bytes.div_ceil(1 << 20);
    match plan.scratch {
        Some(disk) if bytes > disk => Err(Error::Bundle(format!(
            "image: unpacked it takes {mib} MiB, and its disk has {} MiB: annotation io.coffer.scratch={}M or more",
            disk >> 20,
            mib + mib / 8 + 16
        ))),
        Some(_) => Ok(()),
        None => {
            plan.memory_mib = memory_mib(mib, plan.memory_mib, plan.memory_is_said)?;
            Ok(())
        }
    }
}

fn memory_mib(image: u64, has: u64, is_said: bool) -> Result<u64, Error> {
    // More than any host has: the sum cannot be too large for its number.
    let image = image.min(1 << 44);
    let least = image + LEFT_MIB + GUEST_OVERHEAD_MIB;
    match is_said {
        // Part of the overhead is the guest's too, so that only what cannot be is refused.
        true if image + LEFT_MIB > has => Err(Error::Bundle(format!(
            "image: unpacked it takes {image} MiB, and its pod has {has} MiB of memory: raise the pod's memory or use a scratch disk: \
             annotation {MEMORY_ANNOTATION}={least} or more, or io.coffer.scratch={}M",
            image + image / 8 + 16
        ))),
        true => Ok(has),
        false => Ok(has.max(least - LEFT_MIB + PROGRAMS_MIB).min(1 << 20).next_multiple_of(2)),
    }
}

/// Bytes that the image takes unpacked, at least, as its manifest says.
fn unpacked(image: &ImageSource, binds: &[Bind]) -> Option<u64> {
    let layout = Layout::open(binds.last()?.source.parent()?).ok()?;
    let (_, manifest) = resolve(&layout, &image.digest.parse().ok()?).ok()?;
    Some(sum(&manifest))
}

/// A layer without the annotation takes about as much as its blob has, or more.
fn sum(manifest: &Manifest) -> u64 {
    let of = |annotation: &String| annotation.parse::<u64>().ok();
    let sizes = manifest
        .layers
        .iter()
        .map(|layer| layer.annotations.get(UNPACKED).and_then(of).unwrap_or(layer.size));
    sizes.fold(0, u64::saturating_add)
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
    fn a_pod_is_as_large_as_its_image_wants_or_says_that_it_cannot_be() {
        // Nobody said: what most pods have, or the image with room for programs.
        assert_eq!(memory_mib(10, 512, false).unwrap(), 512);
        assert_eq!(memory_mib(1001, 512, false).unwrap(), 1322);
        assert_eq!(memory_mib(u64::MAX, 512, false).unwrap(), 1 << 20);
        assert_eq!(memory_mib(100, 256, true).unwrap(), 256);
        assert_eq!(memory_mib(232, 256, true).unwrap(), 256);
        let message = memory_mib(233, 256, true).unwrap_err().to_string();
        for words in
            ["takes 233 MiB", "has 256 MiB", "io.coffer.memory-mib=321 or more", "io.coffer.scratch=278M"]
        {
            assert!(message.contains(words), "{message}");
        }
        memory_mib(u64::MAX, 256, true).unwrap_err();
    }

    #[test]
    fn a_manifest_says_what_its_layers_take() {
        let layer = |size: u64, says: Option<&str>| {
            let annotations: serde_json::Map<String, serde_json::Value> =
                says.into_iter().map(|text| (UNPACKED.to_owned(), text.into())).collect();
            serde_json::json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "size": size, "annotations": annotations,
                "digest": format!("sha256:{}", "0".repeat(64)) })
        };
        let of = |layers: &[serde_json::Value]| {
            let config = serde_json::json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "size": 2,
                "digest": format!("sha256:{}", "0".repeat(64)) });
            let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": layers });
            sum(&serde_json::from_value(manifest).unwrap())
        };
        assert_eq!(of(&[layer(10, Some("4096")), layer(100, None), layer(7, Some("many"))]), 4096 + 107);
        assert_eq!(of(&[layer(1, Some("18446744073709551615")), layer(1, None)]), u64::MAX);
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
            (vec![(IMAGE, "containers-storage:app")], "coffer image pull containers-storage:app, and"),
            (vec![(IMAGE, "dir:/x")], "skopeo copy dir:/x oci:DIRECTORY"),
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
