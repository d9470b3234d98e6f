//! The stub's root: what tools of the host see of a container's files through its process, as `podman cp` and `podman top` do.
//!
//! Owns: that it is the container's where the host has the container's files, and empty where only the guest has them: files that no
//! process of the container ever sees would be a lie to who copies them out, and to who copies in.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::plan::Plan;

const NONE: Option<&str> = None;

/// Enters it. `destinations` are those of the plan's binds but the root.
///
/// # Errors
/// The system's.
pub fn enter(plan: &Plan, destinations: &[PathBuf]) -> io::Result<()> {
    let Some((root, rest)) = plan.binds.split_first() else { return Ok(()) };
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    if plan.image.is_some() {
        // Volumes are not in it either: nothing may be taken for a part of the image.
        return enter_empty(&root.source);
    }
    mount(Some(&root.source), &root.source, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
    for (bind, destination) in rest.iter().zip(destinations) {
        let inside = destination.strip_prefix("/").unwrap_or(destination);
        // Only where the place is there and no link leads elsewhere: this is a view for tools, the guest has the mounts.
        let target = root.source.join(inside);
        if target.canonicalize().is_ok_and(|real| real == target) {
            let _ = mount(Some(&bind.source), &target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE);
            if bind.read_only {
                let _ = mount(
                    NONE,
                    &target,
                    NONE,
                    MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
                    NONE,
                );
            }
        }
    }
    pivot(&root.source)?;
    // Tools read /proc of this namespace; a root file system without the directory has none.
    if Path::new("/proc").is_dir() {
        let _ = mount_proc("/proc", MsFlags::empty());
    }
    Ok(())
}

/// An empty root in the place of `root`, but for `/proc` of this namespace, where `podman top` finds the stubs.
fn enter_empty(root: &Path) -> io::Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), root, Some("tmpfs"), quiet, Some("mode=555,size=4k,nr_inodes=4"))?;
    pivot(root)?;
    std::fs::create_dir("/proc")?;
    mount_proc("/proc", MsFlags::MS_RDONLY)?;
    mount(NONE, "/", NONE, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | quiet, NONE)?;
    Ok(())
}

fn mount_proc(target: &str, more: MsFlags) -> Result<(), Errno> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), target, Some("proc"), safe | more, NONE)
}

/// Makes a mount the root, and lets go of what was.
fn pivot(root: &Path) -> io::Result<()> {
    nix::unistd::chdir(root)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}
