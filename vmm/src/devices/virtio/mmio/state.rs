//! A window at rest: what a machine that is saved keeps of a slot, and a slot that goes on from it.
//!
//! Owns: the saved form and what of it is checked. Does not own: the file that it is in (`template`), or a device's own state,
//! which is the device's value here. A state comes from a file of the host: it is refused when it does not fit the device.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_queue::{Queue, QueueT};

use super::Window;
use crate::devices::virtio::DeviceError;

/// A queue as its driver set it up, and how far both sides are. At rest every chain that was taken has been given back, so that
/// one index says where to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueRest {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) next: u16,
}

/// A slot's registers and its device's state, of a machine that is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowState {
    /// Which slot.
    pub slot: usize,
    pub(super) device_type: u32,
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) driver_features: u64,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRest>,
    pub(super) device: serde_json::Value,
}

impl Window {
    /// Stops the device for good, in a machine whose processors have stopped.
    ///
    /// # Errors
    /// [`DeviceError`] when it holds something of the host's, or its rings are broken.
    pub fn save(&mut self, slot: usize) -> Result<WindowState, DeviceError> {
        let name = self.device.name();
        let device = match self.stop.take() {
            Some(stop) => {
                let _ = stop.write(1);
                self.device.save()?
            }
            None => serde_json::Value::Null,
        };
        let rest = |queue: &Queue| {
            // What the worker has used is in the ring; it is behind by nothing.
            let next = match queue.ready() {
                true => queue.used_idx(&*self.memory, Ordering::Acquire).map(|index| index.0),
                false => Ok(0),
            };
            Ok(QueueRest {
                size: queue.size(),
                ready: queue.ready(),
                descriptors: queue.desc_table(),
                available: queue.avail_ring(),
                used: queue.used_ring(),
                next: next.map_err(|e| DeviceError { device: name, reason: e.to_string() })?,
            })
        };
        Ok(WindowState {
            slot,
            device_type: self.device.device_type(),
            status: self.status,
            interrupt_status: self.interrupt_status.load(Ordering::SeqCst),
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(rest).collect::<Result<_, _>>()?,
            device,
        })
    }

    /// Puts a new window into a saved state; its device works from now on.
    ///
    /// # Errors
    /// [`DeviceError`] when the state is another device's, or the device cannot start.
    pub fn restore(&mut self, state: &WindowState) -> Result<(), DeviceError> {
        let failed = |reason: &str| DeviceError { device: self.device.name(), reason: reason.to_owned() };
        if state.device_type != self.device.device_type() || state.queues.len() != self.queues.len() {
            return Err(failed("the saved state is another device's"));
        }
        if state.driver_features & !self.features() != 0 {
            return Err(failed("the saved driver uses features that this device does not have"));
        }
        let mut queues = Vec::new();
        for (queue, rest) in self.queues.iter().zip(&state.queues) {
            let mut whole = queue.state();
            (whole.size, whole.ready) = (rest.size, rest.ready);
            (whole.desc_table, whole.avail_ring, whole.used_ring) =
                (rest.descriptors, rest.available, rest.used);
            (whole.next_avail, whole.next_used) = (rest.next, rest.next);
            queues.push(Queue::try_from(whole).map_err(|e| failed(&e.to_string()))?);
        }
        self.queues = queues;
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.interrupt_status.store(state.interrupt_status, Ordering::SeqCst);
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            return Ok(());
        }
        self.device.restore(&state.device)?;
        self.try_activate()?;
        if state.interrupt_status != 0 {
            // The interrupt may have been on its way to a processor when that was saved. One too many does no harm.
            let _ = self.line.write(1);
        }
        Ok(())
    }
}
