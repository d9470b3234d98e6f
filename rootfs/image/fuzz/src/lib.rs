//! Fuzz targets: every parser of an image's bytes that init runs. Each takes any bytes and panics when something is wrong.

use std::{collections::BTreeMap, sync::LazyLock, thread};

use base64::{Engine, engine::general_purpose::STANDARD};
use coffer_fuzz::Target;
use coffer_layers::{
    config::ImageConfig,
    digest::Digest,
    manifest::{Compression, Document, layer_type},
    ocicrypt::{
        ATTESTATION_AGENT, JWE, KeyBytes, KeySource, LayerKey, PUBLIC,
        jwe::{Jwe, PrivateKey, PublicKey},
        keyprovider,
        packet::Packet,
    },
    openpgp::{self, Ring},
    pipeline::{decompress, queue},
    policy::{
        Name, Origin, Policy, Signatures, Subject, Verdict,
        sigstore::{self, Signature},
        simple,
    },
    reference::Reference,
    tar::{Archive, Kind, MOST_PATH},
};

/// The targets.
pub const TARGETS: [Target; 10] = [
    ("documents", documents),
    ("annotations", annotations),
    ("wraps", wraps),
    ("tar", tar),
    ("gzip", |data| stream(Compression::Gzip, data)),
    ("zstd", |data| stream(Compression::Zstd, data)),
    ("policy", policy),
    ("payload", payload),
    ("openpgp", openpgp),
    ("keys", keys),
];

/// Bytes that may come out of one input: what a bound of the pipeline would be.
const MOST: u64 = 1 << 20;

struct Nothing;

impl KeySource for Nothing {
    fn resource(&self, _: &str) -> Result<KeyBytes, String> {
        Ok(KeyBytes::new(vec![7; 32]))
    }
}

