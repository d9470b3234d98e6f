//! The thread that moves packets between the tap and the virtqueues.
//!
//! Owns: waiting, copying, dropping what does not fit. Does not own: what is in a packet; its header passes through to the host's
//! kernel, which checks it.
//!
//! Packets are copied once through a buffer of ours, so that the guest cannot change one while the host looks at it. Nothing
//! blocks: while the driver has no buffers the tap is not watched, and the host's kernel drops what its queue cannot hold.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    super::{
        Activation, GuestRam, Interrupt,
        ring::{Chain, Ring},
    },
    QUEUE_SIZES,
    tap::HEADER_SIZE,
};
use crate::memory::Ram;

/// The largest packet with its header: 64 KiB of IP less one, Ethernet's header with a VLAN tag, rounded up as the
/// specification's 65550 does.
const MAX_PACKET: usize = HEADER_SIZE + 65550;
/// Ethernet's header: nothing shorter is a packet.
const SHORTEST_PACKET: usize = HEADER_SIZE + 14;
/// Where the header counts a packet's buffers.
const BUFFER_COUNT: std::ops::Range<usize> = 10..12;
/// Chains that a packet may take: more than the queue holds can only come from a driver that hands out one chain twice.
const MOST_CHAINS: usize = QUEUE_SIZES[0] as usize;
/// Packets moved in one direction before the other has its turn.
const BURST: usize = 64;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const TAP: u64 = 2;
const STOP: u64 = 3;

/// What the tap has for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tap {
    /// Nothing, as far as known: watched.
    Watched,
    /// The driver has no buffers: not watched.
    Ignored,
    /// It failed or its interface is gone: never looked at again.
    Dead,
}

/// Whether there may be more to do in a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    More,
    Idle,
}

pub(super) struct Worker {
    memory: GuestRam,
    link: OwnedFd,
    receive: Ring,
    transmit: Ring,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    mergeable: bool,
    epoll: Epoll,
    tap: Tap,
    /// A packet read from the tap; empty if there is none.
    pending: Vec<u8>,
    /// Watched by epoll, which does not own it.
    _stop: EventFd,
}

