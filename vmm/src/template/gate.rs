//! Stops all processors where they are, between two instructions.
//!
//! Owns: the word that closes the gate, the signal that gets a processor out of the guest. Does not own: threads.

use std::{
    os::unix::thread::JoinHandleExt,
    sync::atomic::{AtomicU32, Ordering},
    thread::JoinHandle,
};

/// What processors look at before they go on: who closed it.
#[derive(Debug)]
pub struct Gate(AtomicU32);

const OPEN: u32 = u32::MAX;

impl Default for Gate {
    fn default() -> Self {
        Self(AtomicU32::new(OPEN))
    }
}

impl Gate {
    /// From now on no processor enters the guest; those that are in it are to be kicked. Called for the processor whose guest
    /// said that it is ready.
    pub fn close(&self, processor: u32) {
        self.0.store(processor, Ordering::SeqCst);
    }

    /// The processor that closed it.
    #[must_use]
    pub fn closed_by(&self) -> Option<u32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|by| *by != OPEN)
    }

    /// Whether to stop.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed_by().is_some()
    }
}

/// Gets this signal's threads out of KVM_RUN, and does nothing else.
const KICK: libc::c_int = libc::SIGUSR1;

/// Before the first [`kick`].
pub fn allow_kicks() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: an all-zero sigaction is valid; the handler does nothing; without SA_RESTART the system call is interrupted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as libc::sighandler_t;
        libc::sigaction(KICK, &raw const action, std::ptr::null_mut());
    }
}

/// Interrupts a processor's thread. It may have been on its way into the guest: repeat until it has stopped.
pub fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle keeps the thread's id valid, also when it has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), KICK) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, os::unix::net::UnixStream, sync::Arc, time::Duration};

    #[test]
    fn a_thread_in_a_system_call_sees_the_gate_after_a_kick() {
        allow_kicks();
        let gate = Arc::new(Gate::default());
        let (mut one, _other) = UnixStream::pair().unwrap();
        let seen = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            while !seen.is_closed() {
                let _ = one.read(&mut [0]);
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        assert!(!thread.is_finished());
        gate.close(0);
        while !thread.is_finished() {
            kick(&thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap();
    }
}
