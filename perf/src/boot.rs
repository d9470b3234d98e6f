//! One boot: start a VMM, wait for init's mark, look at its memory, end it.
//!
//! Owns: the measured window. Does not own: which VMM, how often.

use std::{
    ffi::CString,
    fs::{self, File},
    io::Read,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use coffer_layout::mark;
use serde::Serialize;
use thiserror::Error;

use crate::{
    memory::{self, Resident},
    peers::{Guest, Peer},
};

/// Why a boot gave no figure.
#[derive(Debug, Error)]
pub enum BootError {
    /// The operating system refused something.
    #[error("{stage}: {source}")]
    System {
        /// What was being done.
        stage: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The guest did not mark in time, or the VMM ended.
    #[error("{vmm}: no mark from init within {seconds} s; its messages: {messages}")]
    NoMark {
        /// Which VMM.
        vmm: &'static str,
        /// Time limit.
        seconds: u64,
        /// What it wrote on stderr.
        messages: String,
    },
}

/// What one boot cost.
#[derive(Clone, Debug, Serialize)]
pub struct Boot {
    /// Which VMM.
    pub vmm: &'static str,
    /// Milliseconds from exec of the VMM to init's first mark, read by the harness.
    pub exec_to_pid1_ms: f64,
    /// KiB of the VMM's process that are not guest RAM, when init ran.
    pub vmm_kib: u64,
    /// KiB of guest RAM that were resident then.
    pub guest_kib: u64,
    /// Milliseconds of CPU time of the VMM's process, guest included.
    pub cpu_ms: f64,
}

fn system(stage: &'static str) -> impl FnOnce(std::io::Error) -> BootError {
    move |source| BootError::System { stage, source }
}

/// Boots `guest` once under `peer`; `directory` is scratch.
///
/// # Errors
/// [`BootError`] when there is no figure to give.
pub fn measure(peer: &Peer, guest: &Guest, directory: &Path, limit: Duration) -> Result<Boot, BootError> {
    let fifo = directory.join("marks");
    let vsock = directory.join("vsock");
    for path in [&fifo, &vsock] {
        let _ = fs::remove_file(path);
    }
    let name = CString::new(fifo.as_os_str().as_bytes()).map_err(|e| system("fifo path")(e.into()))?;
    // SAFETY: `name` is a C string that outlives the call.
    if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } != 0 {
        return Err(system("make the fifo for marks")(std::io::Error::last_os_error()));
    }
    let messages = directory.join("stderr");
    let stderr = File::create(&messages).map_err(system("create the file for messages"))?;
    // Open for reading and writing, so that neither side waits for the other to open.
    let reader = File::options().read(true).write(true).open(&fifo).map_err(system("open the fifo"))?;
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::spawn(move || watch(reader, &sender));

    let argv = peer.command(guest, &fifo.to_string_lossy(), &vsock.to_string_lossy());
    let began = Instant::now();
    let mut child = Command::new(&argv[0])
        .args(&argv[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(system("start the VMM"))?;
    let marked = wait(&receiver, &mut child, began, limit);
    let resident = resident(child.id(), guest.memory_mib);
    let cpu_ms = cpu_ms(child.id());
    // Ends the watcher too: its read returns a byte that is no mark it waits for.
    let _ = child.kill();
    let _ = child.wait();
    if marked.is_none() {
        let _ = File::options()
            .write(true)
            .open(&fifo)
            .and_then(|mut f| std::io::Write::write_all(&mut f, b"\0end\n"));
    }
    let _ = waiter.join();
    let Some(at) = marked else {
        return Err(BootError::NoMark {
            vmm: peer.name(),
            seconds: limit.as_secs(),
            messages: fs::read_to_string(&messages).unwrap_or_default().trim().to_owned(),
        });
    };
    Ok(Boot {
        vmm: peer.name(),
        exec_to_pid1_ms: at.duration_since(began).as_secs_f64() * 1e3,
        vmm_kib: resident.vmm_kib,
        guest_kib: resident.guest_kib,
        cpu_ms,
    })
}

/// Reads until init's mark passes by: QEMU writes the raw byte, our trace a line that names it.
fn watch(mut reader: File, sender: &mpsc::Sender<Option<Instant>>) {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count) = reader.read(&mut buffer) {
        let now = Instant::now();
        seen.extend_from_slice(&buffer[..count]);
        if marks_init(&seen) {
            let _ = sender.send(Some(now));
            return;
        }
        if count == 0 || seen.ends_with(b"\0end\n") {
            break;
        }
    }
    let _ = sender.send(None);
}

fn marks_init(seen: &[u8]) -> bool {
    const LINE: &[u8] = b"\"init-entry\"";
    seen.contains(&mark::INIT_ENTRY) || seen.windows(LINE.len()).any(|w| w == LINE)
}

fn wait(
    receiver: &mpsc::Receiver<Option<Instant>>,
    child: &mut Child,
    began: Instant,
    limit: Duration,
) -> Option<Instant> {
    while began.elapsed() < limit {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(at) => return at,
            Err(mpsc::RecvTimeoutError::Timeout) if matches!(child.try_wait(), Ok(None)) => {}
            Err(_) => return None,
        }
    }
    None
}

fn resident(pid: u32, memory_mib: u64) -> Resident {
    // The kernel may split guest RAM where it is mapped differently; half of it is still longer than anything else.
    memory::split(&fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default(), memory_mib * 512)
}

fn cpu_ms(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime and stime are the 14th and 15th field of the line, the 12th and 13th after the name.
    let ticks: u64 = fields.iter().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    // SAFETY: sysconf reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks as f64 * 1e3 / per_second as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_mark_are_seen_and_nothing_else_is() {
        assert!(marks_init(&[1, 2, mark::INIT_ENTRY]));
        assert!(marks_init(b"{\"stage\":\"init-entry\",\"ns\":5}\n"));
        assert!(!marks_init(b"{\"stage\":\"kernel-entry\",\"ns\":5}\n"));
    }
}
