//! Guest RAM twice: as the hypervisor shares it, and as the guest has it for itself at the C-bit's alias.
//!
//! Owns: both backings and what of them can be touched. A page is open in the view that its state allows and closed in the
//! other (`PROT_NONE`): a guest that takes the wrong view, or a page that it has not accepted, ends in KVM's EFAULT, a device
//! that reads a private page in a fault of this process. Nothing here is encrypted.

use std::{fs::File, io, os::fd::AsRawFd, ptr, sync::Arc};

use coffer_layout::{PAGE, snp::SHARED_BASE};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use crate::memory::Ram;

const LARGE: usize = 2 << 20;
/// RAM up to here lies in files, so that the same page can be shown in both views: see [`Views::lend`].
const LENDABLE: u64 = 1 << 20;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Without the C-bit; devices see it.
    Shared,
    /// With the C-bit.
    Private,
}

/// One range of memory in one view.
#[derive(Debug)]
struct Range {
    start: u64,
    size: u64,
    address: *mut u8,
}

/// A memory slot for KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest physical address, alias bit included.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Host address.
    pub address: u64,
}

/// All of RAM in both views, and the shared window.
#[derive(Debug)]
pub struct Views {
    shared: Vec<Range>,
    private: Vec<Range>,
    window: Range,
    low: [File; 2],
    devices: Arc<Ram>,
    c_bit: u32,
}

// SAFETY: the pointers are to mappings that live as long as the process and are only used through system calls and checked
// copies; concurrent access to guest memory is the guest's normal state.
unsafe impl Send for Views {}
// SAFETY: likewise.
unsafe impl Sync for Views {}

