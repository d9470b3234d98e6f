//! A pod's VM that runs and is to be larger, or may be smaller.
//!
//! Owns: how much memory and how many processors the pod's containers need together, the order of host's cgroup, VM and guest, how long a guest is waited for.
//! Does not own: a container's own limits (`commands::update`), how memory gets into the guest (the VMM and the guest's kernel).
//!
//! What a VM booted with it keeps: it grows beyond that and shrinks back to it.

use std::{
    fs::{self, File},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use coffer_protocol::{Request, vm::VmSize};
use nix::fcntl::{Flock, FlockArg};
use oci_spec::runtime::Spec;

use crate::{
    cgroup, client,
    error::{Error, host},
    plan, scratch,
    state::{self, Directory, Record},
};

/// In a container's directory: what an update gave it in place of its configuration's, the memory limit in bytes and the processors that its
/// quota is worth.
const LIMIT: &str = "memory-limit";
const PROCESSORS: &str = "processors";
/// A guest that takes or gives nothing for so long will not.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for memory that it is asked to give back: it may be in use.
const SHRINK_PATIENCE: Duration = Duration::from_secs(5);
/// A guest that takes some and gives some is not waited for any longer, whatever it does.
const LONGEST: Duration = Duration::from_secs(5 * 60);
const POLL: Duration = Duration::from_millis(10);

/// What a VM is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Is large enough, and has nothing to give back.
    Stay,
    /// To this many MiB more than it booted with, which is more than now.
    Grow(u64),
    /// To this many MiB more than it booted with, which is less than now.
    Shrink(u64),
}

/// How a VM becomes as large as it needs to be. `None`: nobody says how large.
#[must_use]
pub fn change(size: &VmSize, needed_mib: Option<u64>) -> Change {
    let Some(needed_mib) = needed_mib else { return Change::Stay };
    let wanted = needed_mib.saturating_sub(size.boot_mib).next_multiple_of(2);
    match wanted.cmp(&size.wanted_mib) {
        std::cmp::Ordering::Greater => Change::Grow(wanted),
        std::cmp::Ordering::Less => Change::Shrink(wanted),
        std::cmp::Ordering::Equal => Change::Stay,
    }
}

/// Why a VM is not that many MiB larger than it booted, and what helps where no more can ever come.
fn too_small(size: &VmSize, wanted_mib: u64, reason: &str) -> String {
    let (boot, wanted) = (size.boot_mib, size.boot_mib.saturating_add(wanted_mib));
    let remedy = match size.most_mib {
        0 => format!(
            "; make it with annotation {}={wanted} to have so many from its start",
            plan::MEMORY_ANNOTATION
        ),
        _ => String::new(),
    };
    format!("memory: the VM booted with {boot} MiB and needs {wanted}: {reason}{remedy}")
}

/// Whether a VM that runs can have as many processors as a further container's quota is worth.
///
/// # Errors
/// What the container does not get, and what helps.
pub fn enough_for_a_member(own: u32, size: &VmSize) -> Result<(), Error> {
    if own <= size.vcpus {
        return Ok(());
    }
    let (has, most) = (size.vcpus, plan::MOST_VCPUS_ANNOTATION);
    Err(Error::State(format!(
        "processors: the container may use {own}, and its pod's VM was made with {has}: annotate the pod's first container with {}={own}, or without a TEE {most}={own}, so that they wait until they are needed",
        plan::VCPUS_ANNOTATION
    )))
}

/// A VM that runs, while nobody else changes its size.
pub struct Vm<'a> {
    root: &'a Path,
    directory: &'a Directory,
    record: &'a Record,
    /// As it is now.
    pub size: VmSize,
    _lock: Flock<File>,
}

