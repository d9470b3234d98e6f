//! A random number generator that is no other machine's, after a start from a template.
//!
//! Owns: mixing in what the host gives, and the new key. Does not own: the generator, which is the kernel's.
//!
//! The host's bytes are not counted as entropy: a generator that is not ready waits on for its own, and a host that knows what it
//! gave has gained nothing. The kernel mixes the processor's own random numbers into every new key. Numbers that it has made in
//! advance, one batch for each processor, are void with the old one.

use std::{fs::File, io, io::Write, os::fd::AsRawFd};

/// `RNDRESEEDCRNG` (random(4)).
const RESEED: libc::c_ulong = 0x5207;

/// Mixes `entropy` in and takes a new key at once.
///
/// # Errors
/// The kernel's.
pub(crate) fn reseed(entropy: &[u8; 32]) -> io::Result<()> {
    let mut device = File::options().write(true).open("/dev/urandom")?;
    device.write_all(entropy)?;
    // SAFETY: the command takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RESEED as libc::Ioctl) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Not ready: it has given nothing to anybody yet.
    if error.raw_os_error() == Some(libc::ENODATA) { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_taken_and_a_new_key_is_for_root_alone() {
        // SAFETY: has no arguments and cannot fail.
        let is_root = unsafe { libc::geteuid() } == 0;
        let code = reseed(&[7; 32]).err().and_then(|e| e.raw_os_error());
        assert!(code.is_none() || !is_root || code == Some(libc::EPERM), "{code:?}");
    }
}
