//! A terminal for a VMM that starts with nothing else as its standard input.
//!
//! Owns: the pair. Does not own: who gets one. Nobody writes to it, and what the VMM writes is not read.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, OwnedFd},
    process::Stdio,
    ptr,
};

/// Our end, to be held while the VMM runs, and the VMM's.
///
/// # Errors
/// The system's.
pub fn pair() -> io::Result<(File, Stdio)> {
    let (mut ours, mut theirs) = (-1, -1);
    let (name, settings, size) = (ptr::null_mut(), ptr::null(), ptr::null());
    // SAFETY: both numbers outlive the call; no name, settings or size are asked for.
    let result = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, name, settings, size) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    for end in [ours, theirs] {
        // SAFETY: sets a flag of a descriptor that is open, so that the VMM gets no end but its own.
        unsafe { libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: the call has just opened both, and nobody else has them.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    Ok((ours.into(), theirs.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_has_a_terminal() {
        let (ours, theirs) = pair().unwrap();
        assert!(Command::new("test").args(["-t", "0"]).stdin(theirs).status().unwrap().success());
        drop(ours);
        assert!(!Command::new("test").args(["-t", "0"]).stdin(Stdio::null()).status().unwrap().success());
    }
}
