//! Memory that the host adds to the machine while it runs.
//!
//! Owns: that the kernel's driver finds the device, which was not there at boot, and how memory comes to use. Does not own: which
//! blocks come and go, which the driver and the host settle between them.

use std::{fs, io, path::Path};

use coffer_layout::slot;
use coffer_protocol::ErrorKind;

use crate::{container::ContainerError, slots};

/// What only a guest in a TEE has.
const TEE: [&str; 2] = ["dev/sev-guest", "dev/tdx_guest"];
/// The driver of the device behind it.
const MEMORY_DRIVER: &str = "sys/bus/virtio/drivers/virtio_mem";

/// Has the kernel take what the host has added. It does so in its own time, and hears by itself what the host wants later: a second
/// call changes nothing.
///
/// # Errors
/// [`ContainerError`] in a TEE, or when the kernel finds nothing that it can use.
pub(crate) fn take() -> Result<(), ContainerError> {
    take_in(Path::new("/"))
}

/// Whether the machine changes no more once it has booted: memory that was not validated then is poison in a TEE, and the state that a
/// processor starts with is measured.
pub(crate) fn in_tee(root: &Path) -> bool {
    TEE.iter().any(|device| root.join(device).exists())
}

fn take_in(root: &Path) -> Result<(), ContainerError> {
    if in_tee(root) {
        let words = "memory: a guest in a TEE has what was validated when it booted, and takes no more";
        return Err(ContainerError::new(ErrorKind::Invalid, words));
    }
    if !slots::is_used(root, slot::MEMORY) {
        // Movable where the rest can carry it, so that it can be given back. A kernel without these files uses what comes as it
        // was built to.
        let _ = fs::write(root.join("sys/module/memory_hotplug/parameters/online_policy"), "auto-movable");
        let _ = fs::write(root.join("sys/devices/system/memory/auto_online_blocks"), "online");
        slots::look_again(root, slot::MEMORY)
            .map_err(|e| ContainerError::guest("memory: look for the device that was added", e))?;
    }
    // The slot's driver is content with any device.
    let taken = fs::read_dir(root.join(MEMORY_DRIVER)).into_iter().flatten().flatten();
    if taken.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().starts_with("virtio")) {
        return Ok(());
    }
    let missing =
        io::Error::new(io::ErrorKind::Unsupported, "the kernel has no driver for it (CONFIG_VIRTIO_MEM)");
    Err(ContainerError::guest("memory: take what was added", missing))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRIVER: &str = "sys/bus/platform/drivers/virtio-mmio";

    /// A directory in which these files and directories are.
    fn root(files: &[&str], directories: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for directory in directories {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        for file in files {
            fs::create_dir_all(root.path().join(file).parent().unwrap()).unwrap();
            fs::write(root.path().join(file), "").unwrap();
        }
        root
    }

    #[test]
    fn the_device_is_named_to_its_driver_once() {
        let bind = format!("{DRIVER}/bind");
        let files = [bind.as_str(), "sys/devices/system/memory/auto_online_blocks"];
        let root = root(&files, &[&format!("{MEMORY_DRIVER}/virtio3")]);
        take_in(root.path()).unwrap();
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        assert_eq!(read(&bind), "virtio-mmio.9");
        assert_eq!(read(files[1]), "online");
        fs::write(root.path().join(&bind), "").unwrap();
        fs::create_dir(root.path().join(DRIVER).join("virtio-mmio.9")).unwrap();
        take_in(root.path()).unwrap();
        assert_eq!(read(&bind), "", "it is bound already");
    }

    #[test]
    fn a_kernel_without_the_driver_is_named() {
        let error = take_in(root(&[&format!("{DRIVER}/bind")], &[]).path()).unwrap_err();
        assert!(error.to_string().contains("CONFIG_VIRTIO_MEM"), "{error}");
        assert!(take_in(root(&[], &[]).path()).is_err());
    }

    #[test]
    fn a_guest_in_a_tee_takes_none() {
        let root = root(&["dev/sev-guest", &format!("{DRIVER}/bind")], &[]);
        assert!(take_in(root.path()).unwrap_err().to_string().contains("TEE"));
        assert_eq!(fs::read_to_string(root.path().join(DRIVER).join("bind")).unwrap(), "");
    }
}
