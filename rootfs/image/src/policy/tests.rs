use base64::{Engine, engine::general_purpose::STANDARD};
use proptest::prelude::*;

use super::{sigstore::Signature, *};

const PRIVATE: &str = include_str!("../../testdata/sign/p256.pem");
const PUBLIC: &str = include_str!("../../testdata/sign/p256.pub");
const ED25519: &str = include_str!("../../testdata/sign/ed25519.pub");
const RSA: &str = include_str!("../../testdata/jwe/rsa.pub");
/// By `openssl dgst -sha256 -sign` with `testdata/jwe/rsa.pem`, over [`PAYLOAD`].
const RSA_SIGNATURE: &[u8] = include_bytes!("../../testdata/sign/payload.rsa");
/// By `openssl pkeyutl -sign -rawin` with the key of [`ED25519`], over [`PAYLOAD`].
const ED25519_SIGNATURE: &[u8] = include_bytes!("../../testdata/sign/payload.ed25519");
/// By `openssl dgst -sha256 -sign` with [`PRIVATE`], over [`PAYLOAD`].
const P256_SIGNATURE: &[u8] = include_bytes!("../../testdata/sign/payload.p256");
const PAYLOAD: &[u8] = include_bytes!("../../testdata/sign/payload.json");

fn image() -> Digest {
    Digest::sha256(b"image")
}

fn policy(text: serde_json::Value) -> Policy {
    Policy::parse(text.to_string().as_bytes()).unwrap()
}

fn signed(extra: serde_json::Value) -> Policy {
    let mut requirement = serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode(PUBLIC)});
    for (name, value) in extra.as_object().unwrap() {
        requirement[name] = value.clone();
    }
    policy(
        serde_json::json!({"default": [{"type": "reject"}], "transports": {"docker": {"r.io/app": [requirement]}}}),
    )
}

fn refused(text: serde_json::Value) -> String {
    Policy::parse(text.to_string().as_bytes()).unwrap_err().to_string()
}

fn check(policy: &Policy, name: &str, signatures: &[Signature]) -> Result<Verdict, String> {
    check_origin(policy, &Origin::Registry(Name::of_image(name).unwrap()), signatures)
}

fn check_origin(policy: &Policy, origin: &Origin, signatures: &[Signature]) -> Result<Verdict, String> {
    check_all(policy, origin, &Signatures { sigstore: signatures.to_vec(), simple: Vec::new() })
}

fn check_all(policy: &Policy, origin: &Origin, signatures: &Signatures) -> Result<Verdict, String> {
    let digests = [image()];
    let subject = Subject { origin, digests: &digests };
    policy.check(&subject, signatures, &|path| Err(format!("{path}: not here"))).map_err(|e| e.to_string())
}

#[test]
fn signatures_by_openssl_hold() {
    let pem = |text| PublicKey::from_pem(text).unwrap();
    let keys = [pem(PUBLIC), pem(RSA), pem(ED25519)];
    for (at, bytes) in [P256_SIGNATURE, RSA_SIGNATURE, ED25519_SIGNATURE].into_iter().enumerate() {
        let signature = Signature::new(PAYLOAD.to_vec(), bytes.to_vec());
        assert_eq!(signature.check(&keys[at..=at], &[image()]).unwrap(), "r.io/app:1");
        assert_eq!(signature.check(&keys, &[image()]).unwrap(), "r.io/app:1");
        let other = signature.check(&keys, &[Digest::sha256(b"other")]).unwrap_err().to_string();
        assert!(other.starts_with("signature: it is for sha256:"), "{other}");
        let crossed = &keys[(at + 1) % 3..][..1];
        assert!(signature.check(crossed, &[image()]).is_err() && signature.check(&[], &[image()]).is_err());
        let changed = Signature::new([PAYLOAD, b" "].concat(), bytes.to_vec());
        assert!(changed.check(&keys, &[image()]).is_err());
    }
}

