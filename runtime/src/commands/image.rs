//! `coffer image`: what an image's owner does with it at home: encrypt, sign, inspect, unpack, pull, list, remove.
//!
//! Owns: the words of these commands and what they print. The work is coffer-layers'.

mod arguments;
mod kept;
mod progress;

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use coffer_layers::{
    config::ConfigError,
    digest::Digest,
    encrypt::{EncryptError, Recipient, encrypt},
    image::{Image, ImageError, Trust},
    layout::{BlobError, Layout},
    manifest::{Descriptor, layer_type},
    ocicrypt::{
        KEYS, KeySource,
        jwe::{JweError, PrivateKey, PublicKey},
        keyprovider::{ProviderError, answer, read_key},
    },
    policy::{
        Name, NameError, Origin, Policy, PolicyError, Signatures, Subject,
        sigstore::{self, Signature, SignatureError},
        simple,
    },
    reference::{Reference, ReferenceError},
    removal::RemovalError,
    unpack::Options,
};
use thiserror::Error;
use zeroize::Zeroizing;

use self::{arguments::Arguments, progress::Progress};
use crate::{
    cli,
    image::SHARED,
    registry::{self, RegistryError},
    storage::{self, StorageError},
};

/// Shown by `coffer image --help`.
pub const USAGE: &str = "\
coffer image: images that only an attested pod can read

  coffer image key FILE                       a new key (32 random bytes) for the KBS
  coffer image encrypt [--key KID=FILE]... [--jwe PUBLIC.pem]... FROM TO
                                              encrypt every layer; KID is kbs:///REPOSITORY/TYPE/TAG
  coffer image pull [--plain-http REGISTRY]... [--authfile FILE] [--authority CERTIFICATES.pem]...
                    NAME [LAYOUT[:TAG]]
                                              from a registry, for this machine; prints what a pod names.
                                              Without LAYOUT into the one that all pods share
  coffer image pull containers-storage:IMAGE [LAYOUT[:TAG]]
                                              what podman has already, by skopeo, as another manifest
  coffer image list [LAYOUT]                  a line each: digest, bytes, bytes that removing it frees, names
  coffer image remove IMAGE...                and the blobs that no other needs, and its signatures. IMAGE is
                                              as pull or list prints it, or sha256:…
  coffer image sign --key PRIVATE.pem --name NAME IMAGE
                                              sign as cosign does (P-256), beside the image
  coffer image inspect IMAGE                  layers, keys that they need, what the image runs
  coffer image unpack [--key KID=FILE]... [--jwe PRIVATE.pem]... [--policy FILE [--name NAME]]
                      [--most BYTES] IMAGE DIRECTORY
                                              check, decrypt and unpack, as a pod does
  coffer image keyprovider [--key FILE]       answer skopeo's key provider protocol on stdin

FROM, TO and IMAGE are [oci:]LAYOUT[:TAG][@DIGEST]. For remove, docker://NAME[@DIGEST] and a bare
DIGEST are of the layout that all pods share, and a digest without a name means all of its names.
An encrypted image is only unpacked by its digest or under a policy (containers-policy.json) that
asks for a signature. NAME is what it is called in a registry, REGISTRY/REPOSITORY[:TAG]; without,
the policy's rules for oci: apply. Passwords are podman login's. Only this machine's registries,
and those of --plain-http, are spoken with without TLS.";

