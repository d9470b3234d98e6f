//! The SEV-SNP attestation report: raw bytes, and the JSON that Trustee's verifier reads.
//!
//! Owns: the layout (SEV-SNP firmware ABI 1.58, table 23), the certificate table, both directions of the JSON form
//! (the `sev` crate's struct through serde). Does not own: signatures (`verify`), or the devices (`evidence`).

use serde_json::{Map, Value, json};
use thiserror::Error;

/// Bytes of a report.
pub const REPORT_SIZE: usize = 1184;
/// Bytes of it that are signed; the signature follows.
pub const SIGNED_SIZE: usize = 0x2a0;

const REPORT_DATA: usize = 0x50;
const MEASUREMENT: usize = 0x90;
const HOST_DATA: usize = 0xc0;
const CHIP_ID: usize = 0x1a0;
const FAMILY: usize = 0x188;
const MODEL: usize = 0x189;
/// Turin, whose TCB version has another layout.
const FAMILY_TURIN: u8 = 0x1a;

/// Bytes or JSON that are no report.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("SNP report: {0}")]
pub struct ReportError(pub String);

fn wrong(message: impl Into<String>) -> ReportError {
    ReportError(message.into())
}

/// A report, as the firmware made it.
#[derive(Clone, PartialEq, Eq)]
pub struct Report(Box<[u8; REPORT_SIZE]>);

impl std::fmt::Debug for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Report(version {})", self.version())
    }
}

/// Byte arrays of the report: JSON name, offset, length.
const BYTES: [(&str, usize, usize); 10] = [
    ("family_id", 0x10, 16),
    ("image_id", 0x20, 16),
    ("report_data", REPORT_DATA, 64),
    ("measurement", MEASUREMENT, 48),
    ("host_data", HOST_DATA, 32),
    ("id_key_digest", 0xe0, 48),
    ("author_key_digest", 0x110, 48),
    ("report_id", 0x140, 32),
    ("report_id_ma", 0x160, 32),
    ("chip_id", CHIP_ID, 64),
];
/// Numbers: JSON name, offset, bytes, first report version that has them.
const NUMBERS: [(&str, usize, usize, u32); 12] = [
    ("version", 0x00, 4, 0),
    ("guest_svn", 0x04, 4, 0),
    ("policy", 0x08, 8, 0),
    ("vmpl", 0x30, 4, 0),
    ("sig_algo", 0x34, 4, 0),
    ("plat_info", 0x40, 8, 0),
    ("key_info", 0x48, 4, 0),
    ("cpuid_fam_id", FAMILY, 1, 3),
    ("cpuid_mod_id", MODEL, 1, 3),
    ("cpuid_step", 0x18a, 1, 3),
    ("launch_mit_vector", 0x1f8, 8, 5),
    ("current_mit_vector", 0x200, 8, 5),
];
/// TCB versions: JSON name and offset.
const TCBS: [(&str, usize); 4] =
    [("current_tcb", 0x38), ("reported_tcb", 0x180), ("committed_tcb", 0x1e0), ("launch_tcb", 0x1f0)];
/// Firmware versions (build, minor, major): JSON name and offset.
const VERSIONS: [(&str, usize); 2] = [("current", 0x1e8), ("committed", 0x1ec)];
/// Halves of the signature, little endian: JSON name and offset.
const SIGNATURE: [(&str, usize); 2] = [("r", SIGNED_SIZE), ("s", SIGNED_SIZE + 72)];
const SIGNATURE_HALF: usize = 72;

/// Components of a TCB version by their byte.
fn tcb_layout(turin: bool) -> &'static [(&'static str, usize)] {
    if turin {
        &[("fmc", 0), ("bootloader", 1), ("tee", 2), ("snp", 3), ("microcode", 7)]
    } else {
        &[("bootloader", 0), ("tee", 1), ("snp", 6), ("microcode", 7)]
    }
}

