//! The socket to which a container's processes send notifications (sd_notify(3)).
//!
//! Owns: what path it may have, binding it. Does not own: what becomes of a message.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixDatagram},
    },
    path::Path,
};

use coffer_protocol::ErrorKind;

use super::ContainerError;

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

/// Binds it. Called in the container's root, where its file system is; whoever runs there may send.
///
/// # Errors
/// [`ContainerError`].
pub(super) fn bind(path: &str) -> Result<OwnedFd, ContainerError> {
    let failed = |e| ContainerError::guest(&format!("bind NOTIFY_SOCKET {path}"), e);
    let socket = UnixDatagram::bind(path).map_err(failed)?;
    fs::set_permissions(Path::new(path), fs::Permissions::from_mode(0o777)).map_err(failed)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_are_taken() {
        check("/run/notify/notify.sock").unwrap();
        let long = format!("/{}", "x".repeat(LONGEST - 1));
        for wrong in ["", "@abstract", "run/x", "/run/../x", "/a\0b", long.as_str()] {
            assert!(check(wrong).unwrap_err().message.starts_with("NOTIFY_SOCKET: "), "{wrong:?}");
        }
    }

    #[test]
    fn everybody_may_send() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = UnixDatagram::from(bind(path.to_str().unwrap()).unwrap());
        UnixDatagram::unbound().unwrap().send_to(b"READY=1", &path).unwrap();
        let mut bytes = [0; 16];
        assert_eq!(socket.recv(&mut bytes).unwrap(), 7);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o777);
    }
}
