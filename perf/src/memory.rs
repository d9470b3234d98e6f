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

/// One mapping of an smaps listing.
#[derive(Default)]
struct Mapping {
    start: u64,
    end: u64,
    size_kib: u64,
    resident_kib: u64,
    private_kib: u64,
    /// Advised to have no huge pages.
    small_pages: bool,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), value) = (words.next(), words.next()) else { continue };
        if let Some((start, end)) = key.split_once('-') {
            let address = |text| u64::from_str_radix(text, 16);
            if let (Ok(start), Ok(end)) = (address(start), address(end)) {
                mappings.push(Mapping { start, end, ..Mapping::default() });
            }
            continue;
        }
        let Some(last) = mappings.last_mut() else { continue };
        let kib = value.and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        match key {
            "Size:" => last.size_kib = kib,
            "Rss:" => last.resident_kib = kib,
            "Private_Dirty:" => last.private_kib = kib,
            "VmFlags:" => last.small_pages = line.split_whitespace().any(|flag| flag == "nh"),
            _ => {}
        }
    }
    mappings
}

/// Splits an smaps listing. A mapping of at least `threshold_kib` is guest RAM: nothing else in a VMM is that long. So is what
/// comes right before it and is advised to have small pages: our VMM's first 2 MiB of a guest.
#[must_use]
pub fn split(smaps: &str, threshold_kib: u64) -> Resident {
    let mappings = mappings(smaps);
    let long: Vec<u64> = mappings.iter().filter(|m| m.size_kib >= threshold_kib).map(|m| m.start).collect();
    let mut resident = Resident::default();
    for mapping in &mappings {
        if mapping.size_kib >= threshold_kib || mapping.small_pages && long.contains(&mapping.end) {
            resident.guest_kib += mapping.resident_kib;
        } else {
            resident.vmm_kib += mapping.resident_kib;
            resident.vmm_private_kib += mapping.private_kib;
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
    fn the_first_part_of_guest_ram_is_the_guests_and_a_stack_before_it_is_not() {
        let part = |range: &str, size: u64, resident: u64, flags: &str| {
            format!(
                "{range} rw-p 00000000 00:00 0 \nSize: {size} kB\nRss: {resident} kB\nPrivate_Dirty: {resident} kB\nVmFlags: rd wr {flags}\n"
            )
        };
        let ram = part("7f0000200000-7f0008000000", 129_024, 28_672, "hg");
        let first = part("7f0000000000-7f0000200000", 2048, 100, "nh");
        let stack = part("7effffe00000-7f0000000000", 2048, 16, "");
        let split = |smaps: String| split(&smaps, 65_536);
        let wanted = Resident { guest_kib: 28_772, vmm_kib: 16, vmm_private_kib: 16 };
        assert_eq!(split(format!("{stack}{first}{ram}")), wanted);
        // Elsewhere, or without the advice, it is none of the guest's.
        assert_eq!(split(format!("{stack}{first}")).guest_kib, 0);
        assert_eq!(split(part("7f0000000000-7f0000200000", 2048, 100, "") + &ram).guest_kib, 28_672);
    }

    #[test]
    fn this_process_has_no_guest() {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let resident = split(&smaps, 1 << 40);
        assert_eq!(resident.guest_kib, 0);
        assert!(resident.vmm_kib > 100, "{resident:?}");
    }
}
