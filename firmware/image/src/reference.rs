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

    /// Claims as Trustee's verifier has written them: by the report's own fields (attestation-service/docs/tcb_claims.md says `cpu_id_fam_id`
    /// where the `sev` crate says `cpuid_fam_id`), and flat, without the processor and the privilege level. Each with the places of what
    /// the policy looks at.
    fn shapes() -> [(&'static str, Value, [&'static str; 4]); 3] {
        let by_fields = |family: &str, model: &str| {
            json!({ "snp": { "evidence": {
                "measurement": "ab".repeat(48),
                family: 0x19,
                model: 1,
                "reported_tcb": { "fmc": null, "bootloader": 3, "tee": 0, "snp": 20, "microcode": 209 },
                "policy": { "debug_allowed": false, "migrate_ma_allowed": false },
                "vmpl": 0,
            } } })
        };
        let flat = json!({ "snp": {
            "measurement": "ab".repeat(48),
            "reported_tcb_bootloader": 3,
            "reported_tcb_tee": 0,
            "reported_tcb_snp": 20,
            "reported_tcb_microcode": 209,
            "policy_debug_allowed": false,
            "policy_migrate_ma": false,
            "chip_id": "00".repeat(64),
        } });
        let places = [
            "/snp/evidence/measurement",
            "/snp/evidence/reported_tcb/snp",
            "/snp/evidence/policy/debug_allowed",
            "/snp/evidence/policy/migrate_ma_allowed",
        ];
        [
            ("the crate's", by_fields("cpuid_fam_id", "cpuid_mod_id"), places),
            ("documented", by_fields("cpu_id_fam_id", "cpu_id_mod_id"), places),
            (
                "flat",
                flat,
                [
                    "/snp/measurement",
                    "/snp/reported_tcb_snp",
                    "/snp/policy_debug_allowed",
                    "/snp/policy_migrate_ma",
                ],
            ),
        ]
    }

    fn vector(claims: &Value, known: &Value) -> [i64; 3] {
        let claims = appraise(claims, known);
        ["executables", "hardware", "configuration"].map(|name| claims[name].as_i64().unwrap())
    }

    #[test]
    fn the_policy_affirms_the_measured_guest_and_nothing_else() {
        let known = values(&[0xab; 48], Cpu::Milan);
        for (shape, honest, [measurement, snp, debug, migrate]) in shapes() {
            let with = |place: &str, value: Value| {
                let mut claims = honest.clone();
                *claims.pointer_mut(place).unwrap() = value;
                vector(&claims, &known)
            };
            assert_eq!(vector(&honest, &known), [3, 2, 2], "{shape}");
            assert_eq!(with(measurement, json!("ac".repeat(48))), [33, 2, 2], "{shape}");
            for place in [debug, migrate] {
                assert_eq!(with(place, json!(true)), [3, 2, 36], "{shape}");
                // Trustee of 2024 wrote texts.
                assert_eq!(with(place, json!("false")), [3, 2, 36], "{shape}");
                assert_eq!(with(place, Value::Null), [3, 2, 36], "{shape}");
            }
            // In Rego's order every text is more than every number.
            assert_eq!(with(snp, json!("20")), [3, 97, 2], "{shape}");
            // An operator raises the least versions.
            let mut raised = known.clone();
            raised["coffer_snp_minimum_snp"] = json!(21);
            assert_eq!(vector(&honest, &raised), [3, 97, 2], "{shape}");
            // A value that nobody gave is no leave: every number is more than null.
            for name in known.as_object().unwrap().keys() {
                let mut fewer = known.clone();
                fewer.as_object_mut().unwrap().remove(name);
                let processor = name.contains("cpuid");
                let wanted = match name.as_str() {
                    "coffer_snp_launch_measurement" => [33, 2, 2],
                    _ if processor && shape == "flat" => [3, 2, 2],
                    _ => [3, 97, 2],
                };
                assert_eq!(vector(&honest, &fewer), wanted, "{shape}, without {name}");
            }
            // Evidence of another kind has none of it.
            let mut other = honest.clone();
            let evidence = other.as_object_mut().unwrap().remove("snp").unwrap();
            other["sample"] = evidence;
            assert_eq!(vector(&other, &known), [33, 97, 36], "{shape}");
        }
    }

    #[test]
    fn where_a_report_names_its_processor_and_level_they_count() {
        let known = values(&[0xab; 48], Cpu::Milan);
        for (shape, honest, _) in shapes().into_iter().take(2) {
            let with = |place: &str, value: Value| {
                let mut claims = honest.clone();
                *claims.pointer_mut(place).unwrap() = value;
                vector(&claims, &known)
            };
            let family = if shape == "documented" { "cpu_id" } else { "cpuid" };
            for (part, value) in [("fam", 0x1a), ("mod", 0x11)] {
                let place = format!("/snp/evidence/{family}_{part}_id");
                assert_eq!(with(&place, json!(value)), [3, 97, 2], "{shape}");
            }
            assert_eq!(with("/snp/evidence/vmpl", json!(1)), [3, 2, 36], "{shape}");
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
