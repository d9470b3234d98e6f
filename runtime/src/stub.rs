//! The stub: the process that callers take for the container's.
//!
//! Owns: relaying stdio, signals and window sizes between the caller and the guest's process, its rights on the host, its exit
//! code. It holds no secrets and can do nothing else. Does not own: which files tools of the host see through it (`root`), how something is
//! written to a reader that may stall (`output`).

pub mod output;
pub mod root;

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use coffer_protocol::{Ended, Kind, Outbox, STDIN_WINDOW, WindowSize};
use nix::{
    fcntl::{OFlag, openat},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        stat::Mode,
    },
};

use crate::{
    client::Connection, descriptors::Carried, error::Error, notify::Teller, pid, state::OUT_OF_MEMORY,
};
use output::Rest;

/// Exit code when the VM is gone before its process ended, as if it had been killed.
const VM_GONE: i32 = 137;
/// Read at once.
const CHUNK: usize = 256 * 1024;
/// How long a VMM may take from closing its connections to its end.
pub const VMM_END_LIMIT: Duration = Duration::from_secs(10);

/// Blocks every signal; they are read from the descriptor. Call it before the process can be found by others.
///
/// # Errors
/// The system's.
pub fn take_signals() -> io::Result<SignalFd> {
    let set = SigSet::all();
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

/// Makes a terminal this session's, so that its size changes are signalled. One that was made for the process is this process's stdio, too:
/// containerd's shim reads what it gave `create` for stdout to the end, and no `start` comes before that.
pub fn take_terminal(terminal: &Terminal) {
    // SAFETY: the descriptor is open for as long as it is borrowed; the request takes an integer.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) };
    if let Terminal::Made(slave) = terminal {
        for stdio in 0..3 {
            // SAFETY: makes these three numbers the terminal; nothing here owns them.
            unsafe { libc::dup2(slave.as_raw_fd(), stdio) };
        }
    }
}

/// Has no write wait for a reader: to stdout, stderr, the terminal that was made, and what the process has beside them.
pub fn take_outputs(terminal: Option<&Terminal>, further: &[Carried]) {
    let made = terminal.filter(|terminal| matches!(terminal, Terminal::Made(_))).map(AsRawFd::as_raw_fd);
    let further = further.iter().filter(|carried| carried.stream.write).filter_map(Carried::number);
    [1, 2].into_iter().chain(made).chain(further).for_each(output::open_anew);
}

/// Lets go of everything that relaying does not need.
pub fn drop_rights() {
    for capability in 0..64 {
        // SAFETY: changes what this process may do, and only less.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    // SAFETY: likewise.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let (header, none) = (Header { version: 0x2008_0522, pid: 0 }, [0u32; 6]);
    // SAFETY: version 3 takes two triples of words, all of them zero.
    unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
}

/// As whom [`mark`] makes its file, too: podman gives a bundle to the root of a container's user namespace. Under runc that user's
/// processes are in this one's place. Call it before [`drop_rights`]: nobody can be chosen later.
pub fn save_user(user: u32) {
    // SAFETY: changes one number of this process, which has one thread. The others stay as they are.
    unsafe { libc::setresuid(u32::MAX, u32::MAX, user) };
}

/// Makes a file, whoever may.
fn mark(directory: &File, name: &str) {
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let make = || openat(directory, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).is_ok();
    if !make() {
        as_saved_user(make);
    }
}

/// Does something as the user that was saved, without any right.
fn as_saved_user(act: impl FnOnce() -> bool) {
    let (mut real, mut effective, mut saved) = (0, 0, 0);
    // SAFETY: the pointers are to numbers that outlive the call.
    unsafe { libc::getresuid(&raw mut real, &raw mut effective, &raw mut saved) };
    // SAFETY: changes one number of this process, to one that it has.
    if saved == effective || unsafe { libc::setresuid(u32::MAX, saved, u32::MAX) } < 0 {
        return;
    }
    act();
    // SAFETY: as above.
    unsafe { libc::setresuid(u32::MAX, effective, u32::MAX) };
}

/// The host's side of a process's terminal.
pub enum Terminal {
    /// The slave of one that was made for the process; whoever has the master reads what it prints.
    Made(OwnedFd),
    /// The caller's own, for keys and the size; what the process prints goes to stdout, which may be a file.
    Callers(OwnedFd),
}

impl AsRawFd for Terminal {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Made(fd) | Self::Callers(fd) => fd.as_raw_fd(),
        }
    }
}

