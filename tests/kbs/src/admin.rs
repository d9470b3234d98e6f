//! The owner's calls, as upstream's `kbs-client` makes them.

use coffer_attestation::encoding::{from_base64, from_base64url, from_hex, to_base64url};
use serde_json::{Map, Value, json};

use crate::{
    answer::{Answer, Query},
    policy::Policy,
    session::Kbs,
};

impl Kbs {
    pub(crate) fn administer(&self, query: &Query, parts: &[&str]) -> Result<Answer, Answer> {
        if !self.admin {
            return Err(Answer::error("AdminAuthAccess", "admin calls are off"));
        }
        let wrong = |detail: String| Answer::error("SerdeError", detail);
        let body = || -> Result<Value, Answer> {
            serde_json::from_slice(&query.body).map_err(|e| wrong(e.to_string()))
        };
        let text = |value: &Value| -> Result<String, Answer> {
            let text = value.as_str().ok_or_else(|| wrong("policy is missing".into()))?;
            let bytes = from_base64url(text).map_err(|e| wrong(format!("policy: {e}")))?;
            String::from_utf8(bytes).map_err(|e| wrong(format!("policy: {e}")))
        };
        let mut state = self.state();
        match (query.method.as_str(), parts) {
            ("POST", ["resource", repository, kind, tag]) => {
                state.resources.insert(format!("{repository}/{kind}/{tag}"), query.body.clone());
            }
            ("DELETE", ["resource", repository, kind, tag]) => {
                let removed = state.resources.remove(&format!("{repository}/{kind}/{tag}"));
                removed.ok_or_else(|| Answer::error("PluginInternalError", "resource not found"))?;
            }
            ("POST", ["resource-policy"]) => {
                let policy = Policy::parse(text(&body()?["policy"])?);
                state.policy = policy.map_err(|e| Answer::error("ParsePolicyError", e))?;
            }
            ("GET", ["resource-policy"]) => {
                return Ok(Answer::json(&json!(to_base64url(state.policy.0.as_bytes()))));
            }
            ("POST", ["attestation-policy"]) => {
                let body = body()?;
                let id = body["policy_id"].as_str().unwrap_or("default_cpu").to_owned();
                let policy = text(&body["policy"])?;
                Policy::parse(policy.clone()).map_err(|e| Answer::error("ParsePolicyError", e))?;
                state.attestation_policies.insert(id, policy);
            }
            ("POST", ["reference-value"]) => {
                let body = body()?;
                // Upstream's client sends the message as JSON inside a text.
                let message: Value = match body["message"].as_str() {
                    Some(text) => serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?,
                    None => body,
                };
                let payload = from_base64(message["payload"].as_str().unwrap_or_default());
                let payload: Map<String, Value> =
                    serde_json::from_slice(&payload.map_err(|e| wrong(format!("payload: {e}")))?)
                        .map_err(|e| wrong(format!("payload: {e}")))?;
                for (name, value) in payload {
                    if name == "measurement" || name == "snp_launch_measurement" {
                        state.measurements = measurements(&value).map_err(wrong)?;
                    }
                    state.values.insert(name, value);
                }
            }
            ("GET", ["reference-value", id]) => {
                return Ok(Answer::json(&state.values.get(*id).cloned().unwrap_or_default()));
            }
            _ => return Err(Answer::error("InvalidRequestPath", "no such call")),
        }
        Ok(Answer::empty())
    }
}

fn measurements(value: &Value) -> Result<Vec<[u8; 48]>, String> {
    let list = match value {
        Value::Array(list) => list.clone(),
        one => vec![one.clone()],
    };
    let read = |value: &Value| {
        let bytes = from_hex(value.as_str().unwrap_or_default()).map_err(|e| format!("measurement: {e}"))?;
        bytes.try_into().map_err(|_| "measurement: not 48 bytes".to_owned())
    };
    list.iter().map(read).collect()
}
