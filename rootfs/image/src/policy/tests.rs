use super::*;

const PRIVATE: &str = include_str!("../../testdata/sign/p256.pem");
const PUBLIC: &str = include_str!("../../testdata/sign/p256.pub");
const ED25519: &str = include_str!("../../testdata/sign/ed25519.pub");
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

fn check(policy: &Policy, reference: &str, signatures: &[Signature]) -> Result<(), String> {
    let digests = [image()];
    let subject = Subject { transport: "docker", reference, digests: &digests };
    policy.check(&subject, signatures, &|path| Err(format!("{path}: not here"))).map_err(|e| e.to_string())
}

#[test]
fn signatures_by_openssl_hold() {
    for (key, signature) in [(PUBLIC, P256_SIGNATURE), (ED25519, ED25519_SIGNATURE)] {
        let signature = Signature::new(PAYLOAD.to_vec(), signature.to_vec());
        let key = PublicKey::from_pem(key).unwrap();
        assert_eq!(signature.check(&key, &[image()]).unwrap(), "r.io/app:1");
        let other = signature.check(&key, &[Digest::sha256(b"other")]).unwrap_err().to_string();
        assert!(other.starts_with("signature: it is for sha256:"), "{other}");
    }
    let changed = Signature::new([PAYLOAD, b" "].concat(), P256_SIGNATURE.to_vec());
    assert!(changed.check(&PublicKey::from_pem(PUBLIC).unwrap(), &[image()]).is_err());
    let crossed = Signature::new(PAYLOAD.to_vec(), P256_SIGNATURE.to_vec());
    assert!(crossed.check(&PublicKey::from_pem(ED25519).unwrap(), &[image()]).is_err());
}

#[test]
fn rules_are_chosen_by_scope_and_all_must_hold() {
    let good = &[Signature::sign(PRIVATE, "r.io/app:1", &image()).unwrap()];
    let p = signed(serde_json::json!({}));
    assert_eq!(check(&p, "r.io/app:1", good), Ok(()));
    assert_eq!(check(&p, "r.io/app", good), Ok(()));
    let why = check(&p, "r.io/app:1", &[]).unwrap_err();
    assert!(why.ends_with("the rule for docker:r.io/app: there is none"), "{why}");
    let why = check(&p, "r.io/app:2", good).unwrap_err();
    assert!(why.ends_with("it is for \"r.io/app:1\""), "{why}");
    let why = check(&p, "r.io/apple:1", good).unwrap_err();
    assert_eq!(why, "policy: r.io/apple:1 is rejected by the rule for default");
    // A bad signature beside a good one does no harm.
    let bad = Signature::new(b"{}".to_vec(), vec![1]);
    assert_eq!(check(&p, "r.io/app:1", &[bad.clone(), good[0].clone()]), Ok(()));
    assert!(check(&p, "r.io/app:1", &[bad]).is_err());
    let wide = policy(
        serde_json::json!({"default": [], "transports": {"docker": {"": [{"type": "insecureAcceptAnything"}],
        "r.io": [{"type": "reject"}]}}}),
    );
    assert_eq!(check(&wide, "other/x", &[]), Ok(()));
    assert!(check(&wide, "r.io/a/b:1", &[]).unwrap_err().contains("docker:r.io"));
    let empty = policy(serde_json::json!({"default": []}));
    assert!(check(&empty, "x", &[]).unwrap_err().contains("(empty)"));
}

#[test]
fn identities() {
    let good = [Signature::sign(PRIVATE, "r.io/app:1", &image()).unwrap()];
    let with = |identity: serde_json::Value| signed(serde_json::json!({"signedIdentity": identity}));
    let repository = with(serde_json::json!({"type": "matchRepository"}));
    assert_eq!(check(&repository, "r.io/app:2", &good), Ok(()));
    let exact = with(serde_json::json!({"type": "exactRepository", "dockerRepository": "r.io/other"}));
    assert!(check(&exact, "r.io/app:1", &good).is_err());
    let exact = with(serde_json::json!({"type": "exactReference", "dockerReference": "r.io/app:1"}));
    assert_eq!(check(&exact, "r.io/app:9", &good), Ok(()));
}

#[test]
fn what_is_not_known_is_refused() {
    for requirement in [
        serde_json::json!({"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/x"}),
        serde_json::json!({"type": "sigstoreSigned", "fulcio": {}}),
        serde_json::json!({"type": "reject", "unless": 1}),
    ] {
        let text = serde_json::json!({"default": [requirement]}).to_string();
        assert!(Policy::parse(text.as_bytes()).is_err(), "{text}");
    }
    let neither = policy(serde_json::json!({"default": [{"type": "sigstoreSigned"}]}));
    assert!(check(&neither, "x", &[]).unwrap_err().contains("either keyPath or keyData"));
    let by_path =
        policy(serde_json::json!({"default": [{"type": "sigstoreSigned", "keyPath": "kbs:///a/b/c"}]}));
    assert!(check(&by_path, "x", &[]).unwrap_err().contains("kbs:///a/b/c: not here"));
}

#[test]
fn signatures_are_kept_beside_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let layout = crate::layout::Layout::create(dir.path()).unwrap();
    assert!(sigstore::find(&layout, &image()).unwrap().is_empty());
    for name in ["a", "b"] {
        sigstore::store(&layout, &image(), &Signature::sign(PRIVATE, name, &image()).unwrap()).unwrap();
    }
    let key = PublicKey::from_pem(PUBLIC).unwrap();
    let names: Vec<_> = sigstore::find(&layout, &image())
        .unwrap()
        .iter()
        .map(|s| s.check(&key, &[image()]).unwrap())
        .collect();
    assert_eq!(names, ["a", "b"]);
}