/// What a stub works with.
pub struct Relay {
    /// Frames on their way to the guest.
    pub out: Outbox,
    /// The process's connection.
    pub connection: Connection,
    /// All signals.
    pub signals: SignalFd,
    /// A terminal, or 0, 1 and 2.
    pub terminal: Option<Terminal>,
    /// Where the VMM says why it ended; opened before the root changed.
    pub reports: Option<File>,
    /// The VMM, to wait for what it says at its end.
    pub vmm: Option<OwnedFd>,
    /// Directories where callers look for the file `oom`, for a container's first process; opened before the root changed.
    pub oom: Vec<File>,
    /// The container's own directory, likewise.
    pub own: Option<File>,
    /// Who hears what the container's processes notify.
    pub teller: Option<Teller>,
    /// Open files of the caller, the process's from 3 on.
    pub further: Vec<Further>,
}

/// How a stub goes on from its set-up: whoever forked it reads `k`, or what failed; then it relays until its process has ended.
pub fn go_on(mut ready: File, set_up: io::Result<SignalFd>, relay: impl FnOnce(SignalFd) -> Relay) -> ! {
    match set_up {
        Ok(signals) => {
            let _ = ready.write_all(b"k");
            drop(ready);
            std::process::exit(relay(signals).run())
        }
        Err(error) => {
            let _ = ready.write_all(error.to_string().as_bytes());
            std::process::exit(1)
        }
    }
}

/// An open file of the caller and what of it still goes on.
#[derive(Debug)]
pub struct Further {
    fd: Option<OwnedFd>,
    /// The guest may have this many bytes more; none after the end.
    credit: Option<usize>,
    /// The process may still write.
    output: bool,
}

impl From<Carried> for Further {
    fn from(carried: Carried) -> Self {
        let credit = carried.stream.read.then_some(STDIN_WINDOW);
        Self { fd: carried.fd, credit, output: carried.stream.write }
    }
}

impl Further {
    fn end_input(&mut self) {
        self.credit = None;
        if !self.output {
            self.fd = None;
        }
    }

    fn end_output(&mut self) {
        self.output = false;
        if let Some(fd) = &self.fd {
            // The caller may have it open as well, so that closing it here would end nothing. Only a socket can be shut.
            let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        }
        if self.credit.is_none() {
            self.fd = None;
        }
    }
}

enum Step {
    /// All that came is done, or waits for a reader.
    Goes,
    Ended(Ended),
    VmGone,
}

