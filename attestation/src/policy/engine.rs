//! The engine: rules of package `agent_policy`, and the words of a denial.

use std::num::{NonZeroU32, NonZeroUsize};

use regorus::{Engine, PolicyLengthConfig, Value as Rego};
use serde_json::Value;
use thiserror::Error;

use super::{CLOSED, nesting};

/// The package that holds the rules.
const PACKAGE: &str = "data.agent_policy";
/// What is allowed when initdata has no policy: everything without a TEE.
const OPEN: &str = include_str!("open.rego");
/// Initdata's own bound on the text. Lines may be long: a sealed secret in an environment is one.
const LENGTHS: PolicyLengthConfig = PolicyLengthConfig {
    max_col: NonZeroU32::new(1 << 20).unwrap(),
    max_file_bytes: NonZeroUsize::new(1 << 20).unwrap(),
    max_lines: NonZeroUsize::new(20_000).unwrap(),
};
/// Longest line of a denial, in characters.
const LONGEST_LINE: usize = 600;

/// A request, by its rule's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its name")]
pub enum Rule {
    CreateSandbox,
    UpdateInterface,
    CreateContainer,
    HostProcess,
    StartContainer,
    ExecProcess,
    SignalProcess,
    WriteStream,
    ReadStream,
    PauseContainer,
    UpdateContainer,
    ListProcesses,
    ListCommandLines,
    StatsContainer,
    RemoveContainer,
    DestroySandbox,
}

impl Rule {
    /// As it is called in a policy.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CreateSandbox => "CreateSandboxRequest",
            Self::UpdateInterface => "UpdateInterfaceRequest",
            Self::CreateContainer => "CreateContainerRequest",
            Self::HostProcess => "HostProcessRequest",
            Self::StartContainer => "StartContainerRequest",
            Self::ExecProcess => "ExecProcessRequest",
            Self::SignalProcess => "SignalProcessRequest",
            Self::WriteStream => "WriteStreamRequest",
            Self::ReadStream => "ReadStreamRequest",
            Self::PauseContainer => "PauseContainerRequest",
            Self::UpdateContainer => "UpdateContainerRequest",
            Self::ListProcesses => "ListProcessesRequest",
            Self::ListCommandLines => "ListCommandLinesRequest",
            Self::StatsContainer => "StatsContainerRequest",
            Self::RemoveContainer => "RemoveContainerRequest",
            Self::DestroySandbox => "DestroySandboxRequest",
        }
    }
}

/// A text that is no policy.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("policy.rego: {0}")]
pub struct PolicyError(String);

/// The policy says no.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("policy: {rule} denied: {reason}")]
pub struct Denied {
    /// Name of the rule.
    pub rule: &'static str,
    /// Field, value and what was allowed, on one line.
    pub reason: String,
}

/// A policy, ready to decide.
pub struct Policy {
    engine: Engine,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Policy")
    }
}

