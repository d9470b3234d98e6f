//! A manifest's policy before the engine that the guest has, asked what containerd and podman ask.

use coffer_attestation::{
    policy::{Allowed, Policy, Rule, VerifiedImage, create_input, generate_pod, process_input},
    yaml,
};

use super::*;

const KUBECTL: &str = include_str!("../../../../../attestation/testdata/yaml/kubectl.yaml");
const PODMAN: &str = include_str!("../../../../../attestation/testdata/yaml/podman.yaml");

fn known(run: Value) -> Known {
    let config = json!({"architecture": coffer_layers::manifest::architecture(), "os": "linux", "config": run,
        "rootfs": {"type": "layers", "diff_ids": []}});
    Known {
        digest: "sha256:00".into(),
        config: ImageConfig::parse(config.to_string().as_bytes(), 0).unwrap(),
    }
}

fn images(name: &str) -> Result<Known, String> {
    let tools = Known { digest: "sha256:11".into(), ..known(json!({"Cmd": ["sh"]})) };
    let app = known(
        json!({"Entrypoint": ["/bin/app"], "Cmd": ["serve"], "Env": ["PATH=/bin", "LOG=debug"], "WorkingDir": "/srv", "User": "7:8"}),
    );
    Ok(if name.contains("tools") { tools } else { app })
}

fn pod(text: &str) -> Result<Pod, FieldError> {
    let documents = yaml::read(text).unwrap();
    let (path, pod) = find(&documents)?;
    read(&path, pod, &images)
}

fn policy(pod: &Pod) -> Policy {
    Policy::parse(&generate_pod(&pod.containers, &Allowed::default())).unwrap()
}

/// The first container of `kubectl.yaml`, as containerd's CRI plugin configures it.
fn containerd() -> Value {
    let kernel = |place: &str, kind: &str| json!({"destination": place, "type": kind, "source": kind, "options": ["nosuid"]});
    let bind = |place: &str, option: &str| json!({"destination": place, "type": "bind", "source": "/x", "options": ["rbind", "rprivate", option]});
    json!({
        "process": {
            "user": {"uid": 1000, "gid": 1000, "additionalGids": [1000]},
            "args": ["/bin/ledger", "--config=/etc/ledger/config.toml", "-v"],
            "env": ["PATH=/bin", "HOSTNAME=ledger", "LOG=info", "DEBUG=yes", "EMPTY=", "MESSAGE=quoted: 'twice'",
                "KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443", "WEB_SERVICE_PORT_HTTP=80"],
            "cwd": "/srv", "noNewPrivileges": true,
            "capabilities": {"bounding": [], "effective": [], "permitted": []}
        },
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [kernel("/proc", "proc"), kernel("/dev", "tmpfs"), kernel("/dev/pts", "devpts"), kernel("/dev/mqueue", "mqueue"),
            kernel("/sys", "sysfs"), kernel("/sys/fs/cgroup", "cgroup"), bind("/etc/ledger", "ro"), bind("/var/lib/ledger", "rw"),
            bind("/var/run/secrets/kubernetes.io/serviceaccount", "ro"), bind("/etc/hosts", "rw"), bind("/dev/termination-log", "rw"),
            bind("/etc/hostname", "rw"), bind("/etc/resolv.conf", "rw"), kernel("/dev/shm", "tmpfs")],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        }
    })
}

fn ask(policy: &mut Policy, spec: &Value, digest: &str) -> Result<(), String> {
    let input = create_input("any", spec, Some(VerifiedImage { digest, name: None }));
    policy.check(Rule::CreateContainer, &input).map_err(|denied| denied.reason)
}

