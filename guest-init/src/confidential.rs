//! What init decides before it obeys: is initdata the launch's, and does its policy allow the request.
//!
//! Owns: requests in a policy's terms, what comes before sealed values are opened, the process that serves the workload's REST calls. Does
//! not own: formats and protocols (`coffer-attestation`).
//!
//! A KBS is reached over the pod's own network: that needs nothing of the VMM, and the host sees TLS either way. A pod
//! with `--network none` therefore gets no secrets.

use std::{
    collections::BTreeMap,
    net::{IpAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use coffer_attestation::{
    api,
    evidence::Attesters,
    guest::Guest,
    kbs::MOST_SERVERS,
    policy::{
        Policy, Rule, VerifiedImage, container_input, create_input, process_input, unseen, with_container,
    },
};
use coffer_protocol::{ErrorKind, ImageSource, Request, SharedNamespace, SignalTarget};
use nix::{
    mount::{MsFlags, mount},
    unistd::{ForkResult, fork},
};
use serde_json::{Value, json};

pub use crate::sealed::Sealed;
use crate::{
    boot::complain,
    container::{self, ContainerError},
    image::Owner,
    owner, secrets,
};

/// A pod that was set up.
pub struct Confidential {
    /// What only a KBS has comes through it, by a thread (`server::beside`).
    guest: Arc<Mutex<Guest>>,
    policy: Policy,
    /// The owner's files are there.
    has_credentials: Arc<AtomicBool>,
    /// The containers that were let in.
    containers: BTreeMap<String, LetIn>,
}

/// What is remembered of a container for the policy.
struct LetIn {
    /// In its terms (`container_input`).
    shown: Value,
    /// The StopSignal of its verified image.
    stop_signal: Option<u32>,
}

fn refused(error: impl std::fmt::Display) -> ContainerError {
    ContainerError::new(ErrorKind::Invalid, error.to_string())
}

/// Nobody panics while he has it, and PID 1 does not live on if anybody does.
pub(crate) fn hold(guest: &Mutex<Guest>) -> MutexGuard<'_, Guest> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Confidential {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        hold(&self.guest)
    }

    /// Checks initdata against the launch. Whatever is wrong ends the pod's making.
    ///
    /// # Errors
    /// [`ContainerError`] in the words of the check that failed.
    pub fn new(initdata: Option<&str>) -> Result<Self, ContainerError> {
        // Where reports come from on newer kernels; without it there is /dev/sev-guest.
        let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let _ = mount(Some("configfs"), "/sys/kernel/config", Some("configfs"), quiet, None::<&str>);
        Self::with(initdata, Attesters::probe())
    }

    pub(crate) fn with(initdata: Option<&str>, attesters: Attesters) -> Result<Self, ContainerError> {
        let guest = Guest::new(initdata.map(str::as_bytes), attesters).map_err(refused)?;
        for field in guest.config().image.unused() {
            complain(&format!(
                "coffer-init: initdata: cdh.toml: image.{field} does nothing: the host brings images"
            ));
        }
        let policy = guest.policy().map_err(refused)?;
        Ok(Self {
            guest: Arc::new(Mutex::new(guest)),
            policy,
            has_credentials: Arc::default(),
            containers: BTreeMap::new(),
        })
    }

    /// Takes the host's word for who knows addresses of names; what is not an address is none of them.
    pub fn ask_for_names(&mut self, servers: &[String]) {
        let servers: Vec<IpAddr> = servers.iter().filter_map(|s| s.parse().ok()).take(MOST_SERVERS).collect();
        self.guest().ask_for_names(&servers);
    }

    /// Which images run, and their keys.
    ///
    /// # Errors
    /// [`ContainerError`] when initdata's list is not one of digests.
    pub fn owner(&self) -> Result<Owner, ContainerError> {
        owner::of(&self.guest).map_err(refused)
    }

    /// Asks the policy about a request.
    ///
    /// # Errors
    /// [`ContainerError`] with rule, field, value and what is allowed.
    pub fn check(&mut self, request: &Request) -> Result<(), ContainerError> {
        for (rule, mut input) in questions(request) {
            match request {
                Request::Exec(exec) => {
                    let container = self.containers.get(&exec.id);
                    input = with_container(input, container.map(|container| &container.shown));
                }
                Request::Signal { target: SignalTarget::Init(id) | SignalTarget::All(id), .. } => {
                    let container = self.containers.get(id);
                    input["stop_signal"] = json!(container.and_then(|container| container.stop_signal));
                }
                _ => {}
            }
            self.policy.check(rule, &input).map_err(refused)?;
        }
        Ok(())
    }

    /// Asks the policy about a container, whose configuration has what its verified image says.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_container(
        &mut self,
        id: &str,
        spec: &Value,
        image: Option<&ImageSource>,
        shared: &[SharedNamespace],
    ) -> Result<(), ContainerError> {
        if self.has_owner() {
            unseen(spec).map_err(refused)?;
            // No policy speaks of clocks.
            let offsets = spec.pointer("/linux/timeOffsets").and_then(Value::as_object);
            if offsets.is_some_and(|o| !o.is_empty()) {
                return Err(refused("linux.timeOffsets: an owner's pod has the guest's clocks"));
            }
        }
        let image = image.map(|i| VerifiedImage { digest: &i.digest, name: i.name.as_deref() });
        let mut input = create_input(id, spec, image);
        input["OCI"]["Linux"]["Shared"] = shared.iter().map(|namespace| json!(namespace.kind)).collect();
        self.policy.check(Rule::CreateContainer, &input).map_err(refused)?;
        let let_in = LetIn { shown: container_input(&input), stop_signal: None };
        self.containers.insert(id.to_owned(), let_in);
        Ok(())
    }

    /// The StopSignal of a container's verified image: a signal that this container's program is made for.
    pub fn remember_stop_signal(&mut self, id: &str, signal: Option<u32>) {
        if let Some(container) = self.containers.get_mut(id) {
            container.stop_signal = signal;
        }
    }

    /// Somebody but the host has a say.
    #[must_use]
    pub fn has_owner(&self) -> bool {
        self.guest().has_owner()
    }

    /// Whether the owner's policy leaves program, environment, user and directory of a container with a verified image to the host.
    /// [`Self::check_container`] judges them afterwards, as they are. A policy that does not say so leaves them to the image.
    pub fn allows_host_process(&mut self, id: &str, spec: &Value, image: &ImageSource) -> bool {
        let image = VerifiedImage { digest: &image.digest, name: image.name.as_deref() };
        self.policy.check(Rule::HostProcess, &create_input(id, spec, Some(image))).is_ok()
    }

    /// Whether a container's processes may be written to by the host.
    pub fn allows_stdin(&mut self, id: &str) -> bool {
        let input = json!({ "container_id": id, "stdin": true });
        self.policy.check(Rule::WriteStream, &input).is_ok()
    }

    /// Whether the host may read what a container's processes write.
    pub fn allows_output(&mut self, id: &str) -> bool {
        self.policy.check(Rule::ReadStream, &json!({ "container_id": id })).is_ok()
    }

    /// Whether the host may read the command lines of a container's processes, beside their names. A policy that does not say so keeps them:
    /// they may have secrets in them.
    pub fn allows_command_lines(&mut self, id: &str) -> bool {
        self.policy.check(Rule::ListCommandLines, &json!({ "container_id": id })).is_ok()
    }

    /// Asks whether a container's processes may send notifications to the host's service manager: that lets them write to the
    /// host, so the rule is the one for reading their output, with `notify` and the socket's path in its input. An owner's pod has it where
    /// nobody takes it for something else.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_notify(&mut self, id: &str, path: &str, spec: &Value) -> Result<(), ContainerError> {
        if self.has_owner() {
            container::check_notify(path, spec)?;
        }
        let input = json!({ "container_id": id, "notify": true, "path": path });
        self.policy.check(Rule::ReadStream, &input).map_err(refused)
    }

    /// What of a process's environment is sealed. The policy has seen it so.
    ///
    /// # Errors
    /// None.
    pub fn sealed_process(&self, process: &Value) -> Result<Option<Sealed>, ContainerError> {
        Ok(Sealed::of_process(&self.guest, process))
    }

    /// What of a container is sealed, and the owner's credentials if they are not there yet. The policy has seen the configuration.
    ///
    /// # Errors
    /// None.
    pub fn sealed(&self, spec: &Value) -> Result<Option<Sealed>, ContainerError> {
        Ok(Sealed::of(&self.guest, spec, &self.has_credentials))
    }

    /// Shows the owner's credentials to a container. The policy has seen the host's mounts.
    pub fn show_credentials(&self, spec: &mut Value) {
        if !self.guest().config().credentials.is_empty() {
            secrets::show_credentials(spec);
        }
    }

    /// Keeps a process of an owner's pod from leaving a core, whatever the host's limits say: the kernel would write its memory into its
    /// directory, which may be a volume of the host's.
    pub fn forbid_cores(&self, process: &mut Value) {
        if !self.has_owner() {
            return;
        }
        let Some(process) = process.as_object_mut() else { return };
        let limits = process.entry("rlimits").or_insert(Value::Null);
        if limits.is_null() {
            *limits = json!([]);
        }
        // Limits are set in their order: the last one holds. What is no list is no configuration either.
        if let Some(list) = limits.as_array_mut() {
            list.push(json!({ "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }));
        }
    }

    /// Forgets a container that is not, or no longer, and what was opened for it.
    pub fn forget(&mut self, id: &str) {
        self.containers.remove(id);
        secrets::remove(id);
    }

    /// Forks the process that serves the workload, where initdata gives it something to serve.
    ///
    /// # Errors
    /// [`ContainerError`] of kind `Guest`.
    pub fn serve_workload(&mut self) -> Result<(), ContainerError> {
        let wanted = {
            let guest = self.guest();
            guest.config().kbs.is_some() || guest.config().coffer.attestation_api
        };
        if !wanted {
            return Ok(());
        }
        // SAFETY: PID 1 has one thread, so the child may go on like any process.
        match unsafe { fork() }.map_err(|e| ContainerError::guest("fork the workload's server", e))? {
            ForkResult::Parent { .. } => Ok(()),
            ForkResult::Child => {
                // SAFETY: this process uses none of PID 1's descriptors beyond stdio.
                unsafe { libc::close_range(3, u32::MAX, 0) };
                // SAFETY: asks the kernel to end this process along with its parent.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                match TcpListener::bind(api::ADDRESS) {
                    Ok(listener) => api::serve(&listener, &self.guest),
                    Err(error) => {
                        complain(&format!("coffer-init: nothing is served on {}: {error}", api::ADDRESS));
                    }
                }
                std::process::exit(1)
            }
        }
    }
}

/// What the policy is asked about a request.
fn questions(request: &Request) -> Vec<(Rule, Value)> {
    let of = |id: &str| json!({ "container_id": id });
    match request {
        Request::Sandbox(sandbox) => {
            let network = serde_json::to_value(&sandbox.network).unwrap_or_default();
            vec![
                (Rule::CreateSandbox, json!({ "hostname": sandbox.hostname })),
                (Rule::UpdateInterface, network),
            ]
        }
        Request::Network(network) => {
            vec![(Rule::UpdateInterface, serde_json::to_value(network).unwrap_or_default())]
        }
        // Asked once the configuration is what will run: see `check_container`.
        Request::Create(_) => Vec::new(),
        Request::Start { id } => vec![(Rule::StartContainer, of(id))],
        Request::Exec(exec) => {
            vec![(Rule::ExecProcess, process_input(&exec.id, &exec.exec_id, &exec.process))]
        }
        Request::Signal { target, signal } => {
            let (SignalTarget::Init(id) | SignalTarget::All(id)) = target;
            let all = matches!(target, SignalTarget::All(_));
            vec![(Rule::SignalProcess, json!({ "container_id": id, "signal": signal, "all": all }))]
        }
        Request::Freeze { id, frozen } => {
            vec![(Rule::PauseContainer, json!({ "container_id": id, "frozen": frozen }))]
        }
        Request::Update { id, resources } => {
            vec![(Rule::UpdateContainer, json!({ "container_id": id, "resources": resources }))]
        }
        // No guest in a TEE obeys either.
        Request::TakeMemory | Request::Processors { .. } => Vec::new(),
        Request::Processes { id } => vec![(Rule::ListProcesses, of(id))],
        Request::Stats { id } => vec![(Rule::StatsContainer, of(id))],
        Request::Delete { id } => vec![(Rule::RemoveContainer, of(id))],
        Request::Shutdown => vec![(Rule::DestroySandbox, json!({}))],
    }
}

#[cfg(test)]
mod tests;
