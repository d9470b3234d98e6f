//! What an owner and a policy are told, request by request.

use super::*;
use coffer_attestation::evidence::Sample;
use coffer_protocol::{Exec, Interface, NamespaceKind, Network, Sandbox, VERSION};

fn pod(policy: &str) -> Result<Confidential, ContainerError> {
    let text =
        format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''\n{policy}'''\n");
    Confidential::with(Some(&text), Attesters::of(Sample))
}

fn image() -> ImageSource {
    ImageSource {
        blobs: String::new(),
        digest: "sha256:00".into(),
        name: None,
        signatures: Vec::new(),
        simple_signatures: Vec::new(),
    }
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
    let rule = "package agent_policy\nimport rego.v1\nCreateContainerRequest := true\n\
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
    pod.forget("c");
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
    let rule = "package agent_policy\nimport rego.v1\nCreateContainerRequest := true\n\
        ExecProcessRequest if { input.container.image == \"sha256:00\"; input.container.Args == [\"app\"] }\n\
        SignalProcessRequest if input.signal == input.stop_signal\n";
    let mut pod = pod(rule).unwrap();
    let image = image();
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
    pod.forget("c");
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
        let interface = Interface { name: name.into(), mac: String::new(), mtu: 1500, addresses: address };
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
    let quiet = format!("package agent_policy\nimport rego.v1\ndefault ReadStreamRequest := false\n{rule}");
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
    let image = image();
    pod.check_container("c", &json!({}), Some(&image), &[]).unwrap();
    let message = pod.check_container("c", &json!({}), None, &[]).unwrap_err().message;
    assert_eq!(message, "policy: CreateContainerRequest denied: image is null, allowed: \"sha256:00\"");
}

#[test]
fn a_hook_is_the_hosts_program_and_runs_only_where_nobody_but_the_host_has_a_say() {
    let spec = json!({ "hooks": { "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo $SECRET"] }] } });
    Confidential::with(None, Attesters::of(Sample)).unwrap().check_container("c", &spec, None, &[]).unwrap();
    let mut owned = pod("package agent_policy\nimport rego.v1\nCreateContainerRequest := true\n").unwrap();
    owned.check_container("c", &json!({}), None, &[]).unwrap();
    let message = owned.check_container("c", &spec, None, &[]).unwrap_err().message;
    assert!(message.contains("denied: OCI.Hooks is "), "{message}");
}

#[test]
fn only_a_policy_that_says_so_leaves_the_process_to_the_host() {
    let image = image();
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
