//! What a container tells the host's service manager (sd_notify(3)), in the two ways in which callers ask for it.
//!
//! Owns: recognising them. Does not own: what of a message is passed on (`coffer_protocol`). podman mounts a directory with conmon's socket into the container and
//! names it in the environment: the messages are for that socket. Others give `NOTIFY_SOCKET` to `create`, `run` and `start`, as
//! to runc: readiness is for those commands, which tell the manager themselves, because it listens to its unit's processes only.

use std::{
    ffi::OsStr,
    fs::File,
    io::IoSlice,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            fs::FileTypeExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use coffer_protocol::notification;
use nix::{
    fcntl::OFlag,
    sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
    unistd::pipe2,
};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use crate::error::{Error, host};

/// Where containers find the socket when no caller says where: as with runc.
const DIRECTORY: &str = "/run/notify";
const VARIABLE: &str = "NOTIFY_SOCKET";
/// The file in a container's directory that says that it is ready.
pub const READY: &str = "ready";
/// How long the manager may take to read what it was told.
const BARRIER_LIMIT: Duration = Duration::from_secs(30);

/// Who is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The owner of this socket: everything that may be told.
    Socket(PathBuf),
    /// The `start` or `run` that waits: that the container is ready.
    Starter,
}

/// A container that notifies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notify {
    /// Path of the socket in the container.
    pub inside: String,
    /// Who is told.
    pub whom: Whom,
}

/// A file system of the guest's own for the socket: one of the host's cannot be reached through the share.
fn mount() -> Value {
    json!({
        "destination": DIRECTORY, "type": "tmpfs", "source": "notify",
        "options": ["nosuid", "nodev", "noexec", "mode=755", "size=64k"],
    })
}

/// podman's way: the environment names a socket in a mounted directory that holds nothing else. The mount becomes the guest's
/// own.
#[must_use]
pub fn mounted(value: &mut Value, spec: &Spec, bundle: &Path) -> Option<(usize, Notify)> {
    let environment = spec.process().as_ref()?.env().iter().flatten();
    let inside = environment.filter_map(|pair| pair.strip_prefix("NOTIFY_SOCKET=")).next_back()?;
    let (directory, name) = (Path::new(inside).parent()?, Path::new(inside).file_name()?);
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let index = mounts.iter().rposition(|m| m.destination() == directory)?;
    let source = bundle.join(mounts[index].source().as_ref()?);
    let socket = source.join(name);
    let only = std::fs::read_dir(&source).ok()?.flatten().all(|entry| entry.file_name() == name);
    if !only || !std::fs::metadata(&socket).is_ok_and(|m| m.file_type().is_socket()) {
        return None;
    }
    let mut own = mount();
    own["destination"] = json!(directory);
    value["mounts"][index] = own;
    Some((index, Notify { inside: inside.to_owned(), whom: Whom::Socket(socket) }))
}

/// runc's way: adds mount and variable to the guest's configuration.
#[must_use]
pub fn added(guest: &mut Value) -> Notify {
    let inside = format!("{DIRECTORY}/notify.sock");
    for (list, item) in [("/mounts", mount()), ("/process/env", json!(format!("{VARIABLE}={inside}")))] {
        match guest.pointer_mut(list) {
            Some(Value::Array(list)) => {
                list.retain(|old| {
                    !old.as_str().is_some_and(|pair| pair.starts_with("NOTIFY_SOCKET="))
                        && old["destination"] != DIRECTORY
                });
                list.push(item);
            }
            _ if list == "/mounts" => guest["mounts"] = json!([item]),
            _ => guest["process"]["env"] = json!([item]),
        }
    }
    Notify { inside, whom: Whom::Starter }
}

/// The manager's socket, where this process was given one.
#[must_use]
pub fn manager() -> Option<std::ffi::OsString> {
    std::env::var_os(VARIABLE).filter(|name| !name.is_empty())
}

/// A stub's way to whom it tells. Opened before its root changes.
#[derive(Debug)]
pub enum Teller {
    /// A connected socket.
    Socket(UnixDatagram),
    /// The container's directory.
    Mark(File),
}

impl Teller {
    /// Opens it.
    ///
    /// # Errors
    /// The system's, naming the socket.
    pub fn open(whom: &Whom, directory: &Path) -> Result<Self, Error> {
        match whom {
            Whom::Starter => {
                Ok(Self::Mark(File::open(directory).map_err(host("open the container's directory"))?))
            }
            Whom::Socket(path) => {
                let stage = || host(format!("connect to {VARIABLE} {}", path.display()));
                // podman's are longer than an address may be.
                let parent = File::open(path.parent().unwrap_or(path)).map_err(stage())?;
                let short = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
                let socket = UnixDatagram::unbound().map_err(stage())?;
                socket.connect(short.join(path.file_name().unwrap_or_default())).map_err(stage())?;
                socket.set_nonblocking(true).map_err(stage())?;
                Ok(Self::Socket(socket))
            }
        }
    }

