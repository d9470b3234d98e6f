//! A host between guest and KBS over plain HTTP (`allow_plain_http`), which reads every message and alters one of them at a
//! time: what the guest says then, that no secret comes out, and which lie plain HTTP leaves to it.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex},
};

use coffer_attestation::{
    evidence::{Attesters, Sample},
    hash::HashAlgorithm,
    jwe,
    kbs::{Client, ClientError, Credential, Outcome, Transport, Url},
    key::{KeyAlgorithm, PublicJwk, TeeKey},
};
use coffer_kbs::{Answer, Config, Kbs, Query, Running, serve_by};
use serde_json::{Value, json};

const SECRET: &[u8] = b"what only an attested guest may read";
const OTHER: &[u8] = b"of the same owner, for another use";
const TROIS: &str = "/kbs/v0/resource/one/2/trois";

fn kbs() -> Arc<Kbs> {
    let resources =
        BTreeMap::from([("one/2/trois".into(), SECRET.to_vec()), ("one/2/other".into(), OTHER.to_vec())]);
    let config = Config { resources, allow_all: true, admin: true, ..Config::default() };
    Arc::new(Kbs::new(config).unwrap())
}

/// Everything that went by.
type Heard = Arc<Mutex<Vec<(Query, Answer)>>>;

/// A host before the KBS: `ask` and `answer` may alter what goes by.
fn host(
    kbs: &Arc<Kbs>,
    ask: impl Fn(&mut Query) + Send + Sync + 'static,
    answer: impl Fn(&Query, &mut Answer) + Send + Sync + 'static,
) -> (Running, Heard) {
    let (kbs, heard) = (kbs.clone(), Heard::default());
    let log = heard.clone();
    let between = move |query: &Query| {
        let mut query = query.clone();
        ask(&mut query);
        let mut given = kbs.answer(&query);
        log.lock().unwrap().push((query.clone(), given.clone()));
        answer(&query, &mut given);
        given
    };
    (serve_by(between, TcpListener::bind("127.0.0.1:0").unwrap(), None).unwrap(), heard)
}

/// A guest's request, without the pauses between attempts.
fn fetch(host: &Running, client: &mut Client, uri: &str) -> Result<Outcome, ClientError> {
    let mut transport = Transport::plain(Url::parse(&format!("http://{}", host.address)).unwrap());
    let mut attesters = Attesters::of(Sample);
    client.fetch(uri.parse().unwrap());
    transport.run_pausing(client, &mut attesters, |_| ())
}

fn client(credential: Credential) -> Client {
    Client::new("sample", KeyAlgorithm::P256, None, credential).unwrap()
}

fn got(secret: &[u8]) -> Result<Outcome, ClientError> {
    Ok(Outcome::Resource(secret.to_vec().into()))
}

/// What a guest says when the host does this, and that the host has not seen eight bytes of the secret.
fn refusal(
    credential: Credential,
    ask: impl Fn(&mut Query) + Send + Sync + 'static,
    answer: impl Fn(&Query, &mut Answer) + Send + Sync + 'static,
) -> String {
    let (host, heard) = host(&kbs(), ask, answer);
    let message = fetch(&host, &mut client(credential), "kbs:///one/2/trois").expect_err("a lie").to_string();
    assert!(!heard.lock().unwrap().is_empty());
    assert!(!shows(&heard));
    message
}

fn shows(heard: &Heard) -> bool {
    let shows = |bytes: &[u8]| bytes.windows(8).any(|w| SECRET.windows(8).any(|s| s == w));
    heard.lock().unwrap().iter().any(|(query, answer)| shows(&query.body) || shows(&answer.body))
}

fn body(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap()
}

/// Changes a member of an answer to this path.
fn member(
    path: &'static str,
    name: &'static str,
    change: impl Fn(&mut Value) + Send + Sync + 'static,
) -> impl Fn(&Query, &mut Answer) + Send + Sync + 'static {
    move |query, answer| {
        if query.path == path {
            let mut value = body(answer);
            change(&mut value[name]);
            answer.body = value.to_string().into_bytes();
        }
    }
}

fn nothing(_: &mut Query) {}

const AUTH: &str = "/kbs/v0/auth";
const ATTEST: &str = "/kbs/v0/attest";
const COOKIE: Credential = Credential::Cookie;

