//! What is known of a container, on disk: one directory each below the root directory.
//!
//! Owns: names and formats of these files, ids, the status. Does not own: changing processes.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, host},
    pid::Pid,
    systemd::Scope,
};

/// Default of `--root`.
pub const DEFAULT_ROOT: &str = "/run/coffer";

/// The file where engines look that says at a container's end that memory ran out. In the container's own directory its name has how many
/// processes were killed for that behind it, and a point between.
pub const OUT_OF_MEMORY: &str = "oom";

/// Status of the OCI runtime specification, and paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` has not returned yet.
    Creating,
    /// Made, not started.
    Created,
    /// Started.
    Running,
    /// Started and frozen.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl Status {
    /// As in state JSON.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// The file `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in the OCI runtime specification, and the two processes")]
pub struct Record {
    pub id: String,
    pub oci_version: String,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub annotations: HashMap<String, String>,
    pub created: String,
    pub stub: Option<Pid>,
    pub vmm: Pid,
    pub cgroup: Option<PathBuf>,
    /// The unit of systemd's that the cgroup is, with `--systemd-cgroup`.
    #[serde(default)]
    pub scope: Option<Scope>,
    /// Of a container in another's VM: its files below that VM's shared directory.
    #[serde(default)]
    pub share: Option<PathBuf>,
    /// Directories that it mounts, below that VM's shared directory.
    #[serde(default)]
    pub volumes: Vec<PathBuf>,
    /// The configuration file, where it is not the bundle's `config.json`.
    #[serde(default)]
    pub config: Option<PathBuf>,
    /// The conmon that called `create`.
    #[serde(default)]
    pub conmon: Option<Pid>,
}

impl Record {
    /// Its conmon was killed: nobody waits for the container, and its engine takes it for gone.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.conmon.is_some_and(|conmon| !conmon.is_alive())
    }
}

/// The file with the number of the process that makes the container.
const MAKER: &str = "maker";

/// A container's directory.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

/// An id as runc takes it.
///
/// # Errors
/// [`Error::Id`].
pub fn check_id(id: &str) -> Result<(), Error> {
    let good = !id.is_empty() && id.len() <= 1024 && !id.contains(is_foreign) && id != "." && id != "..";
    if good { Ok(()) } else { Err(Error::Id(id.to_owned())) }
}

/// What no id has.
fn is_foreign(c: char) -> bool {
    !c.is_ascii_alphanumeric() && !"_+-.".contains(c)
}

/// Why [`check_id`] refused it.
pub(crate) fn why_no_id(id: &str) -> String {
    match id.chars().find(|c| is_foreign(*c)) {
        Some(c) => format!("invalid character `{}` in the container ID", c.escape_debug()),
        None if id.is_empty() => "it is empty".to_owned(),
        None if id.len() > 1024 => "it is longer than 1024 bytes".to_owned(),
        None => "it is the name of a directory".to_owned(),
    }
}

impl Directory {
    /// The directory of an id; it need not exist.
    ///
    /// # Errors
    /// [`Error::Id`].
    pub fn of(root: &Path, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        Ok(Self(root.join(id)))
    }

