//! A small FUSE client: builds requests as Linux does, sends them through the device's queue, takes the answers apart.

use std::{ffi::CString, fs, os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CreateIn, EntryOut, InHeader, InitIn, InitOut, Opcode, OpenIn, OpenOut, OutHeader, ReadIn,
    SetattrIn, WriteIn, WriteOut,
};
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::devices::virtio::{
    VirtioDevice,
    fs::Fs,
    test_driver::{BUFFERS, Driver},
};

pub(super) const ROOT: u64 = 1;
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
const ANSWER: u64 = BUFFERS + (4 << 20);
const ANSWER_SIZE: u32 = (1 << 20) + 4096;

/// The device, its driver and the shared directory.
pub(super) struct Client {
    pub(super) share: Arc<TempDir>,
    device: Fs,
    driver: Option<Driver>,
    unique: u64,
    pub(super) user: (u32, u32),
}

/// An errno, or the bytes after the header.
pub(super) type Answer = Result<Vec<u8>, i32>;

impl Client {
    /// A mounted share: INIT is done.
    pub(super) fn new() -> Self {
        let mut client = Self::unmounted();
        client.init();
        client
    }

    pub(super) fn unmounted() -> Self {
        Self::of(Arc::new(TempDir::new().unwrap()))
    }

    /// Another pod that has the same directory, mounted.
    pub(super) fn beside(&self) -> Self {
        let mut client = Self::of(Arc::clone(&self.share));
        client.init();
        client
    }

    fn of(share: Arc<TempDir>) -> Self {
        let mut device = Fs::new("share", share.path()).unwrap();
        let features = device.features();
        let driver = Driver::new(&mut device, features);
        Self { share, device, driver: Some(driver), unique: 0, user: (0, 0) }
    }

    pub(super) fn driver(&mut self) -> &mut Driver {
        self.driver.as_mut().unwrap()
    }

    /// Resets the device and starts it anew, as a rebooting guest does.
    pub(super) fn restart(&mut self) {
        self.driver.take().unwrap().stop(&mut self.device);
        let features = self.device.features();
        self.driver = Some(Driver::new(&mut self.device, features));
    }

    pub(super) fn init(&mut self) -> InitOut {
        // Everything that Linux 6.12 offers, old and new flag words.
        let init = InitIn { major: 7, minor: 41, max_readahead: 0x20000, flags: 0xffff_ffff };
        let mut body = init.as_slice().to_vec();
        body.extend_from_slice(&[0xff; 48]);
        object(&self.call(Opcode::Init, 0, &body).unwrap())
    }

    /// Sends the raw bytes of a request and returns the raw bytes of the answer.
    pub(super) fn send(&mut self, queue: usize, request: &[u8], answer: u32) -> Vec<u8> {
        let driver = self.driver();
        driver.write(BUFFERS, request);
        driver.write(ANSWER, &[0xee; 64]);
        // As Linux does: the header apart from the rest.
        let split = request.len().min(size_of::<InHeader>()) as u32;
        let mut readable = vec![(BUFFERS, split)];
        if request.len() as u32 > split {
            readable.push((BUFFERS + u64::from(split), request.len() as u32 - split));
        }
        let writable: &[(u64, u32)] =
            if answer > 16 { &[(ANSWER, 16), (ANSWER + 16, answer - 16)] } else { &[(ANSWER, answer)] };
        driver.chain(queue, 0, &readable, if answer == 0 { &[] } else { writable });
        driver.offer(queue, 0);
        let (_, written) = driver.wait_used(queue);
        assert!(written <= answer, "the device claims more than the chain holds");
        driver.read(ANSWER, written as usize)
    }

    /// Sends requests that all are there before the first is answered, each with room for a header and a little; waits for all.
    pub(super) fn send_together(&mut self, requests: &[Vec<u8>]) {
        const STRIDE: u64 = 0x10000;
        let driver = self.driver();
        for (request, at) in requests.iter().zip(0u16..) {
            let (from, to) = (BUFFERS + u64::from(at) * STRIDE, ANSWER + u64::from(at) * STRIDE);
            driver.write(from, request);
            driver.chain(REQUESTS, 2 * at, &[(from, request.len() as u32)], &[(to, 256)]);
            driver.put_available(REQUESTS, 2 * at);
        }
        driver.publish(REQUESTS);
        for _ in requests {
            driver.wait_used(REQUESTS);
        }
    }

