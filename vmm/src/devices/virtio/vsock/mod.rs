//! virtio-vsock in user space (virtio 1.2, 5.10): a unix socket on the host, ports in the guest.
//!
//! Owns: the device, its worker thread, the host's listening socket. `CONNECT PORT\n` on the socket is answered by
//! `OK PORT\n` when the guest accepted; then bytes flow. Hosts wait until the guest has connected to [`READY_PORT`]. A host that asks about
//! the VM itself ([`coffer_protocol::vm`]) hears from [`Control`].

mod connection;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixListener},
    },
    path::Path,
    sync::Arc,
    thread::JoinHandle,
};

use muxer::Muxer;
use packet::{HEADER, Header};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, DeviceError, GuestRam, Interrupt, VirtioDevice, copy_config, ring::Ring};

/// Host port to which init connects when it listens.
pub const READY_PORT: u32 = 1;
/// Longest data of one packet.
const LONGEST: usize = 64 * 1024;

/// Why there is no socket.
#[derive(Debug, Error)]
#[error("listen on {path}: {source}; remove it, or name a path in a directory that exists")]
pub struct VsockError {
    path: String,
    source: io::Error,
}

/// What a host asks of the VM itself.
#[derive(Debug)]
pub enum Ask {
    /// As [`coffer_protocol::vm::Line::Memory`].
    Memory(Option<u32>),
    /// As [`coffer_protocol::vm::Line::Net`], with the descriptor that came along.
    Net([u8; 6], Option<OwnedFd>),
}

/// Answers that, in one line.
pub type Control = Arc<dyn Fn(Ask) -> String + Send + Sync>;

/// The device.
pub struct Vsock {
    guest_cid: u64,
    listener: UnixListener,
    worker: Option<JoinHandle<Rest>>,
    control: Option<Control>,
    /// The guest listened already when it was saved.
    ready: bool,
}

/// What a worker leaves.
#[derive(Clone, Copy, Debug)]
struct Rest {
    ready: bool,
    connections: usize,
}

impl Vsock {
    /// Listens at once; only root may connect.
    ///
    /// # Errors
    /// [`VsockError`], naming the path.
    pub fn new(path: &Path, guest_cid: u64) -> Result<Self, VsockError> {
        let failed = |source| VsockError { path: path.display().to_string(), source };
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { guest_cid, listener, worker: None, control: None, ready: false })
    }

    /// Lets hosts ask about the VM itself.
    #[must_use]
    pub fn with_control(self, control: Control) -> Self {
        Self { control: Some(control), ..self }
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let failed = |reason: String| DeviceError { device: "vsock", reason };
        let listener = self.listener.try_clone().map_err(|e| failed(format!("share its socket: {e}")))?;
        let ready = std::mem::take(&mut self.ready);
        let muxer = Muxer::new(self.guest_cid, READY_PORT, ready).with_control(self.control.clone());
        let worker = Worker::new(activation, listener, muxer)
            .ok_or_else(|| failed("the driver did not set up its queues".to_owned()))?;
        let thread = std::thread::Builder::new().name("vsock".into()).spawn(move || worker.run());
        self.worker = Some(thread.map_err(|e| failed(format!("start its thread: {e}")))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has stopped too; its connections are closed.
            let _ = worker.join();
        }
    }

    fn save(&mut self) -> Result<serde_json::Value, DeviceError> {
        let failed = |reason: &str| DeviceError { device: "vsock", reason: reason.to_owned() };
        let rest = self.worker.take().and_then(|worker| worker.join().ok());
        match rest.ok_or_else(|| failed("its thread is gone"))? {
            Rest { connections: 0, ready } => Ok(serde_json::Value::Bool(ready)),
            _ => Err(failed("a host is connected, which no saved machine can have")),
        }
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), DeviceError> {
        let wrong = || DeviceError { device: "vsock", reason: "the saved state is not this device's".into() };
        self.ready = state.as_bool().ok_or_else(wrong)?;
        Ok(())
    }
}

struct Worker {
    memory: GuestRam,
    receive: Ring,
    transmit: Ring,
    kicks: Vec<EventFd>,
    stop: EventFd,
    interrupt: Interrupt,
    listener: UnixListener,
    muxer: Muxer,
}