    /// One that has no id's name.
    #[must_use]
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Makes it.
    ///
    /// # Errors
    /// [`Error::Exists`], or the system's.
    pub fn create(&self) -> Result<(), Error> {
        if let Some(root) = self.0.parent() {
            fs::create_dir_all(root).map_err(host(format!("make {}", root.display())))?;
        }
        // A copy of the configuration lies in it, whose environment is nobody else's to read.
        match fs::DirBuilder::new().mode(0o700).create(&self.0) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(Error::Exists),
            other => other.map_err(host(format!("make {}", self.0.display()))),
        }
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The VMM's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.file("vsock")
    }

    /// There is something.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.0.exists()
    }

    /// Reads `state.json`.
    ///
    /// # Errors
    /// [`Error::NoContainer`].
    pub fn read(&self) -> Result<Record, Error> {
        let bytes = fs::read(self.file("state.json")).map_err(|_| Error::NoContainer)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::State(format!("{}: {e}", self.file("state.json").display())))
    }

    /// Writes `state.json`, whole or not at all.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, record: &Record) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(record).map_err(|e| Error::State(e.to_string()))?;
        write_whole(&self.file("state.json"), &text)
    }

    /// The status now.
    #[must_use]
    pub fn status(&self, record: &Record) -> Status {
        if self.is_being_made() {
            return Status::Creating;
        }
        match record.stub {
            Some(stub) if stub.is_alive() => {
                if self.file("paused").exists() {
                    Status::Paused
                } else if self.file("started").exists() {
                    Status::Running
                } else {
                    Status::Created
                }
            }
            _ => Status::Stopped,
        }
    }

    /// Says that this process makes the container, until [`Self::made`] or its end.
    ///
    /// # Errors
    /// The system's.
    pub fn making(&self) -> Result<(), Error> {
        let me = Pid::of(std::process::id() as i32);
        let text = serde_json::to_vec(&me).map_err(|e| Error::State(e.to_string()))?;
        write_whole(&self.file(MAKER), &text)
    }

    /// It is made.
    ///
    /// # Errors
    /// The system's.
    pub fn made(&self) -> Result<(), Error> {
        self.mark(MAKER, false)
    }

    /// A command that makes it is still at it.
    #[must_use]
    pub fn is_being_made(&self) -> bool {
        self.maker().is_some_and(|maker| maker.is_alive())
    }

    /// The process that makes the container, or did not come to its end.
    #[must_use]
    pub fn maker(&self) -> Option<Pid> {
        serde_json::from_slice(&fs::read(self.file(MAKER)).ok()?).ok()
    }

    /// Sets or clears a marker file.
    ///
    /// # Errors
    /// The system's.
    pub fn mark(&self, name: &str, on: bool) -> Result<(), Error> {
        let path = self.file(name);
        match if on { fs::write(&path, "") } else { fs::remove_file(&path) } {
            Err(e) if !on && e.kind() == ErrorKind::NotFound => Ok(()),
            other => other.map_err(host(format!("mark {}", path.display()))),
        }
    }

    /// Sets a marker file that nobody has set yet; `None` when somebody has.
    ///
    /// # Errors
    /// The system's.
    pub fn mark_first(&self, name: &str) -> Result<Option<()>, Error> {
        let path = self.file(name);
        match File::create_new(&path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(None),
            other => other.map(|_| Some(())).map_err(host(format!("mark {}", path.display()))),
        }
    }

    /// Keeps others from removing it, until what this gives is dropped, and waits for who is at it. `None` when it is gone then, though
    /// another of this name may be there.
    ///
    /// # Errors
    /// The system's.
    pub fn lock(&self) -> Result<Option<Flock<File>>, Error> {
        let failed = || host(format!("lock {}", self.0.display()));
        let open = match File::open(&self.0) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed())?,
        };
        let held = Flock::lock(open, FlockArg::LockExclusive).map_err(|(_, e)| failed()(e.into()))?;
        let of = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let same = fs::metadata(&self.0).ok().map(of) == held.metadata().ok().map(of);
        Ok(same.then_some(held))
    }

    /// Removes everything. Who does it to one that others may know has [locked](Self::lock) it.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other.map_err(host(format!("remove {}", self.0.display()))),
        }
    }
}

/// Writes a file so that nobody sees half of it.
///
/// # Errors
/// The system's.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    fs::write(&fresh, bytes)
        .and_then(|()| fs::rename(&fresh, path))
        .map_err(host(format!("write {}", path.display())))
}

/// State JSON, as runc prints it.
#[must_use]
pub fn json(record: &Record, status: Status) -> serde_json::Value {
    let pid = if status == Status::Stopped { 0 } else { record.stub.map_or(0, |p| p.pid) };
    let mut value = serde_json::json!({
        "ociVersion": record.oci_version, "id": record.id, "pid": pid, "status": status.word(),
        "bundle": record.bundle, "rootfs": record.rootfs, "created": record.created, "owner": "",
    });
    if !record.annotations.is_empty() {
        value["annotations"] = serde_json::json!(record.annotations);
    }
    value
}

/// All containers of a root directory, by id. What cannot be read is left out: it is being made or removed.
#[must_use]
pub fn all(root: &Path) -> Vec<(Directory, Record)> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let mut list: Vec<_> = entries
        .filter_map(|e| {
            let directory = Directory(e.path());
            directory.read().ok().map(|record| (directory, record))
        })
        .collect();
    list.sort_by(|a, b| a.1.id.cmp(&b.1.id));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waited_while_a_directory_was_removed_does_not_get_the_next_of_its_name() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), "a").unwrap();
        assert!(directory.lock().unwrap().is_none());
        directory.create().unwrap();
        let held = directory.lock().unwrap().unwrap();
        let other = directory.clone();
        let waits = std::thread::spawn(move || other.lock().unwrap().is_none());
        // Either it waits by now, or it finds the next one, which nobody removes.
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(!waits.is_finished());
        directory.remove().unwrap();
        directory.create().unwrap();
        drop(held);
        assert!(waits.join().unwrap());
        assert!(directory.lock().unwrap().is_some());
    }

    #[test]
    fn a_second_container_of_one_id_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), "a").unwrap();
        directory.create().unwrap();
        assert!(matches!(directory.create(), Err(Error::Exists)));
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(directory.file("")).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o700, "a configuration's environment is its caller's alone");
        directory.remove().unwrap();
        directory.remove().unwrap();
        assert!(matches!(directory.read(), Err(Error::NoContainer)));
        assert!(matches!(Directory::of(root.path(), "../x"), Err(Error::Id(_))));
    }
}
