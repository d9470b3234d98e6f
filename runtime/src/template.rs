//! Templates: machines that were saved when their init was ready, from which pods without a TEE start.
//!
//! Owns: where they are, which one a pod's start uses, making them. Does not own: whether a pod starts from one (`start`), what is
//! saved, and whether it fits: the VMM decides that at each start, boots when it does not, and says why in its log (`vmm-log` of
//! the container's directory).

use std::{
    fs::{self, File},
    io::Read,
    os::{
        fd::AsRawFd,
        unix::{fs::DirBuilderExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use coffer_protocol::template_mac;
use nix::sched::{CloneFlags, unshare};

use crate::{
    error::{Error, host},
    home::Home,
    network, spawn,
};

/// Below the root directory; no container's id has such a letter.
const DIRECTORY: &str = "@templates";
/// A boot takes less than this everywhere.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// Most network devices of a machine.
pub const MOST_NETS: usize = 3;

/// Which machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The IGVM file.
    pub image: PathBuf,
    /// RAM.
    pub memory_mib: u64,
    /// Processors.
    pub vcpus: u32,
    /// Network devices.
    pub nets: usize,
}

impl Shape {
    /// Name of its directory.
    #[must_use]
    pub fn name(&self) -> String {
        let image = self.image.file_stem().unwrap_or_default().to_string_lossy();
        format!("{image}-{}mib-{}cpu-{}net", self.memory_mib, self.vcpus, self.nets)
    }

    /// Its directory, which need not exist.
    #[must_use]
    pub fn directory(&self, root: &Path) -> PathBuf {
        root.join(DIRECTORY).join(self.name())
    }
}

/// Fresh random bytes for a machine that may share its generator's state with others.
///
/// # Errors
/// The system's.
pub fn entropy() -> Result<[u8; 32], Error> {
    let mut bytes = [0; 32];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(host("read /dev/urandom"))?;
    Ok(bytes)
}

/// Boots a machine and saves it; one that was saved before is replaced. Pods that started from that are not disturbed.
///
/// # Errors
/// The VMM's words.
pub fn make(root: &Path, shape: &Shape) -> Result<PathBuf, Error> {
    let directory = shape.directory(root);
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&directory).map_err(host("make the template's directory"))?;
    let scratch = directory.join("boot");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(scratch.join("share")).map_err(host("make the template's directory"))?;
    let result = boot(shape, &directory, &scratch);
    let _ = fs::remove_dir_all(&scratch);
    result.map(|()| directory)
}

fn boot(shape: &Shape, directory: &Path, scratch: &Path) -> Result<(), Error> {
    let home = Home::find()?;
    let log = scratch.join("log");
    let mut command = Command::new(home.vmm());
    command.arg("--image").arg(&shape.image).arg("--make-template").arg(directory);
    command.args(["--memory-mib", &shape.memory_mib.to_string(), "--vcpus", &shape.vcpus.to_string()]);
    command.arg("--vsock").arg(scratch.join("vsock")).arg("--fs").arg(scratch.join("share"));
    command.arg("--log").arg(&log);
    let mut taps = Vec::new();
    if shape.nets > 0 {
        // Of no network: nothing is on the other side, and no name is taken.
        unshare(CloneFlags::CLONE_NEWNET).map_err(host("make a network namespace for the template"))?;
    }
    for position in 0..shape.nets {
        let tap = network::open_tap(&format!("coffer{position}")).map_err(host("make a tap"))?;
        command.args(["--net", &format!("fd={},mac={}", tap.as_raw_fd(), template_mac(position))]);
        taps.push(tap);
    }
    let kept: Vec<i32> = taps.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec; only descriptors' flags are changed.
    unsafe { command.pre_exec(move || spawn::inherit_only(&kept)) };
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    let mut vmm = command.spawn().map_err(host(format!("start {}", home.vmm().display())))?;
    let began = Instant::now();
    loop {
        match vmm.try_wait().map_err(host("wait for the VMM"))? {
            Some(status) if status.success() && directory.join("state").exists() => return Ok(()),
            Some(_) => {
                let words = fs::read_to_string(&log).unwrap_or_default();
                return Err(Error::Vm(words.lines().last().unwrap_or("it did not say why").to_owned()));
            }
            None if began.elapsed() < BOOT_LIMIT => thread::sleep(Duration::from_millis(5)),
            None => {
                let _ = vmm.kill();
                let _ = vmm.wait();
                return Err(Error::Vm(format!("its init was not ready within {} s", BOOT_LIMIT.as_secs())));
            }
        }
    }
}

/// Names of the templates that are there.
#[must_use]
pub fn list(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join(DIRECTORY)).into_iter().flatten().flatten();
    let whole = entries.filter(|entry| entry.path().join("state").exists());
    let mut names: Vec<String> = whole.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Removes one. Pods that started from it go on.
///
/// # Errors
/// [`Error::State`] when there is none of that name.
pub fn remove(root: &Path, name: &str) -> Result<(), Error> {
    let is_there = fs::read_dir(root.join(DIRECTORY)).into_iter().flatten().flatten();
    if !is_there.into_iter().any(|entry| entry.file_name() == name) {
        return Err(Error::State(format!("no template `{name}`: see coffer template list")));
    }
    let all = root.join(DIRECTORY);
    fs::remove_dir_all(all.join(name)).map_err(host(format!("remove template {name}")))?;
    // The last one's; another one's keeps it.
    let _ = fs::remove_dir(all);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_listed_and_removed_by_name_alone() {
        let root = tempfile::tempdir().unwrap();
        let shape = Shape { image: "/i/up.igvm".into(), memory_mib: 512, vcpus: 1, nets: 1 };
        let directory = shape.directory(root.path());
        fs::create_dir_all(&directory).unwrap();
        assert!(list(root.path()).is_empty());
        fs::write(directory.join("state"), "").unwrap();
        assert_eq!(list(root.path()), ["up-512mib-1cpu-1net"]);
        for name in ["", ".", "..", "../x", "other"] {
            assert!(remove(root.path(), name).is_err(), "{name}");
        }
        remove(root.path(), "up-512mib-1cpu-1net").unwrap();
        assert!(!directory.exists());
    }
}