#[test]
fn a_pod_of_kubectls_is_admitted_and_nothing_else() {
    let mut policy = policy(&pod(KUBECTL).unwrap());
    ask(&mut policy, &containerd(), "sha256:00").unwrap();
    for (pointer, value, words) in [
        ("/process/args/0", json!("/bin/sh"), "OCI.Process.Args is [\"/bin/sh\""),
        ("/process/args", json!([]), "OCI.Process.Args is []"),
        ("/process/env/2", json!("LOG=debug"), "OCI.Process.Env is "),
        ("/process/env/2", json!("LD_PRELOAD=/etc/ledger/x.so"), "OCI.Process.Env is "),
        ("/process/env/6", json!("LOG=info"), "OCI.Process.Env is "),
        ("/process/env/6", json!("LOG=other"), "OCI.Process.Env is "),
        ("/process/env/6", json!("KUBERNETES_SERVICE_HOST=$(evil)"), "OCI.Process.Env is "),
        ("/process/env/6", json!(["x"]), "OCI.Process.Env is "),
        ("/process/env/1", json!("HOSTNAME=a\nb"), "OCI.Process.Env is "),
        ("/process/cwd", json!("/"), "OCI.Process.Cwd is \"/\", allowed: \"/srv\""),
        ("/process/user/uid", json!(0), "OCI.Process.User is "),
        ("/process/user/gid", json!(0), "OCI.Process.User is "),
        ("/process/user/additionalGids", json!([1000, 0]), "OCI.Process.User is "),
        ("/process/noNewPrivileges", json!(false), "OCI.Process.NoNewPrivileges is false, allowed: true"),
        ("/process/capabilities/bounding", json!(["CAP_CHOWN"]), "OCI.Process.Capabilities is "),
        ("/process/capabilities/ambient", json!(["CAP_SYS_ADMIN"]), "OCI.Process.Capabilities is "),
        ("/process/terminal", json!(true), "OCI.Process.Terminal is true"),
        ("/root/readonly", json!(false), "OCI.Root.Readonly is false, allowed: true"),
        ("/mounts/6/options/2", json!("rw"), "OCI.Mounts is [{\"destination\":\"/etc/ledger\""),
        ("/mounts/6/destination", json!("/bin"), "OCI.Mounts is [{\"destination\":\"/bin\""),
        ("/mounts/6/destination", json!("/etc/hosts"), "OCI.Mounts is "),
        ("/mounts/6", json!({"destination": "/srv", "type": "tmpfs", "source": "tmpfs"}), "OCI.Mounts is "),
        ("/mounts/6/type", json!("overlay"), "OCI.Mounts is "),
        ("/mounts/0/type", json!("tmpfs"), "OCI.Mounts is [{\"destination\":\"/proc\""),
        ("/mounts/0/options/0", json!("bind"), "OCI.Mounts is [{\"destination\":\"/proc\""),
        ("/linux/namespaces/0/type", json!("ipc"), "OCI.Linux.Namespaces is "),
        ("/linux/seccomp", json!(null), "OCI.Linux.Seccomp is false"),
        ("/linux/maskedPaths", json!([]), "OCI.Linux.MaskedPaths is []"),
        ("/linux/readonlyPaths", json!([]), "OCI.Linux.ReadonlyPaths is []"),
        ("/linux/sysctl", json!({"kernel.core_pattern": "|/x"}), "OCI.Linux.Sysctl is "),
        (
            "/linux/devices",
            json!([{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}]),
            "OCI.Linux.Devices is ",
        ),
    ] {
        let mut changed = containerd();
        match changed.pointer_mut(pointer) {
            Some(there) => *there = value.clone(),
            None => {
                let (parent, name) = pointer.rsplit_once('/').unwrap();
                changed.pointer_mut(parent).unwrap()[name] = value.clone();
            }
        }
        let said = ask(&mut policy, &changed, "sha256:00").expect_err(&format!("{pointer} {value}"));
        assert!(said.contains(words), "{pointer} {value}: {said}");
    }
    // What is left out is another container too.
    for pointer in [
        "/process/args",
        "/process/env",
        "/process/cwd",
        "/process/user",
        "/mounts",
        "/linux/namespaces",
        "/linux/maskedPaths",
        "/root",
    ] {
        let mut changed = containerd();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        changed.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name);
        ask(&mut policy, &changed, "sha256:00").expect_err(pointer);
    }
    let mut without = containerd();
    without["mounts"].as_array_mut().unwrap().remove(7);
    assert!(ask(&mut policy, &without, "sha256:00").unwrap_err().contains("OCI.Mounts"));
    let said = ask(&mut policy, &containerd(), "sha256:22").unwrap_err();
    assert_eq!(said, "image is \"sha256:22\", allowed: [\"sha256:11\",\"sha256:00\"]");
    let host = create_input("any", &containerd(), None);
    assert!(
        policy.check(Rule::CreateContainer, &host).is_err()
            && policy.check(Rule::HostProcess, &host).is_err()
    );
    // The init container's image with the other's program.
    ask(&mut policy, &containerd(), "sha256:11").unwrap_err();
    let verified =
        create_input("any", &containerd(), Some(VerifiedImage { digest: "sha256:00", name: None }));
    policy.check(Rule::HostProcess, &verified).unwrap();
    policy.check(Rule::ExecProcess, &process_input("any", "e", &json!({"args": ["sh"]}))).unwrap_err();
}

