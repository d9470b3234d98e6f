//! Which VM a container goes into: one of its own, or the one of its pod.
//!
//! Owns: recognising a pod by annotations and by a shared network, putting a further container into a VM that runs, taking
//! it out again. Does not own: the container itself.
//!
//! A pod's VM belongs to all its containers: each keeps a link to its socket and holds its lifeline, so that it ends with
//! the last of them, whichever that is.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt, fs::OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
};

use coffer_protocol::{NamespaceKind, SharedNamespace};
use nix::{
    fcntl::{OFlag, openat},
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
    sys::{
        stat::{Mode, SFlag, fstat, mkdirat, mknodat},
        wait::{WaitStatus, waitpid},
    },
    unistd::{Pid as NixPid, mkfifo},
};
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use crate::{
    error::{Error, host},
    pid::Pid,
    plan::{Bind, namespace},
    spawn::clone,
    state::{self, Directory, Record},
};

/// Annotations that name the sandbox a container belongs to: CRI-O's and podman's, containerd's, dockershim's.
const SANDBOX: [&str; 3] =
    ["io.kubernetes.cri-o.SandboxID", "io.kubernetes.cri.sandbox-id", "io.kubernetes.sandbox.id"];
/// A prefix that no id has: a VM's directory whose first container was removed while others still use it.
const ORPHAN: char = '@';

/// A VM that runs, and the container that it was made for.
pub(super) struct Running {
    /// Of the first container.
    pub(super) directory: Directory,
    /// Of the first container.
    pub(super) record: Record,
}

fn sandbox(spec: &Spec) -> Option<&str> {
    let annotations = spec.annotations().as_ref()?;
    SANDBOX.iter().find_map(|key| annotations.get(*key)).map(String::as_str)
}

/// Identity of a namespace.
fn key(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn of_stub(record: &Record, name: &str) -> Option<(u64, u64)> {
    let stub = record.stub.filter(Pid::is_alive)?;
    key(Path::new(&format!("/proc/{}/ns/{name}", stub.pid)))
}

/// The VM that a container belongs into: its sandbox's, or that of the container whose network it shares, because two VMs
/// cannot have one interface. `None`: one of its own.
pub(super) fn find(root: &Path, spec: &Spec, id: &str) -> Option<Running> {
    let alive = |directory: &Directory, record: &Record| {
        record.id != id && record.vmm.is_alive() && directory.socket().exists()
    };
    if let Some(directory) = sandbox(spec).and_then(|id| Directory::of(root, id).ok())
        && let Ok(record) = directory.read()
        && alive(&directory, &record)
    {
        return Some(Running { directory, record });
    }
    let wanted = key(&namespace(spec, Kind::Network).flatten()?)?;
    let mut all = state::all(root).into_iter();
    all.find(|(d, r)| alive(d, r) && of_stub(r, "net") == Some(wanted))
        .map(|(directory, record)| Running { directory, record })
}

/// Which of the configuration's namespaces are another container's of the same VM.
pub(super) fn shared(root: &Path, spec: &Spec, vm: &Running) -> Vec<SharedNamespace> {
    let same_vm: Vec<Record> =
        state::all(root).into_iter().map(|(_, r)| r).filter(|r| r.vmm == vm.record.vmm).collect();
    let kinds = [
        (Kind::Pid, NamespaceKind::Pid, "pid"),
        (Kind::Ipc, NamespaceKind::Ipc, "ipc"),
        (Kind::Uts, NamespaceKind::Uts, "uts"),
    ];
    let owner = |(kind, shared, name): (Kind, NamespaceKind, &str)| {
        let wanted = key(&namespace(spec, kind).flatten()?)?;
        let record = same_vm.iter().find(|r| of_stub(r, name) == Some(wanted))?;
        Some(SharedNamespace { kind: shared, container: record.id.clone() })
    };
    kinds.into_iter().filter_map(owner).collect()
}

/// Makes the lifeline of a new VM: the read end is the VMM's, the other is held by each stub.
pub(super) fn lifeline(directory: &Directory) -> Result<(OwnedFd, OwnedFd), Error> {
    let path = directory.file("lifeline");
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(host("make the lifeline"))?;
    let open = |read: bool, flags| {
        let file = File::options().read(read).write(!read).custom_flags(flags).open(&path);
        file.map(OwnedFd::from).map_err(host("open the lifeline"))
    };
    // A reader first, which must not wait for a writer; afterwards it is to wait.
    let reader = open(true, libc::O_NONBLOCK)?;
    let writer = open(false, 0)?;
    // SAFETY: sets the flags of a descriptor of ours.
    if unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETFL, 0) } < 0 {
        return Err(host("open the lifeline")(io::Error::last_os_error()));
    }
    Ok((reader, writer))
}

