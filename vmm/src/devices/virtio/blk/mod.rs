//! virtio-blk (virtio 1.2, 5.2): a file or block device of the host as one disk of the guest, as it is, without a format.
//!
//! Owns: the device, its configuration space, opening and locking the backing. Does not own: requests (`request`); what lies on
//! the disk. The host reads and changes every byte of it: a guest that must not believe it puts dm-crypt, dm-integrity or
//! dm-verity on top.

mod request;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use virtio_bindings::bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::eventfd::EventFd;

use self::request::Disk;
use super::{Activation, DeviceError, VirtioDevice, copy_config, ring::Ring};

/// VIRTIO_ID_BLOCK.
const DEVICE_ID: u32 = 2;
/// Unit of every address and length of the protocol, in bytes.
pub const SECTOR: u64 = 512;
/// One queue. A request takes one slot where its descriptors are indirect.
const QUEUE_SIZES: [u16; 1] = [128];
/// Most data buffers of a request: the queue's size without header and status.
const SEGMENTS: u32 = 126;
/// Requests served before the worker looks whether it shall stop.
const BURST: usize = 64;

/// Why a disk cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The backing cannot be opened.
    #[error("virtio-blk: open disk `{path}`: {source}; give a file or block device, or add `,readonly`")]
    Open {
        /// Backing.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else uses it.
    #[error(
        "virtio-blk: disk `{0}` is in use by another VM; only readers may share one: add `,readonly` to all"
    )]
    Locked(PathBuf),
    /// Neither a file nor a block device, or of no usable size.
    #[error("virtio-blk: disk `{path}`: {problem}")]
    Unusable {
        /// Backing.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// A virtio-blk device.
pub struct Blk {
    disk: Arc<Disk>,
    worker: Option<JoinHandle<()>>,
}

impl Blk {
    /// Opens and locks the backing, for reading only or for both. The guest reads `serial` as the disk's id.
    ///
    /// # Errors
    /// [`BlkError`], naming the path.
    pub fn new(path: &Path, read_only: bool, serial: &str) -> Result<Self, BlkError> {
        let open = |source| BlkError::Open { path: path.to_owned(), source };
        let file = File::options().read(true).write(!read_only).open(path).map_err(open)?;
        let size = size_of(&file)
            .map_err(open)?
            .map_err(|problem| BlkError::Unusable { path: path.to_owned(), problem })?;
        let how = if read_only { libc::LOCK_SH } else { libc::LOCK_EX };
        // SAFETY: the descriptor is open; the call touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::WouldBlock => BlkError::Locked(path.to_owned()),
                _ => open(error),
            });
        }
        let disk = Disk { file, sectors: size / SECTOR, read_only, serial: request::serial(serial) };
        Ok(Self { disk: Arc::new(disk), worker: None })
    }

    /// struct virtio_blk_config up to the write-zeroes fields.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Discard: most sectors, most ranges, alignment in sectors; write zeroes: most sectors, most ranges, may unmap.
        put(36, &request::RANGE_SECTORS.to_le_bytes());
        put(40, &request::RANGES.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &request::RANGE_SECTORS.to_le_bytes());
        put(52, &request::RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

/// Bytes of the backing; a problem in words when it cannot be a disk.
fn size_of(file: &File) -> io::Result<Result<u64, &'static str>> {
    let metadata = file.metadata()?;
    let size = if metadata.file_type().is_block_device() {
        // SAFETY: the descriptor is open; the call touches no memory.
        let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
        u64::try_from(end).map_err(|_| io::Error::last_os_error())?
    } else if metadata.is_file() {
        metadata.len()
    } else {
        return Ok(Err("it is neither a file nor a block device"));
    };
    Ok(match size {
        0 => Err("it is empty: make it as long as the disk shall be (truncate -s)"),
        size if !size.is_multiple_of(SECTOR) => Err("its size is no multiple of 512 bytes"),
        size if size > i64::MAX as u64 => Err("it is larger than a file can be"),
        size => Ok(size),
    })
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn device_type(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        let writable = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let more: &[u32] = if self.disk.read_only { &[VIRTIO_BLK_F_RO] } else { &writable };
        always.iter().chain(more).fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let failed = |reason: String| DeviceError { device: "blk", reason };
        let disk = Arc::clone(&self.disk);
        let worker = std::thread::Builder::new().name("blk".into()).spawn(move || serve(activation, &disk));
        self.worker = Some(worker.map_err(|e| failed(format!("start its thread: {e}")))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.join().expect("a panic aborts the process, except in tests, which shall fail");
        }
    }
}

fn serve(mut activation: Activation, disk: &Disk) {
    let (Some(queue), Some(kick)) = (activation.queues.pop(), activation.kicks.pop()) else { return };
    let mut ring = Ring::new(queue, activation.features);
    let memory = &*activation.memory;
    // A driver that cannot flush believes that what was written is safe.
    let write_through = activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
    let mut buffer = vec![0; request::BUFFER];
    loop {
        let mut served = 0;
        while served < BURST
            && let Some(chain) = ring.pop(memory)
        {
            let head = chain.head_index();
            let written = disk.serve(memory, chain, &mut buffer, write_through);
            if ring.complete(memory, head, written) {
                activation.interrupt.used();
            }
            served += 1;
        }
        if !wait(&kick, &activation.stop, served == BURST) {
            return;
        }
    }
}

/// Waits for a kick, or only looks when there is more to do. False when the worker is to stop.
fn wait(kick: &EventFd, stop: &EventFd, more: bool) -> bool {
    let mut waits =
        [kick, stop].map(|event| libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: `waits` is an array of two valid entries.
    let ready = unsafe { libc::poll(waits.as_mut_ptr(), 2, if more { 0 } else { -1 }) };
    if waits[1].revents != 0 || ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        return false;
    }
    if waits[0].revents != 0 {
        let _ = kick.read();
    }
    true
}