impl<'a> Vm<'a> {
    /// The VM of a container.
    ///
    /// # Errors
    /// [`Error::VmGone`], or the VMM's answer.
    pub fn of(root: &'a Path, directory: &'a Directory, record: &'a Record) -> Result<Self, Error> {
        // All of the VM's containers have it. A VMM that has ended reads no more: this must not wait for one.
        let lifeline =
            File::options().write(true).custom_flags(libc::O_NONBLOCK).open(directory.file("lifeline"));
        let lock = Flock::lock(lifeline.map_err(|_| Error::VmGone)?, FlockArg::LockExclusive);
        let lock = lock.map_err(|(_, e)| host("wait for others that change the VM")(e))?;
        let size = client::vm_size(&directory.socket(), None)?;
        Ok(Self { root, directory, record, size, _lock: lock })
    }

    /// MiB that the VM needs for its containers, this one with a limit of so many bytes: as a VM that is made for one with their
    /// limits together. Those without a limit have what there is; `None` when this one has none.
    pub fn needed_mib(&self, limit: i64) -> Option<u64> {
        u64::try_from(limit).ok()?;
        let mut bytes = 0u64;
        let mut scratch_mib = 0;
        for (directory, record) in state::all(self.root) {
            let own = record.id == self.record.id;
            let alive = own || record.stub.is_some_and(|stub| stub.is_alive());
            if record.vmm != self.record.vmm || !alive {
                continue;
            }
            let (of_configuration, disk) = configured(&directory);
            let limit = if own { Some(limit) } else { updated(&directory).or(of_configuration) };
            bytes = bytes.saturating_add(u64::try_from(limit.unwrap_or(0)).unwrap_or(0));
            scratch_mib += disk;
        }
        Some(plan::vm_memory_mib(bytes, scratch_mib))
    }

    /// Processors that the VM needs for its containers, this one with so many: what the largest of them has. One without a quota has those
    /// that the VM booted with.
    #[must_use]
    pub fn needed_processors(&self, own: u32) -> u32 {
        let others = state::all(self.root).into_iter().filter(|(_, record)| {
            let alive = record.stub.is_some_and(|stub| stub.is_alive());
            record.id != self.record.id && record.vmm == self.record.vmm && alive
        });
        let of = |directory: &Directory| number(directory, PROCESSORS).or_else(|| quota(directory));
        let others = others.map(|(directory, _)| of(&directory).unwrap_or(self.size.boot_vcpus));
        others.fold(own, u32::max).min(self.size.vcpus)
    }

    /// Has so many of the VM's processors work, where it has some that wait.
    ///
    /// # Errors
    /// The guest's.
    pub fn set_processors(&self, online: u32) -> Result<(), Error> {
        if self.size.boot_vcpus == self.size.vcpus {
            return Ok(());
        }
        client::ask(&self.directory.socket(), &Request::Processors { online }).map(drop)
    }

    /// Makes the VM larger: first its host's cgroup, where it has one of its own, then the VM.
    ///
    /// # Errors
    /// The VMM's reason, or that the guest did not take it. It is then as large as before.
    pub fn grow(&mut self, wanted_mib: u64) -> Result<(), Error> {
        let before = self.size;
        let more = wanted_mib.saturating_sub(before.wanted_mib);
        self.widen(i64::try_from(more << 20).unwrap_or(i64::MAX))?;
        let grown = self.ask(wanted_mib).and_then(|()| {
            client::ask(&self.directory.socket(), &Request::TakeMemory)?;
            self.settle(PATIENCE)
        });
        let reason = match grown {
            Ok(()) if self.size.plugged_mib >= wanted_mib => return Ok(()),
            Ok(()) => format!("its guest took {} MiB more and no further", self.size.plugged_mib),
            Err(error) => error.to_string(),
        };
        // As before, as far as that goes.
        let _ = self.ask(before.wanted_mib);
        let _ = self.widen(-i64::try_from(more << 20).unwrap_or(i64::MAX));
        Err(Error::State(too_small(&before, wanted_mib, &reason)))
    }