/// Makes a VM a further container's, too: its socket and lifeline under the container's own directory.
pub(super) fn share(vm: &Running, directory: &Directory) -> Result<OwnedFd, Error> {
    for name in ["vsock", "lifeline"] {
        fs::hard_link(vm.directory.file(name), directory.file(name)).map_err(host("share the pod's VM"))?;
    }
    // A VMM that has ended reads no more: this must not wait for one.
    let lifeline =
        File::options().write(true).custom_flags(libc::O_NONBLOCK).open(directory.file("lifeline"));
    lifeline.map(OwnedFd::from).map_err(|_| Error::VmGone)
}

/// Shows a further container's files to a VMM that runs, below its shared directory. Its guest may write there, and change what it
/// likes meanwhile.
pub(super) fn show(vm: &Running, binds: &[Bind]) -> Result<(), Error> {
    let trees = binds.iter().map(tree).collect::<Result<Vec<_>, _>>()?;
    let share = vm.directory.file("share");
    inside(&vm.record, || {
        let share = OwnedFd::from(File::open(&share)?);
        for (bind, tree) in binds.iter().zip(&trees) {
            // Looked at here: the source may lie on a mount that this namespace does not have.
            let is_directory = fs::metadata(format!("/proc/self/fd/{}", tree.as_raw_fd()))?.is_dir();
            attach(tree, &place(&share, &bind.target, is_directory)?)?;
        }
        Ok(())
    })
}

/// Makes a place to mount on, below a directory in which somebody else may put links: none is followed, so that nothing is made or
/// emptied anywhere else.
fn place(share: &OwnedFd, target: &Path, is_directory: bool) -> io::Result<OwnedFd> {
    let mut at = share.try_clone()?;
    let mut parts = target.components().peekable();
    while let Some(part) = parts.next() {
        let Component::Normal(name) = part else { return Err(io::ErrorKind::InvalidInput.into()) };
        let wanted = if is_directory || parts.peek().is_some() { OFlag::O_DIRECTORY } else { OFlag::empty() };
        let there = |e: nix::Error| if e == nix::Error::EEXIST { Ok(()) } else { Err(e) };
        if wanted.is_empty() {
            mknodat(&at, name, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0).or_else(there)?;
        } else {
            mkdirat(&at, name, Mode::from_bits_truncate(0o755)).or_else(there)?;
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | wanted;
        at = openat(&at, name, flags, Mode::empty())?;
        // O_PATH opens a link itself, where nothing says that it has to be a directory.
        if SFlag::from_bits_truncate(fstat(&at)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFLNK {
            return Err(nix::Error::ELOOP.into());
        }
    }
    Ok(at)
}

/// Takes a container's files away from a VMM that runs on.
pub(super) fn hide(record: &Record) {
    let Some(share) = record.share.clone() else { return };
    let _ = inside(record, || {
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let points = text.lines().filter_map(|l| l.split(' ').nth(4)).map(PathBuf::from);
        let mut points: Vec<PathBuf> = points.filter(|p| p.starts_with(&share)).collect();
        // What was mounted last goes first.
        points.reverse();
        for point in points {
            let _ = umount2(&point, MntFlags::MNT_DETACH);
        }
        fs::remove_dir_all(&share)
    });
}

/// Whether others use this container's VM.
pub(super) fn has_others(root: &Path, record: &Record) -> bool {
    state::all(root)
        .iter()
        .any(|(_, r)| r.id != record.id && r.vmm == record.vmm && r.stub.is_some_and(|s| s.is_alive()))
}

/// Gives a container's id free while others use the VM whose files are in its directory.
pub(super) fn orphan(root: &Path, directory: &Directory, record: &Record) -> Result<(), Error> {
    let _ = fs::remove_file(directory.file("state.json"));
    let name = format!("{ORPHAN}{}.{}", record.id, record.vmm.pid);
    fs::rename(directory.file(""), root.join(name)).map_err(host("set the pod's VM aside"))
}

/// Removes what [`orphan`] left, once its VM has ended.
pub(super) fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(ORPHAN)
            .and_then(|n| n.rsplit_once('.'))
            .and_then(|(_, p)| p.parse::<i32>().ok());
        if pid.is_some_and(|pid| !Pid::of(pid).is_some_and(|p| p.is_alive())) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Runs in a child in the VMM's mount namespace.
fn inside(record: &Record, work: impl FnOnce() -> io::Result<()>) -> Result<(), Error> {
    let stage = "change what the pod's VMM sees";
    let namespace = File::open(format!("/proc/{}/ns/mnt", record.vmm.pid)).map_err(|_| Error::VmGone)?;
    let Some(child) = clone(0).map_err(host(stage))? else {
        let done = setns(&namespace, CloneFlags::CLONE_NEWNS).map_err(io::Error::from).and_then(|()| work());
        std::process::exit(done.map_or_else(|e| e.raw_os_error().unwrap_or(255), |()| 0));
    };
    match waitpid(NixPid::from_raw(child), None) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        Ok(WaitStatus::Exited(_, code)) => Err(host(stage)(io::Error::from_raw_os_error(code))),
        other => Err(Error::State(format!("{stage}: {other:?}"))),
    }
}

/// A copy of what is mounted at a source, attached nowhere yet.
fn tree(bind: &Bind) -> Result<OwnedFd, Error> {
    let failed = host(format!("open {}", bind.source.display()));
    let Ok(name) = CString::new(bind.source.as_os_str().as_bytes()) else {
        return Err(failed(io::Error::from(io::ErrorKind::InvalidInput)));
    };
    let recursive = if bind.recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive;
    // SAFETY: the name outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, name.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: the call returned a new descriptor that nobody else has.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    if bind.read_only {
        // SAFETY: mount_attr is plain data for which zero is valid.
        let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
        attr.attr_set = libc::MOUNT_ATTR_RDONLY;
        let flags = libc::AT_EMPTY_PATH | if bind.recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: path and attributes outlive the call; the size is theirs.
        let set = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                fd.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const attr,
                size_of::<libc::mount_attr>(),
            )
        };
        if set < 0 {
            return Err(
                host(format!("make {} read-only", bind.source.display()))(io::Error::last_os_error()),
            );
        }
    }
    Ok(fd)
}

