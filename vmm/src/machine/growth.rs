//! Memory that comes to a machine while it runs, and goes: what a host may ask for, and how the guest gets to it.
//!
//! Owns: where the region lies and how large it is, when it is made, KVM's slots for it. Does not own: which blocks the guest plugs
//! (`devices::virtio::mem`), what a pod needs.
//!
//! A machine has nothing of this until the first host asks: no region, no device, no thread, no exit. Then the device appears in
//! a slot that was empty when the guest looked at boot, and the guest is told over vsock to look again.

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use coffer_layout::{HIGH_RAM, slot};
use coffer_protocol::vm::{SizeAnswer, VmSize};
use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemory, GuestMemoryRegion, MemoryRegionAddress};

use super::attach;
use crate::{
    args::{Args, Tee},
    devices::{
        board::Slot,
        virtio::mem::{Backing, Handle, Mem},
    },
    memory::{BLOCK, Ram},
};

/// A multiple of the blocks by which any Linux adds memory; region and start are multiples of it.
const ALIGNMENT: u64 = 2 << 30;
/// Linux adds memory by this much where it can; the guest may choose blocks of whole such pieces. KVM has a slot for each piece
/// that has a plugged block.
const PIECE: u64 = 128 << 20;
const PIECE_BLOCKS: u64 = PIECE / BLOCK;
/// Largest region: 8192 pieces, where KVM has slots for 32764.
const MOST: u64 = 1 << 40;
/// First of KVM's slots that are the region's.
const FIRST_SLOT: u32 = 16;
/// CPUID leaf whose EAX has the number of physical address bits in its low byte.
const ADDRESS_SIZES: u32 = 0x8000_0008;

/// Where a region lies: `(first address, bytes)`, above RAM that ends at `end` with a gap between, for a guest with this many address
/// bits on a host with `host` bytes of RAM. `None` when there is no room.
fn place(end: u64, bits: u32, host: u64) -> Option<(u64, u64)> {
    let start = end.max(HIGH_RAM - 1).checked_add(1)?.checked_next_multiple_of(ALIGNMENT)?;
    let room = 1u64.checked_shl(bits)?.checked_sub(start)? / ALIGNMENT * ALIGNMENT;
    let size = host.checked_next_multiple_of(ALIGNMENT)?.min(room).min(MOST);
    (size > 0).then_some((start, size))
}

/// What a host can change of a machine that runs.
pub(super) struct Growth {
    vm: Arc<VmFd>,
    memory: Arc<Ram>,
    slot: Slot,
    boot_mib: u64,
    vcpus: u32,
    boot_vcpus: u32,
    bits: u32,
    refusal: Option<&'static str>,
    device: Mutex<Option<Handle>>,
}

impl Growth {
    pub(super) fn new(args: &Args, vm: &Arc<VmFd>, memory: &Arc<Ram>, cpuid: &CpuId, slot: &Slot) -> Self {
        let leaf = cpuid.as_slice().iter().find(|entry| entry.function == ADDRESS_SIZES);
        Self {
            vm: Arc::clone(vm),
            memory: Arc::clone(memory),
            slot: Arc::clone(slot),
            boot_mib: args.memory_mib,
            vcpus: args.vcpus,
            boot_vcpus: args.boot_vcpus.unwrap_or(args.vcpus),
            bits: leaf.map_or(36, |entry| entry.eax & 0xff),
            refusal: refusal(args),
            device: Mutex::new(None),
        }
    }

