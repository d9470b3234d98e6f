//! A line that counts, on a terminal; nothing elsewhere.

use std::{
    io::{IsTerminal, Write, stderr},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Counts bytes while work goes on.
pub(super) struct Progress<'a> {
    verb: &'static str,
    bytes: &'a AtomicU64,
    total: u64,
}

impl<'a> Progress<'a> {
    /// `total` is 0 when it is not known.
    pub(super) fn start(verb: &'static str, bytes: &'a AtomicU64, total: u64) -> Self {
        Self { verb, bytes, total }
    }

    pub(super) fn during<T>(self, work: impl FnOnce() -> T) -> T {
        if !stderr().is_terminal() {
            return work();
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let line = thread::Builder::new().spawn_scoped(scope, || self.show(&done));
            let result = work();
            done.store(true, Ordering::Relaxed);
            if let Ok(line) = line {
                line.thread().unpark();
            }
            result
        })
    }

    fn show(&self, done: &AtomicBool) {
        let began = Instant::now();
        while !done.load(Ordering::Relaxed) {
            let bytes = self.bytes.load(Ordering::Relaxed) as f64 / 1e6;
            let speed = bytes / began.elapsed().as_secs_f64().max(0.001);
            let of =
                if self.total > 0 { format!(" of {:.1}", self.total as f64 / 1e6) } else { String::new() };
            eprint!("\r{bytes:.1}{of} MB {} ({speed:.0} MB/s) ", self.verb);
            let _ = stderr().flush();
            thread::park_timeout(Duration::from_millis(200));
        }
        eprint!("\r\x1b[K");
    }
}
