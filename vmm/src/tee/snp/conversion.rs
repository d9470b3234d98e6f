//! Pages that change between private and shared while the guest runs: KVM_HC_MAP_GPA_RANGE and KVM_EXIT_MEMORY_FAULT.
//!
//! Owns: which conversions are done, in which order, and how often the same one. Does not own: who does them ([`Backing`]).

use std::{
    collections::HashMap,
    io,
    sync::{Mutex, PoisonError},
};

use coffer_layout::PAGE;

use super::abi::{HC_MAP_GPA_RANGE, MEMORY_EXIT_PRIVATE};

/// Bit of the hypercall's attributes that says private; below it lies the preferred page size, which nothing depends on.
const ENCRYPTED: u64 = 1 << 4;
const KNOWN: u64 = 0x1f;
/// How often a fault at one page is answered by a conversion: a guest that needs more turns around in a loop.
const MOST_FAULTS: u32 = 16;
/// Pages whose faults are counted.
const MOST_PAGES: usize = 4096;

/// What converts pages.
pub trait Backing {
    /// KVM_SET_MEMORY_ATTRIBUTES.
    ///
    /// # Errors
    /// The system's.
    fn set_private(&self, gpa: u64, size: u64, private: bool) -> io::Result<()>;
    /// Gives back what pages have in the private view, or in the shared one.
    ///
    /// # Errors
    /// The system's.
    fn discard(&self, gpa: u64, size: u64, private: bool) -> io::Result<()>;
}

/// Conversions of one guest.
#[derive(Debug)]
pub struct Conversions {
    /// RAM, `(first address, bytes)`.
    ram: Vec<(u64, u64)>,
    faults: Mutex<HashMap<u64, u32>>,
}

impl Conversions {
    /// Of a guest with this RAM.
    #[must_use]
    pub fn new(ram: &[(u64, u64)]) -> Self {
        Self { ram: ram.to_vec(), faults: Mutex::default() }
    }

    /// Answers a hypercall: 0, or errno as KVM gives it to the guest, whose page state change then fails.
    pub fn hypercall(&self, number: u64, args: [u64; 6], backing: &impl Backing) -> u64 {
        let [gpa, pages, attributes, ..] = args;
        let size = pages.checked_mul(PAGE).filter(|size| self.is_ram(gpa, *size));
        let refuse = |errno: i32| errno as u64;
        match size {
            Some(size) if number == HC_MAP_GPA_RANGE && attributes & !KNOWN == 0 => {
                let done = convert(gpa, size, attributes & ENCRYPTED != 0, backing);
                done.map_or_else(|e| refuse(e.raw_os_error().unwrap_or(libc::EIO)), |()| 0)
            }
            _ => refuse(libc::EINVAL),
        }
    }

    /// Answers a memory fault: the guest took a page as what it is not. A sound one converts first.
    ///
    /// # Errors
    /// In words why the guest cannot go on.
    pub fn fault(&self, flags: u64, gpa: u64, size: u64, backing: &impl Backing) -> Result<(), String> {
        let private = flags & MEMORY_EXIT_PRIVATE != 0;
        let view = if private { "private" } else { "shared" };
        let page = gpa & !(PAGE - 1);
        let length = size.max(1).checked_add(gpa - page).and_then(|n| n.checked_next_multiple_of(PAGE));
        let length = length.filter(|n| flags & !MEMORY_EXIT_PRIVATE == 0 && self.is_ram(page, *n));
        let Some(length) = length else {
            return Err(format!("memory fault at {gpa:#x}, {size:#x} bytes, flags {flags:#x}: not RAM"));
        };
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() >= MOST_PAGES && !faults.contains_key(&page) {
            return Err(format!(
                "memory faults at more than {MOST_PAGES} pages: the guest converts none itself"
            ));
        }
        let count = faults.entry(page).or_default();
        *count += 1;
        if *count > MOST_FAULTS {
            return Err(format!(
                "{MOST_FAULTS} memory faults at {page:#x}, {view} wanted: no conversion helps"
            ));
        }
        drop(faults);
        convert(page, length, private, backing)
            .map_err(|e| format!("make {length:#x} bytes at {page:#x} {view}: {e}"))
    }

    fn is_ram(&self, gpa: u64, size: u64) -> bool {
        let whole = gpa.is_multiple_of(PAGE) && size > 0;
        let within = |(start, length): &(u64, u64)| {
            gpa.checked_sub(*start).and_then(|at| at.checked_add(size)).is_some_and(|end| end <= *length)
        };
        whole && self.ram.iter().any(within)
    }
}

