//! Secrets in files: sealed ones in what the host mounts into a container, and the credentials that initdata names.
//!
//! Owns: which mounts are volumes of secrets, their copies in this machine's memory, and where credentials lie. Does not own:
//! opening and fetching (coffer-attestation's `Guest`).
//!
//! The host sees what lies in its own directories, so nothing is opened in place: a volume with a sealed file in it is
//! copied, opened there, and mounted in place of the host's. Links are copied, never followed.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink},
    },
    path::{Component, Path, PathBuf},
};

use coffer_protocol::SHARE_DIR;
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    sys::stat::{FileStat, SFlag, fstat, fstatat},
};
use serde_json::{Value, json};
use thiserror::Error;
use zeroize::Zeroizing;

/// Where copies lie, in memory.
const PLACE: &str = "/run/coffer/secrets";
/// Where upstream's configuration has credentials.
const CREDENTIALS: &str = "/run/confidential-containers/cdh";
/// What a sealed file begins with.
const SEALED: &[u8] = b"sealed.";
/// A volume of secrets is no larger: files and directories, levels, bytes of a file.
const MOST_ENTRIES: usize = 256;
const DEEPEST: usize = 4;
const MOST_FILE: u64 = 64 << 10;

/// A secret did not get into its file.
#[derive(Debug, Error)]
pub enum SecretError {
    /// It stays sealed.
    #[error("file {path}: {message}")]
    Sealed {
        /// In the container.
        path: String,
        /// Why.
        message: String,
    },
    /// The system.
    #[error("secrets: {0}: {1}")]
    System(&'static str, io::Error),
}

fn at<E: Into<io::Error>>(stage: &'static str) -> impl FnOnce(E) -> SecretError {
    move |e| SecretError::System(stage, e.into())
}

/// Opens a sealed text, or says why not.
pub type Open<'a> = dyn FnMut(&str) -> Result<Zeroizing<Vec<u8>>, String> + 'a;

/// A part of a volume. Where a host lies it is only ever a copy of the lie.
enum Node {
    File { mode: u32, owner: (u32, u32), bytes: Zeroizing<Vec<u8>> },
    Link { target: PathBuf, owner: (u32, u32) },
    Directory { mode: u32, owner: (u32, u32), children: Vec<(PathBuf, Node)> },
}

/// A volume with a sealed file in it.
pub struct Volume {
    /// Which of the configuration's mounts.
    index: usize,
    node: Node,
}

/// The volumes of secrets among a configuration's bind mounts.
#[must_use]
pub fn find(spec: &Value) -> Vec<Volume> {
    find_below(Path::new(SHARE_DIR), spec)
}

fn find_below(share: &Path, spec: &Value) -> Vec<Volume> {
    let volume = |(index, mount): (usize, &Value)| {
        let inside = mount["source"].as_str().map(Path::new)?.strip_prefix(share).ok()?;
        // What cannot be read is no volume of secrets; mounting it will say what is wrong with it.
        let node = read(share, inside).filter(Node::has_sealed)?;
        Some(Volume { index, node })
    };
    spec["mounts"].as_array().into_iter().flatten().enumerate().filter_map(volume).collect()
}

/// Puts opened copies in place of the volumes that [`find`] has found in this configuration.
///
/// # Errors
/// [`SecretError`], naming the file.
pub fn open_volumes(
    id: &str,
    spec: &mut Value,
    volumes: Vec<Volume>,
    open: &mut Open<'_>,
) -> Result<(), SecretError> {
    open_to(&Path::new(PLACE).join(id), spec, volumes, open)
}

fn open_to(
    place: &Path,
    spec: &mut Value,
    volumes: Vec<Volume>,
    open: &mut Open<'_>,
) -> Result<(), SecretError> {
    for Volume { index, mut node } in volumes {
        let mount = &mut spec["mounts"][index];
        node.open(Path::new(mount["destination"].as_str().unwrap_or_default()), open)?;
        fs::create_dir_all(place).map_err(at("make a place"))?;
        fs::set_permissions(place, fs::Permissions::from_mode(0o700)).map_err(at("close a place"))?;
        let copy = place.join(index.to_string());
        node.write(&copy).map_err(at("copy a volume"))?;
        mount["source"] = json!(copy);
    }
    Ok(())
}

/// Forgets a container's copies.
pub fn remove(id: &str) {
    // It may have had none; what cannot be removed ends with the pod.
    let _ = fs::remove_dir_all(Path::new(PLACE).join(id));
}

/// Writes the owner's credentials, each a path below [`CREDENTIALS`] and a secret.
///
/// # Errors
/// [`SecretError`].
pub fn write_credentials(files: &[(PathBuf, Zeroizing<Vec<u8>>)]) -> Result<(), SecretError> {
    let failed = "write a credential";
    for (path, secret) in files {
        fs::create_dir_all(path.parent().unwrap_or(path)).map_err(at(failed))?;
        let file = File::options().write(true).create(true).truncate(true).mode(0o444).open(path);
        file.and_then(|mut file| file.write_all(secret)).map_err(at(failed))?;
    }
    Ok(())
}

/// Shows the credentials to a container, at the path where initdata has them.
pub fn show_credentials(spec: &mut Value) {
    let mount = json!({ "destination": CREDENTIALS, "type": "bind", "source": CREDENTIALS,
        "options": ["bind", "ro", "nosuid", "nodev", "noexec"] });
    match spec["mounts"].as_array_mut() {
        Some(mounts) => mounts.push(mount),
        None => spec["mounts"] = json!([mount]),
    }
}

/// A whole volume, if it can be one of secrets.
fn read(share: &Path, inside: &Path) -> Option<Node> {
    let plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
    let share = File::open(share).ok().filter(|_| plain)?;
    node(&share, inside, 0, &mut 0).ok()
}

/// Reads without following a link, at no place but below `parent`.
fn node(parent: &impl AsFd, name: &Path, depth: usize, entries: &mut usize) -> Result<Node, Errno> {
    *entries += 1;
    if *entries > MOST_ENTRIES || depth > DEEPEST {
        return Err(Errno::E2BIG);
    }
    let stat = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    match kind(&stat) {
        SFlag::S_IFLNK => {
            let target = readlinkat(parent, name)?;
            Ok(Node::Link { target: target.into(), owner: (stat.st_uid, stat.st_gid) })
        }
        SFlag::S_IFREG | SFlag::S_IFDIR => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            let beneath = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
            let fd = openat2(parent, name, OpenHow::new().flags(flags).resolve(beneath))?;
            // What was opened, not what was there before.
            opened(fd, depth, entries)
        }
        _ => Err(Errno::EINVAL),
    }
}