    /// Answers a host: how large the machine is, after it was told to be `wanted` MiB larger than at boot.
    pub(super) fn answer(&self, wanted: Option<u32>) -> SizeAnswer {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mib) = wanted
            && let Err(words) = self.want(&mut device, u64::from(mib))
        {
            return SizeAnswer::Refused(words);
        }
        let place = place(self.end(), self.bits, host_memory()).filter(|_| self.refusal.is_none());
        let most = place.map_or(0, |(_, size)| size);
        let sizes = device.as_ref().map(Handle::sizes).unwrap_or_default();
        SizeAnswer::Size(VmSize {
            boot_mib: self.boot_mib,
            wanted_mib: sizes.requested >> 20,
            plugged_mib: sizes.plugged >> 20,
            most_mib: if device.is_some() { sizes.region >> 20 } else { most >> 20 },
            vcpus: self.vcpus,
            boot_vcpus: self.boot_vcpus,
        })
    }

    /// End of RAM that is there from the start.
    fn end(&self) -> u64 {
        let fixed = self.memory.iter().filter(|region| region.plugged().is_none());
        fixed.map(|region| region.last_addr().0 + 1).max().unwrap_or_default()
    }

    fn want(&self, device: &mut Option<Handle>, mib: u64) -> Result<(), String> {
        if let Some(words) = self.refusal {
            return Err(words.into());
        }
        let bytes = (mib << 20).next_multiple_of(BLOCK);
        let handle = match device {
            Some(handle) => handle,
            None if mib == 0 => return Ok(()),
            None => device.insert(self.make(bytes)?),
        };
        let most = handle.sizes().region;
        if bytes > most {
            return Err(too_much(mib, most));
        }
        handle.request(bytes, bytes.next_multiple_of(PIECE));
        Ok(())
    }

    /// Makes region and device. The guest does not know of them yet.
    fn make(&self, bytes: u64) -> Result<Handle, String> {
        let (start, size) = place(self.end(), self.bits, host_memory())
            .ok_or("the guest's processors have no addresses left for more memory")?;
        if bytes > size {
            return Err(too_much(bytes >> 20, size));
        }
        // One that was added when a later step failed is still there.
        let region = match self.memory.added() {
            Some(region) => region,
            None => {
                let added = self.memory.add(start, size);
                added.map_err(|e| format!("reserve {} MiB of addresses: {e}", size >> 20))?
            }
        };
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|e| e.to_string())?;
        let pieces = vec![0; region.len().div_ceil(PIECE) as usize];
        let slots = Pieces { vm: Arc::clone(&self.vm), guest: start, host: host as u64, pieces };
        let (device, handle) = Mem::new(&self.memory, Box::new(slots)).ok_or("no region was added")?;
        let window = attach(slot::MEMORY, Box::new(device), &self.vm, &self.memory, Tee::None);
        let window = window.map_err(|e| e.to_string())?;
        self.slot.set(Mutex::new(window)).map_err(|_| "the memory device's place is taken")?;
        Ok(handle)
    }
}

/// Why a machine's memory stays as it is.
fn refusal(args: &Args) -> Option<&'static str> {
    if args.tee != Tee::None {
        Some("the memory of a guest in a TEE is validated when it boots, none can come later")
    } else if args.make_template.is_some() {
        Some("it is saved as a template")
    } else if args.disks.len() > slot::MEMORY - slot::BLK {
        Some("its fourth disk has the place of the device for it")
    } else {
        None
    }
}

fn too_much(mib: u64, most: u64) -> String {
    format!("{mib} MiB more than at boot: at most {} MiB can come, what this host has", most >> 20)
}