/// A session of the host's own: it attests with a key that it has, as anybody can with `sample` evidence.
struct Own {
    key: TeeKey,
    nonce: Value,
    cookie: String,
    token: Value,
}

fn ask(kbs: &Kbs, method: &str, path: &str, cookie: Option<String>, body: &Value) -> Answer {
    let (method, path) = (method.into(), path.into());
    kbs.answer(&Query { method, path, cookie, bearer: None, body: body.to_string().into_bytes() })
}

fn own_session(kbs: &Kbs) -> Own {
    let challenge =
        ask(kbs, "POST", AUTH, None, &json!({ "version": "0.4.0", "tee": "sample", "extra-params": {} }));
    let nonce = body(&challenge)["nonce"].clone();
    let key = TeeKey::generate(KeyAlgorithm::P256).unwrap();
    let evidence =
        Attesters::of(Sample).collect(HashAlgorithm::Sha384, nonce.as_str().unwrap(), &key.public()).unwrap();
    let attestation = json!({ "init-data": null, "tee-evidence": evidence,
        "runtime-data": { "nonce": nonce, "tee-pubkey": key.public() } });
    let answer = ask(kbs, "POST", ATTEST, challenge.cookie.clone(), &attestation);
    Own { key, nonce, cookie: challenge.cookie.unwrap(), token: body(&answer)["token"].clone() }
}

#[test]
fn a_host_that_alters_nothing_sees_nothing() {
    for credential in [COOKIE, Credential::Bearer] {
        let (host, heard) = host(&kbs(), nothing, |_, _| {});
        assert_eq!(fetch(&host, &mut client(credential), "kbs:///one/2/trois"), got(SECRET));
        assert_eq!(heard.lock().unwrap().len(), 3);
        assert!(!shows(&heard));
    }
}