impl Report {
    /// Takes raw bytes.
    ///
    /// # Errors
    /// [`ReportError`] when the length or version is none of ours.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ReportError> {
        let bytes: [u8; REPORT_SIZE] = bytes
            .try_into()
            .map_err(|_| wrong(format!("{} bytes, a report has {REPORT_SIZE}", bytes.len())))?;
        let report = Self(Box::new(bytes));
        if !(2..=5).contains(&report.version()) {
            return Err(wrong(format!("version {} is not known: 2 to 5 are", report.version())));
        }
        Ok(report)
    }

    /// The raw bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; REPORT_SIZE] {
        &self.0
    }

    fn number(&self, offset: usize, length: usize) -> u64 {
        let mut word = [0; 8];
        word[..length].copy_from_slice(&self.0[offset..offset + length]);
        u64::from_le_bytes(word)
    }

    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[offset..offset + N]);
        bytes
    }

    /// Report version, 2 to 5.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.number(0, 4) as u32
    }

    /// Guest policy.
    #[must_use]
    pub fn policy(&self) -> u64 {
        self.number(8, 8)
    }

    /// Privilege level of who asked.
    #[must_use]
    pub fn vmpl(&self) -> u32 {
        self.number(0x30, 4) as u32
    }

    /// What the guest put in.
    #[must_use]
    pub fn report_data(&self) -> [u8; 64] {
        self.array(REPORT_DATA)
    }

    /// Launch digest.
    #[must_use]
    pub fn measurement(&self) -> [u8; 48] {
        self.array(MEASUREMENT)
    }

    /// What the host bound to the launch.
    #[must_use]
    pub fn host_data(&self) -> [u8; 32] {
        self.array(HOST_DATA)
    }

    /// The chip's identity, or zeros when the host masks it.
    #[must_use]
    pub fn chip_id(&self) -> [u8; 64] {
        self.array(CHIP_ID)
    }

    /// CPU family, from version 3.
    #[must_use]
    pub fn family(&self) -> Option<u8> {
        (self.version() >= 3).then(|| self.0[FAMILY])
    }

    /// CPU model, from version 3.
    #[must_use]
    pub fn model(&self) -> Option<u8> {
        (self.version() >= 3).then(|| self.0[MODEL])
    }

    /// What the signature covers.
    #[must_use]
    pub fn signed(&self) -> &[u8] {
        &self.0[..SIGNED_SIZE]
    }

    /// r and s, big endian, 48 bytes each; `None` when a number is longer than the curve's.
    #[must_use]
    pub fn signature(&self) -> Option<[u8; 96]> {
        let mut signature = [0; 96];
        for (index, (_, offset)) in SIGNATURE.iter().enumerate() {
            let half: [u8; SIGNATURE_HALF] = self.array(*offset);
            if half[48..].iter().any(|b| *b != 0) {
                return None;
            }
            for (place, byte) in half[..48].iter().rev().enumerate() {
                signature[index * 48 + place] = *byte;
            }
        }
        Some(signature)
    }

    /// The reported TCB's components by name: bootloader, tee, snp, microcode, and on Turin fmc.
    #[must_use]
    pub fn reported_tcb(&self) -> Vec<(&'static str, u8)> {
        let layout = tcb_layout(self.family() == Some(FAMILY_TURIN));
        layout.iter().map(|(name, byte)| (*name, self.0[0x180 + byte])).collect()
    }

    /// The JSON form.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        for (name, offset, length) in BYTES {
            object.insert(name.into(), json!(&self.0[offset..offset + length]));
        }
        for (name, offset, length, since) in NUMBERS {
            let value = if self.version() < since { Value::Null } else { json!(self.number(offset, length)) };
            object.insert(name.into(), value);
        }
        let layout = tcb_layout(self.family() == Some(FAMILY_TURIN));
        for (name, offset) in TCBS {
            let mut tcb = Map::from_iter([("fmc".to_owned(), Value::Null)]);
            for (component, byte) in layout {
                tcb.insert((*component).into(), json!(self.0[offset + byte]));
            }
            object.insert(name.into(), tcb.into());
        }
        for (name, offset) in VERSIONS {
            let [build, minor, major] = self.array(offset);
            object.insert(name.into(), json!({ "major": major, "minor": minor, "build": build }));
        }
        let halves = SIGNATURE
            .iter()
            .map(|(name, offset)| ((*name).to_owned(), json!(&self.0[*offset..offset + SIGNATURE_HALF])));
        object.insert("signature".into(), Value::Object(halves.collect()));
        object.into()
    }

    /// Reads the JSON form back into the bytes that were signed.
    ///
    /// # Errors
    /// [`ReportError`], naming the field.
    pub fn from_json(value: &Value) -> Result<Self, ReportError> {
        let mut raw = [0u8; REPORT_SIZE];
        let number = |value: &Value, name: &str, most: u64| {
            let number = value.get(name).and_then(Value::as_u64);
            number.filter(|n| *n <= most).ok_or_else(|| wrong(format!("{name}: not a number of its size")))
        };
        let version = number(value, "version", u64::from(u32::MAX))? as u32;
        for (name, offset, length, since) in NUMBERS {
            // Old reports have no such field, whatever stands there.
            if version < since || (since > 3 && value.get(name).is_none_or(Value::is_null)) {
                continue;
            }
            let most = u64::MAX >> (64 - 8 * length);
            let bytes = number(value, name, most)?.to_le_bytes();
            raw[offset..offset + length].copy_from_slice(&bytes[..length]);
        }
        for (name, offset, length) in BYTES {
            raw[offset..offset + length].copy_from_slice(&byte_array(value.get(name), name, length)?);
        }
        let turin = version >= 3 && raw[FAMILY] == FAMILY_TURIN;
        for (name, offset) in TCBS {
            let tcb = value.get(name).unwrap_or(&Value::Null);
            for (component, byte) in tcb_layout(turin) {
                raw[offset + byte] = number(tcb, component, 255)? as u8;
            }
        }
        for (name, offset) in VERSIONS {
            let triple = value.get(name).unwrap_or(&Value::Null);
            for (place, component) in ["build", "minor", "major"].into_iter().enumerate() {
                raw[offset + place] = number(triple, component, 255)? as u8;
            }
        }
        for (name, offset) in SIGNATURE {
            let half = value.get("signature").and_then(|s| s.get(name));
            raw[offset..offset + SIGNATURE_HALF].copy_from_slice(&byte_array(half, name, SIGNATURE_HALF)?);
        }
        Self::from_bytes(&raw)
    }
}

