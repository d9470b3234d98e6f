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
