//! Which VM a container goes into: one of its own, or the one of its pod.
//!
//! Owns: recognising a pod by annotations and by a shared network, putting a further container into a VM that runs, taking
//! it out again. Does not own: the container itself.
//!
//! A pod's VM belongs to all its containers: each keeps a link to its socket and holds its lifeline, so that it ends with
//! the last of them, whichever that is.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Component, Path, PathBuf},
};

use coffer_protocol::{NamespaceKind, SharedNamespace};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2},
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
    sys::{
        stat::{Mode, SFlag, fstat, mkdirat, mknodat},
        wait::{WaitStatus, waitpid},
    },
    unistd::{Pid as NixPid, UnlinkatFlags, mkfifo, unlinkat},
};
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use crate::{
    cgroup, confidential,
    error::{Error, host},
    image,
    pid::Pid,
    plan::{Bind, namespace},
    spawn::{clone, make_read_only},
    state::{self, Directory, Record},
    volumes::VOLUMES,
};

/// Annotations that name the sandbox a container belongs to: CRI-O's and podman's, containerd's, dockershim's.
const SANDBOX: [&str; 3] =
    ["io.kubernetes.cri-o.SandboxID", "io.kubernetes.cri.sandbox-id", "io.kubernetes.sandbox.id"];
/// A prefix that no id has: a VM's directory whose first container was removed while others still use it.
const ORPHAN: char = '@';
/// The file there that was `state.json`.
const OF_ORPHAN: &str = "vm.json";
/// Directories in each other that are removed of what a guest has left.
const MOST_DEEP: u32 = 128;

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
        return owner(root, &record);
    }
    let wanted = key(&namespace(spec, Kind::Network).flatten()?)?;
    let mut all = state::all(root).into_iter();
    // Any of those in it.
    let (_, record) = all.find(|(d, r)| alive(d, r) && of_stub(r, "net") == Some(wanted))?;
    owner(root, &record)
}

/// The VM that a container is in: where its files are, and what is known of the container that it was made for.
fn owner(root: &Path, record: &Record) -> Option<Running> {
    let mut all = state::all(root).into_iter();
    if let Some((directory, record)) = all.find(|(_, r)| r.vmm == record.vmm && r.share.is_none()) {
        return Some(Running { directory, record });
    }
    let (directory, _) = orphans(root).find(|(_, pid)| *pid == record.vmm.pid)?;
    let first = of_orphan(&directory).filter(|first| first.vmm == record.vmm)?;
    Some(Running { directory, record: first })
}

/// Whether something in a pod may have to wait for a KBS or an image, by annotations of its first container or of one that is asked for.
/// Which volumes have sealed files, and what initdata wants fetched, is the guest's to know.
pub(super) fn may_wait(annotations: &HashMap<String, String>) -> bool {
    confidential::has_initdata(annotations) || annotations.contains_key(image::IMAGE)
}