fn byte_array(value: Option<&Value>, name: &str, length: usize) -> Result<Vec<u8>, ReportError> {
    let list = value.and_then(Value::as_array).filter(|l| l.len() == length);
    list.and_then(|l| l.iter().map(|b| b.as_u64().and_then(|b| u8::try_from(b).ok())).collect())
        .ok_or_else(|| wrong(format!("{name}: not {length} bytes")))
}

/// A certificate that came with a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// `VCEK`, `VLEK`, `ASK`, `ARK`, or another GUID in hexadecimal.
    pub kind: String,
    /// DER.
    pub der: Vec<u8>,
}

/// GUIDs of the GHCB specification's certificate table, in text order.
const KINDS: [(&str, [u8; 16]); 4] = [
    (
        "VCEK",
        [0x63, 0xda, 0x75, 0x8d, 0xe6, 0x64, 0x45, 0x64, 0xad, 0xc5, 0xf4, 0xb9, 0x3b, 0xe8, 0xac, 0xcd],
    ),
    (
        "VLEK",
        [0xa8, 0x07, 0x4b, 0xc2, 0xa2, 0x5a, 0x48, 0x3e, 0xaa, 0xe6, 0x39, 0xc0, 0x45, 0xa0, 0xb8, 0xa1],
    ),
    ("ASK", [0x4a, 0xb7, 0xb3, 0x79, 0xbb, 0xac, 0x4f, 0xe4, 0xa0, 0x2f, 0x05, 0xae, 0xf3, 0x27, 0xc7, 0x82]),
    ("ARK", [0xc0, 0xb4, 0x06, 0xa4, 0xa8, 0x03, 0x49, 0x52, 0x97, 0x43, 0x3f, 0xb6, 0x01, 0x4c, 0xd0, 0xae]),
];
const ENTRY: usize = 24;
const MOST_CERTIFICATES: usize = 16;

/// Reads the host's certificate table: entries of GUID, offset and length up to one of zeros.
///
/// # Errors
/// [`ReportError`] when an entry points outside, or there are too many.
pub fn certificate_table(table: &[u8]) -> Result<Vec<Certificate>, ReportError> {
    let mut list = Vec::new();
    for entry in table.chunks_exact(ENTRY) {
        if entry.iter().all(|b| *b == 0) {
            return Ok(list);
        }
        if list.len() == MOST_CERTIFICATES {
            return Err(wrong(format!("certificate table: more than {MOST_CERTIFICATES} entries")));
        }
        let word =
            |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]) as usize;
        let (offset, length) = (word(16), word(20));
        let der = offset.checked_add(length).and_then(|end| table.get(offset..end));
        let der = der.ok_or_else(|| wrong("certificate table: an entry points outside"))?.to_vec();
        let mut guid = [0; 16];
        guid.copy_from_slice(&entry[..16]);
        list.push(Certificate { kind: kind(guid), der });
    }
    // Nothing at all is a host without certificates; entries without an end are not a table.
    if table.is_empty() || list.is_empty() { Ok(list) } else { Err(wrong("certificate table: no end")) }
}

