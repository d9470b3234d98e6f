use proptest::prelude::*;

use super::*;

/// The packet that guest-components publishes, its key, and what it holds.
const SAMPLE: &[u8] = include_bytes!("../../testdata/sample_kbc_annotation.json");
const SAMPLE_KEY: &str = "d99b7705b0ba7a168295b3a3367270b0dd9b371bf514ca8b9ba7f0a33711daea";
const SAMPLE_OPTIONS: &str = r#"{"symkey":"1jL2jJV0Oyz2nmPkLtqulW6cKcpIUN5FpILcVnP5Uqs=","digest":"sha256:18be1897f9402f27c8c0eba7c86e0c00f5656db62961b5949d55f9565c42c6e7","cipheroptions":{"nonce":"r10F9oaCu+nWFXfod3l83g=="}}"#;

macro_rules! pair {
    ($name:literal) => {
        (
            include_str!(concat!("../../testdata/jwe/", $name, ".pem")),
            include_str!(concat!("../../testdata/jwe/", $name, ".pub")),
        )
    };
}
/// PKCS#8 and SEC1, as `openssl genrsa` and `openssl ecparam` wrote them.
const KEYS_BY_OPENSSL: [(&str, &str); 4] = [pair!("rsa"), pair!("p256"), pair!("p384"), pair!("p521")];

struct One(Vec<u8>);

impl KeySource for One {
    fn resource(&self, _: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        Ok(Zeroizing::new(self.0.clone()))
    }
}

#[test]
fn upstreams_packet_opens() {
    let key: [u8; 32] = crate::digest::unhex(SAMPLE_KEY).unwrap();
    let packet = Packet::parse(SAMPLE).unwrap();
    assert_eq!(packet.kid(), "kbs:///default/key/1");
    assert_eq!(packet.open(&key).unwrap().as_slice(), SAMPLE_OPTIONS.as_bytes());
    assert!(matches!(packet.open(&[0; 32]), Err(packet::PacketError::Open(_))));
    assert!(matches!(packet.open(&[0; 16]), Err(packet::PacketError::Key(16))));
}

#[test]
fn private_options_are_written_as_go_writes_them() {
    let key = LayerKey::from_options(SAMPLE_OPTIONS.as_bytes(), [0; 32]).unwrap();
    let digest = "sha256:18be1897f9402f27c8c0eba7c86e0c00f5656db62961b5949d55f9565c42c6e7";
    assert_eq!(key.private_options(digest).as_slice(), SAMPLE_OPTIONS.as_bytes());
}

#[test]
fn version_two_and_foreign_packets() {
    let packet = |change: fn(&mut serde_json::Value)| {
        let mut value: serde_json::Value = serde_json::from_slice(SAMPLE).unwrap();
        value["version"] = "0.1.0".into();
        value["provider"] = "kbs".into();
        value["provider_settings"] = serde_json::json!({"region": {"deep": [1]}});
        value["annotations"] = serde_json::json!({});
        change(&mut value);
        Packet::parse(value.to_string().as_bytes())
    };
    let key: [u8; 32] = crate::digest::unhex(SAMPLE_KEY).unwrap();
    assert_eq!(packet(|_| ()).unwrap().open(&key).unwrap().as_slice(), SAMPLE_OPTIONS.as_bytes());
    assert!(packet(|v| v["wrap_type"] = "A256CTR".into()).is_err());
    assert!(packet(|v| v["provider"] = "aliyun".into()).is_err());
    assert!(packet(|v| v["wrap_type"] = serde_json::Value::Null).is_err());
    assert!(packet(|v| v["kid"] = "".into()).is_err());
}

#[test]
fn annotations_give_the_key_back() {
    let mut made = LayerKey::generate().unwrap();
    made.hmac = [7; 32];
    let packet = Packet::wrap("kbs:///a/b/c", &[9; 32], &made.private_options("sha256:x")).unwrap();
    let mut annotations: BTreeMap<String, String> = [
        (PUBLIC.to_owned(), made.public_options()),
        // A wrap of another kind before ours must not stop the search.
        (format!("{KEYS}pgp"), STANDARD.encode(b"pgp")),
        (ATTESTATION_AGENT.to_owned(), format!("AAAA,{}", STANDARD.encode(packet.to_json()))),
    ]
    .into();
    let key = LayerKey::unwrap(&annotations, &One(vec![9; 32])).unwrap();
    assert_eq!((*key.key, key.nonce, key.hmac), (*made.key, made.nonce, made.hmac));
    let why = LayerKey::unwrap(&annotations, &One(vec![8; 32])).err().unwrap().to_string();
    assert!(why.contains("pgp: this kind of wrap") && why.contains("kbs:///a/b/c does not open it"), "{why}");
    let why = LayerKey::unwrap(&annotations, &NoKeys).err().unwrap().to_string();
    assert!(why.contains("no key source is configured"), "{why}");
    annotations.remove(PUBLIC);
    assert!(matches!(LayerKey::unwrap(&annotations, &NoKeys), Err(KeyError::Annotation(..))));
}

