//! Sessions: challenge, evidence, token, resources.
//!
//! Owns: everything that a guest asks for. Does not own: what an owner asks for (`admin`).

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use coffer_attestation::{
    encoding::{to_base64, to_hex},
    evidence::{device_report_data, primary_report_data},
    hash::HashAlgorithm,
    initdata::{Initdata, fit},
    jwe,
    jws::{self, Unverified},
    kbs::{BASE_PATH, PROTOCOL_VERSION},
    key::{KeyAlgorithm, PublicJwk, TeeKey},
    verify::{Expected, Trust, verify_snp},
};
use serde_json::{Map, Value, json};

use crate::{
    answer::{Answer, Query},
    policy::{ALLOW_ALL, Policy},
    reference::Reference,
};

const SESSION: Duration = Duration::from_secs(5 * 60);
const TOKEN: u64 = 5 * 60;
/// More sessions than these and the oldest go.
const MOST_SESSIONS: usize = 1024;
const EVIDENCE: &str = "ear.veraison.annotated-evidence";

/// What a KBS is started with.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// `repository/type/tag` to bytes.
    pub resources: BTreeMap<String, Vec<u8>>,
    /// PEM roots of SNP evidence; without them it is refused.
    pub snp_roots: Option<String>,
    /// Launch digests that are good; none means any, which is for tests.
    pub measurements: Vec<[u8; 48]>,
    /// Rego; upstream's default otherwise.
    pub policy: Option<String>,
    /// Give resources to `sample` evidence too: shorthand for a policy that allows everything.
    pub allow_all: bool,
    /// Answer admin calls from anybody.
    pub admin: bool,
}

struct Session {
    tee: kbs_types::Tee,
    nonce: String,
    ends: Instant,
    token: Option<String>,
}

pub(crate) struct State {
    sessions: HashMap<String, Session>,
    pub(crate) resources: BTreeMap<String, Vec<u8>>,
    pub(crate) policy: Policy,
    pub(crate) reference: Reference,
}

/// The server's mind.
pub struct Kbs {
    key: p256::SecretKey,
    trust: Option<Trust>,
    pub(crate) admin: bool,
    state: Mutex<State>,
}

type Refusal = Answer;

fn refuse<E: std::fmt::Display>(variant: &'static str) -> impl FnOnce(E) -> Refusal {
    move |e| Answer::error(variant, e.to_string())
}