#[test]
fn a_payload_of_another_shape_vouches_for_nothing() {
    let good: serde_json::Value = serde_json::from_slice(PAYLOAD).unwrap();
    let keys = [PublicKey::from_pem(PUBLIC).unwrap()];
    let check = |text: String| Signature::over(PRIVATE, text.into_bytes()).unwrap().check(&keys, &[image()]);
    check(good.to_string()).unwrap();
    for (at, value) in [
        ("/critical/type", "atomic container signature".into()),
        ("/critical/image/docker-manifest-digest", "sha256:00".into()),
        ("/critical/image", serde_json::json!({})),
        ("/critical/identity", serde_json::json!({"docker-reference": "r.io/app:1", "more": 1})),
        ("/optional", serde_json::json!([])),
    ] {
        let mut payload = good.clone();
        *payload.pointer_mut(at).unwrap() = value;
        assert!(check(payload.to_string()).is_err(), "{payload}");
    }
    let twice = good.to_string().replacen(
        "{\"docker-reference\"",
        "{\"docker-reference\":\"x\",\"docker-reference\"",
        1,
    );
    assert!(check(twice).is_err());
}

#[test]
fn rules_are_chosen_by_scope_and_all_must_hold() {
    let good = &[Signature::sign(PRIVATE, "r.io/app:1", &image()).unwrap()];
    let p = signed(serde_json::json!({}));
    assert_eq!(check(&p, "r.io/app:1", good), Ok(Verdict::Signed));
    assert_eq!(check(&p, &format!("r.io/app@{}", image()), good), Ok(Verdict::Signed));
    let why = check(&p, &format!("r.io/app@{}", Digest::sha256(b"other")), good).unwrap_err();
    assert!(why.contains("names another image than sha256:"), "{why}");
    let why = check(&p, "r.io/app:1", &[]).unwrap_err();
    assert!(why.contains("the rule for docker:r.io/app: there is none"), "{why}");
    let why = check(&p, "r.io/app", good).unwrap_err();
    assert!(why.ends_with("it is for r.io/app:1"), "{why}");
    let why = check(&p, "r.io/apple:1", good).unwrap_err();
    assert_eq!(why, "policy: r.io/apple:1 is rejected by the rule for default");
    // A bad signature beside a good one does no harm, and a refusal is short.
    let bad = Signature::new(b"{}".to_vec(), vec![1]);
    assert_eq!(check(&p, "r.io/app:1", &[bad.clone(), good[0].clone()]), Ok(Verdict::Signed));
    let why = check(&p, "r.io/app:1", &vec![bad; 64]).unwrap_err();
    assert!(why.ends_with("; and 60 more") && why.len() < 600, "{why}");
    let mut twice = serde_json::json!({"default": [{"type": "reject"}], "transports": {"docker": {
        "r.io": [{"type": "sigstoreSigned", "keyData": STANDARD.encode(PUBLIC)}, {"type": "insecureAcceptAnything"}]}}});
    assert_eq!(check(&policy(twice.clone()), "r.io/app:1", good), Ok(Verdict::Signed));
    twice["transports"]["docker"]["r.io"][1] = serde_json::json!({"type": "reject"});
    assert!(check(&policy(twice), "r.io/app:1", good).is_err());
}

#[test]
fn scopes() {
    let accept = serde_json::json!([{"type": "insecureAcceptAnything"}]);
    let reject = serde_json::json!([{"type": "reject"}]);
    let p = policy(serde_json::json!({"default": reject, "transports": {
        "docker": {"": accept, "r.io": reject, "*.example.com": reject, "a.example.com:5000/ok": accept},
        "oci": {"/images": accept, "/images/not": reject},
    }}));
    for (name, wanted) in [
        ("other/x", None),
        ("r.io/a/b:1", Some("docker:r.io")),
        // Another registry, though its name is the same.
        ("r.io:5000/a", None),
        ("a.example.com/x", Some("docker:*.example.com")),
        ("a.example.com:5000/x", Some("docker:*.example.com")),
        ("a.example.com:5000/ok/x", None),
    ] {
        let got = check(&p, name, &[]);
        match wanted {
            None => assert_eq!(got, Ok(Verdict::Accepted), "{name}"),
            Some(rule) => {
                assert!(got.as_ref().is_err_and(|why| why.ends_with(&format!("rule for {rule}"))), "{got:?}")
            }
        }
    }
    let layout = |path: &str| check_origin(&p, &Origin::Layout(path.into()), &[]);
    assert!(layout("/images/a").is_ok() && layout("/images/not/a").is_err() && layout("/imagesx").is_err());
}

