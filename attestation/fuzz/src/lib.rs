//! Fuzz targets: every parser of attestation that a host or a network can reach. Each takes any bytes and panics when
//! something is wrong.

pub mod seeds;

use coffer_attestation::{
    api,
    config::Config,
    encoding::{from_base64, to_base64},
    evidence::{Attesters, Composite, Sample, event_log},
    guest::Guest,
    initdata::Initdata,
    jwe::{self, Jwe},
    jws::Unverified,
    kbs::{self, AddressKind, Client, Credential, Outcome, ResourceUri, Response, ResponseReader, Step, Url},
    key::{KeyAlgorithm, PublicJwk, TeeKey},
    policy::{Policy, Rule, create_input},
    sealed,
    snp::{Report, certificate_table, evidence_json},
    verify::{Expected, Trust, verify_snp},
    yaml,
};
use coffer_fuzz::Target;
use serde_json::{Value, json};

/// The targets.
pub const TARGETS: [Target; 15] = [
    ("initdata", initdata),
    ("http", http),
    ("dns", dns),
    ("session", session),
    ("uri", uri),
    ("jwe", open),
    ("jws", jws),
    ("sealed", unseal),
    ("policy", policy),
    ("report", report),
    ("certificates", certificates),
    ("evidence", evidence),
    ("yaml", manifest),
    ("calls", calls),
    ("keys", keys),
];

/// A key that the seeds are made for. It protects nothing.
#[must_use]
pub fn key() -> p256::SecretKey {
    p256::SecretKey::from_slice(&[7; 32]).expect("below the group's order")
}

fn public() -> PublicJwk {
    TeeKey::P256(key()).public()
}

/// Initdata, its three configurations and its policy; what is accepted has one digest, that of its bytes.
pub fn initdata(data: &[u8]) {
    let Ok(initdata) = Initdata::parse(data) else { return };
    assert_eq!(initdata.raw().as_bytes(), data);
    initdata.check_bound(&initdata.bound::<32>(), "HOST_DATA").expect("its own digest");
    let config = Config::from_initdata(&initdata);
    let guest = Guest::new(Some(data), Attesters::of(Sample));
    // Nothing that the configuration refuses gets as far as a guest.
    assert!(config.is_ok() || guest.is_err());
    if let Ok(mut guest) = guest {
        let _ = guest.policy();
        let _ = api::answer("GET", "/info", &mut guest);
    }
}

/// An answer of a server, whole and in pieces: both give the same.
pub fn http(data: &[u8]) {
    let whole = ResponseReader::default().push(data);
    let mut reader = ResponseReader::default();
    let mut pieces = Ok(None);
    for piece in data.chunks(data.len() / 3 + 1) {
        pieces = reader.push(piece);
        if !matches!(pieces, Ok(None)) {
            break;
        }
    }
    if let (Ok(Some(whole)), Ok(Some(pieces))) = (&whole, &pieces) {
        assert_eq!(whole, pieces);
    }
}

/// A name server's answer to the seed's question: a handful of addresses, or a refusal.
pub fn dns(data: &[u8]) {
    let asked = kbs::question(0x1234, seeds::NAME, AddressKind::A).expect("a name");
    if let Ok(found) = kbs::addresses(&asked, data) {
        assert!(found.len() <= 16);
    }
    if let Ok(name) = std::str::from_utf8(data)
        && let Ok(packet) = kbs::question(1, name, AddressKind::Aaaa)
    {
        assert!(packet.len() <= 12 + 255 + 4 && kbs::addresses(&packet, &packet).is_err());
    }
}

/// A client against a server that sends anything: answers are lines, `STATUS COOKIE BODY`, or `-` where the connection breaks
/// off; after the last comes the first again, so that a short input is a long conversation. No answer may give a secret, since
/// nobody here can encrypt to a key that was made a moment ago.
pub fn session(data: &[u8]) {
    let mut client =
        Client::new("sample", KeyAlgorithm::P256, None, Credential::Cookie).expect("random bytes");
    let data = data.strip_suffix(b"\n").unwrap_or(data);
    let mut lines = data.split(|byte| *byte == b'\n').cycle();
    // The second begins in the session that the first left.
    for _ in 0..2 {
        client.fetch("kbs:///a/b/c".parse().expect("a resource"));
        converse(&mut client, &mut lines);
    }
}

