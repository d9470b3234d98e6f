//! A launch's host on hardware: KVM, with each page of RAM in a guest_memfd and in a shared mapping.
//!
//! Owns: the VM's memory slots, the launch's commands as system calls, discarding either backing. Does not own: their order
//! ([`super::launch`]), which conversions are done ([`super::conversion`]). **No SEV-SNP hardware has run this yet.**

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use coffer_layout::{PAGE, snp::SHARED_BASE};
use kvm_bindings::{kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, MemoryRegionAddress};

use super::{
    abi::{
        self, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd,
        kvm_memory_attributes, kvm_sev_cmd, kvm_userspace_memory_region2,
    },
    conversion::Backing,
    launch::{Command, Failure, Host},
};
use crate::memory::Ram;

/// A VM's memory on hardware. Both backings go through these functions, so that they may one day be the same file.
pub struct Memory {
    /// The shared view of RAM, and the shared window.
    pub shared: Arc<Ram>,
    private: File,
    /// RAM, `(first address, bytes)`; the guest_memfd has the ranges one behind the other.
    ram: Vec<(u64, u64)>,
}

/// A step of making memory failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct MemoryError {
    step: &'static str,
    source: io::Error,
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> MemoryError {
    move |e| MemoryError { step, source: e.into() }
}

fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Memory {
    /// Makes both backings and gives them to KVM.
    ///
    /// # Errors
    /// [`MemoryError`], naming KVM's command.
    pub fn new(vm: &VmFd, ram: &[(u64, u64)], window: u64) -> Result<Self, MemoryError> {
        let other = |e: vm_memory::mmap::FromRangesError| io::Error::other(e.to_string());
        let mut ranges = ram.to_vec();
        ranges.push((SHARED_BASE, window));
        ranges.sort_unstable();
        let places: Vec<_> = ranges.iter().map(|(gpa, size)| (GuestAddress(*gpa), *size as usize)).collect();
        let shared = Ram::from_ranges(&places).map_err(other).map_err(at("reserve shared memory"))?;
        let size = ram.iter().map(|(_, size)| size).sum();
        let private = vm
            .create_guest_memfd(kvm_create_guest_memfd { size, ..Default::default() })
            .map_err(errno)
            .map_err(at("KVM_CREATE_GUEST_MEMFD"))?;
        // SAFETY: KVM returned a new descriptor that nobody else has.
        let private = File::from(unsafe { OwnedFd::from_raw_fd(private) });
        let memory = Self { shared: Arc::new(shared), private, ram: ram.to_vec() };
        for (slot, (gpa, size)) in ranges.into_iter().enumerate() {
            let address = memory.host_address(gpa, size).ok_or_else(|| io::Error::other("not there"));
            let address = address.map_err(at("reserve shared memory"))?;
            match memory.offset(gpa, size) {
                Some(offset) => {
                    let region = memory.slot(slot as u32, (gpa, size), address, offset);
                    // SAFETY: the mapping and the file live as long as the VM, and no two slots overlap.
                    unsafe { vm.set_user_memory_region2(region) }
                        .map_err(errno)
                        .map_err(at("KVM_SET_USER_MEMORY_REGION2"))?;
                }
                None => {
                    let region = kvm_userspace_memory_region {
                        slot: slot as u32,
                        guest_phys_addr: gpa,
                        memory_size: size,
                        userspace_addr: address,
                        flags: 0,
                    };
                    // SAFETY: as above.
                    unsafe { vm.set_user_memory_region(region) }
                        .map_err(errno)
                        .map_err(at("KVM_SET_USER_MEMORY_REGION"))?;
                }
            }
        }
        Ok(memory)
    }

    fn slot(
        &self,
        slot: u32,
        (gpa, size): (u64, u64),
        address: u64,
        offset: u64,
    ) -> kvm_userspace_memory_region2 {
        kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: address,
            guest_memfd_offset: offset,
            guest_memfd: self.private.as_raw_fd() as u32,
            ..Default::default()
        }
    }

    /// Where RAM lies in the guest_memfd; `None` for what is not in one range of it.
    fn offset(&self, gpa: u64, size: u64) -> Option<u64> {
        offset(&self.ram, gpa, size)
    }

    fn host_address(&self, gpa: u64, size: u64) -> Option<u64> {
        let region = self.shared.find_region(GuestAddress(gpa))?;
        let within = gpa - region.start_addr().0;
        within.checked_add(size).filter(|end| *end <= region.len())?;
        region.get_host_address(MemoryRegionAddress(within)).ok().map(|address| address as u64)
    }

    fn discard_shared(&self, gpa: u64, size: u64) -> io::Result<()> {
        let address = self.host_address(gpa, size).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range lies in the shared mapping, to which nobody holds references.
        let done = unsafe { libc::madvise(address as *mut libc::c_void, size as usize, libc::MADV_DONTNEED) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn discard_private(&self, gpa: u64, size: u64) -> io::Result<()> {
        let offset = self.offset(gpa, size).ok_or(io::ErrorKind::InvalidInput)?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory of this process is passed.
        let done = unsafe { libc::fallocate(self.private.as_raw_fd(), mode, offset as i64, size as i64) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn offset(ram: &[(u64, u64)], gpa: u64, size: u64) -> Option<u64> {
    let mut before = 0;
    for (start, length) in ram {
        let within =
            gpa.checked_sub(*start).filter(|at| at.checked_add(size).is_some_and(|end| end <= *length));
        if let Some(within) = within {
            return Some(before + within);
        }
        before += length;
    }
    None
}

/// The VM with its memory.
pub struct Kvm<'a> {
    /// The VM, of type SNP.
    pub vm: &'a VmFd,
    /// /dev/sev.
    pub sev: &'a File,
    /// Memory; none before INIT2, which needs none.
    pub memory: Option<&'a Memory>,
}

/// Opens /dev/sev.
///
/// # Errors
/// The system's.
pub fn open_sev() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/sev")
}

/// Lets page state changes come to this process: without it each of them fails.
///
/// # Errors
/// KVM's.
pub fn enable_conversions(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut cap = kvm_enable_cap { cap: Cap::ExitHypercall as u32, ..Default::default() };
    cap.args[0] = 1 << abi::HC_MAP_GPA_RANGE;
    vm.enable_cap(&cap)
}

impl Kvm<'_> {
    /// Gives a command to the firmware. `data` is the command's structure, or 0.
    fn command(&self, id: u32, data: u64) -> Result<(), Failure> {
        let mut command = kvm_sev_cmd { id, data, sev_fd: self.sev.as_raw_fd() as u32, ..Default::default() };
        self.vm.encrypt_op_sev(&mut command).map_err(|e| Failure { errno: e.errno(), status: command.error })
    }

    /// Lets extended guest requests come to this process, for their certificates. Linux 7.0.
    ///
    /// # Errors
    /// The system call's error.
    pub fn enable_certificates(&self) -> Result<(), Failure> {
        self.command(abi::SNP_ENABLE_REQ_CERTS, 0)
    }
}

impl Host for Kvm<'_> {
    fn encrypt(&mut self, command: &mut Command<'_>) -> Result<(), Failure> {
        let id = command.id();
        let data = match command {
            Command::Init(data) => (&raw mut **data) as u64,
            Command::Start(data) => (&raw mut **data) as u64,
            Command::Update(data) => (&raw mut **data) as u64,
            Command::Finish(data) => (&raw mut **data) as u64,
        };
        self.command(id, data)
    }

    fn set_attributes(&mut self, attributes: &kvm_memory_attributes) -> Result<(), i32> {
        self.vm.set_memory_attributes(*attributes).map_err(|e| e.errno())
    }

    fn address(&self, gpa: u64, size: u64) -> Option<u64> {
        self.memory?.host_address(gpa, size)
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        self.memory.is_some_and(|m| m.shared.write_slice(bytes, GuestAddress(gpa)).is_ok())
    }

    fn page(&self, gpa: u64) -> Option<[u8; PAGE as usize]> {
        let mut page = [0; PAGE as usize];
        self.memory?.shared.read_slice(&mut page, GuestAddress(gpa)).ok()?;
        Some(page)
    }

    fn discard(&mut self, gpa: u64, size: u64) {
        if let Some(memory) = self.memory {
            // Kept, they cost memory and nothing else.
            let _ = memory.discard_shared(gpa, size);
        }
    }
}

