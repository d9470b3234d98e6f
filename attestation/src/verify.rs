//! The other side of SNP evidence: is it of the hardware, of this launch, over this data.
//!
//! Owns: the certificate chain to a configured root, the report's signature, its fields against what is expected. Used by
//! the test KBS and by tests; init never links it. Does not own: getting certificates or revocation lists from anywhere.

use p384::ecdsa::{Signature, VerifyingKey, signature::Verifier};
use rsa::{PublicKey as RsaKey, pkcs8::DecodePublicKey};
use serde_json::Value;
use sha2::{Digest, Sha384};
use thiserror::Error;
use x509_cert::{
    certificate::{CertificateInner, Raw},
    der::{Decode, Encode, oid::ObjectIdentifier},
};

use crate::snp::{Report, ReportError};

/// Why evidence is not believed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VerifyError {
    /// Not evidence.
    #[error("SNP evidence: {0}")]
    Form(String),
    /// Not a report.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// No chain to a root.
    #[error("SNP evidence: certificate chain: {0}")]
    Chain(String),
    /// Not by the chip's key.
    #[error("SNP evidence: the report's signature does not hold under its certificate")]
    Signature,
    /// A field is not what it has to be.
    #[error("SNP evidence: {field} is {found}, expected {expected}")]
    Field {
        /// Of the report.
        field: &'static str,
        /// Hexadecimal or number.
        found: String,
        /// Hexadecimal or number.
        expected: String,
    },
}

type Parsed = CertificateInner<Raw>;

/// A root or an intermediate that is trusted because the verifier's owner said so.
#[derive(Clone, Debug)]
pub struct Trust {
    certificates: Vec<Parsed>,
}

const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const ECDSA_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
/// AMD's extensions of a VCEK (VCEK certificate specification, table 8): TCB component to OID.
const TCB_OIDS: [(&str, &str); 5] = [
    ("bootloader", "1.3.6.1.4.1.3704.1.3.1"),
    ("tee", "1.3.6.1.4.1.3704.1.3.2"),
    ("snp", "1.3.6.1.4.1.3704.1.3.3"),
    ("microcode", "1.3.6.1.4.1.3704.1.3.8"),
    ("fmc", "1.3.6.1.4.1.3704.1.3.9"),
];
/// Bits of a guest's policy that let somebody else at its memory (SEV-SNP firmware ABI 1.58, table 10): the host chooses the policy, and
/// the launch digest does not have it.
const OPEN: [(&str, u64); 2] = [("DEBUG", 1 << 19), ("MIGRATE_MA", 1 << 18)];
const CHIP_OID: &str = "1.3.6.1.4.1.3704.1.4";

impl Trust {
    /// Reads PEM certificates, such as AMD's ASK and ARK or a development root.
    ///
    /// # Errors
    /// [`VerifyError::Chain`].
    pub fn from_pem(pem: &str) -> Result<Self, VerifyError> {
        let wrong = |message: String| VerifyError::Chain(message);
        let mut certificates = Vec::new();
        let mut rest = pem;
        while let Some(start) = rest.find("-----BEGIN CERTIFICATE-----") {
            let body = &rest[start + 27..];
            let end =
                body.find("-----END CERTIFICATE-----").ok_or_else(|| wrong("PEM without an end".into()))?;
            let text: String = body[..end].split_whitespace().collect();
            let der = crate::encoding::from_base64(&text).map_err(|e| wrong(format!("PEM: {e}")))?;
            certificates.push(parse(&der)?);
            rest = &body[end..];
        }
        if certificates.is_empty() {
            return Err(wrong("no certificate in the configured roots".into()));
        }
        Ok(Self { certificates })
    }

    /// Checks that a certificate is one of these or issued by one of these, through at most two of `others`.
    fn check(&self, leaf: &Parsed, others: &[Parsed]) -> Result<(), VerifyError> {
        let mut current = leaf;
        for _ in 0..3 {
            if self.certificates.contains(current) || self.certificates.iter().any(|c| issued(current, c)) {
                return Ok(());
            }
            match others.iter().find(|c| *c != current && issued(current, c)) {
                Some(issuer) => current = issuer,
                None => break,
            }
        }
        Err(VerifyError::Chain("it does not lead to a configured root".into()))
    }
}

/// AMD's certificates include serial number 0, which strict parsers refuse.
fn parse(der: &[u8]) -> Result<Parsed, VerifyError> {
    Parsed::from_der(der).map_err(|e| VerifyError::Chain(format!("certificate: {e}")))
}

fn issued(certificate: &Parsed, issuer: &Parsed) -> bool {
    certificate.tbs_certificate().issuer() == issuer.tbs_certificate().subject()
        && signed(certificate, issuer).is_some()
}

