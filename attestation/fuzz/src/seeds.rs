//! Honest inputs, made by the library's own writers and by the public vectors of its test data.

use coffer_attestation::{encoding::to_base64, jwe, jws, key::TeeKey};
use coffer_fuzz::Seed;
use serde_json::{Map, Value, json};

/// What is inside of everything that is encrypted or signed here.
pub const SECRET: &[u8] = b"only for an attested guest";
/// What the seed of a name server's answer is an answer to.
pub const NAME: &str = "kbs.example";
/// What the signed payload of the sealed seed names.
pub const SEALED_URI: &str = "kbs:///one/2/trois";

const INITDATA: &str = r#"version = "0.1.0"
algorithm = "sha384"
[data]
"aa.toml" = '''
[token_configs.kbs]
url = "http://10.88.0.1:8080"
tee_key_algorithm = "ECDH-ES+A256KW-P256"
'''
"cdh.toml" = '''
[kbc]
name = "cc_kbc"
url = "http://10.88.0.1:8080"
[[credentials]]
path = "/run/confidential-containers/cdh/a"
resource_uri = "kbs:///a/b/c"
[image]
extra_root_certificates = []
'''
"coffer.toml" = '''
allow_plain_http = true
attestation_api = true
images = ["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]
image_keys = ["kbs:///a/b/d"]
'''
"policy.rego" = "package agent_policy\nExecProcessRequest := true\n"
"#;

const SPEC: &str = r#"{"process":{"args":["sh"],"env":["A=1"],"cwd":"/w","terminal":true,"user":{"uid":5,"gid":6,"additionalGids":[7]},
"capabilities":{"bounding":["CAP_CHOWN"]}},"root":{"readonly":true},"hostname":"h","mounts":[{"destination":"/proc","type":"proc"},
{"destination":"/d","type":"bind","source":"/x","options":["rbind","ro"]}],"linux":{"namespaces":[{"type":"pid"}],"sysctl":{"a":"b"},
"devices":[{"path":"/dev/x","type":"c","major":1,"minor":3}],"maskedPaths":["/proc/kcore"],"seccomp":{}}}"#;

/// An alias, and an address of each kind, as RFC 1035 writes them.
fn answer() -> Vec<u8> {
    let mut packet = b"\x12\x34\x81\x80\0\x01\0\x03\0\0\0\0\x03kbs\x07example\0\0\x01\0\x01".to_vec();
    packet.extend(b"\xc0\x0c\0\x05\0\x01\0\0\0\x3c\0\x06\x03www\xc0\x0c");
    packet.extend(b"\xc0\x29\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x07");
    packet.extend(b"\xc0\x29\0\x1c\0\x01\0\0\0\x3c\0\x10\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07");
    packet
}

fn token(header: Value, payload: &[u8]) -> String {
    let header: Map<String, Value> = header.as_object().cloned().unwrap_or_default();
    jws::sign(&crate::key(), &header, payload)
}

fn sealed(payload: &Value) -> Vec<u8> {
    let header = json!({ "alg": "ES256", "kid": "kbs:///a/b/key" });
    format!("sealed.{}", token(header, payload.to_string().as_bytes())).into_bytes()
}

/// A table of one certificate, in the GHCB specification's form.
fn table() -> Vec<u8> {
    let der = include_bytes!("../../testdata/snp/test-vcek.der");
    let mut table =
        vec![0x63, 0xda, 0x75, 0x8d, 0xe6, 0x64, 0x45, 0x64, 0xad, 0xc5, 0xf4, 0xb9, 0x3b, 0xe8, 0xac, 0xcd];
    table.extend(48u32.to_le_bytes());
    table.extend((der.len() as u32).to_le_bytes());
    table.extend([0; 24]);
    table.extend(der);
    table
}

