//! virtio entropy (virtio 1.2, 5.4): fills the guest's buffers from the host's random number generator.
//!
//! Owns: the device. At most [`LONGEST`] bytes are given for one request: a guest that asks for more asks again.

use std::{io::Read, os::fd::AsRawFd, thread::JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

use super::{Activation, DeviceError, VirtioDevice, ring::Ring};

/// Most bytes for one request.
pub const LONGEST: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<JoinHandle<()>>,
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let failed = |reason: String| DeviceError { device: "rng", reason };
        let source =
            std::fs::File::open("/dev/urandom").map_err(|e| failed(format!("open /dev/urandom: {e}")))?;
        let worker = std::thread::Builder::new().name("rng".into()).spawn(move || serve(activation, source));
        self.worker = Some(worker.map_err(|e| failed(format!("start its thread: {e}")))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has stopped too.
            let _ = worker.join();
        }
    }
}

fn serve(mut activation: Activation, mut source: std::fs::File) {
    let (Some(queue), Some(kick)) = (activation.queues.pop(), activation.kicks.pop()) else { return };
    let mut ring = Ring::new(queue, activation.features);
    loop {
        fill(&mut ring, &activation, &mut source);
        let mut waits = [kick.as_raw_fd(), activation.stop.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: `waits` is an array of two valid entries.
        let ready = unsafe { libc::poll(waits.as_mut_ptr(), 2, -1) };
        if waits[1].revents != 0
            || ready < 0 && std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted
        {
            return;
        }
        if waits[0].revents != 0 {
            let _ = kick.read();
        }
    }
}

fn fill(ring: &mut Ring, activation: &Activation, source: &mut std::fs::File) {
    let memory = &*activation.memory;
    while let Some(chain) = ring.pop(memory) {
        let head = chain.head_index();
        let mut written = 0;
        for descriptor in chain.writable() {
            let mut bytes = [0; LONGEST];
            let wanted = (descriptor.len() as usize).min(LONGEST - written);
            if wanted == 0 || source.read_exact(&mut bytes[..wanted]).is_err() {
                break;
            }
            if memory.write_slice(&bytes[..wanted], descriptor.addr()).is_err() {
                break;
            }
            written += wanted;
        }
        if ring.complete(memory, head, written as u32) {
            activation.interrupt.used();
        }
    }
}