impl Kbs {
    /// A KBS with this configuration.
    ///
    /// # Errors
    /// What is wrong with roots or policy.
    pub fn new(config: Config) -> anyhow::Result<Self> {
        let policy = match (config.policy, config.allow_all) {
            (Some(text), _) => Policy::parse(text).map_err(anyhow::Error::msg)?,
            (None, true) => Policy(ALLOW_ALL.into()),
            (None, false) => Policy::default(),
        };
        let TeeKey::P256(key) = TeeKey::generate(KeyAlgorithm::P256)? else {
            unreachable!("asked for P-256")
        };
        Ok(Self {
            key,
            trust: config.snp_roots.as_deref().map(Trust::from_pem).transpose()?,
            admin: config.admin,
            state: Mutex::new(State {
                sessions: HashMap::new(),
                resources: config.resources,
                policy,
                reference: Reference::new(config.measurements),
            }),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one question.
    #[must_use]
    pub fn answer(&self, query: &Query) -> Answer {
        let Some(path) = query.path.strip_prefix(BASE_PATH) else {
            return match query.path.as_str() {
                "/healthz" => Answer::empty(),
                _ => Answer::error("InvalidRequestPath", "not below /kbs/v0"),
            };
        };
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        let result = match (query.method.as_str(), parts.as_slice()) {
            ("POST", ["auth"]) => self.auth(query),
            ("POST", ["attest"]) => self.attest(query),
            ("GET", ["resource-policy" | "reference-value", ..]) | ("POST" | "DELETE", _) => {
                self.administer(query, &parts)
            }
            ("GET", ["resource", ..]) => self.resource(query, &parts),
            ("GET", [_, ..]) => Err(Answer::error("PluginNotFound", format!("plugin {}", parts[0]))),
            _ => Err(Answer::error("InvalidRequestPath", "no such call")),
        };
        result.unwrap_or_else(|refusal| refusal)
    }

    fn auth(&self, query: &Query) -> Result<Answer, Refusal> {
        let request: kbs_types::Request =
            serde_json::from_slice(&query.body).map_err(refuse("SerdeError"))?;
        if request.version != PROTOCOL_VERSION {
            let detail = format!(
                "KBS Client Protocol Version Mismatch: expect ={PROTOCOL_VERSION} while the request is {}",
                request.version
            );
            return Err(Answer::error("AttestationError", detail));
        }
        if !matches!(request.tee, kbs_types::Tee::Sample | kbs_types::Tee::Snp) {
            return Err(Answer::error("AttestationError", format!("{}: not verified here", request.tee)));
        }
        let nonce = to_base64(&jwe::random::<32>().map_err(refuse("AttestationError"))?);
        let id = to_hex(&jwe::random::<16>().map_err(refuse("AttestationError"))?);
        let session =
            Session { tee: request.tee, nonce: nonce.clone(), ends: Instant::now() + SESSION, token: None };
        let mut state = self.state();
        let now = Instant::now();
        state.sessions.retain(|_, s| s.ends > now);
        if state.sessions.len() >= MOST_SESSIONS
            && let Some(oldest) = state.sessions.iter().min_by_key(|(_, s)| s.ends).map(|(id, _)| id.clone())
        {
            state.sessions.remove(&oldest);
        }
        state.sessions.insert(id.clone(), session);
        Ok(Answer::json(&json!({ "nonce": nonce, "extra-params": "" })).with_cookie(&id))
    }

    fn attest(&self, query: &Query) -> Result<Answer, Refusal> {
        let id = query.cookie.clone().ok_or_else(|| Answer::error("InvalidCookie", "no session cookie"))?;
        let (tee, nonce) = {
            let state = self.state();
            let session = state.sessions.get(&id).filter(|s| s.ends > Instant::now());
            let session = session.ok_or_else(|| Answer::error("InvalidCookie", "no such session"))?;
            if let Some(token) = &session.token {
                return Ok(Answer::json(&json!({ "token": token })).with_cookie(&id));
            }
            (session.tee, session.nonce.clone())
        };
        let body: kbs_types::Attestation =
            serde_json::from_slice(&query.body).map_err(refuse("SerdeError"))?;
        if body.runtime_data.nonce != nonce {
            return Err(Answer::error("AttestationError", "the nonce is not this session's"));
        }
        let key = serde_json::to_value(&body.runtime_data.tee_pubkey).map_err(refuse("SerdeError"))?;
        let jwk: PublicJwk = serde_json::from_value(key.clone()).map_err(refuse("SerdeError"))?;
        let claims = self.claims(tee, &nonce, &jwk, &body)?;
        let token = self.token(claims, &nonce, &key, body.init_data.as_ref())?;
        if let Some(session) = self.state().sessions.get_mut(&id) {
            session.token = Some(token.clone());
        }
        Ok(Answer::json(&json!({ "token": token })).with_cookie(&id))
    }

    /// The TEE's claims, under its name, once its evidence holds.
    fn claims(
        &self,
        tee: kbs_types::Tee,
        nonce: &str,
        key: &PublicJwk,
        body: &kbs_types::Attestation,
    ) -> Result<Map<String, Value>, Refusal> {
        let failed = |detail: String| Answer::error("AttestationError", detail);
        let evidence = &body.tee_evidence;
        let digest = primary_report_data(HashAlgorithm::Sha384, nonce, key, &evidence.additional_evidence);
        let mut claims = Map::new();
        match tee {
            kbs_types::Tee::Sample => {
                if evidence.primary_evidence["report_data"] != to_base64(&digest) {
                    return Err(failed("sample evidence: report_data is not expected".into()));
                }
                claims.insert("sample".into(), json!({ "launch_digest": "abcde", "debug": false }));
            }
            kbs_types::Tee::Snp => {
                let trust = self.trust.as_ref().ok_or_else(|| failed("no root for SNP evidence".into()))?;
                let host_data = body
                    .init_data
                    .as_ref()
                    .map(|i| Initdata::parse(i.body.as_bytes()).map(|i| i.bound::<32>()))
                    .transpose()
                    .map_err(|e| failed(e.to_string()))?;
                let expected = Expected { report_data: fit(&digest), host_data };
                let report = verify_snp(&evidence.primary_evidence, trust, &expected)
                    .map_err(|e| failed(e.to_string()))?;
                let checked = self.state().reference.check(&report);
                checked.map_err(|e| failed(format!("SNP evidence: {e}")))?;
                claims.insert(
                    "snp".into(),
                    json!({
                        "measurement": to_hex(&report.measurement()),
                        "chip_id": to_hex(&report.chip_id()),
                        "policy": report.policy(),
                    }),
                );
            }
            other => return Err(failed(format!("{other}: not verified here"))),
        }
        if !evidence.additional_evidence.is_empty() {
            let devices: Map<String, Value> =
                serde_json::from_str(&evidence.additional_evidence).map_err(|e| failed(e.to_string()))?;
            let expected = to_base64(&device_report_data(HashAlgorithm::Sha384, nonce, key));
            for (device, evidence) in devices {
                if device != "sampledevice" || evidence["report_data"] != expected {
                    return Err(failed(format!("device {device}: evidence not accepted")));
                }
            }
        }
        claims.insert("report_data".into(), to_hex(&digest).into());
        Ok(claims)
    }

    fn token(
        &self,
        mut claims: Map<String, Value>,
        nonce: &str,
        key: &Value,
        init_data: Option<&kbs_types::InitData>,
    ) -> Result<String, Refusal> {
        if let Some(init_data) = init_data {
            if init_data.format != "toml" {
                let detail = format!("init-data format {:?}: only toml", init_data.format);
                return Err(Answer::error("AttestationError", detail));
            }
            let initdata = Initdata::parse(init_data.body.as_bytes()).map_err(refuse("AttestationError"))?;
            claims.insert("init_data".into(), to_hex(&initdata.digest()).into());
            let entries = initdata.names().map(|n| (n.to_owned(), json!(initdata.entry(n)))).collect();
            claims.insert("init_data_claims".into(), Value::Object(entries));
        }
        claims.insert("runtime_data_claims".into(), json!({ "nonce": nonce, "tee-pubkey": key }));
        let now = seconds();
        let status = if claims.contains_key("snp") { "affirming" } else { "contraindicated" };
        let payload = json!({
            "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
            "iss": "coffer-kbs",
            "iat": now,
            "nbf": now,
            "exp": now + TOKEN,
            "submods": { "cpu0": { "ear.status": status, EVIDENCE: claims } },
        });
        let mut public = json!(TeeKey::P256(self.key.clone()).public());
        // A key of ours is for encryption by itself; readers take `alg` at its word.
        public["alg"] = "ES256".into();
        let header = json!({ "alg": "ES256", "typ": "JWT", "jwk": public });
        let header = header.as_object().cloned().unwrap_or_default();
        Ok(jws::sign(&self.key, &header, payload.to_string().as_bytes()))
    }

    fn resource(&self, query: &Query, parts: &[&str]) -> Result<Answer, Refusal> {
        let token = match (&query.cookie, &query.bearer) {
            (Some(id), _) => {
                let state = self.state();
                let session = state.sessions.get(id).filter(|s| s.ends > Instant::now());
                session.and_then(|s| s.token.clone())
            }
            (None, bearer) => bearer.clone(),
        };
        let token = token.ok_or_else(|| Answer::error("TokenNotFound", "not attested"))?;
        let public = TeeKey::P256(self.key.clone()).public();
        let payload = Unverified::parse(&token)
            .and_then(|t| t.verify(&public))
            .map_err(refuse("TokenVerifierError"))?;
        let claims: Value = serde_json::from_slice(&payload).map_err(refuse("TokenVerifierError"))?;
        if claims["exp"].as_u64().is_none_or(|exp| exp < seconds()) {
            return Err(Answer::error("TokenVerifierError", "the token has expired"));
        }
        let state = self.state();
        if !state.policy.allows(&claims, parts).map_err(refuse("PolicyEngineError"))? {
            return Err(Answer::error("PolicyDeny", "the resource policy denies it"));
        }
        let key = claims.pointer(&format!("/submods/cpu0/{EVIDENCE}/runtime_data_claims/tee-pubkey"));
        let key: PublicJwk =
            serde_json::from_value(key.cloned().unwrap_or_default()).map_err(refuse("TokenVerifierError"))?;
        let content = state.resources.get(&parts[1..].join("/"));
        let content = content.ok_or_else(|| Answer::error("PluginInternalError", "resource not found"))?;
        let message = jwe::encrypt(&key, content).map_err(refuse("JweError"))?;
        Ok(Answer::json(&serde_json::to_value(message).map_err(refuse("JweError"))?))
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