/// Memory and VM of a guest that runs.
pub struct Converter {
    /// A second descriptor of the VM would do; this is the VM itself.
    pub vm: Arc<VmFd>,
    /// Memory.
    pub memory: Memory,
}

impl Backing for Converter {
    fn set_private(&self, address: u64, size: u64, private: bool) -> io::Result<()> {
        let attributes = if private { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 };
        let attributes = kvm_memory_attributes { address, size, attributes, flags: 0 };
        self.vm.set_memory_attributes(attributes).map_err(errno)
    }

    fn discard(&self, gpa: u64, size: u64, private: bool) -> io::Result<()> {
        if private { self.memory.discard_private(gpa, size) } else { self.memory.discard_shared(gpa, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ram_lie_behind_each_other_in_the_file() {
        let ram = [(0, 0xc000_0000), (0x1_0000_0000, 0x4000_0000)];
        assert_eq!(offset(&ram, 0x1000, 0x1000), Some(0x1000));
        assert_eq!(offset(&ram, 0x1_0000_2000, 0x1000), Some(0xc000_2000));
        for (gpa, size) in [(0xc000_0000, 0x1000), (0xbfff_f000, 0x2000), (0x1_4000_0000, 1), (u64::MAX, 2)] {
            assert_eq!(offset(&ram, gpa, size), None, "{gpa:#x}");
        }
    }
}
