//! Writing to whoever called, without ever waiting in a write: a reader that stalls must keep no signal from the process.
//!
//! Owns: how much of something can be written now, and the rest of it that waits. Does not own: when to try again (`Relay`).

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Bytes that a pipe with any room takes whole (pipe(7), PIPE_BUF).
const WHOLE: usize = 4096;
/// Major numbers of pseudo-terminals' slaves (devices.txt of the kernel).
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;

/// What could not be written yet.
#[derive(Debug)]
pub(super) struct Rest {
    /// Where it goes.
    pub(super) fd: RawFd,
    bytes: Vec<u8>,
    written: usize,
}

impl Rest {
    /// Goes on; true when all is written, or nobody reads any more.
    pub(super) fn go_on(&mut self) -> bool {
        self.written += put(self.fd, &self.bytes[self.written..]);
        self.written == self.bytes.len()
    }
}

/// Writes what can be written now; a reader that is gone loses it.
pub(super) fn write(fd: RawFd, bytes: &[u8]) -> Option<Rest> {
    let written = put(fd, bytes);
    (written < bytes.len()).then(|| Rest { fd, bytes: bytes[written..].to_vec(), written: 0 })
}

/// Writes everything, at the end of all relaying.
pub(super) fn write_all(fd: RawFd, bytes: &[u8]) {
    let mut rest = write(fd, bytes);
    while let Some(waiting) = &mut rest {
        let mut room = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&raw mut room, 1, -1) };
        if waiting.go_on() {
            rest = None;
        }
    }
}

/// How a descriptor is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A write does not wait.
    Free,
    /// A socket: only this call does not wait, whatever others who have it open want.
    Socket,
    /// A write may wait.
    Held,
}

fn way(fd: RawFd) -> Way {
    // SAFETY: reads the flags of a descriptor.
    if unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_NONBLOCK != 0 {
        return Way::Free;
    }
    match stat(fd).map(|stat| stat.st_mode & libc::S_IFMT) {
        Some(libc::S_IFSOCK) => Way::Socket,
        Some(libc::S_IFIFO | libc::S_IFCHR) => Way::Held,
        _ => Way::Free,
    }
}

fn stat(fd: RawFd) -> Option<libc::stat> {
    // SAFETY: plain data for which zero is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a stat that outlives the call.
    (unsafe { libc::fstat(fd, &raw mut stat) } == 0).then_some(stat)
}

/// Whether opening the file once more gives the same thing: a pipe, or a pseudo-terminal's slave. Other devices may make something new.
fn is_the_same_anew(fd: RawFd) -> bool {
    stat(fd).is_some_and(|stat| match stat.st_mode & libc::S_IFMT {
        libc::S_IFIFO => true,
        libc::S_IFCHR => SLAVES.contains(&libc::major(stat.st_rdev)),
        _ => false,
    })
}

/// Bytes that are written or lost.
fn put(fd: RawFd, bytes: &[u8]) -> usize {
    let way = way(fd);
    let mut written = 0;
    while written < bytes.len() {
        let left = &bytes[written..];
        let count = match way {
            // SAFETY: the buffer is as long as is said.
            Way::Free => unsafe { libc::write(fd, left.as_ptr().cast(), left.len()) },
            // SAFETY: likewise.
            Way::Socket => unsafe { libc::send(fd, left.as_ptr().cast(), left.len(), libc::MSG_DONTWAIT) },
            Way::Held if !has_room(fd) => return written,
            // SAFETY: likewise.
            Way::Held => unsafe { libc::write(fd, left.as_ptr().cast(), left.len().min(WHOLE)) },
        };
        match usize::try_from(count) {
            Ok(count) => written += count,
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return written,
                _ => return bytes.len(),
            },
        }
    }
    written
}

fn has_room(fd: RawFd) -> bool {
    let mut room = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut room, 1, 0) > 0 }
}

/// Opens a pipe or terminal anew in the place of a descriptor, so that writes to it do not wait: whoever else has the caller's open is not to
/// notice. Where that cannot be, writes to it are short. It takes `/proc`, and the rights of before [`super::drop_rights`].
pub fn open_anew(fd: RawFd) {
    if way(fd) != Way::Held || !is_the_same_anew(fd) {
        return;
    }
    let Ok(name) = CString::new(format!("/proc/self/fd/{fd}")) else { return };
    // SAFETY: reads the flags of a descriptor.
    let mode = unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_ACCMODE;
    if mode == libc::O_RDONLY {
        return;
    }
    let flags = mode | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the name outlives the call.
    let fresh = unsafe { libc::open(name.as_ptr(), flags) };
    if fresh < 0 {
        return;
    }
    // SAFETY: open returned a new descriptor.
    let fresh = unsafe { OwnedFd::from_raw_fd(fresh) };
    // SAFETY: this number is ours, and stays open.
    unsafe { libc::dup2(fresh.as_raw_fd(), fd) };
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, pipe};

    use super::*;

    /// What is left of something while nobody reads.
    fn stalled(fd: RawFd, bytes: &[u8]) -> Rest {
        write(fd, bytes).expect("nobody reads: not all of it can be written")
    }

    #[test]
    fn nothing_waits_for_a_reader_and_nothing_is_lost() {
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n / 7) as u8).collect();
        for anew in [false, true] {
            let (mut reader, writer) = pipe().unwrap();
            let other = writer.try_clone().unwrap();
            if anew {
                open_anew(writer.as_raw_fd());
                assert_eq!((way(writer.as_raw_fd()), way(other.as_raw_fd())), (Way::Free, Way::Held));
            }
            drop(other);
            let mut rest = stalled(writer.as_raw_fd(), &bytes);
            assert!(!rest.go_on());
            let mut received = vec![0; bytes.len()];
            let mut so_far = 0;
            while so_far < bytes.len() {
                so_far += reader.read(&mut received[so_far..]).unwrap();
                rest.go_on();
            }
            assert!(received == bytes);
        }
    }

    #[test]
    fn a_socket_that_others_have_open_stays_as_it_is() {
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        open_anew(writer.as_raw_fd());
        let mut rest = stalled(writer.as_raw_fd(), &vec![1; 4 << 20]);
        assert_eq!(way(writer.as_raw_fd()), Way::Socket);
        // What nobody can read any more is done with. (SIGPIPE is ignored by a Rust program.)
        drop(reader);
        assert!(rest.go_on());
    }

    #[test]
    fn a_file_takes_all_and_keeps_its_place() {
        let mut file = tempfile::tempfile().unwrap();
        open_anew(file.as_raw_fd());
        assert!(write(file.as_raw_fd(), &vec![1; 1 << 20]).is_none());
        assert!(write(file.as_raw_fd(), b"end").is_none());
        assert_eq!(file.stream_position().unwrap(), (1 << 20) + 3);
    }
}