#[test]
fn a_pod_of_podmans_is_admitted() {
    let pod = pod(PODMAN).unwrap();
    let container = &pod.containers[0];
    assert_eq!(container.args[..2], ["/bin/app", "--listen"]);
    assert_eq!(container.env["MULTI"], "two\nlines");
    assert_eq!(container.cwd, "/srv");
    assert_eq!(container.user, Some(PodUser { uid: 1000, gid: 1000, groups: vec![1000] }));
    assert!(
        container.capabilities.contains(&"CAP_NET_ADMIN".into())
            && !container.capabilities.contains(&"CAP_CHOWN".into())
    );
    assert_eq!((container.mounts["/data"].writable, container.mounts["/tmp"].writable), (false, true));
    assert!(
        !container.service_account && !container.service_links && container.read_only && !container.seccomp
    );
    let mut policy = policy(&pod);
    // As podman 4.3 configured another container, with this one's words.
    let mut spec: Value =
        serde_json::from_str(include_str!("../../../../../attestation/testdata/podman/spec.json")).unwrap();
    let env: Vec<String> = container.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    spec["process"]["args"] = json!(container.args);
    spec["process"]["env"] = env
        .into_iter()
        .chain(["TERM=xterm", "container=podman", "HOME=/", "HOSTNAME=web-pod"].map(str::to_owned))
        .collect();
    spec["process"]["cwd"] = json!("/srv");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "umask": 18, "additionalGids": [1000]});
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/scratch");
    for mount in spec["mounts"].as_array_mut().unwrap() {
        if ["/etc/passwd", "/etc/group"].iter().any(|place| mount["destination"] == *place) {
            // podman mounts these for a user that the image does not know. They would be the host's words.
            mount["destination"] = json!("/run/.containerenv");
        }
    }
    // Shared memory in files of the host's would be read there.
    assert!(ask(&mut policy, &spec, "sha256:00").unwrap_err().contains("/dev/shm"));
    for mount in spec["mounts"].as_array_mut().unwrap().iter_mut().filter(|m| m["destination"] == "/dev/shm")
    {
        *mount = crate::plan::shared_memory_mount("shm-1-2", 64_000);
    }
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let last = mounts.iter().rposition(|mount| mount["destination"] == "/run/.containerenv").unwrap();
    mounts.remove(last);
    ask(&mut policy, &spec, "sha256:00").unwrap();
    spec["process"]["env"][0] = json!("A=2");
    ask(&mut policy, &spec, "sha256:00").unwrap_err();
}

/// A further process of a container that was let in with these, as init asks.
fn exec(policy: &mut Policy, container: &Value, process: &Value) -> Result<(), String> {
    let mut input = process_input("any", "e", process);
    input["container"] = container.clone();
    policy.check(Rule::ExecProcess, &input).map_err(|denied| denied.reason)
}

