//! The client as a state machine: it says what to send, and is told what came.
//!
//! Owns: the order of the handshake, retries and their limits, what of an answer is believed. Does no I/O and reads no
//! clock, so that a test can be any server, and any host between.

use std::time::Duration;

use serde_json::{Map, Value};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    BASE_PATH, COOKIE, PROTOCOL_VERSION, ResourceUri,
    http::{Request, Response},
    message::{AttestBody, AuthBody, Challenge, ErrorBody, InitDataBody, RuntimeDataBody, TokenBody},
};
use crate::{
    encoding::from_base64url,
    evidence::Composite,
    hash::HashAlgorithm,
    jwe::{Jwe, JweError, decrypt},
    jws::LONGEST as LONGEST_TOKEN,
    key::{KeyAlgorithm, KeyError, TeeKey},
};

/// Attempts at one request of the caller's that may fail, as upstream's client. A token does not begin them anew: a host that cuts off only what
/// comes after it would be asked for ever.
const MOST_HANDSHAKES: u32 = 5;
/// Handshakes that a refused resource may lead to.
const MOST_ATTESTATIONS: u32 = 3;
/// Between a failed handshake and the next.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest nonce, in characters: SE's is a JSON text of some kilobytes.
const LONGEST_NONCE: usize = 64 * 1024;

/// How a resource is asked for once attested.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Credential {
    /// The session's cookie.
    #[default]
    Cookie,
    /// `Authorization: Bearer` with the token.
    Bearer,
}

/// Why nothing came of it. Messages name the stage and never a secret.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ClientError {
    /// The two sides speak different versions.
    #[error(
        "KBS: it does not speak protocol version {PROTOCOL_VERSION}, the only one that this guest speaks: {0}"
    )]
    Version(String),
    /// Nothing comes through.
    #[error("KBS: {stage}: {message}")]
    Transport {
        /// What was under way.
        stage: &'static str,
        /// Why not.
        message: String,
    },
    /// An answer that the protocol does not have.
    #[error("KBS: {stage}: answer not understood: {message}")]
    Answer {
        /// What was under way.
        stage: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The KBS says no.
    #[error("KBS: {stage} refused: {reason}")]
    Refused {
        /// What was under way.
        stage: &'static str,
        /// In the KBS's words.
        reason: String,
    },
    /// No such path or plugin.
    #[error("KBS: {uri}: not found: {reason}")]
    NotFound {
        /// Resource.
        uri: String,
        /// In the KBS's words.
        reason: String,
    },
    /// The resource came, but not for us, or changed.
    #[error("KBS: {uri}: {source}")]
    Decrypt {
        /// Resource.
        uri: String,
        /// Why.
        source: JweError,
    },
    /// This guest cannot attest.
    #[error("KBS: {0}")]
    Evidence(String),
    /// No TEE key.
    #[error("KBS: {0}")]
    Key(String),
}

impl From<KeyError> for ClientError {
    fn from(error: KeyError) -> Self {
        Self::Key(error.to_string())
    }
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Send this and give the answer to [`Client::received`], or the failure to [`Client::failed`].
    Send(Request),
    /// Make evidence over this nonce and [`Client::key`], by this algorithm, and give it to [`Client::measured`].
    Measure(String, HashAlgorithm),
    /// Do nothing for this long, then ask again.
    Wait(Duration),
    /// The end. Nothing more happens until another [`Client::fetch`] or [`Client::attest`].
    Finished(Result<Outcome, ClientError>),
}

/// What a finished client has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The resource's bytes.
    Resource(Zeroizing<Vec<u8>>),
    /// The token.
    Token(String),
}

enum State {
    Idle,
    SendAuth,
    Challenge,
    Evidence(String, HashAlgorithm),
    SendAttest(Vec<u8>),
    Token,
    SendResource,
    Resource,
    Pause,
    Finished(Result<Outcome, ClientError>),
}

/// A client: one TEE key, one session at a time.
pub struct Client {
    tee: &'static str,
    key: TeeKey,
    init_data: Option<String>,
    credential: Credential,
    cookie: Option<String>,
    token: Option<String>,
    goal: Option<ResourceUri>,
    failures: u32,
    attestations: u32,
    state: State,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("tee", &self.tee).field("goal", &self.goal).finish_non_exhaustive()
    }
}

