//! Guest RAM in a file, and mapped from it: copy on write, page by page.
//!
//! Owns: which parts of RAM are in the file (extents), their check. A byte's place in the file is its place in RAM without the
//! hole below 4 GiB. What was zero is not mapped: it stays anonymous memory, which costs nothing until it is touched and may
//! have huge pages.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use coffer_layout::PAGE;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::memory::{Ram, layout};

/// RAM that is looked at in one piece.
const CHUNK: usize = 1 << 20;
/// Zero bytes between two extents that are mapped along: each extent costs a mapping of the process.
const GAP: u64 = 128 << 10;
/// Most extents; Linux gives a process 65530 mappings.
const MOST: usize = 8192;

/// A part of RAM that lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Guest physical address, of a page.
    pub gpa: u64,
    /// Bytes, whole pages.
    pub size: u64,
}

/// Writes what is not zero, and makes the file as long as RAM. The guest does not run.
///
/// # Errors
/// The system's.
pub fn write(memory: &Ram, file: &File) -> io::Result<Vec<Extent>> {
    let mut pages = Pages::default();
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    for region in memory.iter() {
        let mut at = 0;
        while at < region.len() {
            let size = (region.len() - at).min(CHUNK as u64);
            let chunk = &mut buffer[..size as usize];
            let gpa = region.start_addr().0 + at;
            memory.read_slice(chunk, GuestAddress(gpa)).map_err(io::Error::other)?;
            for (page, index) in chunk.chunks(PAGE as usize).zip(0..) {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(page, offset + at + index * PAGE)?;
                    pages.add(gpa + index * PAGE);
                }
            }
            at += size;
        }
        offset += region.len();
        pages.end();
    }
    file.set_len(offset)?;
    Ok(pages.extents)
}

/// Joins pages that come in order.
#[derive(Default)]
struct Pages {
    extents: Vec<Extent>,
    apart: bool,
}

impl Pages {
    fn add(&mut self, gpa: u64) {
        match self.extents.last_mut() {
            Some(last) if !self.apart && gpa - (last.gpa + last.size) <= GAP => {
                last.size = gpa + PAGE - last.gpa;
            }
            _ => self.extents.push(Extent { gpa, size: PAGE }),
        }
        self.apart = false;
    }

    /// Here a region ends: what follows is a mapping of its own.
    fn end(&mut self) {
        self.apart = true;
    }
}

/// Whether these can be mapped into RAM of this size.
pub(super) fn check(extents: &[Extent], mib: u64) -> Result<(), &'static str> {
    if extents.len() > MOST {
        return Err("its memory is in more pieces than a process can map");
    }
    let bytes = mib.checked_mul(1 << 20).ok_or("its memory is larger than any machine's")?;
    let mut end = 0;
    for extent in extents {
        let after = place(*extent, bytes).ok_or("its memory does not lie in the machine's")?.1;
        if extent.gpa < end {
            return Err("its memory is not in order");
        }
        end = after;
    }
    Ok(())
}

/// An extent's place in the file, and the address behind it. `None` when it is not RAM.
fn place(extent: Extent, bytes: u64) -> Option<(u64, u64)> {
    let end = extent.gpa.checked_add(extent.size)?;
    if !extent.gpa.is_multiple_of(PAGE) || !extent.size.is_multiple_of(PAGE) || extent.size == 0 {
        return None;
    }
    let mut offset = 0;
    for (start, length) in layout(bytes) {
        if extent.gpa >= start && end <= start + length {
            return Some((offset + extent.gpa - start, end));
        }
        offset += length;
    }
    None
}

/// Maps checked extents over RAM that nobody has touched. Writes stay this process's own.
///
/// # Errors
/// The system's.
pub fn map(memory: &Ram, extents: &[Extent], mib: u64, file: &File) -> io::Result<()> {
    for extent in extents {
        let (offset, _) = place(*extent, mib << 20).ok_or(io::ErrorKind::InvalidInput)?;
        let size = extent.size as usize;
        let slice = memory.get_slice(GuestAddress(extent.gpa), size).map_err(io::Error::other)?;
        let address = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the range is a part of this RAM's own mapping, as `get_slice` has checked, at whole pages; what is put in
        // its place is as long, readable and writable, and is unmapped with it. Nobody holds a reference into RAM.
        let mapped = unsafe {
            libc::mmap(
                address.cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    #[test]
    fn ram_comes_back_and_two_machines_do_not_share_what_they_write() {
        let ram = reserve(64).unwrap();
        let places = [0x1000u64, 0x2fff, 0x40_0000, (64 << 20) - 1];
        for place in places {
            ram.write_obj(7u8, GuestAddress(place)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let extents = write(&ram, &file).unwrap();
        let page = |gpa, size| Extent { gpa, size };
        assert_eq!(
            extents,
            [page(0x1000, 0x2000), page(0x40_0000, 0x1000), page((64 << 20) - 0x1000, 0x1000)]
        );
        assert_eq!(file.metadata().unwrap().len(), 64 << 20);
        check(&extents, 64).unwrap();
        let machines = [reserve(64).unwrap(), reserve(64).unwrap()];
        for machine in &machines {
            map(machine, &extents, 64, &file).unwrap();
        }
        for place in places {
            assert_eq!(machines[1].read_obj::<u8>(GuestAddress(place)).unwrap(), 7);
        }
        assert_eq!(machines[1].read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 0);
        machines[0].write_obj(9u8, GuestAddress(0x1000)).unwrap();
        assert_eq!(machines[1].read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 7);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x1000).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn extents_that_are_not_ram_are_refused() {
        let at = |gpa, size| check(&[Extent { gpa, size }], 4096);
        assert_eq!(at(0x1000, 0x1000), Ok(()));
        // The hole, its edge, and behind the end.
        for (gpa, size) in [
            (3 << 30, 0x1000),
            ((3 << 30) - 0x1000, 0x2000),
            (5 << 30, 0x1000),
            (0x1001, 0x1000),
            (0, 0),
            (0, 1),
            (u64::MAX - 0xfff, 0x1000),
        ] {
            assert!(at(gpa, size).is_err(), "{gpa:#x} {size:#x}");
        }
        let twice = [Extent { gpa: 0x1000, size: 0x2000 }, Extent { gpa: 0x2000, size: 0x1000 }];
        assert!(check(&twice, 64).is_err());
        assert!(check(&vec![twice[0]; MOST + 1], 64).is_err());
        assert!(check(&[], u64::MAX).is_err());
    }

    #[test]
    fn ram_above_the_hole_follows_at_once_in_the_file() {
        assert_eq!(place(Extent { gpa: 4 << 30, size: PAGE }, 4 << 30), Some((3 << 30, (4 << 30) + PAGE)));
    }
}
