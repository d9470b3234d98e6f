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

    /// What the policy makes of claims, as Trustee's attestation service asks it: claims are the input, reference values come
    /// by name from a function of its own.
    fn appraise(claims: &Value, known: &Value) -> Value {
        let mut engine = regorus::Engine::new();
        engine.add_policy("policy.rego".into(), POLICY.into()).unwrap();
        let known = known.clone();
        let value_of = move |names: Vec<regorus::Value>| {
            let name = names[0].as_string()?.to_string();
            regorus::Value::from_json_str(&known[&name].to_string())
        };
        engine.add_extension("query_reference_value".into(), 1, Box::new(value_of)).unwrap();
        engine.set_input(regorus::Value::from_json_str(&claims.to_string()).unwrap());
        let claims = engine.eval_rule("data.policy.trust_claims".into()).unwrap();
        serde_json::from_str(&claims.to_json_str().unwrap()).unwrap()
    }

    #[test]
    fn the_policy_affirms_the_measured_guest_and_nothing_else() {
        let evidence = json!({
            "measurement": "ab".repeat(48),
            "cpuid_fam_id": 0x19,
            "cpuid_mod_id": 1,
            "reported_tcb": { "bootloader": 3, "tee": 0, "snp": 20, "microcode": 209 },
            "policy": { "debug_allowed": false, "migrate_ma_allowed": false },
            "vmpl": 0,
        });
        let known = values(&[0xab; 48], Cpu::Milan);
        let vector = |change: &[(&str, Value)], known: &Value| {
            let mut claims = json!({ "snp": { "evidence": evidence } });
            for (pointer, value) in change {
                *claims.pointer_mut(&format!("/snp/evidence{pointer}")).unwrap() = value.clone();
            }
            let claims = appraise(&claims, known);
            ["executables", "hardware", "configuration"].map(|name| claims[name].as_i64().unwrap())
        };
        assert_eq!(vector(&[], &known), [3, 2, 2]);
        assert_eq!(vector(&[("/measurement", json!("ac".repeat(48)))], &known), [33, 2, 2]);
        for (pointer, value) in [("/cpuid_fam_id", 0x1a), ("/cpuid_mod_id", 0x11)] {
            assert_eq!(vector(&[(pointer, json!(value))], &known), [3, 97, 2], "{pointer}");
        }
        for pointer in ["/policy/debug_allowed", "/policy/migrate_ma_allowed"] {
            assert_eq!(vector(&[(pointer, json!(true))], &known), [3, 2, 36], "{pointer}");
        }
        assert_eq!(vector(&[("/vmpl", json!(1))], &known), [3, 2, 36]);
        // An operator raises the least versions.
        let mut raised = known.clone();
        raised["coffer_snp_minimum_snp"] = json!(21);
        assert_eq!(vector(&[], &raised), [3, 97, 2]);
        // Evidence of another kind has none of it.
        let other = appraise(&json!({ "sample": { "evidence": evidence } }), &known);
        assert_eq!((&other["executables"], &other["hardware"]), (&json!(33), &json!(97)));
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