impl Client {
    /// A client that has not attested. `init_data` is the raw text.
    ///
    /// # Errors
    /// [`ClientError::Key`].
    pub fn new(
        tee: &'static str,
        algorithm: KeyAlgorithm,
        init_data: Option<String>,
        credential: Credential,
    ) -> Result<Self, ClientError> {
        let key = TeeKey::generate(algorithm)?;
        Ok(Self {
            tee,
            key,
            init_data,
            credential,
            cookie: None,
            token: None,
            goal: None,
            failures: 0,
            attestations: 0,
            state: State::Idle,
        })
    }

    /// The TEE key.
    #[must_use]
    pub fn key(&self) -> &TeeKey {
        &self.key
    }

    /// Wants a resource. Attests first unless there is a session.
    pub fn fetch(&mut self, uri: ResourceUri) {
        self.goal = Some(uri);
        self.begin(self.has_session());
    }

    /// Wants a token, of a new handshake.
    pub fn attest(&mut self) {
        self.goal = None;
        self.begin(false);
    }

    fn begin(&mut self, attested: bool) {
        self.failures = 0;
        self.attestations = 0;
        self.state = if attested { State::SendResource } else { State::SendAuth };
    }

    fn has_session(&self) -> bool {
        match self.credential {
            Credential::Cookie => self.cookie.is_some() && self.token.is_some(),
            Credential::Bearer => self.token.is_some(),
        }
    }

