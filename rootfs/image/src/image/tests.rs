//! A hostile host against an image: each manipulation is refused by its stage, and nothing is left to see.

use std::{fs, os::unix::fs::MetadataExt, sync::Mutex};

use super::*;
use crate::{
    encrypt::{Recipient, encrypt},
    layout::Layout,
    manifest::Descriptor,
    testing::{Fixed, Tar, assemble, encrypted, gzip, image, zstd},
};

const KEY: Fixed = Fixed([7; 32]);
const OPTIONS: Options = Options { privileged: false, budget: 4 << 20 };

fn first() -> Vec<u8> {
    Tar::default().dir("etc").file("etc/a", b"first").file("secret", &vec![0x5a; 300_000]).end()
}

fn second() -> Vec<u8> {
    Tar::default().file("etc/.wh.a", b"").file("etc/b", b"second").hardlink("etc/c", "etc/b").end()
}

/// Tries to unpack; when that is refused, nothing may be visible.
fn attempt(layout: &Layout, digest: &Digest, trust: Trust) -> Result<PathBuf, String> {
    let dir = tempfile::tempdir().unwrap().keep();
    let place = dir.join("root");
    let done = Image::load(layout, digest, trust)
        .and_then(|image| image.unpack(layout, &KEY, &place, OPTIONS, &AtomicU64::new(0)));
    match done {
        Ok(_) => Ok(place),
        Err(e) => {
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "something is left after: {e}");
            fs::remove_dir(dir).unwrap();
            Err(e.to_string())
        }
    }
}

fn refused(layout: &Layout, digest: &Digest, words: &str) {
    let why = attempt(layout, digest, Trust::Pinned).expect_err(words);
    assert!(why.contains(words), "{why}");
}

fn two(dir: &Path) -> (Layout, Descriptor, Vec<Descriptor>) {
    let layout = Layout::create(dir.join("layout")).unwrap();
    let layers = vec![
        encrypted(&layout, "tar+gzip", &gzip(&first()), &KEY),
        encrypted(&layout, "tar+zstd", &zstd(&second()), &KEY),
    ];
    let ids = [Digest::sha256(&first()), Digest::sha256(&second())];
    let manifest = assemble(&layout, layers.clone(), &ids);
    (layout, manifest, layers)
}

#[test]
fn layers_of_every_kind_are_applied_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let third = Tar::default().file("etc/d", b"third").end();
    let (layout, manifest) = image(
        dir.path(),
        &[
            ("tar+gzip", gzip(&first()), first()),
            ("tar+zstd", zstd(&second()), second()),
            ("tar", third.clone(), third),
        ],
    );
    let place = attempt(&layout, &manifest.digest, Trust::Unchecked).unwrap();
    assert!(!place.join("etc/a").exists());
    assert_eq!(fs::read(place.join("etc/b")).unwrap(), b"second");
    assert_eq!(
        fs::metadata(place.join("etc/b")).unwrap().ino(),
        fs::metadata(place.join("etc/c")).unwrap().ino()
    );
    assert_eq!(fs::read(place.join("etc/d")).unwrap(), b"third");
    assert_eq!(fs::metadata(place.join("secret")).unwrap().len(), 300_000);
    assert_eq!(fs::metadata(place.join("etc/d")).unwrap().mtime(), 1_700_000_000);
    fs::remove_dir_all(place.parent().unwrap()).unwrap();
}

#[test]
fn encrypted_layers_open_and_need_a_pin() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, _) = two(dir.path());
    let place = attempt(&layout, &manifest.digest, Trust::Pinned).unwrap();
    assert_eq!(fs::read(place.join("etc/c")).unwrap(), b"second");
    fs::remove_dir_all(place.parent().unwrap()).unwrap();
    let why = attempt(&layout, &manifest.digest, Trust::Unchecked).unwrap_err();
    assert!(why.starts_with("trust: the image is encrypted"), "{why}");
}

#[test]
fn what_encrypt_makes_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    let (from, manifest) =
        image(dir.path(), &[("tar+gzip", gzip(&first()), first()), ("tar+zstd", zstd(&second()), second())]);
    let to = Layout::create(dir.path().join("to")).unwrap();
    let recipients = [Recipient::Resource { kid: "kbs:///t/k/1".into(), key: KEY.0.to_vec().into() }];
    let made = encrypt(&from, &manifest, &to, "e", &recipients, &AtomicU64::new(0)).unwrap();
    assert_eq!(made.layers, 2);
    let (_, encrypted) = resolve(&to, &made.digest).unwrap();
    let costs = [first(), second()]
        .map(|tar| crate::unpack::cost(&mut crate::tar::Archive::new(tar.as_slice())).unwrap());
    for (layer, cost) in encrypted.layers.iter().zip(costs) {
        assert_eq!(layer.annotations[crate::manifest::UNPACKED], cost.to_string());
    }
    let place = attempt(&to, &made.digest, Trust::Pinned).unwrap();
    assert_eq!(fs::read(place.join("etc/b")).unwrap(), b"second");
    fs::remove_dir_all(place.parent().unwrap()).unwrap();
    for blob in fs::read_dir(to.path().join("blobs/sha256")).unwrap() {
        let bytes = fs::read(blob.unwrap().path()).unwrap();
        assert!(!bytes.windows(16).any(|w| w == [0x5a; 16]), "plaintext in the encrypted layout");
    }
}

