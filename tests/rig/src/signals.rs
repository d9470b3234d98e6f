//! The signals that ask this process to end: noted, so that it can clean up first.

use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::{errno, signal::register_signal_handler};

static RECEIVED: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    RECEIVED.store(signal, Ordering::Relaxed);
}

/// From now on such a signal is noted.
pub(crate) fn catch() -> Result<(), errno::Error> {
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT]
        .into_iter()
        .try_for_each(|signal| register_signal_handler(signal, note))
}

/// The exit code of a process that such a signal ended, once there was one.
pub(crate) fn exit_code() -> Option<u8> {
    match RECEIVED.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(128 + signal as u8),
    }
}
