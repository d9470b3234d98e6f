//! What a VMM's process holds in memory beside the guest's RAM.
//!
//! Owns: reading `/proc/PID/smaps`. Does not own: when to look.

/// Resident KiB of a process, split by what it is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Mappings at least as long as the guest's RAM, or parts of it: guest memory.
    pub guest_kib: u64,
    /// Everything else: the VMM itself, with the files that it maps (an image's pages are the page cache's).
    pub vmm_kib: u64,
    /// Of that, what no other process and no file has.
    pub vmm_private_kib: u64,
}

/// Splits an smaps listing. A mapping of at least `threshold_kib` is guest RAM: nothing else in a VMM is that long.
#[must_use]
pub fn split(smaps: &str, threshold_kib: u64) -> Resident {
    let (mut size, mut resident) = (0, Resident::default());
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) = (words.next(), words.next().and_then(|w| w.parse::<u64>().ok()));
        match (key, value) {
            (Some("Size:"), Some(kib)) => size = kib,
            (Some("Rss:"), Some(kib)) if size >= threshold_kib => resident.guest_kib += kib,
            (Some("Rss:"), Some(kib)) => resident.vmm_kib += kib,
            (Some("Private_Dirty:"), Some(kib)) if size < threshold_kib => resident.vmm_private_kib += kib,
            _ => {}
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_mapping_is_the_guests_and_the_rest_is_the_vmms() {
        let smaps = "7f0-7f1 rw-p 0 00:00 0\nSize:             262144 kB\nRss:               30000 kB\nPrivate_Dirty: 30000 kB\n\
                     5550-5551 r-xp 0 00:00 0 /bin/vmm\nSize:               1200 kB\nRss:                 900 kB\nPrivate_Dirty: 0 kB\n\
                     5552-5553 rw-p 0 00:00 0 [heap]\nSize:                132 kB\nRss:                  20 kB\nPrivate_Dirty: 20 kB\n";
        let wanted = Resident { guest_kib: 30_000, vmm_kib: 920, vmm_private_kib: 20 };
        assert_eq!(split(smaps, 131_072), wanted);
    }

    #[test]
    fn this_process_has_no_guest() {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let resident = split(&smaps, 1 << 40);
        assert_eq!(resident.guest_kib, 0);
        assert!(resident.vmm_kib > 100, "{resident:?}");
    }
}