fn signed(certificate: &Parsed, issuer: &Parsed) -> Option<()> {
    let message = certificate.tbs_certificate().to_der().ok()?;
    let signature = certificate.signature().as_bytes()?;
    let key = issuer.tbs_certificate().subject_public_key_info().to_der().ok()?;
    match certificate.signature_algorithm().oid {
        RSA_PSS => {
            let key = RsaKey::from_public_key_der(&key).ok()?;
            key.pss_verify_prehash::<Sha384>(&Sha384::digest(&message), signature).ok()
        }
        ECDSA_SHA384 => {
            let signature = Signature::from_der(signature).ok()?;
            VerifyingKey::from_public_key_der(&key).ok()?.verify(&message, &signature).ok()
        }
        _ => None,
    }
}

/// What evidence has to say.
#[derive(Clone, Debug)]
pub struct Expected {
    /// 48 bytes and zeros.
    pub report_data: [u8; 64],
    /// Initdata's digest, fitted; `None` when the guest sent none.
    pub host_data: Option<[u8; 32]>,
}

/// Checks evidence. What the launch digest may be is the caller's policy.
///
/// Report versions are 2 to 5 ([`Report`]). Trustee's verifier has refused 2 since it chooses AMD's root by the CPUID that 2 does not have; here
/// the root is configured, and the public report of a Milan with older firmware is of version 2.
///
/// # Errors
/// [`VerifyError`], the first check that fails.
pub fn verify_snp(evidence: &Value, trust: &Trust, expected: &Expected) -> Result<Report, VerifyError> {
    let report = Report::from_json(evidence.get("attestation_report").unwrap_or(&Value::Null))?;
    let (leaf, others) = certificates(evidence)?;
    trust.check(&leaf, &others)?;
    let key = leaf.tbs_certificate().subject_public_key_info().to_der();
    let key = key.ok().and_then(|der| VerifyingKey::from_public_key_der(&der).ok());
    let key = key.ok_or_else(|| VerifyError::Chain("the chip's key is not on P-384".into()))?;
    let signature = report.signature().and_then(|s| Signature::from_slice(&s).ok());
    let signature = signature.ok_or(VerifyError::Signature)?;
    key.verify(report.signed(), &signature).map_err(|_| VerifyError::Signature)?;
    check_extensions(&leaf, &report)?;
    let same = |field: &'static str, found: &[u8], expected: &[u8]| {
        if found == expected {
            return Ok(());
        }
        let hex = crate::encoding::to_hex;
        Err(VerifyError::Field { field, found: hex(found), expected: hex(expected) })
    };
    if report.vmpl() != 0 {
        let found = report.vmpl().to_string();
        return Err(VerifyError::Field { field: "vmpl", found, expected: "0".into() });
    }
    if let Some((name, _)) = OPEN.iter().find(|(_, bit)| report.policy() & bit != 0) {
        let (found, expected) = (format!("{:#x}", report.policy()), format!("one without {name}"));
        return Err(VerifyError::Field { field: "policy", found, expected });
    }
    same("report_data", &report.report_data(), &expected.report_data)?;
    if let Some(host_data) = &expected.host_data {
        same("host_data", &report.host_data(), host_data)?;
    }
    Ok(report)
}

fn certificates(evidence: &Value) -> Result<(Parsed, Vec<Parsed>), VerifyError> {
    let list = evidence.get("cert_chain").and_then(Value::as_array);
    let list = list.ok_or_else(|| VerifyError::Chain("the guest sent none, and none is at hand".into()))?;
    if list.len() > 8 {
        return Err(VerifyError::Chain("more than 8 certificates".into()));
    }
    let (mut leaf, mut others) = (None, Vec::new());
    for entry in list {
        let der: Option<Vec<u8>> = entry
            .get("data")
            .and_then(Value::as_array)
            .and_then(|d| d.iter().map(|b| b.as_u64().and_then(|b| u8::try_from(b).ok())).collect());
        let certificate = parse(&der.ok_or_else(|| VerifyError::Form("cert_chain: not bytes".into()))?)?;
        match entry.get("cert_type").and_then(Value::as_str) {
            Some("VCEK" | "VLEK") => leaf = Some(certificate),
            _ => others.push(certificate),
        }
    }
    Ok((leaf.ok_or_else(|| VerifyError::Chain("no VCEK or VLEK".into()))?, others))
}

