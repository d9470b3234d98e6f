//! One connection: a unix stream on the host, a port of the guest, credit both ways.
//!
//! Owns: the stream, what waits to be written to it, the counters. Does not own: packets' addresses, which connection
//! a packet is for.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use coffer_protocol::vm::{LONGEST_LINE, Line};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What the guest may have sent that the host has not taken yet, in bytes. The guest knows it as `buf_alloc`.
pub(super) const WINDOW: u32 = 256 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host has not sent its line yet.
    Line,
    /// REQUEST was sent; the guest has not answered.
    Requested,
    /// Bytes flow.
    Open,
    /// The host is gone and the guest was told; its reset ends the entry.
    Closing,
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    pub(super) state: State,
    line: Vec<u8>,
    /// What came with the line.
    descriptor: Option<OwnedFd>,
    /// For the host, not yet written.
    waiting: Vec<u8>,
    /// Bytes of the guest that the host took, modulo 2^32, and what the guest was last told of it.
    taken: u32,
    told: u32,
    /// Bytes sent to the guest; its last word about what it took and can hold.
    sent: u32,
    guest_taken: u32,
    guest_buffer: u32,
    /// The host's side was read to its end.
    host_ended: bool,
    /// The guest's SHUTDOWN flags so far.
    guest_shutdown: u32,
}

/// What a host's readable stream gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// This many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// It ended.
    End,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            state: State::Line,
            line: Vec::new(),
            descriptor: None,
            waiting: Vec::new(),
            taken: 0,
            told: 0,
            sent: 0,
            guest_taken: 0,
            guest_buffer: 0,
            host_ended: false,
            guest_shutdown: 0,
        })
    }

    /// For poll: descriptor and events. `room` says whether the guest has buffers for a packet.
    pub(super) fn interest(&self, room: bool) -> (i32, i16) {
        let reads = match self.state {
            State::Line => true,
            State::Open => {
                room && !self.host_ended && self.credit() > 0 && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
            }
            State::Requested | State::Closing => false,
        };
        let mut events = if reads { libc::POLLIN } else { 0 };
        if !self.waiting.is_empty() {
            events |= libc::POLLOUT;
        }
        // A hang-up is reported whatever is asked; where it was noticed already the descriptor is left out.
        let silent = self.state == State::Closing || self.host_ended && events == 0;
        (if silent { -1 } else { self.stream.as_raw_fd() }, events)
    }

    /// Reads the host's first line. `Some` once it is whole; `Err` when it is no such line.
    pub(super) fn read_line(&mut self) -> io::Result<Option<Line>> {
        loop {
            match self.read_byte() {
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(Some(b'\n')) => break,
                Ok(Some(byte)) if self.line.len() < LONGEST_LINE => self.line.push(byte),
                Ok(Some(_)) => return Err(io::ErrorKind::InvalidData.into()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        Line::parse(&self.line).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// One byte of the line, `None` at the end. A descriptor that comes with it is kept: the first one.
    fn read_byte(&mut self) -> io::Result<Option<u8>> {
        let (mut byte, mut numbers) = ([0], [0]);
        let mut parts = [libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() }];
        // SAFETY: the one buffer is writable, as long as said, and outlives the call.
        let (count, came) = unsafe { self.stream.recv_with_fds(&mut parts, &mut numbers) }
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        for number in &numbers[..came] {
            // SAFETY: the kernel has just made this descriptor for this process, and nobody else has it.
            let descriptor = unsafe { OwnedFd::from_raw_fd(*number) };
            self.descriptor.get_or_insert(descriptor);
        }
        Ok((count > 0).then_some(byte[0]))
    }

    /// The descriptor that came with the line, if one did.
    pub(super) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }

    /// Bytes that the guest can still take. A guest that claims to have taken more than was sent gets nothing.
    pub(super) fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// The guest's word on its buffer, from any packet.
    pub(super) fn hear(&mut self, buffer: u32, taken: u32) {
        self.guest_buffer = buffer;
        self.guest_taken = taken;
    }

    /// Reads for the guest, as much as its credit allows.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Input {
        let wanted = buffer.len().min(self.credit() as usize);
        if wanted == 0 || self.host_ended {
            return Input::Nothing;
        }
        match self.stream.read(&mut buffer[..wanted]) {
            Ok(0) => {
                self.host_ended = true;
                Input::End
            }
            Ok(count) => {
                self.sent = self.sent.wrapping_add(count as u32);
                Input::Bytes(count)
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Input::Nothing
            }
            Err(_) => {
                self.host_ended = true;
                Input::End
            }
        }
    }

    /// True when the guest sent more than it was allowed to.
    pub(super) fn overflows(&self, length: usize) -> bool {
        self.waiting.len() + length > WINDOW as usize
    }

    /// Takes bytes of the guest for the host. `Err` when the host is gone.
    pub(super) fn push(&mut self, data: &[u8]) -> io::Result<()> {
        self.waiting.extend_from_slice(data);
        self.flush(data.len())
    }

    /// Says something to the host that the guest did not send.
    pub(super) fn say(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(text.as_bytes())
    }

    /// Writes what waits. `Err` when the host is gone.
    pub(super) fn write_waiting(&mut self) -> io::Result<()> {
        self.flush(0)
    }

    fn flush(&mut self, _new: usize) -> io::Result<()> {
        let mut written = 0;
        let result = loop {
            if written == self.waiting.len() {
                break Ok(());
            }
            match self.stream.write(&self.waiting[written..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.waiting.drain(..written);
        self.taken = self.taken.wrapping_add(written as u32);
        if self.waiting.is_empty() && self.guest_shutdown & SHUTDOWN_SEND != 0 {
            // An error means that the host closed it already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        result
    }

    /// True when the guest should hear of freed room: half of the window since the last word.
    pub(super) fn owes_credit(&self) -> bool {
        self.taken.wrapping_sub(self.told) >= WINDOW / 2
    }

    /// `fwd_cnt` for a packet that is sent now.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.taken;
        self.taken
    }

    /// The guest's SHUTDOWN. True when nothing more can come either way and all was written.
    pub(super) fn shut_down(&mut self, flags: u32) -> bool {
        self.guest_shutdown |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        // Errors show at the next write.
        let _ = self.flush(0);
        self.is_over()
    }

    /// Both directions are shut by the guest and nothing waits.
    pub(super) fn is_over(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND && self.waiting.is_empty()
    }

    /// The host's whole side is closed, not only its sending half.
    pub(super) fn host_is_gone(&self) -> bool {
        let mut wait = libc::pollfd { fd: self.stream.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&raw mut wait, 1, 0) };
        wait.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }
}
