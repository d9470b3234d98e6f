//! Fuzz targets: what init reads from the host on a control connection, and the files of an image that it looks into. Each takes any
//! bytes and panics when something is wrong.

pub mod bpf;
pub mod seeds;
mod spec;

use std::cell::RefCell;

use coffer_attestation::policy::CLOSED;
use coffer_fuzz::Target;
use coffer_init::{
    container::fuzz as container,
    fuzz::{Pod, converse},
    image, network,
};
use coffer_protocol::{
    CreateContainer, Decoder, Ended, Kind, MAX_PAYLOAD, Network, Reply, Request, STDIN_WINDOW, WindowSize,
};
use serde_json::Value;

/// The targets.
pub const TARGETS: [Target; 6] = [
    ("frames", frames),
    ("conversation", conversation),
    ("request", request),
    ("spec", |data| {
        if let Ok(value) = serde_json::from_slice(data) {
            spec::look(&value);
        }
    }),
    ("network", network),
    ("users", users),
];

/// All whole frames of a stream that comes in such pieces, and whether more is awaited at its end.
fn decode(data: &[u8], piece: usize) -> (Vec<(Kind, Vec<u8>)>, bool) {
    let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
    for piece in data.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => seen.push((frame.kind, frame.payload)),
                Ok(None) => break,
                Err(_) => return (seen, false),
            }
        }
    }
    (seen, true)
}

/// A stream: however it is cut, its frames are the same, and what they say reads back.
pub fn frames(data: &[u8]) {
    let whole = decode(data, data.len().max(1));
    assert_eq!(decode(data, data.len() / 7 + 1), whole);
    let mut written = Vec::new();
    for (kind, payload) in &whole.0 {
        assert!(payload.len() <= MAX_PAYLOAD);
        coffer_protocol::encode(*kind, payload, &mut written);
        if let Ok(request) = Request::from_payload(payload) {
            assert!(Request::from_payload(&request.to_payload()).is_ok());
        }
        if let Ok(size) = WindowSize::from_payload(payload) {
            assert_eq!(WindowSize::from_payload(&size.to_payload()), Ok(size));
        }
        // The other way: what a guest says to its host.
        let _ = (Reply::from_payload(payload), Ended::from_payload(payload));
    }
    assert!(data.starts_with(&written));
}

/// A host that has a process. It reads what the host wrote in the right order and nothing else, and credit is for no more than that.
pub fn conversation(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let (stdin, piece) = (first & 1 == 0, usize::from(first >> 1) * 16 + 1);
    let done = converse(data, piece, stdin);
    let (mut said, mut further) = (Vec::new(), Vec::new());
    for (kind, payload) in decode(data, data.len().max(1)).0 {
        match kind {
            Kind::Stdin => said.extend(payload),
            Kind::Stream if payload.first() == Some(&0) => further.extend_from_slice(&payload[1..]),
            _ => {}
        }
    }
    if stdin {
        assert!(said.starts_with(&done.stdin) && further.starts_with(&done.stream));
    } else {
        assert!(done.stdin.is_empty() && done.stream.is_empty(), "the owner keeps input from the host");
    }
    let (answers, whole) = decode(&done.answers, done.answers.len().max(1));
    assert!(whole);
    let (mut credit, mut credit_further) = (0, 0);
    for (kind, payload) in answers {
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize;
        match kind {
            Kind::StdinCredit => credit += number(&payload),
            Kind::StreamCredit => credit_further += number(&payload[1..]),
            _ => panic!("the process said nothing"),
        }
    }
    assert!(credit <= said.len() && credit_further <= further.len());
    assert!(done.stdin.len().saturating_sub(credit) <= STDIN_WINDOW);
}

/// What the closed policy lets a host mount; the kernel's parameters that it may set begin with these.
const FILES: [&str; 5] =
    ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/termination-log"];
const PARAMETERS: [&str; 2] = ["net.ipv4.", "kernel.shm_rmid_forced"];