/// A KBS with a certificate.
fn tls() -> String {
    let pem = include_str!("../../testdata/snp/genoa_ask_ark_asvk.pem");
    format!(
        "version = \"0.1.0\"\nalgorithm = \"sha512\"\n[data]\n\"aa.toml\" = '''\n[token_configs.kbs]\n\
         url = \"https://kbs.example:8443/base\"\ncert = \"\"\"\n{pem}\"\"\"\n'''\n"
    )
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Seed> {
    let key = TeeKey::P256(crate::key());
    let (public, pem) = (key.public(), key.to_pem().expect("a key writes itself"));
    let message = jwe::encrypt(&public, SECRET).expect("a key of ours");
    let message = serde_json::to_vec(&message).expect("plain data");
    let jwt = token(json!({ "alg": "ES256", "typ": "JWT" }), SECRET);
    let vault = json!({ "version": "0.1.0", "type": "vault", "provider": "kbs", "name": SEALED_URI, "provider_settings": {}, "annotations": {} });
    let envelope = json!({ "version": "0.1.0", "type": "envelope", "provider": "kbs", "key_id": SEALED_URI, "encrypted_key": to_base64(&[1; 40]),
        "encrypted_data": to_base64(&[2; 40]), "wrap_type": "A256GCM", "iv": to_base64(&[3; 12]), "provider_settings": {}, "annotations": {} });
    let challenge = json!({ "nonce": to_base64(&[0; 32]), "extra-params": "" }).to_string();
    // A client goes no further than to a token whose claims are an object.
    let claims = token(json!({ "alg": "ES256", "typ": "JWT" }), br#"{"exp":1}"#);
    let handshake = format!("200 0123abcd {challenge}\n200 0123abcd {}\n", json!({ "token": claims }));
    let resource = String::from_utf8(message.clone()).expect("JSON");
    let refused =
        json!({ "type": "https://github.com/confidential-containers/kbs/errors/PolicyDeny", "detail": "no" });
    let chunked =
        "HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n";
    let plain = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSet-Cookie: kbs-session-id=a; Path=/\r\n\r\nhello";
    vec![
        ("initdata", "all", INITDATA.into()),
        ("initdata", "tls", tls().into()),
        ("http", "chunked", chunked.into()),
        ("http", "plain", plain.into()),
        ("dns", "answer", answer()),
        ("dns", "name", NAME.into()),
        ("session", "resource", format!("{handshake}200 0 {resource}\n").into()),
        ("session", "refused", format!("{handshake}401 0 {refused}\n{handshake}404 0 {refused}\n").into()),
        ("session", "lost", format!("{handshake}-\n").into()),
        ("uri", "resource", SEALED_URI.into()),
        ("uri", "plugin", "kbs+pkcs11:///a/b?c=d".into()),
        ("uri", "url", "https://[fd00::1]:8080/base".into()),
        ("uri", "workload", "/cdh/resource/a/b/c?x".into()),
        ("jwe", "p256", message),
        ("jws", "es256", jwt.into()),
        ("sealed", "vault", sealed(&vault)),
        ("sealed", "envelope", sealed(&envelope)),
        ("policy", "spec", SPEC.into()),
        ("policy", "rego", coffer_attestation::policy::CLOSED.into()),
        ("report", "milan", include_bytes!("../../testdata/snp/test-report.bin").to_vec()),
        ("certificates", "vcek", table()),
        ("yaml", "kubectl", include_bytes!("../../testdata/yaml/kubectl.yaml").to_vec()),
        ("yaml", "podman", include_bytes!("../../testdata/yaml/podman.yaml").to_vec()),
        ("yaml", "hand", include_bytes!("../../testdata/yaml/hand.yaml").to_vec()),
        ("calls", "info", b"GET /info HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n".to_vec()),
        (
            "calls",
            "evidence",
            b"GET /aa/evidence?encoding=base64&runtime_data=AAEC HTTP/1.1\r\n\r\n".to_vec(),
        ),
        ("calls", "token", b"GET /aa/token?token_type=kbs HTTP/1.0\r\n\r\n".to_vec()),
        ("calls", "resource", b"GET /cdh/resource/a/b/c HTTP/1.1\r\nConnection: close\r\n\r\n".to_vec()),
        ("calls", "post", b"POST /info HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}".to_vec()),
        ("keys", "p256", crate::der(&pem)),
        ("keys", "pem", pem.as_bytes().to_vec()),
        ("keys", "rsa", crate::der(include_str!("../../../rootfs/image/testdata/jwe/rsa.pem"))),
        ("evidence", "genoa", include_bytes!("../../testdata/snp/evidence.json").to_vec()),
    ]
}
