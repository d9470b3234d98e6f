//! The container's root: its mounts in order, devices, what is masked or read-only, pivot.
//!
//! Owns: everything between a new mount namespace and `/` being the container's. Runs in the child.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{LinuxDeviceType, Mount, Spec};

use super::{ContainerError, path};

const NONE: Option<&str> = None;

fn failed(stage: String) -> impl FnOnce(nix::Error) -> ContainerError {
    move |e| ContainerError::guest(&stage, io::Error::from(e))
}

/// A mount's options, sorted into flags, propagation and data.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    set: MsFlags,
    propagation: Option<MsFlags>,
    copy_up: bool,
    data: Vec<String>,
}

fn options(words: &[String]) -> Options {
    let mut options = Options { set: MsFlags::empty(), propagation: None, copy_up: false, data: Vec::new() };
    for word in words {
        let (flag, on) = match word.as_str() {
            "ro" | "rro" => (MsFlags::MS_RDONLY, true),
            "rw" | "rrw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
            "private" => (options.propagate(MsFlags::MS_PRIVATE), true),
            "rprivate" => (options.propagate(MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)), true),
            "slave" => (options.propagate(MsFlags::MS_SLAVE), true),
            "rslave" => (options.propagate(MsFlags::MS_SLAVE.union(MsFlags::MS_REC)), true),
            "shared" => (options.propagate(MsFlags::MS_SHARED), true),
            "rshared" => (options.propagate(MsFlags::MS_SHARED.union(MsFlags::MS_REC)), true),
            "defaults" | "tmpcopyup" | "U" | "z" | "Z" => {
                options.copy_up |= word == "tmpcopyup";
                continue;
            }
            _ => {
                options.data.push(word.clone());
                continue;
            }
        };
        options.set.set(flag, on);
    }
    options
}

impl Options {
    fn propagate(&mut self, how: MsFlags) -> MsFlags {
        self.propagation = Some(how);
        MsFlags::empty()
    }
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
        one(fd.as_fd(), mount)?;
        if mount.destination() == Path::new("/") {
            fd = root_fd()?;
        }
    }
    devices(fd.as_fd(), spec)?;
    pivot(&root)
}