fn attach(tree: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    // SAFETY: both names are constants, both descriptors are open.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_managers_annotation_names_the_sandbox() {
        for key in SANDBOX {
            let spec: Spec =
                serde_json::from_value(json!({ "ociVersion": "1.0.2", "annotations": { key: "infra" } }))
                    .unwrap();
            assert_eq!(sandbox(&spec), Some("infra"), "{key}");
        }
        let spec: Spec =
            serde_json::from_value(json!({ "ociVersion": "1.0.2", "annotations": { "a": "b" } })).unwrap();
        assert_eq!(sandbox(&spec), None);
    }

    #[test]
    fn no_link_of_a_guest_leads_out_of_the_share() {
        let outer = tempfile::tempdir().unwrap();
        let share = outer.path().join("share");
        fs::create_dir_all(share.join("linked")).unwrap();
        fs::write(outer.path().join("1"), "the host's").unwrap();
        for (target, link) in
            [(outer.path(), "linked/mounts"), (outer.path(), "self"), (&*outer.path().join("1"), "linked/1")]
        {
            std::os::unix::fs::symlink(target, share.join(link)).unwrap();
        }
        let fd = OwnedFd::from(File::open(&share).unwrap());
        for (target, is_directory) in [
            ("linked/mounts/1", false),
            ("self/rootfs", true),
            ("linked/1", false),
            ("../rootfs", true),
            ("/x", true),
        ] {
            assert!(place(&fd, Path::new(target), is_directory).is_err(), "{target}");
        }
        assert_eq!(fs::read(outer.path().join("1")).unwrap(), b"the host's");
        assert!(!outer.path().join("rootfs").exists());
        for _ in 0..2 {
            place(&fd, Path::new("c/rootfs"), true).unwrap();
            place(&fd, Path::new("c/mounts/0"), false).unwrap();
        }
        assert!(share.join("c/rootfs").is_dir() && share.join("c/mounts/0").is_file());
    }

    #[test]
    fn a_lifeline_ends_with_its_last_holder() {
        let root = tempfile::tempdir().unwrap();
        let first = Directory::of(root.path(), "a").unwrap();
        first.create().unwrap();
        let (reader, writer) = lifeline(&first).unwrap();
        let second = File::options().write(true).open(first.file("lifeline")).unwrap();
        let mut entry = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut hung_up = || {
            // SAFETY: one valid entry.
            unsafe { libc::poll(&raw mut entry, 1, 0) };
            entry.revents & libc::POLLHUP != 0
        };
        drop(writer);
        assert!(!hung_up());
        drop(second);
        assert!(hung_up());
    }
}
