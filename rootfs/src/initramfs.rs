//! The initramfs: init, the directories it mounts on, and the two devices that the kernel itself opens.
//!
//! Owns: names, modes, order. Every time and inode number is fixed, so that the archive depends on init alone.

use std::io;

use cpio::{NewcBuilder, newc};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Directories that init mounts on.
const DIRECTORIES: [&str; 6] = ["dev", "proc", "run", "sys", "tmp", "root"];

/// An uncompressed newc archive with `init` as `/init`.
///
/// # Errors
/// When the archive's format cannot hold it: `init` is 4 GiB or longer.
pub fn with_init(init: &[u8]) -> io::Result<Vec<u8>> {
    let mut archive = Vec::with_capacity(init.len() + 4096);
    let mut inode = 0;
    let mut add = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        inode += 1;
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other("init is 4 GiB or longer"))?;
        let header =
            NewcBuilder::new(name).ino(inode).mode(mode).nlink(1).rdev_major(device.0).rdev_minor(device.1);
        let mut entry = header.write(&mut archive, size);
        io::Write::write_all(&mut entry, data)?;
        entry.finish().map(drop)
    };
    for name in DIRECTORIES {
        add(name, DIRECTORY, (0, 0), &[])?;
    }
    add("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
    add("dev/null", CHARACTER_DEVICE, (1, 3), &[])?;
    add("init", PROGRAM, (0, 0), init)?;
    newc::trailer(&mut archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let archive = with_init(b"\x7fELF and so on").unwrap();
        // GNU cpio is the oracle; without it there is nothing to compare with.
        let mut child = Command::new("cpio")
            .args(["-itv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio (apt-get install cpio)");
        io::Write::write_all(child.stdin.as_mut().unwrap(), &archive).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(text.contains("-rwxr-xr-x") && text.contains("14 Jan  1  1970 init"), "{text}");
        assert!(
            text.lines().any(|l| l.starts_with("crw") && l.contains("5,   1") && l.ends_with("dev/console")),
            "{text}"
        );
        assert_eq!(text.lines().count(), 9);
    }

    #[test]
    fn the_same_init_gives_the_same_bytes() {
        assert_eq!(with_init(b"x").unwrap(), with_init(b"x").unwrap());
    }
}