/// Manifests, indexes, configurations, references, names.
pub fn documents(data: &[u8]) {
    match Document::parse(data, None) {
        Ok(Document::Manifest(manifest)) => {
            for layer in &manifest.layers {
                let _ = layer_type(layer);
            }
        }
        Ok(Document::Index(index)) => drop(index.choose().cloned()),
        Err(_) => {}
    }
    if let Ok(config) = ImageConfig::parse(data, 0)
        && let Ok(process) = config.process(None, &[], &[])
    {
        assert!(!process.args.is_empty() && !process.cwd.is_empty());
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(reference) = text.parse::<Reference>()
    {
        assert_eq!(reference.to_string().parse(), Ok(reference));
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(name) = Name::of_image(text)
    {
        assert!(!name.is_bare() && name.scopes()[0] == name.to_string());
        assert_eq!(name.to_string().parse(), Ok(name));
    }
}

/// A layer's annotations: three lines, as the values of three names.
pub fn annotations(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let mut all = BTreeMap::new();
    for name in [PUBLIC, ATTESTATION_AGENT, JWE] {
        if let Some(line) = lines.next() {
            all.insert(name.to_owned(), line.to_owned());
        }
    }
    let _ = LayerKey::unwrap(&all, &Nothing);
}

/// Wrapped keys, by themselves.
pub fn wraps(data: &[u8]) {
    if let Ok(packet) = Packet::parse(data) {
        let _ = packet.open(&[7; 32]);
    }
    let _ = Jwe::parse(data);
    // No key file: a mutated request could name any file of this machine.
    if !data.windows(7).any(|w| w == b"keypath") {
        let _ = keyprovider::answer(data, "attestation-agent", None);
    }
}

/// An archive.
pub fn tar(data: &[u8]) {
    read(&mut Archive::new(data));
}

fn read<R: std::io::BufRead>(archive: &mut Archive<R>) {
    while let Ok(Some(entry)) = archive.entry() {
        assert!(entry.path.len() <= MOST_PATH && !entry.path.contains(&0) && entry.mode <= 0o7777);
        if let Kind::HardLink(to) | Kind::SymLink(to) = &entry.kind {
            assert!(!to.is_empty() && to.len() <= MOST_PATH);
        }
        if let Some(sparse) = &entry.sparse {
            let sum: u64 = sparse.pieces.iter().map(|(_, length)| length).sum();
            assert_eq!(sum, entry.size);
            assert!(sparse.pieces.iter().all(|(at, length)| at + length <= sparse.real));
        }
        let mut got = 0;
        while let Ok(piece) = archive.data() {
            if piece.is_empty() {
                assert_eq!(got, entry.size);
                break;
            }
            let n = piece.len();
            got += n as u64;
            archive.consume(n);
        }
    }
}

/// A packed layer through the middle of the pipeline, into an archive.
pub fn stream(compression: Compression, data: &[u8]) {
    let (give, take) = queue();
    let (out, result) = queue();
    thread::scope(|scope| {
        scope.spawn(move || {
            if give.send(data.to_vec()).is_ok() {
                give.finish();
            }
        });
        scope.spawn(move || drop(decompress(compression, take, &out, MOST)));
        read(&mut Archive::new(result));
    });
}

const PRIVATE: &str = include_str!("../../testdata/sign/p256.pem");
const PUBLIC_KEY: &str = include_str!("../../testdata/sign/p256.pub");

/// A signature policy, asked about an image with a signature by the key of every path, and one without.
pub fn policy(data: &[u8]) {
    static SIGNED: LazyLock<(Digest, Signature)> = LazyLock::new(|| {
        let digest = Digest::sha256(b"image");
        let signature = Signature::sign(PRIVATE, "r.io/app:1", &digest).expect("a key of ours");
        (digest, signature)
    });
    let Ok(policy) = Policy::parse(data) else { return };
    let (digest, signature) = &*SIGNED;
    for origin in
        [Origin::Registry("r.io/app:1".parse().expect("a name")), Origin::Layout("/images/a".into())]
    {
        let ask = |signatures: &[Signature]| {
            let signatures = &Signatures { sigstore: signatures.to_vec(), simple: Vec::new() };
            let subject = Subject { origin: &origin, digests: std::slice::from_ref(digest) };
            policy.check(&subject, signatures, &|_| Ok(PUBLIC_KEY.into()))
        };
        let without = ask(&[]);
        assert!(!matches!(without, Ok(Verdict::Signed)));
        // A signature takes nothing away.
        if without.is_ok() {
            assert!(matches!(ask(std::slice::from_ref(signature)), Ok(Verdict::Accepted)));
        } else if let Err(why) = ask(std::slice::from_ref(signature)) {
            assert!(why.to_string().starts_with("policy: ") && !why.to_string().contains('\n'));
        }
    }
}

/// What a signature signs, and what it says of the image.
pub fn payload(data: &[u8]) {
    if let Ok(reference) = simple::reference(data, &[Digest::sha256(b"image")]) {
        let _ = reference.parse::<Name>();
    }
    if let Ok(reference) = sigstore::reference(data, &[Digest::sha256(b"image")]) {
        let _ = reference.parse::<Name>();
    }
}

const RINGS: [&[u8]; 4] = [
    include_bytes!("../../testdata/openpgp/ed25519.pgp"),
    include_bytes!("../../testdata/openpgp/rsa.pgp"),
    include_bytes!("../../testdata/openpgp/p256.pgp"),
    include_bytes!("../../testdata/openpgp/subkey.pgp"),
];
const MESSAGES: [&[u8]; 4] = [
    include_bytes!("../../testdata/openpgp/ed25519.sig"),
    include_bytes!("../../testdata/openpgp/rsa.sig"),
    include_bytes!("../../testdata/openpgp/p256.sig"),
    include_bytes!("../../testdata/openpgp/subkey.sig"),
];
const SIGNED: &[u8] = include_bytes!("../../testdata/openpgp/payload.json");
/// 2026-11-26.
const NOW: u64 = 1_795_651_200;

/// A signed message, before rings of others; and a ring, asked about messages of others. Nobody here has a private key, so that nothing
/// can hold but what was signed before.
pub fn openpgp(data: &[u8]) {
    static KEYS: LazyLock<Vec<Ring>> =
        LazyLock::new(|| RINGS.iter().map(|ring| Ring::parse(ring).expect("a ring by gpg")).collect());
    if let Ok(content) = openpgp::check(data, &KEYS, NOW) {
        let whole = content.chunks(SIGNED.len()).all(|part| part == SIGNED);
        assert!(whole && !content.is_empty());
    }
    if let Ok(ring) = Ring::parse(data) {
        let rings = [ring];
        for message in MESSAGES {
            if let Ok(content) = openpgp::check(message, &rings, NOW) {
                assert_eq!(content, SIGNED);
            }
        }
    }
}

/// A recipient's key in PEM; or what PEMs of each name would hold.
pub fn keys(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && text.starts_with("-----BEGIN")
    {
        let _ = (PrivateKey::from_pem(text), PublicKey::from_pem(text));
        return;
    }
    let body = STANDARD.encode(data);
    for name in ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "PUBLIC KEY", "RSA PUBLIC KEY"] {
        let mut text = format!("-----BEGIN {name}-----\n");
        for line in body.as_bytes().chunks(64) {
            text += std::str::from_utf8(line).expect("Base64");
            text.push('\n');
        }
        text += &format!("-----END {name}-----\n");
        let private = PrivateKey::from_pem(&text).is_ok();
        let public = PublicKey::from_pem(&text).is_ok();
        assert!(!(private && public));
    }
}