#[test]
fn a_changed_challenge_is_refused_by_who_notices_it() {
    let of_another = Arc::new(Mutex::new(own_session(&kbs()).nonce));
    let other_nonce = member(AUTH, "nonce", move |nonce| *nonce = of_another.lock().unwrap().clone());
    assert_eq!(
        refusal(COOKIE, nothing, other_nonce),
        "KBS: attestation refused: AttestationError: the nonce is not this session's"
    );
    // The host puts back, in the guest's message, what the KBS wants to see there: the evidence is over what the guest saw.
    let seen: Arc<Mutex<Value>> = Arc::default();
    let keep = seen.clone();
    let put_back = move |query: &mut Query| {
        if query.path == ATTEST {
            let mut attestation: Value = serde_json::from_slice(&query.body).unwrap();
            attestation["runtime-data"]["nonce"] = seen.lock().unwrap().clone();
            query.body = attestation.to_string().into_bytes();
        }
    };
    let change = member(AUTH, "nonce", move |nonce| {
        *keep.lock().unwrap() = std::mem::replace(nonce, json!("AAAA"));
    });
    assert_eq!(
        refusal(COOKIE, put_back, change),
        "KBS: attestation refused: AttestationError: sample evidence: report_data is not expected"
    );
    for (name, value, words) in [
        ("nonce", json!(""), "KBS: challenge: answer not understood: a nonce of 0 characters"),
        (
            "extra-params",
            json!({ "selected-hash-algorithm": "sha256" }),
            "KBS: attestation refused: AttestationError: sample evidence: report_data is not expected",
        ),
        ("extra-params", json!({ "selected-hash-algorithm": "sha1" }), "\"sha1\" is not known"),
    ] {
        let said = refusal(COOKIE, nothing, member(AUTH, name, move |member| *member = value.clone()));
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_changed_cookie_leads_nowhere() {
    let cookie = |value: Option<&'static str>| {
        move |query: &Query, answer: &mut Answer| {
            if query.path == AUTH {
                answer.cookie = value.map(str::to_owned);
            }
        }
    };
    assert_eq!(
        refusal(COOKIE, nothing, cookie(None)),
        "KBS: challenge: answer not understood: no session cookie"
    );
    assert_eq!(
        refusal(COOKIE, nothing, cookie(Some("00ff"))),
        "KBS: attestation refused: InvalidCookie: no such session"
    );
    // Of a session of the host's, which is waiting for evidence over another nonce.
    let kbs = kbs();
    let waiting =
        ask(&kbs, "POST", AUTH, None, &json!({ "version": "0.4.0", "tee": "sample", "extra-params": {} }));
    let (host, heard) = host(&kbs, nothing, move |query, answer| {
        if query.path == AUTH {
            answer.cookie.clone_from(&waiting.cookie);
        }
    });
    let said = fetch(&host, &mut client(COOKIE), "kbs:///one/2/trois").unwrap_err().to_string();
    assert_eq!(said, "KBS: attestation refused: AttestationError: the nonce is not this session's");
    assert!(!shows(&heard));
}

/// The cookie of a session that the host has attested: whatever the guest sends then, the KBS answers for the host's key.
#[test]
fn a_guest_that_is_led_into_the_hosts_session_gets_what_it_cannot_read() {
    let kbs = kbs();
    let own = own_session(&kbs);
    let cookie = own.cookie.clone();
    let (host, _) = host(&kbs, nothing, move |query, answer| {
        if query.path == AUTH {
            answer.cookie = Some(cookie.clone());
        }
    });
    let said = fetch(&host, &mut client(COOKIE), "kbs:///one/2/trois").unwrap_err().to_string();
    assert_eq!(
        said,
        "KBS: kbs:///one/2/trois: JWE: does not decrypt: it was made for another key, or changed on its way"
    );
}

#[test]
fn a_changed_token_is_worth_nothing() {
    for (token, words) in [
        (json!("a.b"), "want three parts"),
        (json!(""), "want three parts"),
        (json!(7), "invalid type"),
        (json!("a b.c.d"), "not of printable characters"),
    ] {
        let said = refusal(COOKIE, nothing, member(ATTEST, "token", move |member| *member = token.clone()));
        assert!(
            said.starts_with("KBS: attestation: answer not understood: ") && said.contains(words),
            "{said}"
        );
    }
    // Signed by nobody, but a token in form: the KBS notices.
    let unsigned = member(ATTEST, "token", |token| {
        let mut parts: Vec<_> = token.as_str().unwrap().split('.').map(str::to_owned).collect();
        parts[2] = "A".repeat(86);
        *token = parts.join(".").into();
    });
    let said = refusal(Credential::Bearer, nothing, unsigned);
    let refused = "KBS: resource refused: kbs:///one/2/trois: TokenVerifierError: ";
    assert!(said.starts_with(refused), "{said}");
    // The host's own token: the KBS answers for the host's key. By its cookie a guest does not need the token.
    for (credential, wanted) in
        [(COOKIE, Ok(Outcome::Resource(SECRET.to_vec().into()))), (Credential::Bearer, Err(NOT_OURS))]
    {
        let kbs = kbs();
        let own = own_session(&kbs).token;
        let (host, heard) = host(&kbs, nothing, member(ATTEST, "token", move |token| *token = own.clone()));
        let found = fetch(&host, &mut client(credential), "kbs:///one/2/trois").map_err(|e| e.to_string());
        assert_eq!(found, wanted.map_err(str::to_owned), "{credential:?}");
        assert!(!shows(&heard));
    }
}

const NOT_OURS: &str =
    "KBS: kbs:///one/2/trois: JWE: does not decrypt: it was made for another key, or changed on its way";

#[test]
fn a_changed_resource_is_refused() {
    let cut = |name: &'static str, left: usize| {
        member(TROIS, name, move |part| {
            let text = part.as_str().unwrap();
            *part = text[..text.len().min(left)].into();
        })
    };
    assert_eq!(refusal(COOKIE, nothing, cut("ciphertext", 20)), NOT_OURS);
    assert_eq!(refusal(COOKIE, nothing, cut("ciphertext", 0)), NOT_OURS);
    assert_eq!(refusal(COOKIE, nothing, cut("encrypted_key", 40)), NOT_OURS);
    for (name, left, words) in [
        ("tag", 10, "JWE: tag: "),
        ("tag", 20, "JWE: tag: A256GCM wants 16 bytes"),
        ("iv", 12, "JWE: iv: A256GCM wants 12 bytes"),
        ("protected", 40, "JWE: protected header: "),
        ("protected", 0, "JWE: protected header: "),
    ] {
        let said = refusal(COOKIE, nothing, cut(name, left));
        assert!(said.starts_with("KBS: kbs:///one/2/trois: ") && said.contains(words), "{name}: {said}");
    }
    for (status, keep, words) in [
        (200, 100, "KBS: resource: answer not understood: kbs:///one/2/trois: "),
        (200, 0, "KBS: resource: answer not understood: kbs:///one/2/trois: "),
        (500, 100, "KBS: resource refused: kbs:///one/2/trois: no reason given"),
        (404, 100, "KBS: kbs:///one/2/trois: not found: no reason given"),
    ] {
        let said = refusal(COOKIE, nothing, move |query, answer| {
            if query.path == TROIS {
                answer.status = status;
                answer.body.truncate(keep);
            }
        });
        assert!(said.starts_with(words), "{status}: {said}");
    }
}

