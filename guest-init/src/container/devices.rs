//! Device nodes of a container (OCI runtime specification, config-linux.md, "Default Devices" and "Devices").
//!
//! Owns: making them and their links below the container's root. Does not own: which devices a guest may have, which its
//! kernel decides; who may use them (`device_rules`).

use std::{
    ffi::{CStr, CString},
    fs, io,
    os::{
        fd::BorrowedFd,
        unix::{
            ffi::OsStrExt,
            fs::{lchown, symlink},
        },
    },
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{LinuxDeviceType, Spec};

use super::{
    ContainerError,
    path::{self, Owner},
    user,
};

/// Where nodes are made that the host's file system does not take: what is bound from /run opens no device.
const OWN_NODES: &str = "/dev/coffer-node";

/// A node to make.
struct Node<'a> {
    path: &'a Path,
    kind: u32,
    mode: u32,
    number: (u32, u32),
    owner: Owner,
}

/// Makes the default devices, those of the configuration, and the links into /proc. What is there already stays.
pub(super) fn make(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), ContainerError> {
    let roots = user::root(spec);
    let owner = roots.unwrap_or((0, 0));
    for (name, major, minor) in [
        ("/dev/null", 1, 3),
        ("/dev/zero", 1, 5),
        ("/dev/full", 1, 7),
        ("/dev/random", 1, 8),
        ("/dev/urandom", 1, 9),
        ("/dev/tty", 5, 0),
    ] {
        let path = Path::new(name);
        let node = Node { path, kind: libc::S_IFCHR, mode: 0o666, number: (major, minor), owner };
        one(root, &node, roots)?;
    }
    for device in spec.linux().iter().flat_map(|l| l.devices().iter().flatten()) {
        let kind = match device.typ() {
            LinuxDeviceType::B => libc::S_IFBLK,
            LinuxDeviceType::P => libc::S_IFIFO,
            _ => libc::S_IFCHR,
        };
        let number = |value: i64| u32::try_from(value).unwrap_or(0);
        one(
            root,
            &Node {
                path: device.path(),
                kind,
                mode: device.file_mode().unwrap_or(0o666) & 0o7777,
                number: (number(device.major()), number(device.minor())),
                // Whom the configuration names are the container's.
                owner: (
                    device.uid().and_then(|uid| user::outside(spec, uid)).unwrap_or(owner.0),
                    device.gid().and_then(|gid| user::outside_group(spec, gid)).unwrap_or(owner.1),
                ),
            },
            roots,
        )?;
    }
    let dev = path::make(root, Path::new("/dev"), false, roots)
        .map_err(|e| ContainerError::guest("open /dev", e))?
        .fd;
    for (link, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let place = format!("{}/{link}", path::name(&dev));
        match symlink(target, &place) {
            Ok(()) => {
                if let Some((user, group)) = roots {
                    // As path::make has it.
                    let _ = lchown(&place, Some(user), Some(group));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(ContainerError::guest(&format!("link /dev/{link}"), e)),
        }
    }
    Ok(())
}

/// What has to be made for it is `roots`.
fn one(root: BorrowedFd<'_>, node: &Node<'_>, roots: Option<Owner>) -> Result<(), ContainerError> {
    let failed = |e: io::Error| ContainerError::guest(&format!("make device {}", node.path.display()), e);
    let (Some(parent), Some(name)) = (node.path.parent(), node.path.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    let parent = path::make(root, parent, false, roots).map_err(failed)?.fd;
    let place = CString::new([path::name(&parent).as_bytes(), b"/", name.as_bytes()].concat())
        .map_err(|e| failed(e.into()))?;
    match make_at(&place, node) {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => lay_over(root, node, roots),
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failed(e)),
        _ => Ok(()),
    }
}

/// Makes a node under a name that nobody else changes: this mount namespace, or the guest's own /dev.
fn make_at(place: &CStr, node: &Node<'_>) -> io::Result<()> {
    let number = libc::makedev(node.number.0, node.number.1);
    // The mask takes bits of the mode away, so that it is set after.
    // SAFETY: the name outlives the calls.
    let made = unsafe {
        libc::mknod(place.as_ptr(), node.kind | node.mode, number) == 0
            && libc::lchown(place.as_ptr(), node.owner.0, node.owner.1) == 0
            && libc::chmod(place.as_ptr(), node.mode) == 0
    };
    if made { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The host's file system takes no devices: one of this guest's then lies over an empty file.
fn lay_over(root: BorrowedFd<'_>, node: &Node<'_>, roots: Option<Owner>) -> Result<(), ContainerError> {
    if node.path.starts_with("/dev") && node.path.exists() {
        return bind(root, node.path, node.path, roots);
    }
    let failed = |e: io::Error| ContainerError::guest(&format!("make device {}", node.path.display()), e);
    let own = make_own(node).map_err(failed)?;
    let bound = bind(root, &own, node.path, roots);
    // What is bound needs no name.
    fs::remove_file(&own).map_err(failed)?;
    bound
}

/// A node among the guest's own, under a name that no other container's has meanwhile.
fn make_own(node: &Node<'_>) -> io::Result<PathBuf> {
    let mut number = 0_u64;
    loop {
        let own = PathBuf::from(format!("{OWN_NODES}.{number}"));
        match make_at(&CString::new(own.as_os_str().as_bytes())?, node) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
            made => return made.map(|()| own),
        }
    }
}

fn bind(
    root: BorrowedFd<'_>,
    source: &Path,
    device: &Path,
    roots: Option<Owner>,
) -> Result<(), ContainerError> {
    let failed = |e: io::Error| ContainerError::guest(&format!("bind device {}", device.display()), e);
    let place = path::make(root, device, true, roots).map_err(failed)?.fd;
    mount(Some(source), path::name(&place).as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| failed(e.into()))
}
