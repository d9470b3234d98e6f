//! A guest with a KBS: what the workload asks for over its socket, sealed secrets in envelopes, private keys of images.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use aes_gcm::{Aes256Gcm, KeyInit, aead::Aead};
use base64::{Engine, engine::general_purpose::STANDARD};
use coffer_attestation::{
    api,
    evidence::{Attesters, Sample},
    guest::Guest,
    jws,
    key::TeeKey,
};
use coffer_init::owner;
use coffer_kbs::{Config, Kbs, Running, serve};
use coffer_layers::ocicrypt::{JWE, LayerKey, PUBLIC, jwe};
use serde_json::{Value, json};

const SECRET: &[u8] = b"what only an attested guest may read";
const RSA: &str = include_str!("../../../rootfs/image/testdata/jwe/rsa.pem");
const RSA_PUBLIC: &str = include_str!("../../../rootfs/image/testdata/jwe/rsa.pub");
const P256: &str = include_str!("../../../rootfs/image/testdata/jwe/p256.pem");
const P521_PUBLIC: &str = include_str!("../../../rootfs/image/testdata/jwe/p521.pub");

fn server(resources: &[(&str, &[u8])]) -> Running {
    let resources: BTreeMap<String, Vec<u8>> =
        resources.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
    let kbs = Kbs::new(Config { resources, allow_all: true, ..Config::default() }).unwrap();
    serve(Arc::new(kbs), TcpListener::bind("127.0.0.1:0").unwrap(), None).unwrap()
}

fn guest(kbs: SocketAddr) -> Guest {
    let text = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"aa.toml\" = '''\n[token_configs.kbs]\nurl = \"http://{}\"\n'''\n\
         \"coffer.toml\" = '''\nallow_plain_http = true\nattestation_api = true\n\
         image_keys = [\"kbs:///images/private/p256\", \"kbs:///images/private/rsa\"]\n'''\n",
        kbs
    );
    Guest::new(Some(text.as_bytes()), Attesters::of(Sample)).unwrap()
}

/// What a program in the pod gets, as any client of HTTP/1.1 would: status, body.
fn call(address: SocketAddr, target: &str) -> (u16, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nHost: 127.0.0.1:8006\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let at = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    let status = String::from_utf8(answer[9..12].to_vec()).unwrap();
    (status.parse().unwrap(), answer[at + 4..].to_vec())
}

