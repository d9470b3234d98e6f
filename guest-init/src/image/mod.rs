//! Images that the guest unpacks itself: the host shows blobs, this makes of them a root file system and a process.
//!
//! Owns: where trees lie (encrypted memory, or the scratch disk), what the owner said of images, and that a container's program, user and
//! environment come from the verified image and not from the host. Does not own: the formats (coffer-layers).

mod given_up;
mod user;

#[cfg(feature = "fuzz")]
pub use user::user;

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use coffer_layers::{
    config::{ConfigError, Process},
    digest::{Digest, DigestError},
    image::{Image, Trust},
    layout::{Blobs, Folder},
    ocicrypt::{KeySource, NoKeys},
    policy::{
        Name, NameError, Origin, Policy, Signatures, Subject,
        sigstore::{self, MOST_MANIFESTS},
        simple::{self, MOST_SIGNATURES},
    },
    unpack::{Options, UnpackError, make_in},
};
use coffer_protocol::{ImageSource, signal};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use thiserror::Error;

use crate::{
    container::is_in_share,
    scratch::{self, ScratchError},
    thread::Thread,
};
use given_up::UnlessGivenUp;

/// Where trees lie.
const PLACE: &str = "/run/coffer/images";
/// Bytes of memory that are left for programs, whatever an image would take.
const RESERVE: u64 = 24 << 20;

