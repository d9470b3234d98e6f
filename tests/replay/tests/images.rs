//! `io.coffer.image`: init unpacks the image, and the host has no say in what runs.

use std::{fs, io::Write, path::Path, process::Command, sync::atomic::AtomicU64};

use coffer_layers::{
    digest::Digest,
    encrypt::{Recipient, encrypt},
    layout::Layout,
    manifest::{Descriptor, MANIFEST, architecture},
};
use coffer_replay::{Bench, config};
use serde_json::{Value, json};

/// An image of one layer: a bundle's root, and a program that says who and where it is.
fn image(bench: &Bench) -> (Layout, Descriptor) {
    use std::os::unix::fs::PermissionsExt;
    let root = bench.bundle("source", &config(&["true"])).join("rootfs");
    fs::write(
        root.join("bin/app"),
        "#!/bin/sh\nid -u; id -g; pwd; echo $MODE-$EVIL; cat /etc/message; ls /run\n",
    )
    .unwrap();
    fs::set_permissions(root.join("bin/app"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(root.join("etc/message"), "from the image\n").unwrap();
    let tar = Command::new("tar")
        .arg("-C")
        .arg(&root)
        .args(["--owner=0", "--group=0", "-c", "."])
        .output()
        .unwrap();
    assert!(tar.status.success());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar.stdout).unwrap();
    let layout = Layout::create(bench.path("layout")).unwrap();
    let layer = layout.put("application/vnd.oci.image.layer.v1.tar+gzip", &gzip.finish().unwrap()).unwrap();
    let text = json!({"architecture": architecture(), "os": "linux",
        "config": {"Entrypoint": ["/bin/app"], "User": "app", "Env": ["MODE=verified"], "WorkingDir": "/srv/made"},
        "rootfs": {"type": "layers", "diff_ids": [Digest::sha256(&tar.stdout)]}});
    let config = layout.put("application/vnd.oci.image.config.v1+json", text.to_string().as_bytes()).unwrap();
    let text = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
    let manifest = layout.put(MANIFEST, text.to_string().as_bytes()).unwrap();
    layout.tag(manifest.clone(), "app").unwrap();
    (layout, manifest)
}

fn wants(layout: &Layout, digest: &Digest) -> Value {
    let mut config = config(&["echo", "from", "the", "host"]);
    config["process"]["env"] = json!(["MODE=host", "EVIL=1"]);
    config["annotations"]["io.coffer.image"] = json!(format!("{}:app@{digest}", layout.path().display()));
    config
}

/// The words of a refusal; nothing runs, and nothing is left of it.
fn refused(bench: &Bench, id: &str, config: &Value) -> String {
    let bundle = bench.bundle(id, config);
    let _ = bench.create(id, &bundle).failed(1);
    assert_eq!(bench.read(&format!("{id}.out")), "");
    assert!(bench.state(id).unwrap_err().contains("container does not exist"));
    bench.logged(id)
}

#[test]
fn program_user_and_environment_are_the_images() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    bench.start("c", &wants(&layout, &manifest.digest));
    bench.wait_stopped("c");
    assert_eq!(
        bench.read("c.out"),
        "1000\n1000\n/srv/made\nverified-\nfrom the image\n",
        "{}",
        bench.read("c.err")
    );
    let _ = bench.call(&["delete", "--force", "c"]).ok();
}

#[test]
fn a_host_that_changes_a_blob_runs_nothing() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let blobs = layout.path().join("blobs/sha256");
    let mut paths: Vec<_> = fs::read_dir(&blobs).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    assert_eq!(paths.len(), 3);
    for (number, path) in paths.iter().enumerate() {
        let good = fs::read(path).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(path, &bad).unwrap();
        let why = refused(&bench, &format!("c{number}"), &wants(&layout, &manifest.digest));
        assert!(why.contains("image: ") && why.contains("digest"), "{why}");
        fs::write(path, good).unwrap();
    }
    let why = refused(&bench, "other", &wants(&layout, &Digest::sha256(b"another image")));
    assert!(why.contains("image: blob sha256:"), "{why}");
}

#[test]
fn the_owner_pins_images_and_names_the_kbs() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let with = |name: &str, digest: &Digest, coffer: &str, cdh: &str| {
        let file = bench.path(name);
        let text = format!(
            "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"coffer.toml\" = '''\n{coffer}\n'''\n\"cdh.toml\" = '''\n{cdh}\n'''\n"
        );
        fs::write(&file, text).unwrap();
        let mut config = wants(&layout, digest);
        config["annotations"]["io.coffer.initdata"] = json!(file);
        config
    };
    let pinned = format!("images = [\"{}\"]", manifest.digest);
    bench.start("c", &with("good", &manifest.digest, &pinned, ""));
    bench.wait_stopped("c");
    assert!(bench.read("c.out").contains("from the image"));
    let other = format!("images = [\"{}\"]", Digest::sha256(b"another"));
    let why = refused(&bench, "d", &with("other", &manifest.digest, &other, ""));
    assert!(why.contains("none of the images that the pod's owner allowed"), "{why}");
    // Encrypted: the key would come from a KBS that nobody answers for here.
    let recipients = [Recipient::Resource { kid: "kbs:///a/b/c".into(), key: vec![1; 32].into() }];
    let made = encrypt(&layout, &manifest, &layout, "secret", &recipients, &AtomicU64::new(0)).unwrap();
    let why = refused(&bench, "e", &wants(&layout, &made.digest));
    assert!(why.contains("no KBS: initdata names none"), "{why}");
    let why = refused(
        &bench,
        "f",
        &with("tls", &made.digest, "", "[kbc]\nname = 'cc_kbc'\nurl = 'http://127.0.0.1:1'"),
    );
    assert!(why.contains("plain HTTP"), "{why}");
    assert!(!Path::new("/run/coffer/images/c").exists());
}
