//! Block devices that the kernel stacks: device mapper targets, and a loop device over memory.
//!
//! Owns: the system calls. Does not own: which devices, or in what order.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use zeroize::Zeroizing;

use super::abi::{
    DM_DEV_CREATE, DM_DEV_SUSPEND, DM_SECURE_DATA, DM_TABLE_LOAD, DM_VERSION, DmIoctl, DmTargetSpec,
    LOOP_CTL_GET_FREE, LOOP_SET_FD,
};

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// A block device of this many bytes whose content lies in this machine's memory, as far as it was written.
pub(super) fn memory(name: &str, bytes: u64) -> io::Result<PathBuf> {
    let backing = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
    backing.set_len(bytes)?;
    let control = open("/dev/loop-control")?;
    // SAFETY: takes no argument; makes a device when none is free.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    let path = format!("/dev/loop{number}");
    let device = open(&path)?;
    // SAFETY: the argument is a descriptor, of which the kernel takes a reference.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD, backing.as_raw_fd()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(path.into())
}

/// One target over all of a device.
pub(super) struct Target<'a> {
    /// Name of the device.
    pub(super) name: &'a str,
    /// `integrity`, `crypt`.
    pub(super) kind: &'a str,
    /// Sectors of 512 bytes.
    pub(super) sectors: u64,
    /// What the target is told; it may hold a key.
    pub(super) words: Zeroizing<String>,
}

impl Target<'_> {
    /// Makes the device; the path of its node.
    pub(super) fn make(&self) -> io::Result<PathBuf> {
        let control: OwnedFd = open("/dev/mapper/control")?.into();
        let created = call(&control, DM_DEV_CREATE, &mut self.request(false))?;
        call(&control, DM_TABLE_LOAD, &mut self.request(true))?;
        call(&control, DM_DEV_SUSPEND, &mut self.request(false))?;
        Ok(format!("/dev/dm-{}", minor(created)).into())
    }

    /// A request about this device, with its table or without.
    fn request(&self, table: bool) -> Zeroizing<Vec<u8>> {
        let header = size_of::<DmIoctl>();
        let spec = size_of::<DmTargetSpec>();
        let length = if table { spec + (self.words.len() + 1).next_multiple_of(8) } else { 0 };
        let mut bytes = Zeroizing::new(vec![0; header + length]);
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        for (index, word) in DM_VERSION.iter().enumerate() {
            put(4 * index, &word.to_ne_bytes());
        }
        put(std::mem::offset_of!(DmIoctl, data_size), &((header + length) as u32).to_ne_bytes());
        put(std::mem::offset_of!(DmIoctl, data_start), &(header as u32).to_ne_bytes());
        put(std::mem::offset_of!(DmIoctl, target_count), &u32::from(table).to_ne_bytes());
        put(std::mem::offset_of!(DmIoctl, flags), &DM_SECURE_DATA.to_ne_bytes());
        put(std::mem::offset_of!(DmIoctl, name), self.name.as_bytes());
        if table {
            put(header + std::mem::offset_of!(DmTargetSpec, length), &self.sectors.to_ne_bytes());
            put(header + std::mem::offset_of!(DmTargetSpec, next), &(length as u32).to_ne_bytes());
            put(header + std::mem::offset_of!(DmTargetSpec, target_type), self.kind.as_bytes());
            put(header + spec, self.words.as_bytes());
        }
        bytes
    }
}

/// One request; the device number that the kernel answers.
fn call(control: &impl AsFd, number: u64, request: &mut [u8]) -> io::Result<u64> {
    // SAFETY: the request begins with a struct dm_ioctl whose data_size is its length, beyond which the kernel writes nothing.
    if unsafe { libc::ioctl(control.as_fd().as_raw_fd(), number, request.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let at = std::mem::offset_of!(DmIoctl, dev);
    let dev = request.get(at..at + 8).and_then(|b| b.try_into().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(u64::from_ne_bytes(dev))
}

/// The kernel's huge_encode_dev has 8 bits of the minor number below the major's 12, and the others above.
fn minor(dev: u64) -> u64 {
    dev & 0xff | (dev >> 12) & 0xfff00
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let words = Zeroizing::new("/dev/vda 0 x".to_owned());
        let target = Target { name: "scratch", kind: "crypt", sectors: 8, words };
        let bytes = target.request(true);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        // By hand from dm-ioctl.h: sizes at 12 and 16, count at 20, name at 48; the target's length at 8, its type at 24.
        assert_eq!((word(0), word(12) as usize, word(16), word(20)), (4, bytes.len(), 312, 1));
        assert_eq!(&bytes[48..56], b"scratch\0");
        assert_eq!((word(312 + 8), word(312 + 20) as usize), (8, bytes.len() - 312));
        assert_eq!(&bytes[312 + 24..312 + 30], b"crypt\0");
        assert_eq!(&bytes[352..], b"/dev/vda 0 x\0\0\0\0");
        assert_eq!(target.request(false).len(), 312);
    }

    #[test]
    fn a_device_number_is_taken_apart() {
        // 254:3, and 254:0x12345.
        assert_eq!((minor(0xfe03), minor(0x1230_fe45)), (3, 0x12345));
    }
}
