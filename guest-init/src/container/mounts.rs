//! The container's root: its mounts in order, devices, what is masked or read-only, pivot.
//!
//! Owns: everything between a new mount namespace and `/` being the container's. Runs in the child.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Component, Path, PathBuf},
};

use coffer_protocol::ErrorKind;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Mount, Spec};

use super::{
    ContainerError, devices,
    options::{self, Options},
    path, places,
};

const NONE: Option<&str> = None;

fn failed(stage: String) -> impl FnOnce(nix::Error) -> ContainerError {
    move |e| ContainerError::guest(&stage, io::Error::from(e))
}

/// Makes everything below the spec's root and leaves `/` the container's. `directories` says which bind sources are.
pub(super) fn set_up(spec: &Spec) -> Result<(), ContainerError> {
    let root = spec.root().as_ref().map(|r| r.path().clone()).unwrap_or_default();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .map_err(failed("make / a slave".into()))?;
    mount(Some(&root), &root, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .map_err(failed(format!("bind the root file system {}", root.display())))?;
    mount(NONE, &root, NONE, MsFlags::MS_PRIVATE, NONE).map_err(failed("make the root private".into()))?;
    let root_fd = || -> Result<OwnedFd, ContainerError> {
        let open = fs::File::open(&root);
        open.map(OwnedFd::from).map_err(|e| ContainerError::guest("open the root file system", e))
    };
    let mut fd = root_fd()?;
    for mount in spec.mounts().iter().flatten() {
        one(fd.as_fd(), &root, mount)?;
        if mount.destination() == Path::new("/") {
            fd = root_fd()?;
        }
    }
    devices::make(fd.as_fd(), spec)?;
    pivot(&root)?;
    match spec.linux().as_ref().and_then(|l| l.rootfs_propagation().as_deref()) {
        None | Some("") => Ok(()),
        Some(word) => {
            let how = options::propagation(word).ok_or_else(|| {
                ContainerError::new(
                    ErrorKind::Invalid,
                    format!("config.json: linux.rootfsPropagation: {word:?}"),
                )
            })?;
            mount(NONE, "/", NONE, how, NONE).map_err(failed(format!("make the root {word}")))
        }
    }
}

/// The place of a mount, as it is after mounting: below `root`, or, where the root itself was mounted over, by its path. No link is
/// left in `target`.
fn opened(root: BorrowedFd<'_>, root_path: &Path, target: &Path) -> Result<OwnedFd, ContainerError> {
    let is_root = target.components().all(|part| matches!(part, Component::RootDir | Component::CurDir));
    let place = match is_root {
        true => fs::File::open(root_path).map(OwnedFd::from),
        false => path::open(root, target),
    };
    place.map_err(|e| ContainerError::guest(&format!("open {}", target.display()), e))
}

fn one(root: BorrowedFd<'_>, root_path: &Path, wanted: &Mount) -> Result<(), ContainerError> {
    let words = wanted.options().clone().unwrap_or_default();
    let options = options::parse(&words);
    let target_path = wanted.destination();
    let stage = |what: &str| format!("{what} {}", target_path.display());
    let source = wanted.source().clone().unwrap_or_default();
    let bind = options.set.contains(MsFlags::MS_BIND) || wanted.typ().as_deref() == Some("bind");
    if matches!(wanted.typ().as_deref(), Some("proc" | "sysfs")) && path::is_link(root, target_path) {
        // Whoever wrote the root would say where they are mounted, and what masks them would lie elsewhere. runc's words.
        let kind = wanted.typ().clone().unwrap_or_default();
        let message =
            format!("{}: filesystem {kind:?} must be mounted on ordinary directory", stage("mount"));
        return Err(ContainerError::new(ErrorKind::Invalid, message));
    }
    let from = match bind {
        true => Some(
            places::open(&source)
                .map_err(|e| ContainerError::guest(&stage(&format!("bind {} at", source.display())), e))?,
        ),
        false => None,
    };
    let is_file = from.as_ref().is_some_and(|from| !Path::new(&path::name(from)).is_dir());
    let target = path::make(root, target_path, is_file)
        .map_err(|e| ContainerError::guest(&stage("make the mount point"), e))?;
    let name = path::name(&target.fd);
    if let Some(from) = from {
        let recursive = options.set & MsFlags::MS_REC;
        mount(Some(path::name(&from).as_str()), name.as_str(), NONE, MsFlags::MS_BIND | recursive, NONE)
            .map_err(failed(stage(&format!("bind {} at", source.display()))))?;
        // The place now is what was mounted there: open it again to change its flags.
        let mounted = opened(root, root_path, &target.path)?;
        let flags = options.set - MsFlags::MS_REC - MsFlags::MS_BIND;
        if !flags.is_empty() {
            let remount = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(NONE, path::name(&mounted).as_str(), NONE, remount, NONE)
                .map_err(failed(stage("remount")))?;
        }
        options
            .recursive
            .apply(&mounted)
            .map_err(|e| ContainerError::guest(&stage("set attributes of"), e))?;
        return propagate(&mounted, &options, &stage("set propagation of"));
    }
    let kind = match wanted.typ().as_deref().unwrap_or("none") {
        // The guest has version 2 only, whatever the host has.
        "cgroup" => "cgroup2",
        other => other,
    };
    let mut data = options.data.clone();
    if kind == "cgroup2" {
        data.clear();
    }
    if kind == "tmpfs" && !target.made && !data.iter().any(|word| word.starts_with("mode=")) {
        data.extend(mode(&target.fd));
    }
    let before = options.copy_up.then(|| fs::File::open(&name)).transpose().ok().flatten();
    // By the configuration's name, which /proc/self/mountinfo shows.
    let device = if source.as_os_str().is_empty() { Path::new(kind) } else { &source };
    mount(Some(device), name.as_str(), Some(kind), options.set, Some(data.join(",").as_str()))
        .map_err(failed(stage(&format!("mount {kind} at"))))?;
    let mounted = opened(root, root_path, &target.path)?;
    if let Some(before) = before {
        let from = PathBuf::from(format!("/proc/self/fd/{}", before.as_raw_fd()));
        copy_tree(&from, Path::new(&path::name(&mounted)), 0)
            .map_err(|e| ContainerError::guest(&stage("copy up"), e))?;
    }
    options.recursive.apply(&mounted).map_err(|e| ContainerError::guest(&stage("set attributes of"), e))?;
    propagate(&mounted, &options, &stage("set propagation of"))
}

/// A tmpfs over a directory has that one's permissions, as with runc; the kernel's own choice would be everybody's.
fn mode(there: &OwnedFd) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;
    let meta = fs::metadata(path::name(there)).ok().filter(fs::Metadata::is_dir)?;
    Some(format!("mode={:o}", meta.permissions().mode() & 0o7777))
}