#[test]
fn a_probe_is_the_containers_own_program_with_its_own_variables() {
    let lines =
        "livenessProbe: {exec: {command: [test, -e, /x]}}\nsecurityContext: {runAsUser: 5, runAsGroup: 6}";
    let mut policy = policy(&small(lines, "").unwrap());
    let own = json!({ "image": "sha256:00", "Args": ["/bin/app", "serve"], "User": { "UID": 5, "GID": 6, "AdditionalGids": [] } });
    let probe = json!({ "args": ["test", "-e", "/x"], "cwd": "/srv", "user": { "uid": 5, "gid": 6 },
        "env": ["PATH=/bin", "TERM=xterm"], "capabilities": { "bounding": ["CAP_KILL"] } });
    for (field, value) in [
        ("args", json!(["sh"])),
        ("env", json!(["PATH=/data"])),
        ("env", json!(["LD_PRELOAD=/etc/hosts"])),
        ("cwd", json!("/data")),
        ("user", json!({ "uid": 0, "gid": 6 })),
        ("user", json!({ "uid": 5, "gid": 6, "additionalGids": [0] })),
        ("user", Value::Null),
        ("capabilities", json!({ "effective": ["CAP_SYS_ADMIN"] })),
    ] {
        let mut changed = probe.clone();
        changed[field] = value;
        exec(&mut policy, &own, &changed).expect_err(&changed.to_string());
    }
    exec(&mut policy, &own, &probe).unwrap();
    // In no other container, such as one of the host's files.
    for (field, value) in [
        ("image", Value::Null),
        ("image", json!("sha256:11")),
        ("Args", json!(["sh"])),
        ("User", json!({ "UID": 0, "GID": 6, "AdditionalGids": [] })),
    ] {
        let mut other = own.clone();
        other[field] = value;
        exec(&mut policy, &other, &probe).expect_err(&other.to_string());
    }
    exec(&mut policy, &Value::Null, &probe).unwrap_err();
}

const TWO: &str = "kind: Pod
spec:
  containers:
  - {name: a, image: tools, livenessProbe: {exec: {command: [test, a]}}, securityContext: {runAsUser: 5, runAsGroup: 5}}
  - {name: b, image: app, livenessProbe: {exec: {command: [test, b]}}, securityContext: {runAsUser: 6, runAsGroup: 6}}
";

#[test]
fn each_containers_commands_run_in_it_by_its_user_and_none_in_the_sandbox() {
    let mut pod = pod(TWO).unwrap();
    let pause = Known { digest: "sha256:22".into(), ..known(json!({ "Entrypoint": ["/pause"] })) };
    pod.containers.push(sandbox(&pause).unwrap());
    let mut policy = policy(&pod);
    let user = |id: u32| json!({ "UID": id, "GID": id, "AdditionalGids": [id] });
    let a = json!({ "image": "sha256:11", "Args": ["sh"], "User": user(5) });
    let b = json!({ "image": "sha256:00", "Args": ["/bin/app", "serve"], "User": user(6) });
    let none = json!({ "image": "sha256:22", "Args": ["/pause"], "User": user(0) });
    let containers = [(&a, "a", "/", 5), (&b, "b", "/srv", 6), (&none, "none", "/", 0)];
    for (of, own, ..) in &containers {
        for (_, name, cwd, _) in &containers {
            for id in [0, 5, 6] {
                let process = json!({ "args": ["test", name], "cwd": cwd, "user": { "uid": id, "gid": id } });
                let meant = own == name && id == of["User"]["UID"].as_u64().unwrap() && *own != "none";
                let told = exec(&mut policy, of, &process);
                assert_eq!(told.is_ok(), meant, "{own} {process} {told:?}");
            }
        }
    }
    let denied = exec(&mut policy, &a, &json!({ "args": ["sh"] })).unwrap_err();
    assert!(denied.contains("process.Args is [\"sh\"], allowed: [[\"test\",\"a\"]]"), "{denied}");
}

