//! virtio devices and a guest that writes what it likes to their registers, queues and buffers.
//!
//! An input is a list of steps. Devices work on threads of their own; after a kick a step waits until the device has looked, so
//! that what an input does depends on the input.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    io::{self, Read, Write},
    ops::Range,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixDatagram, UnixStream},
    },
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use coffer_vmm::{
    devices::virtio::{
        VirtioDevice,
        blk::Blk,
        fs::Fs,
        mem::{Backing, Handle, Mem},
        mmio::{QUEUE_NOTIFY, Window},
        net::Net,
        rng::Rng,
        vsock::Vsock,
    },
    memory::{BLOCK, Ram},
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// RAM of the guest: rings in front, buffers behind, and a second range to run into.
const LOW: usize = 128 << 10;
const HIGH: (u64, usize) = (1 << 20, 16 << 10);
/// Where a queue's rings lie, and where buffers begin.
const RINGS: u64 = 0x4000;
const BUFFERS: u64 = 0x1_0000;
const SIZE: u16 = 16;
const STATUS: u64 = 0x70;
const DRIVER_OK: u32 = 4;
/// A device that has not looked at a kick by then hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Steps of a guest, by their first byte.
#[expect(missing_docs, reason = "each is described where it is taken")]
pub mod step {
    pub const START: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const READ: u8 = 2;
    pub const MEMORY: u8 = 3;
    pub const CHAIN: u8 = 4;
    pub const KICK: u8 = 5;
    pub const HOST: u8 = 6;
    pub const COUNT: u8 = 7;
}

/// The other side of a device: what a host does while its guest runs.
trait Host {
    /// Between two inputs.
    fn rest(&mut self) {}
    /// A step of the input.
    fn act(&mut self, _what: u8, _bytes: &[u8]) {}
}

struct Nobody;

impl Host for Nobody {}

fn memory() -> Arc<Ram> {
    let ranges = [(GuestAddress(0), LOW), (GuestAddress(HIGH.0), HIGH.1)];
    Arc::new(Ram::from_ranges(&ranges).expect("memory"))
}

/// A device, its registers and its guest.
struct Bench {
    window: Window,
    memory: Arc<Ram>,
    host: Box<dyn Host>,
    queues: u32,
    available: [u16; 4],
    free: u64,
}

impl Bench {
    fn new(device: Box<dyn VirtioDevice>, host: Box<dyn Host>) -> Self {
        Self::with(memory(), device, host)
    }

    fn with(memory: Arc<Ram>, device: Box<dyn VirtioDevice>, host: Box<dyn Host>) -> Self {
        let queues = device.queue_sizes().len() as u32;
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
        let window = Window::new(device, Arc::clone(&memory), line).expect("a window");
        Self { window, memory, host, queues, available: [0; 4], free: BUFFERS }
    }

    fn put(&mut self, offset: u64, value: u32) {
        self.window.write(offset, &value.to_le_bytes());
    }

    fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.window.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn run(&mut self, data: &[u8]) {
        self.put(STATUS, 0);
        self.memory.write_slice(&[0; LOW], GuestAddress(0)).expect("memory");
        (self.available, self.free) = ([0; 4], BUFFERS);
        self.host.rest();
        let mut input = Input(data);
        while let Some(step) = input.byte() {
            self.step(step % step::COUNT, &mut input);
            let _ = self.window.take_failures();
            assert!(
                [0, 1, 3, 11, 15].contains(&(self.get(STATUS) & 15)),
                "status {:#x} is out of order",
                self.get(STATUS)
            );
        }
        // Joins the device's threads: one that panicked is seen here.
        self.put(STATUS, 0);
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        match step {
            // The honest order, with the features that the input leaves on.
            step::START => self.start(!input.number(4)),
            step::WRITE => {
                let (offset, value) = (input.number(2), input.number(4));
                let length = (usize::from(input.byte().unwrap_or(0)) + 3) % 8 + 1;
                self.window.write(offset % 0x200, &value.to_le_bytes()[..length]);
            }
            step::READ => {
                let (offset, length) = (input.number(2), usize::from(input.byte().unwrap_or(0)));
                self.window.read(offset % 0x200, &mut [0; 16][..length % 9]);
            }
            step::MEMORY => {
                let (address, length) = (input.number(3), usize::from(input.byte().unwrap_or(0)));
                let _ = self.memory.write_slice(input.piece(length), GuestAddress(address));
            }
            step::CHAIN => self.chain(input),
            step::KICK => {
                let queue = input.byte().unwrap_or(0);
                self.settle(u32::from(queue));
            }
            _ => {
                let (what, length) = (input.byte().unwrap_or(0), usize::from(input.byte().unwrap_or(0)));
                self.host.act(what, input.piece(length));
                for queue in 0..self.queues {
                    self.settle(queue);
                }
            }
        }
    }

    fn start(&mut self, mask: u64) {
        for status in [0, 1, 3] {
            self.put(STATUS, status);
        }
        self.available = [0; 4];
        for half in 0..2 {
            self.put(0x14, half);
            let offered = self.get(0x10);
            self.put(0x24, half);
            self.put(0x20, if half == 0 { offered & mask as u32 } else { offered });
        }
        self.put(STATUS, 11);
        for queue in 0..self.queues {
            let rings = u64::from(queue) * RINGS;
            self.put(0x30, queue);
            self.put(0x38, u32::from(SIZE));
            for (register, address) in [(0x80, rings), (0x90, rings + 0x1000), (0xa0, rings + 0x2000)] {
                self.put(register, address as u32);
            }
            self.put(0x44, 1);
        }
        self.put(STATUS, 15);
    }

    /// Queue; how many buffers, the first of which are readable; each one's length, and a readable one's bytes.
    fn chain(&mut self, input: &mut Input<'_>) {
        let queue = u32::from(input.byte().unwrap_or(0)) % self.queues;
        let shape = input.byte().unwrap_or(0);
        let (readable, count) = (shape & 3, (shape >> 2 & 7).max(1));
        let rings = u64::from(queue) * RINGS;
        let next = &mut self.available[queue as usize];
        let head = (*next * 4) % SIZE;
        for index in 0..count {
            let length = input.number(2);
            let address = self.free;
            let mut flags = u16::from(index + 1 < count);
            if index < readable {
                let bytes = input.piece((length as usize).min(2048));
                let _ = self.memory.write_slice(bytes, GuestAddress(address));
            } else {
                flags |= 2;
            }
            // Buffers follow each other until there is no room.
            self.free = if address + length + 16 < LOW as u64 - 0x2000 { address + length } else { BUFFERS };
            let place = (head + u16::from(index)) % SIZE;
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&((place + 1) % SIZE).to_le_bytes());
            let _ = self.memory.write_slice(&bytes, GuestAddress(rings + u64::from(place) * 16));
        }
        let slot = u64::from(*next % SIZE);
        let _ = self.memory.write_slice(&head.to_le_bytes(), GuestAddress(rings + 0x1000 + 4 + 2 * slot));
        *next = next.wrapping_add(1);
        let _ = self.memory.write_slice(&next.to_le_bytes(), GuestAddress(rings + 0x1002));
        self.settle(queue);
    }

    /// Kicks twice: when the second kick was taken, the device is through with what it found at the first.
    fn settle(&mut self, queue: u32) {
        for _ in 0..2 {
            self.put(QUEUE_NOTIFY as u64, queue);
            let Some(kick) = self.window.kicks().get(queue as usize) else { return };
            let began = Instant::now();
            while self.get(STATUS) & DRIVER_OK != 0 && is_readable(kick.as_raw_fd()) {
                // Not a mere yield: on a busy machine the device's thread waits for this one's processor.
                thread::sleep(Duration::from_micros(10));
                assert!(began.elapsed() < PATIENCE, "the device does not look at queue {queue}");
            }
        }
    }
}