thread_local! {
    static POD: RefCell<Pod> = RefCell::new({
        let text = format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''\n{CLOSED}'''\n");
        Pod::new(&text).expect("a policy")
    });
}

/// A request, before the policy that holds where an owner has none of his own, and what init would do.
pub fn request(data: &[u8]) {
    let Ok(request) = Request::from_payload(data) else { return };
    let allowed = POD.with_borrow_mut(|pod| pod.check(&request));
    if let Err(error) = &allowed {
        assert!(!error.message.contains('\n'), "{}", error.message);
    }
    match request {
        Request::Create(create) => {
            spec::look(&create.spec);
            if allowed.is_ok() {
                closed(&create);
            }
        }
        Request::Exec(exec) => {
            assert!(allowed.is_err(), "nobody may run more programs");
            if let Ok(process) = container::process(exec.process) {
                spec::environment(&container::environment(&process));
            }
        }
        Request::Update { resources, .. } => {
            if let Some(found) = container::update(resources.clone()) {
                spec::resources(&resources, &found);
            }
        }
        Request::Network(wanted) => plan(&wanted),
        Request::Sandbox(sandbox) => plan(&sandbox.network),
        _ => {}
    }
}

/// What that policy promises of a container that it lets in.
fn closed(create: &CreateContainer) {
    assert!(create.image.is_some(), "a root of the host's");
    let spec = &create.spec;
    assert!(spec.pointer("/linux/devices").and_then(Value::as_array).is_none_or(Vec::is_empty));
    assert!(spec.pointer("/hooks/startContainer").and_then(Value::as_array).is_none_or(Vec::is_empty));
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let mut words = mount["options"].as_array().into_iter().flatten();
        if mount["type"] == "bind" || words.any(|word| word == "bind" || word == "rbind") {
            assert!(FILES.iter().any(|file| mount["destination"] == *file), "{mount}");
        }
    }
    for name in spec.pointer("/linux/sysctl").and_then(Value::as_object).into_iter().flat_map(|o| o.keys()) {
        assert!(PARAMETERS.iter().any(|start| name.starts_with(start)), "{name}");
    }
}

/// A pod's network.
pub fn network(data: &[u8]) {
    if let Ok(wanted) = serde_json::from_slice(data) {
        plan(&wanted);
    }
}

const DEVICES: [(u32, &str, &str); 4] = [
    (2, "eth0", "02:c0:ff:e4:00:00"),
    (3, "eth1", "02:c0:ff:e4:00:01"),
    (4, "net0", "52:54:00:00:00:01"),
    (5, "aside0", "52:54:00:00:00:02"),
];

/// No name is given while another device has it, every interface has its own device in the end, and messages are the kernel's form.
fn plan(wanted: &Network) {
    let Ok(plan) = network::plan(&DEVICES, wanted) else { return };
    let mut names: Vec<(u32, String)> = DEVICES.iter().map(|d| (d.0, d.1.to_owned())).collect();
    for (index, from, to) in plan.renames {
        assert!(names.iter().all(|(_, name)| *name != to), "{to} is taken");
        let device = names.iter_mut().find(|(i, _)| *i == index).expect("a device");
        assert_eq!(device.1, from);
        device.1 = to;
    }
    assert!(plan.adopted <= wanted.interfaces.len() && plan.indices.len() == wanted.interfaces.len());
    for (interface, index) in wanted.interfaces.iter().zip(&plan.indices) {
        assert!(names.contains(&(*index, interface.name.clone())));
        assert!(interface.name.len() < 16 && !interface.name.contains(['/', '\0', ' ']));
    }
    for message in plan.messages {
        attributes(&message);
    }
}

/// rtnetlink(7): the length of the whole, then attributes, each with its own, at multiples of four.
fn attributes(message: &[u8]) {
    let half = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
    assert_eq!(message[..4], (message.len() as u32).to_ne_bytes());
    // RTM_NEWADDR has a head of 8 bytes, RTM_NEWROUTE one of 12.
    let mut at = 16 + if half(4) == 20 { 8 } else { 12 };
    while at < message.len() {
        let length = usize::from(half(at));
        assert!(length >= 4 && at + length <= message.len());
        at += length.next_multiple_of(4);
    }
    assert_eq!(at, message.len());
}

/// An image's passwd, its group file, and who shall run, with zeros between.
pub fn users(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let (passwd, group, text) = (next(), next(), String::from_utf8_lossy(next()).into_owned());
    let Ok((uid, _, groups)) = image::user(passwd, group, &text) else { return };
    let name = text.split(':').next().unwrap_or_default();
    let file = String::from_utf8_lossy(passwd).into_owned();
    let by_name = |line: &str| {
        let mut fields = line.split(':');
        fields.next() == Some(name) && fields.nth(1).is_some_and(|n| n.parse() == Ok(uid))
    };
    let root = name.is_empty() && (uid == 0 || file.split('\n').any(|line| line.starts_with("0:")));
    assert!(root || name.parse() == Ok(uid) || file.split('\n').any(by_name), "{text:?} is {uid}");
    assert!(groups.is_empty() || !text.contains(':'));
    assert!(
        container::home(&file, uid).is_none_or(|home| !home.is_empty() && !home.contains(['\0', '\n', ':']))
    );
}