/// Bytes of RAM that this host has.
fn host_memory() -> u64 {
    // SAFETY: sysinfo is plain data for which zero is valid.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: it is valid for writes.
    unsafe { libc::sysinfo(&raw mut info) };
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// KVM's slots for the region, one for each piece with a plugged block. What has no slot the guest cannot touch; a piece that has one
/// bounds what it can touch of what it unplugged.
struct Pieces {
    vm: Arc<VmFd>,
    guest: u64,
    host: u64,
    /// Plugged blocks of each.
    pieces: Vec<u64>,
}

impl Pieces {
    /// Which pieces these blocks are in, and how many of them in each.
    fn of(blocks: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
        let Range { start, end } = *blocks;
        (start / PIECE_BLOCKS..end.div_ceil(PIECE_BLOCKS)).map(move |piece| {
            let (first, last) = (piece * PIECE_BLOCKS, (piece + 1) * PIECE_BLOCKS);
            (piece as usize, end.min(last) - start.max(first))
        })
    }

    fn set_slot(&self, piece: usize, there: bool) -> io::Result<()> {
        let offset = piece as u64 * PIECE;
        let region = kvm_userspace_memory_region {
            slot: FIRST_SLOT + piece as u32,
            guest_phys_addr: self.guest + offset,
            memory_size: if there { PIECE } else { 0 },
            userspace_addr: self.host + offset,
            flags: 0,
        };
        // SAFETY: the range is a part of a mapping that lives as long as the machine, and no two overlap.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

impl Backing for Pieces {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let new: Vec<usize> =
            Self::of(&blocks).map(|(piece, _)| piece).filter(|p| self.pieces[*p] == 0).collect();
        for (done, piece) in new.iter().enumerate() {
            if let Err(error) = self.set_slot(*piece, true) {
                for piece in &new[..done] {
                    let _ = self.set_slot(*piece, false);
                }
                return Err(error);
            }
        }
        Self::of(&blocks).for_each(|(piece, count)| self.pieces[piece] += count);
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let (address, size) = (self.host + blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
        // SAFETY: the range is a part of the region's mapping, of which no block is plugged: nobody relies on what is in it.
        if unsafe { libc::madvise(address as *mut libc::c_void, size as usize, libc::MADV_DONTNEED) } < 0 {
            return Err(io::Error::last_os_error());
        }
        for (piece, count) in Self::of(&blocks) {
            self.pieces[piece] -= count;
            if self.pieces[piece] == 0 {
                // A slot that stays lets the guest touch no more than before.
                let _ = self.set_slot(piece, false);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_region_lies_above_ram_and_4_gib_with_a_gap() {
        assert_eq!(place(512 << 20, 40, 24 * GIB), Some((4 * GIB, 24 * GIB)));
        assert_eq!(place(3 * GIB, 40, 23 * GIB + 1), Some((4 * GIB, 24 * GIB)));
        assert_eq!(place(5 * GIB, 40, 24 * GIB), Some((6 * GIB, 24 * GIB)));
        // RAM ends where a region could begin: buffers of the guest's must not run from one into the other.
        assert_eq!(place(6 * GIB, 40, 24 * GIB), Some((8 * GIB, 24 * GIB)));
        assert_eq!(place(512 << 20, 36, 1 << 50), Some((4 * GIB, 60 * GIB)));
        assert_eq!(place(512 << 20, 52, 1 << 50), Some((4 * GIB, MOST)));
        assert_eq!(place(62 * GIB, 36, GIB), None);
        assert_eq!(place(u64::MAX, 64, u64::MAX), None);
    }

    #[test]
    fn machines_whose_memory_stays_say_why() {
        let words = |args: Args| refusal(&args).unwrap_or_default();
        assert_eq!(words(Args::default()), "");
        for tee in [Tee::Snp, Tee::SnpEmulated] {
            assert!(words(Args { tee, ..Args::default() }).contains("TEE"));
        }
        assert!(words(Args { make_template: Some("/t".into()), ..Args::default() }).contains("template"));
        assert_eq!(words(Args { template: Some("/t".into()), ..Args::default() }), "");
        let disk = crate::args::DiskArgs { path: "/d".into(), read_only: false };
        assert_eq!(words(Args { disks: vec![disk.clone(); 3], ..Args::default() }), "");
        assert!(words(Args { disks: vec![disk; 4], ..Args::default() }).contains("fourth disk"));
    }

    proptest! {
        #[test]
        fn every_block_is_in_one_piece(start in 0u64..1000, count in 1u64..1000) {
            let mut wanted = BTreeMap::new();
            for block in start..start + count {
                *wanted.entry((block / 64) as usize).or_insert(0) += 1;
            }
            prop_assert_eq!(Pieces::of(&(start..start + count)).collect::<BTreeMap<_, _>>(), wanted);
        }
    }
}
