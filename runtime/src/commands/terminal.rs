//! A terminal on the host for a process in the guest: raw, because the guest's terminal does the line editing.

use std::{
    io::IoSlice,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use nix::{
    pty::openpty,
    sys::{
        socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    },
};

use crate::error::{Error, host};

/// Makes a pair; returns master and slave.
pub(super) fn open() -> Result<(OwnedFd, OwnedFd), Error> {
    let pair = openpty(None, None).map_err(host("make a terminal"))?;
    let mut settings = tcgetattr(&pair.slave).map_err(host("read the terminal's settings"))?;
    cfmakeraw(&mut settings);
    tcsetattr(&pair.slave, SetArg::TCSANOW, &settings).map_err(host("make the terminal raw"))?;
    Ok((pair.master, pair.slave))
}

/// Sets the size that a configuration names (`process.consoleSize`, in characters).
pub(super) fn size(terminal: &OwnedFd, wanted: Option<oci_spec::runtime::Box>) {
    let Some(wanted) = wanted else { return };
    let cells = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
    let size = libc::winsize {
        ws_row: cells(wanted.height()),
        ws_col: cells(wanted.width()),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the pointer is to a winsize that outlives the call. A terminal that cannot be sized stays as it is.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}

/// Gives the master to the caller: one message with one descriptor.
pub(super) fn give(socket: &Path, master: &OwnedFd) -> Result<(), Error> {
    let stream = UnixStream::connect(socket)
        .map_err(host(format!("connect to console socket {}", socket.display())))?;
    let fds = [master.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let name = [IoSlice::new(b"/dev/ptmx")];
    sendmsg::<UnixAddr>(stream.as_raw_fd(), &name, &control, MsgFlags::empty(), None)
        .map(drop)
        .map_err(host("give the terminal to the console socket"))
}