fn opened(fd: OwnedFd, depth: usize, entries: &mut usize) -> Result<Node, Errno> {
    let stat = fstat(&fd)?;
    let (mode, owner) = (stat.st_mode & 0o777, (stat.st_uid, stat.st_gid));
    match kind(&stat) {
        SFlag::S_IFREG => {
            let mut bytes = Zeroizing::new(Vec::new());
            let read = File::from(fd).take(MOST_FILE + 1).read_to_end(&mut bytes);
            match read {
                Ok(count) if count as u64 <= MOST_FILE => Ok(Node::File { mode, owner, bytes }),
                _ => Err(Errno::EFBIG),
            }
        }
        SFlag::S_IFDIR => {
            let mut children = Vec::new();
            let errno = |e: io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            for entry in fs::read_dir(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(errno)? {
                let name = PathBuf::from(entry.map_err(errno)?.file_name());
                // A name that is a path would lead elsewhere when it is written.
                if name.components().count() != 1
                    || !matches!(name.components().next(), Some(Component::Normal(_)))
                {
                    return Err(Errno::EINVAL);
                }
                let child = node(&fd, &name, depth + 1, entries)?;
                children.push((name, child));
            }
            Ok(Node::Directory { mode, owner, children })
        }
        _ => Err(Errno::EINVAL),
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

impl Node {
    fn has_sealed(&self) -> bool {
        match self {
            Self::File { bytes, .. } => bytes.starts_with(SEALED),
            Self::Link { .. } => false,
            Self::Directory { children, .. } => children.iter().any(|(_, child)| child.has_sealed()),
        }
    }

    /// Opens every sealed file, `path` being where the container will see it.
    fn open(&mut self, path: &Path, open: &mut Open<'_>) -> Result<(), SecretError> {
        match self {
            Self::File { bytes, .. } if bytes.starts_with(SEALED) => {
                let failed =
                    |message: String| SecretError::Sealed { path: path.display().to_string(), message };
                let text = std::str::from_utf8(bytes).map_err(|_| failed("sealed, but not text".into()))?;
                let secret = open(text.trim_end()).map_err(failed)?;
                *bytes = secret;
                Ok(())
            }
            Self::File { .. } | Self::Link { .. } => Ok(()),
            Self::Directory { children, .. } => {
                children.iter_mut().try_for_each(|(name, child)| child.open(&path.join(name), open))
            }
        }
    }

    /// Writes a copy at a path where nothing is.
    fn write(&self, path: &Path) -> io::Result<()> {
        let (Self::File { owner, .. } | Self::Link { owner, .. } | Self::Directory { owner, .. }) = self;
        let mode = match self {
            Self::File { mode, bytes, .. } => {
                File::options().write(true).create_new(true).mode(0o600).open(path)?.write_all(bytes)?;
                Some(*mode)
            }
            Self::Link { target, .. } => {
                symlink(target, path)?;
                None
            }
            Self::Directory { mode, children, .. } => {
                fs::create_dir(path)?;
                children.iter().try_for_each(|(name, child)| child.write(&path.join(name)))?;
                Some(*mode)
            }
        };
        lchown(path, Some(owner.0), Some(owner.1))?;
        mode.map_or(Ok(()), |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A share with one container's mounts 0 and 1 below it, and a configuration that mounts them.
    fn share() -> (tempfile::TempDir, PathBuf, Value) {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        fs::create_dir_all(share.join("c/mounts/0")).unwrap();
        let mount = |n: u32, to: &str| json!({ "destination": to, "source": share.join(format!("c/mounts/{n}")), "type": "bind" });
        let spec = json!({ "mounts": [mount(0, "/etc/secrets"), mount(1, "/etc/hosts"), { "destination": "/proc", "source": "proc" }] });
        (dir, share, spec)
    }

    fn open_below(
        share: &Path,
        place: &Path,
        spec: &mut Value,
        open: &mut Open<'_>,
    ) -> Result<(), SecretError> {
        let volumes = find_below(share, spec);
        open_to(place, spec, volumes, open)
    }

    fn opening(text: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        match text {
            "sealed.good" => Ok(Zeroizing::new(b"opened".to_vec())),
            other => Err(format!("{other} is refused")),
        }
    }

    #[test]
    fn a_volume_as_the_kubelet_makes_it_is_opened_in_a_copy() {
        let (dir, share, mut spec) = share();
        let volume = share.join("c/mounts/0");
        // A directory by time, a link to it, links to files through that.
        fs::create_dir(volume.join("..2026")).unwrap();
        fs::write(volume.join("..2026/key"), "sealed.good\n").unwrap();
        fs::set_permissions(volume.join("..2026/key"), fs::Permissions::from_mode(0o440)).unwrap();
        fs::write(volume.join("..2026/other"), "as it is").unwrap();
        symlink("..2026", volume.join("..data")).unwrap();
        symlink("..data/key", volume.join("key")).unwrap();
        fs::write(share.join("c/mounts/1"), "127.0.0.1 localhost").unwrap();
        let place = dir.path().join("place");
        let before = spec.clone();
        open_below(&share, &place, &mut spec, &mut opening).unwrap();
        let copy = place.join("0");
        assert_eq!(spec["mounts"][0]["source"], json!(copy));
        assert_eq!((&spec["mounts"][1], &spec["mounts"][2]), (&before["mounts"][1], &before["mounts"][2]));
        assert_eq!(fs::read(copy.join("key")).unwrap(), b"opened");
        assert_eq!(fs::read(copy.join("..data/other")).unwrap(), b"as it is");
        let mode = fs::metadata(copy.join("key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o440);
        // The host's own is as it was.
        assert_eq!(fs::read(volume.join("key")).unwrap(), b"sealed.good\n");
    }

    #[test]
    fn a_single_file_is_opened_and_a_broken_one_named() {
        let (dir, share, mut spec) = share();
        fs::write(share.join("c/mounts/1"), "sealed.good").unwrap();
        open_below(&share, &dir.path().join("place"), &mut spec, &mut opening).unwrap();
        assert_eq!(fs::read(dir.path().join("place/1")).unwrap(), b"opened");
        fs::write(share.join("c/mounts/0/token"), "sealed.bad").unwrap();
        let refused = open_below(&share, &dir.path().join("other"), &mut spec, &mut opening).unwrap_err();
        assert_eq!(refused.to_string(), "file /etc/secrets/token: sealed.bad is refused");
    }

    #[test]
    fn links_are_not_followed_and_large_volumes_are_left_alone() {
        let (dir, share, mut spec) = share();
        fs::write(dir.path().join("outside"), "sealed.good").unwrap();
        symlink(dir.path(), share.join("c/mounts/0/link")).unwrap();
        symlink(dir.path().join("outside"), share.join("c/mounts/1")).unwrap();
        let before = spec.clone();
        let mut never = |_: &str| -> Result<Zeroizing<Vec<u8>>, String> { panic!("nothing here is sealed") };
        let place = dir.path().join("place");
        open_below(&share, &place, &mut spec, &mut never).unwrap();
        fs::write(share.join("c/mounts/0/sealed"), "sealed.good").unwrap();
        fs::write(share.join("c/mounts/0/large"), vec![0; MOST_FILE as usize + 1]).unwrap();
        open_below(&share, &place, &mut spec, &mut never).unwrap();
        fs::remove_file(share.join("c/mounts/0/large")).unwrap();
        for n in 0..MOST_ENTRIES {
            fs::write(share.join(format!("c/mounts/0/{n}")), "").unwrap();
        }
        open_below(&share, &place, &mut spec, &mut never).unwrap();
        // A source that names its way out of the share.
        spec["mounts"][2]["source"] = json!(share.join("../outside"));
        open_below(&share, &place, &mut spec, &mut never).unwrap();
        assert_eq!(spec["mounts"][0], before["mounts"][0]);
    }

    #[test]
    fn credentials_are_shown_read_only() {
        let mut spec = json!({ "mounts": [] });
        show_credentials(&mut spec);
        assert_eq!(spec["mounts"][0]["destination"], CREDENTIALS);
        assert!(spec["mounts"][0]["options"].as_array().unwrap().contains(&json!("ro")));
    }
}