    pub(super) fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.user.0,
            gid: self.user.1,
            pid: 7,
            padding: 0,
        };
        [header.as_slice(), body].concat()
    }

    pub(super) fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Answer {
        let request = self.request(opcode as u32, node, body);
        let answer = self.send(REQUESTS, &request, ANSWER_SIZE);
        let header: OutHeader = object(&answer);
        assert_eq!(header.unique, self.unique);
        assert_eq!(header.len as usize, answer.len());
        if header.error == 0 { Ok(answer[size_of::<OutHeader>()..].to_vec()) } else { Err(-header.error) }
    }

    pub(super) fn forget(&mut self, node: u64, count: u64) {
        let request = self.request(Opcode::Forget as u32, node, &count.to_le_bytes());
        assert!(self.send(HIPRIO, &request, 0).is_empty());
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.call(Opcode::Lookup, parent, &c(name)).map(|body| object(&body))
    }

    /// Looks up each component of a path below the root.
    pub(super) fn walk(&mut self, path: &str) -> Result<EntryOut, i32> {
        let mut node = ROOT;
        let mut entry = Err(libc::ENOENT);
        for name in path.split('/') {
            entry = self.lookup(node, name);
            node = entry.as_ref().map_err(|errno| *errno)?.nodeid;
        }
        entry
    }

    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(EntryOut, u64), i32> {
        let create = CreateIn { flags: flags as u32, mode: mode | libc::S_IFREG, umask: 0, fuse_flags: 0 };
        let body = self.call(Opcode::Create, parent, &[create.as_slice(), &c(name)].concat())?;
        let open: OpenOut = object(&body[size_of::<EntryOut>()..]);
        Ok((object(&body), open.fh))
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let open = OpenIn { flags: flags as u32, fuse_flags: 0 };
        self.call(Opcode::Open, node, open.as_slice()).map(|body| object::<OpenOut>(&body).fh)
    }

    pub(super) fn write(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
    ) -> Result<u32, i32> {
        self.write_with(node, WriteIn { fh, offset, flags: flags as u32, ..WriteIn::default() }, data)
    }

    pub(super) fn write_with(&mut self, node: u64, mut header: WriteIn, data: &[u8]) -> Result<u32, i32> {
        header.size = data.len() as u32;
        let body = self.call(Opcode::Write, node, &[header.as_slice(), data].concat())?;
        Ok(object::<WriteOut>(&body).size)
    }

    pub(super) fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Answer {
        let read = ReadIn { fh, offset, size, flags: libc::O_RDWR as u32, ..ReadIn::default() };
        self.call(Opcode::Read, node, read.as_slice())
    }

    pub(super) fn attributes(&mut self, node: u64) -> Attr {
        let body = self.call(Opcode::Getattr, node, &[0; 16]).unwrap();
        object::<AttrOut>(&body).attr
    }

    pub(super) fn set_attributes(&mut self, node: u64, set: SetattrIn) -> Answer {
        self.call(Opcode::Setattr, node, set.as_slice())
    }

    pub(super) fn host(&self, path: &str) -> std::path::PathBuf {
        self.share.path().join(path)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.stop(&mut self.device);
        }
    }
}

/// Bytes with a NUL at the end.
pub(super) fn c(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

pub(super) fn object<T: ByteValued>(bytes: &[u8]) -> T {
    let mut object = T::zeroed();
    object.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    object
}

/// Sets an attribute on the host; `None` if the file system there has none.
pub(super) fn host_attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let name = CString::new(name).unwrap();
    let mut value = vec![0; 256];
    let size =
        // SAFETY: both names end in NUL and `value` has the length given.
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(size).ok()?);
    Some(value)
}

pub(super) fn write_host(path: &Path, data: &str) {
    fs::write(path, data).unwrap();
}
