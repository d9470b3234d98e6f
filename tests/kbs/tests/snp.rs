//! SNP evidence before the KBS, signed by a key of the test's own in place of a chip's: what a launch has to be, and what
//! `coffer-image` says of it.

use coffer_attestation::{
    encoding::{from_base64, to_base64},
    evidence::primary_report_data,
    hash::HashAlgorithm,
    initdata::fit,
    key::{KeyAlgorithm, TeeKey},
    snp::{Certificate, REPORT_SIZE, Report, SIGNED_SIZE, evidence_json},
};
use coffer_image::reference::{self, Cpu};
use coffer_kbs::{Answer, Config, Kbs, Query};
use p384::{
    ecdsa::{Signature, SigningKey, signature::Signer},
    pkcs8::DecodePrivateKey,
};
use serde_json::{Value, json};

const DIGEST: [u8; 48] = [0xab; 48];
/// SMT allowed, and the bit that must be one.
const POLICY: u64 = 0x30000;
/// The host may read the guest's memory (SEV-SNP firmware ABI 1.58, table 10).
const DEBUG: u64 = 1 << 19;
/// A migration agent of the host's choice may have the guest's keys.
const MIGRATION: u64 = 1 << 18;

/// A chip: its key, and the certificate that the KBS is told to trust.
struct Chip {
    key: SigningKey,
    der: Vec<u8>,
    pem: String,
}

fn chip() -> Chip {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let made = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&pair).unwrap();
    let key = SigningKey::from_pkcs8_der(&pair.serialize_der()).unwrap();
    Chip { key, der: made.der().to_vec(), pem: made.pem() }
}

impl Chip {
    /// A report of a Genoa, with firmware 1 of everything, signed as the ABI says: r and s in little endian, 72 bytes each.
    fn evidence(&self, data: &[u8; 64], change: &[(usize, &[u8])]) -> Value {
        let mut raw = [0; REPORT_SIZE];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &3u32.to_le_bytes());
        put(8, &POLICY.to_le_bytes());
        put(0x34, &1u32.to_le_bytes());
        put(0x50, data);
        put(0x90, &DIGEST);
        put(0x180, &[1, 1, 0, 0, 0, 0, 1, 1]);
        put(0x188, &[0x19, 0x11, 0]);
        change.iter().for_each(|(at, bytes)| put(*at, bytes));
        let signature: Signature = self.key.sign(&raw[..SIGNED_SIZE]);
        for (half, at) in
            [(signature.r().to_bytes(), SIGNED_SIZE), (signature.s().to_bytes(), SIGNED_SIZE + 72)]
        {
            for (place, byte) in half.iter().rev().enumerate() {
                raw[at + place] = *byte;
            }
        }
        let certificate = Certificate { kind: "VCEK".into(), der: self.der.clone() };
        evidence_json(&Report::from_bytes(&raw).unwrap(), &[certificate])
    }

    fn kbs(&self) -> Kbs {
        Kbs::new(Config { snp_roots: Some(self.pem.clone()), admin: true, ..Config::default() }).unwrap()
    }

    /// A whole attestation; the KBS's words when it refuses.
    fn attest(&self, kbs: &Kbs, change: &[(usize, &[u8])]) -> Result<(), String> {
        let auth = json!({ "version": "0.4.0", "tee": "snp", "extra-params": {} });
        let challenge = ask(kbs, "auth", None, &auth);
        let nonce = serde_json::from_slice::<Value>(&challenge.body).unwrap()["nonce"].clone();
        let key = TeeKey::generate(KeyAlgorithm::P256).unwrap().public();
        let data = primary_report_data(HashAlgorithm::Sha384, nonce.as_str().unwrap(), &key, "");
        let body = json!({
            "init-data": null,
            "runtime-data": { "nonce": nonce, "tee-pubkey": key },
            "tee-evidence": { "primary_evidence": self.evidence(&fit(&data), change), "additional_evidence": "" },
        });
        said(&ask(kbs, "attest", challenge.cookie, &body))
    }
}

fn ask(kbs: &Kbs, path: &str, cookie: Option<String>, body: &Value) -> Answer {
    let (method, path) = ("POST".into(), format!("/kbs/v0/{path}"));
    kbs.answer(&Query { method, path, cookie, bearer: None, body: body.to_string().into_bytes() })
}

fn said(answer: &Answer) -> Result<(), String> {
    match answer.status {
        200 => Ok(()),
        status => Err(format!("{status} {}", String::from_utf8_lossy(&answer.body))),
    }
}

fn refused(result: Result<(), String>, words: &str) {
    let message = result.expect_err(words);
    assert!(message.starts_with("401 ") && message.contains(words), "{message}, not: {words}");
}

#[test]
fn a_guest_that_its_host_may_debug_or_move_gets_no_token() {
    let chip = chip();
    let kbs = chip.kbs();
    chip.attest(&kbs, &[]).unwrap();
    refused(
        chip.attest(&kbs, &[(8, &(POLICY | DEBUG).to_le_bytes())]),
        "policy is 0xb0000, expected one without DEBUG",
    );
    refused(
        chip.attest(&kbs, &[(8, &(POLICY | MIGRATION).to_le_bytes())]),
        "expected one without MIGRATE_MA",
    );
    refused(chip.attest(&kbs, &[(0x30, &[1])]), "vmpl is 1");
}

#[test]
fn what_coffer_image_says_of_an_image_is_what_the_kbs_asks_of_a_launch() {
    let chip = chip();
    let kbs = chip.kbs();
    let mut requests = reference::requests(&DIGEST, Cpu::Genoa);
    said(&ask(&kbs, "reference-value", None, &requests["reference-value"])).unwrap();
    chip.attest(&kbs, &[]).unwrap();
    refused(chip.attest(&kbs, &[(0x90, &[0xac])]), "is no reference value");
    refused(chip.attest(&kbs, &[(0x188, &[0x17])]), "CPUID family 0x17 is no reference value");
    refused(chip.attest(&kbs, &[(0x189, &[0x01])]), "CPUID model 0x1 is no reference value");
    // A report of version 2 has no place for them.
    refused(chip.attest(&kbs, &[(0, &[2]), (0x188, &[0; 3])]), "a report of version 2 has no CPUID family");
    // The operator raises the least versions, as the tool says they are to be.
    let payload = from_base64(requests["reference-value"]["payload"].as_str().unwrap()).unwrap();
    for (component, at) in [("bootloader", 0x180), ("tee", 0x181), ("snp", 0x186), ("microcode", 0x187)] {
        let mut values: Value = serde_json::from_slice(&payload).unwrap();
        values[format!("coffer_snp_minimum_{component}")] = 1.into();
        requests["reference-value"]["payload"] = to_base64(values.to_string().as_bytes()).into();
        said(&ask(&kbs, "reference-value", None, &requests["reference-value"])).unwrap();
        chip.attest(&kbs, &[]).unwrap();
        refused(chip.attest(&kbs, &[(at, &[0])]), &format!("{component} is 0, at least 1"));
    }
}

/// No others: `verify` has the test.
#[test]
fn reports_of_versions_2_to_5_are_read() {
    let chip = chip();
    let kbs = chip.kbs();
    for version in [3, 4, 5] {
        chip.attest(&kbs, &[(0, &[version])]).unwrap();
    }
    chip.attest(&kbs, &[(0, &[2]), (0x188, &[0; 3])]).unwrap();
}