fn blob(layout: &Layout, digest: &Digest) -> PathBuf {
    layout.path().join("blobs/sha256").join(digest.hex())
}

#[test]
fn a_wrong_blob_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, layers) = two(dir.path());
    let path = blob(&layout, &layers[0].digest);
    let good = fs::read(&path).unwrap();
    for at in [0, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        refused(&layout, &manifest.digest, "digest: what came for sha256:");
    }
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    refused(&layout, &manifest.digest, "bytes came, the manifest says");
    fs::write(&path, [&good[..], b"x"].concat()).unwrap();
    refused(&layout, &manifest.digest, "bytes came, the manifest says");
    fs::remove_file(&path).unwrap();
    refused(&layout, &manifest.digest, "fetch sha256:");
}

#[test]
fn swapped_layers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, layers) = two(dir.path());
    // The other layer's blob under this one's name.
    let (a, b) = (blob(&layout, &layers[0].digest), blob(&layout, &layers[1].digest));
    let (a_bytes, b_bytes) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
    fs::write(&a, &b_bytes).unwrap();
    refused(&layout, &manifest.digest, "the manifest says");
    fs::write(&a, a_bytes).unwrap();
    // A manifest of the host's own: the blob and the annotations of two layers crossed. The owner's pin would
    // refuse it at once; suppose that a lax policy did not.
    let crossed = |descriptor: &Descriptor, annotations: &Descriptor| Descriptor {
        annotations: annotations.annotations.clone(),
        ..descriptor.clone()
    };
    let ids = [Digest::sha256(&first()), Digest::sha256(&second())];
    let forged =
        assemble(&layout, vec![crossed(&layers[0], &layers[1]), crossed(&layers[1], &layers[0])], &ids);
    refused(&layout, &forged.digest, "HMAC of the ciphertext does not hold");
    // Whole descriptors in another order: everything decrypts, and diff_id tells.
    let forged = assemble(&layout, vec![layers[1].clone(), layers[0].clone()], &ids);
    refused(&layout, &forged.digest, "diff_id of layer");
}

#[test]
fn right_hmac_with_wrong_content_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::create(dir.path().join("layout")).unwrap();
    let layer = encrypted(&layout, "tar+gzip", &gzip(&second()), &KEY);
    let forged = assemble(&layout, vec![layer], &[Digest::sha256(&first())]);
    refused(&layout, &forged.digest, "diff_id of layer");
    // An archive that ends in time, followed by bytes that only diff_id sees.
    let layer = encrypted(&layout, "tar", &[second(), vec![1; 4096]].concat(), &KEY);
    let forged = assemble(&layout, vec![layer], &[Digest::sha256(&second())]);
    refused(&layout, &forged.digest, "diff_id of layer");
}

#[test]
fn a_changed_manifest_or_configuration_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, _) = two(dir.path());
    let image = Image::load(&layout, &manifest.digest, Trust::Pinned).unwrap();
    for digest in [&manifest.digest, &image.manifest.config.digest] {
        let path = blob(&layout, digest);
        let good = fs::read_to_string(&path).unwrap();
        fs::write(&path, good.replacen("linux", "Linux", 1).replacen("tar+gzip", "tar+zstd", 1)).unwrap();
        refused(&layout, &manifest.digest, "what came has digest");
        fs::write(&path, good).unwrap();
    }
    // The encrypted media type taken away: the pipeline must not read ciphertext as a layer that was never encrypted.
    let mut layer = image.manifest.layers[0].clone();
    layer.media_type = layer.media_type.replace("+encrypted", "");
    let forged = assemble(&layout, vec![layer], &image.config.rootfs.diff_ids[..1]);
    refused(&layout, &forged.digest, "has encryption annotations but media type");
}

/// A host that shows each blob as it should be once, and another the next time.
struct Once<'a>(&'a Layout, Mutex<Vec<Digest>>);

impl Blobs for Once<'_> {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn io::Read + Send>> {
        let mut seen = self.1.lock().unwrap();
        if seen.contains(digest) {
            return Ok(Box::new(&b"another, now that this one was checked"[..]));
        }
        seen.push(digest.clone());
        self.0.open(digest)
    }
}

#[test]
fn what_was_checked_is_what_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, layers) = two(dir.path());
    let once = Once(&layout, Mutex::default());
    let image = Image::load(&once, &manifest.digest, Trust::Pinned).unwrap();
    let place = dir.path().join("root");
    image.unpack(&once, &KEY, &place, OPTIONS, &AtomicU64::new(0)).unwrap();
    assert_eq!(fs::read(place.join("etc/c")).unwrap(), b"second");
    assert_eq!(once.1.lock().unwrap().len(), 2 + layers.len());
}

