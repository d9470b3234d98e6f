//! A split virtqueue as a device's worker uses it: take a chain, give it back, raise the interrupt when the driver wants one.
//!
//! Owns: the order of these steps, and what happens when the driver breaks the rings. Does not own: what is in a chain.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::Ram;

/// A chain of descriptors that the driver made available.
pub(crate) type Chain<'m> = DescriptorChain<&'m Ram>;

/// One virtqueue. After the driver wrote something impossible into the rings the queue stays silent until a reset:
/// there is no state to go on from, and retrying would spin.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: Queue,
    broken: bool,
    /// The used index at the last call of [`Ring::wants_interrupt`].
    asked_at: u16,
}

impl Ring {
    /// `features` are those that the driver accepted. A queue that the driver did not make ready never yields a chain.
    pub(crate) fn new(mut queue: Queue, features: u64) -> Self {
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let broken = !queue.ready();
        let asked_at = queue.next_used();
        Self { queue, broken, asked_at }
    }

    /// The next chain. `None` means that there is none now and that the driver will kick when there is.
    pub(crate) fn pop<'m>(&mut self, memory: &'m Ram) -> Option<Chain<'m>> {
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

    /// Ends the queue's service until a reset, for a driver that does what none may do.
    pub(crate) fn give_up(&mut self) {
        self.broken = true;
    }

    fn take<'m>(&mut self, memory: &'m Ram) -> Option<Chain<'m>> {
        match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(_) => {
                self.broken = true;
                None
            }
        }
    }

    /// Gives back to the driver's side the `count` chains popped last, as if they had not been taken. They come again at the next
    /// [`Self::pop`]; the driver's next kick is for a chain after them.
    pub(crate) fn undo_pop(&mut self, count: u16) {
        let first = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(first);
    }

    /// Puts a chain on the used ring. `written` is in bytes. True if the driver wants an interrupt for it.
    #[must_use]
    pub(crate) fn complete(&mut self, memory: &Ram, head: u16, written: u32) -> bool {
        self.push_used(memory, &[(head, written)]);
        self.wants_interrupt(memory)
    }

    /// Puts chains, `(head, bytes written)` each, on the used ring, so that the driver sees all of them or none: a packet that
    /// lies in several chains is lost if the driver sees only the first.
    pub(crate) fn push_used(&mut self, memory: &Ram, chains: &[(u16, u32)]) {
        if self.broken || chains.is_empty() {
            return;
        }
        self.broken = self.try_push_used(memory, chains).is_none();
    }

    fn try_push_used(&mut self, memory: &Ram, chains: &[(u16, u32)]) -> Option<()> {
        let size = self.queue.size();
        let ring = GuestAddress(self.queue.used_ring());
        let mut next = self.queue.next_used();
        for &(head, written) in chains {
            if head >= size {
                return None;
            }
            let slot = next.checked_rem(size)?;
            let mut element = [0; 8];
            element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            element[4..].copy_from_slice(&written.to_le_bytes());
            memory.write_slice(&element, ring.checked_add(4 + 8 * u64::from(slot))?).ok()?;
            next = next.wrapping_add(1);
        }
        memory.store(next.to_le(), ring.checked_add(2)?, Ordering::Release).ok()?;
        self.queue.set_next_used(next);
        Some(())
    }

    /// Whether the driver wants an interrupt for what was used since the last question.
    pub(crate) fn wants_interrupt(&mut self, memory: &Ram) -> bool {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.asked_at, used);
        if self.broken || used == before {
            return false;
        }
        // The used index must be visible before the driver's wish is read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        let ring = GuestAddress(self.queue.avail_ring());
        let load = |offset: u64| {
            let value: u16 = memory.load(ring.checked_add(offset)?, Ordering::Relaxed).ok()?;
            Some(u16::from_le(value))
        };
        if self.queue.event_idx_enabled() {
            // used_event follows the available ring: interrupt if used - 1 or one before it, down to `before`, is the one named.
            let Some(event) = load(4 + 2 * u64::from(self.queue.size())) else { return false };
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            load(0).is_some_and(|flags| u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }
}