impl Views {
    /// Makes both views of RAM, closed, and the window's, open.
    ///
    /// # Errors
    /// The system's.
    pub fn new(ram: &[(u64, u64)], window: u64, c_bit: u32) -> io::Result<Self> {
        let low = [memory_file("coffer-shared")?, memory_file("coffer-private")?];
        let shared = ram.iter().map(|r| Range::new(*r, Some(&low[0]))).collect::<io::Result<Vec<_>>>()?;
        let private = ram.iter().map(|r| Range::new(*r, Some(&low[1]))).collect::<io::Result<Vec<_>>>()?;
        let window = Range::new((SHARED_BASE, window), None)?;
        let mut regions = Vec::new();
        for range in shared.iter().chain([&window]) {
            // SAFETY: the mapping is this range's and is never unmapped.
            let region = unsafe {
                MmapRegion::build_raw(
                    range.address,
                    range.size as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                )
            };
            let region = region.map_err(|e| io::Error::other(e.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(range.start));
            regions.push(region.ok_or_else(|| io::Error::other("RAM wraps around"))?);
        }
        regions.sort_by_key(vm_memory::GuestMemoryRegion::start_addr);
        let devices = Ram::from_regions(regions).map_err(|e| io::Error::other(e.to_string()))?;
        let views = Self { shared, private, window, low, devices: Arc::new(devices), c_bit };
        for range in views.private.iter().chain(&views.shared) {
            protect(range.address, range.size as usize, libc::PROT_NONE)?;
        }
        Ok(views)
    }

    /// Position of the C-bit.
    #[must_use]
    pub fn c_bit(&self) -> u32 {
        self.c_bit
    }

    /// What devices see: the shared view and the window.
    #[must_use]
    pub fn devices(&self) -> Arc<Ram> {
        Arc::clone(&self.devices)
    }

    /// Both views for KVM.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        let slot = |range: &Range, alias: u64| Slot {
            gpa: range.start | alias,
            size: range.size,
            address: range.address as u64,
        };
        let shared = self.shared.iter().chain([&self.window]).map(|r| slot(r, 0));
        shared.chain(self.private.iter().map(|r| slot(r, 1 << self.c_bit))).collect()
    }

    fn find(&self, view: View, gpa: u64, size: u64) -> Option<*mut u8> {
        let ranges = match view {
            View::Shared => &self.shared,
            View::Private => &self.private,
        };
        let window = (view == View::Shared).then_some(&self.window);
        ranges.iter().chain(window).find_map(|range| {
            let offset = gpa.checked_sub(range.start)?;
            let end = offset.checked_add(size)?;
            // SAFETY: the offset lies in the mapping.
            (end <= range.size).then(|| unsafe { range.address.add(offset as usize) })
        })
    }

    /// Host address of the shared view; `None` when it is not all there.
    #[must_use]
    pub fn address(&self, gpa: u64, size: u64) -> Option<u64> {
        self.find(View::Shared, gpa, size).map(|p| p as u64)
    }

    /// Opens pages in a view, or closes them.
    ///
    /// # Errors
    /// The system's; ENOMEM when the guest has made too many ranges.
    pub fn open(&self, view: View, gpa: u64, size: u64, open: bool) -> io::Result<()> {
        let address = self.find(view, gpa, size).ok_or_else(not_ram)?;
        let rights = if open { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        protect(address, size as usize, rights)
    }

    /// Forgets a view's contents: they do not survive a conversion.
    ///
    /// # Errors
    /// The system's.
    pub fn discard(&self, view: View, gpa: u64, size: u64) -> io::Result<()> {
        let address = self.find(view, gpa, size).ok_or_else(not_ram)?;
        for (page, length) in low_and_rest(gpa, size) {
            if page < LENDABLE {
                let file = &self.low[view as usize];
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: no memory of this process is passed.
                let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, page as i64, length as i64) };
                if done < 0 {
                    return Err(io::Error::last_os_error());
                }
                continue;
            }
            // SAFETY: the range lies in this view's mapping, to which nobody holds references.
            let done = unsafe {
                libc::madvise(address.add((page - gpa) as usize).cast(), length as usize, libc::MADV_DONTNEED)
            };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Shows a private page below 1 MiB in the shared view too, or takes it back. Hardware treats code without paging,
    /// instruction fetches and page table walks as private whatever the C-bit says; here they go where the address says, and
    /// a processor that starts in real mode starts below 1 MiB.
    ///
    /// # Errors
    /// The system's.
    pub fn lend(&self, page: u64, lent: bool) -> io::Result<()> {
        let gpa = page * PAGE;
        let address = self.find(View::Shared, gpa, PAGE).filter(|_| gpa < LENDABLE).ok_or_else(not_ram)?;
        let file = &self.low[if lent { View::Private } else { View::Shared } as usize];
        let rights = if lent { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        map(address, PAGE as usize, rights, file, gpa)
    }

    /// Copies out of a view. False when the range is not there.
    #[must_use]
    pub fn read(&self, view: View, gpa: u64, bytes: &mut [u8]) -> bool {
        let Some(from) = self.find(view, gpa, bytes.len() as u64) else { return false };
        // SAFETY: both ranges are valid, and guest memory is never borrowed; the caller opened the pages.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        true
    }

    /// Copies into a view. False when the range is not there.
    #[must_use]
    pub fn write(&self, view: View, gpa: u64, bytes: &[u8]) -> bool {
        let Some(to) = self.find(view, gpa, bytes.len() as u64) else { return false };
        // SAFETY: both ranges are valid, and guest memory is never borrowed; the caller opened the pages.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }

    /// Gives back the shared window's contents: kernel and initramfs are private now.
    ///
    /// # Errors
    /// The system's.
    pub fn drop_window(&self, from: u64) -> io::Result<()> {
        match self.window.size.checked_sub(from) {
            Some(size) if size > 0 => self.discard(View::Shared, SHARED_BASE + from, size),
            _ => Ok(()),
        }
    }
}

impl Range {
    /// Memory at a multiple of 2 MiB, so that both KVM and the host can use large pages.
    fn new((start, size): (u64, u64), low: Option<&File>) -> io::Result<Self> {
        let length = size as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping.
        let mapped = unsafe {
            libc::mmap(ptr::null_mut(), length + LARGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is longer than that by a large page.
        let address = unsafe { mapped.cast::<u8>().add(mapped.align_offset(LARGE) % LARGE) };
        // SAFETY: the range is the mapping's; a host without huge pages refuses, and then there are none.
        unsafe { libc::madvise(address.cast(), length, libc::MADV_HUGEPAGE) };
        if let (Some(file), 0) = (low, start) {
            map(address, LENDABLE.min(size) as usize, libc::PROT_READ | libc::PROT_WRITE, file, 0)?;
        }
        Ok(Self { start, size, address })
    }
}

/// A range in the part that lies in files, and the rest of it.
fn low_and_rest(gpa: u64, size: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = gpa + size;
    let low = (gpa, end.min(LENDABLE).saturating_sub(gpa));
    let rest = (gpa.max(LENDABLE), end.saturating_sub(gpa.max(LENDABLE)));
    [low, rest].into_iter().filter(|(_, size)| *size > 0)
}

fn not_ram() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not RAM")
}

fn protect(address: *mut u8, size: usize, rights: i32) -> io::Result<()> {
    // SAFETY: the caller's range lies in one of our mappings; nobody holds references into it.
    match unsafe { libc::mprotect(address.cast(), size, rights) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn map(address: *mut u8, size: usize, rights: i32, file: &File, offset: u64) -> io::Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let mapped =
        // SAFETY: replaces a part of our own mapping, to which nobody holds references.
        unsafe { libc::mmap(address.cast(), size, rights, flags, file.as_raw_fd(), offset as libc::off_t) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn memory_file(name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a valid string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    file.set_len(LENDABLE)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: [(u64, u64); 1] = [(0, 8 << 20)];

    fn views() -> Views {
        Views::new(&RAM, 2 * PAGE, 47).unwrap()
    }

    /// Whether a page can be read: the kernel copies it for us and says EFAULT where this process would die.
    fn readable(views: &Views, view: View, gpa: u64) -> bool {
        let address = views.find(view, gpa, PAGE).unwrap();
        let (mut ends, mut byte) = ([0; 2], [0u8; 1]);
        // SAFETY: two descriptors are written; a byte goes through the pipe, or EFAULT comes back.
        unsafe {
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            let good = libc::write(ends[1], address.cast(), 1) == 1
                && libc::read(ends[0], byte.as_mut_ptr().cast(), 1) == 1;
            libc::close(ends[0]);
            libc::close(ends[1]);
            good
        }
    }

    #[test]
    fn a_page_is_open_in_one_view_only_and_loses_its_contents_at_a_conversion() {
        let views = views();
        for gpa in [0x3000, 4 << 20] {
            assert!(!readable(&views, View::Shared, gpa) && !readable(&views, View::Private, gpa));
            views.open(View::Private, gpa, PAGE, true).unwrap();
            assert!(views.write(View::Private, gpa, b"secret"));
            assert!(!readable(&views, View::Shared, gpa));
            views.discard(View::Private, gpa, PAGE).unwrap();
            let mut bytes = [1; 6];
            assert!(views.read(View::Private, gpa, &mut bytes));
            assert_eq!(bytes, [0; 6], "{gpa:#x}");
        }
    }

    #[test]
    fn slots_are_both_views_and_the_window() {
        let slots: Vec<_> = views().slots().iter().map(|s| (s.gpa, s.size, s.address % (2 << 20))).collect();
        assert_eq!(slots, [(0, 8 << 20, 0), (SHARED_BASE, 2 * PAGE, 0), (1 << 47, 8 << 20, 0)]);
    }

    #[test]
    fn a_lent_page_is_the_private_one() {
        let views = views();
        views.open(View::Private, 0x5000, PAGE, true).unwrap();
        assert!(views.write(View::Private, 0x5000, b"code"));
        views.lend(5, true).unwrap();
        let mut bytes = [0; 4];
        assert!(views.read(View::Shared, 0x5000, &mut bytes));
        assert_eq!(&bytes, b"code");
        views.lend(5, false).unwrap();
        assert!(!readable(&views, View::Shared, 0x5000));
        assert!(views.lend(256, true).is_err());
    }

    #[test]
    fn ranges_outside_ram_are_refused() {
        let views = views();
        assert!(views.open(View::Private, 8 << 20, PAGE, true).is_err());
        assert!(views.discard(View::Private, (8 << 20) - PAGE, 2 * PAGE).is_err());
        assert!(!views.write(View::Private, u64::MAX, b"x"));
        assert!(!views.read(View::Private, SHARED_BASE, &mut [0; 1]));
        assert!(
            views.address(SHARED_BASE, 2 * PAGE).is_some() && views.address(SHARED_BASE, 3 * PAGE).is_none()
        );
    }
}
