//! The client against the server, and against a host in the middle.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use coffer_attestation::{
    evidence::{Attesters, Sample, SampleDevice},
    hash::HashAlgorithm,
    kbs::{Client, ClientError, Credential, Outcome, Request, Transport, Url, trusting},
    key::{KeyAlgorithm, TeeKey},
};
use coffer_kbs::{Config, Identity, Kbs, Query, Running, serve};
use serde_json::{Value, json};

const SECRET: &[u8] = b"what only an attested guest may read";

fn config() -> Config {
    let resources = BTreeMap::from([
        ("one/2/trois".into(), SECRET.to_vec()),
        ("one/2/other".into(), b"another secret".to_vec()),
    ]);
    Config { resources, allow_all: true, admin: true, ..Config::default() }
}

fn server(identity: Option<&Identity>, config: Config) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    serve(Arc::new(Kbs::new(config).unwrap()), listener, identity).unwrap()
}

fn plain(address: SocketAddr) -> Transport {
    Transport::plain(Url::parse(&format!("http://{address}")).unwrap())
}

/// Drives without the pauses between attempts.
fn fetch(
    transport: &mut Transport,
    client: &mut Client,
    attesters: &mut Attesters,
    uri: &str,
) -> Result<Outcome, ClientError> {
    client.fetch(uri.parse().unwrap());
    transport.run_pausing(client, attesters, |_| ())
}

fn client(algorithm: KeyAlgorithm, credential: Credential) -> Client {
    Client::new("sample", algorithm, None, credential).unwrap()
}

fn secret() -> Result<Outcome, ClientError> {
    Ok(Outcome::Resource(SECRET.to_vec().into()))
}

#[test]
fn every_kind_of_key_and_credential_gets_the_secret() {
    let server = server(None, config());
    for algorithm in [KeyAlgorithm::P256, KeyAlgorithm::P521, KeyAlgorithm::Rsa] {
        for credential in [Credential::Cookie, Credential::Bearer] {
            let mut client = client(algorithm, credential);
            let mut attesters =
                Attesters { primary: Box::new(Sample), devices: vec![Box::new(SampleDevice)] };
            let found = fetch(&mut plain(server.address), &mut client, &mut attesters, "kbs:///one/2/trois");
            assert_eq!(found, secret(), "{algorithm:?} {credential:?}");
        }
    }
}

#[test]
fn the_default_policy_refuses_sample_evidence_and_says_so() {
    let server = server(None, Config { allow_all: false, ..config() });
    let mut client = client(KeyAlgorithm::P256, Credential::Cookie);
    let found =
        fetch(&mut plain(server.address), &mut client, &mut Attesters::of(Sample), "kbs:///one/2/trois");
    let message = found.unwrap_err().to_string();
    assert!(message.contains("PolicyDeny"), "{message}");
}

#[test]
fn the_owners_calls_change_what_guests_get() {
    let kbs = Kbs::new(config()).unwrap();
    let call = |method: &str, path: &str, body: &[u8]| {
        kbs.answer(&Query {
            method: method.into(),
            path: format!("/kbs/v0/{path}"),
            body: body.to_vec(),
            ..Query::default()
        })
    };
    assert_eq!(call("POST", "resource/a/b/c", b"new").status, 200);
    assert_eq!(call("DELETE", "resource/a/b/c", b"").status, 200);
    assert_eq!(call("DELETE", "resource/a/b/c", b"").status, 401);
    let policy = coffer_attestation::encoding::to_base64url(b"package policy\nallow := false\n");
    let body = json!({ "policy": policy }).to_string();
    assert_eq!(call("POST", "resource-policy", body.as_bytes()).status, 200);
    assert_eq!(call("GET", "resource-policy", b"").body, json!(policy).to_string().as_bytes());
    assert_eq!(call("GET", "nothing/here", b"").status, 404);
    assert_eq!(call("GET", "resource/one/2/trois", b"").status, 401);
}

/// What a host does with the bytes that come in one direction of one connection.
type Changes = Box<dyn FnMut(Vec<u8>) -> Vec<u8> + Send>;