fn converse<'a>(client: &mut Client, lines: &mut impl Iterator<Item = &'a [u8]>) {
    // Bounded by the client itself, or this is the finding.
    for _ in 0..64 {
        match client.step() {
            Step::Send(_) => match lines.next() {
                Some(b"-") | None => client.failed("the end"),
                Some(line) => client.received(&answer(line)),
            },
            Step::Measure(..) => client
                .measured(Ok(Composite { primary_evidence: json!({}), additional_evidence: String::new() })),
            Step::Wait(_) => {}
            Step::Finished(result) => {
                assert!(!matches!(result, Ok(Outcome::Resource(_))), "a secret out of nothing");
                return;
            }
        }
    }
    panic!("the client does not come to an end");
}

fn answer(line: &[u8]) -> Response {
    let mut parts = line.splitn(3, |byte| *byte == b' ');
    let mut next = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let (status, cookie, body) = (next(), next(), next());
    Response {
        status: status.parse().unwrap_or(200),
        headers: vec![("Set-Cookie".into(), format!("kbs-session-id={cookie}"))],
        body: body.into_bytes(),
    }
}

/// A resource's name, a KBS's URL, a path of the workload's API.
pub fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<ResourceUri>() {
        let path = uri.server_path();
        assert!(
            path.starts_with('/') && !path.contains("/../") && !path.contains(['\r', '\n', ' ']),
            "{path}"
        );
        assert_eq!(uri.to_string().parse::<ResourceUri>().map(|u| u.server_path()), Ok(path));
    }
    let _ = ResourceUri::from_path(text);
    if let Ok(url) = Url::parse(text) {
        assert!(!url.authority().contains(['\r', '\n', ' ', '/']));
    }
    let mut guest = Guest::new(None, Attesters::of(Sample)).expect("nothing to refuse");
    let (status, _) = api::answer("GET", text, &mut guest);
    assert!([200, 400, 404, 500].contains(&status));
}

/// An encrypted resource. Whatever opens says what the seed said: it is authenticated.
pub fn open(data: &[u8]) {
    let Ok(message) = serde_json::from_slice::<Jwe>(data) else { return };
    if let Ok(secret) = jwe::decrypt(&TeeKey::P256(key()), &message) {
        assert_eq!(secret.as_slice(), seeds::SECRET);
    }
}

/// A token.
pub fn jws(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = Unverified::parse(text)
        && let Ok(payload) = token.verify(&public())
    {
        assert_eq!(payload, seeds::SECRET);
    }
}

/// A sealed secret. Beside the signer's key, only what a signed payload names is fetched.
pub fn unseal(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut calls = 0;
    let signer = serde_json::to_vec(&public()).expect("plain data");
    let files = |path: &str| path.starts_with(sealed::SIGNERS).then(|| "kbs:///a/b/c".to_owned());
    let _ = sealed::unseal(text, &files, &mut |uri| {
        calls += 1;
        assert!(calls == 1 || uri.to_string() == seeds::SEALED_URI, "an unsigned payload was believed");
        Ok(if calls == 1 { signer.clone().into() } else { vec![7; 32].into() })
    });
}

/// A container's configuration, as a policy sees it; and a policy itself.
pub fn policy(data: &[u8]) {
    if let Ok(spec) = serde_json::from_slice::<Value>(data) {
        let input = create_input("c", &spec, None);
        let denied = Policy::default_for(true).check(Rule::CreateContainer, &input);
        let line = denied.expect_err("a root of the host's under a TEE").to_string();
        assert!(!line.contains('\n'));
    } else if let Ok(text) = std::str::from_utf8(data)
        && let Ok(mut policy) = Policy::parse(text)
    {
        let _ = policy.check(Rule::ExecProcess, &json!({ "process": { "Args": ["sh"] } }));
    }
}

