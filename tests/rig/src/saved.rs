//! The machine as it was once after its kernel's start, kept beside the kernel, so that the next one goes on from there.
//!
//! Owns: which machines may do that, the file, saving through QEMU's monitor, and the second serial line, on which the machine
//! says that it can be saved and hears when to go on. Does not own: QEMU's process.
//!
//! The state is taken before the machine has seen anything of this host but the initramfs: no share is mounted yet (QEMU refuses to save
//! one that is), so that nothing in it can be stale. The clock comes with the word to go on, and QEMU's vmgenid device has the
//! kernel draw other random numbers: words to /dev/urandom alone count with its next reseeding, seconds later.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{fs::OpenOptionsExt, net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use nix::sys::stat::Mode;
use serde_json::Value;
use thiserror::Error;

use crate::{
    args::{Iommu, Run},
    kernel::{self, Stock},
    signals,
};

/// The guest's init waits when it finds this word on its command line.
pub(crate) const WORD: &str = "rig.turn";
/// In the state directory: two pipes, `.in` to the machine and `.out` of it, and QEMU's monitor.
pub(crate) const PIPES: &str = "turn";
pub(crate) const MONITOR: &str = "monitor";
/// A machine that was saved and shows no life for so long cannot be continued. A busy host takes ten seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(50);
const SAVING: Duration = Duration::from_secs(60);

/// How a machine comes up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It boots, and nothing is kept.
    Boot,
    /// It boots, and what it is then goes to this file.
    Save(PathBuf),
    /// It goes on from this file.
    Continue(PathBuf),
}

/// The machine was not saved: the next one boots, too.
#[derive(Debug, Error)]
pub(crate) enum SavedError {
    #[error("{what} {path}: {source}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("QEMU's monitor: {0}")]
    Monitor(io::Error),
    #[error("QEMU's monitor: {0}")]
    Refused(String),
}

/// Which way for this machine. `words` are QEMU's without what names this run's own files.
pub(crate) fn way(run: &Run, stock: &Stock, words: &[String]) -> Way {
    if run.boot || run.iommu != Iommu::None || !run.qemu.is_empty() || !run.append.is_empty() {
        return Way::Boot;
    }
    // Another version of QEMU may read the file otherwise.
    let program = std::env::var_os("PATH").and_then(|path| {
        let mut found = std::env::split_paths(&path).map(|d| d.join(&words[0]));
        found.find_map(|p| fs::metadata(p).ok()).map(|m| (m.len(), m.modified().ok()))
    });
    let key = kernel::fnv1a(&format!("{words:?} {program:?}"));
    let Some(name) = stock.initramfs.file_name() else { return Way::Boot };
    let file = stock.initramfs.with_file_name(format!("saved-{}-{key:016x}", name.to_string_lossy()));
    if file.exists() { Way::Continue(file) } else { Way::Save(file) }
}

/// The machine's second serial line.
#[derive(Debug)]
pub(crate) struct Turn {
    says: File,
    said: Vec<u8>,
    hears: File,
    word: &'static str,
    last: Option<Instant>,
    gone_on: bool,
}

impl Turn {
    /// Makes its pipes in the state directory. A copy goes on from a state that others went on from too.
    pub(crate) fn new(state: &Path, copy: bool) -> Result<Self, SavedError> {
        let pipe = |end| {
            let path = state.join(PIPES).with_extension(end);
            let failed = |source| SavedError::File { what: "make", path: path.clone(), source };
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| failed(e.into()))?;
            // For both, so that neither side waits for the other to open it.
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(failed)
        };
        let (hears, says) = (pipe("in")?, pipe("out")?);
        let word = if copy { "copy" } else { "first" };
        Ok(Self { says, said: Vec::new(), hears, word, last: None, gone_on: false })
    }

    fn said(&mut self, word: &str) -> bool {
        let mut chunk = [0; 256];
        while let Ok(n) = self.says.read(&mut chunk)
            && n > 0
        {
            self.said.extend_from_slice(&chunk[..n]);
        }
        String::from_utf8_lossy(&self.said).lines().any(|l| l.trim() == word)
    }

    /// It waits to be saved.
    pub(crate) fn can_be_saved(&mut self) -> bool {
        self.said("saveable")
    }

    /// Tells it to go on, until it has heard: what comes before QEMU has read the whole file is lost.
    pub(crate) fn go_on(&mut self) -> io::Result<()> {
        self.gone_on = self.gone_on || self.said("going");
        if self.gone_on || self.last.is_some_and(|l| l.elapsed() < AGAIN) {
            return Ok(());
        }
        self.last = Some(Instant::now());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        match self.hears.write(format!("go {} {} end\n", now.as_secs(), self.word).as_bytes()) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            _ => Ok(()), // a pipe that is full has the words already
        }
    }

    /// It has heard.
    pub(crate) fn has_gone_on(&self) -> bool {
        self.gone_on
    }
}

/// Writes the machine to `file`; it runs on.
pub(crate) fn save(state: &Path, file: &Path) -> Result<(), SavedError> {
    let partial = file.with_extension(format!("partial-{}", std::process::id()));
    let saved = write(state, &partial).and_then(|()| {
        fs::rename(&partial, file).map_err(|source| SavedError::File {
            what: "make",
            path: file.to_owned(),
            source,
        })
    });
    let _ = fs::remove_file(&partial);
    forget_older(file);
    saved
}

