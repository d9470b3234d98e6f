//! The kernel's command line: measured, and the only place that tells Linux what the machine has.
//!
//! Owns: which options, and why. Does not own: the addresses (coffer-layout).

use coffer_layout::{MMIO_IRQS, MMIO_SIZE, mmio_address};

use crate::build::Profile;

/// Options of every profile.
const COMMON: [&str; 13] = [
    "rdinit=/init",
    // The keyboard controller's reset is a port write that the VMM sees; a panic takes the same way, at once.
    "reboot=k",
    "panic=-1",
    // Serial consoles of other machines are looked for where no option says not to.
    "8250.nr_uarts=0",
    // The TSC of a guest is the host's: no calibration, no watchdog.
    "tsc=reliable",
    "no_timer_check",
    // Grace periods at boot end at once instead of after milliseconds.
    "rcupdate.rcu_expedited=1",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    // init does not load or need any.
    "nomodule",
    "nokaslr",
    // The legacy hierarchy is never mounted.
    "cgroup_no_v1=all",
    "net.ifnames=0",
];

/// Slabs of 2 KiB for DMA through shared pages: 8 MiB. Linux's own choice is 6 % of RAM, 64 MiB at least, and every page
/// of it is a page state change at boot. The device set needs little: queues of 256 buffers on vsock, rng and net, and
/// virtio-fs requests of at most 1 MiB.
const SWIOTLB_SLABS: u32 = 4096;

/// The whole line for a profile, on a plain VM or under a TEE; `extra` comes last, so that it can override.
#[must_use]
pub fn command_line(profile: Profile, tee: bool, extra: &str) -> String {
    let mut words: Vec<String> = COMMON.iter().map(|w| (*w).to_owned()).collect();
    if profile.is_debug() {
        words.retain(|w| w != "8250.nr_uarts=0");
        words.extend(
            ["8250.nr_uarts=1", "console=ttyS0", "earlyprintk=ttyS0", "ignore_loglevel"].map(str::to_owned),
        );
    } else {
        words.push("quiet".to_owned());
    }
    if tee {
        words.push(format!("swiotlb={SWIOTLB_SLABS}"));
    } else if profile.is_smp() {
        // Without a TEE the MP table says it all, and ACPI would search for what is not there.
        words.push("acpi=off".to_owned());
    }
    for (slot, irq) in MMIO_IRQS.iter().enumerate() {
        words.push(format!(
            "virtio_mmio.device={}K@{:#x}:{irq}:{slot}",
            MMIO_SIZE / 1024,
            mmio_address(slot)
        ));
    }
    if !extra.is_empty() {
        words.push(extra.to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_named_once_and_extras_come_last() {
        let line = command_line(Profile::Up, false, "loglevel=7");
        assert_eq!(line.matches("virtio_mmio.device=4K@").count(), MMIO_IRQS.len());
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5:0 "));
        assert!(line.ends_with(" loglevel=7"));
        assert!(line.len() < coffer_layout::boot::COMMAND_LINE_MAX as usize);
    }

    #[test]
    fn acpi_is_on_only_where_linux_does_not_look_for_an_mp_table() {
        assert!(command_line(Profile::Smp, false, "").contains("acpi=off"));
        assert!(!command_line(Profile::Smp, true, "").contains("acpi=off"));
        assert!(command_line(Profile::Smp, true, "").contains(" swiotlb=4096 "));
        assert!(!command_line(Profile::Smp, false, "").contains("swiotlb"));
    }

    #[test]
    fn only_debug_profiles_have_a_console() {
        assert!(!command_line(Profile::Smp, false, "").contains("console="));
        assert!(command_line(Profile::SmpDebug, true, "").contains("console=ttyS0"));
    }
}
