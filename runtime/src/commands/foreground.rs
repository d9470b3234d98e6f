//! In front of the user: `run` and `exec` without `--detach` wait for the stub and hand signals on to it.
//!
//! Owns: this process's own terminal, raw from before the process runs until it has ended. Does not own: relaying bytes, which the stub does.

use std::{
    fs::File,
    io::{self, IsTerminal},
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::error::{Error, host};

/// The caller's terminal for a process that wants one: what stdin is, if it is a terminal.
pub(super) fn terminal() -> Result<Option<OwnedFd>, Error> {
    if !io::stdin().is_terminal() {
        return Ok(None);
    }
    io::stdin().as_fd().try_clone_to_owned().map(Some).map_err(host("take this terminal"))
}

/// Every key goes to the guest until this is dropped. Made before the process runs: whoever sees its first word may type at once.
pub(super) struct Raw(File, Termios);

impl Raw {
    pub(super) fn new(terminal: OwnedFd) -> Result<Self, Error> {
        let terminal = File::from(terminal);
        let before = tcgetattr(&terminal).map_err(host("read the terminal's settings"))?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw).map_err(host("make the terminal raw"))?;
        Ok(Self(terminal, before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.0, SetArg::TCSADRAIN, &self.1);
    }
}

/// This process's signals, kept from before the container's process runs: whoever sees its first word may signal at once.
pub(super) struct Signals(SignalFd);

impl Signals {
    pub(super) fn hold() -> Result<Self, Error> {
        let all = SigSet::all();
        all.thread_block().map_err(host("take signals"))?;
        SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC).map(Self).map_err(host("take signals"))
    }
}

/// Waits for the stub, our child, with its signals; gives its code as a shell would.
pub(super) fn wait(stub: i32, signals: &Signals) -> Result<i32, Error> {
    loop {
        match waitpid(Pid::from_raw(stub), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(host("wait for the container")(e)),
        }
        // The end of the child is a signal, too.
        let Ok(Some(signal)) = signals.0.read_signal() else { continue };
        let number = signal.ssi_signo as i32;
        if number != Signal::SIGCHLD as i32 {
            // SAFETY: signals our own child, which was not reaped.
            unsafe { libc::kill(stub, number) };
        }
    }
}
