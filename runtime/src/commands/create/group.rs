//! The host's cgroup of a container: systemd's scope, and the VMM in it.
//!
//! Owns: who is in it while a container is made. Does not own: its limits (`cgroup`), talking to systemd (`systemd`).

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{sys::wait::waitpid, unistd::Pid as NixPid};

use super::{Making, fork::close_others, vm::Vm};
use crate::{
    cgroup, client,
    error::{Error, host},
    spawn::clone,
    systemd::Scope,
};

/// A process that keeps a cgroup from being empty, until this is dropped.
pub(super) struct Holder(i32);

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: signals a child of this process, which was not reaped.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        let _ = waitpid(NixPid::from_raw(self.0), None);
    }
}

impl Making<'_> {
    /// Has systemd make the cgroup, with a process that does nothing.
    pub(super) fn make_scope(&self, scope: &Scope) -> Result<Holder, Error> {
        let Some(pid) = clone(0).map_err(host("fork a process for the scope"))? else {
            // SAFETY: asks the kernel to end this process along with its parent.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
            close_others(&[]);
            loop {
                nix::unistd::pause();
            }
        };
        let holder = Holder(pid);
        scope.start(pid, self.id, &self.plan.spec, self.guest_mib())?;
        Ok(holder)
    }

    /// MiB of the guest whose VMM will be in this container's cgroup: that of a VM of its own.
    pub(super) fn guest_mib(&self) -> Option<u64> {
        self.vm.is_none().then_some(self.plan.memory_mib)
    }

    /// Puts the VMM into the pod's cgroup once it has what it needs of /dev: podman's cgroup of a pod allows its processes
    /// no device at all, and the VMM's socket is there when it has opened its own.
    pub(super) fn confine(&self, vm: &mut Vm, group: &Path) -> Result<(), Error> {
        let (socket, began) = (self.directory.socket(), Instant::now());
        while !socket.exists() && vm.is_alive() && began.elapsed() < client::SOCKET_LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
        match cgroup::join(group, vm.process.pid) {
            // It has ended: why is said by who asks it next.
            Err(_) if !vm.is_alive() => Ok(()),
            other => other,
        }
    }
}