fn payload(token: &str) -> Value {
    let middle = token.split('.').nth(1).unwrap();
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(middle).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn the_workload_gets_secret_token_evidence_and_info_over_its_socket() {
    let server = server(&[("one/2/trois", SECRET)]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let kbs = server.address;
    thread::spawn(move || api::serve(&listener, &Mutex::new(guest(kbs))));
    assert_eq!(call(address, "/cdh/resource/one/2/trois"), (200, SECRET.to_vec()));
    let json = |target: &str| -> Value {
        let (status, body) = call(address, target);
        assert_eq!(status, 200, "{target}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    };
    let info = json("/info");
    assert_eq!((&info["tee"], &info["additional_tees"]), (&json!("sample"), &json!([])));
    let evidence = json("/aa/evidence?runtime_data=workload");
    assert_eq!(evidence["report_data"], STANDARD.encode(b"workload"));
    // A token of the KBS, about the key that comes with it; each from an attestation of its own.
    let nonces: Vec<Value> = (0..2)
        .map(|_| {
            let answer = json("/aa/token?token_type=kbs");
            let claims = payload(answer["token"].as_str().unwrap());
            assert_eq!(claims["iss"], "coffer-kbs");
            let runtime =
                claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"].clone();
            let key = TeeKey::from_pem(answer["tee_keypair"].as_str().unwrap()).unwrap();
            assert_eq!(runtime["tee-pubkey"], json!(key.public()));
            runtime["nonce"].clone()
        })
        .collect();
    assert_ne!(nonces[0], nonces[1]);
    // And the secret still comes after it.
    assert_eq!(call(address, "/cdh/resource/one/2/trois"), (200, SECRET.to_vec()));
}

#[test]
fn a_workload_learns_why_there_is_no_token() {
    let gone = server(&[]);
    let mut guest = guest(gone.address);
    drop(gone);
    let unreachable = guest.token().unwrap_err().to_string();
    assert!(unreachable.contains("KBS"), "{unreachable}");
    let nobody = Guest::new(None, Attesters::of(Sample)).unwrap().token().unwrap_err().to_string();
    assert!(nobody.contains("no KBS"), "{nobody}");
}

#[test]
fn a_sealed_envelope_opens_with_the_keys_of_the_kbs() {
    let signer = p256::SecretKey::from_slice(&[7; 32]).unwrap();
    let jwk = serde_json::to_vec(&TeeKey::P256(signer.clone()).public()).map(|mut jwk| {
        // A public key as its owner would store it: for signatures, or without a word.
        let mut value: Value = serde_json::from_slice(&jwk).unwrap();
        value.as_object_mut().unwrap().remove("alg");
        jwk = serde_json::to_vec(&value).unwrap();
        jwk
    });
    let (kek, data_key, iv) = ([3; 32], [4; 32], [5; 12]);
    let mut wrapped = [0; 40];
    aes_kw::KwAes256::new(&kek.into()).wrap_key(&data_key, &mut wrapped).unwrap();
    let sealed = Aes256Gcm::new(&data_key.into()).encrypt(&iv.into(), SECRET).unwrap();
    let server = server(&[("keys/signing/1", &jwk.unwrap()), ("keys/kek/1", &kek), ("keys/kek/2", &[8; 32])]);
    let envelope = |key: &str| {
        let content = json!({ "version": "0.1.0", "type": "envelope", "provider": "kbs", "key_id": key,
            "encrypted_key": STANDARD.encode(wrapped), "encrypted_data": STANDARD.encode(&sealed),
            "wrap_type": "A256GCM", "iv": STANDARD.encode(iv), "provider_settings": {}, "annotations": {} });
        let header = json!({ "alg": "ES256", "kid": "kbs:///keys/signing/1" });
        let signed = jws::sign(&signer, header.as_object().unwrap(), content.to_string().as_bytes());
        format!("PASSWORD=sealed.{signed}")
    };
    let mut guest = guest(server.address);
    let mut environment = vec!["A=1".to_owned(), envelope("kbs:///keys/kek/1")];
    guest.unseal_environment(&mut environment).unwrap();
    assert_eq!(environment[1], format!("PASSWORD={}", String::from_utf8_lossy(SECRET)));
    for (key, words) in
        [("kbs:///keys/kek/2", "does not open"), ("kbs:///keys/kek/3", "key kbs:///keys/kek/3")]
    {
        let refused = guest.unseal_environment(&mut [envelope(key)]).unwrap_err().to_string();
        assert!(
            refused.starts_with("environment variable PASSWORD: ") && refused.contains(words),
            "{refused}"
        );
    }
}

#[test]
fn layers_for_an_owners_private_keys_open_in_a_guest_that_attests() {
    let layer = LayerKey::generate().unwrap();
    let annotations = |public: &str| {
        let public = [jwe::PublicKey::from_pem(public).unwrap()];
        let wrapped = jwe::Jwe::encrypt(&layer.private_options(""), &public).unwrap();
        BTreeMap::from([
            (PUBLIC.to_owned(), layer.public_options()),
            (JWE.to_owned(), STANDARD.encode(wrapped)),
        ])
    };
    let server = server(&[("images/private/p256", P256.as_bytes()), ("images/private/rsa", RSA.as_bytes())]);
    let keys = owner::of(&Arc::new(Mutex::new(guest(server.address)))).unwrap().keys;
    let opened = LayerKey::unwrap(&annotations(RSA_PUBLIC), &*keys).unwrap();
    assert_eq!(*opened.private_options(""), *layer.private_options(""));
    let refused = LayerKey::unwrap(&annotations(P521_PUBLIC), &*keys).err().unwrap().to_string();
    assert!(refused.contains("none of 2 private keys opens it"), "{refused}");
    // What the KBS has there need not be a key.
    for (bytes, words) in [(b"-----BEGIN".as_slice(), "no private key"), (&[0xff], "not PEM")] {
        let server = self::server(&[("images/private/p256", bytes), ("images/private/rsa", RSA.as_bytes())]);
        let keys = owner::of(&Arc::new(Mutex::new(guest(server.address)))).unwrap().keys;
        let refused = LayerKey::unwrap(&annotations(RSA_PUBLIC), &*keys).err().unwrap().to_string();
        assert!(refused.contains("kbs:///images/private/p256: ") && refused.contains(words), "{refused}");
    }
}
