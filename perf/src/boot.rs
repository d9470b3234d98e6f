//! One start of a VM: exec a VMM, wait for the guest's mark, look at what it cost, end it.
//!
//! Owns: the measured windows of VMs. Does not own: which VMM, how often.
//!
//! Every VMM is watched in the same way: the guest writes one byte to the mark port, the VMM passes it on through a
//! pipe, and the harness takes the time when it reads it. For a VMM that passes nothing on, the host's kernel tells of the write
//! ([`crate::tracepoint`]), a little earlier than a pipe would. Where our VMM writes its own times they are kept as stages.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::{self, File},
    io::{Read, Write},
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use coffer_layout::mark;
use thiserror::Error;

use crate::{
    counts,
    figures::{self, Figures},
    peers::{Guest, Peer, Scratch},
    plan::{Marks, Until},
    record::{Stage, Window},
    terminal, tiny,
    tracepoint::{self, Tracing},
};

/// Why a start gave no figure.
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
    /// A file of the plan's image is not there.
    #[error(
        "the plan's image: read {path}: {source}: perf/build PROFILE makes the files of an image of ours"
    )]
    Image {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The guest did not mark in time, or the VMM ended.
    #[error("{vmm}: no mark `{mark}` from the guest within {seconds} s{end}; its messages: {messages}")]
    NoMark {
        /// Which VMM.
        vmm: &'static str,
        /// What was waited for.
        mark: &'static str,
        /// Time limit.
        seconds: u64,
        /// How it ended, when it did.
        end: String,
        /// What it wrote on stderr.
        messages: String,
    },
    /// It reached what was waited for, and failed.
    #[error("{vmm}: it failed with {end}; its messages: {messages}")]
    Failed {
        /// Which VMM or runtime.
        vmm: &'static str,
        /// How it ended.
        end: String,
        /// What it wrote on stderr.
        messages: String,
    },
    /// It was ended.
    #[error("{vmm}: not done within {seconds} s; its messages: {messages}")]
    TimeLimit {
        /// Which runtime.
        vmm: &'static str,
        /// Time limit.
        seconds: u64,
        /// What it wrote on stderr.
        messages: String,
    },
    /// No template could be made.
    #[error("{vmm}: no template was made: {messages}")]
    NoTemplate {
        /// Which VMM.
        vmm: &'static str,
        /// What it wrote on stderr.
        messages: String,
    },
    /// A start from the pool was none, or there was no pool.
    #[error("coffer: no start from a shell: {messages}")]
    NoShell {
        /// Why.
        messages: String,
    },
    /// A start from a template was none.
    #[error("{vmm}: it booted where it was to start from a template; its messages: {messages}")]
    Booted {
        /// Which VMM.
        vmm: &'static str,
        /// What it wrote on stderr.
        messages: String,
    },
}

/// What one start showed.
#[derive(Clone, Debug, Default)]
pub struct Started {
    /// Milliseconds since the exec.
    pub windows: BTreeMap<Window, f64>,
    /// From our VMM's trace.
    pub stages: Vec<Stage>,
    /// Counts and sizes.
    pub figures: Figures,
}

pub(crate) fn system(stage: &'static str) -> impl FnOnce(std::io::Error) -> BootError {
    move |source| BootError::System { stage, source }
}

/// A mark that passed by.
struct Seen {
    name: &'static str,
    /// CLOCK_MONOTONIC.
    at_ns: u64,
}