fn is_readable(fd: RawFd) -> bool {
    let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut wait, 1, 0) == 1 }
}

/// Entropy.
pub fn rng(data: &[u8]) {
    thread_local!(static BENCH: RefCell<Bench> = RefCell::new(Bench::new(Box::new(Rng::default()), Box::new(Nobody))));
    BENCH.with_borrow_mut(|bench| bench.run(data));
}

/// Programs of the host that connect to the guest.
struct Programs {
    path: PathBuf,
    streams: Vec<UnixStream>,
    _folder: tempfile::TempDir,
}

impl Host for Programs {
    fn rest(&mut self) {
        self.streams.clear();
    }

    fn act(&mut self, what: u8, bytes: &[u8]) {
        let count = self.streams.len();
        match (what % 4, self.streams.last_mut()) {
            (0, _) if count < 8 => {
                if let Ok(mut stream) = UnixStream::connect(&self.path) {
                    let _ = stream.set_nonblocking(true);
                    let _ = stream.write(bytes);
                    self.streams.push(stream);
                }
            }
            (1, Some(stream)) => drop(stream.write(bytes)),
            (2, Some(stream)) => drop(stream.read(&mut [0; 4096])),
            (3, Some(_)) => drop(self.streams.pop()),
            _ => {}
        }
    }
}

/// Sockets.
pub fn vsock(data: &[u8]) {
    thread_local!(static BENCH: RefCell<Bench> = {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("vsock");
        let device = Vsock::new(&path, 3).expect("a socket");
        RefCell::new(Bench::new(Box::new(device), Box::new(Programs { path, streams: Vec::new(), _folder: folder })))
    });
    BENCH.with_borrow_mut(|bench| bench.run(data));
}

/// A disk of 64 KiB.
pub fn blk(data: &[u8]) {
    const SIZE: u64 = 64 << 10;
    thread_local!(static BENCH: (tempfile::NamedTempFile, RefCell<Bench>) = {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(SIZE).expect("room for a file");
        let device = Blk::new(file.path(), false, "disk0").expect("a disk");
        (file, RefCell::new(Bench::new(Box::new(device), Box::new(Nobody))))
    });
    BENCH.with(|(file, bench)| {
        bench.borrow_mut().run(data);
        assert_eq!(file.as_file().metadata().expect("a file").len(), SIZE, "the disk's size changed");
    });
}

