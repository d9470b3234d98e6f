//! A host that is not ours at init's control port: out of order, again, oversized, garbage. Each is refused, and the pod goes on.
//!
//! Whoever has the VM has its socket: these tests speak on it themselves, beside `coffer`.

use std::{
    fs::{self, File},
    io::{IoSlice, Read, Write},
    net::Shutdown,
    os::{
        fd::AsRawFd,
        unix::{fs::symlink, net::UnixStream},
    },
};

use coffer_protocol::{
    CONTROL_PORT, CreateContainer, Decoder, Exec, Frame, ImageSource, Interface, Kind, MAX_PAYLOAD,
    Neighbour, Network, Reply, Request, SHARE_DIR, Sandbox, SignalTarget, VERSION, encode,
    vm::{Line, NetAnswer},
};
use coffer_replay::{Bench, PATIENCE, config, gave, until};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

/// What the owner lets the host do: run one container and end it. Of signals USR2 is the only one beside KILL.
const POLICY: &str = r#"
package agent_policy
import rego.v1
CreateSandboxRequest := true
default UpdateInterfaceRequest := false
UpdateInterfaceRequest if count(input.interfaces) == 0
default CreateContainerRequest := false
CreateContainerRequest if input.container_id == "c"
StartContainerRequest := true
ReadStreamRequest := true
StatsContainerRequest := true
RemoveContainerRequest := true
default SignalProcessRequest := false
SignalProcessRequest if input.signal in {9, 12}
"#;
const SCRIPT: &str = "trap 'echo first' USR1; trap 'echo second' USR2; while :; do echo on; sleep 0.05; done";

/// The container `c`, which says again and again that it goes on.
fn pod() -> Bench {
    let bench = owned(POLICY, config(&["sh", "-c", SCRIPT]));
    goes_on(&bench);
    bench
}

