//! Shells: VMM processes that have done what no pod decides and wait for one (`coffer-vmm --shell`).
//!
//! Owns: where they wait, filling the pool, looking at it, emptying it. Its part `take` gives one to a pod. Does not own: what a
//! shell has done and which request it takes: that is the VMM's.
//!
//! Each waits in a directory of its own, which holds its socket and `image`, the name and identity of the file that it has checked. There is no
//! daemon: shells that were taken are replaced by the next `fill`. Who fills a directory, looks into it or takes its shell holds a lock on
//! it, which goes with the process. A directory without a lock and without a shell that listens is a dead one's, and is removed.

mod take;

use std::{
    fs::{self, DirBuilder, File, Metadata},
    io::{self, ErrorKind},
    os::unix::{
        fs::{DirBuilderExt, MetadataExt},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        socket::{getsockopt, sockopt::PeerCredentials},
        stat::{Mode, umask},
    },
};
use serde::{Deserialize, Serialize};

pub use self::take::{Request, take};
use crate::{
    error::{Error, host},
    pid::Pid,
    spawn::inherit_only,
};

/// Below the root directory; no container's id has such a letter.
const DIRECTORY: &str = "@pool";
const SOCKET: &str = "socket";
const IMAGE: &str = "image";
const LOG: &str = "log";
/// Most shells of a pool.
pub const MOST: usize = 256;
/// A shell is ready in less than this everywhere, and dies in less.
const LIMIT: Duration = Duration::from_secs(60);

/// A file as it was: another one, or one that was written to, is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Source {
    fn of(path: &Path) -> io::Result<Self> {
        let now: Metadata = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: now.dev(),
            inode: now.ino(),
            size: now.len(),
            modified: (now.mtime(), now.mtime_nsec()),
            changed: (now.ctime(), now.ctime_nsec()),
        })
    }
}

/// A directory of the pool that this process alone may change.
struct Place {
    path: PathBuf,
    lock: Flock<File>,
}

/// What is in it.
enum Content {
    /// A shell that listens.
    Shell(Shell),
    /// Nothing that will ever be one.
    Dead,
}

/// A shell that listens.
struct Shell {
    process: Pid,
    image: Source,
    /// To its socket; nothing was said yet.
    stream: UnixStream,
}

impl Place {
    /// `None`: another one has it, or it is gone.
    fn lock(path: PathBuf) -> Option<Self> {
        let file = File::open(&path).ok()?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
        // Whoever had the lock may have removed it meanwhile.
        let (now, locked) = (fs::metadata(&path).ok()?, lock.metadata().ok()?);
        ((now.dev(), now.ino()) == (locked.dev(), locked.ino())).then_some(Self { path, lock })
    }

    fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn look(&self) -> Content {
        let look = || -> Option<Shell> {
            let stream = UnixStream::connect(self.path.join(SOCKET)).ok()?;
            let process = Pid::of(getsockopt(&stream, PeerCredentials).ok()?.pid())?;
            let image = serde_json::from_slice(&fs::read(self.path.join(IMAGE)).ok()?).ok()?;
            Some(Shell { process, image, stream })
        };
        look().map_or(Content::Dead, Content::Shell)
    }

    /// Ends its shell, if it has one, and removes it.
    fn clear(self) -> Result<(), Error> {
        if let Content::Shell(shell) = self.look() {
            shell.process.signal(libc::SIGKILL);
            if !shell.process.wait(LIMIT) {
                return Err(Error::State(format!("process {} does not end", shell.process.pid)));
            }
        }
        self.remove();
        Ok(())
    }

    /// The directory goes, and the pool's with the last one.
    fn remove(self) {
        let Self { path, lock } = self;
        let _ = fs::remove_dir_all(&path);
        drop(lock);
        if let Some(all) = path.parent() {
            let _ = fs::remove_dir(all);
        }
    }
}

impl Shell {
    /// Why it is of no use to a pod that is to boot `image` with `program`.
    fn unfit(&self, program: &Path, image: &Path) -> Option<String> {
        let file = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
        if file(Path::new(&format!("/proc/{}/exe", self.process.pid))) != file(program) {
            return Some(format!("it is another program than {}", program.display()));
        }
        if self.image.path != image {
            return Some(format!("it has {}, {} is wanted", self.image.path.display(), image.display()));
        }
        match Source::of(image) {
            Ok(now) if now == self.image => None,
            _ => Some(format!("{} is another file than when it was filled", image.display())),
        }
    }
}

/// The pool's directories, by name: numbers in their order.
fn places(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root.join(DIRECTORY)).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name.parse::<u64>().unwrap_or(u64::MAX), name)
    });
    paths
}

/// A shell as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its directory's.
    pub name: String,
    /// Its process.
    pub pid: i32,
    /// The file that it has checked.
    pub image: PathBuf,
    /// Why no pod would take it, if so.
    pub unfit: Option<String>,
}