/// A directory that starts with the same few files every now and then.
struct Directory {
    folder: tempfile::TempDir,
    runs: u32,
}

impl Directory {
    /// Inputs after which what the guest made goes away.
    const LIFE: u32 = 200;
}

impl Host for Directory {
    fn rest(&mut self) {
        self.runs += 1;
        if self.runs % Self::LIFE == 1 {
            let root = self.folder.path();
            for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
                let _ = std::fs::remove_dir_all(entry.path()).or_else(|_| std::fs::remove_file(entry.path()));
            }
            let _ = std::fs::create_dir(root.join("d"));
            let _ = std::fs::write(root.join("f"), "content");
            let _ = std::os::unix::fs::symlink("/etc/passwd", root.join("l"));
        }
    }

    fn act(&mut self, what: u8, bytes: &[u8]) {
        let path = self.folder.path().join("f");
        let _ = if what & 1 == 0 { std::fs::write(path, bytes) } else { std::fs::remove_file(path) };
    }
}

/// Files.
pub fn fs(data: &[u8]) {
    thread_local!(static BENCH: RefCell<Bench> = {
        let folder = tempfile::tempdir().expect("a directory");
        let device = Fs::new("coffer", folder.path()).expect("a share");
        RefCell::new(Bench::new(Box::new(device), Box::new(Directory { folder, runs: 0 })))
    });
    BENCH.with_borrow_mut(|bench| bench.run(data));
}

/// The network at the other end of a tap.
struct Network(UnixDatagram);

impl Host for Network {
    fn rest(&mut self) {
        while self.0.recv(&mut [0; 64]).is_ok() {}
    }

    fn act(&mut self, what: u8, bytes: &[u8]) {
        if what & 1 == 0 {
            let _ = self.0.send(bytes);
        } else {
            let _ = self.0.send(&bytes.repeat(200));
        }
    }
}

/// Packets.
pub fn net(data: &[u8]) {
    thread_local!(static BENCH: RefCell<Bench> = {
        let (outside, inside) = UnixDatagram::pair().expect("sockets");
        outside.set_nonblocking(true).expect("a socket that does not block");
        let device = Net::on_socket(OwnedFd::from(inside), [2, 0, 0, 0, 0, 1]);
        RefCell::new(Bench::new(Box::new(device), Box::new(Network(outside))))
    });
    BENCH.with_borrow_mut(|bench| bench.run(data));
}

/// A host that asks for more and less memory, and now and then has none.
struct Owner {
    handle: Handle,
    memory: Arc<Ram>,
    account: Arc<Mutex<Account>>,
}

/// Which blocks the guest can reach.
#[derive(Default)]
struct Account {
    blocks: BTreeSet<u64>,
    fails: bool,
}

struct Ledger(Arc<Mutex<Account>>);

impl Backing for Ledger {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut account = self.0.lock().expect("an account");
        if account.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        blocks.for_each(|block| assert!(account.blocks.insert(block), "block {block} is plugged twice"));
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut account = self.0.lock().expect("an account");
        if account.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        blocks.for_each(|block| assert!(account.blocks.remove(&block), "block {block} was not plugged"));
        Ok(())
    }
}

impl Host for Owner {
    fn act(&mut self, what: u8, bytes: &[u8]) {
        let number = |at: usize| u64::from(bytes.get(at).copied().unwrap_or(0)) % 20;
        self.account.lock().expect("an account").fails = what & 1 != 0;
        let most = self.handle.sizes().plugged.max(number(0) * BLOCK);
        self.handle.request(number(0) * BLOCK, number(1) * BLOCK);
        let account = self.account.lock().expect("an account");
        let sizes = self.handle.sizes();
        assert!(sizes.plugged <= most && sizes.plugged == account.blocks.len() as u64 * BLOCK);
        for block in 0..REGION {
            let reached = self.memory.read_obj::<u8>(GuestAddress(REGION_START + block * BLOCK)).is_ok();
            assert_eq!(reached, account.blocks.contains(&block), "block {block}");
        }
    }
}

/// Blocks of the region, and where it lies.
const REGION: u64 = 16;
const REGION_START: u64 = 4 << 30;

/// Memory that comes and goes. Blocks outlive a device's reset: each input has a device of its own.
pub fn mem(data: &[u8]) {
    let memory = memory();
    memory.add(REGION_START, REGION * BLOCK).expect("a region");
    let account = Arc::new(Mutex::new(Account::default()));
    let (device, handle) = Mem::new(&memory, Box::new(Ledger(Arc::clone(&account)))).expect("a device");
    let owner = Owner { handle, memory: Arc::clone(&memory), account };
    Bench::with(memory, Box::new(device), Box::new(owner)).run(data);
}