/// A host between guest and KBS that may change each direction's bytes; `direction` 0 is to the KBS. It gives up on a
/// connection on which nothing came for `idle`: a changed length leaves both sides waiting.
fn middle(
    to: SocketAddr,
    idle: Duration,
    change: impl Fn(usize, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
) -> SocketAddr {
    let change = Arc::new(change);
    by_connection(to, idle, move |direction| {
        let change = change.clone();
        Box::new(move |bytes| change(direction, bytes))
    })
}

/// The same, with changes of its own for each direction of each connection.
fn by_connection(
    to: SocketAddr,
    idle: Duration,
    changes: impl Fn(usize) -> Changes + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for guest in listener.incoming().flatten() {
            let kbs = TcpStream::connect(to).unwrap();
            for (direction, mut from, mut into) in [
                (0, guest.try_clone().unwrap(), kbs.try_clone().unwrap()),
                (1, kbs.try_clone().unwrap(), guest.try_clone().unwrap()),
            ] {
                let mut change = changes(direction);
                from.set_read_timeout(Some(idle)).unwrap();
                thread::spawn(move || {
                    let mut buffer = [0; 64 * 1024];
                    while let Ok(count) = from.read(&mut buffer) {
                        if count == 0 || into.write_all(&change(buffer[..count].to_vec())).is_err() {
                            break;
                        }
                    }
                    let _ = into.shutdown(std::net::Shutdown::Both);
                    let _ = from.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    address
}

fn identity() -> Identity {
    Identity::self_signed(vec!["127.0.0.1".into()]).unwrap()
}

fn through(address: SocketAddr, identity: &Identity) -> Result<Outcome, ClientError> {
    let url = Url::parse(&format!("https://{address}")).unwrap();
    let mut transport = trusting(url, &identity.certificate_pem).unwrap();
    let mut client = client(KeyAlgorithm::P256, Credential::Cookie);
    fetch(&mut transport, &mut client, &mut Attesters::of(Sample), "kbs:///one/2/trois")
}

#[test]
fn tls_with_the_pinned_certificate_works_and_with_another_never_sends_a_thing() {
    let identity = identity();
    let server = server(Some(&identity), config());
    assert_eq!(through(server.address, &identity), secret());
    let other = Identity::self_signed(vec!["127.0.0.1".into()]).unwrap();
    let message = through(server.address, &other).unwrap_err().to_string();
    assert!(message.starts_with("KBS: challenge:"), "{message}");
}

#[test]
fn a_middle_that_delays_and_cuts_into_pieces_changes_nothing() {
    let identity = identity();
    let server = server(Some(&identity), config());
    let address = middle(server.address, Duration::from_secs(60), |_, bytes| {
        thread::sleep(Duration::from_millis(20));
        bytes
    });
    assert_eq!(through(address, &identity), secret());
}

/// Connection, handshake, request and answer have one limit: here no wait is as long as it, and all together are longer.
#[test]
fn a_whole_exchange_has_one_limit() {
    let identity = identity();
    let server = server(Some(&identity), config());
    let address = middle(server.address, Duration::from_secs(60), |_, bytes| {
        thread::sleep(Duration::from_millis(400));
        bytes
    });
    let exchange = |patience: Duration| {
        let url = Url::parse(&format!("https://{address}")).unwrap();
        let mut transport = trusting(url, &identity.certificate_pem).unwrap().within(patience);
        let found = transport.exchange(&Request::get("/kbs/v0/nothing".into()));
        found.map(|response| response.status).map_err(|e| e.to_string())
    };
    assert_eq!(exchange(Duration::from_secs(60)), Ok(404));
    assert_eq!(exchange(Duration::from_millis(1200)), Err("connection: it took longer than 1.2 s".into()));
}

#[test]
fn no_change_of_bytes_gives_a_wrong_secret() {
    let identity = identity();
    let server = server(Some(&identity), config());
    type Change = fn(Vec<u8>) -> Vec<u8>;
    let changes: [(&str, Change); 5] = [
        ("flip the last bit", |mut b| {
            if let Some(last) = b.last_mut() {
                *last ^= 1;
            }
            b
        }),
        ("flip a bit in the middle", |mut b| {
            let at = b.len() / 2;
            b[at] ^= 0x10;
            b
        }),
        ("cut the end off", |mut b| {
            b.truncate(b.len().saturating_sub(1));
            b
        }),
        ("send twice", |b| [b.clone(), b].concat()),
        ("swap halves", |mut b| {
            let at = b.len() / 2;
            b.rotate_left(at);
            b
        }),
    ];
    for (name, change) in changes {
        for wanted in [0, 1] {
            let address = middle(server.address, Duration::from_millis(300), move |direction, b| {
                if direction == wanted { change(b) } else { b }
            });
            let found = through(address, &identity);
            assert!(found.is_err(), "{name}, direction {wanted}: {found:?}");
        }
    }
}

/// Takes whole TLS records (RFC 8446, 5.1) from the front of what came.
fn records(bytes: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let [_, _, _, high, low, ..] = bytes[..] {
        let length = 5 + usize::from(u16::from_be_bytes([high, low]));
        if bytes.len() < length {
            break;
        }
        all.push(bytes.drain(..length).collect());
    }
    all
}

/// What a host does with one encrypted record: the lies that need no key.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Twice,
    Missing,
    Changed,
    /// Kept back until the next has gone.
    Late,
}

/// One lie about one encrypted record of every connection, the first of which belong to the handshake and the others to requests and
/// answers: an error or the secret comes of it, and nothing else.
#[test]
fn a_record_changed_late_missing_or_twice_gives_no_wrong_secret() {
    const APPLICATION_DATA: u8 = 23;
    /// Finished and three requests; as many of the server's at least. More than the handshake is to be lied about.
    const LEAST: usize = 4;
    let identity = identity();
    let server = server(Some(&identity), config());
    let honest = Arc::new(Mutex::new([0; 2]));
    let seen = honest.clone();
    let counting = by_connection(server.address, Duration::from_secs(60), move |direction| {
        let (seen, mut rest) = (seen.clone(), Vec::new());
        Box::new(move |bytes| {
            rest.extend_from_slice(&bytes);
            let count = records(&mut rest).iter().filter(|r| r[0] == APPLICATION_DATA).count();
            seen.lock().unwrap()[direction] += count;
            bytes
        })
    });
    assert_eq!(through(counting, &identity), secret());
    let honest = *honest.lock().unwrap();
    assert!(honest.iter().all(|count| *count >= LEAST), "{honest:?}");
    let once = |lie: Lie, wanted: usize, at: usize| {
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        let address = by_connection(server.address, Duration::from_millis(300), move |direction| {
            let (count, mut rest, mut place, mut kept) = (count.clone(), Vec::new(), 0, None);
            Box::new(move |bytes| {
                rest.extend_from_slice(&bytes);
                let mut out = Vec::new();
                for mut record in records(&mut rest) {
                    let encrypted = direction == wanted && record[0] == APPLICATION_DATA;
                    let here = encrypted && place == at;
                    place += usize::from(encrypted);
                    count.fetch_add(usize::from(here), Ordering::Relaxed);
                    match lie {
                        Lie::Missing if here => continue,
                        Lie::Late if here => {
                            kept = Some(record);
                            continue;
                        }
                        Lie::Twice if here => out.extend_from_slice(&record),
                        Lie::Changed if here => *record.last_mut().unwrap() ^= 1,
                        _ => {}
                    }
                    out.extend_from_slice(&record);
                    out.extend(kept.take().unwrap_or_default());
                }
                out
            })
        });
        let found = through(address, &identity);
        assert!(told.load(Ordering::Relaxed) > 0, "{lie:?} of record {at}, direction {wanted}: not told");
        // On a connection that carried an answer before, a request that breaks off is sent again on a new one.
        assert!(found.is_err() || found == secret(), "{lie:?} of {at}, direction {wanted}: {found:?}");
        // The first of either direction are the handshake's and the first request: without them nothing begins.
        assert!(found.is_err() || at > 1, "{lie:?} of {at}, direction {wanted}: {found:?}");
    };
    thread::scope(|scope| {
        for lie in [Lie::Twice, Lie::Missing, Lie::Changed, Lie::Late] {
            for (wanted, at) in (0..2).flat_map(|wanted| (0..honest[wanted]).map(move |at| (wanted, at))) {
                scope.spawn(move || once(lie, wanted, at));
            }
        }
    });
}

#[test]
fn a_recorded_conversation_is_worth_nothing_to_either_side() {
    let identity = identity();
    let server = server(Some(&identity), config());
    let heard: Arc<Mutex<[Vec<u8>; 2]>> = Arc::default();
    let record = Arc::clone(&heard);
    let address = middle(server.address, Duration::from_secs(60), move |direction, b| {
        record.lock().unwrap()[direction].extend_from_slice(&b);
        b
    });
    assert_eq!(through(address, &identity), secret());
    let [from_guest, from_kbs] = heard.lock().unwrap().clone();
    let shows = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|w| w == SECRET);
    assert!(!shows(&from_guest) && !shows(&from_kbs) && from_kbs.len() > 1000);
    // The KBS's part again, to a guest that attests anew.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let again = from_kbs.clone();
    thread::spawn(move || {
        for mut guest in listener.incoming().flatten() {
            let _ = guest.read(&mut [0; 4096]).and_then(|_| guest.write_all(&again));
        }
    });
    let found = through(address, &identity);
    assert!(matches!(found, Err(ClientError::Transport { .. })), "{found:?}");
    // The guest's part again, to the KBS.
    let mut kbs = TcpStream::connect(server.address).unwrap();
    kbs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let _ = kbs.write_all(&from_guest).and_then(|()| kbs.shutdown(std::net::Shutdown::Write));
    let mut said = Vec::new();
    let _ = kbs.read_to_end(&mut said);
    // No more than its own half of a handshake, and that it went wrong: the answers of before were longer.
    assert!(!shows(&said) && said.len() < from_kbs.len(), "{} of {} bytes", said.len(), from_kbs.len());
}

/// Answers of plain HTTP, as the KBS gives them to `query`, with the request and the answer in the host's hands.
fn ask(kbs: &Kbs, method: &str, path: &str, cookie: Option<&str>, body: &Value) -> coffer_kbs::Answer {
    kbs.answer(&Query {
        method: method.into(),
        path: format!("/kbs/v0/{path}"),
        cookie: cookie.map(str::to_owned),
        bearer: None,
        body: body.to_string().into_bytes(),
    })
}

/// A whole attestation of a guest, changed by the host just before it reaches the KBS.
fn attested(kbs: &Kbs, change: impl FnOnce(&mut Value)) -> (TeeKey, String, coffer_kbs::Answer) {
    let auth = json!({ "version": "0.4.0", "tee": "sample", "extra-params": {} });
    let challenge = ask(kbs, "POST", "auth", None, &auth);
    let cookie = challenge.cookie.unwrap();
    let nonce = serde_json::from_slice::<Value>(&challenge.body).unwrap()["nonce"].clone();
    let key = TeeKey::generate(KeyAlgorithm::P256).unwrap();
    let algorithm = HashAlgorithm::Sha384;
    let evidence = Attesters::of(Sample).collect(algorithm, nonce.as_str().unwrap(), &key.public()).unwrap();
    let mut body = json!({
        "init-data": null,
        "runtime-data": { "nonce": nonce, "tee-pubkey": key.public() },
        "tee-evidence": evidence,
    });
    change(&mut body);
    let answer = ask(kbs, "POST", "attest", Some(&cookie), &body);
    (key, cookie, answer)
}

#[test]
fn the_host_cannot_put_its_own_key_nonce_or_devices_into_an_attestation() {
    let kbs = Kbs::new(config()).unwrap();
    assert_eq!(attested(&kbs, |_| {}).2.status, 200);
    let hosts = TeeKey::generate(KeyAlgorithm::P256).unwrap().public();
    let swap = |at: &'static str, with: Value| {
        attested(&kbs, move |body| *body.pointer_mut(at).unwrap() = with).2.status
    };
    assert_eq!(swap("/runtime-data/tee-pubkey", json!(hosts)), 401);
    assert_eq!(swap("/runtime-data/nonce", json!("AAAA")), 401);
    assert_eq!(swap("/tee-evidence/additional_evidence", json!("{\"sampledevice\":{}}")), 401);
    assert_eq!(swap("/tee-evidence/primary_evidence", json!({ "svn": "1", "report_data": "" })), 401);
    assert_eq!(swap("/init-data", json!({ "format": "json", "body": "{}" })), 401);
    assert_eq!(swap("/tee-evidence", json!(null)), 401);
}

#[test]
fn an_attestation_cannot_be_replayed_in_another_session() {
    let kbs = Kbs::new(config()).unwrap();
    let mut recorded = Value::Null;
    attested(&kbs, |body| recorded = body.clone());
    assert_eq!(attested(&kbs, |body| *body = recorded).2.status, 401);
}

#[test]
fn an_eavesdropper_with_the_cookie_gets_only_ciphertext_for_the_guest() {
    let kbs = Kbs::new(config()).unwrap();
    let (key, cookie, _) = attested(&kbs, |_| {});
    let stolen = ask(&kbs, "GET", "resource/one/2/trois", Some(&cookie), &Value::Null);
    assert_eq!(stolen.status, 200);
    assert!(!stolen.body.windows(8).any(|w| SECRET.windows(8).any(|s| s == w)));
    let message = serde_json::from_slice(&stolen.body).unwrap();
    assert!(
        coffer_attestation::jwe::decrypt(&TeeKey::generate(KeyAlgorithm::P256).unwrap(), &message).is_err()
    );
    assert_eq!(coffer_attestation::jwe::decrypt(&key, &message).unwrap().as_slice(), SECRET);
}