impl Policy {
    /// Reads Rego, of today's syntax or of the one before it, which upstream's generator writes.
    ///
    /// # Errors
    /// [`PolicyError`] with the engine's words about today's syntax, or that it would take the engine too long to find some.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        if nesting::bytes_read(text) > nesting::MOST {
            let words = "its lists and objects lie too deep in one another to be read in seconds: give inner ones names of their own";
            return Err(PolicyError(words.into()));
        }
        let load = |old: bool| {
            let mut engine = Engine::new();
            engine.set_rego_v0(old);
            engine.set_policy_length_config(LENGTHS);
            let package = engine.add_policy("policy.rego".into(), text.into());
            package.map(|package| (engine, package))
        };
        let (engine, package) =
            load(false).or_else(|error| load(true).map_err(|_| PolicyError(one_line(&error.to_string()))))?;
        if package != PACKAGE {
            return Err(PolicyError(format!("it is {package}: write package agent_policy")));
        }
        Ok(Self { engine })
    }

    /// What holds when initdata has none.
    ///
    /// # Panics
    /// Never: both texts are this crate's, and its tests read them.
    #[must_use]
    pub fn default_for(tee: bool) -> Self {
        Self::parse(if tee { CLOSED } else { OPEN }).expect("the texts are constants")
    }

    /// Decides. A rule that the policy does not have, or that fails, denies.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn check(&mut self, rule: Rule, input: &Value) -> Result<(), Denied> {
        let name = rule.name();
        let deny = |reason: String| Err(Denied { rule: name, reason });
        let Ok(document) = Rego::from_json_str(&input.to_string()) else {
            return deny("the request cannot be shown to the policy".into());
        };
        self.engine.set_input(document);
        match self.engine.eval_rule(format!("{PACKAGE}.{name}")) {
            Ok(decision) if decision == Rego::from(true) => Ok(()),
            Ok(decision) if decision == Rego::from(false) => deny(self.reasons()),
            Ok(_) => deny(format!("{name} is neither true nor false in the policy")),
            Err(_) => deny(format!("the policy has no {name}, or it cannot be evaluated")),
        }
    }

    fn reasons(&mut self) -> String {
        const NONE: &str = "the policy gives no reason";
        let Ok(reasons) = self.engine.eval_rule(format!("{PACKAGE}.reasons")) else { return NONE.into() };
        let Ok(Value::Array(list)) =
            reasons.to_json_str().map(|t| serde_json::from_str(&t).unwrap_or_default())
        else {
            return NONE.into();
        };
        let words: Vec<String> = list.iter().filter_map(reason).collect();
        if words.is_empty() { NONE.into() } else { one_line(&words.join("; ")) }
    }
}

fn reason(reason: &Value) -> Option<String> {
    let field = reason.get("field")?.as_str()?;
    let of_env = field.split('.').any(|part| part == ENVIRONMENT);
    let (value, allowed) = (reason.get("value")?, reason.get("allowed")?);
    Some(format!("{field} is {}, allowed: {}", shown(value, of_env), shown(allowed, of_env)))
}

/// The member that has environment variables, in every document.
const ENVIRONMENT: &str = "Env";

/// A value of a denial, with nothing of a variable but its name, in whatever form a policy writes them.
fn shown(value: &Value, of_env: bool) -> Value {
    match value {
        Value::Array(items) => items.iter().map(|item| shown(item, of_env)).collect(),
        Value::Object(members) => members
            .iter()
            .map(|(name, member)| (name.clone(), shown(member, of_env || name == ENVIRONMENT)))
            .collect(),
        Value::String(pair) if of_env => {
            pair.split_once('=').map_or_else(|| "…".to_owned(), |(name, _)| format!("{name}=…")).into()
        }
        _ if of_env => "…".into(),
        other => other.clone(),
    }
}

