//! Reports through configfs (Linux, `Documentation/ABI/testing/configfs-tsm-report`).
//!
//! Owns: one entry, made, asked and removed. Does not own: what the report says.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// Where the kernel has it, once configfs is mounted.
pub(super) const ROOT: &str = "/sys/kernel/config/tsm/report";
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

/// Which kernel driver answers: `sev_guest` or `tdx_guest`.
pub(super) fn provider(root: &Path) -> Option<String> {
    let entry = Entry::make(root).ok()?;
    let name = fs::read_to_string(entry.0.join("provider")).ok()?;
    Some(name.trim_end().to_owned())
}

/// A report over 64 bytes. The generation counter tells whether somebody else used the same entry meanwhile.
pub(super) fn report(root: &Path, data: &[u8; 64]) -> io::Result<Blobs> {
    let entry = Entry::make(root)?;
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
    fn make(root: &Path) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("coffer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = root.join(name);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // configfs removes the files along with the directory.
        let _ = fs::remove_dir(&self.0);
    }
}