#[test]
fn the_sandboxs_process_is_its_images_and_not_the_hosts() {
    let mut pod = pod(TWO).unwrap();
    let pause = Known { digest: "sha256:22".into(), ..known(json!({ "Entrypoint": ["/pause"] })) };
    pod.containers.push(sandbox(&pause).unwrap());
    let asked = |digest: &str| {
        let image = VerifiedImage { digest, name: None };
        create_input("any", &json!({ "process": { "args": ["/pause"] } }), Some(image))
    };
    let mut own = policy(&pod);
    own.check(Rule::HostProcess, &asked("sha256:22")).unwrap_err();
    own.check(Rule::HostProcess, &asked("sha256:11")).unwrap();
    // Whoever brings a container's image as the sandbox's has named its user.
    let entry = sandbox(&Known { digest: "sha256:11".into(), ..known(json!({ "Cmd": ["sh"] })) }).unwrap();
    *pod.containers.last_mut().unwrap() = entry;
    let mut spec = containerd();
    let env: Vec<String> =
        pod.containers[0].env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    spec["process"] = json!({ "args": ["sh"], "env": env, "cwd": "/", "user": { "uid": 0, "gid": 0 } });
    spec["mounts"].as_array_mut().unwrap().truncate(6);
    spec["root"]["readonly"] = json!(false);
    let denied = ask(&mut policy(&pod), &spec, "sha256:11").unwrap_err();
    assert!(denied.contains("OCI.Process.User is "), "{denied}");
    spec["process"]["user"] = json!({ "uid": 5, "gid": 5 });
    ask(&mut policy(&pod), &spec, "sha256:11").unwrap();
}

#[test]
fn a_denial_names_variables_and_says_none_of_their_values() {
    let lines = "livenessProbe: {exec: {command: [test, -e, /x]}}\nenv: [{name: OWN, value: secret}]\n\
        securityContext: {runAsUser: 5, runAsGroup: 6}";
    let mut policy = policy(&small(lines, "").unwrap());
    let mut spec = containerd();
    spec["process"]["env"].as_array_mut().unwrap().push(json!("TOKEN=hunter2"));
    let created = ask(&mut policy, &spec, "sha256:00").unwrap_err();
    let own = json!({ "image": "sha256:00", "Args": ["/bin/app", "serve"], "User": { "UID": 5, "GID": 6, "AdditionalGids": [] } });
    let process = json!({ "args": ["test", "-e", "/x"], "cwd": "/srv", "user": { "uid": 5, "gid": 6 }, "env": ["TOKEN=hunter2"] });
    let ran = exec(&mut policy, &own, &process).unwrap_err();
    for denied in [created, ran] {
        assert!(
            denied.contains("TOKEN=…") && !denied.contains("hunter2") && !denied.contains("secret"),
            "{denied}"
        );
    }
}

/// A pod with one container that has these lines, and its specification those.
fn small(container: &str, spec: &str) -> Result<Pod, FieldError> {
    let indented = |text: &str, by: usize| {
        text.lines().map(|line| format!("{}{line}\n", " ".repeat(by))).collect::<String>()
    };
    let text = format!(
        "kind: Pod\nspec:\n{}  containers:\n  - name: app\n    image: app\n{}",
        indented(spec, 2),
        indented(container, 4)
    );
    pod(&text)
}

#[test]
fn program_and_user_are_the_images_where_the_manifest_says_nothing() {
    let one = |container: &str| small(container, "").unwrap().containers.remove(0);
    let plain = one("");
    assert_eq!((&plain.args[..], plain.cwd.as_str()), (&["/bin/app".to_owned(), "serve".into()][..], "/srv"));
    assert_eq!(plain.user, Some(PodUser { uid: 7, gid: 8, groups: vec![8] }));
    assert_eq!(plain.env, BTreeMap::from([("PATH".into(), "/bin".into()), ("LOG".into(), "debug".into())]));
    assert_eq!(one("args: [a]").args, ["/bin/app", "a"]);
    assert_eq!(one("command: [/b]").args, ["/b"]);
    assert_eq!(
        one("securityContext: {runAsUser: 0}").user,
        Some(PodUser { uid: 0, gid: 0, groups: vec![0] })
    );
    assert_eq!(
        one("securityContext: {capabilities: {drop: [ALL], add: [CAP_KILL, KILL, CHOWN]}}").capabilities,
        ["CAP_CHOWN", "CAP_KILL"]
    );
    let pod = small(
        "livenessProbe: {exec: {command: [test, -e, /x]}}\nreadinessProbe: {httpGet: {port: 80}}",
        "securityContext: {fsGroup: 5}",
    )
    .unwrap();
    let only = &pod.containers[0];
    assert_eq!(only.exec, [["test", "-e", "/x"]]);
    assert_eq!(only.user.as_ref().unwrap().groups, [8, 5]);
    let template = "kind: Deployment\nspec: {template: {spec: {shareProcessNamespace: true, containers: [{name: a, image: a}]}}}";
    assert_eq!(super::tests::pod(template).unwrap().containers[0].namespaces, ["mount"]);
}

