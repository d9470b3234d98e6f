//! Boot stages with their times: one JSON object a line, `{"stage":"…","ns":CLOCK_MONOTONIC}`.
//!
//! Owns: the names of stages and the file. Does not own: who calls it when.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::Mutex,
};

use coffer_layout::mark;

use crate::output;

/// Nanoseconds of CLOCK_MONOTONIC: one clock for every process of the host.
#[must_use]
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Where stages go. Without a file nothing is written.
#[derive(Debug, Default)]
pub struct Trace(Option<Mutex<File>>);

impl Trace {
    /// Opens the file; it may be a fifo.
    ///
    /// # Errors
    /// As [`output::open`].
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let file = path.map(output::open).transpose()?;
        Ok(Self(file.map(Mutex::new)))
    }

    /// Writes a stage that is reached now.
    pub fn stage(&self, name: &str) {
        self.stage_at(name, now_ns());
    }

    /// Writes a stage that was reached at `ns`.
    pub fn stage_at(&self, name: &str, ns: u64) {
        self.line(&format!("{{\"stage\":\"{name}\",\"ns\":{ns}}}\n"));
    }

    /// Writes counts that are known at the end.
    pub fn counts<N: std::fmt::Display>(&self, counts: &[(N, u64)]) {
        let fields: Vec<String> = counts.iter().map(|(name, count)| format!("\"{name}\":{count}")).collect();
        self.line(&format!("{{\"counts\":{{{}}}}}\n", fields.join(",")));
    }

    fn line(&self, text: &str) {
        if let Some(file) = &self.0 {
            // A trace that cannot be written must not stop a guest.
            let _ = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner).write_all(text.as_bytes());
        }
    }
}

/// The name of a guest's mark, when it is a stage.
#[must_use]
pub fn mark_name(byte: u8) -> Option<&'static str> {
    Some(match byte {
        mark::SHIM_ENTRY => "shim-entry",
        mark::KERNEL_ENTRY => "kernel-entry",
        mark::INIT_ENTRY => "init-entry",
        mark::INIT_READY => "init-ready",
        mark::CONTAINER_CREATED => "container-created",
        mark::CONTAINER_STARTED => "container-started",
        mark::ORDERLY_END => "orderly-end",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_json_lines_in_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = Trace::open(Some(file.path())).unwrap();
        trace.stage("a");
        trace.stage("b");
        trace.counts(&[("io", 3)]);
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((&lines[0]["stage"], &lines[1]["stage"]), (&"a".into(), &"b".into()));
        assert!(lines[0]["ns"].as_u64() <= lines[1]["ns"].as_u64());
        assert_eq!(lines[2]["counts"]["io"], 3);
    }
}
