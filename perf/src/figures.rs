//! What a process cost: faults, processor time, memory, and what KVM counted for its VM.
//!
//! Owns: reading them. Does not own: when. Names say the unit; what has none is a count.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::process::ExitStatusExt,
    process::{Child, ExitStatus},
};

use crate::memory;

/// Names with values.
pub type Figures = BTreeMap<String, u64>;

/// CLOCK_MONOTONIC, the clock of our VMM's trace.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sends a signal to a child that has not been reaped.
pub fn signal(pid: u32, number: i32) {
    // SAFETY: sends a signal; a process that is gone is an error that means nothing here.
    unsafe { libc::kill(pid as i32, number) };
}

/// Ends a child that has not been reaped, and all in its process group: it leads that.
pub fn kill_group(pid: u32) {
    // SAFETY: sends a signal; the group's number is the child's, which nobody else gets before it is reaped.
    unsafe { libc::kill(-(pid as i32), libc::SIGKILL) };
}

/// Memory of a VMM's process that is alive, and KVM's counters of its VM.
#[must_use]
pub fn of_vm(pid: u32, memory_mib: u64) -> Figures {
    let mut figures = Figures::new();
    // Guest RAM may be in two parts; half of it is still longer than anything else.
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    if !smaps.is_empty() {
        let resident = memory::split(&smaps, memory_mib.max(2) * 512);
        figures.insert("vmm-resident-kib".into(), resident.vmm_kib);
        figures.insert("vmm-private-kib".into(), resident.vmm_private_kib);
        figures.insert("guest-resident-kib".into(), resident.guest_kib);
    }
    if let Some(peak) = fs::read_to_string(format!("/proc/{pid}/status")).ok().and_then(|s| peak_kib(&s)) {
        figures.insert(PEAK.into(), peak);
        // Read right after guest RAM, which only grows, so that this is at least the VMM's own.
        if let Some(guest) = figures.get("guest-resident-kib") {
            figures.insert("vmm-peak-kib".into(), peak.saturating_sub(*guest));
        }
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map(Iterator::count).unwrap_or(0);
    figures.insert("threads".into(), threads as u64);
    for (name, value) in kvm(pid) {
        figures.insert(format!("kvm-{}", name.replace('_', "-")), value);
    }
    if let Some(exits) = exits_of_its_own(&figures) {
        figures.insert("kvm-exits-of-its-own".into(), exits);
    }
    figures
}

/// Exits without those that a slower machine has more of: interrupts of the host, and the guest's timer, which exits once to open the window
/// for an interrupt and once to end it.
fn exits_of_its_own(figures: &Figures) -> Option<u64> {
    let of = |name: &str| figures.get(name).copied();
    let interrupts = ["kvm-irq-exits", "kvm-irq-window-exits", "kvm-irq-injections"];
    Some(of("kvm-exits")?.saturating_sub(interrupts.iter().filter_map(|name| of(name)).sum()))
}

/// KVM's counters of the VM that a process made, those over 0 (debugfs: `kvm/PID-FD/NAME`).
fn kvm(pid: u32) -> Vec<(String, u64)> {
    let prefix = format!("{pid}-");
    let entries = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let directory = entries
        .map(|e| e.path())
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)));
    let files = directory.and_then(|d| fs::read_dir(d).ok()).into_iter().flatten().flatten();
    files
        .filter_map(|file| {
            let value = fs::read_to_string(file.path()).ok()?.trim().parse().ok().filter(|v| *v > 0)?;
            Some((file.file_name().to_string_lossy().into_owned(), value))
        })
        .collect()
}