/// An image was refused, or cannot be unpacked here. Each message begins with the stage.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The host's words.
    #[error("image: {0}")]
    Digest(#[from] DigestError),
    /// The host shows something else than its share.
    #[error("image: blobs at {0:?}, which is not in the host's share")]
    Place(String),
    /// The owner wants others.
    #[error("image: {0} is none of the images that the pod's owner allowed")]
    NotAllowed(Digest),
    /// The owner's signature policy cannot be had.
    #[error("image: policy: {0}")]
    NoPolicy(String),
    /// What the host calls it.
    #[error("image: {0}")]
    Name(#[from] NameError),
    /// The host shows too much.
    #[error(
        "image: {0} manifests of signatures and {1} OpenPGP signatures, more than {MOST_MANIFESTS} and {MOST_SIGNATURES}"
    )]
    Signatures(usize, usize),
    /// Its stop signal.
    #[error("image config: StopSignal {0:?} is no signal")]
    StopSignal(String),
    /// By stage.
    #[error("image: {0}")]
    Image(#[from] coffer_layers::image::ImageError),
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Something in its tree.
    #[error("image: {0}")]
    Tree(#[from] UnpackError),
    /// Its user.
    #[error("image: user {0:?}: {1}")]
    User(String, &'static str),
    /// The disk for it.
    #[error("image: {0}")]
    Scratch(#[from] ScratchError),
    /// The system.
    #[error("image: {0}: {1}")]
    System(&'static str, io::Error),
}

/// What the pod's owner said of images, in measured configuration.
pub struct Owner {
    /// The only images that run, by manifest or index; `None` when the owner did not say.
    pub allowed: Option<Vec<Digest>>,
    /// The processor keeps this machine's memory from the host, whose word on an image's digest then counts for nothing.
    pub confidential: bool,
    /// Opens encrypted layers.
    pub keys: Box<dyn KeySource + Send>,
    /// Decides on signatures; `None` when the owner did not say.
    pub signatures: Option<Box<dyn SignaturePolicy + Send>>,
}

/// Where the owner's signature policy and its keys come from.
pub trait SignaturePolicy {
    /// The policy. Asked for at the first image.
    ///
    /// # Errors
    /// Why it cannot be had, in words.
    fn policy(&self) -> Result<Policy, String>;

    /// A public key that the policy names by path.
    ///
    /// # Errors
    /// As [`Self::policy`].
    fn key(&self, path: &str) -> Result<Vec<u8>, String>;
}

/// The images of the pod.
pub struct Images {
    work: Arc<Mutex<Work>>,
    /// One was asked for, so there may be trees.
    any: bool,
}

/// What one thread at a time has: the one that unpacks.
struct Work {
    owner: Owner,
    room: Room,
    mounted: bool,
}

/// An image on its way to a tree.
pub(crate) struct Unpacking {
    thread: Thread<Result<Unpacked, ImageError>>,
    given_up: Arc<AtomicBool>,
}

impl Unpacking {
    /// Nobody waits for it any more: it ends at the next bytes of a blob.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// What it became; see [`Thread::end`].
    ///
    /// # Errors
    /// When the thread panicked.
    pub(crate) fn end(self) -> io::Result<Result<Unpacked, ImageError>> {
        self.thread.end()
    }
}

#[cfg(test)]
impl Unpacking {
    /// One that ends when it is given up, or after a minute.
    pub(crate) fn endless() -> Self {
        let given_up = Arc::new(AtomicBool::new(false));
        let flag = given_up.clone();
        let wait = move || {
            let began = std::time::Instant::now();
            while !flag.load(Ordering::Relaxed) && began.elapsed().as_secs() < 60 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            Err(ImageError::System("unpack", io::ErrorKind::Interrupted.into()))
        };
        Self { thread: Thread::begin("image", wait).unwrap(), given_up }
    }
}

impl AsFd for Unpacking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.thread.as_fd()
    }
}

/// What trees lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// A tmpfs.
    Memory,
    /// The host's disk, encrypted.
    Disk,
}

impl Default for Images {
    fn default() -> Self {
        Self::new(
            Owner { allowed: None, confidential: true, keys: Box::new(NoKeys), signatures: None },
            Room::Memory,
        )
    }
}

/// A tree and what runs in it.
#[derive(Debug)]
pub struct Unpacked {
    root: PathBuf,
    process: Process,
    stop_signal: Option<u32>,
}

impl Images {
    /// With an owner's word.
    #[must_use]
    pub fn new(owner: Owner, room: Room) -> Self {
        Self { work: Arc::new(Mutex::new(Work { owner, room, mounted: false })), any: false }
    }

    /// Begins to unpack a container's image. Nothing of it can be seen by anybody before all of it held.
    ///
    /// # Errors
    /// [`ImageError`] without a thread; what is wrong with the image its end says.
    pub(crate) fn unpack(&mut self, id: &str, source: &ImageSource) -> Result<Unpacking, ImageError> {
        let (work, id, source) = (self.work.clone(), id.to_owned(), source.clone());
        self.any = true;
        let given_up = Arc::new(AtomicBool::new(false));
        let flag = given_up.clone();
        let unpack = move || work.lock().unwrap_or_else(PoisonError::into_inner).unpack(&id, &source, flag);
        let thread = Thread::begin("image", unpack)
            .map_err(|e| ImageError::System("unpack beside the pod's containers", e))?;
        Ok(Unpacking { thread, given_up })
    }

    /// Forgets a container's tree.
    pub fn remove(&self, id: &str) {
        if self.any {
            // It may have had no image. What cannot be removed ends with the pod.
            let _ = fs::remove_dir_all(Path::new(PLACE).join(id));
        }
    }
}

impl Work {
    fn unpack(
        &mut self,
        id: &str,
        source: &ImageSource,
        given_up: Arc<AtomicBool>,
    ) -> Result<Unpacked, ImageError> {
        let digest: Digest = source.digest.parse()?;
        let blobs = Path::new(&source.blobs);
        if !is_in_share(blobs) {
            return Err(ImageError::Place(source.blobs.clone()));
        }
        let blobs = UnlessGivenUp::new(Folder(blobs.to_owned()), given_up);
        let image = self.load(&blobs, &digest, source)?;
        let process = image.config.process(None, &[], &[])?;
        let stop_signal = match &process.stop_signal {
            Some(text) => Some(signal::parse(text).ok_or_else(|| ImageError::StopSignal(text.clone()))?),
            None => None,
        };
        self.mount()?;
        let root = Path::new(PLACE).join(id);
        let budget = match self.room {
            Room::Memory => available()?.saturating_sub(RESERVE),
            Room::Disk => scratch::free(Path::new(PLACE))?,
        };
        let options = Options { privileged: true, budget };
        image.unpack(&blobs, &*self.owner.keys, &root, options, &AtomicU64::new(0))?;
        Ok(Unpacked { root, process, stop_signal })
    }

    /// The image, when the owner's list and the owner's signature policy let it run, as far as there are such.
    fn load(&self, blobs: &dyn Blobs, digest: &Digest, source: &ImageSource) -> Result<Image, ImageError> {
        let trust = self.trust(digest)?;
        let Some(owners) = &self.owner.signatures else { return Ok(Image::load(blobs, digest, trust)?) };
        let (listed, simple) = (&source.signatures, &source.simple_signatures);
        if listed.len() > MOST_MANIFESTS || simple.len() > MOST_SIGNATURES {
            return Err(ImageError::Signatures(listed.len(), simple.len()));
        }
        let policy = owners.policy().map_err(ImageError::NoPolicy)?;
        let origin = match &source.name {
            Some(name) => Origin::Registry(Name::of_image(name)?),
            None => Origin::Layout(String::new()),
        };
        let listed = listed.iter().map(|text| text.parse()).collect::<Result<Vec<Digest>, _>>()?;
        let simple = simple.iter().map(|text| simple::Signature::from_text(text)).collect();
        let mut signatures = Signatures { sigstore: Vec::new(), simple };
        Ok(Image::judged(blobs, digest, |digests| {
            for manifest in &listed {
                signatures.sigstore.extend(sigstore::read(blobs, manifest)?);
            }
            let subject = Subject { origin: &origin, digests };
            let verdict = policy.check(&subject, &signatures, &|path| owners.key(path))?;
            // A pin is worth no less for a policy that asks for no signature.
            Ok(if trust == Trust::Pinned { trust } else { verdict.into() })
        })?)
    }

    /// A digest that comes from the host is a pin only where the host is trusted, or where the owner allowed it.
    fn trust(&self, digest: &Digest) -> Result<Trust, ImageError> {
        match &self.owner.allowed {
            Some(allowed) if allowed.contains(digest) => Ok(Trust::Pinned),
            Some(_) => Err(ImageError::NotAllowed(digest.clone())),
            None if self.owner.confidential => Ok(Trust::Unchecked),
            None => Ok(Trust::Pinned),
        }
    }

    fn mount(&mut self) -> Result<(), ImageError> {
        if self.mounted {
            return Ok(());
        }
        fs::create_dir_all(PLACE).map_err(|e| ImageError::System("make a place", e))?;
        if self.room == Room::Disk {
            scratch::mount_on(PLACE)?;
            fs::set_permissions(PLACE, fs::Permissions::from_mode(0o700))
                .map_err(|e| ImageError::System("close a place", e))?;
            self.mounted = true;
            return Ok(());
        }
        // The budget is counted while unpacking; tmpfs' own half of memory would be less than what fits.
        let data = Some("mode=700,size=100%");
        mount(Some("tmpfs"), PLACE, Some("tmpfs"), MsFlags::MS_NODEV, data)
            .map_err(|e| ImageError::System("mount a place", e.into()))?;
        self.mounted = true;
        Ok(())
    }
}

/// The annotation by which podman says which signal it stops a container with.
const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";

impl Unpacked {
    /// The signal that ends its program in the image's sense, where that is not [`signal::TERM`]. A caller who said another to his engine
    /// (`--stop-signal`) keeps his own.
    #[must_use]
    pub fn stop_signal(&self, spec: &Value) -> Option<u32> {
        let engines = spec["annotations"][STOP_SIGNAL].as_str().and_then(signal::parse);
        self.stop_signal.filter(|signal| *signal != signal::TERM && engines.is_none_or(|e| e == signal::TERM))
    }

    /// The image's own StopSignal, whatever a caller said.
    #[must_use]
    pub fn images_stop_signal(&self) -> Option<u32> {
        self.stop_signal
    }

    /// Puts the image's root, program, environment, user and directory in place of the host's. Of the host's environment only the
    /// terminal's name stays: the rest could change what a program does. Where the owner left the process to the host
    /// (`hosts_process`), all of it stays, and the image's variables are those that the host does not set.
    ///
    /// # Errors
    /// [`ImageError`] when the user is not one of the image.
    pub fn apply(self, spec: &mut Value, hosts_process: bool) -> Result<(), ImageError> {
        let root: OwnedFd =
            fs::File::open(&self.root).map_err(|e| ImageError::System("open the tree", e))?.into();
        if hosts_process {
            make_in(&root, spec["process"]["cwd"].as_str().unwrap_or("/"))?;
            let hosts = spec["process"]["env"].as_array().cloned().unwrap_or_default();
            let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
            let set: Vec<String> = hosts.iter().filter_map(Value::as_str).map(name).collect();
            let images =
                self.process.env.into_iter().filter(|pair| !set.contains(&name(pair))).map(Value::from);
            spec["process"]["env"] = images.chain(hosts).collect();
            spec["root"]["path"] = self.root.to_string_lossy().into();
            return Ok(());
        }
        let user = user::resolve(&root, &self.process.user)?;
        make_in(&root, &self.process.cwd)?;
        let host_env = spec["process"]["env"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let name = |text: &&str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"=-_.+".contains(&b));
        let terminal = host_env.filter(|entry| entry.starts_with("TERM=")).find(name).map(str::to_owned);
        let env: Vec<_> = self.process.env.into_iter().chain(terminal).collect();
        spec["root"]["path"] = self.root.to_string_lossy().into();
        spec["process"]["args"] = json!(self.process.args);
        spec["process"]["env"] = json!(env);
        spec["process"]["cwd"] = json!(self.process.cwd);
        let umask = spec["process"]["user"]["umask"].clone();
        spec["process"]["user"] = json!({"uid": user.uid, "gid": user.gid, "additionalGids": user.groups});
        if umask.is_u64() {
            spec["process"]["user"]["umask"] = umask;
        }
        Ok(())
    }
}

/// Bytes of memory that can be had now.
fn available() -> Result<u64, ImageError> {
    let failed = |e| ImageError::System("read /proc/meminfo", e);
    let text = fs::read_to_string("/proc/meminfo").map_err(failed)?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|n| n.trim().parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(blobs: &str) -> ImageSource {
        ImageSource {
            blobs: blobs.into(),
            digest: Digest::sha256(b"x").to_string(),
            name: None,
            signatures: Vec::new(),
            simple_signatures: Vec::new(),
        }
    }

    #[test]
    fn only_allowed_images_of_the_share() {
        let of = |images: &mut Images, source| {
            images.unpack("a", &source).and_then(|thread| thread.end().unwrap())
        };
        let mut images = Images::default();
        for blobs in ["/etc", "/run/coffer/share/../../etc", "/run/coffer//share/a/image", "relative"] {
            assert!(matches!(of(&mut images, source(blobs)), Err(ImageError::Place(_))), "{blobs}");
        }
        let allowed = Some(vec![Digest::sha256(b"y")]);
        let mut images = Images::new(
            Owner { allowed, confidential: false, keys: Box::new(NoKeys), signatures: None },
            Room::Memory,
        );
        let refused = of(&mut images, source("/run/coffer/share/a/image"));
        assert!(matches!(refused, Err(ImageError::NotAllowed(_))));
    }

    #[test]
    fn the_host_has_no_say_in_the_process_unless_the_owner_left_it_to_him() {
        let dir = tempfile::tempdir().unwrap();
        let process = Process {
            args: vec!["/bin/app".into()],
            env: vec!["PATH=/bin".into(), "B=2".into()],
            cwd: "/srv/data".into(),
            user: "7:8".into(),
            stop_signal: None,
        };
        let mut spec = json!({"root": {"path": "/host"}, "process": {"terminal": true, "cwd": "/", "args": ["sh"],
            "env": ["LD_PRELOAD=/evil", "TERM=xterm", "TERM=x\ny"], "user": {"uid": 0, "gid": 0, "umask": 18}}});
        let unpacked =
            || Unpacked { root: dir.path().to_owned(), process: process.clone(), stop_signal: None };
        let mut left = spec.clone();
        left["process"]["cwd"] = json!("/work");
        left["process"]["env"] = json!(["PATH=/host", "A=1"]);
        let mut wanted = left["process"].clone();
        unpacked().apply(&mut left, true).unwrap();
        wanted["env"] = json!(["B=2", "PATH=/host", "A=1"]);
        assert_eq!(left, json!({"root": {"path": dir.path()}, "process": wanted}));
        assert!(dir.path().join("work").is_dir());
        unpacked().apply(&mut spec, false).unwrap();
        assert_eq!(
            spec,
            json!({"root": {"path": dir.path()}, "process": {"terminal": true, "cwd": "/srv/data",
                "args": ["/bin/app"], "env": ["PATH=/bin", "B=2", "TERM=xterm"],
                "user": {"uid": 7, "gid": 8, "additionalGids": [], "umask": 18}}})
        );
        assert!(dir.path().join("srv/data").is_dir());
    }
}