fn one(root: BorrowedFd<'_>, wanted: &Mount) -> Result<(), ContainerError> {
    let words = wanted.options().clone().unwrap_or_default();
    let options = options(&words);
    let target_path = wanted.destination();
    let stage = |what: &str| format!("{what} {}", target_path.display());
    let source = wanted.source().clone().unwrap_or_default();
    let bind = options.set.contains(MsFlags::MS_BIND) || wanted.typ().as_deref() == Some("bind");
    let is_file = bind && !source.is_dir();
    let target = path::make(root, target_path, is_file)
        .map_err(|e| ContainerError::guest(&stage("make the mount point"), e))?;
    let name = path::name(&target);
    if bind {
        let recursive = options.set & MsFlags::MS_REC;
        mount(Some(&source), name.as_str(), NONE, MsFlags::MS_BIND | recursive, NONE)
            .map_err(failed(stage(&format!("bind {} at", source.display()))))?;
        // The place now is what was mounted there: open it again to change its flags.
        let mounted = path::open(root, target_path).map_err(|e| ContainerError::guest(&stage("open"), e))?;
        let flags = options.set - MsFlags::MS_REC - MsFlags::MS_BIND;
        if !flags.is_empty() {
            let remount = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(NONE, path::name(&mounted).as_str(), NONE, remount, NONE)
                .map_err(failed(stage("remount")))?;
        }
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
    let before = options.copy_up.then(|| fs::File::open(&name)).transpose().ok().flatten();
    mount(Some(kind), name.as_str(), Some(kind), options.set, Some(data.join(",").as_str()))
        .map_err(failed(stage(&format!("mount {kind} at"))))?;
    let mounted = path::open(root, target_path).map_err(|e| ContainerError::guest(&stage("open"), e))?;
    if let Some(before) = before {
        let from = PathBuf::from(format!("/proc/self/fd/{}", before.as_raw_fd()));
        copy_tree(&from, Path::new(&path::name(&mounted)), 0)
            .map_err(|e| ContainerError::guest(&stage("copy up"), e))?;
    }
    propagate(&mounted, &options, &stage("set propagation of"))
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

/// The devices that every container has (OCI runtime-linux, "default devices"), and those of the spec.
fn devices(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), ContainerError> {
    let dev =
        path::make(root, Path::new("/dev"), false).map_err(|e| ContainerError::guest("open /dev", e))?;
    let node = |name: &str, kind: u32, mode: u32, major: u64, minor: u64| -> Result<(), ContainerError> {
        let place = CString::new(format!("{}/{name}", path::name(&dev)))
            .map_err(|e| ContainerError::guest("device name", e))?;
        // SAFETY: the name outlives the call.
        let made =
            unsafe { libc::mknod(place.as_ptr(), kind | mode, libc::makedev(major as u32, minor as u32)) };
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if made == 0 => Ok(()),
            Some(libc::EEXIST) => Ok(()),
            // The host's file system takes no devices: this guest's own then lies over an empty file.
            Some(libc::EPERM) if Path::new("/dev").join(name).exists() => bind_device(root, name),
            _ => Err(ContainerError::guest(&format!("make device /dev/{name}"), error)),
        }
    };
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        node(name, libc::S_IFCHR, 0o666, major, minor)?;
    }
    for device in spec.linux().iter().flat_map(|l| l.devices().iter().flatten()) {
        let kind = match device.typ() {
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::P => libc::S_IFIFO,
            _ => libc::S_IFCHR,
        };
        let Ok(name) = device.path().strip_prefix("/dev") else { continue };
        let Some(name) = name.to_str().filter(|n| !n.contains('/') && !n.is_empty()) else { continue };
        node(
            name,
            kind,
            device.file_mode().unwrap_or(0o666) & 0o7777,
            device.major() as u64,
            device.minor() as u64,
        )?;
    }
    for (link, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let place = format!("{}/{link}", path::name(&dev));
        if let Err(e) = symlink(target, &place)
            && e.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(ContainerError::guest(&format!("link /dev/{link}"), e));
        }
    }
    Ok(())
}

/// For a root file system without a tmpfs on `/dev`.
fn bind_device(root: BorrowedFd<'_>, name: &str) -> Result<(), ContainerError> {
    let source = Path::new("/dev").join(name);
    let place = path::make(root, &source, true)
        .map_err(|e| ContainerError::guest(&format!("make a place for device /dev/{name}"), e))?;
    mount(Some(&source), path::name(&place).as_str(), NONE, MsFlags::MS_BIND, NONE)
        .map_err(failed(format!("bind device /dev/{name}")))
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

/// Read-only root, masked and read-only paths: after everything that still writes there.
pub(super) fn protect(spec: &Spec) -> Result<(), ContainerError> {
    let linux = spec.linux().as_ref();
    for masked in linux.iter().flat_map(|l| l.masked_paths().iter().flatten()) {
        let hidden = match fs::metadata(masked) {
            Ok(meta) if meta.is_dir() => {
                mount(Some("tmpfs"), masked.as_str(), Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0k"))
            }
            Ok(_) => mount(Some("/dev/null"), masked.as_str(), NONE, MsFlags::MS_BIND, NONE),
            Err(_) => continue,
        };
        hidden.map_err(failed(format!("mask {masked}")))?;
    }
    for fixed in linux.iter().flat_map(|l| l.readonly_paths().iter().flatten()) {
        if !Path::new(fixed).exists() {
            continue;
        }
        let stage = || format!("make {fixed} read-only");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted_into_flags_propagation_and_data() {
        let words = ["rbind", "ro", "nosuid", "rprivate", "size=64k", "tmpcopyup"].map(str::to_owned);
        let options = options(&words);
        assert_eq!(options.set, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(options.propagation, Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC));
        assert!(options.copy_up);
        assert_eq!(options.data, ["size=64k"]);
    }
}
