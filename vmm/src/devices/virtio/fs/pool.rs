//! The threads that serve FUSE requests from the virtqueues.
//!
//! Owns: waiting, taking a request, answering it, whatever the driver sent. Does not own: what a request means (`share`).
//!
//! Leader and followers: one thread at a time waits for the driver and takes one request; before it serves the request it lets
//! the next thread lead. A lone request is thus served by the thread that the kick woke, without a hand-over.

use std::{
    io::{self, Write},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use fuse_backend_rs::{
    Error,
    abi::fuse_abi::{InHeader, Opcode, OutHeader},
    api::server::{MAX_BUFFER_SIZE, Server},
    transport::{Reader, VirtioFsWriter, Writer},
};
use vm_memory::ByteValued;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    super::{
        Activation, GuestRam, Interrupt,
        ring::{Chain, Ring},
    },
    share::Share,
};
use crate::memory::Ram;

/// Most bytes of a request, and of an answer: what INIT grants, and a page for headers. The server allocates up to this much.
const MAX_MESSAGE: usize = MAX_BUFFER_SIZE as usize + 4096;
/// FUSE_SYNCFS (linux/fuse.h), which `fuse-backend-rs` does not name. It answers ENOSYS, after which Linux never asks again and
/// takes every sync for done.
const SYNCFS: u32 = 50;
/// Requests taken in a row before the leader looks whether it shall stop.
const BURST: u32 = 64;
/// Epoll data of the stop event; the queues have their index.
const STOP: u64 = u64::MAX;

/// What the threads share.
pub(super) struct Pool {
    memory: GuestRam,
    share: Arc<Share>,
    server: Server<Arc<Share>>,
    queues: Vec<(Mutex<Ring>, EventFd)>,
    intake: Mutex<Intake>,
    interrupt: Interrupt,
    /// Watched by epoll, which does not own it.
    _stop: EventFd,
}

/// What the leader holds.
struct Intake {
    epoll: Epoll,
    taken: u32,
}

/// A panic aborts the process, so no lock is ever poisoned; this spares an `unwrap`.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// # Errors
    /// The system's, if the events cannot be watched.
    pub(super) fn new(share: Share, activation: Activation) -> io::Result<Self> {
        let Activation { memory, queues, kicks, interrupt, features, stop } = activation;
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        for (index, kick) in kicks.iter().enumerate() {
            epoll.ctl(
                ControlOperation::Add,
                kick.as_raw_fd(),
                EpollEvent::new(EventSet::IN, index as u64),
            )?;
        }
        let queues =
            queues.into_iter().map(|queue| Mutex::new(Ring::new(queue, features))).zip(kicks).collect();
        let intake = Mutex::new(Intake { epoll, taken: 0 });
        let share = Arc::new(share);
        let server = Server::new(Arc::clone(&share));
        Ok(Self { memory, share, server, queues, intake, interrupt, _stop: stop })
    }

    /// # Errors
    /// The system's, if no thread can be started; fewer than `count` are good enough.
    pub(super) fn start(pool: &Arc<Self>, count: usize) -> io::Result<Vec<JoinHandle<()>>> {
        let mut threads = Vec::with_capacity(count);
        for index in 0..count {
            let pool = Arc::clone(pool);
            match thread::Builder::new().name(format!("fs{index}")).spawn(move || pool.run()) {
                Ok(thread) => threads.push(thread),
                Err(error) if threads.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(threads)
    }

    fn run(&self) {
        own_credentials();
        while let Some((queue, chain)) = self.next() {
            let head = chain.head_index();
            let written = answer(&self.share, &self.server, &self.memory, chain);
            if lock(&self.queues[queue].0).complete(&self.memory, head, written) {
                self.interrupt.used();
            }
        }
    }

    /// Waits for a request; `None` at the end. Queue 0 (FORGET) first, so that the guest's forgotten inodes do not pile up.
    fn next(&self) -> Option<(usize, Chain<'_>)> {
        let mut intake = lock(&self.intake);
        loop {
            intake.taken += 1;
            if intake.taken.is_multiple_of(BURST) && self.wait(&intake, 0) {
                return None;
            }
            for (index, (ring, _)) in self.queues.iter().enumerate() {
                if let Some(chain) = lock(ring).pop(&self.memory) {
                    return Some((index, chain));
                }
            }
            if self.wait(&intake, -1) {
                return None;
            }
        }
    }

    /// Waits for an event, `timeout` in milliseconds, and takes the kicks. True if the worker shall stop.
    fn wait(&self, intake: &Intake, timeout: i32) -> bool {
        let mut events = [EpollEvent::default(); 4];
        let count = match intake.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) => return error.kind() != io::ErrorKind::Interrupted,
        };
        let mut stop = false;
        for event in &events[..count] {
            match usize::try_from(event.data()).ok().and_then(|index| self.queues.get(index)) {
                // Only the leader reads it and it was ready, so this does not block. The count means nothing.
                Some((_, kick)) => drop(kick.read()),
                // Left set, so that each thread sees it when it leads.
                None => stop = true,
            }
        }
        stop
    }
}

/// Lets this thread alone act as the guest's users: the server sets the thread's effective user and group before it creates a
/// file. The guest's kernel has checked permissions, supplementary groups included, which the host cannot know; so the thread
/// keeps its capabilities while it is somebody else. Its umask is its own and empty, because the guest has applied the process's.
/// Best effort: without the right to do so, files get created under stricter rules.
fn own_credentials() {
    const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: unshare, umask and prctl with these arguments change only this thread's attributes and touch no memory.
    unsafe {
        if libc::unshare(libc::CLONE_FS) == 0 {
            libc::umask(0);
        }
        let bits = libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0);
        if let Ok(bits) = libc::c_ulong::try_from(bits) {
            libc::prctl(libc::PR_SET_SECUREBITS, bits | SECBIT_NO_SETUID_FIXUP, 0, 0, 0);
        }
    }
}

/// Serves one request and returns the bytes written into the chain.
fn answer(share: &Share, server: &Server<Arc<Share>>, memory: &Ram, chain: Chain<'_>) -> u32 {
    // Both are made before they are measured: the guest may rewrite its descriptors at any time, the slices stay.
    let (Ok(reader), Ok(writer)) =
        (Reader::from_descriptor_chain(memory, chain.clone()), VirtioFsWriter::new(memory, chain))
    else {
        return 0;
    };
    let mut header_alone = writer.clone();
    let Ok(header) = reader.clone().read_obj::<InHeader>() else { return 0 };
    let errno = if reader.available_bytes() > MAX_MESSAGE || writer.available_bytes() > MAX_MESSAGE {
        libc::EINVAL
    } else if header.opcode == SYNCFS {
        // Its answer is a header alone.
        share.sync(header.nodeid).map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0)
    } else {
        match server.handle_message(reader, Writer::VirtioFs(writer), None, None) {
            Ok(written) => return u32::try_from(written).unwrap_or(0),
            Err(Error::EncodeMessage(_)) => libc::EIO,
            Err(_) => libc::EINVAL,
        }
    };
    // The server drops a message that it cannot parse; without an answer a thread in the guest would wait for ever.
    if header.opcode == Opcode::Forget as u32 || header.opcode == Opcode::BatchForget as u32 {
        return 0;
    }
    let out = OutHeader { len: size_of::<OutHeader>() as u32, error: -errno, unique: header.unique };
    header_alone.write_all(out.as_slice()).map_or(0, |()| out.len)
}