/// A report of the firmware's, there and back through its JSON form.
pub fn report(data: &[u8]) {
    let Ok(report) = Report::from_bytes(data) else { return };
    let again = Report::from_json(&report.to_json());
    // JSON has no place for reserved bytes: those that come back are zero, all else is the same.
    if let Ok(again) = again {
        assert_eq!(again.report_data(), report.report_data());
        assert_eq!(again.measurement(), report.measurement());
        assert_eq!(again.host_data(), report.host_data());
        assert_eq!(again.policy(), report.policy());
    }
    let _ = (report.family(), report.signature(), report.reported_tcb(), evidence_json(&report, &[]));
}

/// What the host gives for certificates, and for an event log.
pub fn certificates(data: &[u8]) {
    if let Ok(list) = certificate_table(data) {
        let total: usize = list.iter().map(|certificate| certificate.der.len()).sum();
        assert!(total <= data.len().saturating_mul(list.len()));
    }
    assert!(event_log(data).len() <= data.len());
}

/// Evidence in JSON, as a KBS gets it. None is accepted: nothing here is signed for this report data.
pub fn evidence(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    let trust =
        Trust::from_pem(include_str!("../../testdata/snp/genoa_ask_ark_asvk.pem")).expect("AMD's roots");
    let expected = Expected { report_data: [0xa5; 64], host_data: None };
    assert!(verify_snp(&value, &trust, &expected).is_err());
}

/// A manifest. What is read has JSON's form as well, which is flow, and reads back as itself.
pub fn manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match yaml::read(text) {
        Ok(documents) => {
            for document in documents {
                let json = document.to_string();
                if let Ok(again) = yaml::read(&json) {
                    assert_eq!(again, [document]);
                }
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
}

/// Bytes of a program in the pod, and what it is sent.
struct Caller<'a> {
    says: std::slice::Chunks<'a, u8>,
    hears: Vec<u8>,
}

impl std::io::Read for Caller<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let piece = self.says.next().unwrap_or_default();
        buffer[..piece.len()].copy_from_slice(piece);
        Ok(piece.len())
    }
}

impl std::io::Write for Caller<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hears.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

const ANSWERS: &str =
    "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"coffer.toml\" = \"attestation_api = true\"\n";

/// A call of a program in the pod, and of one elsewhere: nothing, or one whole answer.
pub fn calls(data: &[u8]) {
    let mut guest = Guest::new(Some(ANSWERS.as_bytes()), Attesters::of(Sample)).expect("nothing to refuse");
    for (peer, statuses) in [("127.0.0.1:9", &[200, 400, 404, 405, 500][..]), ("10.0.0.1:9", &[400, 403])] {
        let mut caller = Caller { says: data.chunks(data.len() / 5 % 4000 + 1), hears: Vec::new() };
        let peer = peer.parse().expect("an address");
        api::one(&mut caller, peer, &mut guest).expect("nothing fails");
        let text = String::from_utf8(caller.hears).expect("no secret is here, and all else is text");
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            assert!(text.is_empty());
            continue;
        };
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|word| word.parse().ok());
        assert!(status.is_some_and(|status: u16| statuses.contains(&status)), "{head}");
        assert!(lines.any(|line| line == format!("Content-Length: {}", body.len())), "{head}");
    }
}

/// A private key in PEM, or what such a PEM would hold.
pub fn keys(data: &[u8]) {
    let text = match std::str::from_utf8(data) {
        Ok(text) if text.starts_with("-----BEGIN") => text.to_owned(),
        _ => pem(data),
    };
    let Ok(key) = TeeKey::from_pem(&text) else { return };
    let again = TeeKey::from_pem(&key.to_pem().expect("a key writes itself")).expect("and is read");
    assert_eq!(again.public(), key.public());
    let PublicJwk::EC { x, .. } = key.public() else { return };
    assert!(!x.is_empty());
}

fn pem(der: &[u8]) -> String {
    let mut text = String::from("-----BEGIN PRIVATE KEY-----\n");
    for line in to_base64(der).as_bytes().chunks(64) {
        text += std::str::from_utf8(line).expect("Base64");
        text.push('\n');
    }
    text + "-----END PRIVATE KEY-----\n"
}

/// What a PEM holds.
#[must_use]
pub fn der(pem: &str) -> Vec<u8> {
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    from_base64(&body).expect("Base64")
}