/// The same of a container that is there.
pub(super) fn waits(root: &Path, record: &Record) -> bool {
    let pods = || owner(root, record).is_some_and(|vm| may_wait(&vm.record.annotations));
    may_wait(&record.annotations) || record.share.is_some() && pods()
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
            let source = fs::metadata(format!("/proc/self/fd/{}", tree.as_raw_fd()))?;
            let place = place(&share, &bind.target, source.is_dir())?;
            let there = fs::metadata(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
            // A volume that another container of the VM has, too.
            if (there.dev(), there.ino()) != (source.dev(), source.ino()) {
                attach(tree, &place)?;
            }
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

/// Takes a container's files away from a VMM that runs on. What it cannot take away stays there: nothing of the host's is reached through it.
pub(super) fn hide(root: &Path, record: &Record) {
    let name = record.share.as_ref().and_then(|share| share.file_name());
    let (Some(name), Some(vm)) = (name, owner(root, record)) else { return };
    let share = vm.directory.file("share");
    let unused = unused(root, record);
    let _ = inside(record, || {
        // As the kernel names it.
        let share = fs::canonicalize(&share)?;
        let own = share.join(name);
        let text = fs::read("/proc/self/mountinfo")?;
        let mut points = mount_points(&text);
        points.retain(|point| {
            point.starts_with(&own) || unused.iter().any(|volume| point.starts_with(share.join(volume)))
        });
        // What was mounted last goes first.
        for point in points.iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        let share = File::open(share)?.into();
        for volume in &unused {
            let _ = unlinkat(&share, volume, UnlinkatFlags::RemoveDir);
        }
        clear(&share, name, MOST_DEEP)
    });
}

/// Directories that a container mounts, which others in its VM may mount as well.
pub(super) fn volumes(binds: &[Bind]) -> Vec<PathBuf> {
    binds.iter().map(|bind| &bind.target).filter(|target| target.starts_with(VOLUMES)).cloned().collect()
}

/// Those of a container that no other in its VM has.
fn unused(root: &Path, record: &Record) -> Vec<PathBuf> {
    let others = state::all(root).into_iter().filter(|(_, r)| r.vmm == record.vmm && r.id != record.id);
    let kept: Vec<PathBuf> = others.flat_map(|(_, r)| r.volumes).collect();
    record.volumes.iter().filter(|volume| !kept.contains(volume)).cloned().collect()
}

/// Where something is mounted, in that order: the fifth field of each line, in which blanks and the like are octal numbers (proc(5)).
fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let fields = mountinfo.split(|byte| *byte == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let plain = |field: &[u8]| {
        let (mut bytes, mut rest) = (Vec::with_capacity(field.len()), field);
        while let [first, after @ ..] = rest {
            let number = after
                .get(..3)
                .filter(|_| *first == b'\\')
                .and_then(|digits| std::str::from_utf8(digits).ok());
            match number.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
                Some(byte) => (bytes, rest) = ([bytes, vec![byte]].concat(), &after[3..]),
                None => {
                    bytes.push(*first);
                    rest = after;
                }
            }
        }
        PathBuf::from(OsString::from_vec(bytes))
    };
    fields.map(plain).collect()
}

/// Removes what is below a name, a guest's files too, and the name: through no link, and into nothing that is mounted there.
fn clear(parent: &OwnedFd, name: &OsStr, deep: u32) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let only_here =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    match openat2(parent, name, OpenHow::new().flags(flags).resolve(only_here)) {
        Ok(directory) => {
            let deep = deep.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?;
            for entry in fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))? {
                clear(&directory, &entry?.file_name(), deep)?;
            }
            Ok(unlinkat(parent, name, UnlinkatFlags::RemoveDir)?)
        }
        Err(nix::Error::ENOTDIR | nix::Error::ELOOP) => {
            Ok(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether others use this container's VM.
pub(super) fn has_others(root: &Path, record: &Record) -> bool {
    state::all(root)
        .iter()
        .any(|(_, r)| r.id != record.id && r.vmm == record.vmm && r.stub.is_some_and(|s| s.is_alive()))
}

/// Gives a container's id free while others use the VM whose files are in its directory.
pub(super) fn orphan(root: &Path, directory: &Directory, record: &Record) -> Result<(), Error> {
    let aside = |e| host("set the pod's VM aside")(e);
    // Its annotations still say what kind of VM that is, and its cgroup is the VM's.
    fs::rename(directory.file("state.json"), directory.file(OF_ORPHAN)).map_err(aside)?;
    let name = format!("{ORPHAN}{}.{}", record.id, record.vmm.pid);
    fs::rename(directory.file(""), root.join(name)).map_err(aside)
}

/// What [`orphan`] has set aside, and the number of each VM's process.
fn orphans(root: &Path) -> impl Iterator<Item = (Directory, i32)> {
    fs::read_dir(root).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let (_, pid) = name.strip_prefix(ORPHAN)?.rsplit_once('.')?;
        Some((Directory::at(entry.path()), pid.parse().ok()?))
    })
}

