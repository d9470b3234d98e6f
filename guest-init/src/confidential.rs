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
        if let Request::Delete { id } = request {
            self.containers.remove(id);
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

    /// Forgets what was opened for a container.
    pub fn close_files(&self, id: &str) {
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
mod tests {
    use super::*;
    use coffer_attestation::evidence::Sample;
    use coffer_protocol::{Exec, Interface, NamespaceKind, Network, Sandbox, VERSION};

    fn pod(policy: &str) -> Result<Confidential, ContainerError> {
        let text = format!(
            "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''\n{policy}'''\n"
        );
        Confidential::with(Some(&text), Attesters::of(Sample))
    }

    fn exec(program: &str) -> Request {
        Request::Exec(Box::new(Exec {
            cgroup: None,
            id: "c".into(),
            exec_id: "e".into(),
            process: json!({ "args": [program] }),
            window: None,
            streams: Vec::new(),
        }))
    }

    #[test]
    fn a_policy_is_told_who_the_container_runs_as() {
        let rule = "package agent_policy\nimport rego.v1\nCreateContainerRequest := true\nRemoveContainerRequest := true\n\
            ExecProcessRequest if input.process.User.UID == input.container.User.UID\n";
        let mut pod = pod(rule);
        let as_root = exec("ls");
        pod.as_mut().unwrap().check(&as_root).unwrap_err();
        let mut pod = pod.unwrap();
        let spec = |uid: u32| json!({ "process": { "user": { "uid": uid, "gid": 8 } } });
        pod.check_container("c", &spec(7), None, &[]).unwrap();
        pod.check(&as_root).unwrap_err();
        pod.check_container("c", &spec(0), None, &[]).unwrap();
        pod.check(&as_root).unwrap();
        pod.check(&Request::Delete { id: "c".into() }).unwrap();
        pod.check(&as_root).unwrap_err();
    }

    #[test]
    fn the_owners_policy_decides_request_by_request() {
        let mut pod = pod(
            "package agent_policy\nimport rego.v1\ndefault ExecProcessRequest := false\nExecProcessRequest if input.process.Args[0] == \"ls\"\nStartContainerRequest := true\n",
        )
        .unwrap();
        pod.check(&exec("ls")).unwrap();
        let message = pod.check(&exec("sh")).unwrap_err().message;
        assert!(message.starts_with("policy: ExecProcessRequest denied"), "{message}");
        pod.check(&Request::Start { id: "c".into() }).unwrap();
        assert!(pod.check(&Request::Shutdown).is_err(), "a rule that is not there denies");
        assert!(!pod.allows_stdin("c") && !pod.allows_output("c"));
        let message = pod.check_notify("c", USUAL, &notifies()).unwrap_err().message;
        assert!(message.starts_with("policy: ReadStreamRequest denied"), "{message}");
        let message = pod.check_notify("c", "/dev/log", &notifies()).unwrap_err().message;
        assert!(message.starts_with("NOTIFY_SOCKET: "), "{message}");
        Confidential::with(None, Attesters::of(Sample))
            .unwrap()
            .check_notify("c", "/dev/log", &Value::Null)
            .unwrap();
    }

    const USUAL: &str = "/run/notify/notify.sock";

    fn notifies() -> Value {
        json!({ "mounts": [{ "destination": "/run/notify", "type": "tmpfs", "source": "notify" }] })
    }

    #[test]
    fn a_policy_is_told_what_the_container_is_and_its_images_stop_signal() {
        let rule = "package agent_policy\nimport rego.v1\nCreateContainerRequest := true\nRemoveContainerRequest := true\n\
            ExecProcessRequest if { input.container.image == \"sha256:00\"; input.container.Args == [\"app\"] }\n\
            SignalProcessRequest if input.signal == input.stop_signal\n";
        let mut pod = pod(rule).unwrap();
        let image = ImageSource {
            blobs: String::new(),
            digest: "sha256:00".into(),
            name: None,
            signatures: Vec::new(),
            simple_signatures: Vec::new(),
        };
        let spec = |program: &str| json!({ "process": { "args": [program] } });
        let quit = |target: SignalTarget| Request::Signal { target, signal: 3 };
        for (spec, image, allowed) in
            [(spec("app"), None, false), (spec("sh"), Some(&image), false), (spec("app"), Some(&image), true)]
        {
            pod.check_container("c", &spec, image, &[]).unwrap();
            assert_eq!(pod.check(&exec("ls")).is_ok(), allowed, "{spec}");
            pod.check(&quit(SignalTarget::Init("c".into()))).unwrap_err();
        }
        pod.remember_stop_signal("c", Some(3));
        pod.check(&quit(SignalTarget::Init("c".into()))).unwrap();
        pod.check(&quit(SignalTarget::All("c".into()))).unwrap();
        pod.check(&quit(SignalTarget::Init("d".into()))).unwrap_err();
        pod.check(&Request::Delete { id: "c".into() }).unwrap();
        pod.check(&quit(SignalTarget::Init("c".into()))).unwrap_err();
    }

    #[test]
    fn a_policy_is_told_whose_processes_a_container_shares() {
        let rule = "package agent_policy\nimport rego.v1\nCreateContainerRequest if input.OCI.Linux.Shared == [\"pid\"]\n";
        let mut pod = pod(rule).unwrap();
        let shared = SharedNamespace { kind: NamespaceKind::Pid, container: "b".into() };
        pod.check_container("c", &json!({}), None, &[]).unwrap_err();
        pod.check_container("c", &json!({}), None, &[shared]).unwrap();
    }

    #[test]
    fn command_lines_are_the_owners_to_show_apart_from_the_list() {
        let list = "package agent_policy\nimport rego.v1\nListProcessesRequest := true\n";
        assert!(!pod(list).unwrap().allows_command_lines("c"));
        assert!(pod(&format!("{list}ListCommandLinesRequest := true\n")).unwrap().allows_command_lines("c"));
        assert!(Confidential::with(None, Attesters::of(Sample)).unwrap().allows_command_lines("c"));
    }

    #[test]
    fn a_network_or_a_name_that_the_owner_did_not_mean_is_refused() {
        let mut pod = pod("package agent_policy\nimport rego.v1\n\
            default CreateSandboxRequest := false\nCreateSandboxRequest if input.hostname == \"web\"\n\
            default UpdateInterfaceRequest := false\n\
            UpdateInterfaceRequest if { every i in input.interfaces { i.name == \"eth0\" } }\n\
            reasons contains {\"field\": \"hostname\", \"value\": input.hostname, \"allowed\": \"web\"} if input.hostname != \"web\"\n\
            reasons contains {\"field\": \"interfaces\", \"value\": i.name, \"allowed\": \"eth0\"} if { some i in input.interfaces; i.name != \"eth0\" }\n")
        .unwrap();
        let network = |name: &str| {
            let address = vec!["10.88.0.2/16".to_owned()];
            let interface =
                Interface { name: name.into(), mac: String::new(), mtu: 1500, addresses: address };
            Network { interfaces: vec![interface], ..Network::default() }
        };
        let sandbox = |hostname: &str, network: Network| {
            Request::Sandbox(Sandbox {
                version: VERSION,
                hostname: Some(hostname.into()),
                unix_time_ns: 0,
                network,
                entropy: None,
                initdata: None,
                name_servers: Vec::new(),
                scratch: false,
            })
        };
        pod.check(&sandbox("web", network("eth0"))).unwrap();
        pod.check(&Request::Network(network("eth0"))).unwrap();
        pod.check(&Request::Network(Network::default())).unwrap();
        let mut denied = |request: &Request| pod.check(request).unwrap_err().message;
        let name = "policy: CreateSandboxRequest denied: hostname is \"other\", allowed: \"web\"";
        assert_eq!(denied(&sandbox("other", network("eth0"))), name);
        let interface = "policy: UpdateInterfaceRequest denied: interfaces is \"eth1\", allowed: \"eth0\"";
        assert_eq!(denied(&sandbox("web", network("eth1"))), interface);
        assert_eq!(denied(&Request::Network(network("eth1"))), interface);
    }

    #[test]
    fn notifications_are_the_owners_to_allow_apart_from_output() {
        let rule = "ReadStreamRequest if not input.notify\n";
        let quiet =
            format!("package agent_policy\nimport rego.v1\ndefault ReadStreamRequest := false\n{rule}");
        let mut pod = pod(&quiet).unwrap();
        assert!(pod.allows_output("c"));
        let message = pod.check_notify("c", USUAL, &notifies()).unwrap_err().message;
        assert!(message.starts_with("policy: ReadStreamRequest denied"), "{message}");
        let rule = format!("ReadStreamRequest if input.path == \"{USUAL}\"\n");
        let mut open = self::pod(&format!("package agent_policy\nimport rego.v1\n{rule}")).unwrap();
        open.check_notify("c", USUAL, &notifies()).unwrap();
    }

    #[test]
    fn the_clocks_of_an_owners_pod_are_not_the_hosts_to_choose() {
        let all = "package agent_policy\nimport rego.v1\nCreateContainerRequest := true\n";
        let shifted = json!({ "linux": { "timeOffsets": { "boottime": { "secs": 1 } } } });
        let mut owned = pod(all).unwrap();
        owned.check_container("c", &json!({ "linux": { "timeOffsets": {} } }), None, &[]).unwrap();
        let message = owned.check_container("c", &shifted, None, &[]).unwrap_err().message;
        assert!(message.starts_with("linux.timeOffsets: "), "{message}");
        Confidential::with(None, Attesters::of(Sample))
            .unwrap()
            .check_container("c", &shifted, None, &[])
            .unwrap();
    }

    #[test]
    fn a_process_leaves_its_memory_in_no_file_where_an_owner_has_a_say() {
        let open = Confidential::with(None, Attesters::of(Sample)).unwrap();
        let owned = pod("package agent_policy\n").unwrap();
        let none = json!({ "type": "RLIMIT_CORE", "soft": 0, "hard": 0 });
        let all = json!({ "type": "RLIMIT_CORE", "soft": u64::MAX, "hard": u64::MAX });
        for limits in [Value::Null, json!([]), json!([all, all])] {
            let mut process = json!({ "rlimits": limits });
            open.forbid_cores(&mut process);
            assert_eq!(process["rlimits"], limits);
            owned.forbid_cores(&mut process);
            assert_eq!(process["rlimits"].as_array().unwrap().last(), Some(&none));
        }
        let mut process = json!({});
        owned.forbid_cores(&mut process);
        assert_eq!(process["rlimits"], json!([none]));
    }

    #[test]
    fn without_initdata_and_tee_nothing_is_in_the_way() {
        let mut pod = Confidential::with(None, Attesters::of(Sample)).unwrap();
        pod.check(&exec("sh")).unwrap();
        pod.check_container("c", &json!({}), None, &[]).unwrap();
        assert!(pod.allows_stdin("c") && pod.allows_output("c"));
        let mut process = json!({ "env": ["A=1", "B=sealed.x"] });
        assert!(pod.sealed_process(&json!({ "env": ["A=1"] })).unwrap().is_none());
        let sealed = pod.sealed_process(&process).unwrap().unwrap();
        let message = sealed.open_process(&mut process).unwrap_err().message;
        assert!(message.contains("environment variable B"), "{message}");
    }

    #[test]
    fn a_host_root_is_refused_by_a_policy_that_wants_an_image() {
        let mut pod = pod(
            "package agent_policy\nimport rego.v1\ndefault CreateContainerRequest := false\nCreateContainerRequest if input.image == \"sha256:00\"\nreasons contains {\"field\": \"image\", \"value\": input.image, \"allowed\": \"sha256:00\"}\n",
        )
        .unwrap();
        let image = ImageSource {
            blobs: String::new(),
            digest: "sha256:00".into(),
            name: None,
            signatures: Vec::new(),
            simple_signatures: Vec::new(),
        };
        pod.check_container("c", &json!({}), Some(&image), &[]).unwrap();
        let message = pod.check_container("c", &json!({}), None, &[]).unwrap_err().message;
        assert_eq!(message, "policy: CreateContainerRequest denied: image is null, allowed: \"sha256:00\"");
    }

    #[test]
    fn a_hook_is_the_hosts_program_and_runs_only_where_nobody_but_the_host_has_a_say() {
        let spec = json!({ "hooks": { "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo $SECRET"] }] } });
        Confidential::with(None, Attesters::of(Sample))
            .unwrap()
            .check_container("c", &spec, None, &[])
            .unwrap();
        let mut owned =
            pod("package agent_policy\nimport rego.v1\nCreateContainerRequest := true\n").unwrap();
        owned.check_container("c", &json!({}), None, &[]).unwrap();
        let message = owned.check_container("c", &spec, None, &[]).unwrap_err().message;
        assert!(message.contains("denied: OCI.Hooks is "), "{message}");
    }

    #[test]
    fn only_a_policy_that_says_so_leaves_the_process_to_the_host() {
        let image = ImageSource {
            blobs: String::new(),
            digest: "sha256:00".into(),
            name: None,
            signatures: Vec::new(),
            simple_signatures: Vec::new(),
        };
        let spec = json!({ "process": { "args": ["sh"] } });
        assert!(
            !Confidential::with(None, Attesters::of(Sample)).unwrap().allows_host_process("c", &spec, &image)
        );
        for (rule, allowed) in [
            ("CreateContainerRequest := true\n", false),
            ("HostProcessRequest if input.image == \"sha256:00\"\n", true),
            ("HostProcessRequest if input.image == \"sha256:11\"\n", false),
        ] {
            let mut pod = pod(&format!("package agent_policy\nimport rego.v1\n{rule}")).unwrap();
            assert_eq!(pod.allows_host_process("c", &spec, &image), allowed, "{rule}");
        }
    }

    #[test]
    fn initdata_that_is_none_ends_it() {
        let message = Confidential::with(Some("x"), Attesters::of(Sample)).err().unwrap().message;
        assert!(message.starts_with("initdata: "), "{message}");
        assert!(pod("package other\n").err().unwrap().message.contains("package agent_policy"));
    }
}