/// The container `c` in a pod whose owner has this policy.
fn owned(policy: &str, mut config: Value) -> Bench {
    let bench = Bench::new();
    let initdata = bench.path("initdata.toml");
    let text =
        format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''{policy}'''\n");
    fs::write(&initdata, text).unwrap();
    config["annotations"]["io.coffer.initdata"] = json!(initdata);
    bench.start("c", &config);
    bench
}

#[track_caller]
fn goes_on(bench: &Bench) {
    let before = bench.read("c.out").len();
    until(|| bench.read("c.out").len() > before);
    let stats = Request::Stats { id: "c".into() };
    assert!(matches!(asked(bench, &stats), Reply::Stats(_)), "init answers no more");
}

fn connect(bench: &Bench) -> UnixStream {
    let mut stream = UnixStream::connect(bench.root().join("c/vsock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(Line::Connect(CONTROL_PORT).to_string().as_bytes()).unwrap();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {}
    stream
}

fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(kind, payload, &mut bytes);
    bytes
}

/// What comes back until init closes the connection, for these bytes, after which the host says nothing more.
fn answers(bench: &Bench, bytes: &[u8]) -> Vec<Frame> {
    let mut stream = connect(bench);
    // It may be closed before all of it was taken.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let mut decoder = Decoder::default();
    decoder.push(&all);
    std::iter::from_fn(|| decoder.next_frame().unwrap()).collect()
}

fn asked(bench: &Bench, request: &Request) -> Reply {
    let frames = answers(bench, &frame(Kind::Request, &request.to_payload()));
    assert_eq!(frames.iter().map(|f| f.kind).collect::<Vec<_>>(), [Kind::Reply], "{request:?}");
    Reply::from_payload(&frames[0].payload).unwrap()
}

fn sandbox(initdata: Option<&str>) -> Request {
    Request::Sandbox(Sandbox {
        version: VERSION,
        hostname: Some("mine".into()),
        unix_time_ns: 0,
        network: Network::default(),
        entropy: None,
        initdata: initdata.map(str::to_owned),
        name_servers: Vec::new(),
        scratch: false,
    })
}

fn create(id: &str, image: Option<ImageSource>) -> Request {
    Request::Create(Box::new(CreateContainer {
        id: id.into(),
        spec: json!({ "ociVersion": "1.0.2", "root": { "path": "/" }, "process": { "args": ["sh"], "cwd": "/" } }),
        window: None,
        binds: Vec::new(),
        shared: Vec::new(),
        image,
        notify: None,
        streams: Vec::new(),
    }))
}

fn exec(process: Value) -> Request {
    Request::Exec(Box::new(Exec {
        id: "c".into(),
        cgroup: None,
        exec_id: "e".into(),
        process,
        window: None,
        streams: Vec::new(),
    }))
}

fn image() -> Option<ImageSource> {
    Some(ImageSource {
        blobs: format!("{SHARE_DIR}/c"),
        digest: format!("sha256:{}", "0".repeat(64)),
        name: None,
        signatures: Vec::new(),
        simple_signatures: Vec::new(),
    })
}

fn signal(id: &str, number: u32) -> Request {
    Request::Signal { target: SignalTarget::Init(id.into()), signal: number }
}

/// An interface that arrives late, and a neighbour by another.
fn late(name: &str, mac: &str, other: &str) -> Request {
    let interface = Interface { name: name.into(), mac: mac.into(), mtu: 1500, addresses: Vec::new() };
    let neighbour = Neighbour { interface: other.into(), address: "10.0.0.1".into(), mac: mac.into() };
    Request::Network(Network { interfaces: vec![interface], routes: Vec::new(), neighbours: vec![neighbour] })
}

#[test]
fn a_late_network_that_is_not_there_or_names_what_is_not_the_pods_is_refused() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", SCRIPT]));
    let mac = [2, 0, 0, 0, 0, 1];
    let there = "02:00:00:00:00:01";
    let tap = tap("coffer-hostile");
    let mut stream = UnixStream::connect(bench.root().join("c/vsock")).unwrap();
    let line = Line::Net(mac).to_string();
    let rights = [tap.as_raw_fd()];
    let along = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(line.as_bytes())], &along, MsgFlags::empty(), None)
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(NetAnswer::parse(&answer), Some(NetAnswer::Added));
    for (request, words) in [
        (late("eth0", "02:00:00:00:00:02", "eth0"), "no device with address 02:00:00:00:00:02"),
        (late("eth0", "", "eth0"), "no device with address"),
        (late("lo", there, "lo"), "lo is not an interface's name"),
        (late("../../x", there, "../../x"), "is not an interface's name"),
        (late("eth0", there, "lo"), "lo is not an interface of this pod"),
    ] {
        match asked(&bench, &request) {
            Reply::Failed { message, .. } => assert!(message.contains(words), "{request:?}: {message}"),
            other => panic!("{request:?}: {other:?}"),
        }
        goes_on(&bench);
    }
    assert_eq!(asked(&bench, &late("eth0", there, "eth0")), Reply::Done);
}

/// A tap of the test's own.
fn tap(name: &str) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request outlives the call.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) }, 0);
    file
}

#[test]
fn requests_that_come_again_or_out_of_order_are_refused_and_change_nothing() {
    let bench = pod();
    let id = || "c".to_owned();
    let root = || json!({ "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } });
    for (request, words) in [
        // Another owner's word, and none, once the pod has one.
        (sandbox(Some("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n")), "the pod is set up already"),
        (sandbox(None), "the pod is set up already"),
        (create("c", None), "exists already"),
        (create("../c", None), "invalid container ID"),
        (create("d", None), "policy: CreateContainerRequest denied"),
        (create("d", image()), "image: blob sha256:0000"),
        (Request::Start { id: id() }, "cannot start a container that has been started"),
        (Request::Start { id: "d".into() }, "does not exist"),
        (Request::Delete { id: id() }, "is running"),
        (late("eth0", "02:00:00:00:00:01", "eth0"), "policy: UpdateInterfaceRequest denied"),
        (exec(root()), "policy: ExecProcessRequest denied"),
        (signal("c", 10), "policy: SignalProcessRequest denied"),
        (Request::Freeze { id: id(), frozen: true }, "policy: PauseContainerRequest denied"),
        (Request::Update { id: id(), resources: json!({}) }, "policy: UpdateContainerRequest denied"),
        (Request::Processes { id: id() }, "policy: ListProcessesRequest denied"),
        (Request::Shutdown, "policy: DestroySandboxRequest denied"),
    ] {
        match asked(&bench, &request) {
            Reply::Failed { message, .. } => assert!(message.contains(words), "{request:?}: {message}"),
            other => panic!("{request:?}: {other:?}"),
        }
        goes_on(&bench);
    }
    assert!(!bench.read("c.out").contains("first"));
}

/// The kernel would write a process's memory into its directory, which may be a volume of the host's.
#[test]
fn no_process_of_an_owners_pod_leaves_a_core_whatever_the_host_says() {
    let limits = json!([{ "type": "RLIMIT_CORE", "soft": u64::MAX, "hard": u64::MAX }]);
    let script = "grep core /proc/self/limits";
    let words = ["Max", "core", "file", "size", "0", "0", "bytes"];
    let none = |text: String| text.split_whitespace().eq(words);
    let mut config = config(&["sh", "-c", &format!("{script}; exec sleep 1000")]);
    config["process"]["rlimits"] = limits.clone();
    let bench = owned(&format!("{POLICY}ExecProcessRequest := true\n"), config);
    until(|| bench.read("c.out").contains("bytes"));
    assert!(none(bench.read("c.out")), "{}", bench.read("c.out"));
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", script], "cwd": "/",
        "env": ["PATH=/bin"], "rlimits": limits });
    fs::write(bench.path("p"), process.to_string()).unwrap();
    let mut exec = bench.command(&["exec", "--process"]);
    let out = gave(exec.arg(bench.path("p")).arg("c")).ok();
    assert!(none(out.clone()), "{out}");
}

/// With the rights that a caller may take from a process of its own a set-user-ID program would be root.
#[test]
fn no_further_process_of_an_owners_pod_may_gain_what_the_container_may_not() {
    let mut config = config(&["sh", "-c", SCRIPT]);
    config["process"]["noNewPrivileges"] = json!(true);
    let bench = owned(&format!("{POLICY}ExecProcessRequest := true\n"), config);
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["grep", "NoNewPrivs", "/proc/self/status"], "cwd": "/",
        "env": ["PATH=/bin"], "noNewPrivileges": false });
    fs::write(bench.path("p"), process.to_string()).unwrap();
    let mut exec = bench.command(&["exec", "--process"]);
    assert_eq!(gave(exec.arg(bench.path("p")).arg("c")).ok(), "NoNewPrivs:\t1\n");
}

/// Programs send to `/dev/log` what they mean for their own machine, and have secrets in their command lines.
#[test]
fn what_the_host_hears_of_an_owners_pod_is_not_the_hosts_to_choose() {
    let any = POLICY
        .replace("CreateContainerRequest if input.container_id == \"c\"", "CreateContainerRequest := true");
    let any = any.replace("default CreateContainerRequest := false\n", "");
    let bench = owned(&format!("{any}ListProcessesRequest := true\n"), config(&["sh", "-c", SCRIPT]));
    goes_on(&bench);
    let tmpfs = json!([{ "destination": "/run/notify", "type": "tmpfs", "source": "notify" }]);
    for (path, mounts) in [
        ("/dev/log", tmpfs.clone()),
        ("/run/notify/other", tmpfs),
        ("/run/notify/notify.sock", json!([])),
        (
            "/run/notify/notify.sock",
            json!([{ "destination": "/run/notify", "type": "bind", "source": format!("{SHARE_DIR}/c") }]),
        ),
    ] {
        let mut request = create("d", None);
        let Request::Create(create) = &mut request else { unreachable!() };
        create.spec["root"]["path"] = json!(format!("{SHARE_DIR}/c"));
        create.spec["process"]["user"] = json!({ "uid": 0, "gid": 0 });
        create.notify = Some(path.into());
        create.spec["mounts"] = mounts;
        match asked(&bench, &request) {
            Reply::Failed { message, .. } => assert!(message.starts_with("NOTIFY_SOCKET: "), "{message}"),
            other => panic!("{path}: {other:?}"),
        }
        goes_on(&bench);
    }
    let Reply::Processes { list } = asked(&bench, &Request::Processes { id: "c".into() }) else { panic!() };
    assert!(list.iter().any(|process| process.command == "[sh]"), "{list:?}");
    assert!(!list.iter().any(|process| process.command.contains("trap")), "{list:?}");
}

#[test]
fn a_root_by_a_link_of_the_hosts_is_none() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", SCRIPT]));
    let share = bench.root().join("c/share");
    fs::create_dir(bench.path("outside")).unwrap();
    symlink(bench.path("outside"), share.join("link")).unwrap();
    symlink(&share, share.join("up")).unwrap();
    for place in ["link", "up/c", "link/x"] {
        let mut request = create("d", None);
        let Request::Create(create) = &mut request else { unreachable!() };
        create.spec["root"]["path"] = json!(format!("{SHARE_DIR}/{place}"));
        create.spec["process"]["user"] = json!({ "uid": 0, "gid": 0 });
        match asked(&bench, &request) {
            Reply::Failed { message, .. } => {
                let words = "open the root file system: Too many levels of symbolic links";
                assert!(message.contains(words), "{place}: {message}");
            }
            other => panic!("{place}: {other:?}"),
        }
        goes_on(&bench);
    }
    assert_eq!(fs::read_dir(bench.path("outside")).unwrap().count(), 0);
}

#[test]
fn a_stub_hands_on_no_signal_that_the_owner_denies() {
    let bench = pod();
    let send = |number| {
        // SAFETY: signals a process of this test's own.
        assert_eq!(unsafe { libc::kill(bench.pid("c"), number) }, 0);
    };
    send(libc::SIGUSR1);
    send(libc::SIGUSR2);
    until(|| bench.read("c.out").contains("second"));
    goes_on(&bench);
    assert!(!bench.read("c.out").contains("first"), "{}", bench.read("c.out"));
}

#[test]
fn what_is_no_conversation_ends_it_and_nothing_else() {
    let bench = pod();
    let start = frame(Kind::Request, &Request::Start { id: "c".into() }.to_payload());
    let oversized = |kind: Kind| {
        let length = u32::try_from(MAX_PAYLOAD + 1).unwrap().to_le_bytes();
        [&[kind as u8][..], &length, &[0; 100]].concat()
    };
    // Before any process there is none to write to, to signal or to hear from, and answers are init's to give.
    let mut bad = vec![oversized(Kind::Request), oversized(Kind::Stdin), vec![0; 5], vec![255; 5]];
    for kind in
        [Kind::Stdin, Kind::StdinEnd, Kind::Stdout, Kind::Signal, Kind::Resize, Kind::Reply, Kind::Ended]
    {
        bad.push(frame(kind, &9u32.to_le_bytes()));
    }
    bad.push(start[..start.len() - 1].to_vec());
    for bytes in &bad {
        assert!(answers(&bench, bytes).is_empty(), "{bytes:?}");
        goes_on(&bench);
    }
    // What is a frame and no request is answered; a second request on a connection is not.
    for payload in [&b"{"[..], b"null", b"{\"request\":\"none\"}", &[0xff; 40]] {
        let frames = answers(&bench, &frame(Kind::Request, payload));
        let reply = Reply::from_payload(&frames[0].payload).unwrap();
        assert!(matches!(reply, Reply::Failed { .. }), "{reply:?}");
    }
    assert_eq!(answers(&bench, &[&start[..], &start].concat()).len(), 1);
    goes_on(&bench);
}

#[test]
fn changed_messages_never_end_the_pod() {
    let bench = pod();
    let process = json!({ "args": ["sh"], "cwd": "/", "terminal": true, "user": { "uid": 0, "gid": 0 } });
    let sound =
        [sandbox(Some("version")), create("d", image()), create("d", None), exec(process), signal("d", 9)]
            .map(|request| frame(Kind::Request, &request.to_payload()));
    // xorshift64, from the same seed each time: what fails, fails again.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    for round in 0..1500 {
        let mut bytes = sound[round % sound.len()].clone();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(5) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes[at] = b"\"{}[],:0-\\\0\xff"[random(12)],
                2 => bytes.truncate(at + 1),
                3 => bytes.splice(at..at, sound[random(sound.len())].clone()).for_each(drop),
                // Within the payload, whose length then fits again.
                _ => {
                    let end = at + random(bytes.len() - at);
                    bytes.drain(at.max(5).min(end)..end);
                    let length = u32::try_from(bytes.len().saturating_sub(5)).unwrap();
                    if bytes.len() > 5 {
                        bytes[1..5].copy_from_slice(&length.to_le_bytes());
                    }
                }
            }
        }
        for frame in answers(&bench, &bytes) {
            let reply = Reply::from_payload(&frame.payload);
            let refused = matches!(reply, Ok(Reply::Failed { .. })) && frame.kind == Kind::Reply;
            assert!(refused, "{round}: {frame:?}");
        }
    }
    goes_on(&bench);
}
