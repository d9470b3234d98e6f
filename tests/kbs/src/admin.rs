//! The owner's calls, as upstream's `kbs-client` makes them.

use coffer_attestation::encoding::{from_base64, from_base64url, to_base64url};
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
                let detail = "attestation policies are not evaluated here: reference values say which measurements are good";
                return Err(Answer::error("PolicyEngineError", detail));
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
                // All of them or none.
                let new = state.reference.with(payload);
                state.reference = new.map_err(|e| Answer::error("RvpsError", e))?;
            }
            ("GET", ["reference-value", id]) => {
                return Ok(Answer::json(&state.reference.value(id).cloned().unwrap_or_default()));
            }
            _ => return Err(Answer::error("InvalidRequestPath", "no such call")),
        }
        Ok(Answer::empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Config;
    use coffer_attestation::{
        encoding::{to_base64, to_hex},
        snp::{REPORT_SIZE, Report},
    };

    fn call(kbs: &Kbs, method: &str, path: &str, body: &str) -> Answer {
        let path = format!("/kbs/v0/{path}");
        kbs.answer(&Query { method: method.into(), path, body: body.into(), ..Query::default() })
    }

    /// As kbs-client's `set-sample-reference-value` has it: the message is JSON in a text, its payload Base64 of JSON.
    fn message(payload: &Value) -> String {
        let payload = to_base64(payload.to_string().as_bytes());
        let message = json!({ "version": "0.1.0", "type": "sample", "payload": payload });
        json!({ "message": message.to_string() }).to_string()
    }

    /// What a launch has to be, `tests/snp.rs` has by reports that are signed.
    fn is_good(kbs: &Kbs, measurement: u8) -> bool {
        let mut raw = [0; REPORT_SIZE];
        raw[0] = 3;
        raw[0x90..0xc0].fill(measurement);
        kbs.state().reference.check(&Report::from_bytes(&raw).unwrap()).is_ok()
    }

    #[test]
    fn reference_values_say_which_measurements_are_good() {
        let kbs = Kbs::new(Config { admin: true, ..Config::default() }).unwrap();
        assert!(is_good(&kbs, 1), "a KBS that knows none takes any");
        let two = json!({ "snp_launch_measurement": [to_hex(&[1; 48]), to_hex(&[2; 48])] });
        assert_eq!(call(&kbs, "POST", "reference-value", &message(&two)).status, 200);
        assert!(is_good(&kbs, 1) && is_good(&kbs, 2) && !is_good(&kbs, 3));
        let given = call(&kbs, "GET", "reference-value/snp_launch_measurement", "").body;
        assert_eq!(given, two["snp_launch_measurement"].to_string().as_bytes());
        // Without the text around the message as well.
        let payload = to_base64(json!({ "measurement": to_hex(&[3; 48]) }).to_string().as_bytes());
        assert_eq!(
            call(&kbs, "POST", "reference-value", &json!({ "payload": payload }).to_string()).status,
            200
        );
        assert!(is_good(&kbs, 3) && !is_good(&kbs, 1));
        let known = json!({ "measurement": to_hex(&[1; 48]), "coffer_snp_cpuid_family": 300 });
        let twice = json!({ "measurement": to_hex(&[1; 48]), "snp_launch_measurement": to_hex(&[2; 48]) });
        for wrong in [
            json!({ "measurement": "00" }),
            json!({ "measurement": [7] }),
            json!({ "coffer_snp_minimum_snp": [1] }),
            json!([]),
            known,
            twice,
        ] {
            assert_eq!(call(&kbs, "POST", "reference-value", &message(&wrong)).status, 401, "{wrong}");
        }
        assert!(
            is_good(&kbs, 3) && !is_good(&kbs, 0) && !is_good(&kbs, 1),
            "what is refused changes nothing"
        );
        // Nothing is good once its owner says that nothing is.
        let none = json!({ "measurement": [] });
        assert_eq!(call(&kbs, "POST", "reference-value", &message(&none)).status, 200);
        assert!(!is_good(&kbs, 3));
        let closed = Kbs::new(Config::default()).unwrap();
        assert_eq!(call(&closed, "POST", "reference-value", &message(&two)).status, 401);
    }

    /// A value that nothing is compared with would be a check that its owner believes in and that nobody makes.
    #[test]
    fn a_reference_value_that_nothing_is_compared_with_is_refused_by_name() {
        let kbs = Kbs::new(Config { admin: true, ..Config::default() }).unwrap();
        for name in ["other", "snp_launch_measurment", "coffer_snp_minimum_fmc", "tdx_mr_td"] {
            let answer = call(&kbs, "POST", "reference-value", &message(&json!({ name: to_hex(&[1; 48]) })));
            assert_eq!(answer.status, 401, "{name}");
            let words = String::from_utf8(answer.body).unwrap();
            assert!(words.contains("errors/RvpsError") && words.contains(name), "{words}");
        }
    }

    #[test]
    fn a_policy_that_nobody_would_ask_is_not_taken() {
        let kbs = Kbs::new(Config { admin: true, ..Config::default() }).unwrap();
        let answer = call(
            &kbs,
            "POST",
            "attestation-policy",
            &json!({ "type": "rego", "policy_id": "default_cpu", "policy": "" }).to_string(),
        );
        assert_eq!(answer.status, 401);
        assert!(String::from_utf8(answer.body).unwrap().contains("not evaluated here"));
    }
}
