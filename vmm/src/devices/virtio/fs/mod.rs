//! virtio-fs: one host directory, shared with the guest.
//!
//! Owns: the device, its configuration space and its worker threads (`pool`), and the limits around the FUSE server (`share`).
//! Does not own: the FUSE protocol and the passthrough file system (`fuse-backend-rs`), what is mounted below the directory.

mod pool;
mod share;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::{pool::Pool, share::Share};
use super::{Activation, DeviceError, VirtioDevice, copy_config};

/// VIRTIO_ID_FS.
const DEVICE_ID: u32 = 26;
/// Bytes of the tag in the configuration space.
const TAG_SIZE: usize = 36;
/// hiprio (FORGET) and one request queue. A request takes one slot, as its descriptors are indirect; Linux bounds a request's
/// pages by the queue's size, and 256 pages (1 MiB) and 4 descriptors of headers shall fit.
const QUEUE_SIZES: [u16; 2] = [128, 512];
/// Threads that serve requests: enough that an fsync of a database does not hold up everybody else.
const THREADS: usize = 4;

/// Why the directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("virtio-fs: tag `{0}` must have 1 to 36 bytes and no NUL; choose a shorter one")]
    Tag(String),
    /// The directory cannot be used.
    #[error(
        "virtio-fs: share `{path}`: {source}; it must be a directory that the VMM can open, with a path in UTF-8"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A virtio-fs device.
pub struct Fs {
    tag: [u8; TAG_SIZE],
    root: String,
    threads: Vec<JoinHandle<()>>,
    /// The guest has mounted the share since it was activated.
    mounted: Arc<AtomicBool>,
}

impl Fs {
    /// Shares `dir` under the name `tag`. What is mounted below `dir`, now or later, is part of the share. Raises the process's
    /// limit of open files as far as it goes: each inode that the guest knows holds a descriptor.
    ///
    /// # Errors
    /// [`FsError`] for a tag that does not fit or a directory that cannot be opened.
    pub fn new(tag: &str, dir: &Path) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_SIZE || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut padded = [0; TAG_SIZE];
        padded[..tag.len()].copy_from_slice(tag.as_bytes());
        let root = usable_root(dir).map_err(|source| FsError::Directory { path: dir.to_owned(), source })?;
        raise_open_files_limit();
        Ok(Self { tag: padded, root, threads: Vec::new(), mounted: Arc::default() })
    }

    fn config(&self) -> [u8; TAG_SIZE + 4] {
        let mut config = [0; TAG_SIZE + 4];
        config[..TAG_SIZE].copy_from_slice(&self.tag);
        let request_queues = QUEUE_SIZES.len() as u32 - 1;
        config[TAG_SIZE..].copy_from_slice(&request_queues.to_le_bytes());
        config
    }
}

/// The directory's real path: the passthrough file system opens its root without following a symbolic link.
fn usable_root(dir: &Path) -> io::Result<String> {
    let real = fs::canonicalize(dir)?;
    fs::read_dir(&real)?;
    real.into_os_string().into_string().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn raise_open_files_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // Without the raise the guest sees EMFILE earlier; that is no reason to refuse the share.
        // SAFETY: `limit` is initialised and only read.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn device_type(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let failed =
            |what: &str, error: io::Error| DeviceError { device: "fs", reason: format!("{what}: {error}") };
        self.mounted = Arc::default();
        let share = Share::new(&self.root, Arc::clone(&self.mounted))
            .map_err(|error| failed("prepare the share", error))?;
        let pool = Pool::new(share, activation).map_err(|error| failed("watch the queues", error))?;
        self.threads =
            Pool::start(&Arc::new(pool), THREADS).map_err(|error| failed("start a thread", error))?;
        Ok(())
    }

    fn reset(&mut self) {
        for thread in self.threads.drain(..) {
            thread.join().expect("a panic aborts the process, except in tests, which shall fail");
        }
    }

    fn save(&mut self) -> Result<serde_json::Value, DeviceError> {
        self.reset();
        if self.mounted.load(Ordering::SeqCst) {
            let reason = "the guest has mounted the share, whose files no saved machine can know".into();
            return Err(DeviceError { device: "fs", reason });
        }
        Ok(serde_json::Value::Null)
    }
}
