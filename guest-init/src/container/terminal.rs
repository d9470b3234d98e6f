//! The terminal of a container's process.
//!
//! Owns: opening one of the container's own devpts, its size, making it a session's. Does not own: who reads and writes it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

use coffer_protocol::WindowSize;
use nix::mount::{MsFlags, mount};

use super::{
    ContainerError,
    child::duplicate,
    path::{self, Owner},
};

const FLAGS: i32 = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;

/// Both ends, not anybody's terminal yet.
pub(super) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Opens one of the devpts below `root`, for `owner`: an identifier of outside, which from within the container's user namespace
    /// could not be given.
    ///
    /// What is at the path may be the container's doing. The slave is therefore what the kernel has to this master, and no path's.
    pub(super) fn open(
        root: BorrowedFd<'_>,
        window: Option<WindowSize>,
        owner: Option<u32>,
    ) -> Result<Self, ContainerError> {
        let system = |stage: &'static str| move |e: io::Error| ContainerError::guest(stage, e);
        let master = path::open_with(root, Path::new("/dev/pts/ptmx"), FLAGS, 0)
            .map_err(system("open /dev/pts/ptmx"))?;
        let unlock = 0_i32;
        // SAFETY: the first takes a pointer to an int that outlives the call, the second a number.
        let slave = unsafe {
            match libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) {
                0 => libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, FLAGS),
                failed => failed,
            }
        };
        if slave < 0 {
            return Err(ContainerError::guest("open a terminal", io::Error::last_os_error()));
        }
        // SAFETY: the call returned a new descriptor that nobody else has.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        if let Some(size) = window {
            set_window(&master, size);
        }
        std::os::unix::fs::fchown(&slave, owner, None).map_err(system("give the terminal to its user"))?;
        Ok(Self { master, slave })
    }

    /// Lays it over the container's `/dev/console` (config-linux.md, "Default Devices"). Where this init's own /proc still is: the
    /// names of open places are there.
    pub(super) fn be_console(
        &self,
        root: BorrowedFd<'_>,
        owner: Option<Owner>,
    ) -> Result<(), ContainerError> {
        let failed = |e: io::Error| ContainerError::guest("make /dev/console", e);
        let place = path::make(root, Path::new("/dev/console"), true, owner).map_err(failed)?.fd;
        let (slave, place) = (path::name(&self.slave), path::name(&place));
        mount(Some(slave.as_str()), place.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|e| failed(e.into()))
    }

    /// The same by way of the mount namespace in which this process is by now: what was opened in the one that it left has none of the
    /// names there, and `tty` would find nothing under that which /proc says.
    pub(super) fn reopened(self, root: BorrowedFd<'_>) -> Result<Self, ContainerError> {
        let failed = |e: io::Error| ContainerError::guest("open the terminal again", e);
        let mut number = 0_u32;
        // SAFETY: takes a pointer to an int that outlives the call.
        if unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        let path = format!("/dev/pts/{number}");
        let slave = path::open_with(root, Path::new(&path), FLAGS, 0).map_err(failed)?;
        let place =
            |fd| nix::sys::stat::fstat(fd).map(|s| (s.st_dev, s.st_ino)).map_err(|e| failed(e.into()));
        match place(&slave)? == place(&self.slave)? {
            true => Ok(Self { slave, ..self }),
            false => Err(failed(io::Error::other(format!("{path} is another")))),
        }
    }

    /// Makes it the terminal of the session that this process has just started, and its stdio; returns the master.
    pub(super) fn take(self) -> Result<OwnedFd, ContainerError> {
        // SAFETY: takes two numbers.
        if unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
            return Err(ContainerError::guest("take the terminal", io::Error::last_os_error()));
        }
        for target in 0..3 {
            duplicate(self.slave.as_raw_fd(), target)?;
        }
        Ok(self.master)
    }
}

/// Sets a terminal's size; a terminal that cannot be sized stays as it is.
pub(crate) fn set_window(terminal: &impl AsRawFd, size: WindowSize) {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the pointer is to a winsize that outlives the call.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}