fn write(state: &Path, file: &Path) -> Result<(), SavedError> {
    let mut monitor = Monitor::new(&state.join(MONITOR))?;
    // A shell reads this: the name has no quote in it but what a user's cache directory has.
    let quoted = file.to_string_lossy().replace('\'', r"'\''");
    let uri = format!("exec:cat >'{quoted}'");
    monitor.call("migrate-set-parameters", &serde_json::json!({ "max-bandwidth": 1u64 << 34 }))?;
    monitor.call("migrate", &serde_json::json!({ "uri": uri }))?;
    let began = Instant::now();
    let result = loop {
        let status = monitor.call("query-migrate", &serde_json::json!({}))?;
        match status["status"].as_str() {
            Some("completed") => break Ok(()),
            Some("failed" | "cancelled") => break Err(SavedError::Refused(status.to_string())),
            _ if began.elapsed() > SAVING || signals::exit_code().is_some() => {
                break Err(SavedError::Refused(format!("not saved after {} s", began.elapsed().as_secs())));
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if result.is_err() {
        let _ = monitor.call("migrate_cancel", &serde_json::json!({}));
    }
    // After a migration QEMU's machine stands still.
    monitor.call("cont", &serde_json::json!({}))?;
    result
}

/// States of other initramfs' versions are of no use any more, nor is what a run left that was killed while it saved.
fn forget_older(file: &Path) {
    let (Some(directory), Some(name)) = (file.parent(), file.file_name()) else { return };
    let name = name.to_string_lossy();
    let Some((mine, _)) = name.rsplit_once('-') else { return };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let other = entry.file_name().to_string_lossy().into_owned();
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|m| m.elapsed().ok());
        let partial = other.contains(".partial-") && age.is_some_and(|a| a > 10 * SAVING);
        if other.starts_with("saved-") && (partial || !other.starts_with(mine)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// QEMU's monitor, one JSON value a line (docs/interop/qmp-spec.txt).
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn new(path: &Path) -> Result<Self, SavedError> {
        let stream = UnixStream::connect(path).map_err(SavedError::Monitor)?;
        stream.set_read_timeout(Some(SAVING)).map_err(SavedError::Monitor)?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.call("qmp_capabilities", &serde_json::json!({}))?;
        Ok(monitor)
    }

    /// The answer's `return`; events and the greeting are passed over.
    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, SavedError> {
        let line = serde_json::json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{line}").map_err(SavedError::Monitor)?;
        loop {
            let mut text = String::new();
            if self.0.read_line(&mut text).map_err(SavedError::Monitor)? == 0 {
                return Err(SavedError::Monitor(io::ErrorKind::UnexpectedEof.into()));
            }
            let mut answer: Value =
                serde_json::from_str(&text).map_err(|e| SavedError::Monitor(io::Error::other(e)))?;
            if let Some(error) = answer.get("error") {
                return Err(SavedError::Refused(format!("{command}: {error}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_machine_without_anything_of_its_own_is_saved() {
        let directory = tempfile::tempdir().unwrap();
        let initramfs = directory.path().join("initramfs-1");
        let stock = Stock { kernel: "/k".into(), initramfs, modules: "/m".into() };
        let words = |memory: &str| ["qemu", memory].map(str::to_owned);
        let Way::Save(file) = way(&Run::default(), &stock, &words("1")) else { panic!("not saved") };
        assert_ne!(way(&Run::default(), &stock, &words("2")), Way::Save(file.clone()));
        fs::write(&file, "state").unwrap();
        assert_eq!(way(&Run::default(), &stock, &words("1")), Way::Continue(file));
        for run in [
            Run { boot: true, ..Run::default() },
            Run { iommu: Iommu::Intel, ..Run::default() },
            Run { qemu: vec!["-x".into()], ..Run::default() },
            Run { append: "x".into(), ..Run::default() },
        ] {
            assert_eq!(way(&run, &stock, &words("1")), Way::Boot, "{run:?}");
        }
    }

    #[test]
    fn states_of_another_initramfs_go() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["saved-initramfs-1-a", "saved-initramfs-1-b", "saved-initramfs-2-a", "vmlinux"];
        names.iter().for_each(|n| fs::write(directory.path().join(n), "x").unwrap());
        forget_older(&directory.path().join("saved-initramfs-1-b"));
        let left = names.map(|n| directory.path().join(n).exists());
        assert_eq!(left, [true, true, false, true]);
        let partial = ["saved-initramfs-1-c.partial-1", "saved-initramfs-1-c.partial-2"]
            .map(|n| directory.path().join(n));
        let files = partial.each_ref().map(|p| File::create(p).unwrap());
        files[0].set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        forget_older(&directory.path().join("saved-initramfs-1-b"));
        assert_eq!(partial.map(|p| p.exists()), [false, true]);
    }

    #[test]
    fn the_word_is_repeated_until_it_is_heard() {
        let directory = tempfile::tempdir().unwrap();
        let mut turn = Turn::new(directory.path(), true).unwrap();
        assert!(!turn.can_be_saved());
        let open = |end| File::options().read(true).write(true).open(directory.path().join(end)).unwrap();
        let mut says = open("turn.out");
        says.write_all(b"saveable\r\n").unwrap();
        assert!(turn.can_be_saved());
        let mut hears = BufReader::new(open("turn.in"));
        for _ in 0..2 {
            std::thread::sleep(AGAIN);
            turn.go_on().unwrap();
            let mut line = String::new();
            hears.read_line(&mut line).unwrap();
            assert!(line.starts_with("go ") && line.ends_with(" copy end\n"), "{line}");
        }
        says.write_all(b"go 1 2 end\r\ngoing\r\n").unwrap();
        turn.go_on().unwrap();
        assert!(turn.has_gone_on());
    }
}