    /// Asks the VM to be smaller, then its host's cgroup. The MiB over what was wanted that the guest keeps; it gives them back when it
    /// can.
    ///
    /// # Errors
    /// When there is no VM.
    pub fn shrink(&mut self, wanted_mib: u64) -> Result<u64, Error> {
        let before = self.size.plugged_mib;
        self.ask(wanted_mib)?;
        self.settle(SHRINK_PATIENCE)?;
        let less = before.saturating_sub(self.size.plugged_mib);
        self.widen(-i64::try_from(less << 20).unwrap_or(i64::MAX))?;
        Ok(self.size.plugged_mib.saturating_sub(wanted_mib))
    }

    /// Bytes that the VM's containers can have of what it has.
    #[must_use]
    pub fn least(&self) -> i64 {
        let mib = (self.size.boot_mib + self.size.plugged_mib).saturating_sub(plan::GUEST_OVERHEAD_MIB);
        i64::try_from(mib << 20).unwrap_or(i64::MAX)
    }

    /// MiB that the guest may use of the host's, or will when it has so many beyond what it booted with: it is not killed for what it has not
    /// given back. `None` when the VM's process is in another container's cgroup, or in none.
    #[must_use]
    pub fn own_mib(&self, wanted_mib: u64) -> Option<u64> {
        let more = wanted_mib.max(self.size.wanted_mib).max(self.size.plugged_mib);
        self.is_in_own_cgroup().then(|| self.size.boot_mib.saturating_add(more))
    }

    /// Whether the VM's process is in this container's own cgroup.
    #[must_use]
    pub fn is_in_own_cgroup(&self) -> bool {
        self.record.cgroup.is_some() && cgroup::of(self.record.vmm.pid) == self.record.cgroup
    }

    fn ask(&mut self, wanted_mib: u64) -> Result<(), Error> {
        let wanted = u32::try_from(wanted_mib).unwrap_or(u32::MAX);
        self.size = client::vm_size(&self.directory.socket(), Some(wanted))?;
        Ok(())
    }

    /// Waits until the guest has what is wanted, no more and no less, or does nothing about it for a while.
    fn settle(&mut self, patience: Duration) -> Result<(), Error> {
        let began = Instant::now();
        let mut since = began;
        let waits = |since: Instant| since.elapsed() < patience && began.elapsed() < LONGEST;
        while self.size.plugged_mib != self.size.wanted_mib && waits(since) {
            thread::sleep(POLL);
            let size = client::vm_size(&self.directory.socket(), None)?;
            if size.plugged_mib != self.size.plugged_mib {
                since = Instant::now();
            }
            self.size = size;
        }
        Ok(())
    }

    /// Changes the limit of the cgroup that the VM's process is in, when that is another container's: of this one the caller sets it.
    fn widen(&self, bytes: i64) -> Result<(), Error> {
        match cgroup::of(self.record.vmm.pid) {
            Some(group) if !self.is_in_own_cgroup() => cgroup::widen(&group, bytes),
            _ => Ok(()),
        }
    }
}

/// Has a pod's VM give back what it grew by for a container that has ended, where others go on in it.
///
/// # Errors
/// When there is no VM.
pub fn give_back(root: &Path, directory: &Directory, record: &Record) -> Result<(), Error> {
    let mut vm = Vm::of(root, directory, record)?;
    let memory = match change(&vm.size, vm.needed_mib(0)) {
        Change::Shrink(mib) => vm.shrink(mib).map(drop),
        Change::Stay | Change::Grow(_) => Ok(()),
    };
    vm.set_processors(vm.needed_processors(1)).and(memory)
}

/// Remembers what a container has from an update: a memory limit, processors.
///
/// # Errors
/// The system's.
pub fn remember(directory: &Directory, limit: Option<i64>, processors: Option<u32>) -> Result<(), Error> {
    let write = |name: &str, text: String| state::write_whole(&directory.file(name), text.as_bytes());
    limit.map_or(Ok(()), |limit| write(LIMIT, limit.to_string()))?;
    processors.map_or(Ok(()), |count| write(PROCESSORS, count.to_string()))
}