impl Worker {
    fn new(activation: Activation, listener: UnixListener, muxer: Muxer) -> Option<Self> {
        let Activation { memory, queues, kicks, interrupt, features, stop } = activation;
        let mut queues = queues.into_iter();
        let receive = Ring::new(queues.next()?, features);
        let transmit = Ring::new(queues.next()?, features);
        (kicks.len() == 3).then_some(())?;
        Some(Self { memory, receive, transmit, kicks, stop, interrupt, listener, muxer })
    }

    fn run(mut self) -> Rest {
        let mut buffer = vec![0; LONGEST];
        loop {
            self.take_packets(&mut buffer);
            let starved = self.give_packets(&mut buffer);
            if !self.wait(!starved) {
                return Rest { ready: self.muxer.is_ready(), connections: self.muxer.count() };
            }
        }
    }

    /// Packets of the guest, until its queue is empty.
    fn take_packets(&mut self, buffer: &mut [u8]) {
        let memory = &*self.memory;
        while let Some(chain) = self.transmit.pop(memory) {
            let head = chain.head_index();
            let mut header = [0; HEADER];
            if let Ok(mut reader) = chain.reader(memory)
                && reader.read_exact(&mut header).is_ok()
            {
                let header = Header::from_bytes(&header);
                // A length that is not in the chain, or over the longest, is a packet that never was.
                if let Some(data) = buffer.get_mut(..header.length as usize)
                    && reader.read_exact(data).is_ok()
                {
                    self.muxer.receive(&header, data);
                }
            }
            self.transmit.push_used(memory, &[(head, 0)]);
        }
        if self.transmit.wants_interrupt(memory) {
            self.interrupt.used();
        }
    }

    /// Packets for the guest, while it has buffers. True when it has none left.
    fn give_packets(&mut self, buffer: &mut [u8]) -> bool {
        let memory = &*self.memory;
        let mut starved = false;
        loop {
            let Some(chain) = self.receive.pop(memory) else {
                starved = true;
                break;
            };
            let head = chain.head_index();
            let Ok(mut writer) = chain.writer(memory) else {
                self.receive.push_used(memory, &[(head, 0)]);
                continue;
            };
            let Some(room) = writer.available_bytes().checked_sub(HEADER) else {
                self.receive.push_used(memory, &[(head, 0)]);
                continue;
            };
            let room = room.min(LONGEST);
            let Some(header) = self.muxer.next_packet(&mut buffer[..room]) else {
                self.receive.undo_pop(1);
                break;
            };
            let data = &buffer[..header.length as usize];
            let written = writer.write_all(&header.to_bytes()).and_then(|()| writer.write_all(data));
            let length = if written.is_ok() { HEADER + data.len() } else { 0 };
            self.receive.push_used(memory, &[(head, length as u32)]);
        }
        if self.receive.wants_interrupt(memory) {
            self.interrupt.used();
        }
        starved
    }

    /// Waits for something to do. False when the device is to stop.
    fn wait(&mut self, room: bool) -> bool {
        let interests = self.muxer.interests(room);
        let listens = self.muxer.is_ready() && self.muxer.count() < muxer::MOST;
        let listener = if listens { self.listener.as_raw_fd() } else { -1 };
        let fixed = [
            self.stop.as_raw_fd(),
            self.kicks[0].as_raw_fd(),
            self.kicks[1].as_raw_fd(),
            self.kicks[2].as_raw_fd(),
            listener,
        ];
        let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut waits: Vec<libc::pollfd> = fixed.iter().map(|fd| entry(*fd, libc::POLLIN)).collect();
        waits.extend(interests.iter().map(|(_, fd, events)| entry(*fd, *events)));
        // SAFETY: `waits` is a vector of valid entries of this length.
        let ready = unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, -1) };
        if ready < 0 {
            return io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        }
        if waits[0].revents != 0 {
            return false;
        }
        for (kick, wait) in self.kicks.iter().zip(&waits[1..4]) {
            if wait.revents != 0 {
                let _ = kick.read();
            }
        }
        if waits[4].revents != 0 {
            while let Ok((stream, _)) = self.listener.accept() {
                self.muxer.accept(stream);
            }
        }
        for ((key, _, _), wait) in interests.iter().zip(&waits[fixed.len()..]) {
            if wait.revents != 0 {
                self.muxer.handle(*key, wait.revents);
            }
        }
        true
    }
}
