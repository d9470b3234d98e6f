//! What the tests build archives and images with: block by block, so that hostile ones can be made too.

use std::{io::Write, path::Path};

use zeroize::Zeroizing;

use crate::{
    digest::Digest,
    layout::Layout,
    manifest::{Descriptor, MANIFEST, architecture},
    ocicrypt::{KeySource, LayerKey},
};

/// An archive under construction.
#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    /// One header and its data, padded. `change` may break the header before its sum is made.
    pub(crate) fn raw(
        mut self,
        name: &str,
        kind: u8,
        link: &str,
        data: &[u8],
        change: impl Fn(&mut [u8]),
    ) -> Self {
        let mut block = [0; 512];
        block[..name.len().min(100)].copy_from_slice(&name.as_bytes()[..name.len().min(100)]);
        let put = |block: &mut [u8], at: usize, text: String| {
            block[at..at + text.len()].copy_from_slice(text.as_bytes());
        };
        put(&mut block, 100, format!("{:07o}", if kind == b'5' { 0o755 } else { 0o644 }));
        put(&mut block, 108, format!("{:07o}", 0));
        put(&mut block, 116, format!("{:07o}", 0));
        put(&mut block, 124, format!("{:011o}", data.len()));
        put(&mut block, 136, format!("{:011o}", 1_700_000_000));
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..265].copy_from_slice(b"ustar\x0000");
        change(&mut block);
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut block, 148, format!("{sum:06o}\0 "));
        self.0.extend(block);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.raw(name, b'0', "", data, |_| ())
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.raw(name, b'5', "", b"", |_| ())
    }

    pub(crate) fn symlink(self, name: &str, to: &str) -> Self {
        self.raw(name, b'2', to, b"", |_| ())
    }

    pub(crate) fn hardlink(self, name: &str, to: &str) -> Self {
        self.raw(name, b'1', to, b"", |_| ())
    }

    /// An extended header of these records.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            write!(data, "{length} {key}=").unwrap();
            data.extend(*value);
            data.push(b'\n');
        }
        self.raw("pax", b'x', "", &data, |_| ())
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An image of these layers (media type suffix, blob, archive) in a new layout, tagged `t`.
pub(crate) fn image(dir: &Path, layers: &[(&str, Vec<u8>, Vec<u8>)]) -> (Layout, Descriptor) {
    let layout = Layout::create(dir.join("layout")).unwrap();
    let descriptors: Vec<_> = layers
        .iter()
        .map(|(kind, blob, _)| {
            layout.put(&format!("application/vnd.oci.image.layer.v1.{kind}"), blob).unwrap()
        })
        .collect();
    let ids: Vec<_> = layers.iter().map(|(_, _, tar)| Digest::sha256(tar)).collect();
    let manifest = assemble(&layout, descriptors, &ids);
    (layout, manifest)
}

/// A manifest of these layers and diff_ids, tagged `t`.
pub(crate) fn assemble(layout: &Layout, layers: Vec<Descriptor>, ids: &[Digest]) -> Descriptor {
    let config = serde_json::json!({"architecture": architecture(), "os": "linux",
        "config": {"Cmd": ["/bin/true"]}, "rootfs": {"type": "layers", "diff_ids": ids}});
    let config =
        layout.put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes()).unwrap();
    let manifest =
        serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let manifest = layout.put(MANIFEST, manifest.to_string().as_bytes()).unwrap();
    layout.tag(manifest.clone(), "t").unwrap();
    manifest
}

/// Encrypts one blob by hand under a fixed key and stores it.
pub(crate) fn encrypted(layout: &Layout, kind: &str, blob: &[u8], key: &Fixed) -> Descriptor {
    let mut layer = LayerKey::generate().unwrap();
    let mut bytes = blob.to_vec();
    let mut stream = crate::ocicrypt::cipher::Stream::new(&layer);
    stream.encrypt(&mut bytes);
    layer.hmac = stream.mac();
    let mut descriptor =
        layout.put(&format!("application/vnd.oci.image.layer.v1.{kind}+encrypted"), &bytes).unwrap();
    key.annotate(&layer, &mut descriptor);
    descriptor
}

/// One key for every resource.
pub(crate) struct Fixed(pub(crate) [u8; 32]);

impl Fixed {
    pub(crate) fn annotate(&self, layer: &LayerKey, descriptor: &mut Descriptor) {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let private = layer.private_options("sha256:unused");
        let packet = crate::ocicrypt::packet::Packet::wrap("kbs:///t/k/1", &self.0, &private).unwrap();
        descriptor.annotations.insert(crate::ocicrypt::PUBLIC.into(), layer.public_options());
        descriptor
            .annotations
            .insert(crate::ocicrypt::ATTESTATION_AGENT.into(), STANDARD.encode(packet.to_json()));
    }
}

impl KeySource for Fixed {
    fn resource(&self, _: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        Ok(Zeroizing::new(self.0.to_vec()))
    }
}
