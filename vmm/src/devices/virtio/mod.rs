//! virtio devices: one folder or file each, behind the [`VirtioDevice`] trait.
//!
//! Owns: the contract between a device and its transport. Does not own: the register window (`mmio`), what a device does.

pub mod blk;
pub mod fs;
pub mod mem;
pub mod mmio;
pub mod net;
mod ring;
pub mod rng;
#[cfg(test)]
mod test_driver;
pub mod vsock;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Ram;

/// Guest RAM, shared by all devices; every access through it is bounds-checked.
pub type GuestRam = Arc<Ram>;

/// Why a device could not start to work. The transport sets DEVICE_NEEDS_RESET and logs it; the VMM goes on.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {reason}")]
pub struct DeviceError {
    /// The device's name in logs.
    pub device: &'static str,
    /// What failed, in words.
    pub reason: String,
}

/// What a device gets when the driver sets DRIVER_OK: everything its worker needs, handed over for good.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestRam,
    /// The queues that the driver made ready, in the device's order. `Queue::ready()` is false for one that it left out.
    pub queues: Vec<Queue>,
    /// One eventfd per queue; signalled by KVM (ioeventfd) when the driver kicks.
    pub kicks: Vec<EventFd>,
    /// To raise the device's interrupt.
    pub interrupt: Interrupt,
    /// The features that the driver accepted.
    pub features: u64,
    /// Signalled at reset and at the end of the VM: the worker must stop and drop what it holds.
    pub stop: EventFd,
}

/// A device's interrupt line: status bits in the register window plus an irqfd.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// Bit 0 of InterruptStatus: a queue was used.
    pub const USED: u32 = 1;
    /// Bit 1 of InterruptStatus: the configuration changed.
    pub const CONFIG: u32 = 2;

    /// `status` is what the register window shows, `line` an irqfd.
    #[must_use]
    pub fn new(status: Arc<AtomicU32>, line: Arc<EventFd>) -> Self {
        Self { status, line }
    }

    /// Tells the driver that descriptors were used. Callers ask `Queue::needs_notification` first.
    pub fn used(&self) {
        self.raise(Self::USED);
    }

    /// Tells the driver that the configuration space changed.
    pub fn config(&self) {
        self.raise(Self::CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // A full counter already means "signalled".
        let _ = self.line.write(1);
    }
}

/// One virtio device. `activate` starts a worker thread (named after the device) that ends when `stop` is signalled.
pub trait VirtioDevice: Send {
    /// Name in logs and of the worker thread, at most 15 bytes.
    fn name(&self) -> &'static str;
    /// virtio device id (VIRTIO_ID_*).
    fn device_type(&self) -> u32;
    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// Offered features; the transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;
    /// Reads the configuration space. Bytes beyond its end are left zero. Offset and length come from the guest.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space; most devices ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts to work.
    ///
    /// # Errors
    /// [`DeviceError`] when the worker cannot run with these queues.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// Joins the worker, whose `stop` was signalled; afterwards the device may be activated again.
    fn reset(&mut self) {}
    /// As [`Self::reset`], for a machine that is saved: what the device knows beside its queues. It holds nothing of the host's.
    ///
    /// # Errors
    /// [`DeviceError`] when it does hold something: a connection, an open file.
    fn save(&mut self) -> Result<serde_json::Value, DeviceError> {
        self.reset();
        Ok(serde_json::Value::Null)
    }
    /// Before [`Self::activate`] in a machine that was saved: what [`Self::save`] gave.
    ///
    /// # Errors
    /// [`DeviceError`] when that is not its.
    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        if state.is_null() {
            return Ok(());
        }
        Err(DeviceError { device: self.name(), reason: "the saved state is not this device's".into() })
    }
}

/// Gives a part of a device's configuration space; bytes behind its end are left as they are.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