impl Relay {
    /// Relays until the process has ended; the exit code is the process's.
    #[must_use]
    pub fn run(mut self) -> i32 {
        let _ = self.connection.stream.set_read_timeout(None);
        let mut credit = STDIN_WINDOW;
        let mut stdin_open = true;
        let mut open = true;
        let mut rest = None;
        let mut waits = Vec::new();
        loop {
            // The terminal's size may have been set before anybody listened.
            match self.frames(&mut credit, &mut rest) {
                Step::Goes if open || rest.is_some() => {}
                Step::Ended(ended) => return self.ended(ended),
                Step::Goes | Step::VmGone => return self.vm_gone(),
            }
            let input = self.terminal.as_ref().map_or(0, AsRawFd::as_raw_fd);
            let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
            let reads = if stdin_open && credit > 0 { input } else { -1 };
            // While a reader stalls the guest keeps what it has.
            let guest = if open && rest.is_none() { self.connection.stream.as_raw_fd() } else { -1 };
            waits.clear();
            waits.extend([
                entry(guest, libc::POLLIN),
                entry(self.signals.as_raw_fd(), libc::POLLIN),
                entry(reads, libc::POLLIN),
                entry(rest.as_ref().map_or(-1, |rest| rest.fd), libc::POLLOUT),
            ]);
            waits.extend(self.further.iter().map(|further| {
                let fd = further.fd.as_ref().filter(|_| further.credit.is_some_and(|credit| credit > 0));
                entry(fd.map_or(-1, AsRawFd::as_raw_fd), libc::POLLIN)
            }));
            // SAFETY: a vector of valid entries of this length.
            if unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, -1) } < 0 {
                continue;
            }
            if waits[1].revents != 0 {
                self.forward_signals();
            }
            if waits[2].revents != 0 {
                stdin_open = self.forward_stdin(input, &mut credit);
            }
            for number in 0..self.further.len() {
                if waits[4 + number].revents != 0 {
                    self.forward_further(number);
                }
            }
            if waits[3].revents != 0 && rest.as_mut().is_some_and(Rest::go_on) {
                rest = None;
            }
            if waits[0].revents != 0 {
                open = self.read();
            }
        }
    }

    /// The exit code. podman takes a container's end for want of memory from a file, which conmon writes when the host's
    /// cgroup says so; here the guest's does.
    fn ended(&self, ended: Ended) -> i32 {
        if ended.oom_kills > 0 {
            self.oom.iter().for_each(|directory| mark(directory, OUT_OF_MEMORY));
            let name = format!("{OUT_OF_MEMORY}.{}", ended.oom_kills);
            self.own.iter().for_each(|directory| mark(directory, &name));
        }
        i32::from(ended.exit.code())
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.out.push(kind, payload);
        self.flush();
    }

    fn flush(&mut self) {
        // When the VM is gone the next read says so.
        let _ = self.connection.stream.write_all(self.out.waiting());
        self.out.sent(self.out.waiting().len());
    }

    /// Reads from the guest. False at the end.
    fn read(&mut self) -> bool {
        match self.connection.stream.read(self.connection.decoder.space(CHUNK)) {
            Ok(0) => false,
            Ok(count) => {
                self.connection.decoder.filled(count);
                true
            }
            Err(e) => e.kind() == io::ErrorKind::Interrupted,
        }
    }

    /// Does what the guest says, up to what its reader has no room for.
    fn frames(&mut self, credit: &mut usize, rest: &mut Option<Rest>) -> Step {
        let word = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).map_or(0, u32::from_le_bytes) as usize;
        while rest.is_none() {
            match self.connection.decoder.lend() {
                Ok(Some((kind, payload))) => match kind {
                    Kind::Stdout => match &self.terminal {
                        Some(Terminal::Made(slave)) => *rest = output::write(slave.as_raw_fd(), payload),
                        Some(Terminal::Callers(_)) | None => *rest = output::write(1, payload),
                    },
                    Kind::Stderr => *rest = output::write(2, payload),
                    // Readers of a pipe see its end when a daemon closes what it inherited, though its stub lives on.
                    Kind::StdoutEnd => close(1),
                    Kind::StderrEnd => close(2),
                    Kind::StdinCredit => *credit = credit.saturating_add(word(payload)).min(STDIN_WINDOW),
                    Kind::Notification => {
                        if let Some(teller) = &self.teller {
                            teller.tell(payload);
                        }
                    }
                    Kind::Stream | Kind::StreamEnd | Kind::StreamCredit => {
                        let Some((number, payload)) = payload.split_first() else { return Step::VmGone };
                        let Some(further) = self.further.get_mut(usize::from(*number)) else {
                            return Step::VmGone;
                        };
                        match kind {
                            Kind::Stream => {
                                if let (Some(fd), true) = (&further.fd, further.output) {
                                    *rest = output::write(fd.as_raw_fd(), payload);
                                }
                            }
                            Kind::StreamEnd => further.end_output(),
                            _ => {
                                if let Some(credit) = &mut further.credit {
                                    *credit = credit.saturating_add(word(payload)).min(STDIN_WINDOW);
                                }
                            }
                        }
                    }
                    Kind::Ended => return Ended::from_payload(payload).map_or(Step::VmGone, Step::Ended),
                    _ => return Step::VmGone,
                },
                Ok(None) => return Step::Goes,
                Err(_) => return Step::VmGone,
            }
        }
        Step::Goes
    }

    /// Takes what is there of one of the caller's further files.
    fn forward_further(&mut self, number: usize) {
        let Some(further) = self.further.get_mut(number) else { return };
        let (Some(fd), Some(credit)) = (&further.fd, further.credit) else { return };
        let most = CHUNK.min(credit);
        let space = self.out.space(1 + most);
        space[0] = number as u8;
        match read(fd.as_raw_fd(), &mut space[1..]) {
            Some(0) => {
                further.end_input();
                self.send(Kind::StreamEnd, &[number as u8]);
            }
            Some(count) => {
                further.credit = Some(credit - count);
                self.out.filled(Kind::Stream, 1 + count);
                self.flush();
            }
            None => {}
        }
    }

    fn forward_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {}
                Ok(Signal::SIGWINCH) if self.terminal.is_some() => self.send_window(),
                _ => self.send(Kind::Signal, &signal.ssi_signo.to_le_bytes()),
            }
        }
    }

    /// Tells the guest the terminal's size.
    pub fn send_window(&mut self) {
        if let Some(size) = self.terminal.as_ref().and_then(window) {
            let payload = size.to_payload();
            self.send(Kind::Resize, &payload);
        }
    }

    /// Takes what is there of stdin. False at its end.
    fn forward_stdin(&mut self, fd: RawFd, credit: &mut usize) -> bool {
        match read(fd, self.out.space(CHUNK.min(*credit))) {
            Some(0) => {
                self.send(Kind::StdinEnd, &[]);
                false
            }
            Some(count) => {
                self.out.filled(Kind::Stdin, count);
                self.flush();
                *credit -= count;
                true
            }
            None => true,
        }
    }

    fn vm_gone(&mut self) -> i32 {
        // The VMM writes its report right before it ends, and its connections close before that.
        if let Some(vmm) = &self.vmm {
            let _ = pid::wait_end(vmm, VMM_END_LIMIT);
        }
        let mut text = String::new();
        if let Some(directory) = &self.reports {
            // SAFETY: the name is a C string; the directory is open.
            let fd = unsafe {
                libc::openat(directory.as_raw_fd(), c"exit-report".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC)
            };
            if fd >= 0 {
                // SAFETY: openat returned a new descriptor.
                let _ = unsafe { File::from_raw_fd(fd) }.read_to_string(&mut text);
            }
        }
        let report: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let reason = report["message"].as_str().unwrap_or("the VMM was killed");
        let error = Error::Vm(reason.to_owned());
        output::write_all(2, format!("coffer: {error}\n").as_bytes());
        VM_GONE
    }
}

