//! Reports through configfs (Linux, `Documentation/ABI/testing/configfs-tsm-report`).
//!
//! Owns: one entry, made, asked and removed. Does not own: what the report says.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// Where the kernel has it, once configfs is mounted.
const ROOT: &str = "/sys/kernel/config/tsm/report";
/// Longest blob that is read, in bytes: a quote with its certificates is some 16 KiB.
const LONGEST: u64 = 128 * 1024;

/// What the kernel gives for one report.
#[derive(Debug)]
pub(super) struct Blobs {
    /// The report or quote.
    pub(super) out: Vec<u8>,
    /// The host's certificates, where there are any.
    pub(super) auxiliary: Vec<u8>,
}

/// The kernel's directory of reports.
#[derive(Clone, Debug)]
pub(super) struct Tsm {
    root: PathBuf,
    /// Makes an entry, in which the kernel then has files.
    make: fn(&Path) -> io::Result<()>,
}

impl Default for Tsm {
    fn default() -> Self {
        Self { root: ROOT.into(), make: |path| fs::create_dir(path) }
    }
}

impl Tsm {
    /// One that a test's kernel serves.
    #[cfg(test)]
    pub(super) fn of(root: &Path, make: fn(&Path) -> io::Result<()>) -> Self {
        Self { root: root.into(), make }
    }

    /// Which kernel driver answers: `sev_guest` or `tdx_guest`.
    pub(super) fn provider(&self) -> Option<String> {
        let entry = Entry::make(self).ok()?;
        let name = fs::read_to_string(entry.0.join("provider")).ok()?;
        Some(name.trim_end().to_owned())
    }

    /// A report over 64 bytes.
    pub(super) fn report(&self, data: &[u8; 64]) -> io::Result<Blobs> {
        report(&Entry::make(self)?, data)
    }
}

/// The generation counter tells whether somebody else used the same entry meanwhile.
fn report(entry: &Entry, data: &[u8; 64]) -> io::Result<Blobs> {
    let file = |name: &str| entry.0.join(name);
    let generation = || -> io::Result<u64> {
        fs::read_to_string(file("generation"))?.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
    };
    let before = generation()?;
    fs::write(file("inblob"), data)?;
    let out = read(&file("outblob"))?;
    let auxiliary = read(&file("auxblob")).unwrap_or_default();
    if generation()? != before + 1 {
        return Err(io::Error::other("another process asked for a report through the same entry"));
    }
    Ok(Blobs { out, auxiliary })
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LONGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST {
        return Err(io::Error::other(format!("longer than {LONGEST} bytes")));
    }
    Ok(bytes)
}

struct Entry(PathBuf);

impl Entry {
    fn make(tsm: &Tsm) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("coffer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = tsm.root.join(name);
        (tsm.make)(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // configfs removes the files along with the directory.
        let _ = fs::remove_dir(&self.0);
    }
}

/// A kernel that answers each entry once, with a blob that is made of what was asked for.
#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use std::{ffi::CString, os::unix::ffi::OsStrExt, thread, time::Duration};

    pub(in super::super) fn entry(
        path: &Path,
        provider: &str,
        auxiliary: &[u8],
        blob: fn(&[u8; 64]) -> Vec<u8>,
    ) -> io::Result<()> {
        fs::create_dir(path)?;
        let name = CString::new(path.join("outblob").as_os_str().as_bytes())?;
        // SAFETY: the name outlives the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let files: [(&str, &[u8]); 3] =
            [("provider", provider.as_bytes()), ("generation", b"0\n"), ("auxblob", auxiliary)];
        for (name, bytes) in files {
            fs::write(path.join(name), bytes)?;
        }
        let path = path.to_owned();
        // It waits for a question as long as the test's directory is there.
        thread::spawn(move || {
            while path.exists() {
                if let Ok(asked) = fs::read(path.join("inblob"))
                    && let Ok(asked) = asked.try_into()
                {
                    fs::write(path.join("generation"), "1\n").unwrap();
                    fs::write(path.join("outblob"), blob(&asked)).unwrap();
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(())
    }
}