fn kind(guid: [u8; 16]) -> String {
    // Hosts write the first three fields in either byte order.
    let mut swapped = guid;
    swapped[..4].reverse();
    swapped[4..6].reverse();
    swapped[6..8].reverse();
    let known = KINDS.iter().find(|(_, bytes)| *bytes == guid || *bytes == swapped);
    known.map_or_else(|| crate::encoding::to_hex(&guid), |(name, _)| (*name).to_owned())
}

/// Evidence as Trustee's `snp` verifier reads it.
#[must_use]
pub fn evidence_json(report: &Report, certificates: &[Certificate]) -> Value {
    let chain: Vec<Value> = certificates
        .iter()
        .map(|c| {
            let known = KINDS.iter().any(|(name, _)| *name == c.kind);
            let kind = if known { json!(c.kind) } else { json!({ "OTHER": c.kind }) };
            json!({ "cert_type": kind, "data": c.der })
        })
        .collect();
    let chain = if chain.is_empty() { Value::Null } else { chain.into() };
    json!({ "attestation_report": report.to_json(), "cert_chain": chain })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A real Genoa report in Trustee's JSON; `testdata/README.md` says where from.
    const EVIDENCE: &str = include_str!("../testdata/snp/evidence.json");
    /// A real Milan report, raw.
    const RAW: &[u8] = include_bytes!("../testdata/snp/test-report.bin");

    #[test]
    fn upstreams_json_reads_and_writes_to_itself() {
        let evidence: Value = serde_json::from_str(EVIDENCE).unwrap();
        let theirs = &evidence["attestation_report"];
        let report = Report::from_json(theirs).unwrap();
        let ours = report.to_json();
        for (name, value) in theirs.as_object().unwrap() {
            assert_eq!(&ours[name], value, "{name}");
        }
        assert_eq!(Report::from_json(&ours).unwrap(), report);
    }

    #[test]
    fn a_raw_report_survives_its_json() {
        let report = Report::from_bytes(RAW).unwrap();
        assert_eq!((report.version(), report.policy(), report.family()), (2, 0x3001f, None));
        assert!(report.report_data()[48..].iter().all(|b| *b == 0));
        let again = Report::from_json(&report.to_json()).unwrap();
        assert_eq!(again.signed(), report.signed());
        assert_eq!(again.signature(), report.signature());
    }

    #[test]
    fn a_certificate_table_is_read_in_either_byte_order() {
        let mut swapped = KINDS[3].1;
        swapped[..4].reverse();
        swapped[4..6].reverse();
        swapped[6..8].reverse();
        let mut table = Vec::new();
        for (guid, offset) in [(KINDS[0].1, 72u32), (swapped, 75)] {
            table.extend_from_slice(&guid);
            table.extend_from_slice(&offset.to_le_bytes());
            table.extend_from_slice(&3u32.to_le_bytes());
        }
        table.extend_from_slice(&[0; 24]);
        table.extend_from_slice(b"abcdef");
        let list = certificate_table(&table).unwrap();
        assert_eq!((list[0].kind.as_str(), list[0].der.as_slice()), ("VCEK", b"abc".as_slice()));
        assert_eq!((list[1].kind.as_str(), list[1].der.as_slice()), ("ARK", b"def".as_slice()));
        table[16] = 0xff;
        assert!(certificate_table(&table).is_err());
    }

    proptest! {
        #[test]
        fn any_table_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = certificate_table(&bytes);
        }

        #[test]
        fn a_report_of_any_bytes_survives_its_json(seed in prop::collection::vec(any::<u8>(), SIGNED_SIZE), version in 2u8..6) {
            // Only bytes that the ABI names are in the JSON, so take those of a report that went through it once.
            let mut raw = [0u8; REPORT_SIZE];
            raw[..SIGNED_SIZE].copy_from_slice(&seed);
            raw[..4].copy_from_slice(&[version, 0, 0, 0]);
            let once = Report::from_json(&Report::from_bytes(&raw).unwrap().to_json()).unwrap();
            prop_assert_eq!(Report::from_json(&once.to_json()).unwrap(), once);
        }

        #[test]
        fn any_json_is_a_report_or_an_error(text in "\\PC{0,80}", name in 0usize..10) {
            let mut value = Report::from_bytes(RAW).unwrap().to_json();
            value[BYTES[name].0] = Value::from(text);
            prop_assert!(Report::from_json(&value).is_err());
        }
    }
}
