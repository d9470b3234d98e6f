//! Where the host may have what it mounts into a container, and an image's blobs: in its share, and nowhere else in this guest.
//!
//! Owns: refusing other sources, opening those of the share. The host answers every question about the share, so that a link in it
//! would lead wherever the host likes: to another container's secrets, to this guest's own files.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use coffer_protocol::{ErrorKind, SHARE_DIR};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde_json::Value;

use super::ContainerError;

/// Whether a path is below the share, as far as words can tell, in its one form: who reads it as text and who reads its parts see the same place.
pub(crate) fn is_in_share(path: &Path) -> bool {
    let Ok(inside) = path.strip_prefix(SHARE_DIR) else { return false };
    let is_plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
    let has_one_form = path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
    is_plain && has_one_form && inside.components().next().is_some()
}

/// Checks a configuration as the host sent it: what it binds, and its root, are of the share.
pub(super) fn check(spec: &Value) -> Result<(), ContainerError> {
    let elsewhere = |field: String, path: &str| {
        let message = format!("config.json: {field}: {path:?} is not in the host's share {SHARE_DIR}");
        Err(ContainerError::new(ErrorKind::Invalid, message))
    };
    for (index, mount) in spec["mounts"].as_array().into_iter().flatten().enumerate() {
        let mut words = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let bind = mount["type"] == "bind" || words.any(|word| matches!(word, "bind" | "rbind"));
        if let Some(source) =
            mount["source"].as_str().filter(|source| bind && !is_in_share(Path::new(source)))
        {
            return elsewhere(format!("mounts[{index}].source"), source);
        }
    }
    match spec["root"]["path"].as_str() {
        Some(root) if !is_in_share(Path::new(root)) => elsewhere("root.path".into(), root),
        _ => Ok(()),
    }
}

/// Has the kernel make a directory of the share the file system of its own that it is on the host, here, where all containers come from: each that
/// met it first in its own mount namespace would have another, with other sockets, pipes and locks.
pub(super) fn enter(source: &Path) {
    let Ok(inside) = source.strip_prefix(SHARE_DIR) else { return };
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
    let only_inside = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    // What cannot be opened is said when it is to be mounted.
    let _ = File::open(SHARE_DIR).map(|share| openat2(share, inside, how.resolve(only_inside)));
}

/// Opens a source as a place: one of the share without following a link, another, which is this init's own, as it is.
pub(super) fn open(source: &Path) -> io::Result<OwnedFd> {
    open_below(Path::new(SHARE_DIR), source, OFlag::empty())
}

/// The same of a directory: what the host has mounted there is mounted here, too, which the share does for those alone that want one.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    open_below(Path::new(SHARE_DIR), path, OFlag::O_DIRECTORY)
}

fn open_below(share: &Path, source: &Path, further: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | further);
    let opened = match source.strip_prefix(share) {
        Ok(inside) => {
            let only_inside = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
            openat2(File::open(share)?, inside, how.resolve(only_inside))
        }
        Err(_) => openat2(nix::fcntl::AT_FDCWD, source, how),
    };
    opened.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn the_host_binds_nothing_but_its_own() {
        let bind = |source: &str| json!({ "mounts": [{ "destination": "/etc/hosts", "type": "bind", "source": source }] });
        check(&bind("/run/coffer/share/c/mounts/1")).unwrap();
        check(&json!({ "root": { "path": "/run/coffer/share/c/rootfs" }, "mounts": [{ "type": "proc", "source": "proc" }] })).unwrap();
        check(&Value::Null).unwrap();
        for source in [
            "/",
            "/proc/1/root",
            "/run/coffer/secrets/other/0",
            "/run/coffer/share",
            "/run/coffer/share/../secrets",
            "/run/coffer/shares/x",
            "/run/coffer//share/x",
            "/run/coffer/share/./x",
            "/run/coffer/share/x/",
            "run/coffer/share/x",
            "",
        ] {
            let message = check(&bind(source)).unwrap_err().message;
            assert!(message.starts_with("config.json: mounts[0].source: "), "{message}");
        }
        let by_option = json!({ "mounts": [{ "type": "none", "source": "/run/coffer/images/b", "options": ["ro", "rbind"] }] });
        assert!(check(&by_option).is_err());
        assert!(check(&json!({ "root": { "path": "/" } })).unwrap_err().message.contains("root.path"));
    }

    #[test]
    fn a_link_of_the_share_leads_nowhere() {
        let outer = tempfile::tempdir().unwrap();
        let share = outer.path().join("share");
        fs::create_dir_all(share.join("c/mounts/0")).unwrap();
        fs::write(outer.path().join("secret"), "x").unwrap();
        symlink("../../../secret", share.join("c/mounts/1")).unwrap();
        symlink(outer.path(), share.join("d")).unwrap();
        let open_below = |place: &Path| {
            let plain = open_below(&share, place, OFlag::empty());
            assert!(plain.is_ok() || open_below(&share, place, OFlag::O_DIRECTORY).is_err());
            plain
        };
        open_below(&share.join("c/mounts/0")).unwrap();
        open_below(&outer.path().join("secret")).unwrap();
        for link in ["c/mounts/1", "d", "d/secret", "c/../../secret"] {
            assert!(open_below(&share.join(link)).is_err(), "{link}");
        }
    }
}
