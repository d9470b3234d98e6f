//! `coffer policy`: the owner's policy for one container, or for a pod; and the one that holds without.
//!
//! Owns: getting the configuration that an engine would give to the runtime, and putting it into the form in which the guest
//! will ask. The policy's text is coffer-attestation's. Does not own: the rest of initdata.

mod fields;
mod pod;

use std::{
    fs,
    io::Read,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use coffer_attestation::{
    policy::{Allowed, CLOSED, Unseen, VerifiedImage, create_input, generate, generate_pod, unseen},
    yaml::{self, YamlError},
};
use coffer_layers::{
    config::{ConfigError, Process},
    image::{Image, ImageError, Trust},
    layout::{BlobError, Layout},
    reference::{Reference, ReferenceError},
};
use serde_json::{Value, json};
use thiserror::Error;

use crate::{cli, plan};

/// Shown by `coffer policy --help`.
pub const USAGE: &str = "\
coffer policy: what the host may do with an attested pod

  coffer policy generate [--exec 'WORDS']... [--stdin] podman run OPTIONS IMAGE [WORDS]
                              policy.rego for that container and no other, on stdout; podman only makes the
                              container's configuration, nothing runs (write neither -d nor --rm)
  coffer policy generate [--exec 'WORDS']... [--stdin] --config CONFIG.json
                              the same for a bundle's configuration
  coffer policy generate [--exec 'WORDS']... [--stdin] [--image NAME=LAYOUT@sha256:…]... [--sandbox LAYOUT@sha256:…]
                         --pod MANIFEST.yaml
                              policy.rego for the containers of a Kubernetes pod, or of what has a pod's template;
                              - is stdin. NAME is an image as the manifest has it, its default the annotation
                              io.coffer.image; --sandbox is the engine's own container, which is not admitted without
  coffer policy default       policy.rego that holds under a TEE where initdata has none, to begin another with

The image is the one of the annotation io.coffer.image, which must be readable here. --exec allows a command line, to the
word; --stdin allows the host to write to the container. A network is allowed where there is one: not with podman's --network none, nor
for a configuration whose network namespace is a new one.";

/// What no policy says: the guest takes the user from the verified image, where names are looked up.
const USER: [&str; 3] = ["OCI.Process.User.UID", "OCI.Process.User.GID", "OCI.Process.User.AdditionalGids"];
/// KiB of shared memory that engines give without a word.
const SHARED_KIB: u64 = 65_536_000 / 1024;

/// No policy was written. One line.
#[derive(Debug, Error)]
pub enum Error {
    /// The command line.
    #[error("policy: {0}: see coffer policy --help")]
    Usage(String),
    /// A file.
    #[error("policy: {0}: {1}")]
    File(PathBuf, std::io::Error),
    /// The manifest is not read.
    #[error("policy: {0}: {1}")]
    Yaml(PathBuf, YamlError),
    /// The manifest's pod.
    #[error(transparent)]
    Field(#[from] fields::FieldError),
    /// podman refused.
    #[error("policy: podman: {0}")]
    Podman(String),
    /// The configuration is none that would run.
    #[error("policy: {0}")]
    Bundle(#[from] crate::error::Error),
    /// No image that the guest could verify.
    #[error(
        "policy: the container has no annotation io.coffer.image=LAYOUT@sha256:…: the host could bring any root file system"
    )]
    NoImage,
    /// Something that no policy admits.
    #[error(transparent)]
    Unseen(#[from] Unseen),
    /// The image's name.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The image's layout.
    #[error(transparent)]
    Layout(#[from] BlobError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Runs `coffer policy WORDS...`.
///
/// # Errors
/// [`Error`].
pub fn run(words: &[String]) -> Result<(), Error> {
    let asked = |word: &String| matches!(word.as_str(), "--help" | "-h" | "help");
    match words.split_first() {
        // What follows `podman run` has flags of its own.
        Some((command, words)) if command == "generate" && !words.first().is_some_and(asked) => {
            generate_policy(words)
        }
        Some((command, [])) if command == "default" => {
            cli::show(CLOSED.trim_end());
            Ok(())
        }
        Some((command, [word, ..])) if command == "default" && !asked(word) => {
            Err(Error::Usage(format!("default takes no words: {word:?}")))
        }
        Some((other, _)) if !["default", "generate"].contains(&other.as_str()) && !asked(other) => {
            Err(Error::Usage(format!("unknown command {other:?}")))
        }
        _ => {
            cli::show(USAGE);
            Ok(())
        }
    }
}

fn generate_policy(words: &[String]) -> Result<(), Error> {
    let mut allowed = Allowed::default();
    let (mut images, mut sandbox) = (Vec::new(), None);
    let mut words = words.iter();
    let Recorded { config, shared_kib, network } = loop {
        let word =
            words.next().ok_or_else(|| Error::Usage("podman run …, --config or --pod is missing".into()))?;
        let mut value = || words.next().ok_or_else(|| Error::Usage(format!("{word} wants a value")));
        match word.as_str() {
            "--stdin" => allowed.stdin = true,
            "--exec" => allowed.exec.push(value()?.split_whitespace().map(str::to_owned).collect()),
            "--image" => {
                let wrong = || Error::Usage("--image NAME=LAYOUT@sha256:…".into());
                let (name, layout) = value()?.split_once('=').ok_or_else(wrong)?;
                images.push((name.to_owned(), layout.to_owned()));
            }
            "--sandbox" => sandbox = Some(value()?.clone()),
            "--pod" => {
                let text = read_manifest(value()?)?;
                print!("{}", pod_policy(&text, &images, sandbox.as_deref(), allowed)?);
                return Ok(());
            }
            "--config" => {
                let path = value()?;
                let config = fs::read(path).map_err(|e| Error::File(path.into(), e))?;
                break Recorded { network: has_network(&config), config, shared_kib: SHARED_KIB };
            }
            "podman" => break record(words.as_slice())?,
            other => return Err(Error::Usage(format!("{other:?}"))),
        }
    };
    allowed.network = network;
    let config_value: Value = serde_json::from_slice(&config).unwrap_or_default();
    let name = config_value["annotations"]["io.coffer.image"].as_str().ok_or(Error::NoImage)?;
    let reference: Reference = name.parse()?;
    let layout = Layout::open(&reference.path)?;
    let digest = reference.digest.clone().ok_or(Error::NoImage)?;
    let image = Image::load(&layout, &digest, Trust::Pinned)?;
    let process = image.config.process(None, &[], &[])?;
    let spec = plan::plan(Path::new("/"), "container", &config)?.guest_spec;
    unseen(&spec)?;
    // What the engine will say when it runs something more in there.
    let texts = |at: &str| spec.pointer(at).and_then(Value::as_array).into_iter().flatten();
    allowed.exec_env = texts("/process/env").filter_map(Value::as_str).map(str::to_owned).collect();
    allowed.exec_cwd = spec["process"]["cwd"].as_str().into_iter().map(str::to_owned).collect();
    let spec = as_in_guest(spec, &config_value, process, shared_kib);
    allowed.free = USER.map(str::to_owned).to_vec();
    if spec["hostname"].as_str().is_some_and(is_made_up) {
        allowed.free.push("OCI.Hostname".into());
    }
    let digest = digest.to_string();
    let verified =
        VerifiedImage { digest: &digest, name: config_value["annotations"]["io.coffer.image.name"].as_str() };
    print!("{}", generate(&create_input("container", &spec, Some(verified)), &allowed));
    Ok(())
}

/// A manifest's text, no longer than one that is read.
fn read_manifest(path: &str) -> Result<(PathBuf, String), Error> {
    let failed = |e| Error::File(path.into(), e);
    let file: Box<dyn Read> = if path == "-" {
        Box::new(std::io::stdin())
    } else {
        Box::new(fs::File::open(path).map_err(failed)?)
    };
    let mut text = String::new();
    file.take(yaml::MOST_BYTES as u64 + 1).read_to_string(&mut text).map_err(failed)?;
    Ok((path.into(), text))
}

fn pod_policy(
    (path, text): &(PathBuf, String),
    images: &[(String, String)],
    sandbox: Option<&str>,
    mut allowed: Allowed,
) -> Result<String, Error> {
    let documents = yaml::read(text).map_err(|e| Error::Yaml(path.clone(), e))?;
    let (place, manifest) = pod::find(&documents)?;
    let annotation = manifest.pointer("/metadata/annotations/io.coffer.image").and_then(Value::as_str);
    let known = |name: &str| {
        let given = images.iter().find(|(given, _)| given == name).map(|(_, layout)| layout.as_str());
        let layout = given
            .or(annotation)
            .ok_or_else(|| format!("which it is, is not said: --image {name}=LAYOUT@sha256:…"))?;
        let known = load(layout).map_err(|e| e.to_string())?;
        match name.split_once('@') {
            Some((_, digest)) if digest != known.digest => {
                Err(format!("{name:?}: {layout} has another digest"))
            }
            _ => Ok(known),
        }
    };
    let mut pod = pod::read(&place, manifest, &known)?;
    if let Some(layout) = sandbox {
        pod.containers.push(pod::sandbox(&load(layout)?)?);
    }
    allowed.network = true;
    Ok(generate_pod(&pod.containers, &allowed))
}

/// An image of a layout, by its digest.
fn load(name: &str) -> Result<pod::Known, Error> {
    let reference: Reference = name.parse()?;
    let digest = reference.digest.ok_or(Error::NoImage)?;
    let image = Image::load(&Layout::open(&reference.path)?, &digest, Trust::Pinned)?;
    Ok(pod::Known { digest: digest.to_string(), config: image.config })
}

/// What init makes of a configuration before it asks the policy. `config` is the host's.
fn as_in_guest(mut spec: Value, config: &Value, process: Process, shared_kib: u64) -> Value {
    // Processes that it shares with another container are not its own.
    let namespaces = config.pointer("/linux/namespaces").and_then(Value::as_array).into_iter().flatten();
    let shared =
        namespaces.filter(|n| n["type"] == "pid").any(|n| n["path"].as_str().is_some_and(|p| !p.is_empty()));
    if let Some(own) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut).filter(|_| shared)
    {
        own.retain(|n| n["type"] != "pid");
    }
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        // Where the engine has not mounted it yet, it is not seen to be a tmpfs.
        if mount["destination"] == "/dev/shm" && mount["type"] == "bind" {
            *mount = plan::shared_memory_mount("shm", shared_kib);
        }
    }
    let terminal = spec["process"]["env"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let terminal = terminal.filter(|pair| pair.starts_with("TERM=")).map(str::to_owned).next();
    let env: Vec<String> = process.env.into_iter().chain(terminal).collect();
    spec["process"]["args"] = json!(process.args);
    spec["process"]["env"] = json!(env);
    spec["process"]["cwd"] = json!(process.cwd);
    spec
}

/// The first letters of an id, which podman gives to containers without a name of their own.
fn is_made_up(hostname: &str) -> bool {
    hostname.len() == 12 && hostname.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Removed with all that is in it.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What an engine would give to the runtime.
struct Recorded {
    config: Vec<u8>,
    /// KiB of the container's shared memory.
    shared_kib: u64,
    /// The container has a network.
    network: bool,
}

/// A network namespace that the runtime is to make has nothing in it; in one of the engine's there may be something.
fn has_network(config: &[u8]) -> bool {
    let config: Value = serde_json::from_slice(config).unwrap_or_default();
    let list = config.pointer("/linux/namespaces").and_then(Value::as_array).into_iter().flatten();
    let mut networks = list.filter(|namespace| namespace["type"] == "network");
    !networks.any(|namespace| namespace["path"].as_str().is_none_or(str::is_empty))
}

/// What podman makes of a command line. It gets a runtime that keeps the configuration and starts nothing.
fn record(words: &[String]) -> Result<Recorded, Error> {
    let at = words.iter().position(|word| word == "run");
    let at = at.ok_or_else(|| Error::Usage("podman: only `podman … run` is known".into()))?;
    let scratch = Scratch(std::env::temp_dir().join(format!("coffer-policy-{}", std::process::id())));
    let failed = |e| Error::File(scratch.0.clone(), e);
    fs::DirBuilder::new().mode(0o700).create(&scratch.0).map_err(failed)?;
    let (recorder, kept) = (scratch.0.join("recorder"), scratch.0.join("config.json"));
    let script = format!(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do\n[ \"$1\" != --bundle ] || cp \"$2/config.json\" '{}'\nshift\ndone\nexit 1\n",
        kept.display()
    );
    fs::write(&recorder, script).map_err(failed)?;
    fs::set_permissions(&recorder, fs::Permissions::from_mode(0o700)).map_err(failed)?;
    let mut globals: Vec<&str> = Vec::new();
    let mut before = words[..at].iter();
    while let Some(word) = before.next() {
        match word.as_str() {
            "--runtime" => drop(before.next()),
            word if word.starts_with("--runtime=") => {}
            word => globals.push(word),
        }
    }
    let podman = |more: &[&str]| -> Result<std::process::Output, Error> {
        let mut command = Command::new("podman");
        command.arg("--runtime").arg(&recorder).args(&globals).args(more);
        command.output().map_err(|e| Error::Podman(e.to_string()))
    };
    let mut create = vec!["create"];
    create.extend(words[at + 1..].iter().map(String::as_str));
    let made = podman(&create)?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !made.status.success() {
        return Err(Error::Podman(said(&made.stderr)));
    }
    let id = said(&made.stdout);
    let shared = podman(&["inspect", "--format", "{{.HostConfig.ShmSize}}", &id])?;
    let mode = podman(&["inspect", "--format", "{{.HostConfig.NetworkMode}}", &id])?;
    let asked = podman(&["init", &id])?;
    podman(&["rm", "--force", &id])?;
    let config = fs::read(&kept).map_err(|_| Error::Podman(said(&asked.stderr)))?;
    let shared_kib = said(&shared.stdout).parse::<u64>().map_or(SHARED_KIB, |bytes| bytes / 1024);
    Ok(Recorded { config, shared_kib, network: said(&mode.stdout) != "none" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_the_one_in_which_the_guest_asks() {
        let process = Process {
            args: vec!["/bin/app".into()],
            env: vec!["PATH=/bin".into()],
            cwd: "/srv".into(),
            user: "app".into(),
            stop_signal: None,
        };
        let spec = json!({"process": {"args": ["sh"], "env": ["A=1", "TERM=xterm"], "cwd": "/"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}]},
            "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/x", "options": ["bind"]}]});
        let config =
            json!({"linux": {"namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "ipc"}]}});
        let spec = as_in_guest(spec, &config, process, 64_000);
        assert_eq!(spec["linux"]["namespaces"], json!([{"type": "ipc"}]));
        assert_eq!(
            spec["process"],
            json!({"args": ["/bin/app"], "env": ["PATH=/bin", "TERM=xterm"], "cwd": "/srv"})
        );
        assert_eq!(spec["mounts"][0]["options"][4], "size=64000k");
        assert_eq!((is_made_up("07bd660dcfc2"), is_made_up("web")), (true, false));
    }

    #[test]
    fn a_namespace_that_is_to_be_made_has_no_network() {
        let has = |namespaces: Value| {
            has_network(json!({ "linux": { "namespaces": namespaces } }).to_string().as_bytes())
        };
        assert!(!has(json!([{ "type": "pid" }, { "type": "network" }])));
        assert!(!has(json!([{ "type": "network", "path": "" }])));
        assert!(has(json!([{ "type": "network", "path": "/run/netns/a" }])) && has(json!([])));
    }

    #[test]
    fn what_is_missing_is_said() {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let message = |line: &str| run(&words(line)).unwrap_err().to_string();
        assert!(message("generate").contains("--config or --pod is missing"));
        assert!(message("default x").contains("default takes no words"));
        assert!(message("generate podman ps").contains("only `podman … run`"));
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        fs::write(&config, "{}").unwrap();
        assert!(message(&format!("generate --config {}", config.display())).contains("io.coffer.image"));
    }
}
