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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{LONGEST, Rng};
    use crate::devices::virtio::test_driver::{BUFFERS, Descriptor, Driver, MEMORY};

    fn device() -> (Rng, Driver) {
        let mut rng = Rng::default();
        let driver = Driver::new(&mut rng, 0);
        (rng, driver)
    }

    #[test]
    fn two_requests_get_different_bytes_and_no_more_than_they_ask_for() {
        let (mut rng, mut driver) = device();
        driver.write(BUFFERS, &[0x5a; 200]);
        driver.chain(0, 0, &[], &[(BUFFERS, 64)]);
        driver.chain(0, 1, &[], &[(BUFFERS + 100, 64)]);
        for head in [0, 1] {
            driver.offer(0, head);
            assert_eq!(driver.wait_used(0), (head, 64));
        }
        let bytes = driver.read(BUFFERS, 200);
        assert_ne!(bytes[..64], bytes[100..164]);
        assert_eq!((&bytes[64..100], &bytes[164..]), (&[0x5a; 36][..], &[0x5a; 36][..]));
        driver.stop(&mut rng);
    }

    #[test]
    fn a_request_gets_a_page_at_most() {
        let (mut rng, mut driver) = device();
        driver.chain(0, 0, &[], &[(BUFFERS, 3000), (BUFFERS + 4096, 1 << 20)]);
        driver.offer(0, 0);
        assert_eq!(driver.wait_used(0), (0, LONGEST as u32));
        driver.stop(&mut rng);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn chains_of_any_shape_are_given_back(
            readable in prop::collection::vec((any::<u64>(), any::<u32>()), 0..4),
            writable in prop::collection::vec((any::<u64>(), any::<u32>()), 0..4),
            near in any::<bool>(),
        ) {
            prop_assume!(!readable.is_empty() || !writable.is_empty());
            let (mut rng, mut driver) = device();
            let place = |(address, length): &(u64, u32)| {
                if near { (BUFFERS + address % MEMORY, length % 9000) } else { (*address, *length) }
            };
            let (readable, writable): (Vec<_>, Vec<_>) =
                (readable.iter().map(place).collect(), writable.iter().map(place).collect());
            driver.chain(0, 0, &readable, &writable);
            driver.offer(0, 0);
            let (head, written) = driver.wait_used(0);
            let asked: u64 = writable.iter().map(|(_, length)| u64::from(*length)).sum();
            prop_assert!(head == 0 && u64::from(written) <= asked.min(LONGEST as u64));
            driver.stop(&mut rng);
        }

        /// Descriptors that point anywhere, at each other and at themselves: the device may refuse all of it, but it neither hangs nor ends.
        #[test]
        fn a_table_of_anything_leaves_a_device_that_can_be_reset_and_used(
            table in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 16),
            heads in prop::collection::vec(any::<u16>(), 1..16),
            index in any::<u16>(),
        ) {
            let (mut rng, mut driver) = device();
            for (place, &(address, length, flags, next)) in table.iter().enumerate() {
                driver.write_descriptor(Driver::table(0), place as u16, Descriptor { address, length, flags, next });
            }
            for head in &heads {
                driver.offer(0, *head);
            }
            let _ = driver.wait_used_for(0, Duration::from_millis(2));
            driver.set_available_index(0, index);
            driver.kicks[0].write(1).unwrap();
            driver.stop(&mut rng);
            let (mut driver, length) = (Driver::new(&mut rng, 0), 16);
            driver.chain(0, 0, &[], &[(BUFFERS, length)]);
            driver.offer(0, 0);
            prop_assert_eq!(driver.wait_used(0), (0, length));
            driver.stop(&mut rng);
        }
    }
}