fn number<T: std::str::FromStr>(directory: &Directory, name: &str) -> Option<T> {
    fs::read_to_string(directory.file(name)).ok()?.trim().parse().ok()
}

fn updated(directory: &Directory) -> Option<i64> {
    number(directory, LIMIT)
}

/// A container's configuration, as `create` read it.
fn configuration(directory: &Directory) -> Option<Spec> {
    let text = fs::read(directory.file("config.json")).ok()?;
    plan::read(&text).ok().map(|(_, spec)| spec)
}

/// Processors that the quota of a container's configuration is worth.
fn quota(directory: &Directory) -> Option<u32> {
    let spec = configuration(directory)?;
    plan::resources(&spec)?.cpu().as_ref().and_then(plan::quota_vcpus)
}

/// The memory limit of a container's configuration in bytes, and the MiB that its scratch disk takes of memory.
fn configured(directory: &Directory) -> (Option<i64>, u64) {
    let Some(spec) = configuration(directory) else { return (None, 0) };
    let limit = plan::resources(&spec).and_then(|r| r.memory().as_ref()).and_then(|m| m.limit());
    let disk = scratch::wanted(&spec).ok().flatten().map_or(0, scratch::memory_mib);
    (limit, disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_grows_beyond_what_it_booted_with_and_shrinks_back_to_it() {
        let size = VmSize { boot_mib: 192, ..VmSize::default() };
        assert_eq!(change(&size, Some(0)), Change::Stay);
        assert_eq!(change(&size, Some(192)), Change::Stay);
        assert_eq!(change(&size, Some(193)), Change::Grow(2));
        assert_eq!(change(&size, Some(576)), Change::Grow(384));
        let size = VmSize { wanted_mib: 384, plugged_mib: 384, ..size };
        assert_eq!(change(&size, Some(576)), Change::Stay);
        assert_eq!(change(&size, Some(700)), Change::Grow(508));
        assert_eq!(change(&size, Some(300)), Change::Shrink(108));
        assert_eq!(change(&size, Some(0)), Change::Shrink(0));
        assert_eq!(change(&size, None), Change::Stay, "without a limit it keeps what it has");
    }

    #[test]
    fn a_vm_that_cannot_grow_says_how_it_is_made_larger() {
        let size = VmSize { boot_mib: 192, ..VmSize::default() };
        assert_eq!(
            too_small(&size, 384, "it is in a TEE"),
            "memory: the VM booted with 192 MiB and needs 576: it is in a TEE; \
             make it with annotation io.coffer.memory-mib=576 to have so many from its start"
        );
        let size = VmSize { most_mib: 256, ..size };
        assert_eq!(
            too_small(&size, 384, "at most 256 MiB can come"),
            "memory: the VM booted with 192 MiB and needs 576: at most 256 MiB can come"
        );
    }

    #[test]
    fn a_limit_is_the_last_updates_or_the_configurations() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), "a").unwrap();
        directory.create().unwrap();
        assert_eq!((configured(&directory), updated(&directory)), ((None, 0), None));
        // A capability that nobody knows is no reason to overlook the rest.
        let text = r#"{"ociVersion":"1.0.2","annotations":{"io.coffer.scratch":"2G"},
            "process":{"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"capabilities":{"bounding":["CAP_NEWER"]}},
            "linux":{"resources":{"memory":{"limit":1048576},"cpu":{"quota":300000,"period":100000}}}}"#;
        fs::write(directory.file("config.json"), text).unwrap();
        assert_eq!((configured(&directory), quota(&directory)), ((Some(1 << 20), 14), Some(3)));
        remember(&directory, Some(-1), Some(3)).unwrap();
        remember(&directory, None, None).unwrap();
        assert_eq!((updated(&directory), number(&directory, PROCESSORS)), (Some(-1), Some(3)));
    }
}
