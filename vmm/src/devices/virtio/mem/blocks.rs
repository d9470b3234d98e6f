//! What a driver may ask of a region's blocks (virtio 1.2, 5.15.6), and which of them are plugged.
//!
//! Owns: requests and answers, the check that only blocks of the region come and go, and no more than was asked for. Does not own:
//! queues, how a block's memory comes and goes ([`Backing`]).

use std::{io, ops::Range, sync::Arc};

use vm_memory::{Address, GuestMemoryRegion};

use super::abi::{
    REQUEST, REQUEST_ADDRESS, REQUEST_BLOCKS, REQUEST_PLUG, REQUEST_STATE, REQUEST_UNPLUG,
    REQUEST_UNPLUG_ALL, RESPONSE, RESPONSE_ACK, RESPONSE_BUSY, RESPONSE_ERROR, RESPONSE_NACK, RESPONSE_STATE,
    STATE_MIXED, STATE_PLUGGED, STATE_UNPLUGGED,
};
use crate::memory::{BLOCK, Ram, Region};

/// Where the memory of blocks comes from. Blocks are numbered from the region's first.
pub trait Backing: Send {
    /// Lets the guest reach blocks, all of whose bytes are zero.
    ///
    /// # Errors
    /// The system's; then none of them can be reached that could not before.
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()>;
    /// Gives the memory of blocks back: what was in them is gone.
    ///
    /// # Errors
    /// The system's; then all of them are still there.
    fn unplug(&mut self, blocks: Range<u64>) -> io::Result<()>;
}

/// Sizes of a region, in bytes, as its device shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// First address.
    pub start: u64,
    /// All of it.
    pub region: u64,
    /// What the driver may plug of, from its start.
    pub usable: u64,
    /// What is plugged.
    pub plugged: u64,
    /// What the host wants to be.
    pub requested: u64,
}

/// What a driver is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ack,
    /// Blocks of a range are plugged, unplugged or both.
    State(u16),
    /// Over what was asked for.
    Nack,
    /// Not now.
    Busy,
    /// Never.
    Error,
}

impl Answer {
    fn bytes(self) -> [u8; RESPONSE] {
        let (kind, state) = match self {
            Self::Ack => (RESPONSE_ACK, 0),
            Self::State(state) => (RESPONSE_ACK, state),
            Self::Nack => (RESPONSE_NACK, 0),
            Self::Busy => (RESPONSE_BUSY, 0),
            Self::Error => (RESPONSE_ERROR, 0),
        };
        let mut bytes = [0; RESPONSE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[RESPONSE_STATE..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// The region's blocks.
pub(super) struct Blocks {
    ram: Arc<Ram>,
    backing: Box<dyn Backing>,
    sizes: Sizes,
}

impl Blocks {
    /// Those of the region that was added to `ram`. `None` when none was.
    pub(super) fn new(ram: Arc<Ram>, backing: Box<dyn Backing>) -> Option<Self> {
        let region = ram.added()?;
        let sizes =
            Sizes { start: region.start_addr().raw_value(), region: region.len(), ..Sizes::default() };
        Some(Self { ram, backing, sizes })
    }

    pub(super) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The host wants this many bytes to be plugged; more than the region has are all of it. What was usable stays so: the driver may
    /// have blocks there.
    pub(super) fn request(&mut self, bytes: u64, usable: u64) {
        let whole = |bytes: u64| bytes.min(self.sizes.region) / BLOCK * BLOCK;
        self.sizes.requested = whole(bytes);
        self.sizes.usable = self.sizes.usable.max(whole(usable)).max(self.sizes.requested);
    }

    fn has(&self, block: u64) -> bool {
        self.ram.added().and_then(Region::plugged).is_some_and(|plugged| plugged.has(block))
    }

    fn set(&self, blocks: Range<u64>, there: bool) {
        if let Some(plugged) = self.ram.added().and_then(Region::plugged) {
            blocks.for_each(|block| plugged.set(block, there));
        }
    }

    /// Does what a driver asks.
    pub(super) fn answer(&mut self, request: &[u8; REQUEST]) -> [u8; RESPONSE] {
        let kind = u16::from_le_bytes([request[0], request[1]]);
        let address = u64::from_le_bytes(std::array::from_fn(|i| request[REQUEST_ADDRESS + i]));
        let count = u16::from_le_bytes([request[REQUEST_BLOCKS], request[REQUEST_BLOCKS + 1]]);
        let blocks = self.range(address, count);
        let answer = match (kind, blocks) {
            (REQUEST_UNPLUG_ALL, _) => self.unplug_all(),
            (REQUEST_PLUG, Some(blocks)) => self.plug(blocks),
            (REQUEST_UNPLUG, Some(blocks)) => self.unplug(blocks),
            (REQUEST_STATE, Some(blocks)) => self.state(blocks),
            _ => Answer::Error,
        };
        answer.bytes()
    }

    /// Blocks of the usable region, one at least.
    fn range(&self, address: u64, count: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.sizes.start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = offset / BLOCK;
        let end = first.checked_add(u64::from(count))?;
        (count > 0 && end <= self.sizes.usable / BLOCK).then_some(first..end)
    }

    fn plug(&mut self, blocks: Range<u64>) -> Answer {
        if blocks.clone().any(|block| self.has(block)) {
            return Answer::Error;
        }
        let bytes = (blocks.end - blocks.start) * BLOCK;
        if self.sizes.plugged + bytes > self.sizes.requested {
            return Answer::Nack;
        }
        if self.backing.plug(blocks.clone()).is_err() {
            return Answer::Busy;
        }
        self.set(blocks, true);
        self.sizes.plugged += bytes;
        Answer::Ack
    }

    fn unplug(&mut self, blocks: Range<u64>) -> Answer {
        if blocks.clone().any(|block| !self.has(block)) {
            return Answer::Error;
        }
        // No device may bring a page back behind the backing's back.
        self.set(blocks.clone(), false);
        if self.backing.unplug(blocks.clone()).is_err() {
            self.set(blocks, true);
            return Answer::Busy;
        }
        self.sizes.plugged -= (blocks.end - blocks.start) * BLOCK;
        Answer::Ack
    }

    fn unplug_all(&mut self) -> Answer {
        let all = self.sizes.usable / BLOCK;
        let mut next = 0;
        while let Some(first) = (next..all).find(|block| self.has(*block)) {
            next = (first..all).find(|block| !self.has(*block)).unwrap_or(all);
            if self.unplug(first..next) != Answer::Ack {
                return Answer::Busy;
            }
        }
        Answer::Ack
    }

    fn state(&self, mut blocks: Range<u64>) -> Answer {
        let first = self.has(blocks.start);
        Answer::State(match (first, blocks.all(|block| self.has(block) == first)) {
            (true, true) => STATE_PLUGGED,
            (false, true) => STATE_UNPLUGGED,
            (_, false) => STATE_MIXED,
        })
    }
}
