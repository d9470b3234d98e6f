//! A mount's options: words to flags, propagation, recursive attributes and the file system's own data.
//!
//! Owns: the words of the OCI runtime specification (config.md, "Linux mount options"). Does not own: mounting.

use std::{io, os::fd::AsRawFd, os::fd::OwnedFd};

use nix::mount::MsFlags;

/// Options, sorted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) set: MsFlags,
    pub(super) propagation: Option<MsFlags>,
    pub(super) recursive: Recursive,
    pub(super) copy_up: bool,
    pub(super) data: Vec<String>,
}

/// Attributes of a mount and of all below it, as mount_setattr(2) takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Recursive {
    set: u64,
    clear: u64,
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const _: () = assert!(size_of::<MountAttr>() == 32);

const ATTR_ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// Flags that a word sets or clears.
fn flag(word: &str) -> Option<(MsFlags, bool)> {
    Some(match word {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        "lazytime" => (MsFlags::MS_LAZYTIME, true),
        "nolazytime" => (MsFlags::MS_LAZYTIME, false),
        "mand" => (MsFlags::MS_MANDLOCK, true),
        "nomand" => (MsFlags::MS_MANDLOCK, false),
        "silent" => (MsFlags::MS_SILENT, true),
        "loud" => (MsFlags::MS_SILENT, false),
        "nosymfollow" => (MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW), true),
        "symfollow" => (MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW), false),
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        // The kernel's own words for the default, and what only labels or other runtimes use.
        "defaults" | "U" | "z" | "Z" => (MsFlags::empty(), true),
        _ => return None,
    })
}

/// The propagation that a word asks for; also the specification's `rootfsPropagation`.
pub(super) fn propagation(word: &str) -> Option<MsFlags> {
    let (word, all) = match word.strip_prefix('r') {
        Some(rest) => (rest, MsFlags::MS_REC),
        None => (word, MsFlags::empty()),
    };
    Some(
        all | match word {
            "private" => MsFlags::MS_PRIVATE,
            "slave" => MsFlags::MS_SLAVE,
            "shared" => MsFlags::MS_SHARED,
            "unbindable" => MsFlags::MS_UNBINDABLE,
            _ => return None,
        },
    )
}

/// Recursive attributes of a word: bits to set, bits to clear.
fn recursive(word: &str) -> Option<(u64, u64)> {
    let set = |bit| Some((bit, 0));
    let clear = |bit| Some((0, bit));
    let time = |bits| Some((bits, ATTR_ATIME));
    match word {
        "rro" => set(libc::MOUNT_ATTR_RDONLY),
        "rrw" => clear(libc::MOUNT_ATTR_RDONLY),
        "rnosuid" => set(libc::MOUNT_ATTR_NOSUID),
        "rsuid" => clear(libc::MOUNT_ATTR_NOSUID),
        "rnodev" => set(libc::MOUNT_ATTR_NODEV),
        "rdev" => clear(libc::MOUNT_ATTR_NODEV),
        "rnoexec" => set(libc::MOUNT_ATTR_NOEXEC),
        "rexec" => clear(libc::MOUNT_ATTR_NOEXEC),
        "rnodiratime" => set(libc::MOUNT_ATTR_NODIRATIME),
        "rdiratime" => clear(libc::MOUNT_ATTR_NODIRATIME),
        "rnosymfollow" => set(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "rsymfollow" => clear(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "rnoatime" => time(libc::MOUNT_ATTR_NOATIME),
        "rstrictatime" => time(libc::MOUNT_ATTR_STRICTATIME),
        // The kernel's default, which has no bit of its own.
        "rrelatime" | "ratime" | "rnorelatime" | "rnostrictatime" => time(0),
        _ => None,
    }
}

/// Sorts them; what is none of the specification's words is the file system's.
pub(super) fn parse(words: &[String]) -> Options {
    let mut options = Options {
        set: MsFlags::empty(),
        propagation: None,
        recursive: Recursive::default(),
        copy_up: false,
        data: Vec::new(),
    };
    for word in words {
        if let Some((bits, on)) = flag(word) {
            options.set.set(bits, on);
        } else if let Some(how) = propagation(word) {
            options.propagation = Some(how);
        } else if let Some((set, clear)) = recursive(word) {
            options.recursive.set = options.recursive.set & !clear | set;
            options.recursive.clear = options.recursive.clear & !set | clear;
        } else if word == "tmpcopyup" {
            options.copy_up = true;
        } else {
            options.data.push(word.clone());
        }
    }
    options
}

impl Recursive {
    /// Applies them to what is mounted at an open place, and to all below it.
    pub(super) fn apply(self, mounted: &OwnedFd) -> io::Result<()> {
        match self == Self::default() {
            true => Ok(()),
            // The kernel wants all bits of access times to be cleared when one of them is set.
            false => set_attributes(mounted, self, libc::AT_RECURSIVE),
        }
    }
}

/// Makes the mount of an open place read-only, and neither those below it nor the file system elsewhere. Its other flags stay.
pub(super) fn read_only(mounted: &OwnedFd) -> io::Result<()> {
    set_attributes(mounted, Recursive { set: libc::MOUNT_ATTR_RDONLY, clear: 0 }, 0)
}

fn set_attributes(mounted: &OwnedFd, attributes: Recursive, flags: i32) -> io::Result<()> {
    let attr = MountAttr { set: attributes.set, clear: attributes.clear, propagation: 0, userns_fd: 0 };
    // SAFETY: the path and the structure outlive the call; the size is the structure's.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mounted.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Options {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_sorted_into_flags_propagation_and_data() {
        let options = of("rbind ro nosuid rprivate size=64k tmpcopyup");
        assert_eq!(options.set, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(options.propagation, Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC));
        assert!(options.copy_up);
        assert_eq!(options.data, ["size=64k"]);
        assert_eq!(options.recursive, Recursive::default());
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(of("ro rw").set, MsFlags::empty());
        let options = of("rro rrw rnoatime rstrictatime");
        assert_eq!(options.recursive.set, libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.recursive.clear & libc::MOUNT_ATTR_RDONLY, libc::MOUNT_ATTR_RDONLY);
    }

    #[test]
    fn recursive_words_are_neither_flags_nor_data() {
        let options = of("rbind rro rnosuid rnodev rnoexec rnosymfollow runbindable");
        assert_eq!(options.set, MsFlags::MS_BIND | MsFlags::MS_REC);
        assert!(options.data.is_empty());
        assert_eq!(options.propagation, Some(MsFlags::MS_UNBINDABLE | MsFlags::MS_REC));
        assert_eq!(options.recursive.set, 0x20_000f);
    }
}