#[test]
fn what_no_policy_can_promise_is_refused_by_its_path() {
    for (container, spec, words) in [
        ("", "hostNetwork: true", "spec.hostNetwork: a VM has nothing of the host's"),
        ("", "hostPID: true", "spec.hostPID"),
        ("", "frobnicate: 1", "spec.frobnicate: it is not known here"),
        ("frobnicate: 1", "", "spec.containers[0].frobnicate: it is not known here"),
        ("securityContext: {privileged: true}", "", "spec.containers[0].securityContext.privileged"),
        ("securityContext: {capabilities: {add: [ALL]}}", "", "capabilities.add: ALL is no list"),
        (
            "securityContext: {seccompProfile: {type: Localhost, localhostProfile: a}}",
            "",
            "seccompProfile: a profile of the host's",
        ),
        ("securityContext: {procMount: Unmasked}", "", "procMount"),
        ("securityContext: {runAsUser: 5}", "", "runAsGroup is missing"),
        (
            "securityContext: {runAsUser: 0}",
            "securityContext: {runAsNonRoot: true}",
            "runAsNonRoot, but it runs as 0",
        ),
        (
            "env: [{name: A, valueFrom: {secretKeyRef: {name: a, key: b}}}]",
            "",
            "spec.containers[0].env[0].valueFrom: the host would choose",
        ),
        ("env: [{name: A, value: $(B)}]", "", "env[0].value: the kubelet replaces"),
        ("env: [{name: A, value: 1}]", "", "env[0].value: it has to be text: put it into quotes"),
        ("envFrom: [{configMapRef: {name: a}}]", "", "envFrom: the host would choose"),
        ("args: [$(A)]", "", "args: \"$(A)\": the kubelet replaces"),
        ("volumeMounts: [{name: a, mountPath: /a}]", "", "volumeMounts[0].name: spec.volumes has no \"a\""),
        (
            "volumeMounts: [{name: a, mountPath: a}]",
            "volumes: [{name: a, emptyDir: {}}]",
            "mountPath: it has to be an absolute path",
        ),
        ("volumeMounts: [{name: a, mountPath: /a/../b}]", "volumes: [{name: a, emptyDir: {}}]", "mountPath"),
        (
            "volumeMounts: [{name: a, mountPath: /a, mountPropagation: Bidirectional}]",
            "volumes: [{name: a}]",
            "mountPropagation",
        ),
        ("volumeDevices: [{name: a, devicePath: /dev/a}]", "", "volumeDevices"),
        ("", "ephemeralContainers: [{name: a}]", "ephemeralContainers"),
    ] {
        let said = small(container, spec).unwrap_err().to_string();
        assert!(said.starts_with("policy: spec.") && said.contains(words), "{said}");
    }
    assert!(pod("kind: Service").unwrap_err().to_string().contains("neither a Pod"));
    let two = "kind: Pod\n---\nkind: Pod\n";
    assert!(pod(two).unwrap_err().to_string().contains("more than one pod"));
    let named = |_: &str| Ok(known(json!({"Cmd": ["a"], "User": "app"})));
    let documents = yaml::read("kind: Pod\nspec: {containers: [{name: a, image: a}]}").unwrap();
    let said = read("", &documents[0], &named).unwrap_err().to_string();
    assert!(said.contains("the image's user is \"app\""), "{said}");
}