/// The shells that wait. Dead ones are removed.
/// `program` is the VMM that is installed.
pub fn list(root: &Path, program: &Path) -> Vec<Shown> {
    let mut shown = Vec::new();
    for place in places(root).into_iter().filter_map(Place::lock) {
        match place.look() {
            Content::Shell(shell) => shown.push(Shown {
                name: place.name(),
                pid: shell.process.pid,
                unfit: shell.unfit(program, &shell.image.path),
                image: shell.image.path,
            }),
            Content::Dead => place.remove(),
        }
    }
    shown
}

/// Ends those that no pod would take any more, and starts as many as are missing for `count` with this image. Returns when all are
/// ready, with the names of those that are new.
///
/// # Errors
/// The system's, or the VMM's words; shells that are ready stay.
pub fn fill(root: &Path, program: &Path, image: &Path, count: usize) -> Result<Vec<String>, Error> {
    let image = std::path::absolute(image).map_err(host("find the image"))?;
    let source = Source::of(&image).map_err(host(format!("look at {}", image.display())))?;
    let mut there = 0;
    for place in places(root).into_iter().filter_map(Place::lock) {
        match place.look() {
            Content::Shell(shell) if shell.unfit(program, &shell.image.path).is_some() => place.clear()?,
            Content::Shell(shell) => there += usize::from(shell.image == source),
            Content::Dead => place.remove(),
        }
    }
    let begun = (there..count).map(|_| begin(root, program, &source)).collect::<Result<Vec<_>, _>>()?;
    begun.into_iter().map(Begun::finish).collect()
}

/// A shell that is not ready yet.
struct Begun {
    place: Place,
    process: Child,
}

fn begin(root: &Path, program: &Path, image: &Source) -> Result<Begun, Error> {
    let place = make(root)?;
    let written = serde_json::to_vec(image).map_err(io::Error::from);
    written
        .and_then(|text| fs::write(place.path.join(IMAGE), text))
        .map_err(host("write down the shell's image"))?;
    let mut command = Command::new(program);
    command.arg("--shell").arg(&place.path).arg("--image").arg(&image.path);
    command.arg("--log").arg(place.path.join(LOG));
    command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let set_up = || {
        nix::unistd::setsid()?;
        // As podman's: what is made for a pod is its user's to write.
        umask(Mode::S_IWGRP | Mode::S_IWOTH);
        inherit_only(&[])
    };
    // SAFETY: between fork and exec; the calls change this process alone, and allocate nothing.
    unsafe { command.pre_exec(set_up) };
    match command.spawn() {
        Ok(process) => Ok(Begun { place, process }),
        Err(error) => {
            place.remove();
            Err(host(format!("start {}", program.display()))(error))
        }
    }
}

/// A new directory, locked.
fn make(root: &Path) -> Result<Place, Error> {
    let all = root.join(DIRECTORY);
    for number in 1.. {
        // Again each time: whoever removes the last shell's directory removes this one, too.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&all);
        made.map_err(host("make the pool's directory"))?;
        let path = all.join(number.to_string());
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {
                if let Some(place) = Place::lock(path) {
                    return Ok(place);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {}
            Err(error) => return Err(host("make a shell's directory")(error)),
        }
        if number > 64 * MOST {
            break;
        }
    }
    Err(Error::State(format!("{} has no room: coffer pool drain", all.display())))
}

impl Begun {
    /// Waits until it listens.
    fn finish(mut self) -> Result<String, Error> {
        let began = Instant::now();
        let socket = self.place.path.join(SOCKET);
        let words = loop {
            if UnixStream::connect(&socket).is_ok() {
                return Ok(self.place.name());
            }
            match self.process.try_wait().map_err(host("wait for the shell"))? {
                Some(_) => {
                    let said = fs::read_to_string(self.place.path.join(LOG)).unwrap_or_default();
                    break said.lines().last().unwrap_or("it did not say why").to_owned();
                }
                None if began.elapsed() > LIMIT => {
                    break format!("it was not ready within {} s", LIMIT.as_secs());
                }
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        let _ = self.process.kill();
        let _ = self.process.wait();
        self.place.remove();
        Err(Error::Vm(words))
    }
}

/// Ends all of them.
///
/// # Errors
/// When one does not end, or is held by another command that does not.
pub fn drain(root: &Path) -> Result<(), Error> {
    let began = Instant::now();
    loop {
        let left = places(root);
        if left.is_empty() {
            let _ = fs::remove_dir(root.join(DIRECTORY));
            return Ok(());
        }
        for place in left.into_iter().filter_map(Place::lock) {
            place.clear()?;
        }
        if began.elapsed() > LIMIT {
            return Err(Error::State("another command holds a shell of the pool".into()));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests;