#[test]
fn what_is_not_known_is_refused() {
    for requirement in [
        serde_json::json!({"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}}),
        serde_json::json!({"type": "reject", "unless": 1}),
        serde_json::json!({"type": "signedBy", "keyType": "GPGKeys"}),
        serde_json::json!({"type": "signedBy", "keyType": "x", "keyPath": "/x"}),
        serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/x", "keyData": STANDARD.encode(RING)}),
        serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyDatas": [STANDARD.encode(RING)]}),
        serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyPaths": []}),
        serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyData": STANDARD.encode("not a ring")}),
        serde_json::json!({"type": "sigstoreSigned"}),
        serde_json::json!({"type": "sigstoreSigned", "keyPath": "/x", "keyData": STANDARD.encode(PUBLIC)}),
        serde_json::json!({"type": "sigstoreSigned", "keyPath": "/x", "fulcio": {}}),
        serde_json::json!({"type": "sigstoreSigned", "keyPaths": []}),
        serde_json::json!({"type": "sigstoreSigned", "keyData": STANDARD.encode("not PEM")}),
        serde_json::json!({"type": "sigstoreSigned", "keyPath": "/x", "signedIdentity": {"type": "matchAny"}}),
    ] {
        refused(serde_json::json!({"default": [requirement]}));
    }
    for text in [
        r#"{}"#,
        r#"{"default": []}"#,
        r#"{"default": [{"type": "reject"}], "transports": {"docker": {"r.io": []}}}"#,
        r#"{"default": [{"type": "reject"}], "transports": {"docker": {"r.io": [{"type": "reject"}], "r.io": [{"type": "insecureAcceptAnything"}]}}}"#,
        r#"{"default": [{"type": "reject"}], "transports": {"docker": {}, "docker": {}}}"#,
        r#"{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}"#,
        r#"{"default": [{"type": "reject", "type": "insecureAcceptAnything"}]}"#,
        r#"{"default": [{"type": "reject"}], "defualt": []}"#,
    ] {
        assert!(Policy::parse(text.as_bytes()).is_err(), "{text}");
    }
    assert!(matches!(Policy::parse(&vec![b' '; MOST_POLICY + 1]), Err(PolicyError::TooLong(_))));
}

/// Fedora's policy has such a rule for one registry, and must do for the others.
#[test]
fn what_cannot_be_checked_is_refused_where_it_decides() {
    let key = STANDARD.encode(PUBLIC);
    let good = &[Signature::sign(PRIVATE, "r.io/app:1", &image()).unwrap()];
    for (requirement, words) in [
        (
            serde_json::json!({"type": "signedBy", "keyType": "X509Certificates", "keyPath": "/x"}),
            "write GPGKeys",
        ),
        (serde_json::json!({"type": "sigstoreSigned", "fulcio": {"caPath": "/x"}}), "keyPath or keyData"),
        (
            serde_json::json!({"type": "sigstoreSigned", "keyData": key, "rekorPublicKeyPath": "/x"}),
            "transparency log",
        ),
    ] {
        let p = policy(serde_json::json!({"default": [{"type": "insecureAcceptAnything"}],
            "transports": {"docker": {"r.io": [requirement]}}}));
        let why = check(&p, "r.io/app:1", good).unwrap_err();
        assert!(
            why.starts_with("policy: r.io/app:1: the rule for docker:r.io: ") && why.contains(words),
            "{why}"
        );
        assert_eq!(check(&p, "other.io/app:1", &[]), Ok(Verdict::Accepted));
    }
}

#[test]
fn keys_by_path_are_read_when_a_rule_needs_them() {
    let text =
        serde_json::json!({"default": [{"type": "sigstoreSigned", "keyPaths": ["kbs:///a/b/1", "/2"]}]});
    let good = [Signature::sign(PRIVATE, "r.io/app:1", &image()).unwrap()];
    let why = check(&policy(text.clone()), "r.io/app:1", &good).unwrap_err();
    assert_eq!(why, "policy: key of the rule for default: kbs:///a/b/1: not here");
    let origin = Origin::Registry("r.io/app:1".parse().unwrap());
    let (digests, read) = ([image()], |path: &str| match path {
        "/2" => Ok(PUBLIC.as_bytes().to_vec()),
        _ => Ok(ED25519.as_bytes().to_vec()),
    });
    let subject = Subject { origin: &origin, digests: &digests };
    let good = Signatures { sigstore: good.to_vec(), simple: Vec::new() };
    assert_eq!(policy(text).check(&subject, &good, &read).unwrap(), Verdict::Signed);
}

/// By gpg 2.2: see `testdata/openpgp/make`.
const RING: &[u8] = include_bytes!("../../testdata/openpgp/ed25519.pgp");
const MESSAGE: &[u8] = include_bytes!("../../testdata/openpgp/ed25519.sig");

#[test]
fn simple_signing() {
    let rule = |extra: serde_json::Value| {
        let mut rule =
            serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyData": STANDARD.encode(RING)});
        for (name, value) in extra.as_object().unwrap() {
            rule[name] = value.clone();
        }
        policy(
            serde_json::json!({"default": [{"type": "reject"}], "transports": {"docker": {"r.io": [rule]}}}),
        )
    };
    let plain = rule(serde_json::json!({}));
    let named = |name: &str| Origin::Registry(Name::of_image(name).unwrap());
    let signed = |messages: &[&[u8]]| Signatures {
        sigstore: Vec::new(),
        simple: messages.iter().map(|bytes| simple::Signature::new(bytes.to_vec())).collect(),
    };
    assert_eq!(check_all(&plain, &named("r.io/app:1"), &signed(&[MESSAGE])), Ok(Verdict::Signed));
    assert_eq!(check_all(&plain, &named("r.io/app:1"), &signed(&[b"x", MESSAGE])), Ok(Verdict::Signed));
    for (policy, name, messages, words) in [
        (&plain, "r.io/app:2", &[MESSAGE][..], "it is for r.io/app:1"),
        (&plain, "r.io/app:1", &[], "there is none beside it: sign with skopeo copy --sign-by"),
        (&plain, "r.io/app:1", &[b"x"], "OpenPGP: message: a byte where a packet should begin"),
        (
            &rule(
                serde_json::json!({"signedIdentity": {"type": "exactRepository", "dockerRepository": "r.io/b"}}),
            ),
            "r.io/app:1",
            &[MESSAGE],
            "it is for r.io/app:1",
        ),
    ] {
        let why = check_all(policy, &named(name), &signed(messages)).unwrap_err();
        assert!(why.contains("satisfies the rule for docker:r.io: ") && why.contains(words), "{why}");
    }
    // Another image's, and one kind's signature in the other's place.
    let keys = [crate::openpgp::Ring::parse(RING).unwrap()];
    let other = simple::Signature::new(MESSAGE.to_vec()).check(&keys, &[Digest::sha256(b"other")], 1 << 31);
    assert!(other.unwrap_err().to_string().starts_with("signature: it is for sha256:"));
    assert!(
        check(&plain, "r.io/app:1", &[Signature::sign(PRIVATE, "r.io/app:1", &image()).unwrap()]).is_err()
    );
    let sigstore = signed_by_key();
    assert!(check_all(&sigstore, &named("r.io/app:1"), &signed(&[MESSAGE])).is_err());
    // What cosign signs is of another type, whoever signed it.
    assert!(matches!(
        simple::reference(PAYLOAD, &[image()]),
        Err(SignatureError::Kind(kind, _)) if kind == "cosign container image signature"
    ));
}

fn signed_by_key() -> Policy {
    signed(serde_json::json!({}))
}

#[test]
fn simple_signatures_lie_beside_the_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::create(dir.path()).unwrap();
    let found = |name: Option<&str>| {
        let name = name.map(|name| Name::of_image(name).unwrap());
        simple::find(&layout, name.as_ref(), &[image(), Digest::sha256(b"index")])
    };
    assert!(found(None).unwrap().is_empty());
    let put = |folder: String, number: u32, bytes: &[u8]| {
        let folder = dir.path().join("signatures").join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("signature-{number}")), bytes).unwrap();
    };
    let hex = image().hex();
    put(format!("sha256={hex}"), 1, b"a");
    put(format!("sha256={hex}"), 2, b"b");
    put(format!("sha256={hex}"), 4, b"not reached");
    put(format!("team/app@sha256={hex}"), 1, b"c");
    put(format!("sha256={}", Digest::sha256(b"other").hex()), 1, b"another image's");
    let all = ["a", "b", "c"].map(|text| simple::Signature::new(text.into()));
    assert_eq!(found(Some("r.io/app")).unwrap(), all[..2]);
    assert_eq!(found(Some("r.io/team/app:1")).unwrap(), all);
    assert_eq!(simple::Signature::from_text(&all[2].to_text()), all[2]);
    put(format!("sha256={hex}"), 3, &vec![0; simple::MOST_SIGNATURE + 1]);
    assert!(found(None).unwrap_err().to_string().contains("signature-3: more than 16384 bytes"));
    for number in 3..=40 {
        put(format!("sha256={hex}"), number, b"x");
    }
    assert!(found(None).unwrap_err().to_string().contains("more than 32 signatures"));
}