#[test]
fn bombs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let zeros = vec![0; 26 << 20];
    // As a file, as what follows an archive's end, and as an archive that is nothing but its own end.
    let file = Tar::default().file("bomb", &zeros).end();
    let (layout, manifest) = image(dir.path(), &[("tar+gzip", gzip(&file), file)]);
    refused(&layout, &manifest.digest, "needs more than the 4194304 bytes");
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest) = image(dir.path(), &[("tar+gzip", gzip(&zeros), zeros)]);
    refused(&layout, &manifest.digest, "a decompression bomb");
}

#[test]
fn nothing_escapes_the_tree() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, b"untouched").unwrap();
    let out = outside.path().to_str().unwrap();
    let up = format!("../../../../../../../..{out}");
    let climbing = [
        Tar::default().file("../x", b"evil"),
        Tar::default().file("a/../../x", b"evil"),
        Tar::default().dir(".."),
        Tar::default().hardlink("x", "../../victim"),
        Tar::default().file("../.wh.victim", b""),
        Tar::default().file(".wh...", b""),
    ];
    for tar in climbing {
        let dir = tempfile::tempdir().unwrap();
        let tar = tar.end();
        let (layout, manifest) = image(dir.path(), &[("tar", tar.clone(), tar)]);
        refused(&layout, &manifest.digest, "unpack: path");
    }
    // Links are followed as inside the tree, so that these land there or nowhere.
    let through = [
        Tar::default().symlink("l", out).file("l/victim", b"evil"),
        Tar::default().symlink("l", &up).file("l/victim", b"evil"),
        Tar::default().symlink("l", out).file("l/.wh.victim", b""),
        Tar::default().symlink("l", out).file("l/.wh..wh..opq", b""),
        Tar::default().symlink("l", &format!("{out}/victim")).file("l", b"evil"),
        Tar::default().symlink("l", &format!("{out}/victim")).hardlink("h", "l").file("h", b"evil"),
        Tar::default().symlink("l", &format!("{out}/victim")).dir("l"),
        Tar::default().symlink("l", "/proc/self/root").file(&format!("l{out}/victim"), b"evil"),
        Tar::default().symlink("a", "b").symlink("b", "a").file("a/x", b"evil"),
        Tar::default().hardlink("h", &format!("{out}/victim")).file("h", b"evil"),
        Tar::default().dir("d").symlink("d/l", out).file("d/l/.wh..wh..opq", b"").symlink("d", out).dir("d"),
    ];
    for tar in through {
        let dir = tempfile::tempdir().unwrap();
        let tar = tar.end();
        let (layout, manifest) = image(dir.path(), &[("tar", tar.clone(), tar)]);
        if let Ok(place) = attempt(&layout, &manifest.digest, Trust::Unchecked) {
            fs::remove_dir_all(place.parent().unwrap()).unwrap();
        }
        assert_eq!(fs::read(&victim).unwrap(), b"untouched");
        assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1);
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}

#[test]
fn an_encrypted_image_wants_a_signature_and_not_only_a_policy() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, _) = two(dir.path());
    let load = |verdict: Verdict| Image::judged(&layout, &manifest.digest, |_| Ok(verdict.into()));
    assert!(matches!(load(Verdict::Accepted), Err(ImageError::Unpinned)));
    let place = dir.path().join("root");
    load(Verdict::Signed).unwrap().unpack(&layout, &KEY, &place, OPTIONS, &AtomicU64::new(0)).unwrap();
    assert_eq!(fs::read(place.join("etc/b")).unwrap(), b"second");
}

#[test]
fn an_index_and_its_manifest_both_name_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, manifest, _) = two(dir.path());
    let platform = serde_json::json!({"architecture": crate::manifest::architecture(), "os": "linux"});
    let mut chosen = serde_json::to_value(&manifest).unwrap();
    chosen["platform"] = platform;
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": crate::manifest::INDEX, "manifests": [chosen]});
    let index = layout.put(crate::manifest::INDEX, index.to_string().as_bytes()).unwrap();
    let mut seen = Vec::new();
    let image = Image::judged(&layout, &index.digest, |digests| {
        seen = digests.to_vec();
        Ok(Trust::Signed)
    });
    assert_eq!((image.unwrap().digest, seen), (manifest.digest.clone(), vec![index.digest, manifest.digest]));
}

#[test]
fn a_tree_whose_name_ends_like_one_being_made_is_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", b"x").end();
    let (layout, manifest) = image(dir.path(), &[("tar", tar.clone(), tar)]);
    let load = || Image::load(&layout, &manifest.digest, Trust::Pinned).unwrap();
    let unpack =
        |name: &str| load().unpack(&layout, &KEY, &dir.path().join(name), OPTIONS, &AtomicU64::new(0));
    unpack("c.partial").unwrap();
    assert!(unpack("c").is_err());
    assert_eq!(fs::read(dir.path().join("c.partial/a")).unwrap(), b"x");
}
