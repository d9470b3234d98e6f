use super::*;
use crate::{
    manifest::{INDEX, MANIFEST},
    policy::sigstore::Signature,
};
use serde_json::json;

const KEY: &str = include_str!("../../testdata/sign/p256.pem");

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        Self { dir, layout }
    }

    fn manifest(&self, layers: &[&str]) -> Descriptor {
        let layers: Vec<_> =
            layers.iter().map(|text| self.layout.put("x", text.as_bytes()).unwrap()).collect();
        let config = self.layout.put("x", format!("config of {layers:?}").as_bytes()).unwrap();
        let text = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.layout.put(MANIFEST, text.to_string().as_bytes()).unwrap()
    }

    fn image(&self, tag: &str, layers: &[&str]) -> Digest {
        let manifest = self.manifest(layers);
        self.layout.tag(manifest.clone(), tag).unwrap();
        manifest.digest
    }

    fn sign(&self, digest: &Digest) -> Digest {
        let signature = Signature::sign(KEY, "r.io/a:1", digest).unwrap();
        sigstore::store(&self.layout, digest, &signature).unwrap();
        self.layout.tagged(Some(&sigstore::tag(digest))).unwrap().digest
    }

    fn has(&self, text: &str) -> bool {
        self.layout.has(&Digest::sha256(text.as_bytes()))
    }

    fn blobs(&self) -> usize {
        fs::read_dir(self.dir.path().join("blobs/sha256")).unwrap().count()
    }

    fn remove(&self, goes: impl Fn(&Entry) -> bool) -> Removal {
        let contents = Contents::read(&self.layout).unwrap();
        let removal = contents.without(goes).unwrap();
        let before = self.blobs();
        contents.remove(&removal).unwrap();
        assert_eq!(before - self.blobs(), removal.count);
        removal
    }

    fn simple(&self, folder: &str) -> PathBuf {
        let folder = self.dir.path().join("signatures").join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("signature-1"), "12345").unwrap();
        folder
    }
}

#[test]
fn what_others_need_stays() {
    let bench = Bench::new();
    let one = bench.image("one", &["base", "one"]);
    let two = bench.image("two", &["base", "two"]);
    let contents = Contents::read(&bench.layout).unwrap();
    let alone = contents.without(|entry| entry.digest == one).unwrap();
    assert_eq!(contents.bytes(&one).unwrap() - alone.bytes, 4);
    let removal = bench.remove(|entry| entry.digest == one);
    assert_eq!((&removal.images[..], &removal.tags[..], removal.count), (&[one][..], &["one".into()][..], 3));
    assert!(bench.has("base") && bench.has("two") && !bench.has("one"));
    assert_eq!(bench.layout.tagged(None).unwrap().digest, two);
    bench.remove(|_| true);
    assert_eq!((bench.blobs(), bench.layout.index().unwrap().manifests.len()), (0, 0));
}

#[test]
fn a_tag_of_several_goes_alone() {
    let bench = Bench::new();
    let image = bench.image("one", &["base"]);
    assert_eq!(bench.image("two", &["base"]), image);
    bench.sign(&image);
    let before = bench.blobs();
    let removal = bench.remove(|entry| entry.tag.as_deref() == Some("one"));
    assert_eq!((removal.images.len(), removal.count, removal.bytes, bench.blobs()), (0, 0, 0, before));
    bench.layout.tagged(Some(&sigstore::tag(&image))).unwrap();
}

#[test]
fn what_no_index_names_is_an_image_too() {
    let bench = Bench::new();
    let old = bench.manifest(&["base", "old"]).digest;
    let new = bench.image("new", &["base", "new"]);
    bench.remove(|entry| entry.digest == new);
    assert!(bench.has("base") && bench.has("old") && !bench.has("new"));
    let contents = Contents::read(&bench.layout).unwrap();
    let images: Vec<_> = contents.images().map(|entry| (&entry.digest, entry.listed)).collect();
    assert_eq!(images, [(&old, false)]);
    bench.remove(|entry| entry.digest == old);
    assert_eq!(bench.blobs(), 0);
}

#[test]
fn what_another_tool_has_not_finished_stays() {
    let bench = Bench::new();
    let image = bench.image("one", &["base"]);
    bench.layout.put("x", b"a layer whose manifest comes later").unwrap();
    bench.remove(|entry| entry.digest == image);
    assert_eq!(bench.blobs(), 1);
}