/// What a policy says when it is read strictly by hand: none of these words must let an image run unsigned.
fn any_requirement() -> impl Strategy<Value = serde_json::Value> {
    let identity = prop_oneof![
        Just(serde_json::json!({"type": "matchExact"})),
        Just(serde_json::json!({"type": "matchRepository"})),
        Just(serde_json::json!({"type": "exactRepository", "dockerRepository": "r.io/app"})),
        Just(serde_json::json!({"type": "remapIdentity", "prefix": "r.io", "signedPrefix": "s.io"})),
        Just(serde_json::json!({"type": "none"})),
    ];
    let member = prop_oneof![
        "keyPath",
        "keyData",
        "keyPaths",
        "keyDatas",
        "fulcio",
        "pki",
        "rekorPublicKeyData",
        "more"
    ];
    let kind = prop_oneof!["reject", "sigstoreSigned", "signedBy", "SigstoreSigned", "signedBaseLayer", ""];
    (kind, prop::collection::vec((member, "[ -~]{0,9}"), 0..3), prop::option::of(identity)).prop_map(
        |(kind, members, identity)| {
            let mut all = serde_json::json!({"type": kind});
            for (name, value) in members {
                all[&name] = if name.ends_with('s') { serde_json::json!([value]) } else { value.into() };
            }
            if let Some(identity) = identity {
                all["signedIdentity"] = identity;
            }
            all
        },
    )
}