/// The size of a terminal.
pub fn window(terminal: &impl AsRawFd) -> Option<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the pointer is to a winsize that outlives the call.
    let known = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } == 0;
    (known && size.ws_row > 0).then_some(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// Closes one of the inherited descriptors, which nothing here owns.
fn close(fd: RawFd) {
    // SAFETY: later writes to it fail, and nothing else depends on it.
    unsafe { libc::close(fd) };
}

/// Reads what is there; zero at the end, which an error is too.
fn read(fd: RawFd, buffer: &mut [u8]) -> Option<usize> {
    // SAFETY: the buffer is as long as is said.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).ok().or_else(|| match io::Error::last_os_error().kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => None,
        _ => Some(0),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    /// podman looks for the file in a directory that is the container's root's alone, where it has a user namespace.
    #[test]
    fn a_mark_is_made_in_the_directory_of_a_containers_root_and_in_that_of_the_hosts() {
        // SAFETY: reads a number.
        if unsafe { libc::geteuid() } != 0 {
            return;
        }
        let (mapped, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::set_permissions(mapped.path(), PermissionsExt::from_mode(0o700)).unwrap();
        chown(mapped.path(), Some(100_000), Some(100_000)).unwrap();
        let open = [mapped.path(), own.path()].map(|path| File::open(path).unwrap());
        // SAFETY: the child makes system calls alone, and ends by one.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            save_user(100_000);
            drop_rights();
            open.iter().for_each(|directory| mark(directory, "mark"));
            // SAFETY: reads a number, and ends this process.
            unsafe { libc::_exit(i32::from(libc::geteuid() != 0)) }
        }
        let mut status = 0;
        // SAFETY: the pointer is to an int that outlives the call.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert_eq!(status, 0);
        assert!(own.path().join("mark").exists());
        assert!(mapped.path().join("mark").exists());
    }
}