    /// What to do next.
    pub fn step(&mut self) -> Step {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::SendAuth => {
                self.cookie = None;
                self.token = None;
                self.state = State::Challenge;
                Step::Send(post("/auth", to_json(&AuthBody::new(self.tee))))
            }
            State::Evidence(nonce, algorithm) => {
                self.state = State::Evidence(nonce.clone(), algorithm);
                Step::Measure(nonce, algorithm)
            }
            State::SendAttest(body) => {
                self.state = State::Token;
                Step::Send(self.with_cookie(post("/attest", body)))
            }
            State::SendResource => {
                let path = self.goal.as_ref().map(ResourceUri::server_path).unwrap_or_default();
                let request = Request::get(format!("{BASE_PATH}{path}"));
                self.state = State::Resource;
                Step::Send(match (self.credential, &self.token) {
                    (Credential::Bearer, Some(token)) => {
                        request.with_header("Authorization", format!("Bearer {token}"))
                    }
                    _ => self.with_cookie(request),
                })
            }
            State::Pause => {
                self.state = State::SendAuth;
                Step::Wait(PAUSE)
            }
            State::Finished(result) => Step::Finished(result),
            // An answer is awaited that the driver did not give: the machine does not guess.
            State::Idle | State::Challenge | State::Token | State::Resource => {
                Step::Finished(Err(ClientError::Transport {
                    stage: "wait for an answer",
                    message: "the driver gave none".into(),
                }))
            }
        }
    }

    fn with_cookie(&self, request: Request) -> Request {
        match &self.cookie {
            Some(cookie) => request.with_header("Cookie", format!("{COOKIE}={cookie}")),
            None => request,
        }
    }

    /// An answer came.
    pub fn received(&mut self, response: &Response) {
        let result = match std::mem::replace(&mut self.state, State::Idle) {
            State::Challenge => self.challenge(response),
            State::Token => self.take_token(response),
            State::Resource => self.resource(response),
            // Not asked for: not looked at.
            other => {
                self.state = other;
                return;
            }
        };
        self.state = match result {
            Ok(state) => state,
            Err((error, true)) => self.again(error),
            Err((error, false)) => State::Finished(Err(error)),
        };
    }

    /// Nothing came: the connection failed or ended.
    pub fn failed(&mut self, message: &str) {
        let stage = match &self.state {
            State::Challenge => "challenge",
            State::Token => "attestation",
            State::Resource => "resource",
            _ => return,
        };
        let error = ClientError::Transport { stage, message: message.to_owned() };
        self.state = self.again(error);
    }

    /// Evidence was made, or not.
    pub fn measured(&mut self, evidence: Result<Composite, String>) {
        let State::Evidence(nonce, _) = std::mem::replace(&mut self.state, State::Idle) else { return };
        self.state = match evidence {
            Ok(composite) => State::SendAttest(to_json(&AttestBody {
                init_data: self.init_data.as_deref().map(|body| InitDataBody { format: "toml", body }),
                runtime_data: RuntimeDataBody { nonce: &nonce, tee_pubkey: &self.key.public() },
                tee_evidence: &composite,
            })),
            Err(message) => State::Finished(Err(ClientError::Evidence(message))),
        };
    }

    /// Another handshake, or the end.
    fn again(&mut self, error: ClientError) -> State {
        self.failures += 1;
        if self.failures < MOST_HANDSHAKES { State::Pause } else { State::Finished(Err(error)) }
    }

    /// The second half of an error says whether another handshake can help.
    fn challenge(&mut self, response: &Response) -> Result<State, (ClientError, bool)> {
        const STAGE: &str = "challenge";
        if response.status != 200 {
            let reason = ErrorBody::line(&response.body);
            if reason.contains("Protocol Version Mismatch") {
                return Err((ClientError::Version(reason), false));
            }
            return Err((ClientError::Refused { stage: STAGE, reason }, true));
        }
        let wrong = |message: String| (ClientError::Answer { stage: STAGE, message }, true);
        let challenge: Challenge =
            serde_json::from_slice(&response.body).map_err(|e| wrong(e.to_string()))?;
        if challenge.nonce.is_empty() || challenge.nonce.len() > LONGEST_NONCE {
            return Err(wrong(format!("a nonce of {} characters", challenge.nonce.len())));
        }
        let algorithm = match challenge.extra_params.get("selected-hash-algorithm").and_then(Value::as_str) {
            Some(name) => HashAlgorithm::from_name(name).map_err(|e| wrong(e.to_string()))?,
            // A KBS that does not say means this one.
            None => HashAlgorithm::Sha384,
        };
        self.cookie = Some(session_cookie(response).ok_or_else(|| wrong("no session cookie".into()))?);
        Ok(State::Evidence(challenge.nonce, algorithm))
    }

    fn take_token(&mut self, response: &Response) -> Result<State, (ClientError, bool)> {
        const STAGE: &str = "attestation";
        if response.status != 200 {
            let reason = ErrorBody::line(&response.body);
            return Err((ClientError::Refused { stage: STAGE, reason }, true));
        }
        let wrong = |message: String| (ClientError::Answer { stage: STAGE, message }, true);
        let body: TokenBody = serde_json::from_slice(&response.body).map_err(|e| wrong(e.to_string()))?;
        check_form(&body.token).map_err(|what| wrong(format!("the token is not one: {what}")))?;
        self.token = Some(body.token.clone());
        Ok(match self.goal {
            Some(_) => State::SendResource,
            None => State::Finished(Ok(Outcome::Token(body.token))),
        })
    }

    fn resource(&mut self, response: &Response) -> Result<State, (ClientError, bool)> {
        const STAGE: &str = "resource";
        let uri = self.goal.as_ref().map(ToString::to_string).unwrap_or_default();
        match response.status {
            200 => {}
            404 => {
                let reason = ErrorBody::line(&response.body);
                return Err((ClientError::NotFound { uri, reason }, false));
            }
            401 if self.attestations < MOST_ATTESTATIONS => {
                self.attestations += 1;
                return Ok(State::SendAuth);
            }
            _ => {
                let reason = format!("{uri}: {}", ErrorBody::line(&response.body));
                return Err((ClientError::Refused { stage: STAGE, reason }, false));
            }
        }
        let message: Jwe = serde_json::from_slice(&response.body)
            .map_err(|e| (ClientError::Answer { stage: STAGE, message: format!("{uri}: {e}") }, false))?;
        let secret =
            decrypt(&self.key, &message).map_err(|source| (ClientError::Decrypt { uri, source }, false))?;
        Ok(State::Finished(Ok(Outcome::Resource(secret))))
    }
}

fn post(path: &str, body: Vec<u8>) -> Request {
    Request::post(format!("{BASE_PATH}{path}"), body)
}

fn to_json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data always serialises")
}

/// The token goes back to the KBS and to the workload, who check it; here it only has to be one, signed by whatever algorithm.
fn check_form(token: &str) -> Result<(), String> {
    if token.len() > LONGEST_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("too long, or not of printable characters".into());
    }
    let mut parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("want three parts".into());
    };
    let claims = from_base64url(claims).map_err(|e| format!("claims: {e}"))?;
    serde_json::from_slice::<Map<String, Value>>(&claims).map(drop).map_err(|e| format!("claims: {e}"))
}

/// The session's id out of `Set-Cookie`; only what can stand in a header again.
fn session_cookie(response: &Response) -> Option<String> {
    response.headers("set-cookie").find_map(|line| {
        let (name, value) = line.split(';').next()?.trim().split_once('=')?;
        let fits = !value.is_empty()
            && value.len() <= 256
            && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~+/=".contains(&b));
        (name == COOKIE && fits).then(|| value.to_owned())
    })
}

#[cfg(test)]
mod tests;
