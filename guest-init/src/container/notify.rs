//! The socket to which a container's processes send notifications (sd_notify(3)).
//!
//! Owns: what path it may have, binding it. Does not own: what becomes of a message.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixDatagram},
    },
    path::{Component, Path},
};

use coffer_protocol::ErrorKind;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use serde_json::Value;

use super::{ContainerError, path};

/// Where callers have it (podman, and `coffer` for those who call it as runc), and nothing else. Another place could be one that programs
/// send to without meaning the host, such as `/dev/log`.
const USUAL: &str = "/run/notify/notify.sock";
const DIRECTORY: &str = "/run/notify";
const NAME: &str = "notify.sock";

/// A container's socket.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its path there.
    pub path: String,
    /// It is [`USUAL`], and no link may lead elsewhere.
    pub only_there: bool,
}

/// Of `sun_path` (unix(7)), with its last zero.
const LONGEST: usize = 108;

/// Checks a path from the host.
///
/// # Errors
/// [`ContainerError`] of kind `Invalid`.
pub(super) fn check(path: &str) -> Result<(), ContainerError> {
    let plain = path.starts_with('/') && !path.contains('\0') && !path.split('/').any(|part| part == "..");
    if plain && path.len() < LONGEST {
        return Ok(());
    }
    let message = format!("NOTIFY_SOCKET: {path:?} is not an absolute path of less than {LONGEST} bytes");
    Err(ContainerError::new(ErrorKind::Invalid, message))
}

/// Checks that a container has its socket in the usual place, in a file system that is the guest's own and there for nothing else.
///
/// # Errors
/// [`ContainerError`] of kind `Invalid`.
pub fn check_usual(path: &str, spec: &Value) -> Result<(), ContainerError> {
    let refused = |why: &str| {
        let message = format!("NOTIFY_SOCKET: {path:?}: an owner's pod has it at {USUAL}, {why}");
        Err(ContainerError::new(ErrorKind::Invalid, message))
    };
    if path != USUAL {
        return refused("and nowhere else");
    }
    let mounts = spec.get("mounts").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    // The last one that is there or above is what the path leads to.
    let hides = |mount: &&Value| mount["destination"].as_str().is_none_or(is_on_the_way);
    let own = mounts.iter().rfind(hides).is_some_and(|mount| {
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let bound = options.filter_map(Value::as_str).any(|option| matches!(option, "bind" | "rbind"));
        mount["type"] == "tmpfs"
            && !bound
            && Path::new(&mount["destination"].as_str().unwrap_or_default()) == Path::new(DIRECTORY)
    });
    if own { Ok(()) } else { refused("in a tmpfs at /run/notify") }
}

/// A mount there would lie over the directory, or takes a way that is not looked at.
fn is_on_the_way(destination: &str) -> bool {
    let parts = |path| {
        Path::new(path).components().filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
    };
    let way: Vec<Component<'_>> = parts(DIRECTORY).collect();
    let destination: Vec<Component<'_>> = parts(destination).collect();
    way.starts_with(&destination) || destination.contains(&Component::ParentDir)
}

/// Binds it. Called in the container's root, where its file system is; whoever runs there may send.
///
/// # Errors
/// [`ContainerError`].
pub(super) fn bind(socket: &Socket) -> Result<OwnedFd, ContainerError> {
    let path = &socket.path;
    let failed = |e| ContainerError::guest(&format!("bind NOTIFY_SOCKET {path}"), e);
    if !socket.only_there {
        return bind_at(Path::new(path)).map_err(failed);
    }
    let root = fs::File::open("/").map_err(failed)?;
    let bound = enter(root.as_fd()).and_then(|()| bind_at(Path::new(NAME)));
    // The process gets its own directory later.
    std::env::set_current_dir("/").and(bound).map_err(failed)
}

/// Changes into the socket's directory, which is in the guest's memory, and whose path has no link in it: the host may have made one, in what
/// it has mounted.
fn enter(root: BorrowedFd<'_>) -> io::Result<()> {
    let directory = path::open(root, Path::new(DIRECTORY))?;
    if fstatfs(&directory)?.filesystem_type() != TMPFS_MAGIC {
        return Err(io::Error::other("its directory is not the guest's own"));
    }
    Ok(nix::unistd::fchdir(directory)?)
}

fn bind_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = UnixDatagram::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_plain_paths_are_taken() {
        check("/run/notify/notify.sock").unwrap();
        let long = format!("/{}", "x".repeat(LONGEST - 1));
        for wrong in ["", "@abstract", "run/x", "/run/../x", "/a\0b", long.as_str()] {
            assert!(check(wrong).unwrap_err().message.starts_with("NOTIFY_SOCKET: "), "{wrong:?}");
        }
    }

    #[test]
    fn in_an_owners_pod_it_is_in_a_file_system_of_its_own() {
        let tmpfs = |to: &str| json!({ "destination": to, "type": "tmpfs", "source": "x" });
        let bind =
            |to: &str| json!({ "destination": to, "type": "bind", "source": "/x", "options": ["rbind"] });
        let check = |mounts: Value| check_usual(USUAL, &json!({ "mounts": mounts }));
        check(json!([tmpfs("/run"), tmpfs("/run/notify"), bind("/run/notifyx"), bind("/etc/hosts")]))
            .unwrap();
        check(json!([tmpfs("/run/notify/")])).unwrap();
        let mut hidden = tmpfs("/run/notify");
        hidden["options"] = json!(["bind"]);
        for mounts in [
            json!([]),
            Value::Null,
            json!([bind("/run/notify")]),
            json!([hidden]),
            json!([tmpfs("/run")]),
            json!([tmpfs("/run/notify"), bind("/run/notify")]),
            json!([tmpfs("/run/notify"), bind("/run//./")]),
            json!([tmpfs("/run/notify"), bind("run")]),
            json!([tmpfs("/run/notify"), tmpfs("/")]),
            json!([tmpfs("/run/notify"), bind("/etc/../run")]),
            json!([tmpfs("/run/notify"), { "type": "tmpfs" }]),
        ] {
            check(mounts.clone()).expect_err(&mounts.to_string());
        }
        let mounts = json!({ "mounts": [tmpfs("/run/notify"), tmpfs("/dev")] });
        for path in ["/dev/log", "/run/notify/other", "/run/notify/../log", "/run//notify/notify.sock", ""] {
            let message = check_usual(path, &mounts).unwrap_err().message;
            assert!(message.starts_with("NOTIFY_SOCKET: "), "{message}");
        }
    }

    #[test]
    fn a_directory_by_a_link_or_of_no_memory_of_the_guests_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let open = || fs::File::open(root.path()).unwrap();
        fs::create_dir_all(root.path().join("elsewhere/notify")).unwrap();
        std::os::unix::fs::symlink("elsewhere", root.path().join("run")).unwrap();
        assert_eq!(enter(open().as_fd()).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        let proc = fs::File::open("/proc/self").unwrap();
        enter(proc.as_fd()).unwrap_err();
    }

    #[test]
    fn everybody_may_send() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let place = Socket { path: path.to_str().unwrap().into(), only_there: false };
        let socket = UnixDatagram::from(bind(&place).unwrap());
        UnixDatagram::unbound().unwrap().send_to(b"READY=1", &path).unwrap();
        let mut bytes = [0; 16];
        assert_eq!(socket.recv(&mut bytes).unwrap(), 7);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o777);
    }
}
