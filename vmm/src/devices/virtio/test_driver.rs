//! The driver's side of a device's virtqueues, for tests: memory, rings, descriptors, kicks, and how the device answers.

use std::{
    os::fd::AsRawFd,
    sync::{Arc, atomic::AtomicU32},
    time::{Duration, Instant},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, GuestRam, Interrupt, VirtioDevice};
use crate::memory::Ram;

/// Size of guest memory; rings are in the first MiB, `BUFFERS` and above are the test's.
pub(crate) const MEMORY: u64 = 16 << 20;
pub(crate) const BUFFERS: u64 = 1 << 20;
const RING_STRIDE: u64 = 0x10000;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// One descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

pub(crate) struct Driver {
    pub(crate) memory: GuestRam,
    pub(crate) kicks: Vec<EventFd>,
    pub(crate) line: Arc<EventFd>,
    stop: EventFd,
    sizes: Vec<u16>,
    available: Vec<u16>,
    used: Vec<u16>,
}

impl Driver {
    /// Sets up all queues of `device` and activates it with `features`.
    pub(crate) fn new(device: &mut dyn VirtioDevice, features: u64) -> Self {
        let memory = Arc::new(Ram::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        let sizes = device.queue_sizes().to_vec();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let kicks: Vec<_> = sizes.iter().map(|_| event()).collect();
        let line = Arc::new(event());
        let stop = event();
        let queues = sizes.iter().enumerate().map(|(index, &size)| queue(index, size)).collect();
        let interrupt = Interrupt::new(Arc::new(AtomicU32::new(0)), Arc::clone(&line));
        let kicks_of_device = kicks.iter().map(|kick| kick.try_clone().unwrap()).collect();
        let activation = Activation {
            memory: Arc::clone(&memory),
            queues,
            kicks: kicks_of_device,
            interrupt,
            features,
            stop: stop.try_clone().unwrap(),
        };
        device.activate(activation).unwrap();
        let zeros = vec![0; sizes.len()];
        Self { memory, kicks, line, stop, sizes, available: zeros.clone(), used: zeros }
    }

    pub(crate) fn write_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = GuestAddress(table + u64::from(index) * 16);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Address of a queue's descriptor table.
    pub(crate) fn table(queue: usize) -> u64 {
        queue as u64 * RING_STRIDE
    }

    /// Makes the chain that begins at descriptor `head` available and kicks.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        self.put_available(queue, head);
        self.publish(queue);
    }

    /// Puts a head into the available ring without telling.
    pub(crate) fn put_available(&mut self, queue: usize, head: u16) {
        let ring = available_ring(queue);
        let slot = u64::from(self.available[queue] % self.sizes[queue]);
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * slot)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
    }

    /// Writes the available index and kicks.
    pub(crate) fn publish(&mut self, queue: usize) {
        self.set_available_index(queue, self.available[queue]);
        self.kicks[queue].write(1).unwrap();
    }

    pub(crate) fn set_available_index(&self, queue: usize, index: u16) {
        self.memory
            .store(index, GuestAddress(available_ring(queue) + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    /// Writes a chain of readable, then writable buffers, `(address, length)` each, into the table from `first` on.
    pub(crate) fn chain(&self, queue: usize, first: u16, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
        let count = readable.len() + writable.len();
        let buffers = readable.iter().map(|b| (b, 0)).chain(writable.iter().map(|b| (b, WRITE)));
        for (place, (&(address, length), direction)) in buffers.enumerate() {
            let index = first + place as u16;
            let more = if place + 1 < count { NEXT } else { 0 };
            let descriptor = Descriptor { address, length, flags: direction | more, next: index + 1 };
            self.write_descriptor(Self::table(queue), index, descriptor);
        }
    }

    /// How many chains the device has given back so far, modulo 2^16.
    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        self.memory
            .load(GuestAddress(used_ring(queue, self.sizes[queue]) + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap()
    }

    /// Waits up to ten seconds for the next used chain: its head and the bytes written.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        self.wait_used_for(queue, Duration::from_secs(10)).expect("the device did not answer")
    }

    pub(crate) fn wait_used_for(&mut self, queue: usize, limit: Duration) -> Option<(u16, u32)> {
        let start = Instant::now();
        // Asks for an interrupt at the next used chain (used_event).
        let event = available_ring(queue) + 4 + 2 * u64::from(self.sizes[queue]);
        self.memory
            .store(self.used[queue], GuestAddress(event), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        while self.used_index(queue) == self.used[queue] {
            let left = limit.checked_sub(start.elapsed())?;
            let mut poll = libc::pollfd { fd: self.line.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `poll` is one valid pollfd.
            unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as i32 + 1) };
            let _ = self.line.read();
        }
        let slot = u64::from(self.used[queue] % self.sizes[queue]);
        let at = used_ring(queue, self.sizes[queue]) + 4 + 8 * slot;
        self.used[queue] = self.used[queue].wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let written: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, written))
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Stops the device and waits for its threads.
    pub(crate) fn stop(self, device: &mut dyn VirtioDevice) {
        self.stop.write(1).unwrap();
        device.reset();
    }
}

fn available_ring(queue: usize) -> u64 {
    Driver::table(queue) + 0x8000
}

fn used_ring(queue: usize, size: u16) -> u64 {
    (available_ring(queue) + 6 + 2 * u64::from(size)).next_multiple_of(8)
}

fn queue(index: usize, size: u16) -> Queue {
    let mut queue = Queue::new(size).unwrap();
    queue.set_size(size);
    let low = |address: u64| Some(u32::try_from(address).unwrap());
    queue.set_desc_table_address(low(Driver::table(index)), Some(0));
    queue.set_avail_ring_address(low(available_ring(index)), Some(0));
    queue.set_used_ring_address(low(used_ring(index, size)), Some(0));
    queue.set_ready(true);
    queue
}