fn propagate(mounted: &OwnedFd, options: &Options, stage: &str) -> Result<(), ContainerError> {
    let Some(how) = options.propagation else { return Ok(()) };
    mount(NONE, path::name(mounted).as_str(), NONE, how, NONE).map_err(failed(stage.to_owned()))
}

/// Copies what lay under a new tmpfs into it (podman's `tmpcopyup`).
fn copy_tree(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, chown, lchown};
    const DEEPEST: usize = 64;
    if depth > DEEPEST {
        return Err(io::Error::other("directories are nested too deeply"));
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, meta, target) = (entry.file_type()?, entry.metadata()?, to.join(entry.file_name()));
        if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &target)?;
            lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
        } else if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_tree(&entry.path(), &target, depth + 1)?;
            chown(&target, Some(meta.uid()), Some(meta.gid()))?;
            fs::set_permissions(&target, meta.permissions())?;
        } else if kind.is_file() {
            fs::copy(entry.path(), &target)?;
            chown(&target, Some(meta.uid()), Some(meta.gid()))?;
            fs::set_permissions(&target, meta.permissions())?;
        }
    }
    Ok(())
}

/// Makes `root` the root and lets go of the old one. PID 1's own root is the initramfs, which cannot be pivoted away:
/// the new root is moved on top of it instead, and the process changes into it.
fn pivot(root: &Path) -> Result<(), ContainerError> {
    nix::unistd::chdir(root).map_err(failed("enter the root file system".into()))?;
    if nix::unistd::pivot_root(".", ".").is_ok() {
        umount2(".", MntFlags::MNT_DETACH).map_err(failed("let go of the old root".into()))?;
    } else {
        mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)
            .map_err(failed("move the root file system to /".into()))?;
        nix::unistd::chroot(".").map_err(failed("change into the root file system".into()))?;
    }
    nix::unistd::chdir("/").map_err(failed("enter /".into()))
}

/// Nothing is there. Whatever else keeps a path from being looked at would leave it open: that is no reason to go on.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The container's `/dev/null`, when it is that: an image's own in its place, a link say, would be what masks show.
fn null() -> io::Result<OwnedFd> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let file = fs::File::options().read(true).custom_flags(flags).open("/dev/null")?;
    let meta = file.metadata()?;
    match meta.file_type().is_char_device() && meta.rdev() == libc::makedev(1, 3) {
        true => Ok(file.into()),
        false => Err(io::Error::other("the container's /dev/null is something else")),
    }
}

/// Read-only root, masked and read-only paths: after everything that still writes there.
pub(super) fn protect(spec: &Spec) -> Result<(), ContainerError> {
    let linux = spec.linux().as_ref();
    for masked in linux.iter().flat_map(|l| l.masked_paths().iter().flatten()) {
        let hidden = match fs::metadata(masked) {
            Ok(meta) if meta.is_dir() => {
                mount(Some("tmpfs"), masked.as_str(), Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0k"))
            }
            Ok(_) => {
                let null = null().map_err(|e| ContainerError::guest(&format!("mask {masked}"), e))?;
                mount(Some(path::name(&null).as_str()), masked.as_str(), NONE, MsFlags::MS_BIND, NONE)
            }
            Err(e) if is_absent(&e) => continue,
            Err(e) => return Err(ContainerError::guest(&format!("mask {masked}"), e)),
        };
        hidden.map_err(failed(format!("mask {masked}")))?;
    }
    for fixed in linux.iter().flat_map(|l| l.readonly_paths().iter().flatten()) {
        let stage = || format!("make {fixed} read-only");
        match fs::metadata(fixed) {
            Ok(_) => {}
            Err(e) if is_absent(&e) => continue,
            Err(e) => return Err(ContainerError::guest(&stage(), e)),
        }
        mount(Some(fixed.as_str()), fixed.as_str(), NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .map_err(failed(stage()))?;
        let flags = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV
            | MsFlags::MS_NOEXEC;
        mount(NONE, fixed.as_str(), NONE, flags, NONE).map_err(failed(stage()))?;
    }
    if spec.root().as_ref().and_then(|r| r.readonly()).unwrap_or(false) {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(NONE, "/", NONE, flags, NONE).map_err(failed("make the root read-only".into()))?;
    }
    Ok(())
}
