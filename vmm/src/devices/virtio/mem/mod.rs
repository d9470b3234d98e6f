//! virtio-mem (virtio 1.2, 5.15): a region of memory that the host asks the guest to use more or less of, block by block.
//!
//! Owns: the device, its configuration space, its worker; the host's side of it ([`Handle`]). Does not own: requests (`blocks`), where
//! memory comes from ([`Backing`]), when a machine gets the device (`machine::growth`).
//!
//! The guest's driver decides which blocks; it gets none over what the host asked for, and none outside the region. It keeps what
//! it likes when the host asks for less: only what it has unplugged is given back. Blocks stay as they are when the device is reset.

mod abi;
mod blocks;
#[cfg(test)]
mod tests;

use std::{
    io::{self, Read, Write},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

pub use self::blocks::{Backing, Sizes};
use self::{
    abi::{CONFIG, CONFIG_ADDRESS, F_UNPLUGGED_INACCESSIBLE, REQUEST, RESPONSE},
    blocks::Blocks,
};
use super::{
    Activation, DeviceError, GuestRam, Interrupt, VirtioDevice, copy_config,
    ring::{Chain, Ring},
};
use crate::memory::{BLOCK, Ram};

/// Requests served before the worker looks whether it shall stop.
const BURST: usize = 64;

struct State {
    blocks: Blocks,
    /// Of an active device.
    interrupt: Option<Interrupt>,
}

type Shared = Arc<Mutex<State>>;

/// A panic aborts the process, so no lock is ever poisoned; this spares an `unwrap`.
fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device.
pub struct Mem {
    shared: Shared,
    worker: Option<JoinHandle<()>>,
}

/// The host's side of a device.
#[derive(Clone)]
pub struct Handle(Shared);

impl Handle {
    /// Asks the guest to have this many bytes of the region plugged, and lets it choose among the first `usable` bytes at least. It
    /// hears of it at once and acts when it likes.
    pub fn request(&self, bytes: u64, usable: u64) {
        let mut state = lock(&self.0);
        state.blocks.request(bytes, usable);
        if let Some(interrupt) = &state.interrupt {
            interrupt.config();
        }
    }

    /// What was asked for, and what is.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        lock(&self.0).blocks.sizes()
    }
}

impl Mem {
    /// A device for the region that was [added](Ram::add) to `ram`. `None` when none was.
    #[must_use]
    pub fn new(ram: &Arc<Ram>, backing: Box<dyn Backing>) -> Option<(Self, Handle)> {
        let blocks = Blocks::new(Arc::clone(ram), backing)?;
        let shared = Arc::new(Mutex::new(State { blocks, interrupt: None }));
        Some((Self { shared: Arc::clone(&shared), worker: None }, Handle(shared)))
    }
}

impl VirtioDevice for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        1 << F_UNPLUGGED_INACCESSIBLE
    }

    /// struct virtio_mem_config. The node is none: without VIRTIO_MEM_F_ACPI_PXM it says nothing.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let sizes = lock(&self.shared).blocks.sizes();
        let mut config = [0; CONFIG];
        let fields = [sizes.start, sizes.region, sizes.usable, sizes.plugged, sizes.requested];
        config[..8].copy_from_slice(&BLOCK.to_le_bytes());
        for (to, field) in config[CONFIG_ADDRESS..].chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let failed = |reason: String| DeviceError { device: "mem", reason };
        if activation.features & self.features() == 0 {
            // Where nothing is plugged nothing is to be read; such a driver would read it.
            return Err(failed("the driver does not promise to leave unplugged memory alone".into()));
        }
        lock(&self.shared).interrupt = Some(activation.interrupt.clone());
        let shared = Arc::clone(&self.shared);
        let worker = std::thread::Builder::new().name("mem".into()).spawn(move || serve(activation, &shared));
        self.worker = Some(worker.map_err(|e| failed(format!("start its thread: {e}")))?);
        Ok(())
    }

    fn reset(&mut self) {
        lock(&self.shared).interrupt = None;
        if let Some(worker) = self.worker.take() {
            worker.join().expect("a panic aborts the process, except in tests, which shall fail");
        }
    }

    fn save(&mut self) -> Result<serde_json::Value, DeviceError> {
        Err(DeviceError { device: "mem", reason: "memory that came later is not saved".into() })
    }
}

fn serve(mut activation: Activation, shared: &Shared) {
    let (Some(queue), Some(kick)) = (activation.queues.pop(), activation.kicks.pop()) else { return };
    let mut ring = Ring::new(queue, activation.features);
    let memory = &activation.memory;
    loop {
        let mut served = 0;
        while served < BURST
            && let Some(chain) = ring.pop(memory)
        {
            let head = chain.head_index();
            let written = answer(memory, chain, shared);
            if ring.complete(memory, head, written) {
                activation.interrupt.used();
            }
            served += 1;
        }
        let mut waits = [&kick, &activation.stop].map(|event| libc::pollfd {
            fd: event.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        let limit = if served == BURST { 0 } else { -1 };
        // SAFETY: `waits` is an array of two valid entries.
        let ready = unsafe { libc::poll(waits.as_mut_ptr(), 2, limit) };
        if waits[1].revents != 0
            || ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted
        {
            return;
        }
        if waits[0].revents != 0 {
            let _ = kick.read();
        }
    }
}

/// Answers one request; the bytes written. One that is too short, or has no room for an answer, changes nothing.
fn answer(memory: &GuestRam, chain: Chain<'_>, shared: &Shared) -> u32 {
    let (Ok(mut input), Ok(mut output)) =
        (chain.clone().reader::<()>(&**memory), chain.writer::<()>(&**memory))
    else {
        return 0;
    };
    let mut request = [0; REQUEST];
    if output.available_bytes() < RESPONSE || input.read_exact(&mut request).is_err() {
        return 0;
    }
    let response = lock(shared).blocks.answer(&request);
    if output.write_all(&response).is_ok() { RESPONSE as u32 } else { 0 }
}
