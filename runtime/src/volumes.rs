//! Where in a VM's share the directories are that its containers mount.
//!
//! Owns: their names, by which two containers that mount one directory find the same place. Does not own: mounting them there (`spawn`,
//! `commands::pod`), or taking them away.

use std::{
    ffi::CString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Below the shared directory.
pub const VOLUMES: &str = "volumes";

/// The place of a directory, one for all containers of a VM which mount it in this way: what is mounted at two places is two file systems for the
/// guest, in which sockets, pipes, locks and shared memory of one are not those of the other. `None`: it is no directory, or cannot be told from others.
///
/// The device's number is nobody else's as long as a VMM has it mounted.
#[must_use]
pub fn place(source: &Path, read_only: bool, recursive: bool) -> Option<PathBuf> {
    let name = CString::new(source.as_os_str().as_bytes()).ok()?;
    // SAFETY: statx is plain data for which zero is valid.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let wanted = libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID;
    // SAFETY: both pointers outlive the call.
    let done = unsafe { libc::statx(libc::AT_FDCWD, name.as_ptr(), 0, wanted, &raw mut found) };
    let is_directory = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
    // Which mount: what is mounted below differs from one to the next.
    if done < 0 || found.stx_mask & wanted != wanted || !is_directory {
        return None;
    }
    let how = match (read_only, recursive) {
        (false, false) => "",
        (false, true) => ".all",
        (true, false) => ".ro",
        (true, true) => ".all.ro",
    };
    let (major, minor) = (found.stx_dev_major, found.stx_dev_minor);
    let name = format!("{major:x}.{minor:x}.{:x}.{:x}{how}", found.stx_ino, found.stx_mnt_id);
    Some(Path::new(VOLUMES).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_place_for_each_way_of_mounting_it() {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        std::fs::create_dir(at("d")).unwrap();
        std::fs::write(at("f"), "").unwrap();
        std::os::unix::fs::symlink("d", at("link")).unwrap();
        let ways = [(false, false), (false, true), (true, false), (true, true)];
        let places: Vec<_> = ways.iter().map(|(ro, all)| place(&at("d"), *ro, *all).unwrap()).collect();
        let mut different = places.clone();
        different.sort();
        different.dedup();
        assert_eq!(different.len(), ways.len(), "{places:?}");
        assert!(places.iter().all(|place| place.starts_with(VOLUMES)), "{places:?}");
        assert_eq!(place(&at("link"), false, true), Some(places[1].clone()));
        assert_ne!(place(outer.path(), false, true), Some(places[1].clone()));
        assert_eq!((place(&at("f"), false, true), place(&at("none"), false, true)), (None, None));
    }
}