/// Boots `guest` once under `peer`; `directory` is scratch of this start alone.
///
/// # Errors
/// [`BootError`] when there is no figure to give.
pub fn measure(peer: &Peer, guest: &Guest, directory: &Path, limit: Duration) -> Result<Started, BootError> {
    let scratch = Scratch::new(directory);
    for path in [&scratch.marks, &scratch.vsock] {
        let _ = fs::remove_file(path);
    }
    if let Some(text) = peer.configuration(guest) {
        fs::write(&scratch.configuration, text).map_err(system("write the VMM's configuration"))?;
    }
    let messages = directory.join("stderr");
    let stderr = File::create(&messages).map_err(system("create the file for messages"))?;
    let (sender, receiver) = mpsc::channel();
    let watcher = Watcher::new(peer.marks(), &scratch.marks, sender)?;
    let last = match (guest.tiny, guest.until) {
        (true, _) => "kernel-entry",
        (false, Until::Pid1) => "init-entry",
        (false, Until::Ready) => "init-ready",
    };

    let (_terminal, stdin) = if peer.wants_terminal() {
        let (ours, theirs) = terminal::pair().map_err(system("make a terminal"))?;
        (Some(ours), theirs)
    } else {
        (None, Stdio::null())
    };
    let argv = peer.command(guest, &scratch);
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).stdin(stdin).stdout(Stdio::null()).stderr(stderr);
    counts::begin();
    let (began_ns, began) = (figures::monotonic_ns(), Instant::now());
    let mut child = command.spawn().map_err(system("start the VMM"))?;
    let seen = wait(&receiver, child.id(), began, limit, last);
    // It must not go on while its memory is looked at.
    figures::signal(child.id(), libc::SIGSTOP);
    counts::end();
    let reached = seen.iter().any(|s| s.name == last);
    let mut started = Started { figures: figures::of_vm(child.id(), guest.memory_mib), ..Started::default() };
    let ended = figures::end_of(child.id(), false);
    let ending = Instant::now();
    let _ = child.kill();
    figures::reap(&mut child, &mut started.figures);
    started.figures.insert("end-us".into(), ending.elapsed().as_micros() as u64);
    let bytes = watcher.finish();
    if !reached {
        return Err(BootError::NoMark {
            vmm: peer.kind().word(),
            mark: last,
            seconds: limit.as_secs(),
            end: ended.map(|end| format!(" ({})", figures::words(end))).unwrap_or_default(),
            messages: words_in(&messages),
        });
    }
    if let Some(end) = ended.filter(|end| !end.success()) {
        let (vmm, end) = (peer.kind().word(), figures::words(end));
        return Err(BootError::Failed { vmm, end, messages: words_in(&messages) });
    }
    for mark in &seen {
        if let Some(window) = Window::of_stage(mark.name) {
            let ms = mark.at_ns.saturating_sub(began_ns) as f64 / 1e6;
            started.windows.entry(window).or_insert(ms);
        }
    }
    started.stages = trace_stages(&bytes, began_ns);
    if guest.template.is_some() && seen.iter().any(|s| s.name == "kernel-entry") {
        return Err(BootError::Booted { vmm: peer.kind().word(), messages: words_in(&messages) });
    }
    Ok(started)
}

/// What a program wrote on stderr.
pub(crate) fn words_in(messages: &Path) -> String {
    fs::read_to_string(messages).unwrap_or_default().trim().to_owned()
}

/// Boots `guest` once and saves it in `directory`, which is made.
///
/// # Errors
/// [`BootError`], with the VMM's words.
pub fn make_template(peer: &Peer, guest: &Guest, directory: &Path) -> Result<(), BootError> {
    let _ = fs::remove_dir_all(directory);
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700).create(directory).map_err(system("make the template's directory"))?;
    let argv = peer.command(guest, &Scratch::new(directory));
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).arg("--make-template").arg(directory).stdin(Stdio::null());
    let output = command.output().map_err(system("start the VMM"))?;
    if output.status.success() {
        return Ok(());
    }
    let messages = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(BootError::NoTemplate { vmm: peer.kind().word(), messages })
}

const END: u8 = 0xff;

/// A fifo at `path`: an end to read from and one to write to.
fn fifo(path: &Path) -> Result<(File, File), BootError> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| system("fifo path")(e.into()))?;
    // SAFETY: `name` is a C string that outlives the call.
    if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } != 0 {
        return Err(system("make the fifo for marks")(std::io::Error::last_os_error()));
    }
    // Open for reading and writing, so that neither side waits for the other to open.
    let reader = File::options().read(true).write(true).open(path).map_err(system("open the fifo"))?;
    let writer = reader.try_clone().map_err(system("open the fifo"))?;
    Ok((reader, writer))
}

/// Who reads the marks of a start, until [`Watcher::finish`] or until it is dropped.
struct Watcher {
    thread: Option<thread::JoinHandle<Vec<u8>>>,
    /// Closed when the watcher ends.
    ender: Option<File>,
    /// After what has its files open: fields are dropped in this order, and an instance with open files cannot be removed.
    tracing: Option<Tracing>,
    /// What the VMM writes itself.
    marks: PathBuf,
}

impl Watcher {
    fn new(by: Marks, marks: &Path, sender: mpsc::Sender<Seen>) -> Result<Self, BootError> {
        let tracing = match by {
            Marks::Vmm => None,
            Marks::Tracepoint => Some(Tracing::begin().map_err(system(tracepoint::STAGE))?),
        };
        let (source, ender) = match &tracing {
            None => fifo(marks)?,
            Some(tracing) => tracing.open().map_err(system(tracepoint::STAGE))?,
        };
        let thread = thread::spawn(move || watch(source, &sender));
        Ok(Self { thread: Some(thread), ender: Some(ender), tracing, marks: marks.to_owned() })
    }

