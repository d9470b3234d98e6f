//! Reference values and an attestation policy for Trustee.
//!
//! Owns: the two request bodies, `POST reference-value` (RVPS, type `sample`) and `POST attestation-policy`, and the
//! policy. Trustee's own policy wants OVMF's event log, which an IGVM boot does not have. Does not own: minimum TCB
//! versions, which are the operator's: the values given are zero and meant to be raised.

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde_json::{Value, json};

use crate::measure::hex;

/// The policy, in Rego.
pub const POLICY: &str = include_str!("policy.rego");

/// A generation of processors with SEV-SNP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are AMD's")]
pub enum Cpu {
    Milan,
    Genoa,
    Turin,
}

impl Cpu {
    /// By its name on the command line.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "milan" => Self::Milan,
            "genoa" => Self::Genoa,
            "turin" => Self::Turin,
            _ => return None,
        })
    }

    /// CPUID family, and the models of it that are this generation (AMD 57230, VCEK product names).
    #[must_use]
    pub fn family_and_models(self) -> (u8, Vec<u8>) {
        match self {
            Self::Milan => (0x19, (0..=0x0f).collect()),
            Self::Genoa => (0x19, (0x10..=0x1f).chain(0xa0..=0xaf).collect()),
            Self::Turin => (0x1a, (0..=0x11).collect()),
        }
    }
}

/// The values by name.
#[must_use]
pub fn values(digest: &[u8; 48], cpu: Cpu) -> Value {
    let (family, models) = cpu.family_and_models();
    json!({
        "coffer_snp_launch_measurement": [hex(digest)],
        "coffer_snp_cpuid_family": [family],
        "coffer_snp_cpuid_model": models,
        "coffer_snp_minimum_bootloader": 0,
        "coffer_snp_minimum_tee": 0,
        "coffer_snp_minimum_snp": 0,
        "coffer_snp_minimum_microcode": 0,
    })
}

/// Both request bodies, and the values in the clear.
#[must_use]
pub fn requests(digest: &[u8; 48], cpu: Cpu) -> Value {
    let values = values(digest, cpu);
    json!({
        "reference-value": {
            "version": "0.1.0",
            "type": "sample",
            "payload": STANDARD.encode(values.to_string()),
        },
        "attestation-policy": {
            "type": "rego",
            "policy_id": "default_cpu",
            "policy": URL_SAFE_NO_PAD.encode(POLICY),
        },
        "values": values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_are_those_of_amds_key_server() {
        use sev::Generation;
        for cpu in [Cpu::Milan, Cpu::Genoa, Cpu::Turin] {
            let (family, models) = cpu.family_and_models();
            for model in models {
                let theirs = match Generation::identify_cpu(family, model).unwrap() {
                    Generation::Milan => Cpu::Milan,
                    Generation::Genoa => Cpu::Genoa,
                    Generation::Turin => Cpu::Turin,
                    _ => panic!("another generation"),
                };
                assert_eq!(theirs, cpu, "family {family:#x} model {model:#x}");
            }
        }
    }

    #[test]
    fn the_requests_decode_to_values_and_policy() {
        let requests = requests(&[0xab; 48], Cpu::Milan);
        let payload = STANDARD.decode(requests["reference-value"]["payload"].as_str().unwrap()).unwrap();
        let payload: Value = serde_json::from_slice(&payload).unwrap();
        assert_eq!(payload["coffer_snp_launch_measurement"][0], "ab".repeat(48));
        assert_eq!(payload["coffer_snp_cpuid_family"][0], 25);
        let policy =
            URL_SAFE_NO_PAD.decode(requests["attestation-policy"]["policy"].as_str().unwrap()).unwrap();
        assert_eq!(policy, POLICY.as_bytes());
    }
}
