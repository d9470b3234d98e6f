//! Honest inputs: what the host's own encoder writes, around a configuration that podman wrote.

use coffer_fuzz::Seed;
use coffer_protocol::{
    BindSource, CreateContainer, Exec, ImageSource, Interface, Kind, NamespaceKind, Network, Request, Route,
    STDIN_WINDOW, Sandbox, SharedNamespace, SignalTarget, Stream, VERSION, WindowSize, encode,
};
use serde_json::{Value, json};

/// Of podman 4.3.1, in a guest's terms (`testdata/README.md`).
pub const SPEC: &str = include_str!("../testdata/podman.json");

/// One of its kind for what podman does not write.
const OTHER: &str = r#"{"ociVersion":"1.2.0","process":{"terminal":true,"args":["sh"],"cwd":"/","env":["A=1","A=2"],
"user":{"uid":1000,"gid":1000,"umask":18},"scheduler":{"policy":"SCHED_FIFO","priority":3,"flags":["SCHED_RESET_ON_FORK"]},
"ioPriority":{"class":"IOPRIO_CLASS_BE","priority":4}},"root":{"path":"/run/coffer/share/c/rootfs"},
"domainname":"d","hooks":{"startContainer":[{"path":"/bin/true","args":["true"],"timeout":3}]},
"mounts":[{"destination":"/dev/shm","type":"tmpfs","source":"shm-1-2","options":["size=64m"]}],
"linux":{"namespaces":[{"type":"user"},{"type":"time"},{"type":"pid"}],"rootfsPropagation":"rslave",
"uidMappings":[{"containerID":0,"hostID":100000,"size":65536}],"gidMappings":[{"containerID":0,"hostID":100000,"size":65536}],
"timeOffsets":{"monotonic":{"secs":-1,"nanosecs":2},"boottime":{"secs":3}},"sysctl":{"net.ipv4.ip_forward":"1"},
"personality":{"domain":"LINUX32"},"devices":[{"path":"/dev/fuse","type":"c","major":10,"minor":229,"fileMode":438}],
"seccomp":{"defaultAction":"SCMP_ACT_KILL_PROCESS","flags":["SECCOMP_FILTER_FLAG_LOG"],
"syscalls":[{"names":["read"],"action":"SCMP_ACT_LOG"},{"names":["mount","bpf"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
{"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8,"valueTwo":4,"op":"SCMP_CMP_MASKED_EQ"}]}]},
"resources":{"memory":{"limit":1048576,"reservation":-1},"cpu":{"shares":1024,"quota":150000,"period":100000,"burst":5,"idle":1},
"pids":{"limit":100},"blockIO":{"weight":505},"hugepageLimits":[{"pageSize":"2MB","limit":4194304}],"unified":{"memory.high":"7"},
"devices":[{"allow":false},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},{"allow":true,"type":"b","major":8},
{"allow":false,"type":"b","major":8,"minor":0,"access":"w"}]}}}"#;

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/srv:/bin/sh\n33:x:7:8::/:\n";
const GROUP: &str = "root:x:0:\ntape:x:26:other,app\ndisk:x:6:app\n";

fn value(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

fn pods_network() -> Network {
    let interface = |name: &str, mac: &str, address: &str| Interface {
        name: name.into(),
        mac: mac.into(),
        mtu: 1500,
        addresses: vec![address.into(), "fd00::2/64".into()],
    };
    let route = Route {
        interface: "eth0".into(),
        destination: None,
        gateway: Some("10.88.0.1".into()),
        source: None,
        metric: Some(100),
        ipv6: false,
        on_link: false,
    };
    let on_link = Route {
        destination: Some("10.89.0.0/16".into()),
        gateway: None,
        source: Some("10.89.0.2".into()),
        interface: "eth1".into(),
        ..route.clone()
    };
    Network {
        interfaces: vec![
            interface("eth1", "02:01:02:03:04:05", "10.88.0.2/16"),
            interface("eth0", "52:54:00:00:00:01", "10.89.0.2/16"),
        ],
        routes: vec![route, on_link],
        ..Network::default()
    }
}

fn create(spec: &str) -> Request {
    Request::Create(Box::new(CreateContainer {
        id: "libpod-1".into(),
        spec: value(spec),
        window: Some(WindowSize { rows: 24, columns: 80 }),
        binds: vec![BindSource { mount: 4, directory: true }],
        shared: vec![SharedNamespace { kind: NamespaceKind::Pid, container: "a".into() }],
        image: Some(ImageSource {
            blobs: "/run/coffer/share/c/image".into(),
            digest: format!("sha256:{}", "0".repeat(64)),
            name: Some("registry.example/app:1".into()),
            signatures: Vec::new(),
            simple_signatures: Vec::new(),
        }),
        notify: Some("/run/notify/notify.sock".into()),
        streams: vec![Stream { read: true, write: true }],
    }))
}

/// What the closed policy lets in.
fn plain() -> Request {
    let mut spec = value(SPEC);
    spec["mounts"].as_array_mut().expect("mounts").retain(|mount| mount["type"] == "proc");
    spec["linux"]["sysctl"] = json!({ "net.ipv4.ping_group_range": "0 0" });
    create(&spec.to_string())
}

fn requests() -> Vec<(&'static str, Request)> {
    let id = || "libpod-1".to_owned();
    let sandbox = Sandbox {
        version: VERSION,
        hostname: Some("web".into()),
        unix_time_ns: 1_795_651_200_000_000_000,
        network: pods_network(),
        entropy: Some([7; 32]),
        initdata: Some("version = \"0.1.0\"\n".into()),
        name_servers: vec!["10.88.0.1".into()],
        scratch: true,
    };
    let exec = Exec {
        id: id(),
        cgroup: Some("/a/b".into()),
        exec_id: "e".into(),
        process: json!({ "args": ["sh"], "cwd": "/", "env": ["A=1"], "user": { "uid": 0, "gid": 0 } }),
        window: None,
        streams: Vec::new(),
    };
    vec![
        ("sandbox", Request::Sandbox(sandbox)),
        ("network", Request::Network(pods_network())),
        ("create", create(SPEC)),
        ("create-other", create(OTHER)),
        ("create-allowed", plain()),
        ("start", Request::Start { id: id() }),
        ("exec", Request::Exec(Box::new(exec))),
        ("signal", Request::Signal { target: SignalTarget::All(id()), signal: 15 }),
        ("freeze", Request::Freeze { id: id(), frozen: true }),
        ("update", Request::Update { id: id(), resources: value(OTHER)["linux"]["resources"].clone() }),
        ("take-memory", Request::TakeMemory),
        ("processors", Request::Processors { online: 2 }),
        ("delete", Request::Delete { id: id() }),
    ]
}

/// Frames of a host that has a process, after one byte that says how they are cut.
fn talk(first: u8) -> Vec<u8> {
    let mut bytes = vec![first];
    let window = WindowSize { rows: 24, columns: 80 }.to_payload();
    for (kind, payload) in [
        (Kind::Stdin, b"echo hello\n".as_slice()),
        (Kind::Stream, b"\0further"),
        (Kind::Resize, &window),
        (Kind::Signal, &15u32.to_le_bytes()),
        (Kind::StreamEnd, b"\0"),
        (Kind::Stdin, &[7; STDIN_WINDOW / 8]),
        (Kind::StdinEnd, b""),
    ] {
        encode(kind, payload, &mut bytes);
    }
    bytes
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Seed> {
    let mut stream = Vec::new();
    encode(Kind::Request, &Request::Start { id: "a".into() }.to_payload(), &mut stream);
    stream.extend(&talk(0)[1..60]);
    let users = |text: &str| format!("{PASSWD}\0{GROUP}\0{text}").into_bytes();
    let mut seeds: Vec<Seed> = vec![
        ("frames", "request", stream),
        ("conversation", "pieces", talk(0x7e)),
        ("conversation", "small-pieces", talk(0x06)[..200].to_vec()),
        ("conversation", "closed", talk(0xff)),
        ("spec", "podman", SPEC.into()),
        ("spec", "other", OTHER.into()),
        ("network", "two", serde_json::to_vec(&pods_network()).expect("plain data")),
        ("users", "name", users("app")),
        ("users", "name-and-group", users("app:tape")),
        ("users", "numbers", users("1000:77")),
        ("users", "a-name-like-a-number", users("33")),
    ];
    seeds.extend(requests().into_iter().map(|(name, request)| ("request", name, request.to_payload())));
    seeds
}
