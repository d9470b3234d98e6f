//! Devices that come to the machine while it runs: the kernel looks at a place once, at boot, and again when it is told to.
//!
//! Owns: that. Does not own: what the device is. Which places there are is the machine's constant (`coffer-layout`), never the host's word.

use std::{fs, io, path::Path};

/// The driver of the places that the command line names.
const DRIVER: &str = "sys/bus/platform/drivers/virtio-mmio";

/// Has the kernel look at a place again, where it found no device so far.
///
/// # Errors
/// The kernel's: `ENODEV` when there is none still.
pub(crate) fn look_again(root: &Path, slot: usize) -> io::Result<()> {
    let driver = root.join(DRIVER);
    let device = format!("virtio-mmio.{slot}");
    if driver.join(&device).exists() { Ok(()) } else { fs::write(driver.join("bind"), &device) }
}

/// Whether the kernel uses the device at a place.
pub(crate) fn is_used(root: &Path, slot: usize) -> bool {
    root.join(DRIVER).join(format!("virtio-mmio.{slot}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_named_to_the_driver_unless_it_is_used() {
        let root = tempfile::tempdir().unwrap();
        let driver = root.path().join(DRIVER);
        fs::create_dir_all(driver.join("virtio-mmio.3")).unwrap();
        fs::write(driver.join("bind"), "").unwrap();
        look_again(root.path(), 3).unwrap();
        assert_eq!(fs::read_to_string(driver.join("bind")).unwrap(), "");
        assert!(is_used(root.path(), 3) && !is_used(root.path(), 4));
        look_again(root.path(), 4).unwrap();
        assert_eq!(fs::read_to_string(driver.join("bind")).unwrap(), "virtio-mmio.4");
        assert!(look_again(Path::new("/nowhere"), 4).is_err());
    }
}
