//! virtio-net: one Ethernet interface of the guest, on a tap of the host.
//!
//! Owns: the device, its configuration space, its features and their counterpart at the tap. Does not own: moving packets
//! (`worker`), addresses and routes (the runtime and the guest's init).

mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread::{self, JoinHandle},
};

use virtio_bindings::bindings::{
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

pub use self::tap::{TapError, open_tap};
use self::worker::Worker;
use super::{Activation, DeviceError, VirtioDevice, copy_config};

/// VIRTIO_ID_NET.
const DEVICE_ID: u32 = 1;
/// Receive and transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// The smallest MTU of IPv4 that the specification lets a device announce.
const SMALLEST_MTU: u16 = 68;

/// Why the interface cannot be offered.
#[derive(Debug, thiserror::Error)]
#[error(
    "virtio-net: prepare the tap: {0}; the descriptor must be a tap with virtio headers (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR)"
)]
pub struct NetError(#[source] io::Error);

/// What carries the packets.
enum Link {
    Tap(OwnedFd),
    /// A socket that keeps packets apart, in place of a tap where there is no right to make one.
    #[cfg(any(test, feature = "fuzz"))]
    Socket(OwnedFd),
}

impl Link {
    fn descriptor(&self) -> &OwnedFd {
        match self {
            Self::Tap(fd) => fd,
            #[cfg(any(test, feature = "fuzz"))]
            Self::Socket(fd) => fd,
        }
    }
}

/// A virtio-net device.
pub struct Net {
    link: Link,
    mac: [u8; 6],
    mtu: Option<u16>,
    thread: Option<JoinHandle<()>>,
}

impl Net {
    /// An interface with the address `mac` on `tap`.
    ///
    /// # Errors
    /// [`NetError`] if `tap` is no tap with virtio headers.
    pub fn new(tap: OwnedFd, mac: [u8; 6]) -> Result<Self, NetError> {
        tap::prepare(tap.as_fd()).map_err(NetError)?;
        Ok(Self { link: Link::Tap(tap), mac, mtu: None, thread: None })
    }

    /// Announces the tap's MTU to the guest, if the tap is of this network namespace. That takes a socket, which a VMM that runs may not
    /// make.
    #[must_use]
    pub fn with_mtu_of_tap(mut self) -> Self {
        self.mtu = tap::mtu(self.link.descriptor().as_fd()).filter(|mtu| *mtu >= SMALLEST_MTU);
        self
    }

    /// An interface on a socket that keeps packets apart.
    ///
    /// # Panics
    /// The descriptor is not open.
    #[cfg(any(test, feature = "fuzz"))]
    #[must_use]
    pub fn on_socket(socket: OwnedFd, mac: [u8; 6]) -> Self {
        tap::non_blocking(socket.as_fd()).unwrap();
        Self { link: Link::Socket(socket), mac, mtu: None, thread: None }
    }

    /// The configuration space: address, status, count of queue pairs (both unused, as their features are not offered), MTU.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

/// The `TUN_F_*` that the driver's features allow.
fn offload(features: u64) -> u32 {
    let pairs = [
        (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    ];
    let accepted = pairs.into_iter().filter(|(bit, _)| features & (1 << bit) != 0);
    let flags = accepted.fold(0, |flags, (_, flag)| flags | flag);
    // The driver must not accept a feature without those below it; the tap would refuse them all.
    match (flags & libc::TUN_F_CSUM != 0, flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0) {
        (false, _) => 0,
        (true, false) => libc::TUN_F_CSUM,
        (true, true) => flags,
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn device_type(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        let mtu = u64::from(self.mtu.is_some()) << VIRTIO_NET_F_MTU;
        bits.into_iter().fold(mtu, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let failed =
            |what: &str, error: io::Error| DeviceError { device: "net", reason: format!("{what}: {error}") };
        match &self.link {
            Link::Tap(tap) => tap::set_offload(tap.as_fd(), offload(activation.features))
                .map_err(|error| failed("tell the tap what the guest takes", error))?,
            #[cfg(any(test, feature = "fuzz"))]
            Link::Socket(_) => {}
        }
        let link =
            self.link.descriptor().try_clone().map_err(|error| failed("copy the tap's descriptor", error))?;
        let mut worker = Worker::new(link, activation).map_err(|error| failed("watch the queues", error))?;
        let thread = thread::Builder::new().name("net".to_owned()).spawn(move || worker.run());
        self.thread = Some(thread.map_err(|error| failed("start a thread", error))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a panic aborts the process, except in tests, which shall fail");
        }
    }
}
