//! SIGINT, SIGTERM and SIGHUP while a container is made: what there is of it is taken down, as after any other failure.
//!
//! Owns: that such a signal is remembered, and that it ends the wait for the guest, which may be as long as an image takes to unpack. Does not own: taking
//! down. SIGKILL leaves what `delete --force` finds.

use std::{
    io,
    os::fd::RawFd,
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static CAME: AtomicBool = AtomicBool::new(false);
static CONNECTION: AtomicI32 = AtomicI32::new(-1);

/// Stores, and one system call: nothing that a signal must not do.
extern "C" fn take(_: libc::c_int) {
    CAME.store(true, Ordering::SeqCst);
    let connection = CONNECTION.load(Ordering::SeqCst);
    if connection >= 0 {
        // SAFETY: the number is of an open socket as long as it stands there. Who reads finds the end.
        unsafe { libc::shutdown(connection, libc::SHUT_RDWR) };
    }
}

/// From now on these signals are remembered. One that the caller ignores stays ignored; programs that are run have them as usual.
///
/// # Errors
/// The system's.
pub fn remember() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(take), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler keeps to what it may do.
        let before = unsafe { sigaction(signal, &action) }?;
        if before.handler() == SigHandler::SigIgn {
            // SAFETY: as it was.
            unsafe { sigaction(signal, &before) }?;
        }
    }
    Ok(())
}

/// One has come.
#[must_use]
pub fn came() -> bool {
    CAME.load(Ordering::SeqCst)
}

/// While this is there, such a signal ends a connection.
#[derive(Debug)]
pub struct Ends(());

impl Ends {
    /// By its number; it outlives this.
    #[must_use]
    pub fn connection(number: RawFd) -> Self {
        CONNECTION.store(number, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        CONNECTION.store(-1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsRawFd, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn a_signal_ends_the_wait_for_an_answer() {
        remember().unwrap();
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let ends = Ends::connection(ours.as_raw_fd());
        assert!(!came());
        // SAFETY: sends this process a signal that it has a handler for.
        unsafe { libc::raise(libc::SIGTERM) };
        assert_eq!((ours.read(&mut [0]).unwrap(), came()), (0, true));
        drop(ends);
        assert_eq!(CONNECTION.load(Ordering::SeqCst), -1);
    }
}
