//! The virtio-mmio register window (virtio 1.2, 4.2.2), version 2 only.
//!
//! Owns: the registers, the order of status bits, queue addresses until activation. Does not own: what the device does, or a
//! window's state at rest (`state`). Every value comes from the guest: out-of-range selectors read as zero and are not written.

mod state;
#[cfg(test)]
mod tests;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

pub use state::WindowState;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, DeviceError, GuestRam, Interrupt, VirtioDevice};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"COFR");
/// Offset of the register that a driver kicks; its value is the queue's number.
pub const QUEUE_NOTIFY: u64 = 0x50;
const CONFIG: u64 = 0x100;

/// Most failures of a window that are told. A guest can have as many as it likes, and the log lies in the host's memory (/run).
const MOST_FAILURES: u32 = 8;

/// One slot's registers and the device behind them.
pub struct Window {
    device: Box<dyn VirtioDevice>,
    memory: GuestRam,
    /// Feature bits of the transport; a driver that does not accept all of them cannot use the device.
    transport_features: u64,
    queues: Vec<Queue>,
    kicks: Vec<EventFd>,
    line: Arc<EventFd>,
    interrupt_status: Arc<AtomicU32>,
    stop: Option<EventFd>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    failures: Vec<DeviceError>,
    /// How many there were, over all resets.
    failed: u32,
}

impl Window {
    /// `line` is the slot's irqfd.
    ///
    /// # Errors
    /// When the host has no eventfds left, or the device has a queue of a size that is none.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        line: Arc<EventFd>,
    ) -> Result<Self, DeviceError> {
        let name = device.name();
        let failed = |reason: String| DeviceError { device: name, reason };
        let queues: Result<Vec<Queue>, _> =
            device.queue_sizes().iter().map(|size| Queue::new(*size)).collect();
        let kicks: Result<Vec<EventFd>, _> =
            device.queue_sizes().iter().map(|_| EventFd::new(libc::EFD_NONBLOCK)).collect();
        Ok(Self {
            queues: queues.map_err(|e| failed(format!("make its queues: {e}")))?,
            kicks: kicks.map_err(|e| failed(format!("make its eventfds: {e}")))?,
            device,
            memory,
            transport_features: 1 << VIRTIO_F_VERSION_1,
            line,
            interrupt_status: Arc::default(),
            stop: None,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            failures: Vec::new(),
            failed: 0,
        })
    }

    /// The device reaches only memory that the guest shares with it (a TEE). The driver must then move data through such
    /// memory, and says that it does by accepting VIRTIO_F_ACCESS_PLATFORM (virtio 1.2, 6).
    #[must_use]
    pub fn with_shared_memory_only(mut self) -> Self {
        self.transport_features |= 1 << VIRTIO_F_ACCESS_PLATFORM;
        self
    }

    /// The eventfd of each queue, to be tied to [`QUEUE_NOTIFY`].
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Failures since the last call, for the log; the first few of the window's.
    pub fn take_failures(&mut self) -> Vec<DeviceError> {
        std::mem::take(&mut self.failures)
    }

    fn features(&self) -> u64 {
        self.device.features() | self.transport_features
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// Reads at an offset in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.device.read_config(at, data);
            return;
        }
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.device_type(),
            0x0c => VENDOR,
            0x10 => match self.device_features_select {
                0 => self.features() as u32,
                1 => (self.features() >> 32) as u32,
                _ => 0,
            },
            0x34 => self.selected().map_or(0, |q| u32::from(q.max_size())),
            0x44 => self.selected().map_or(0, |q| u32::from(q.ready())),
            0x60 => self.interrupt_status.load(Ordering::SeqCst),
            0x70 => self.status,
            // Length of a shared memory region that does not exist.
            0xb0 | 0xb4 => u32::MAX,
            _ => 0,
        };
        *word = value.to_le_bytes();
    }

    /// Writes at an offset in the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            if self.status & VIRTIO_CONFIG_S_DRIVER != 0 {
                self.device.write_config(at, data);
            }
            return;
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.device_features_select = value,
            0x20 => self.accept_features(value),
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x38 | 0x44 | 0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 => self.set_queue(offset, value),
            QUEUE_NOTIFY => {
                // KVM signals kicks itself; one that reaches us was written in another width or through an emulated access.
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            0x64 => {
                self.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => self.set_status(value),
            _ => {}
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 || self.status & VIRTIO_CONFIG_S_DRIVER == 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        let configuring = self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && self.stop.is_none();
        let Some(queue) = self.queues.get_mut(self.queue_select as usize).filter(|_| configuring) else {
            return;
        };
        match offset {
            // Queue::set_size keeps the old size when the new one is no power of two or too large.
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            _ => queue.set_used_ring_address(None, Some(value)),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        const ACK: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
        const DRIVER: u32 = ACK | VIRTIO_CONFIG_S_DRIVER;
        const FEATURES: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
        const OK: u32 = FEATURES | VIRTIO_CONFIG_S_DRIVER_OK;
        let current = self.status & OK;
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
            return;
        }
        // One step forward at a time; anything else is a driver's mistake and changes nothing.
        match (current, value & OK) {
            (0, ACK) | (ACK, DRIVER) => self.status = self.status & !OK | value & OK,
            // The bit stays off when the driver accepted what was not offered, or not what the transport needs: it reads back
            // and knows.
            (DRIVER, FEATURES)
                if self.driver_features & !self.features() == 0
                    && !self.driver_features & self.transport_features == 0 =>
            {
                self.status |= FEATURES;
            }
            // Where activation failed, the driver must reset the device first (virtio 1.2, 2.1).
            (FEATURES, OK) if self.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0 => self.activate(),
            _ => {}
        }
    }

    fn activate(&mut self) {
        match self.try_activate() {
            Ok(()) => self.status |= VIRTIO_CONFIG_S_DRIVER_OK,
            Err(failure) => {
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                if self.failed < MOST_FAILURES {
                    self.failed += 1;
                    self.failures.push(failure);
                }
            }
        }
    }

    fn try_activate(&mut self) -> Result<(), DeviceError> {
        let device = self.device.name();
        let failed = |e: std::io::Error| DeviceError { device, reason: format!("make its eventfds: {e}") };
        if let Some(index) = self.queues.iter().position(|q| q.ready() && !q.is_valid(&*self.memory)) {
            return Err(DeviceError { device, reason: format!("queue {index} does not lie in RAM") });
        }
        let stop = EventFd::new(libc::EFD_NONBLOCK).map_err(failed)?;
        let queues = self.queues.iter().map(|q| Queue::try_from(q.state())).collect::<Result<Vec<_>, _>>();
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues: queues.map_err(|e| DeviceError { device, reason: e.to_string() })?,
            kicks: self.kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>().map_err(failed)?,
            interrupt: Interrupt::new(Arc::clone(&self.interrupt_status), Arc::clone(&self.line)),
            features: self.driver_features,
            stop: stop.try_clone().map_err(failed)?,
        };
        self.device.activate(activation)?;
        self.stop = Some(stop);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.write(1);
            self.device.reset();
        }
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.interrupt_status.store(0, Ordering::SeqCst);
    }
}
