//! The guest's marks as the host's kernel sees them: KVM's tracepoint `kvm_pio`, for VMMs that pass no write to the mark port on.
//!
//! Owns: a tracing instance of one start, and its lines. Does not own: what a mark means.
//!
//! The instance follows the thread that starts the VMM and what it forks, so that other VMs of the host are not in it. Its clock is
//! CLOCK_MONOTONIC, which it gives in microseconds.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    thread,
    time::Duration,
};

use coffer_layout::MARK_PORT;

/// What an error of this module is about, with its remedy.
pub const STAGE: &str =
    "watch the tracepoint kvm:kvm_pio (root, and tracefs: mount -t tracefs tracefs /sys/kernel/tracing)";

/// Where it is mounted: of its own, or in debugfs.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Lives as long as the start.
#[derive(Debug)]
pub struct Tracing {
    directory: PathBuf,
}

impl Tracing {
    /// Follows what the calling thread starts from now on.
    ///
    /// # Errors
    /// The system's: see [`STAGE`].
    pub fn begin() -> io::Result<Self> {
        let place = PLACES.iter().map(PathBuf::from).find(|p| p.join("instances").is_dir());
        let place = place.ok_or(io::Error::from(io::ErrorKind::NotFound))?;
        // SAFETY: has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        let tracing = Self { directory: place.join(format!("instances/coffer-bench-{thread}")) };
        // One of a run that was killed would still have its events.
        let _ = fs::remove_dir(&tracing.directory);
        fs::create_dir(&tracing.directory)?;
        let set = |file: &str, text: String| fs::write(tracing.directory.join(file), text);
        set("trace_clock", "mono".into())?;
        set("options/event-fork", "1".into())?;
        set("set_event_pid", thread.to_string())?;
        set("events/kvm/kvm_pio/filter", format!("port == {MARK_PORT:#x}"))?;
        set("events/kvm/kvm_pio/enable", "1".into())?;
        Ok(tracing)
    }

    /// Its instance's.
    #[cfg(test)]
    pub(crate) fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// What gives a line for each mark, waiting for it, and what puts text of ours among them.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self) -> io::Result<(File, File)> {
        let lines = File::open(self.directory.join("trace_pipe"))?;
        Ok((lines, File::options().write(true).open(self.directory.join("trace_marker"))?))
    }
}

impl Drop for Tracing {
    /// Its files are closed by now. A program that another thread is just starting still has them for a moment.
    fn drop(&mut self) {
        let _ = fs::write(self.directory.join("events/enable"), "0");
        let mut removed = fs::remove_dir(&self.directory);
        for _ in 0..20 {
            match &removed {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                _ => break,
            }
            thread::sleep(Duration::from_millis(10));
            removed = fs::remove_dir(&self.directory);
        }
        if let Err(error) = removed {
            // Its buffers are the kernel's until then.
            eprintln!("coffer-bench: remove {}: {error}", self.directory.display());
        }
    }
}

/// The byte and the CLOCK_MONOTONIC time in ns of a line about a write.
#[must_use]
pub fn parse(line: &[u8]) -> Option<(u8, u64)> {
    let (before, event) = std::str::from_utf8(line).ok()?.split_once(": kvm_pio: pio_write at ")?;
    let port = event.split(' ').next()?.strip_prefix("0x")?;
    if u16::from_str_radix(port, 16).ok()? != MARK_PORT {
        return None;
    }
    let (_, value) = event.split_once(" val 0x")?;
    let value = u8::from_str_radix(value.split(' ').next()?, 16).ok()?;
    let (seconds, micros) = before.rsplit(' ').next()?.split_once('.')?;
    if micros.len() != 6 {
        return None;
    }
    let ns = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?;
    Some((value, ns.checked_add(micros.parse::<u64>().ok()? * 1000)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Of the rig's Linux 6.12, with this VMM.
    const LINE: &str = "          vcpu-0-239     [000] .....     6.053907: kvm_pio: pio_write at 0x80 size 1 count 1 val 0xc0 ";

    #[test]
    fn a_line_has_the_byte_and_the_time() {
        assert_eq!(parse(LINE.as_bytes()), Some((0xc0, 6_053_907_000)));
        for (from, to) in [
            ("pio_write", "pio_read"),
            ("at 0x80", "at 0x81"),
            ("val 0xc0", "val 0xc0c0"),
            (".053907", ".05"),
        ] {
            assert_eq!(parse(LINE.replace(from, to).as_bytes()), None, "{to}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_a_mark_or_none(before in "\\PC*", after in "\\PC*") {
            let _ = parse(format!("{before}: kvm_pio: pio_write at {after}").as_bytes());
            let _ = parse(format!("{before} 1.000000: kvm_pio: pio_write at 0x80 {after} val 0x{after}").as_bytes());
        }
    }
}
