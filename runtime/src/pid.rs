//! Processes of ours by number and start time, so that a number used again is not taken for the old process.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// A process.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Pid {
    /// Its number.
    pub pid: i32,
    /// Its start, in ticks since boot.
    pub start: u64,
}

/// State letter and start time from `/proc/PID/stat`.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Start time is field 22; the state is field 3.
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Has the kernel end a process of ours sooner or later than others when memory is short. Where it may not be lowered it stays as it is.
pub fn set_oom_score_adj(pid: i32, wanted: Option<i32>) {
    if let Some(wanted) = wanted {
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), wanted.to_string());
    }
}

impl Pid {
    /// A process that runs now.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|(_, start)| Self { pid, start })
    }

    /// The process that called this one, if it has this name.
    #[must_use]
    pub fn parent_named(name: &str) -> Option<Self> {
        let parent = std::os::unix::process::parent_id();
        let found = fs::read_to_string(format!("/proc/{parent}/comm")).ok()?;
        if found.trim_end() == name { Self::of(parent as i32) } else { None }
    }

    /// Still the same process, and not one that only waits to be reaped.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start && !matches!(state, 'Z' | 'X'))
    }

    /// This process.
    #[must_use]
    pub fn is_me(&self) -> bool {
        i32::try_from(std::process::id()).is_ok_and(|me| me == self.pid) && self.is_alive()
    }

    /// Sends a signal, if it is alive.
    pub fn signal(&self, signal: i32) {
        if self.is_alive() {
            // SAFETY: sends a signal to a process that was checked to be ours right before.
            unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// A descriptor of the process itself, which stays right when its number is used again.
    ///
    /// # Errors
    /// The system's; not found when it is gone.
    pub fn open(&self) -> io::Result<OwnedFd> {
        // SAFETY: makes a new descriptor, or fails.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        if self.is_alive() { Ok(fd) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Waits until it is gone. False when it is not in time.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let began = Instant::now();
        while self.is_alive() {
            if began.elapsed() > limit {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

/// Waits until the process of a descriptor has ended. False when it has not in time. Works from other namespaces, too.
#[must_use]
pub fn wait_end(process: &impl AsRawFd, limit: Duration) -> bool {
    let mut entry = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut entry, 1, i32::try_from(limit.as_millis()).unwrap_or(i32::MAX)) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_is_not_alive_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = Pid::of(child.id() as i32).unwrap();
        assert!(pid.is_alive());
        assert!(!Pid { start: pid.start + 1, ..pid }.is_alive());
        let open = pid.open().unwrap();
        assert!(!wait_end(&open, Duration::ZERO));
        pid.signal(libc::SIGKILL);
        assert!(pid.wait(Duration::from_secs(5)));
        assert!(wait_end(&open, Duration::from_secs(5)));
        child.wait().unwrap();
        assert!(pid.open().is_err());
    }
}
