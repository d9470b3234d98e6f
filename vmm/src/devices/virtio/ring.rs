//! A split virtqueue as a device's worker uses it: take a chain, give it back, raise the interrupt when the driver wants one.
//!
//! Owns: the order of these steps, and what happens when the driver breaks the rings. Does not own: what is in a chain.

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

/// A chain of descriptors that the driver made available.
pub(crate) type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap<()>>;

/// One virtqueue. After the driver wrote something impossible into the rings the queue stays silent until a reset:
/// there is no state to go on from, and retrying would spin.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: Queue,
    broken: bool,
}

impl Ring {
    /// `features` are those that the driver accepted. A queue that the driver did not make ready never yields a chain.
    pub(crate) fn new(mut queue: Queue, features: u64) -> Self {
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let broken = !queue.ready();
        Self { queue, broken }
    }

    /// The next chain. `None` means that there is none now and that the driver will kick when there is.
    pub(crate) fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap<()>) -> Option<Chain<'m>> {
        if self.broken {
            return None;
        }
        if let Some(chain) = self.take(memory) {
            return Some(chain);
        }
        if self.broken {
            return None;
        }
        match self.queue.enable_notification(memory) {
            Ok(false) => None,
            // One came in between the look and the request for a kick.
            Ok(true) => {
                let chain = self.take(memory);
                self.broken = chain.is_none();
                chain
            }
            Err(_) => {
                self.broken = true;
                None
            }
        }
    }

    fn take<'m>(&mut self, memory: &'m GuestMemoryMmap<()>) -> Option<Chain<'m>> {
        match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(_) => {
                self.broken = true;
                None
            }
        }
    }

    /// Puts a chain on the used ring. `written` is in bytes. True if the driver wants an interrupt for it.
    #[must_use]
    pub(crate) fn complete(&mut self, memory: &GuestMemoryMmap<()>, head: u16, written: u32) -> bool {
        self.push_used(memory, head, written) && self.wants_interrupt(memory)
    }

    /// Puts a chain on the used ring and leaves the interrupt for later. False if the ring is broken.
    pub(crate) fn push_used(&mut self, memory: &GuestMemoryMmap<()>, head: u16, written: u32) -> bool {
        if self.queue.add_used(memory, head, written).is_err() {
            self.broken = true;
        }
        !self.broken
    }

    /// Whether the driver wants an interrupt for what was used since the last question.
    pub(crate) fn wants_interrupt(&mut self, memory: &GuestMemoryMmap<()>) -> bool {
        !self.broken && self.queue.needs_notification(memory).unwrap_or(false)
    }
}
