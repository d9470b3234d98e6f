//! `io.coffer.image`: init unpacks the image, and the host has no say in what runs.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::AtomicU64,
};

use coffer_layers::{
    digest::Digest,
    encrypt::{Recipient, encrypt},
    layout::Layout,
    manifest::{Descriptor, INDEX, MANIFEST, Platform, architecture},
    policy::sigstore::{self, Signature},
};
use coffer_replay::{Bench, config, until};
use serde_json::{Value, json};

/// An image of one layer: a bundle's root, and a program that says who and where it is.
fn image(bench: &Bench) -> (Layout, Descriptor) {
    image_of(
        bench,
        "#!/bin/sh\nid -u; id -g; pwd; echo $MODE-$EVIL; cat /etc/message; ls /run\n",
        &json!({"Entrypoint": ["/bin/app"], "User": "app", "Env": ["MODE=verified"], "WorkingDir": "/srv/made"}),
    )
}

/// The same with another program and configuration.
fn image_of(bench: &Bench, program: &str, run: &Value) -> (Layout, Descriptor) {
    use std::os::unix::fs::PermissionsExt;
    let root = bench.bundle("source", &config(&["true"])).join("rootfs");
    fs::write(root.join("bin/app"), program).unwrap();
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
        "config": run,
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
fn an_image_that_cannot_fit_is_refused_before_anything_boots() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let blob = layout.path().join("blobs/sha256").join(manifest.digest.hex());
    let mut text: Value = serde_json::from_slice(&fs::read(blob).unwrap()).unwrap();
    text["layers"][0]["annotations"] = json!({ "io.coffer.layer.unpacked": (1u64 << 30).to_string() });
    let large = layout.put(MANIFEST, text.to_string().as_bytes()).unwrap();
    let mut wants = wants(&layout, &large.digest);
    for (annotation, size, words) in [
        (
            "io.coffer.memory-mib",
            "256",
            "takes 1024 MiB, and its pod has 256 MiB of memory: raise the pod's memory",
        ),
        ("io.coffer.scratch", "512M", "takes 1024 MiB, and its disk has 512 MiB"),
    ] {
        wants["annotations"][annotation] = json!(size);
        let why = refused(&bench, "c", &wants);
        assert!(why.contains(words), "{why}");
    }
    // The guest counts what comes, which is far less than the manifest says: a hint that is too small or large changes nothing else.
    wants["annotations"] = json!({ "io.coffer.image": wants["annotations"]["io.coffer.image"] });
    bench.start("d", &wants);
    bench.wait_stopped("d");
    assert!(bench.read("d.out").contains("from the image"), "{}", bench.read("d.err"));
    let _ = bench.call(&["delete", "--force", "d"]).ok();
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

#[test]
fn the_pod_is_served_while_an_image_waits_for_its_key() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let recipients = [Recipient::Resource { kid: "kbs:///a/b/c".into(), key: vec![1; 32].into() }];
    let made = encrypt(&layout, &manifest, &layout, "secret", &recipients, &AtomicU64::new(0)).unwrap();
    bench.start_silent_kbs();
    let mut member = wants(&layout, &made.digest);
    member["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!("kbs");
    let bundle = bench.bundle("m", &member);
    std::thread::scope(|scope| {
        let create = scope.spawn(|| bench.create("m", &bundle));
        // Its output comes: PID 1 does not wait for the answer itself.
        until(|| bench.read("kbs.out").contains("POST /kbs/v0/auth"));
        let exec = scope.spawn(|| bench.call(&["exec", "beside", "echo", "later"]));
        let _ = bench.call(&["kill", "beside", "USR1"]).ok();
        until(|| bench.read("beside.out") == "asked\n");
        assert!(bench.call(&["ps", "beside"]).ok().contains("sh"));
        assert!(!create.is_finished() && !exec.is_finished());
        let _ = bench.call(&["kill", "kbs", "TERM"]).ok();
        bench.wait_stopped("kbs");
        assert!(bench.read("kbs.out").ends_with("over\n"), "{}", bench.read("kbs.out"));
        let _ = create.join().unwrap().failed(1);
        // What makes a process is done when PID 1 has one thread again.
        assert_eq!(exec.join().unwrap().ok(), "later\n");
    });
    let why = bench.logged("m");
    assert!(why.contains("image: layer") && why.contains("KBS"), "{why}");
}

#[test]
fn a_member_that_is_refused_leaves_nothing_of_its_image_in_the_vm() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let initdata = bench.path("initdata");
    let rules =
        "CreateContainerRequest if not \"/denied\" in [mount.destination | some mount in input.OCI.Mounts]";
    let others = [
        "CreateSandbox",
        "UpdateInterface",
        "StartContainer",
        "ReadStream",
        "SignalProcess",
        "RemoveContainer",
    ]
    .map(|rule| format!("{rule}Request := true\n"))
    .concat();
    let text = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''\npackage agent_policy\nimport rego.v1\n\
         default CreateContainerRequest := false\n{rules}\n{others}'''\n"
    );
    fs::write(&initdata, text).unwrap();
    let mut infra = config(&["sleep", "1000"]);
    infra["annotations"]["io.coffer.initdata"] = json!(initdata);
    bench.start("infra", &infra);
    let mut member = wants(&layout, &manifest.digest);
    member["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!("infra");
    let sound = member["mounts"].clone();
    member["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/denied", "type": "tmpfs", "source": "tmpfs"
    }));
    let why = refused(&bench, "m", &member);
    assert!(why.contains("policy: CreateContainerRequest denied"), "{why}");
    // The same id again, as the owner allows it.
    member["mounts"] = sound;
    bench.start("m", &member);
    bench.wait_stopped("m");
    assert!(bench.read("m.out").contains("from the image"), "{}", bench.read("m.err"));
}

const PRIVATE: &str = include_str!("../../../rootfs/image/testdata/sign/p256.pem");
const PUBLIC: &str = include_str!("../../../rootfs/image/testdata/sign/p256.pub");

/// Initdata with a signature policy that has this rule for `r.io/team`, and rejects everything else.
fn with_rule(bench: &Bench, name: &str, rule: &str) -> PathBuf {
    let file = bench.path(name);
    let text = format!(
        r#"version = "0.1.0"
algorithm = "sha256"
[data]
"cosign.pub" = '''
{PUBLIC}'''
"cdh.toml" = """
[image]
image_security_policy = '''{{"default": [{{"type": "reject"}}], "transports": {{"docker": {{"r.io/team": [{rule}]}}}}}}'''
"""
"#
    );
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn the_owners_signature_policy_decides() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let by_key = with_rule(&bench, "signed.toml", r#"{"type": "sigstoreSigned", "keyPath": "cosign.pub"}"#);
    let with = |initdata: &Path, digest: &Digest, name: Option<&str>| {
        let mut config = wants(&layout, digest);
        config["annotations"]["io.coffer.initdata"] = json!(initdata);
        if let Some(name) = name {
            config["annotations"]["io.coffer.image.name"] = json!(name);
        }
        config
    };
    let runs = |id: &str, config: &Value| {
        bench.start(id, config);
        bench.wait_stopped(id);
        assert!(bench.read(&format!("{id}.out")).contains("from the image"));
    };
    let good = with(&by_key, &manifest.digest, Some("r.io/team/app:1"));
    let why = refused(&bench, "unsigned", &good);
    assert!(why.contains("image: policy: no signature of r.io/team/app:1"), "{why}");
    let sign = |name: &str, digest: &Digest| {
        sigstore::store(&layout, digest, &Signature::sign(PRIVATE, name, digest).unwrap()).unwrap();
    };
    sign("r.io/team/app:1", &manifest.digest);
    runs("signed", &good);
    let why = refused(&bench, "tag", &with(&by_key, &manifest.digest, Some("r.io/team/app:2")));
    assert!(why.contains("it is for r.io/team/app:1"), "{why}");
    for (id, name) in [("scope", Some("r.io/other:1")), ("none", None)] {
        let why = refused(&bench, id, &with(&by_key, &manifest.digest, name));
        assert!(why.contains("is rejected by the rule for default"), "{why}");
    }
    for (id, rule, words) in [
        (
            "openpgp",
            r#"{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "cosign.pub"}"#,
            "cosign.pub: OpenPGP: armoured key: want -----BEGIN PGP PUBLIC KEY BLOCK-----",
        ),
        ("nowhere", r#"{"type": "sigstoreSigned", "keyPath": "/etc/k"}"#, "/etc/k is neither kbs:///"),
    ] {
        let initdata = with_rule(&bench, &format!("{id}.toml"), rule);
        let why = refused(&bench, id, &with(&initdata, &manifest.digest, Some("r.io/team/app:1")));
        assert!(why.contains(words), "{why}");
    }
    // A signature of the index will do for the manifest that is chosen from it.
    let platform =
        Platform { architecture: architecture().into(), os: "linux".into(), variant: None, os_version: None };
    let chosen = Descriptor { platform: Some(platform), ..manifest.clone() };
    let text =
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [chosen], "annotations": {"n": "1"}});
    let index = layout.put(INDEX, text.to_string().as_bytes()).unwrap();
    sign("r.io/team/app:3", &index.digest);
    runs("index", &with(&by_key, &index.digest, Some("r.io/team/app:3")));
    // The host changes what a signature says.
    let mut changed = 0;
    for blob in fs::read_dir(layout.path().join("blobs/sha256")).unwrap().map(|e| e.unwrap().path()) {
        let bytes = fs::read(&blob).unwrap();
        if bytes.starts_with(b"{\"critical\"") {
            let text = String::from_utf8(bytes).unwrap();
            fs::write(&blob, text.replace("r.io/team/app:1", "r.io/team/app:2")).unwrap();
            changed += 1;
        }
    }
    assert_eq!(changed, 2);
    let why = refused(&bench, "forged", &with(&by_key, &manifest.digest, Some("r.io/team/app:2")));
    assert!(why.contains("image: signature: blob sha256:") && why.contains("changed on its way"), "{why}");
}

#[test]
fn the_images_stop_signal_takes_the_place_of_term() {
    let bench = Bench::new();
    let program = "#!/bin/sh\ntrap 'echo usr1' USR1\ntrap 'echo term' TERM\ntrap 'exit 0' INT\necho ready\n\
                   while :; do sleep 0.1; done\n";
    let (layout, manifest) =
        image_of(&bench, program, &json!({"Cmd": ["/bin/app"], "StopSignal": "SIGUSR1"}));
    // What podman writes without --stop-signal, what it writes with it, and what others write.
    for (id, annotation, said) in [("a", Some("15"), "usr1"), ("b", Some("2"), "term"), ("c", None, "usr1")] {
        let mut config = wants(&layout, &manifest.digest);
        if let Some(number) = annotation {
            config["annotations"]["org.opencontainers.image.stopSignal"] = json!(number);
        }
        bench.start(id, &config);
        let out = format!("{id}.out");
        until(|| bench.read(&out).contains("ready"));
        let _ = bench.call(&["kill", id, "TERM"]).ok();
        until(|| bench.read(&out) == format!("ready\n{said}\n"));
        // SAFETY: signals a process of this test's own container.
        assert_eq!(unsafe { libc::kill(bench.pid(id), libc::SIGTERM) }, 0);
        until(|| bench.read(&out) == format!("ready\n{said}\n{said}\n"));
        let _ = bench.call(&["kill", id, "INT"]).ok();
        bench.wait_stopped(id);
        let _ = bench.call(&["delete", id]).ok();
    }
}

#[test]
fn a_stop_signal_that_is_none_is_refused() {
    let bench = Bench::new();
    let (layout, manifest) = image_of(&bench, "", &json!({"Cmd": ["/bin/app"], "StopSignal": "SIGNONE"}));
    let why = refused(&bench, "c", &wants(&layout, &manifest.digest));
    assert!(why.contains("image config: StopSignal \"SIGNONE\" is no signal"), "{why}");
}

/// As `podman cp` and `podman top` look at it: through the namespaces of the container's process on the host.
#[test]
fn tools_of_the_host_find_an_empty_root_that_takes_nothing() {
    let bench = Bench::new();
    let (layout, manifest) = image_of(&bench, "#!/bin/sh\nexec sleep 1000\n", &json!({"Cmd": ["/bin/app"]}));
    let mut config = wants(&layout, &manifest.digest);
    fs::create_dir(bench.path("volume")).unwrap();
    config["mounts"].as_array_mut().unwrap().push(
        json!({ "destination": "/srv", "type": "bind", "source": bench.path("volume"), "options": ["bind"] }),
    );
    bench.start("c", &config);
    let root = PathBuf::from(format!("/proc/{}/root", bench.pid("c")));
    let names: Vec<_> = fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["proc"]);
    for place in ["in", "etc/in", "srv/in", "proc/in"] {
        assert!(fs::write(root.join(place), "x").is_err(), "{place}");
    }
    assert_eq!(fs::create_dir(root.join("made")).unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    for place in [bench.path("c/rootfs/in"), bench.path("c/rootfs/etc/in"), bench.path("volume/in")] {
        assert!(!place.exists(), "{}", place.display());
    }
    // The process itself, as its namespace numbers it.
    assert!(fs::read(root.join("proc/1/cmdline")).unwrap().starts_with(b"echo\0from\0the\0host\0"));
    // The guest has its own files, and the volume.
    assert_eq!(bench.call(&["exec", "c", "cat", "/etc/message"]).ok(), "from the image\n");
    let _ = bench.call(&["exec", "c", "touch", "/srv/seen"]).ok();
    assert!(bench.path("volume/seen").exists());
}

#[test]
fn an_image_is_listed_and_removed() {
    let bench = Bench::new();
    let (layout, manifest) = image(&bench);
    let path = layout.path().display().to_string();
    layout.tag(manifest.clone(), "other").unwrap();
    let key = include_str!("../../../rootfs/image/testdata/sign/p256.pem");
    let signature = Signature::sign(key, "r.io/team/app:1", &manifest.digest).unwrap();
    sigstore::store(&layout, &manifest.digest, &signature).unwrap();
    let blobs = || fs::read_dir(layout.path().join("blobs/sha256")).unwrap().count();

    let said = bench.call(&["image", "list", &path]).ok();
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(words[0], manifest.digest.to_string());
    assert_eq!(words[3..], [format!("{path}:app"), format!("{path}:other")]);
    // The signature is its own too.
    assert!(words[1].parse::<u64>().unwrap() < words[2].parse::<u64>().unwrap(), "{said}");

    let said = bench.call(&["image", "remove", &format!("{path}:none")]).failed(1);
    assert!(said.contains(&format!("{path}:none: it is not in {path}: see coffer image list")), "{said}");
    let said = bench.call(&["image", "remove", &format!("{path}:app")]).ok();
    assert_eq!(said, format!("untagged  {path}:app\nfreed     0 bytes, 0 blobs\n"));
    assert_eq!(blobs(), 6);
    let said = bench.call(&["image", "remove", &format!("{path}@{}", manifest.digest)]).ok();
    assert!(said.contains(&format!("deleted   {}\n", manifest.digest)), "{said}");
    assert!(said.ends_with(&format!("freed     {} bytes, 6 blobs\n", words[2])), "{said}");
    assert_eq!((blobs(), bench.call(&["image", "list", &path]).ok()), (0, String::new()));
}
