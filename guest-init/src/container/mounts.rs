//! The container's root: its mounts in order, devices, what is masked or read-only, pivot.
//!
//! Owns: everything between a new mount namespace and `/` being the container's. Runs in the child.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{lchown, symlink},
    },
    path::{Component, Path},
};

use coffer_protocol::ErrorKind;
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    mount::{MntFlags, MsFlags, mount, umount2},
};
use oci_spec::runtime::{Mount, Spec};

use super::{
    ContainerError, devices,
    options::{self, Options},
    path, places, user,
};

const NONE: Option<&str> = None;

fn failed(stage: String) -> impl FnOnce(nix::Error) -> ContainerError {
    move |e| ContainerError::guest(&stage, io::Error::from(e))
}

/// Mounts that are to be read-only once everything is in them.
#[derive(Default)]
pub(super) struct Late(Vec<OwnedFd>);

/// Makes everything below the spec's root and leaves `/` the container's. `last` is done there while everything of the guest still has its
/// names, too.
pub(super) fn set_up<T>(
    spec: &Spec,
    last: impl FnOnce(BorrowedFd<'_>) -> Result<T, ContainerError>,
) -> Result<(Late, T), ContainerError> {
    let root = spec.root().as_ref().map(|r| r.path().clone()).unwrap_or_default();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)
        .map_err(failed("make / a slave".into()))?;
    // By descriptors: a path of the share is what the host says each time that it is looked up.
    let root_fd = || -> Result<OwnedFd, ContainerError> {
        places::open_directory(&root).map_err(|e| ContainerError::guest("open the root file system", e))
    };
    let mut fd = root_fd()?;
    let place = path::name(&fd);
    mount(Some(place.as_str()), place.as_str(), NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .map_err(failed(format!("bind the root file system {}", root.display())))?;
    // What is there now.
    fd = root_fd()?;
    mount(NONE, path::name(&fd).as_str(), NONE, MsFlags::MS_PRIVATE, NONE)
        .map_err(failed("make the root private".into()))?;
    let mut late = Late::default();
    for mount in spec.mounts().iter().flatten() {
        late.0.extend(one(fd.as_fd(), &root, mount, spec)?);
        if mount.destination() == Path::new("/") {
            fd = root_fd()?;
        }
    }
    devices::make(fd.as_fd(), spec)?;
    let done = last(fd.as_fd())?;
    pivot(&fd)?;
    match spec.linux().as_ref().and_then(|l| l.rootfs_propagation().as_deref()) {
        None | Some("") => {}
        Some(word) => {
            let how = options::propagation(word).ok_or_else(|| {
                ContainerError::new(
                    ErrorKind::Invalid,
                    format!("config.json: linux.rootfsPropagation: {word:?}"),
                )
            })?;
            mount(NONE, "/", NONE, how, NONE).map_err(failed(format!("make the root {word}")))?;
        }
    }
    Ok((late, done))
}

/// The place of a mount, as it is after mounting: below `root`, or, where the root itself was mounted over, by its path. No link is
/// left in `target`.
fn opened(root: BorrowedFd<'_>, root_path: &Path, target: &Path) -> Result<OwnedFd, ContainerError> {
    let is_root = target.components().all(|part| matches!(part, Component::RootDir | Component::CurDir));
    let place = match is_root {
        true => places::open_directory(root_path),
        false => path::open(root, target),
    };
    place.map_err(|e| ContainerError::guest(&format!("open {}", target.display()), e))
}

/// Mounts one; returns it where it is to be read-only later.
fn one(
    root: BorrowedFd<'_>,
    root_path: &Path,
    wanted: &Mount,
    spec: &Spec,
) -> Result<Option<OwnedFd>, ContainerError> {
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
    let target = path::make(root, target_path, is_file, user::root(spec))
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
        propagate(&mounted, &options, &stage("set propagation of"))?;
        return Ok(None);
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
    let data = owners(spec, kind, data).map_err(|word| {
        let message = format!("{}: {word}: the container's user namespace does not have it", stage("mount"));
        ContainerError::new(ErrorKind::Invalid, message)
    })?;
    // What is no directory has nothing to copy, and one that waits for its other end is not waited for.
    let before = options.copy_up.then(|| directory(&target.fd)).transpose().ok().flatten();
    // By the configuration's name, which /proc/self/mountinfo shows.
    let device = if source.as_os_str().is_empty() { Path::new(kind) } else { &source };
    // As with runc: what lay there, places for mounts below and devices are still to come into these.
    let late = options.set.contains(MsFlags::MS_RDONLY)
        && (kind == "tmpfs" || Path::new("/").join(target_path) == Path::new("/dev"));
    let flags = if late { options.set - MsFlags::MS_RDONLY } else { options.set };
    mount(Some(device), name.as_str(), Some(kind), flags, Some(data.join(",").as_str()))
        .map_err(failed(stage(&format!("mount {kind} at"))))?;
    let mounted = opened(root, root_path, &target.path)?;
    if let ("devpts", Some((user, group))) = (kind, user::root(spec)) {
        lchown(format!("{}/ptmx", path::name(&mounted)), Some(user), Some(group))
            .map_err(|e| ContainerError::guest(&stage("give its owner"), e))?;
    }
    if let Some(before) = before {
        copy_tree(&before, &mounted, 0).map_err(|e| ContainerError::guest(&stage("copy up"), e))?;
    }
    options.recursive.apply(&mounted).map_err(|e| ContainerError::guest(&stage("set attributes of"), e))?;
    propagate(&mounted, &options, &stage("set propagation of"))?;
    Ok(late.then_some(mounted))
}

/// A file system's data with whom they name as they are outside: it is mounted from there, where a host's runtime does that from within the
/// container's user namespace. Who is not named is the container's root. The error is the word that names nobody.
fn owners(spec: &Spec, kind: &str, data: Vec<String>) -> Result<Vec<String>, String> {
    let Some((user, group)) = user::root(spec) else { return Ok(data) };
    let mut owned = Vec::with_capacity(data.len() + 2);
    let (mut has_user, mut has_group) = (false, false);
    for word in data {
        // What is no number is for the kernel to refuse.
        let id = |name: &str| word.strip_prefix(name).and_then(|id| id.parse::<u32>().ok());
        let outside = match (id("uid="), id("gid=")) {
            (Some(uid), _) => {
                has_user = true;
                user::outside(spec, uid).map(|uid| format!("uid={uid}"))
            }
            (_, Some(gid)) => {
                has_group = true;
                user::outside_group(spec, gid).map(|gid| format!("gid={gid}"))
            }
            _ => Some(word.clone()),
        };
        owned.push(outside.ok_or(word)?);
    }
    if kind == "tmpfs" && !has_user {
        owned.push(format!("uid={user}"));
    }
    // A terminal that one of the guest's processes opens is that one's group's.
    if matches!(kind, "tmpfs" | "devpts") && !has_group {
        owned.push(format!("gid={group}"));
    }
    Ok(owned)
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

/// Opens a place that is a directory, to be read.
fn directory(place: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    openat2(place, ".", OpenHow::new().flags(flags)).map_err(Into::into)
}

/// Copies what lay under a new tmpfs into it (podman's `tmpcopyup`). Where that is the host's, each name may be a link by the time it is
/// opened, whatever the directory said: what was opened is looked at, and copied.
fn copy_tree(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    const DEEPEST: usize = 64;
    if depth > DEEPEST {
        return Err(io::Error::other("directories are nested too deeply"));
    }
    let inside =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(inside);
    for entry in fs::read_dir(path::name(from))? {
        let name = entry?.file_name();
        let child = match openat2(from, name.as_os_str(), how) {
            Ok(child) => fs::File::from(child),
            // What is mounted there did not lie there.
            Err(nix::Error::EXDEV) => continue,
            Err(error) => return Err(error.into()),
        };
        let (meta, target) = (child.metadata()?, Path::new(&path::name(to)).join(&name));
        let (user, group) = (Some(meta.uid()), Some(meta.gid()));
        if meta.is_symlink() {
            symlink(readlinkat(&child, "")?, &target)?;
            lchown(&target, user, group)?;
        } else if meta.is_dir() {
            fs::create_dir(&target)?;
            let made = OwnedFd::from(fs::File::open(&target)?);
            copy_tree(&directory(&child.into())?, &made, depth + 1)?;
            fchown(&made, user, group)?;
            fs::File::from(made).set_permissions(meta.permissions())?;
        } else if meta.is_file() {
            let mut made = fs::File::create_new(&target)?;
            io::copy(&mut fs::File::open(path::name(&child.into()))?, &mut made)?;
            fchown(&made, user, group)?;
            made.set_permissions(meta.permissions())?;
        }
    }
    Ok(())
}

/// Makes `root` the root and lets go of the old one. PID 1's own root is the initramfs, which cannot be pivoted away:
/// the new root is moved on top of it instead, and the process changes into it.
fn pivot(root: &OwnedFd) -> Result<(), ContainerError> {
    nix::unistd::fchdir(root).map_err(failed("enter the root file system".into()))?;
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

/// Read-only root and file systems, masked and read-only paths: after everything that still writes there.
pub(super) fn protect(spec: &Spec, late: Late) -> Result<(), ContainerError> {
    for mounted in late.0 {
        options::read_only(&mounted).map_err(|e| ContainerError::guest("make a file system read-only", e))?;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn what_lay_under_a_tmpfs_is_copied_as_it_is_and_a_fifo_is_not_waited_for() {
        let outer = tempfile::tempdir().unwrap();
        let (from, to) = (outer.path().join("from"), outer.path().join("to"));
        fs::create_dir_all(from.join("directory/deeper")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(outer.path().join("secret"), "secret").unwrap();
        fs::write(from.join("directory/deeper/file"), "text").unwrap();
        fs::set_permissions(from.join("directory/deeper/file"), fs::Permissions::from_mode(0o4710)).unwrap();
        fs::set_permissions(from.join("directory"), fs::Permissions::from_mode(0o1750)).unwrap();
        symlink("../secret", from.join("link")).unwrap();
        symlink("..", from.join("directory/up")).unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open = |path: &Path| OwnedFd::from(fs::File::open(path).unwrap());
        copy_tree(&open(&from), &open(&to), 0).unwrap();
        assert_eq!(fs::read(to.join("directory/deeper/file")).unwrap(), b"text");
        let mode = |path: &str| fs::symlink_metadata(to.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("directory/deeper/file"), mode("directory")), (0o4710, 0o1750));
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("../secret"));
        assert_eq!(fs::read_link(to.join("directory/up")).unwrap(), Path::new(".."));
        assert!(!to.join("fifo").exists());
    }
}