/// The attribute first: what is discarded before could come back by a touch in between, and be held twice.
fn convert(gpa: u64, size: u64, private: bool, backing: &impl Backing) -> io::Result<()> {
    backing.set_private(gpa, size, private)?;
    backing.discard(gpa, size, !private)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    const RAM: [(u64, u64); 2] = [(0, 0x8000_0000), (0x1_0000_0000, 0x4000_0000)];

    #[derive(Default)]
    struct Recorder {
        done: RefCell<Vec<(&'static str, u64, u64, bool)>>,
        /// errno of the call with this number.
        fail: Option<(usize, i32)>,
    }

    impl Recorder {
        fn note(&self, what: &'static str, gpa: u64, size: u64, private: bool) -> io::Result<()> {
            let mut done = self.done.borrow_mut();
            done.push((what, gpa, size, private));
            match self.fail {
                Some((at, errno)) if at + 1 == done.len() => Err(io::Error::from_raw_os_error(errno)),
                _ => Ok(()),
            }
        }
    }

    impl Backing for Recorder {
        fn set_private(&self, gpa: u64, size: u64, private: bool) -> io::Result<()> {
            self.note("set", gpa, size, private)
        }
        fn discard(&self, gpa: u64, size: u64, private: bool) -> io::Result<()> {
            self.note("discard", gpa, size, private)
        }
    }

    #[test]
    fn a_conversion_sets_the_attribute_and_discards_the_other_view() {
        let (conversions, host) = (Conversions::new(&RAM), Recorder::default());
        assert_eq!(conversions.hypercall(12, [0x20_0000, 512, 0x11, 0, 0, 0], &host), 0);
        assert_eq!(conversions.hypercall(12, [0x1_0000_0000, 1, 0, 0, 0, 0], &host), 0);
        assert_eq!(
            *host.done.borrow(),
            [
                ("set", 0x20_0000, 0x20_0000, true),
                ("discard", 0x20_0000, 0x20_0000, false),
                ("set", 0x1_0000_0000, 0x1000, false),
                ("discard", 0x1_0000_0000, 0x1000, true),
            ]
        );
    }

    #[test]
    fn what_is_not_ram_or_not_this_hypercall_is_refused_and_nothing_is_done() {
        let (conversions, host) = (Conversions::new(&RAM), Recorder::default());
        for (number, gpa, pages, attributes) in [
            (11, 0, 1, 0x10),
            (12, 1, 1, 0x10),
            (12, 0, 0, 0x10),
            (12, 0, 1, 0x30),
            (12, 0x7fff_f000, 2, 0x10),
            (12, 0x8000_0000, 1, 0),
            (12, 0, u64::MAX, 0),
            (12, !0xfff, 1, 0),
        ] {
            let ret = conversions.hypercall(number, [gpa, pages, attributes, 0, 0, 0], &host);
            assert_eq!(ret, libc::EINVAL as u64, "{number} {gpa:#x} {pages} {attributes:#x}");
        }
        assert!(host.done.borrow().is_empty());
    }

    #[test]
    fn each_failure_reaches_the_guest_and_nothing_is_discarded_that_was_not_converted() {
        for (at, errno) in [(0, libc::ENOMEM), (0, libc::EAGAIN), (1, libc::ENOSPC)] {
            let host = Recorder { fail: Some((at, errno)), ..Recorder::default() };
            let ret = Conversions::new(&RAM).hypercall(12, [0, 1, 0x10, 0, 0, 0], &host);
            assert_eq!((ret, host.done.borrow().len()), (errno as u64, at + 1));
        }
        let host = Recorder { fail: Some((0, libc::ENOMEM)), ..Recorder::default() };
        let words = Conversions::new(&RAM).fault(8, 0x5000, 0x1000, &host).unwrap_err();
        assert!(words.starts_with("make 0x1000 bytes at 0x5000 private: "), "{words}");
    }

    #[test]
    fn the_same_fault_again_and_again_ends_the_guest() {
        let (conversions, host) = (Conversions::new(&RAM), Recorder::default());
        for turn in 0..MOST_FAULTS {
            conversions.fault(if turn % 2 == 0 { 8 } else { 0 }, 0x5008, 8, &host).unwrap();
        }
        let words = conversions.fault(0, 0x5000, 0x1000, &host).unwrap_err();
        assert!(words.contains("16 memory faults at 0x5000, shared wanted"), "{words}");
        assert_eq!(
            host.done.borrow()[..2],
            [("set", 0x5000, 0x1000, true), ("discard", 0x5000, 0x1000, false)]
        );
        assert!(conversions.fault(1, 0x6000, 8, &host).is_err(), "an unknown flag");
        assert!(conversions.fault(8, 0x8000_0000, 8, &host).is_err(), "not RAM");
    }

    #[test]
    fn faults_are_counted_at_so_many_pages_only() {
        let (conversions, host) = (Conversions::new(&RAM), Recorder::default());
        for page in 0..MOST_PAGES as u64 {
            conversions.fault(8, page * PAGE, PAGE, &host).unwrap();
        }
        assert!(conversions.fault(8, MOST_PAGES as u64 * PAGE, PAGE, &host).is_err());
        conversions.fault(8, 0, PAGE, &host).unwrap();
    }

    proptest! {
        #[test]
        fn nothing_outside_ram_is_converted(number: u64, gpa: u64, pages: u64, attributes: u64, flags: u64, size: u64) {
            let (conversions, host) = (Conversions::new(&RAM), Recorder::default());
            conversions.hypercall(number % 14, [gpa, pages, attributes % 64, 0, 0, 0], &host);
            let _ = conversions.fault(flags, gpa, size, &host);
            for (_, gpa, size, _) in host.done.borrow().iter() {
                prop_assert!(conversions.is_ram(*gpa, *size));
            }
        }
    }
}