/// Each part out of another message that the same key opens: the host has it, since it sees the cookie.
#[test]
fn parts_of_two_resources_do_not_make_one() {
    for name in ["protected", "encrypted_key", "iv", "ciphertext", "tag"] {
        let kbs = kbs();
        let asked = kbs.clone();
        let (host, heard) = host(&kbs, nothing, move |query, answer| {
            if query.path == TROIS {
                let other =
                    ask(&asked, "GET", "/kbs/v0/resource/one/2/other", query.cookie.clone(), &Value::Null);
                let (mut message, other) = (body(answer), body(&other));
                assert_ne!(message[name], other[name], "the KBS uses {name} twice");
                message[name] = other[name].clone();
                answer.body = message.to_string().into_bytes();
            }
        });
        let found = fetch(&host, &mut client(COOKIE), "kbs:///one/2/trois").map_err(|e| e.to_string());
        assert_eq!(found, Err(NOT_OURS.to_owned()), "{name}");
        assert!(!shows(&heard));
    }
}

#[test]
fn a_resource_of_another_session_is_refused() {
    let kbs = kbs();
    let own = own_session(&kbs);
    // For the host, and for the guest as it was: it makes a new key each time it starts.
    let (earlier, heard) = host(&kbs, nothing, |_, _| {});
    assert_eq!(fetch(&earlier, &mut client(COOKIE), "kbs:///one/2/trois"), got(SECRET));
    let of_earlier = heard.lock().unwrap().last().unwrap().1.clone();
    let of_host = ask(&kbs, "GET", TROIS, Some(own.cookie), &Value::Null);
    assert_eq!(
        jwe::decrypt(&own.key, &serde_json::from_slice(&of_host.body).unwrap()).unwrap().as_slice(),
        SECRET
    );
    for other in [of_earlier, of_host] {
        assert_eq!(other.status, 200);
        let (host, heard) = host(&kbs, nothing, move |query, answer| {
            if query.path == TROIS {
                *answer = other.clone();
            }
        });
        let found = fetch(&host, &mut client(COOKIE), "kbs:///one/2/trois").map_err(|e| e.to_string());
        assert_eq!(found, Err(NOT_OURS.to_owned()));
        assert!(!shows(&heard));
    }
}

/// Why plain HTTP needs the owner's leave: nothing in a resource says what it is or who encrypted it (RFC 7516 has no sender), so a
/// host can give another that is for the same key, an older one, or its own. It still reads none. TLS ends that
/// (`protocol.rs`), and what decides on images is never taken this way (`guest.rs` of attestation).
#[test]
fn over_plain_http_the_host_chooses_which_secret_comes_and_reads_none() {
    let kbs = kbs();
    let asked = kbs.clone();
    let (swaps, heard) = host(&kbs, nothing, move |query, answer| {
        if query.path == TROIS {
            *answer = ask(&asked, "GET", "/kbs/v0/resource/one/2/other", query.cookie.clone(), &Value::Null);
        }
    });
    assert_eq!(fetch(&swaps, &mut client(COOKIE), "kbs:///one/2/trois"), got(OTHER));
    assert!(!shows(&heard));

    let key: Arc<Mutex<Option<PublicJwk>>> = Arc::default();
    let known = key.clone();
    let overhear = move |query: &mut Query| {
        if query.path == ATTEST {
            let attestation: Value = serde_json::from_slice(&query.body).unwrap();
            let public = attestation["runtime-data"]["tee-pubkey"].clone();
            *key.lock().unwrap() = Some(serde_json::from_value(public).unwrap());
        }
    };
    let (forges, _) = host(&kbs, overhear, move |query, answer| {
        if query.path == TROIS {
            let message = jwe::encrypt(known.lock().unwrap().as_ref().unwrap(), b"the host's own").unwrap();
            answer.body = serde_json::to_vec(&message).unwrap();
        }
    });
    assert_eq!(fetch(&forges, &mut client(COOKIE), "kbs:///one/2/trois"), got(b"the host's own"));
}