#[test]
fn cipher_against_published_vectors() {
    // NIST SP 800-38A, F.5.5 CTR-AES256. The MAC's oracle is skopeo, in tests/steps/60-images; here it must
    // only refuse a changed byte.
    let key: [u8; 32] =
        crate::digest::unhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4").unwrap();
    let nonce: [u8; 16] = crate::digest::unhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff").unwrap();
    let plain: [u8; 64] = crate::digest::unhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710").unwrap();
    let want: [u8; 64] = crate::digest::unhex("601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c52b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6").unwrap();
    let mut layer = LayerKey { key: Zeroizing::new(key), nonce, hmac: [0; 32] };
    let mut bytes = plain;
    let mut stream = cipher::Stream::new(&layer);
    for piece in bytes.chunks_mut(7) {
        stream.encrypt(piece);
    }
    assert_eq!(bytes, want);
    layer.hmac = stream.mac();
    let mut stream = cipher::Stream::new(&layer);
    stream.decrypt(&mut bytes);
    assert_eq!((bytes, stream.finish()), (plain, Ok(())));
    let mut changed = want;
    changed[63] ^= 1;
    let mut stream = cipher::Stream::new(&layer);
    stream.decrypt(&mut changed);
    assert_eq!(stream.finish(), Err(cipher::HmacError));
}

#[test]
fn key_provider_answers_skopeo() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, [5; 32]).unwrap();
    let parameters = STANDARD.encode(format!("keyid=kbs:///a/b/c::keypath={}", file.display()));
    let ask = |request: serde_json::Value| {
        let answer = keyprovider::answer(request.to_string().as_bytes(), "attestation-agent", None).unwrap();
        serde_json::from_str::<serde_json::Value>(&answer).unwrap()
    };
    let wrapped = ask(serde_json::json!({"op": "keywrap",
        "keywrapparams": {"ec": {"Parameters": {"attestation-agent": [parameters]},
            "DecryptConfig": {"Parameters": {}}}, "optsdata": STANDARD.encode(b"options")},
        "keyunwrapparams": {"dc": null, "annotation": null}}));
    let annotation = &wrapped["keywrapresults"]["annotation"];
    let opened = ask(serde_json::json!({"op": "keyunwrap", "keywrapparams": {"ec": null, "optsdata": null},
        "keyunwrapparams": {"dc": {"Parameters": {"attestation-agent": [parameters]}}, "annotation": annotation}}));
    assert_eq!(opened["keyunwrapresults"]["optsdata"], STANDARD.encode(b"options"));
}

#[test]
fn jwe_for_every_kind_of_key() {
    for (private, public) in KEYS_BY_OPENSSL {
        let private = jwe::PrivateKey::from_pem(private).unwrap();
        let public = jwe::PublicKey::from_pem(public).unwrap();
        let other = jwe::PublicKey::from_pem(KEYS_BY_OPENSSL[2].1).unwrap();
        let text = jwe::Jwe::encrypt(b"options", &[other, public]).unwrap();
        assert_eq!(jwe::Jwe::parse(&text).unwrap().decrypt(&private).unwrap().as_slice(), b"options");
        let mut broken: serde_json::Value = serde_json::from_slice(&text).unwrap();
        broken["tag"] = "AAAAAAAAAAAAAAAAAAAAAA".into();
        assert!(jwe::Jwe::parse(broken.to_string().as_bytes()).unwrap().decrypt(&private).is_err());
    }
}

/// go-jose, and so skopeo, writes the first recipient's key at the top as well when there are several.
#[test]
fn jwe_of_several_recipients_with_a_key_at_the_top() {
    let public = |i: usize| jwe::PublicKey::from_pem(KEYS_BY_OPENSSL[i].1).unwrap();
    let text = jwe::Jwe::encrypt(b"options", &[public(0), public(1)]).unwrap();
    let mut both: serde_json::Value = serde_json::from_slice(&text).unwrap();
    both["encrypted_key"] = both["recipients"][0]["encrypted_key"].clone();
    for (private, _) in &KEYS_BY_OPENSSL[..2] {
        let jwe = jwe::Jwe::parse(both.to_string().as_bytes()).unwrap();
        assert_eq!(jwe.decrypt(&jwe::PrivateKey::from_pem(private).unwrap()).unwrap().as_slice(), b"options");
    }
    // An empty list is none.
    let mut flat = both.clone();
    flat["header"] = both["recipients"][0]["header"].clone();
    flat["recipients"] = serde_json::json!([]);
    let jwe = jwe::Jwe::parse(flat.to_string().as_bytes()).unwrap();
    let opened = jwe.decrypt(&jwe::PrivateKey::from_pem(KEYS_BY_OPENSSL[0].0).unwrap());
    assert_eq!(opened.unwrap().as_slice(), b"options");
}

proptest! {
    #[test]
    fn no_annotation_makes_it_panic(public in any::<Vec<u8>>(), wrap in any::<Vec<u8>>(), name in "[a-z.]{0,30}") {
        let annotations = [(PUBLIC.to_owned(), STANDARD.encode(&public)),
            (format!("{KEYS}{name}"), STANDARD.encode(&wrap))].into();
        let _ = LayerKey::unwrap(&annotations, &NoKeys);
        let _ = Packet::parse(&wrap);
        let _ = jwe::Jwe::parse(&wrap);
        let _ = keyprovider::answer(&public, "attestation-agent", None);
    }
}
