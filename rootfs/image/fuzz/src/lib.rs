//! Fuzz targets: every parser of an image's bytes that init runs. Each takes any bytes and panics when something is wrong.

use std::{collections::BTreeMap, thread};

use coffer_fuzz::Target;
use coffer_layers::{
    config::ImageConfig,
    manifest::{Compression, Document, layer_type},
    ocicrypt::{
        ATTESTATION_AGENT, JWE, KeyBytes, KeySource, LayerKey, PUBLIC, jwe::Jwe, keyprovider, packet::Packet,
    },
    pipeline::{decompress, queue},
    policy::Policy,
    reference::Reference,
    tar::{Archive, Kind, MOST_PATH},
};

/// The targets.
pub const TARGETS: [Target; 7] = [
    ("documents", documents),
    ("annotations", annotations),
    ("wraps", wraps),
    ("tar", tar),
    ("gzip", |data| stream(Compression::Gzip, data)),
    ("zstd", |data| stream(Compression::Zstd, data)),
    ("policy", policy),
];

/// Bytes that may come out of one input: what a bound of the pipeline would be.
const MOST: u64 = 1 << 20;

struct Nothing;

impl KeySource for Nothing {
    fn resource(&self, _: &str) -> Result<KeyBytes, String> {
        Ok(KeyBytes::new(vec![7; 32]))
    }
}

/// Manifests, indexes, configurations, references.
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

/// A signature policy.
pub fn policy(data: &[u8]) {
    use coffer_layers::policy::Subject;
    if let Ok(policy) = Policy::parse(data) {
        let subject = Subject { transport: "docker", reference: "r.io/app:1", digests: &[] };
        let _ = policy.check(&subject, &[], &|_| Err("none".into()));
    }
}
