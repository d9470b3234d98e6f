//! What each request of the host does, and which may be made when.
//!
//! Owns: the pod's setting up, that it comes first and once, and that the owner's policy is asked before anything is done. Does not
//! own: containers' states (`containers`), what the policy says (`confidential`).

use std::time::Duration;

use coffer_protocol::{ErrorKind, Reply, Request, Sandbox, VERSION};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

use super::{Server, containers::no_container};
use crate::{
    boot,
    confidential::Confidential,
    container::ContainerError,
    image::{Images, Room},
    memory, network, processors, random,
};

impl Server {
    /// Does it. The answer is the reply, or what becomes one; `None` is one that comes later.
    pub(super) fn request(&mut self, key: u64, request: Request) -> Result<Option<Reply>, ContainerError> {
        let request = self.admit(request)?;
        match request {
            Request::Sandbox(sandbox) => {
                set_up(&sandbox)?;
                self.confidential()?.serve_workload()?;
            }
            Request::Network(wanted) => {
                // What a container has added to the network is its own.
                let applied = if self.had_start { network::apply(&wanted) } else { network::renew(&wanted) };
                applied.map_err(|e| ContainerError::new(ErrorKind::Guest, e.to_string()))?;
            }
            Request::Create(create) => return self.create(key, *create).map(|()| None),
            Request::Start { id } => return self.start(key, id).map(|()| None),
            Request::Exec(exec) => return self.exec(key, *exec).map(|()| None),
            Request::Signal { target, signal } => self.signal(&target, signal)?,
            Request::Freeze { id, frozen } => {
                let cgroup = &self.get(&id)?.cgroup;
                cgroup.freeze(frozen).map_err(|e| ContainerError::guest("freeze the container", e))?;
                // Other containers are not to wait for this one's processes.
                if frozen && !cgroup.stands_still() {
                    return Ok(Some(Reply::Stopping));
                }
            }
            Request::Update { id, resources } => {
                let resources = serde_json::from_value(resources)
                    .map_err(|e| ContainerError::new(ErrorKind::Invalid, format!("resources: {e}")))?;
                self.get(&id)?.cgroup.apply(&resources)?;
            }
            Request::TakeMemory => memory::take()?,
            Request::Processors { online } => processors::set_online(online)?,
            Request::Processes { id } => {
                let command_lines = self.confidential()?.allows_command_lines(&id);
                return Ok(Some(Reply::Processes { list: self.get(&id)?.cgroup.list(command_lines) }));
            }
            Request::Stats { id } => {
                return Ok(Some(Reply::Stats(Box::new(self.get(&id)?.cgroup.stats()))));
            }
            Request::Delete { id } => {
                let container = self.containers.get(&id).ok_or_else(|| no_container(&id))?;
                if !container.ended {
                    return Err(ContainerError::new(
                        ErrorKind::WrongState,
                        format!("container {id:?} is running"),
                    ));
                }
                self.forget(&id);
            }
            Request::Shutdown => self.over = true,
        }
        Ok(Some(Reply::Done))
    }

    /// Lets a request in: after the pod's setting up, and when the owner's policy allows it. The owner's word holds for the
    /// pod's life: a host that sends another is refused.
    fn admit(&mut self, mut request: Request) -> Result<Request, ContainerError> {
        if let Request::Sandbox(sandbox) = &request {
            check_version(sandbox)?;
            if self.confidential.is_some() {
                return Err(ContainerError::new(ErrorKind::WrongState, "the pod is set up already"));
            }
            if let Some(entropy) = &sandbox.entropy {
                // Before anything that draws a random number, a key above all.
                random::reseed(entropy)
                    .map_err(|e| ContainerError::guest("reseed the random number generator", e))?;
            }
            let mut confidential = Confidential::new(sandbox.initdata.as_deref())?;
            confidential.check(&request)?;
            confidential.ask_for_names(&sandbox.name_servers);
            let room = if sandbox.scratch { Room::Disk } else { Room::Memory };
            self.images = Images::new(confidential.owner()?, room);
            self.confidential = Some(confidential);
        } else if self.confidential.is_some() || !matches!(request, Request::Shutdown) {
            if let Request::Exec(exec) = &mut request {
                // The policy judges what will run.
                self.complete(exec);
            }
            // A machine in which nothing is yet may be ended by anybody.
            self.confidential()?.check(&request)?;
        }
        Ok(request)
    }

    pub(super) fn confidential(&mut self) -> Result<&mut Confidential, ContainerError> {
        let none = || ContainerError::new(ErrorKind::WrongState, "the pod is not set up");
        self.confidential.as_mut().ok_or_else(none)
    }
}

fn check_version(sandbox: &Sandbox) -> Result<(), ContainerError> {
    if sandbox.version == VERSION {
        return Ok(());
    }
    let message = format!(
        "the host speaks protocol version {}, this image version {VERSION}: build both from one source",
        sandbox.version
    );
    Err(ContainerError::new(ErrorKind::Invalid, message))
}

/// What makes this pod itself. Nothing of it may happen before init is ready: a machine that is saved then, and started many times,
/// has no share, no random numbers that were given out, no name and no time of its own.
fn set_up(sandbox: &Sandbox) -> Result<(), ContainerError> {
    if let Err(error) = boot::mount_share() {
        // A guest without a share has no root file systems from the host; create says so.
        boot::complain(&format!("coffer-init: {error}"));
    }
    // The kernel's own is "(none)", which is no name that anything takes.
    let name = sandbox.hostname.as_deref().unwrap_or("localhost");
    nix::unistd::sethostname(name).map_err(|e| ContainerError::guest("set the host name", e))?;
    let time = TimeSpec::from_duration(Duration::from_nanos(sandbox.unix_time_ns));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|e| ContainerError::guest("set the clock", e))?;
    network::apply(&sandbox.network).map_err(|e| ContainerError::new(ErrorKind::Guest, e.to_string()))
}