impl Worker {
    /// # Errors
    /// The system's, if the events cannot be watched.
    pub(super) fn new(link: OwnedFd, activation: Activation) -> io::Result<Self> {
        let Activation { memory, queues, kicks, interrupt, features, stop } = activation;
        let mut rings = queues.into_iter().map(|queue| Ring::new(queue, features));
        let (Some(receive), Some(transmit)) = (rings.next(), rings.next()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let epoll = Epoll::new()?;
        let watch =
            |fd: i32, data: u64| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data));
        watch(stop.as_raw_fd(), STOP)?;
        for (kick, data) in kicks.iter().zip([RECEIVE, TRANSMIT]) {
            watch(kick.as_raw_fd(), data)?;
        }
        watch(link.as_raw_fd(), TAP)?;
        let mergeable = features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let pending = Vec::with_capacity(MAX_PACKET);
        let tap = Tap::Watched;
        Ok(Self {
            memory,
            link,
            receive,
            transmit,
            kicks,
            interrupt,
            mergeable,
            epoll,
            tap,
            pending,
            _stop: stop,
        })
    }

    /// Works until `stop` is signalled.
    pub(super) fn run(&mut self) {
        let mut progress = Progress::More;
        loop {
            let timeout = if progress == Progress::More { 0 } else { -1 };
            if self.wait(timeout) {
                return;
            }
            let transmitted = self.transmit();
            let received = self.receive();
            progress = if transmitted == Progress::More { transmitted } else { received };
        }
    }

    /// Waits for an event, `timeout` in milliseconds, and takes the kicks. True if the worker shall stop.
    fn wait(&mut self, timeout: i32) -> bool {
        let mut events = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) => return error.kind() != io::ErrorKind::Interrupted,
        };
        let mut stop = false;
        for event in &events[..count] {
            match event.data() {
                // It was ready and nobody else reads it, so this does not block. The count means nothing.
                RECEIVE => drop(self.kicks[0].read()),
                TRANSMIT => drop(self.kicks[1].read()),
                TAP if event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) => {
                    self.watch_tap(Tap::Dead)
                }
                TAP => {}
                _ => stop = true,
            }
        }
        stop
    }

    fn watch_tap(&mut self, state: Tap) {
        if self.tap == state || self.tap == Tap::Dead {
            return;
        }
        let operation = match (self.tap, state) {
            (Tap::Ignored, Tap::Watched) => Some(ControlOperation::Add),
            (Tap::Watched, _) => Some(ControlOperation::Delete),
            _ => None,
        };
        let event = EpollEvent::new(EventSet::IN, TAP);
        let done =
            operation.is_none_or(|operation| self.epoll.ctl(operation, self.link.as_raw_fd(), event).is_ok());
        self.tap = if done { state } else { Tap::Dead };
    }

    /// Sends what the driver queued.
    fn transmit(&mut self) -> Progress {
        let mut packet = Vec::new();
        for _ in 0..BURST {
            let Some(chain) = self.transmit.pop(&self.memory) else {
                self.signal_transmitted();
                return Progress::Idle;
            };
            let head = chain.head_index();
            if gather(&self.memory, chain, &mut packet) {
                // A packet that the host cannot take now is lost, as on any wire.
                // SAFETY: the buffer is ours and has the length given.
                unsafe { libc::write(self.link.as_raw_fd(), packet.as_ptr().cast(), packet.len()) };
            }
            self.transmit.push_used(&self.memory, &[(head, 0)]);
        }
        self.signal_transmitted();
        Progress::More
    }

    fn signal_transmitted(&mut self) {
        if self.transmit.wants_interrupt(&self.memory) {
            self.interrupt.used();
        }
    }

    /// Hands what the tap has to the driver.
    fn receive(&mut self) -> Progress {
        let mut progress = Progress::More;
        for _ in 0..BURST {
            if self.pending.is_empty() && !self.read_packet() {
                self.watch_tap(Tap::Watched);
                progress = Progress::Idle;
                break;
            }
            if !self.deliver() {
                self.watch_tap(Tap::Ignored);
                progress = Progress::Idle;
                break;
            }
        }
        if self.receive.wants_interrupt(&self.memory) {
            self.interrupt.used();
        }
        progress
    }

    /// Reads the next packet. False if there is none.
    fn read_packet(&mut self) -> bool {
        if self.tap == Tap::Dead {
            return false;
        }
        self.pending.resize(MAX_PACKET, 0);
        let result =
            // SAFETY: the buffer is ours and has the length given.
            unsafe { libc::read(self.link.as_raw_fd(), self.pending.as_mut_ptr().cast(), MAX_PACKET) };
        let length = match usize::try_from(result) {
            Ok(length) => length,
            Err(_) => {
                let error = io::Error::last_os_error().kind();
                if error != io::ErrorKind::WouldBlock && error != io::ErrorKind::Interrupted {
                    self.watch_tap(Tap::Dead);
                }
                0
            }
        };
        self.pending.truncate(if length < SHORTEST_PACKET { 0 } else { length });
        !self.pending.is_empty()
    }

    /// Puts the pending packet into the driver's buffers. False if it has too few now: the packet stays pending.
    fn deliver(&mut self) -> bool {
        let mut chains = Vec::new();
        let mut buffers = Vec::new();
        let mut capacity = 0;
        while capacity < self.pending.len() {
            // Without merging a packet has one chain; if that is too short the packet is lost.
            if !self.mergeable && chains.len() == 1 {
                self.receive.undo_pop(1);
                self.pending.clear();
                return true;
            }
            let Some(chain) = self.receive.pop(&self.memory) else {
                self.receive.undo_pop(chains.len() as u16);
                return false;
            };
            if chains.len() == MOST_CHAINS {
                self.receive.give_up();
                return false;
            }
            let head = chain.head_index();
            let before = capacity;
            capacity += space(chain, self.pending.len() - capacity, &mut buffers);
            chains.push((head, (capacity - before) as u32));
        }
        let count = if self.mergeable { chains.len() as u16 } else { 1 };
        self.pending[BUFFER_COUNT].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.pending[..];
        for (address, length) in buffers {
            let (now, later) = rest.split_at(length);
            // A buffer outside of memory loses its part of the packet; that is the driver's doing.
            let _ = self.memory.write_slice(now, address);
            rest = later;
        }
        self.receive.push_used(&self.memory, &chains);
        self.pending.clear();
        true
    }
}

/// Copies a chain's readable buffers into `packet`. False if that is no packet: too short, too long or outside of memory.
fn gather(memory: &Ram, chain: Chain<'_>, packet: &mut Vec<u8>) -> bool {
    packet.clear();
    for buffer in chain.readable() {
        let (start, length) = (packet.len(), buffer.len() as usize);
        if length > MAX_PACKET - start {
            return false;
        }
        packet.resize(start + length, 0);
        if memory.read_slice(&mut packet[start..], buffer.addr()).is_err() {
            return false;
        }
    }
    packet.len() >= SHORTEST_PACKET
}

/// Adds a chain's writable buffers, as `(address, length)`, to `buffers` until they hold `wanted` bytes. Returns what they hold.
fn space(chain: Chain<'_>, wanted: usize, buffers: &mut Vec<(GuestAddress, usize)>) -> usize {
    let mut found = 0;
    for buffer in chain.writable() {
        let length = (buffer.len() as usize).min(wanted - found);
        if length == 0 {
            continue;
        }
        buffers.push((buffer.addr(), length));
        found += length;
        if found == wanted {
            break;
        }
    }
    found
}
