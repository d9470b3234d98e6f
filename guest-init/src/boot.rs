//! From the first instruction of PID 1 to a machine that containers can run in, and its end.
//!
//! Owns: marks, mounts, the vsock listener, the orderly end. Does not own: what comes over vsock.

use std::{
    fs,
    io::{self, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use coffer_layout::{MARK_PORT, mark};
use coffer_protocol::{CONTROL_PORT, READY_PORT, SHARE_DIR, SHARE_TAG};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket},
    },
};
use thiserror::Error;

/// The machine cannot be made ready.
#[derive(Debug, Error)]
#[error("{stage}: {source}")]
pub struct BootError {
    stage: String,
    source: io::Error,
}

fn at(stage: impl Into<String>) -> impl FnOnce(nix::Error) -> BootError {
    move |e| BootError { stage: stage.into(), source: e.into() }
}

/// Asks for the right to write to the mark port. Without it marks are lost, nothing else.
pub fn allow_marks() {
    // SAFETY: changes only which ports this process may use.
    let allowed = unsafe { libc::ioperm(u64::from(MARK_PORT), 1, 1) } == 0;
    MARKS.store(allowed, Ordering::Relaxed);
}

static MARKS: AtomicBool = AtomicBool::new(false);

/// Tells the VMM that a stage is reached. Does nothing unless [`allow_marks`] got the right to.
pub fn tell(byte: u8) {
    if !MARKS.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: `ioperm` allowed this port, and writing to it has no effect on memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") MARK_PORT, in("al") byte, options(nomem, nostack, preserves_flags));
    }
}

/// Mounts what every process expects. Directories exist in the initramfs.
///
/// # Errors
/// [`BootError`], naming the mount.
pub fn mount_all() -> Result<(), BootError> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    for (kind, target, flags, data) in [
        ("proc", "/proc", safe, ""),
        ("sysfs", "/sys", safe, ""),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755"),
        ("tmpfs", "/run", safe, "mode=755"),
        ("tmpfs", "/tmp", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777"),
        ("devpts", "/dev/pts", quiet, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("tmpfs", "/dev/shm", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", safe, "nsdelegate"),
    ] {
        if !Path::new(target).exists() {
            let failed = |source| BootError { stage: format!("make {target}"), source };
            fs::create_dir(target).map_err(failed)?;
        }
        mount(Some(kind), target, Some(kind), flags, Some(data)).map_err(at(format!("mount {target}")))?;
    }
    let failed = |source| BootError { stage: format!("make {SHARE_DIR}"), source };
    fs::create_dir_all(SHARE_DIR).map_err(failed)?;
    delegate_controllers("/sys/fs/cgroup");
    // A container may have a lease on a program (F_SETLEASE), and whoever runs that waits for so long, init with it: 45 s otherwise.
    let failed = |source| BootError { stage: "set fs.lease-break-time".into(), source };
    fs::write("/proc/sys/fs/lease-break-time", "1").map_err(failed)?;
    // As systemd has them on a host: how many files may be open is a matter of each process's limit, and of its cgroup's memory. The
    // kernel's own of a small guest would be 20,000 for all.
    for (name, most) in [("nr_open", "1073741816"), ("file-max", "9223372036854775807")] {
        fs::write(format!("/proc/sys/fs/{name}"), most)
            .unwrap_or_else(|e| complain(&format!("coffer-init: set fs.{name}: {e}")));
    }
    // PID 1's root is the initramfs, which pivot_root cannot leave: containers pivot from below this private copy.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(at("make / private"))
}

/// Open files of whoever's configuration says nothing of them.
const OPEN_FILES: libc::rlim_t = 1 << 20;

/// Has the limits that a service of the host's which calls runc has (containerd.service, docker.service): what a configuration does not limit a
/// container's process inherits, under runc from that service, and here from PID 1.
pub fn raise_limits() {
    for (resource, most) in [(libc::RLIMIT_NOFILE, OPEN_FILES), (libc::RLIMIT_NPROC, libc::RLIM_INFINITY)] {
        if let Err(error) = set_limit(resource, most, most).or_else(|_| raise_to_hard(resource)) {
            complain(&format!("coffer-init: set resource limit {resource}: {error}"));
        }
    }
}

/// What may be done without CAP_SYS_RESOURCE, which PID 1 of a machine has.
fn raise_to_hard(resource: libc::__rlimit_resource_t) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to an rlimit that outlives the call.
    if unsafe { libc::getrlimit(resource, &raw mut limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    set_limit(resource, limit.rlim_max, limit.rlim_max)
}

fn set_limit(resource: libc::__rlimit_resource_t, soft: libc::rlim_t, hard: libc::rlim_t) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the pointer is to an rlimit that outlives the call.
    if unsafe { libc::setrlimit(resource, &raw const limit) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Turns every controller on for the children of a cgroup.
pub fn delegate_controllers(directory: &str) {
    let Ok(names) = fs::read_to_string(format!("{directory}/cgroup.controllers")) else { return };
    for name in names.split_whitespace() {
        // One that cannot be delegated is missing in the container; limits that need it fail then.
        let _ = fs::write(format!("{directory}/cgroup.subtree_control"), format!("+{name}"));
    }
}

/// Mounts the host's share, when there is one.
///
/// # Errors
/// [`BootError`]: a pod without it can still answer, so the caller decides.
pub fn mount_share() -> Result<(), BootError> {
    mount(Some(SHARE_TAG), SHARE_DIR, Some("virtiofs"), MsFlags::MS_NOATIME, None::<&str>)
        .map_err(at("mount the host's share"))
}

/// To the kernel's log: a console shows it where there is one.
pub fn complain(message: &str) {
    if let Ok(mut log) = fs::File::options().write(true).open("/dev/kmsg") {
        let _ = log.write_all(message.as_bytes());
    }
}

/// Listens for the host, and tells the VMM so by a connection to its ready port.
///
/// # Errors
/// [`BootError`]: without it nobody can reach this guest.
pub fn listen_to_host() -> Result<OwnedFd, BootError> {
    let stream = || socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let listener = stream().map_err(at("make a vsock socket"))?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &VsockAddr::new(libc::VMADDR_CID_ANY, CONTROL_PORT))
        .map_err(at("bind to vsock"))?;
    listen(&listener, Backlog::new(128).unwrap_or(Backlog::MAXCONN)).map_err(at("listen on vsock"))?;
    let ready = stream().map_err(at("make a vsock socket"))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&ready), &VsockAddr::new(libc::VMADDR_CID_HOST, READY_PORT))
        .map_err(at("tell the VMM over vsock"))?;
    Ok(listener)
}

/// Ends the machine in good order. What processes wrote to the share is the host's when they have ended: closing a file and unmapping it write back
/// (fuse_flush, fuse_vma_close). Nothing more is synced: sync(2) would have the host write out whole file systems, others' files too.
pub fn end() -> ! {
    tell(mark::ORDERLY_END);
    reset()
}

/// Ends the machine without the word for it: the VMM reports a failure.
pub fn reset() -> ! {
    // The command line has reboot=k: a port write that the VMM sees. It does not return; if it did, panic is the way out.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    std::process::exit(1)
}