/// A command failed. One line.
#[derive(Debug, Error)]
pub enum Error {
    /// The command line.
    #[error("image: {0}: see coffer image --help")]
    Usage(String),
    /// A reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A layout.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Encrypting.
    #[error(transparent)]
    Encrypt(#[from] EncryptError),
    /// A policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A name.
    #[error("--name: {0}")]
    Name(#[from] NameError),
    /// A signature.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// A registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// podman's storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Images could not be listed or removed.
    #[error(transparent)]
    Removal(#[from] RemovalError),
    /// No such image.
    #[error("image: {0}: it is not in {path}: see coffer image list {path}", path = .1.display())]
    Unknown(String, PathBuf),
    /// A key provider's request.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// A key.
    #[error("{0}: {1}")]
    Key(PathBuf, JweError),
    /// A file.
    #[error("{0}: {1}")]
    File(PathBuf, std::io::Error),
}

/// Runs `coffer image WORDS...`.
///
/// # Errors
/// [`Error`].
pub fn run(words: &[String]) -> Result<(), Error> {
    let asked = |word: &String| matches!(word.as_str(), "--help" | "-h");
    let (Some((command, words)), false) = (words.split_first(), words.iter().any(asked)) else {
        cli::show(USAGE);
        return Ok(());
    };
    let arguments = |flags: &[&'static str], most: usize| Arguments::parse(command, words, flags, most);
    match command.as_str() {
        "key" => key(&arguments(&[], 1)?),
        "encrypt" => encrypt_image(&arguments(&["--key", "--jwe"], 2)?),
        "pull" => pull(&arguments(&["--plain-http", "--authfile", "--authority"], 2)?),
        "list" => kept::list(&arguments(&[], 1)?),
        "remove" => kept::remove(&arguments(&[], usize::MAX)?),
        "inspect" => inspect(&arguments(&[], 1)?),
        "sign" => sign(&arguments(&["--key", "--name"], 1)?),
        "unpack" => unpack(&arguments(&["--key", "--jwe", "--most", "--policy", "--name"], 2)?),
        "keyprovider" => keyprovider(&arguments(&["--key"], 0)?),
        "help" => {
            cli::show(USAGE);
            Ok(())
        }
        other => Err(Error::Usage(format!("unknown command {other:?}"))),
    }
}

fn key(arguments: &Arguments) -> Result<(), Error> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let path = PathBuf::from(arguments.word(0, "FILE")?);
    let mut key = Zeroizing::new([0; 32]);
    let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut *key));
    random.map_err(|e| Error::File("/dev/urandom".into(), e))?;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    file.and_then(|mut file| file.write_all(&*key)).map_err(|e| Error::File(path, e))
}

/// A resource's name and what the KBS holds there.
type NamedKey = (String, Zeroizing<Vec<u8>>);

/// `KID=FILE`, once or more often.
fn named_keys(arguments: &Arguments) -> Result<Vec<NamedKey>, Error> {
    let mut keys = Vec::new();
    for value in arguments.values("--key") {
        let (kid, file) = value
            .split_once('=')
            .filter(|(kid, _)| kid.starts_with("kbs://"))
            .ok_or_else(|| Error::Usage(format!("--key {value:?}: want kbs:///REPOSITORY/TYPE/TAG=FILE")))?;
        keys.push((kid.to_owned(), read_key(file)?));
    }
    Ok(keys)
}

fn pem<T>(file: &str, read: fn(&str) -> Result<T, JweError>) -> Result<T, Error> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::File(file.into(), e))?;
    read(&Zeroizing::new(text)).map_err(|e| Error::Key(file.into(), e))
}

fn descriptor(layout: &Layout, reference: &Reference) -> Result<Descriptor, Error> {
    let Some(digest) = &reference.digest else { return Ok(layout.tagged(reference.tag.as_deref())?) };
    let found = layout.index()?.manifests.into_iter().find(|d| d.digest == *digest);
    found.ok_or_else(|| Error::Usage(format!("{reference}: the layout's index does not name this digest")))
}

fn encrypt_image(arguments: &Arguments) -> Result<(), Error> {
    let from: Reference = arguments.word(0, "FROM")?.parse()?;
    let to: Reference = arguments.word(1, "TO")?.parse()?;
    let mut recipients: Vec<Recipient> =
        named_keys(arguments)?.into_iter().map(|(kid, key)| Recipient::Resource { kid, key }).collect();
    for file in arguments.values("--jwe") {
        recipients.push(Recipient::Jwe(pem(file, PublicKey::from_pem)?));
    }
    let source = Layout::open(&from.path)?;
    let image = descriptor(&source, &from)?;
    let target = Layout::create(&to.path)?;
    let _held = target.hold()?;
    let tag = to.tag.as_deref().or(from.tag.as_deref()).unwrap_or("latest");
    let bytes = AtomicU64::new(0);
    let progress = Progress::start("encrypted", &bytes, 0);
    let made = progress.during(|| encrypt(&source, &image, &target, tag, &recipients, &bytes))?;
    println!("{}:{tag}@{}", to.path.display(), made.digest);
    eprintln!("{} layers encrypted; the digest above is what a pod names", made.layers);
    Ok(())
}