/// How a child ended, which stays to be reaped. With `wait` it is waited for; without, `None` when it still runs.
#[must_use]
pub fn end_of(pid: u32, wait: bool) -> Option<ExitStatus> {
    let flags = libc::WEXITED | libc::WNOWAIT | if wait { 0 } else { libc::WNOHANG };
    // SAFETY: an all-zero siginfo is one, and the kernel fills it.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` outlives the call; the child is ours.
    while unsafe { libc::waitid(libc::P_PID, pid, &raw mut info, flags) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
    // SAFETY: a siginfo of `waitid` has both, and zeroes when nothing has ended.
    let (ended, status) = unsafe { (info.si_pid() != 0, info.si_status()) };
    // An exit code or a signal's number, as `wait4` has them.
    ended.then(|| ExitStatus::from_raw(if info.si_code == libc::CLD_EXITED { status << 8 } else { status }))
}

/// "exit code 1" or "signal 9".
#[must_use]
pub fn words(end: ExitStatus) -> String {
    end.code().map_or_else(
        || format!("signal {}", end.signal().unwrap_or_default()),
        |code| format!("exit code {code}"),
    )
}

/// Waits for a child that ends or was told to, and adds what it used in its life.
pub fn reap(child: &mut Child, figures: &mut Figures) {
    let mut status = 0;
    // SAFETY: an all-zero rusage is one, and the kernel fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both outlive the call; the child is ours and nobody else waits for it.
        let pid = unsafe { libc::wait4(child.id() as i32, &raw mut status, 0, &raw mut usage) };
        if pid >= 0 {
            break;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            // What is not known is no 0.
            return;
        }
    }
    let microseconds = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
    for (name, value) in [
        ("page-faults", usage.ru_minflt as u64),
        ("page-faults-with-io", usage.ru_majflt as u64),
        ("cpu-user-us", microseconds(usage.ru_utime)),
        ("cpu-system-us", microseconds(usage.ru_stime)),
        ("switches-voluntary", usage.ru_nvcsw as u64),
        ("switches-involuntary", usage.ru_nivcsw as u64),
    ] {
        figures.insert(name.into(), value);
    }
    // A program that is started takes over the peak of the one that starts it, so that only a higher one is its own. The peak of one that was
    // looked at alive is known better.
    if usage.ru_maxrss > own_peak_kib() {
        figures.entry(PEAK.into()).or_insert(usage.ru_maxrss as u64);
    }
}

/// KiB that were resident at most, guest RAM included where it is a VMM.
const PEAK: &str = "peak-resident-kib";

fn peak_kib(status: &str) -> Option<u64> {
    status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?.split_whitespace().next()?.parse().ok()
}

fn own_peak_kib() -> i64 {
    // SAFETY: an all-zero rusage is one, and the kernel fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: outlives the call.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    usage.ru_maxrss
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_has_used_something() {
        let mut child = Command::new("sh").args(["-c", "read line"]).stdin(Stdio::piped()).spawn().unwrap();
        while fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap().trim() != "sh" {}
        let mut figures = of_vm(child.id(), 128);
        drop(child.stdin.take());
        reap(&mut child, &mut figures);
        let peak = figures["peak-resident-kib"];
        assert!(figures["page-faults"] > 10 && (100..8 << 10).contains(&peak), "{figures:?}");
    }

    #[test]
    fn a_peak_that_may_be_the_harness_s_is_no_figure() {
        let ballast = std::hint::black_box(vec![1_u8; 64 << 20]);
        let mut child = Command::new("sh").args(["-c", "exit 0"]).spawn().unwrap();
        let mut figures = Figures::new();
        reap(&mut child, &mut figures);
        assert!(!figures.contains_key("peak-resident-kib"), "{figures:?}, {}", ballast.len());
    }

    #[test]
    fn an_end_is_told_and_stays_to_be_reaped() {
        for (script, wanted) in
            [("exit 0", "exit code 0"), ("exit 3", "exit code 3"), ("kill -9 $$", "signal 9")]
        {
            let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            assert_eq!(words(end_of(child.id(), true).unwrap()), wanted);
            assert_eq!(words(end_of(child.id(), false).unwrap()), wanted);
            let mut figures = Figures::new();
            reap(&mut child, &mut figures);
            assert!(figures["page-faults"] > 10, "{figures:?}");
            assert_eq!(end_of(child.id(), false), None);
        }
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        assert_eq!(end_of(child.id(), false), None);
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }

    /// Two runs of one VMM, one of them slower: `perf/results/rig`, vmms-count and peers-count of coffer-vmm.
    #[test]
    fn interrupts_are_no_exits_of_its_own() {
        let figures = |values: [u64; 4]| -> Figures {
            let names = ["kvm-exits", "kvm-irq-exits", "kvm-irq-window-exits", "kvm-irq-injections"];
            names.map(str::to_owned).into_iter().zip(values).collect()
        };
        assert_eq!(exits_of_its_own(&figures([614, 172, 3, 37])), Some(402));
        assert_eq!(exits_of_its_own(&figures([785, 309, 8, 66])), Some(402));
        assert_eq!(exits_of_its_own(&Figures::new()), None);
    }

    #[test]
    fn a_peak_is_read_from_a_status() {
        assert_eq!(peak_kib("Name:\tx\nVmHWM:\t    4728 kB\nVmRSS:\t  1 kB\n"), Some(4728));
        assert_eq!(peak_kib("Name:\tx\n"), None);
    }
}