/// The container that such a VM was made for.
fn of_orphan(directory: &Directory) -> Option<Record> {
    serde_json::from_slice(&fs::read(directory.file(OF_ORPHAN)).ok()?).ok()
}

/// Removes what [`orphan`] left, once its VM has ended.
pub(super) fn sweep(root: &Path) {
    for (directory, pid) in orphans(root) {
        let first = of_orphan(&directory);
        let process = first.as_ref().map_or_else(|| Pid::of(pid), |first| Some(first.vmm));
        if process.is_some_and(|process| process.is_alive()) {
            continue;
        }
        if let Some(path) = first.and_then(|first| first.cgroup) {
            cgroup::remove(&path);
        }
        let _ = directory.remove();
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
        make_read_only(&fd, bind.recursive)
            .map_err(host(format!("make {} read-only", bind.source.display())))?;
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

    /// Sealed files in a volume and credentials are seen in no configuration of the host's: initdata is.
    #[test]
    fn every_container_of_a_pod_with_initdata_may_wait_for_a_kbs() {
        let root = tempfile::tempdir().unwrap();
        let record = |id: &str, vmm: i32, share: Option<&str>, annotations: serde_json::Value| {
            let vmm = json!({ "pid": vmm, "start": 1 });
            let record: Record = serde_json::from_value(json!({
                "id": id, "oci_version": "1.0.2", "bundle": "/b", "rootfs": "/b/rootfs", "annotations": annotations,
                "created": "", "stub": null, "vmm": vmm, "cgroup": null, "share": share,
            }))
            .unwrap();
            let directory = Directory::of(root.path(), id).unwrap();
            fs::create_dir_all(directory.file("")).unwrap();
            directory.write(&record).unwrap();
            record
        };
        let inline = json!({ "io.katacontainers.config.hypervisor.cc_init_data": "H4s" });
        let file = json!({ "io.coffer.initdata": "/i" });
        let image = json!({ "io.coffer.image": "/images/a" });
        let first = record("first", 1, None, file);
        let member = record("member", 1, Some("/s/member"), json!({}));
        let kubernetes = record("kubernetes", 2, None, inline);
        let plain = record("plain", 3, None, json!({}));
        let beside = record("beside", 3, Some("/s/beside"), json!({}));
        let unpacks = record("unpacks", 3, Some("/s/unpacks"), image);
        let found = [&first, &member, &kubernetes, &plain, &beside, &unpacks].map(|r| waits(root.path(), r));
        assert_eq!(found, [true, true, true, false, false, true]);
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
    fn what_is_mounted_is_found_by_its_name() {
        let text = br"22 1 0:5 / / rw - ext4 x rw
23 22 0:6 /a /run/a\040b\134\011 rw shared:1 - tmpfs x rw
24 22 0:6 / /run/\04 rw - tmpfs x rw
";
        let wanted = ["/", "/run/a b\\\t", "/run/\\04"].map(PathBuf::from);
        assert_eq!(mount_points(text), wanted);
    }

    #[test]
    fn clearing_goes_through_no_link() {
        let outer = tempfile::tempdir().unwrap();
        fs::write(outer.path().join("kept"), "").unwrap();
        fs::create_dir_all(outer.path().join("share/c/deep/er")).unwrap();
        fs::write(outer.path().join("share/c/deep/file"), "").unwrap();
        std::os::unix::fs::symlink(outer.path(), outer.path().join("share/c/deep/link")).unwrap();
        std::os::unix::fs::symlink(outer.path(), outer.path().join("share/d")).unwrap();
        let share = OwnedFd::from(File::open(outer.path().join("share")).unwrap());
        clear(&share, OsStr::new("c"), 2).unwrap_err();
        for name in ["c", "d"] {
            clear(&share, OsStr::new(name), 3).unwrap();
        }
        assert_eq!(fs::read_dir(outer.path().join("share")).unwrap().count(), 0);
        assert!(outer.path().join("kept").exists());
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