fn pull(arguments: &Arguments) -> Result<(), Error> {
    let name = arguments.word(0, "NAME")?;
    let shared = arguments.word(1, "LAYOUT").is_err();
    let to: Reference = arguments.word(1, "LAYOUT").unwrap_or(SHARED).parse()?;
    if let Some(image) = name.strip_prefix(storage::PREFIX) {
        return pull_stored(image, &to, shared);
    }
    let name = Name::of_image(name)?;
    let registry = name.repository().split('/').next().unwrap_or_default();
    let options = registry::Options {
        plain_http: arguments.values("--plain-http").iter().any(|plain| plain == registry),
        credentials: arguments.values("--authfile").last().map(PathBuf::from),
        authorities: arguments.values("--authority").iter().map(PathBuf::from).collect(),
    };
    let layout = Layout::create(&to.path)?;
    // What has come is in no index yet.
    let _held = layout.hold()?;
    let bytes = AtomicU64::new(0);
    let progress = Progress::start("pulled", &bytes, 0);
    let image = progress.during(|| registry::pull(&name, &layout, &options, &bytes))?;
    if shared {
        let tag = name.tag().map(|tag| format!(":{tag}")).unwrap_or_default();
        // With its digest, by which pods name it: a newer image of the tag does not take its place.
        let name = format!("{}{tag}@{}", name.repository(), image.digest);
        layout.tag(image, &name)?;
        println!("docker://{name}");
        return Ok(());
    }
    let tag = to.tag.as_deref().or(name.tag()).unwrap_or("latest");
    layout.tag(image.clone(), tag)?;
    println!("{}:{tag}@{}", to.path.display(), image.digest);
    Ok(())
}

fn pull_stored(image: &str, to: &Reference, shared: bool) -> Result<(), Error> {
    let layout = Layout::create(&to.path)?;
    let _held = layout.hold()?;
    let made = storage::pull(image, &layout)?;
    let digest = made.digest.clone();
    let mut tag = String::new();
    if shared {
        layout.tag(made, &format!("{}{image}@{digest}", storage::PREFIX))?;
    } else {
        let name = to.tag.as_deref().unwrap_or("latest");
        layout.tag(made, name)?;
        tag = format!(":{name}");
    }
    println!("{}{tag}@{digest}", to.path.display());
    Ok(())
}

fn sign(arguments: &Arguments) -> Result<(), Error> {
    let reference: Reference = arguments.word(0, "IMAGE")?.parse()?;
    let layout = Layout::open(&reference.path)?;
    let _held = layout.hold()?;
    let image = descriptor(&layout, &reference)?;
    let key = arguments.values("--key").last();
    let key = key.ok_or_else(|| Error::Usage("sign: --key PRIVATE.pem is missing".into()))?;
    let text = std::fs::read_to_string(key).map_err(|e| Error::File(key.into(), e))?;
    let name = arguments.values("--name").last();
    let name: Name = name
        .ok_or_else(|| {
            Error::Usage(
                "sign: --name REGISTRY/REPOSITORY[:TAG] is missing: a signature is for a name".into(),
            )
        })?
        .parse()?;
    let signature = Signature::sign(&Zeroizing::new(text), &name.to_string(), &image.digest)?;
    sigstore::store(&layout, &image.digest, &signature)?;
    println!("{}:{}", reference.path.display(), sigstore::tag(&image.digest));
    Ok(())
}

/// The image's name as a policy knows it: in a registry, or the layout's directory.
fn origin(arguments: &Arguments, reference: &Reference) -> Result<Origin, Error> {
    Ok(match arguments.values("--name").last() {
        Some(name) => Origin::Registry(Name::of_image(name)?),
        None => {
            let path = reference.path.canonicalize().map_err(|e| Error::File(reference.path.clone(), e))?;
            Origin::Layout(path.to_string_lossy().into_owned())
        }
    })
}