    /// All that the VMM wrote.
    fn finish(mut self) -> Vec<u8> {
        let bytes = self.end();
        if self.tracing.is_some() {
            // What the VMM would have told through a pipe lies in a file, if it wrote one.
            return fs::read(&self.marks).unwrap_or_default();
        }
        bytes
    }

    fn end(&mut self) -> Vec<u8> {
        if let Some(mut ender) = self.ender.take() {
            // The thread reads until this byte, which no VMM writes.
            let _ = ender.write_all(&[END]);
        }
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Watcher {
    /// A start that did not come to its end would leave the thread behind, and the tracing instance with it.
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads until [`END`], and tells of every mark when it passes by. Returns all that was read. Works little: in the rig its
/// instructions are counted with the VMM's.
fn watch(mut reader: File, sender: &mpsc::Sender<Seen>) -> Vec<u8> {
    let (mut all, mut line_at) = (Vec::new(), 0);
    let mut told = [false; MARKS.len()];
    let mut buffer = [0; 4096];
    while let Ok(count) = reader.read(&mut buffer) {
        let read_ns = figures::monotonic_ns();
        let new = all.len();
        all.extend_from_slice(&buffer[..count]);
        let mut tell = |index: usize, at_ns: Option<u64>| {
            if !std::mem::replace(&mut told[index], true) {
                // When nobody listens any more the start is over.
                let _ = sender.send(Seen { name: MARKS[index].1, at_ns: at_ns.unwrap_or(read_ns) });
            }
        };
        all[new..].iter().filter_map(|b| raw_mark(*b)).for_each(|index| tell(index, None));
        while let Some(length) = all[line_at..].iter().position(|b| *b == b'\n') {
            let line = &all[line_at..line_at + length];
            if let Some((mark, at_ns)) = tracepoint::parse(line) {
                raw_mark(mark).into_iter().for_each(|index| tell(index, Some(at_ns)));
            }
            line_mark(line).into_iter().for_each(|index| tell(index, None));
            line_at += length + 1;
        }
        if count == 0 || all[new..].contains(&END) {
            break;
        }
    }
    all
}

const MARKS: [(u8, &str); 4] = [
    (mark::SHIM_ENTRY, "shim-entry"),
    (mark::KERNEL_ENTRY, "kernel-entry"),
    (mark::INIT_ENTRY, "init-entry"),
    (mark::INIT_READY, "init-ready"),
];

/// QEMU writes the mark itself. No text holds such a byte: UTF-8 never has them all, and traces and logs are ASCII.
fn raw_mark(byte: u8) -> Option<usize> {
    MARKS.iter().position(|(mark, _)| *mark == byte)
}

/// Our trace names the mark, Cloud Hypervisor's log its number.
fn line_mark(line: &[u8]) -> Option<usize> {
    let line = std::str::from_utf8(line).ok()?;
    if let Some((_, rest)) = line.split_once("\"stage\":\"") {
        return MARKS.iter().position(|(_, name)| rest.split('"').next() == Some(name));
    }
    let (_, rest) = line.split_once("code 0x")?;
    raw_mark(u8::from_str_radix(rest.get(..2)?, 16).ok()?)
}

/// Marks up to `last`, the time limit, or the end of the VMM.
fn wait(receiver: &mpsc::Receiver<Seen>, pid: u32, began: Instant, limit: Duration, last: &str) -> Vec<Seen> {
    let mut seen: Vec<Seen> = Vec::new();
    while began.elapsed() < limit && !seen.iter().any(|s| s.name == last) {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(mark) => seen.push(mark),
            Err(RecvTimeoutError::Timeout) if figures::end_of(pid, false).is_none() => {}
            Err(_) => break,
        }
    }
    seen
}

/// The lines of our VMM's trace, in milliseconds since the exec.
pub(crate) fn trace_stages(bytes: &[u8], began_ns: u64) -> Vec<Stage> {
    #[derive(serde::Deserialize)]
    struct Line {
        stage: String,
        ns: u64,
    }
    let lines = bytes.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice::<Line>(l).ok());
    lines.map(|l| Stage { stage: l.stage, ms: l.ns.saturating_sub(began_ns) as f64 / 1e6 }).collect()
}

/// Writes the guest that reports at once into `guest`'s files in `directory`, for [`Guest::tiny`]; `image` is its IGVM image, where there is one.
///
/// # Errors
/// The system's.
pub fn write_tiny(guest: &mut Guest, image: Option<&[u8]>, directory: &Path) -> Result<(), BootError> {
    guest.tiny = true;
    guest.kernel = directory.join("kernel");
    fs::write(&guest.kernel, tiny::kernel()).map_err(system("write the tiny kernel"))?;
    if let Some(image) = image {
        guest.image = directory.join("image");
        fs::write(&guest.image, image).map_err(system("write the tiny image"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_mark_is_seen_and_nothing_else_is() {
        let seen = |bytes: &[u8]| {
            let raw = bytes.iter().filter_map(|b| raw_mark(*b));
            raw.chain(line_mark(bytes)).map(|i| MARKS[i].1).collect::<Vec<_>>()
        };
        assert_eq!(seen(&[1, 2, mark::INIT_ENTRY]), ["init-entry"]);
        assert_eq!(seen(b"{\"stage\":\"init-entry\",\"ns\":5}"), ["init-entry"]);
        assert_eq!(seen(b"[Userspace code 0xc2] 0.5 seconds"), ["init-entry"]);
        assert_eq!(seen(b"{\"stage\":\"kernel-entry\",\"ns\":5}"), ["kernel-entry"]);
        assert!(seen(b"\x00code 0x1").is_empty() && seen(b"{\"stage\":\"first-run\"").is_empty());
    }

    #[test]
    fn a_trace_is_counted_from_the_exec() {
        let stages = trace_stages(b"x\n{\"stage\":\"a\",\"ns\":3000000}\n{\"counts\":{}}\n\xff", 1_000_000);
        assert_eq!(stages, [Stage { stage: "a".into(), ms: 2.0 }]);
    }

    #[test]
    fn a_vmm_that_ends_is_named_with_its_words() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("vmm");
        fs::write(&script, "#!/bin/sh\necho no luck >&2\nexit 3\n").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = format!("kind = \"coffer-vmm\"\nprogram = {script:?}");
        let peer = Peer::new(&toml::from_str(&runtime).unwrap()).unwrap();
        let error = measure(&peer, &Guest::default(), directory.path(), Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("no luck"), "{error}");
    }

    #[test]
    fn nothing_of_a_start_stays_in_tracefs() {
        let probe = match Tracing::begin() {
            Ok(probe) => probe,
            Err(error) => {
                println!("not checked: {}: {error}", tracepoint::STAGE);
                return;
            }
        };
        let instance = probe.directory().to_owned();
        drop(probe);
        assert!(!instance.exists(), "{}", instance.display());
        let directory = tempfile::tempdir().unwrap();
        // One that ends at once, and one that is none: each way out of a start.
        for program in ["/bin/false", "/nonexistent"] {
            let runtime = format!("kind = \"alioth\"\nprogram = \"{program}\"");
            let peer = Peer::new(&toml::from_str(&runtime).unwrap()).unwrap();
            measure(&peer, &Guest::default(), directory.path(), Duration::from_secs(60)).unwrap_err();
            assert!(!instance.exists(), "{program}: {}", instance.display());
        }
    }

    #[test]
    fn a_vmm_that_marks_and_then_fails_is_no_start() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("vmm");
        let text = "#!/bin/sh\nfor f; do :; done\nprintf '\\302' >$f\nexit 3\n";
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = format!("kind = \"coffer-vmm\"\nprogram = {script:?}");
        let peer = Peer::new(&toml::from_str(&runtime).unwrap()).unwrap();
        // It is stopped at its mark, unless it was faster.
        match measure(&peer, &Guest::default(), directory.path(), Duration::from_secs(60)) {
            Ok(started) => assert!(started.figures["page-faults"] > 10, "{started:?}"),
            Err(error) => assert!(error.to_string().contains("exit code 3"), "{error}"),
        }
    }

    #[test]
    fn a_vmm_that_marks_has_windows_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("vmm");
        // The last word of the command line is the fifo.
        let text =
            "#!/bin/sh\nfor f; do :; done\nprintf '\\300' >$f\nsleep 0.05\nprintf '\\302' >$f\nsleep 60\n";
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = format!("kind = \"coffer-vmm\"\nprogram = {script:?}");
        let peer = Peer::new(&toml::from_str(&runtime).unwrap()).unwrap();
        let started = measure(&peer, &Guest::default(), directory.path(), Duration::from_secs(60)).unwrap();
        let window = |w| started.windows[&w];
        // By how much is a busy host's to say: a mark's time is when it is read.
        assert!(window(Window::FirstGuestInstruction) < window(Window::Pid1), "{started:?}");
        assert!(started.figures["page-faults"] > 10, "{started:?}");
    }
}
