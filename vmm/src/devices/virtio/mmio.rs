//! The virtio-mmio register window (virtio 1.2, 4.2.2), version 2 only.
//!
//! Owns: the registers, the order of status bits, queue addresses until activation. Does not own: what the device does.
//! Every value comes from the guest: out-of-range selectors read as zero and are not written.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use serde::{Deserialize, Serialize};
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

/// A queue as its driver set it up, and how far both sides are. At rest every chain that was taken has been given back, so that
/// one index says where to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueRest {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
}

/// A slot's registers and its device's state, of a machine that is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowState {
    /// Which slot.
    pub slot: usize,
    device_type: u32,
    status: u32,
    interrupt_status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueRest>,
    device: serde_json::Value,
}

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

    /// Failures since the last call, for the log.
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
            (FEATURES, OK) => self.activate(),
            _ => {}
        }
    }

    fn activate(&mut self) {
        match self.try_activate() {
            Ok(()) => self.status |= VIRTIO_CONFIG_S_DRIVER_OK,
            Err(failure) => {
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                self.failures.push(failure);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::rng::Rng;
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn window() -> Window {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        Window::new(Box::new(Rng::default()), memory, Arc::new(EventFd::new(0).unwrap())).unwrap()
    }

    fn get(window: &Window, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        window.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn put(window: &mut Window, offset: u64, value: u32) {
        window.write(offset, &value.to_le_bytes());
    }

    /// What a driver does (virtio 1.2, 3.1.1).
    fn start(window: &mut Window) {
        for status in [1, 3] {
            put(window, 0x70, status);
        }
        put(window, 0x24, 1);
        put(window, 0x20, 1);
        put(window, 0x70, 11);
        put(window, 0x38, 8);
        for (register, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
            put(window, register, address);
        }
        put(window, 0x44, 1);
        put(window, 0x70, 15);
    }

    #[test]
    fn a_driver_that_follows_the_order_gets_a_working_device_and_can_reset_it() {
        let mut window = window();
        assert_eq!((get(&window, 0), get(&window, 4), get(&window, 8)), (0x7472_6976, 2, 4));
        for _ in 0..3 {
            start(&mut window);
            assert_eq!(get(&window, 0x70), 15);
            put(&mut window, 0x70, 0);
            assert_eq!((get(&window, 0x70), get(&window, 0x44)), (0, 0));
        }
        assert!(window.take_failures().is_empty());
    }

    /// Asks the device for one byte in buffer `index`, and waits until it is there.
    fn read_one(window: &Window, index: u16) {
        use vm_memory::Bytes;
        let memory = &*window.memory;
        let descriptor = 0x1000 + 16 * u64::from(index);
        let buffer = 0x4000 + u64::from(index);
        memory.write_obj(buffer, GuestAddress(descriptor)).unwrap();
        memory.write_obj(1u32, GuestAddress(descriptor + 8)).unwrap();
        memory.write_obj(2u32, GuestAddress(descriptor + 12)).unwrap();
        memory.write_obj(index, GuestAddress(0x2004 + 2 * u64::from(index))).unwrap();
        memory.write_obj(index + 1, GuestAddress(0x2002)).unwrap();
        window.kicks[0].write(1).unwrap();
        while memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap() != index + 1 {
            std::thread::yield_now();
        }
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(0x3004 + 8 * u64::from(index))).unwrap(),
            u32::from(index)
        );
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x3008 + 8 * u64::from(index))).unwrap(), 1);
    }

    #[test]
    fn a_saved_window_goes_on_where_it_was_and_raises_what_was_pending() {
        let mut saved = window();
        start(&mut saved);
        read_one(&saved, 0);
        read_one(&saved, 1);
        // The interrupt is raised after the ring was written.
        while get(&saved, 0x60) == 0 {
            std::thread::yield_now();
        }
        let state = saved.save(3).unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let state: WindowState = serde_json::from_str(&text).unwrap();
        assert_eq!((state.slot, state.queues[0].next), (3, 2));
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut window =
            Window::new(Box::new(Rng::default()), Arc::clone(&saved.memory), Arc::clone(&line)).unwrap();
        window.restore(&state).unwrap();
        assert_eq!((get(&window, 0x70), get(&window, 0x60), get(&window, 0x44)), (15, 1, 1));
        assert_eq!(line.read().unwrap(), 1);
        read_one(&window, 2);
    }

    #[test]
    fn a_state_of_another_device_or_with_rings_out_of_memory_is_refused() {
        let mut saved = window();
        start(&mut saved);
        let state = saved.save(0).unwrap();
        for change in [
            (|state: &mut WindowState| state.device_type = 5) as fn(&mut WindowState),
            |state| state.queues.clear(),
            |state| state.queues[0].size = 3,
            |state| state.queues[0].used = 1 << 40,
            |state| state.driver_features |= 1,
            |state| state.device = serde_json::Value::Bool(true),
        ] {
            let mut wrong = state.clone();
            change(&mut wrong);
            assert!(window().restore(&wrong).is_err(), "{wrong:?}");
        }
        window().restore(&state).unwrap();
    }

    #[test]
    fn features_that_were_not_offered_are_not_accepted() {
        let mut window = window();
        put(&mut window, 0x70, 1);
        put(&mut window, 0x70, 3);
        put(&mut window, 0x20, 1 << 20);
        put(&mut window, 0x24, 1);
        put(&mut window, 0x20, 1);
        put(&mut window, 0x70, 11);
        assert_eq!(get(&window, 0x70), 3);
    }

    #[test]
    fn under_a_tee_a_driver_must_accept_access_platform() {
        let mut window = window().with_shared_memory_only();
        put(&mut window, 0x14, 1);
        assert_eq!(get(&window, 0x10), 0b11, "VIRTIO_F_VERSION_1 is bit 32, VIRTIO_F_ACCESS_PLATFORM bit 33");
        for (accepted, status) in [(0b01, 3), (0b10, 3), (0b11, 11)] {
            for status in [0, 1, 3] {
                put(&mut window, 0x70, status);
            }
            put(&mut window, 0x24, 1);
            put(&mut window, 0x20, accepted);
            put(&mut window, 0x70, 11);
            assert_eq!(get(&window, 0x70), status, "accepted {accepted:#b}");
        }
    }

    #[test]
    fn a_queue_outside_ram_makes_the_device_ask_for_a_reset() {
        let mut window = window();
        for status in [1, 3] {
            put(&mut window, 0x70, status);
        }
        put(&mut window, 0x24, 1);
        put(&mut window, 0x20, 1);
        put(&mut window, 0x70, 11);
        put(&mut window, 0x84, 1);
        put(&mut window, 0x44, 1);
        put(&mut window, 0x70, 15);
        assert_eq!(get(&window, 0x70), 11 | VIRTIO_CONFIG_S_NEEDS_RESET);
        assert_eq!(window.take_failures().len(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_accesses_leave_the_status_in_its_order(
            accesses in prop::collection::vec((0u64..0x120, any::<u32>(), 1usize..9, any::<bool>()), 0..200),
            starts in any::<bool>(),
        ) {
            let mut window = window();
            if starts {
                start(&mut window);
            }
            for (offset, value, length, write) in accesses {
                if write {
                    let bytes = u64::from(value).to_le_bytes();
                    window.write(offset, &bytes[..length]);
                } else {
                    window.read(offset, &mut [0; 8][..length]);
                }
                prop_assert!([0, 1, 3, 11, 15].contains(&(window.status & 15)));
            }
            put(&mut window, 0x70, 0);
        }
    }
}