fn inspect(arguments: &Arguments) -> Result<(), Error> {
    let reference: Reference = arguments.word(0, "IMAGE")?.parse()?;
    let layout = Layout::open(&reference.path)?;
    let named = descriptor(&layout, &reference)?;
    // Only shown, never run: no pin is asked for.
    let image = Image::load(&layout, &named.digest, Trust::Pinned)?;
    let mut text = format!("image     {}\n", named.digest);
    if image.digest != named.digest {
        text += &format!("manifest  {} (of the index, for this machine)\n", image.digest);
    }
    text += &format!("size      {} bytes in {} layers\n", image.size(), image.manifest.layers.len());
    for layer in &image.manifest.layers {
        let (compression, encrypted) = layer_type(layer).map_err(ImageError::from)?;
        let packed = format!("{compression:?}").to_lowercase();
        let wraps: Vec<_> = layer.annotations.keys().filter_map(|name| name.strip_prefix(KEYS)).collect();
        let how = if encrypted { format!("encrypted for {}", wraps.join(", ")) } else { "plain".into() };
        text += &format!("layer     {} {} bytes, {packed}, {how}\n", layer.digest, layer.size);
    }
    match image.config.process(None, &[], &[]) {
        Ok(process) => {
            text += &format!("runs      {:?} as {:?} in {}\n", process.args, process.user, process.cwd);
            process.env.iter().for_each(|entry| text += &format!("env       {entry}\n"));
            if let Some(signal) = process.stop_signal {
                text += &format!("stop      {signal}\n");
            }
        }
        Err(ConfigError::NoCommand) => text += "runs      nothing by itself\n",
        Err(e) => return Err(e.into()),
    }
    print(&text)
}

/// To standard output.
fn print(text: &str) -> Result<(), Error> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        // Its reader has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.map_err(|e| Error::File("standard output".into(), e)),
    }
}

/// Keys from files.
struct Files {
    named: Vec<NamedKey>,
    private: Vec<PrivateKey>,
}

impl KeySource for Files {
    fn resource(&self, kid: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        let found = self.named.iter().find(|(have, _)| have == kid);
        found.map(|(_, key)| key.clone()).ok_or_else(|| format!("no --key {kid}=FILE was given"))
    }

    fn private_keys(&self) -> Result<Vec<PrivateKey>, String> {
        Ok(self.private.clone())
    }
}

fn unpack(arguments: &Arguments) -> Result<(), Error> {
    let reference: Reference = arguments.word(0, "IMAGE")?.parse()?;
    let place = Path::new(arguments.word(1, "DIRECTORY")?);
    let most = arguments.values("--most").last().map_or(Ok(1 << 40), |text| text.parse::<u64>());
    let budget = most.map_err(|e| Error::Usage(format!("--most: {e}")))?;
    let private = arguments.values("--jwe").iter().map(|file| pem(file, PrivateKey::from_pem));
    let keys = Files { named: named_keys(arguments)?, private: private.collect::<Result<_, _>>()? };
    let layout = Layout::open(&reference.path)?;
    let (digest, trust): (Digest, Trust) = match &reference.digest {
        Some(digest) => (digest.clone(), Trust::Pinned),
        None => (layout.tagged(reference.tag.as_deref())?.digest, Trust::Unchecked),
    };
    let image = match arguments.values("--policy").last() {
        None => Image::load(&layout, &digest, trust)?,
        Some(path) => {
            let text = std::fs::read(path).map_err(|e| Error::File(path.into(), e))?;
            let (policy, origin) = (Policy::parse(&text)?, origin(arguments, &reference)?);
            let read_key = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
            Image::judged(&layout, &digest, |digests| {
                let name = match &origin {
                    Origin::Registry(name) => Some(name),
                    Origin::Layout(_) => None,
                };
                let signatures = Signatures {
                    sigstore: sigstore::find(&layout, digests)?,
                    simple: simple::find(&layout, name, digests)?,
                };
                let verdict = policy.check(&Subject { origin: &origin, digests }, &signatures, &read_key)?;
                Ok(if trust == Trust::Pinned { trust } else { verdict.into() })
            })?
        }
    };
    let bytes = AtomicU64::new(0);
    let progress = Progress::start("unpacked", &bytes, image.size());
    let options = Options { privileged: nix::unistd::geteuid().is_root(), budget };
    let report = progress.during(|| image.unpack(&layout, &keys, place, options, &bytes))?;
    eprintln!("{} entries, {} bytes of files", report.entries, report.bytes);
    for (count, what) in
        [(report.skipped_xattrs, "extended attributes"), (report.skipped_devices, "device nodes")]
    {
        if count > 0 {
            eprintln!("{count} {what} were left out: this file system or user cannot have them");
        }
    }
    Ok(())
}

fn keyprovider(arguments: &Arguments) -> Result<(), Error> {
    let mut request = Zeroizing::new(Vec::new());
    let stdin = std::io::stdin().lock().take(1 << 20).read_to_end(&mut request);
    stdin.map_err(|e| Error::File("standard input".into(), e))?;
    let key = arguments.values("--key").last().map(String::as_str);
    println!("{}", answer(&request, "attestation-agent", key)?);
    Ok(())
}