    /// The descriptor that must stay open.
    #[must_use]
    pub fn fd(&self) -> i32 {
        match self {
            Self::Socket(socket) => socket.as_raw_fd(),
            Self::Mark(directory) => directory.as_raw_fd(),
        }
    }

    /// Passes on what a process of the guest said. A manager that does not read loses it, as a program's own would be lost.
    pub fn tell(&self, message: &[u8]) {
        // Its guest has left the rest out, if it is one of ours.
        let told = notification::told(message);
        match self {
            Self::Socket(socket) if !told.is_empty() => drop(socket.send(told.as_bytes())),
            Self::Mark(directory) if told.lines().any(|line| line == "READY=1") => {
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW;
                // SAFETY: the name is a C string; the directory is open.
                let fd = unsafe { libc::openat(directory.as_raw_fd(), c"ready".as_ptr(), flags, 0o600) };
                if fd >= 0 {
                    // SAFETY: openat returned a new descriptor.
                    drop(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            _ => {}
        }
    }
}

/// Tells this process's manager that a container is ready and which process is its, and waits until that was read.
///
/// # Errors
/// The system's, naming the socket.
pub fn tell_manager(name: &OsStr, pid: i32) -> Result<(), Error> {
    let stage = || |e: std::io::Error| host(format!("tell {VARIABLE} {}", name.display()))(e);
    let socket = UnixDatagram::unbound().map_err(stage())?;
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(name),
    };
    socket.connect_addr(&address.map_err(stage())?).map_err(stage())?;
    socket.send(format!("READY=1\nMAINPID={pid}\n").as_bytes()).map_err(stage())?;
    let (reads, writes) = pipe2(OFlag::O_CLOEXEC).map_err(|e| stage()(e.into()))?;
    let fds = [writes.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(b"BARRIER=1")], &control, MsgFlags::empty(), None)
        .map_err(|e| stage()(e.into()))?;
    drop(writes);
    // The end of the pipe: the manager has closed what it was sent, having read everything before.
    let mut wait = libc::pollfd { fd: reads.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut wait, 1, BARRIER_LIMIT.as_millis() as i32) };
    Ok(())
}

/// Waits until a container has said that it is ready (true) or has ended.
pub fn wait_ready(directory: &Path, alive: impl Fn() -> bool) -> bool {
    loop {
        let going_on = alive();
        if directory.join(READY).exists() {
            return true;
        }
        if !going_on {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_is_told_readiness_then_the_process_and_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("manager");
        let manager = UnixDatagram::bind(&path).unwrap();
        let told = std::thread::spawn(move || tell_manager(path.as_os_str(), 4711));
        let mut bytes = [0; 64];
        let count = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"READY=1\nMAINPID=4711\n");
        assert!(!told.is_finished());
        // Without room for descriptors they are closed: that is the barrier's end.
        let count = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"BARRIER=1");
        told.join().unwrap().unwrap();
    }

    #[test]
    fn runcs_way_adds_one_mount_and_one_variable() {
        let mut guest = json!({ "process": { "env": ["A=1", "NOTIFY_SOCKET=/host"] } });
        assert_eq!(added(&mut guest).inside, "/run/notify/notify.sock");
        assert_eq!(guest["process"]["env"], json!(["A=1", "NOTIFY_SOCKET=/run/notify/notify.sock"]));
        assert_eq!(guest["mounts"].as_array().unwrap().len(), 1);
        assert_eq!(guest["mounts"][0]["type"], "tmpfs");
    }

    #[test]
    fn podmans_way_is_a_directory_with_that_socket_alone() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("notify")).unwrap();
        let config = json!({
            "ociVersion": "1.0.2", "root": { "path": "r" },
            "process": { "cwd": "/", "args": ["a"], "user": { "uid": 0, "gid": 0 }, "env": ["NOTIFY_SOCKET=/run/notify/notify.sock"] },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/run/notify", "type": "bind", "source": "notify", "options": ["bind"] }
            ],
        });
        let spec: Spec = serde_json::from_value(config.clone()).unwrap();
        let look = |value: &mut Value| mounted(value, &spec, bundle.path());
        assert_eq!(look(&mut config.clone()), None, "no socket is there");
        let path = bundle.path().join("notify/notify.sock");
        let _socket = UnixDatagram::bind(&path).unwrap();
        let mut value = config.clone();
        let (index, notify) = look(&mut value).unwrap();
        assert_eq!((index, notify.whom), (1, Whom::Socket(path)));
        assert_eq!(value["mounts"][1]["type"], "tmpfs");
        std::fs::write(bundle.path().join("notify/other"), "").unwrap();
        assert_eq!(look(&mut config.clone()), None, "the directory is more than that");
    }
}