fn one_line(text: &str) -> String {
    let clean: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST_LINE).collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{VerifiedImage, create_input};
    use proptest::prelude::*;
    use serde_json::json;

    const RULES: [Rule; 15] = [
        Rule::CreateSandbox,
        Rule::UpdateInterface,
        Rule::CreateContainer,
        Rule::StartContainer,
        Rule::ExecProcess,
        Rule::SignalProcess,
        Rule::WriteStream,
        Rule::ReadStream,
        Rule::PauseContainer,
        Rule::UpdateContainer,
        Rule::ListProcesses,
        Rule::ListCommandLines,
        Rule::StatsContainer,
        Rule::RemoveContainer,
        Rule::DestroySandbox,
    ];

    /// A fuzzer's finding. The engine would need hours: what holds is that this comes to an end.
    #[test]
    fn lists_of_thirty_levels_are_refused_at_once() {
        for (open, close) in [("[", "]"), ("{", "}"), (r#"{"a": "#, "}"), (r#"{"a": [{"b": "#, "}]}")] {
            let text = |levels: usize| {
                format!("package agent_policy\nx := {}1{}\n", open.repeat(levels), close.repeat(levels))
            };
            let refused = Policy::parse(&text(30)).unwrap_err().to_string();
            assert!(refused.contains("too deep in one another"), "{refused}");
            assert!(Policy::parse(&text(4)).is_ok());
        }
    }

    #[test]
    fn without_a_tee_everything_is_allowed_and_under_one_what_the_host_could_look_in_with_is_not() {
        let host = json!({ "host_root": true, "image": null, "signal": 15 });
        let mut open = Policy::default_for(false);
        let mut closed = Policy::default_for(true);
        let denied = [Rule::CreateContainer, Rule::ExecProcess, Rule::WriteStream, Rule::ListCommandLines];
        for rule in RULES {
            assert_eq!(open.check(rule, &host), Ok(()));
            assert_eq!(closed.check(rule, &host).is_err(), denied.contains(&rule), "{rule:?}");
        }
        let verified = create_input("c", &ordinary(), Some(IMAGE));
        assert_eq!(closed.check(Rule::CreateContainer, &verified), Ok(()));
    }

    const IMAGE: VerifiedImage<'_> = VerifiedImage { digest: "sha256:00", name: None };

    /// What every engine configures.
    fn ordinary() -> Value {
        let kernels = |to: &str, kind: &str| json!({ "destination": to, "type": kind, "source": kind });
        json!({
            "process": { "capabilities": { "bounding": ["CAP_CHOWN", "CAP_MKNOD"], "effective": ["CAP_NET_RAW"] } },
            "mounts": [kernels("/proc", "proc"), kernels("/dev", "tmpfs"), kernels("/tmp", "tmpfs"),
                { "destination": "/etc/hosts", "type": "bind", "source": "/x", "options": ["rbind"] }],
            "linux": {
                "sysctl": { "net.ipv4.ping_group_range": "0 0", "net.ipv4.ip_unprivileged_port_start": "0" },
                "namespaces": [{ "type": "pid" }, { "type": "mount" }],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            }
        })
    }

    #[test]
    fn without_a_policy_the_host_adds_nothing_to_a_verified_image() {
        let mut closed = Policy::default_for(true);
        let mut check =
            |spec: &Value| closed.check(Rule::CreateContainer, &create_input("c", spec, Some(IMAGE)));
        let kernels = |to: &str, kind: &str| json!([{ "destination": to, "type": kind, "source": kind }]);
        let bind =
            |to: &str| json!([{ "destination": to, "type": "bind", "source": "/x", "options": ["rbind"] }]);
        check(&ordinary()).unwrap();
        for (place, value, words) in [
            // A program of the host's, which the kernel runs when the workload's crashes.
            (
                "/linux/sysctl",
                json!({ "kernel.core_pattern": "|/run/coffer/share/x" }),
                "OCI.Linux.Sysctl is \"kernel.core_pattern\"",
            ),
            ("/linux/sysctl", json!({ "/bin/sh": "#!/etc/hosts" }), "OCI.Linux.Sysctl"),
            // What listens on 127.0.0.1 would hear the host.
            (
                "/linux/sysctl",
                json!({ "net.ipv4.conf.all.route_localnet": "1" }),
                "OCI.Linux.Sysctl is \"net.ipv4.conf.all.route_localnet\"",
            ),
            ("/linux/devices", json!([{ "path": "/x" }]), "OCI.Linux.Devices"),
            // What the workload shares would lie in the host's files.
            ("/mounts", bind("/dev/shm"), "OCI.Mounts"),
            // A disk of the host's, whose file system the guest's kernel would read.
            ("/mounts", kernels("/run/.containerenv", "ext4"), "OCI.Mounts"),
            // Empty directories in place of the image's.
            ("/mounts", kernels("/etc", "tmpfs"), "OCI.Mounts"),
            ("/mounts", kernels("/tmp", "proc"), "OCI.Mounts"),
            // More than any engine gives by itself: the guest's kernel would be the container's.
            (
                "/process/capabilities/bounding",
                json!(["CAP_SYS_ADMIN"]),
                "OCI.Process.Capabilities is \"CAP_SYS_ADMIN\"",
            ),
            (
                "/process/capabilities/ambient",
                json!(["CAP_CHOWN", "CAP_SYS_PTRACE"]),
                "OCI.Process.Capabilities is ",
            ),
            ("/process/capabilities/effective", json!(["SYS_ADMIN"]), "OCI.Process.Capabilities is "),
            ("/process/capabilities/permitted", json!("CAP_SYS_ADMIN"), ""),
            ("/process/capabilities/inheritable", json!([["CAP_SYS_ADMIN"]]), "OCI.Process.Capabilities is "),
            // Init's own processes would be among the container's.
            ("/linux/namespaces", json!([{ "type": "mount" }]), "OCI.Linux.Namespaces is [\"mount\"]"),
            ("/linux/namespaces", json!([{ "type": "pid" }]), "OCI.Linux.Namespaces is [\"pid\"]"),
            ("/linux/maskedPaths", json!(["/proc/keys"]), "OCI.Linux.MaskedPaths is [\"/proc/keys\"]"),
            ("/linux/readonlyPaths", json!([]), "OCI.Linux.ReadonlyPaths is []"),
        ] {
            let mut spec = ordinary();
            let (parent, name) = place.rsplit_once('/').unwrap();
            spec.pointer_mut(parent).unwrap()[name] = value;
            let denied = check(&spec).expect_err(&spec.to_string()).to_string();
            assert!(denied.contains(words), "{place}: {denied}");
        }
    }

    #[test]
    fn without_a_policy_containers_of_a_pod_may_share_their_processes() {
        let mut closed = Policy::default_for(true);
        let mut spec = ordinary();
        spec["linux"]["namespaces"] = json!([{ "type": "mount" }]);
        let mut input = create_input("c", &spec, Some(IMAGE));
        for (shared, allowed) in [(json!([]), false), (json!(["ipc"]), false), (json!(["ipc", "pid"]), true)]
        {
            input["OCI"]["Linux"]["Shared"] = shared;
            assert_eq!(closed.check(Rule::CreateContainer, &input).is_ok(), allowed, "{input}");
        }
    }

    #[test]
    fn without_a_policy_a_program_is_ended_or_stopped_and_told_nothing_else() {
        let mut closed = Policy::default_for(true);
        let mut sent = |signal: u32, stop: Value| {
            let input = json!({ "container_id": "c", "signal": signal, "all": false, "stop_signal": stop });
            closed.check(Rule::SignalProcess, &input)
        };
        for signal in [0, 1, 2, 9, 15, 18, 19, 28] {
            sent(signal, Value::Null).unwrap();
        }
        // A JVM writes its threads for QUIT, node opens its debugger's port for USR1.
        for signal in [3, 6, 10, 12, 37] {
            sent(signal, Value::Null).unwrap_err();
            sent(signal, json!(signal + 1)).unwrap_err();
            sent(signal, json!(signal)).unwrap();
        }
        let denied = sent(3, Value::Null).unwrap_err().reason;
        assert!(denied.starts_with("signal is 3, allowed: ["), "{denied}");
    }

    #[test]
    fn without_a_policy_what_podman_configures_by_itself_runs() {
        // podman 4.3's own words for another container; its volume, and files for a user whom the image does not know, left out.
        let mut spec: Value = serde_json::from_str(include_str!("../../testdata/podman/spec.json")).unwrap();
        spec["mounts"].as_array_mut().unwrap().retain(|mount| {
            !["/data", "/scratch", "/etc/passwd", "/etc/group"]
                .iter()
                .any(|place| mount["destination"] == *place)
        });
        for mount in
            spec["mounts"].as_array_mut().unwrap().iter_mut().filter(|m| m["destination"] == "/dev/shm")
        {
            // As the host's side makes it for the guest.
            *mount = json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm-1-2", "options": ["nosuid"] });
        }
        let input = create_input("c", &spec, Some(IMAGE));
        assert_eq!(Policy::default_for(true).check(Rule::CreateContainer, &input), Ok(()));
    }

    #[test]
    fn a_denial_names_rule_field_value_and_what_is_allowed() {
        let mut closed = Policy::default_for(true);
        let message =
            closed.check(Rule::CreateContainer, &json!({ "host_root": true })).unwrap_err().to_string();
        assert_eq!(message, "policy: CreateContainerRequest denied: host_root is true, allowed: false");
        let mount = json!({ "destination": "/data", "type_": "bind", "from_host": true, "writable": true });
        let input = json!({ "host_root": false, "image": "sha256:00", "OCI": { "Mounts": [mount] } });
        let message = closed.check(Rule::CreateContainer, &input).unwrap_err().to_string();
        assert!(message.contains("OCI.Mounts is ") && message.contains("/data"), "{message}");
        let input = json!({ "process": { "Args": ["sh", "-c\nx"] } });
        let message = closed.check(Rule::ExecProcess, &input).unwrap_err().to_string();
        assert!(message.contains("process.Args is [\"sh\""), "{message}");
        assert!(!message.contains('\n'));
    }

    #[test]
    fn values_of_environment_variables_are_not_shown() {
        let text = "package agent_policy\nimport rego.v1\ndefault CreateContainerRequest := false\nreasons contains {\"field\": input.f, \"value\": input.e, \"allowed\": [\"A=1\"]}\n";
        let mut policy = Policy::parse(text).unwrap();
        let mut shown = |field: &str, value: Value| {
            policy.check(Rule::CreateContainer, &json!({ "f": field, "e": value })).unwrap_err().reason
        };
        let message = shown("OCI.Process.Env", json!("TOKEN=hunter2"));
        assert_eq!(message, "OCI.Process.Env is \"TOKEN=…\", allowed: [\"A=…\"]");
        let message = shown("OCI.Process.Env", json!(["TOKEN=hunter2=", "B=1"]));
        assert_eq!(message, "OCI.Process.Env is [\"TOKEN=…\",\"B=…\"], allowed: [\"A=…\"]");
        let message = shown("process.Env", json!({ "TOKEN": "hunter2" }));
        assert_eq!(message, "process.Env is {\"TOKEN\":\"…\"}, allowed: [\"A=…\"]");
        for (field, value) in [
            ("Env", json!([["TOKEN=hunter2"], { "a": [{ "b": "hunter2" }] }])),
            ("OCI.Process.Env.0", json!("TOKEN=hunter2")),
            ("OCI.Process", json!({ "Args": ["a=b"], "Env": ["TOKEN=hunter2"] })),
            ("OCI", json!({ "Process": [{ "Env": ["TOKEN=hunter2"] }] })),
        ] {
            let message = shown(field, value);
            assert!(!message.contains("hunter2") && message.contains('…'), "{message}");
        }
        assert!(shown("process.Args", json!(["a=b"])).starts_with("process.Args is [\"a=b\"]"));
    }

    #[test]
    fn upstreams_older_syntax_is_read_and_what_is_missing_denies() {
        let text = "package agent_policy\n\ndefault ExecProcessRequest := false\n\nExecProcessRequest {\n  input.process.Args[0] == \"ls\"\n}\n";
        let mut policy = Policy::parse(text).unwrap();
        policy.check(Rule::ExecProcess, &json!({ "process": { "Args": ["ls"] } })).unwrap();
        assert!(policy.check(Rule::ExecProcess, &json!({ "process": { "Args": ["sh"] } })).is_err());
        let message = policy.check(Rule::StartContainer, &json!({})).unwrap_err().reason;
        assert!(message.contains("has no StartContainerRequest"), "{message}");
        assert!(Policy::parse("package other\n").unwrap_err().to_string().contains("package agent_policy"));
        assert!(Policy::parse("packge").is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_text_is_a_policy_or_an_error(text in "(package agent_policy\n)?[ -~\n]{0,80}") {
            let _ = Policy::parse(&text);
        }
    }
}