/// Where the certificate speaks of TCB and chip, the report must say the same.
fn check_extensions(leaf: &Parsed, report: &Report) -> Result<(), VerifyError> {
    let extensions = leaf.tbs_certificate().extensions().map(Vec::as_slice).unwrap_or_default();
    let find = |oid: &str| extensions.iter().find(|e| e.extn_id.to_string() == oid);
    for (name, found) in report.reported_tcb() {
        let oid = TCB_OIDS.iter().find(|(n, _)| *n == name).map(|(_, oid)| *oid);
        let Some(extension) = oid.and_then(find) else { continue };
        // A DER INTEGER of one byte, or two where its highest bit is set.
        let certified = match extension.extn_value.as_bytes() {
            [2, 1, value] | [2, 2, 0, value] => *value,
            _ => return Err(VerifyError::Chain(format!("the extension for {name} is not a small number"))),
        };
        if certified != found {
            let (found, expected) =
                (format!("{name} {found}"), format!("{name} {certified} of the certificate"));
            return Err(VerifyError::Field { field: "reported_tcb", found, expected });
        }
    }
    if let Some(extension) = find(CHIP_OID) {
        // Raw, or as an OCTET STRING in newer certificates.
        let certified = extension.extn_value.as_bytes();
        let certified = if certified.len() == 66 { &certified[2..] } else { certified };
        let chip = report.chip_id();
        // Turin's chips have 8 bytes.
        let same = match certified.len() {
            64 => certified == chip,
            8 => certified == &chip[..8] && chip[8..].iter().all(|b| *b == 0),
            _ => false,
        };
        if !same {
            let hex = crate::encoding::to_hex;
            return Err(VerifyError::Field { field: "chip_id", found: hex(&chip), expected: hex(certified) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snp::{Certificate as Sent, evidence_json};
    use proptest::prelude::*;

    const EVIDENCE: &str = include_str!("../testdata/snp/evidence.json");
    const GENOA: &str = include_str!("../testdata/snp/genoa_ask_ark_asvk.pem");
    const MILAN: &str = include_str!("../testdata/snp/milan_ask_ark_asvk.pem");
    const RAW: &[u8] = include_bytes!("../testdata/snp/test-report.bin");
    const VCEK: &[u8] = include_bytes!("../testdata/snp/test-vcek.der");

    fn genoa() -> (Value, Expected) {
        let evidence: Value = serde_json::from_str(EVIDENCE).unwrap();
        let report = Report::from_json(&evidence["attestation_report"]).unwrap();
        (evidence, Expected { report_data: report.report_data(), host_data: Some([0; 32]) })
    }

    #[test]
    fn real_evidence_of_genoa_and_milan_holds() {
        let (evidence, expected) = genoa();
        verify_snp(&evidence, &Trust::from_pem(GENOA).unwrap(), &expected).unwrap();
        let report = Report::from_bytes(RAW).unwrap();
        let evidence = evidence_json(&report, &[Sent { kind: "VCEK".into(), der: VCEK.to_vec() }]);
        let expected = Expected { report_data: report.report_data(), host_data: None };
        verify_snp(&evidence, &Trust::from_pem(MILAN).unwrap(), &expected).unwrap();
    }

    #[test]
    fn another_root_or_a_changed_field_is_named() {
        let (mut evidence, mut expected) = genoa();
        let other = verify_snp(&evidence, &Trust::from_pem(MILAN).unwrap(), &expected).unwrap_err();
        assert!(matches!(other, VerifyError::Chain(_)), "{other}");
        let trust = Trust::from_pem(GENOA).unwrap();
        expected.host_data = Some([1; 32]);
        let message = verify_snp(&evidence, &trust, &expected).unwrap_err().to_string();
        assert!(message.starts_with("SNP evidence: host_data is 0000"), "{message}");
        evidence["attestation_report"]["policy"] = 0.into();
        assert_eq!(verify_snp(&evidence, &trust, &expected).unwrap_err(), VerifyError::Signature);
        evidence["cert_chain"] = Value::Null;
        assert!(matches!(verify_snp(&evidence, &trust, &expected), Err(VerifyError::Chain(_))));
    }

    /// Versions that are read: the public reports have 2 and 3, `tests/kbs/tests/snp.rs` signs the others.
    #[test]
    fn a_report_of_a_version_that_nobody_knows_is_refused() {
        let trust = Trust::from_pem(GENOA).unwrap();
        for version in [0, 1, 6, u32::MAX] {
            let (mut evidence, expected) = genoa();
            evidence["attestation_report"]["version"] = version.into();
            let message = verify_snp(&evidence, &trust, &expected).unwrap_err().to_string();
            assert_eq!(message, format!("SNP report: version {version} is not known: 2 to 5 are"));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn one_changed_byte_of_a_field_is_refused(
            field in prop::sample::select(vec!["measurement", "host_data", "report_data", "chip_id", "report_id"]),
            place in any::<prop::sample::Index>(),
        ) {
            let (mut evidence, expected) = genoa();
            let bytes = evidence["attestation_report"][field].as_array_mut().unwrap();
            let at = place.index(bytes.len());
            bytes[at] = Value::from(bytes[at].as_u64().unwrap() ^ 1);
            prop_assert!(verify_snp(&evidence, &Trust::from_pem(GENOA).unwrap(), &expected).is_err());
        }

        #[test]
        fn any_bytes_for_a_certificate_are_refused(der in prop::collection::vec(any::<u8>(), 0..60)) {
            let (mut evidence, expected) = genoa();
            evidence["cert_chain"][0]["data"] = der.into();
            prop_assert!(verify_snp(&evidence, &Trust::from_pem(GENOA).unwrap(), &expected).is_err());
        }
    }
}
