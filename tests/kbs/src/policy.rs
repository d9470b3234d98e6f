//! The resource policy: who gets what.
//!
//! Owns: upstream's form, `data.policy.allow` with the token's claims as `input`, and its default.

use regorus::{Engine, Value};

/// Upstream's default: everybody whose evidence is of hardware.
const DEFAULT: &str = r#"package policy

import rego.v1

default allow := false

allow if {
    data.plugin == "resource"
    not sample
}

sample if input.submods.cpu0["ear.veraison.annotated-evidence"].sample
"#;

/// Everybody. For tests without a TEE.
pub(crate) const ALLOW_ALL: &str = "package policy\n\nallow := true\n";

/// A policy's text, known to be one.
#[derive(Clone, Debug)]
pub(crate) struct Policy(pub(crate) String);

impl Default for Policy {
    fn default() -> Self {
        Self(DEFAULT.into())
    }
}

impl Policy {
    pub(crate) fn parse(text: String) -> Result<Self, String> {
        Engine::new().add_policy("policy.rego".into(), text.clone()).map_err(|e| e.to_string())?;
        Ok(Self(text))
    }

    pub(crate) fn allows(&self, claims: &serde_json::Value, path: &[&str]) -> Result<bool, String> {
        let mut engine = Engine::new();
        let (plugin, rest) = path.split_first().map_or(("", [].as_slice()), |(p, r)| (*p, r));
        let data = serde_json::json!({ "plugin": plugin, "resource-path": rest, "query": {} });
        let decide = |engine: &mut Engine| -> anyhow::Result<Value> {
            engine.add_policy("policy.rego".into(), self.0.clone())?;
            engine.add_data(Value::from_json_str(&data.to_string())?)?;
            engine.set_input(Value::from_json_str(&claims.to_string())?);
            engine.eval_rule("data.policy.allow".into())
        };
        Ok(decide(&mut engine).map_err(|e| e.to_string())? == Value::from(true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn claims(tee: &str) -> serde_json::Value {
        json!({ "submods": { "cpu0": { "ear.veraison.annotated-evidence": { tee: { "a": 1 } } } } })
    }

    #[test]
    fn the_default_refuses_sample_evidence() {
        let path = ["resource", "a", "b", "c"];
        assert_eq!(Policy::default().allows(&claims("sample"), &path), Ok(false));
        assert_eq!(Policy::default().allows(&claims("snp"), &path), Ok(true));
        assert_eq!(Policy(ALLOW_ALL.into()).allows(&claims("sample"), &path), Ok(true));
        assert!(Policy::parse("packag x".into()).is_err());
    }

    #[test]
    fn a_policy_sees_the_path() {
        let policy = Policy::parse("package policy\nimport rego.v1\ndefault allow := false\nallow if data[\"resource-path\"][0] == \"a\"\n".into()).unwrap();
        assert_eq!(policy.allows(&claims("snp"), &["resource", "a", "b", "c"]), Ok(true));
        assert_eq!(policy.allows(&claims("snp"), &["resource", "x", "b", "c"]), Ok(false));
    }
}