proptest! {
    #[test]
    fn nothing_runs_unsigned_unless_the_policy_says_so(
        rules in prop::collection::vec(any_requirement(), 0..3), scope in "[a-z./:]{0,8}", name in "[a-z./:]{1,12}",
    ) {
        let text = serde_json::json!({"default": rules, "transports": {"docker": {scope: rules}}}).to_string();
        if let (Ok(policy), Ok(name)) = (Policy::parse(text.as_bytes()), Name::of_image(&name)) {
            let why = check_origin(&policy, &Origin::Registry(name), &[]).unwrap_err();
            prop_assert!(why.starts_with("policy: ") && !why.contains('\n'), "{}", why);
        }
    }

    #[test]
    fn any_bytes_are_a_policy_or_refused(text in "[\\[\\]{}:,\"a-zA-Z ]{0,200}") {
        let _ = Policy::parse(text.as_bytes());
    }
}

#[test]
fn signatures_are_kept_beside_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::create(dir.path()).unwrap();
    assert!(sigstore::find(&layout, &[image()]).unwrap().is_empty());
    for name in ["a", "b"] {
        sigstore::store(&layout, &image(), &Signature::sign(PRIVATE, name, &image()).unwrap()).unwrap();
    }
    let key = [PublicKey::from_pem(PUBLIC).unwrap()];
    let found = sigstore::find(&layout, &[Digest::sha256(b"index"), image()]).unwrap();
    let names: Vec<_> = found.iter().map(|s| s.check(&key, &[image()]).unwrap()).collect();
    assert!(sigstore::manifests(&layout, &[Digest::sha256(b"other")]).unwrap().is_empty());
    assert_eq!(names, ["a", "b"]);
}