#[test]
fn an_index_goes_with_its_manifests() {
    let bench = Bench::new();
    let here = bench.manifest(&["base", "here"]);
    let also = bench.manifest(&["base", "also"]);
    // Of another platform, which a pull does not bring.
    let absent = Descriptor { digest: Digest::sha256(b"absent"), ..here.clone() };
    let text = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [here, also, absent]});
    let index = bench.layout.put(INDEX, text.to_string().as_bytes()).unwrap();
    bench.layout.tag(index.clone(), "all").unwrap();
    bench.layout.tag(also.clone(), "also").unwrap();
    // The signatures of what is within go with it, those of what stays do not.
    let (gone, stays) = (bench.sign(&here.digest), bench.sign(&also.digest));
    let removal = bench.remove(|entry| entry.digest == index.digest);
    assert_eq!(removal.images, [index.digest, gone.clone()]);
    assert!(bench.has("base") && bench.has("also") && !bench.has("here"));
    assert!(!bench.layout.has(&gone) && bench.layout.has(&stays));
    bench.layout.tagged(Some(&sigstore::tag(&also.digest))).unwrap();
}

#[test]
fn signatures_go_with_their_image_alone() {
    let bench = Bench::new();
    let one = bench.image("one", &["base", "one"]);
    let two = bench.image("two", &["base", "two"]);
    // The second replaces the first, whose blob nobody names any more.
    let replaced = bench.sign(&one);
    let (first, second) = (bench.sign(&one), bench.sign(&two));
    assert_ne!(replaced, first);
    // As cosign save leaves them.
    let saved = bench.layout.tagged(Some(&sigstore::tag(&one))).unwrap();
    bench
        .layout
        .edit(|manifests| {
            let mut saved = saved.clone();
            saved.annotations = [("kind".to_owned(), "dev.cosignproject.cosign/sigs".to_owned())].into();
            manifests.push(saved);
        })
        .unwrap();
    let folders =
        |of: &Digest| [folder(of), format!("team/app@{}", folder(of))].map(|name| bench.simple(&name));
    let (of_one, of_two) = (folders(&one), folders(&two));
    let contents = Contents::read(&bench.layout).unwrap();
    assert_eq!(contents.images().count(), 2);
    bench.remove(|entry| entry.digest == one);
    assert!(![replaced, first].iter().any(|digest| bench.layout.has(digest)));
    assert!(bench.layout.has(&second));
    assert_eq!(bench.layout.index().unwrap().manifests.len(), 2);
    assert!(of_one.iter().all(|path| !path.exists()) && of_two.iter().all(|path| path.exists()));
    bench.remove(|entry| entry.digest == two);
    assert_eq!((bench.blobs(), bench.layout.index().unwrap().manifests.len()), (0, 0));
    assert!(of_two.iter().all(|path| !path.exists()));
}

#[test]
fn a_signature_whose_image_is_elsewhere_stays() {
    let bench = Bench::new();
    let one = bench.image("one", &["one"]);
    let foreign = bench.sign(&Digest::sha256(b"another"));
    bench.remove(|entry| entry.digest == one);
    assert!(bench.layout.has(&foreign));
    // It is shown, and can be removed itself.
    assert_eq!(Contents::read(&bench.layout).unwrap().images().count(), 1);
    bench.remove(|entry| entry.digest == foreign);
    assert_eq!(bench.blobs(), 0);
}

#[test]
fn what_cannot_be_read_is_refused() {
    let bench = Bench::new();
    let one = bench.image("one", &["base"]);
    let two = bench.image("two", &["base", "two"]);
    let whole = fs::read(bench.layout.blob(&two)).unwrap();
    let refused = |words: &str| {
        let said = Contents::read(&bench.layout).unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
    };
    fs::write(bench.layout.blob(&two), [&whole[..], b" "].concat()).unwrap();
    refused("it was changed on its way or on disk");
    fs::remove_file(bench.layout.blob(&two)).unwrap();
    std::os::unix::fs::symlink("/dev/null", bench.layout.blob(&two)).unwrap();
    refused(&two.to_string());
    fs::remove_file(bench.layout.blob(&two)).unwrap();
    bench.layout.tag(bench.layout.put("x", b"{}").unwrap(), "two").unwrap();
    refused("what it needs is not known");
    bench.layout.tag(bench.layout.put("x", &whole).unwrap(), "two").unwrap();
    fs::write(bench.dir.path().join("index.json"), "{").unwrap();
    refused("layout ");
    assert!(bench.layout.has(&one) && bench.has("base"));
}

#[test]
fn who_fills_and_who_removes_wait_for_each_other() {
    use std::sync::mpsc::channel;
    let bench = Bench::new();
    let held = bench.layout.hold().unwrap();
    // Others may fill it as well.
    drop(bench.layout.hold().unwrap());
    let (waits, waiting) = channel();
    let (has, done) = channel();
    std::thread::scope(|scope| {
        let layout = bench.layout.clone();
        scope.spawn(move || {
            let _alone = layout.hold_alone(|| waits.send(()).unwrap()).unwrap();
            has.send(()).unwrap();
        });
        waiting.recv().unwrap();
        assert!(done.try_recv().is_err());
        drop(held);
        done.recv().unwrap();
    });
}
