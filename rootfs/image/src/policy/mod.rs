//! Who may vouch for an image: containers-policy.json(5), as far as a pod needs it.
//!
//! Owns: `reject`, `insecureAcceptAnything` and `sigstoreSigned` with a public key, by transport and scope. What the
//! file says and this does not know (`signedBy`, Fulcio, Rekor) is refused, never passed over. Does not own: where
//! signatures lie ([`sigstore`]).

pub mod sigstore;

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use thiserror::Error;

use self::sigstore::{PublicKey, Signature};
use crate::digest::Digest;

/// The policy cannot be read, or the image is refused by it.
#[derive(Debug, Error)]
pub enum PolicyError {
    /// Not a policy of known requirements.
    #[error("policy: {0}")]
    Json(#[from] serde_json::Error),
    /// A key.
    #[error("policy: key of {0}: {1}")]
    Key(String, String),
    /// `reject`.
    #[error("policy: {0} is rejected by the rule for {1}")]
    Rejected(String, String),
    /// No signature satisfies it.
    #[error("policy: no signature of {image} satisfies the rule for {rule}: {why}")]
    Unsigned {
        /// The image.
        image: String,
        /// The scope of the rule.
        rule: String,
        /// Of each signature.
        why: String,
    },
}

/// A policy.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    default: Vec<Requirement>,
    #[serde(default)]
    transports: BTreeMap<String, BTreeMap<String, Vec<Requirement>>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
enum Requirement {
    // Braces: serde lets a variant without them have any members.
    InsecureAcceptAnything {},
    Reject {},
    #[serde(rename_all = "camelCase")]
    SigstoreSigned {
        key_path: Option<String>,
        key_data: Option<String>,
        #[serde(default)]
        signed_identity: Identity,
    },
}

/// Which reference a signature must name.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
enum Identity {
    /// The tag must agree; an image named by digest alone matches its repository.
    #[default]
    MatchRepoDigestOrExact,
    MatchExact {},
    MatchRepository {},
    #[serde(rename_all = "camelCase")]
    ExactReference {
        docker_reference: String,
    },
    #[serde(rename_all = "camelCase")]
    ExactRepository {
        docker_repository: String,
    },
}

/// Reads keys that a policy names by path: `kbs:///…` or a file.
pub type ReadKey<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// An image that is about to run.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// `docker` for a registry's, `oci` for a layout's.
    pub transport: &'a str,
    /// Its reference as its owner names it: `registry/repository[:tag]`, or a layout's path.
    pub reference: &'a str,
    /// The digests that name it: of the manifest, and of the index that it came from.
    pub digests: &'a [Digest],
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// [`PolicyError::Json`].
    pub fn parse(bytes: &[u8]) -> Result<Self, PolicyError> {
        Ok(serde_json::from_slice(bytes)?)
    }

    /// Whether the image may run: every requirement of the most specific scope must hold.
    ///
    /// # Errors
    /// [`PolicyError`], naming the rule.
    pub fn check(
        &self,
        subject: &Subject<'_>,
        signatures: &[Signature],
        read_key: ReadKey<'_>,
    ) -> Result<(), PolicyError> {
        let (rule, requirements) = self.scope(subject);
        let image = subject.reference.to_owned();
        // The file format asks for one requirement at least; an empty list must not mean yes.
        if requirements.is_empty() {
            return Err(PolicyError::Rejected(image, format!("{rule} (empty)")));
        }
        for requirement in requirements {
            match requirement {
                Requirement::InsecureAcceptAnything {} => {}
                Requirement::Reject {} => return Err(PolicyError::Rejected(image, rule)),
                Requirement::SigstoreSigned { key_path, key_data, signed_identity } => {
                    let key = key(&rule, key_path.as_deref(), key_data.as_deref(), read_key)?;
                    let mut whys = Vec::new();
                    let mut held = false;
                    for signature in signatures {
                        match signature.check(&key, subject.digests) {
                            Ok(name) if signed_identity.fits(subject.reference, &name) => held = true,
                            Ok(name) => whys.push(format!("it is for {name:?}")),
                            Err(why) => whys.push(why.to_string()),
                        }
                    }
                    if !held {
                        let why = if whys.is_empty() { "there is none".into() } else { whys.join("; ") };
                        return Err(PolicyError::Unsigned { image, rule, why });
                    }
                }
            }
        }
        Ok(())
    }

    /// The most specific scope: the whole reference, then without tag, then ever shorter paths, then the transport's
    /// `""`, then the default.
    fn scope(&self, subject: &Subject<'_>) -> (String, &[Requirement]) {
        if let Some(scopes) = self.transports.get(subject.transport) {
            let mut name = subject.reference;
            loop {
                if let Some(requirements) = scopes.get(name) {
                    let shown = if name.is_empty() { "every image" } else { name };
                    return (format!("{}:{shown}", subject.transport), requirements);
                }
                let shorter = repository(name);
                name = if shorter.len() < name.len() {
                    shorter
                } else {
                    match name.rsplit_once('/') {
                        Some((shorter, _)) => shorter,
                        None if name.is_empty() => break,
                        None => "",
                    }
                };
            }
        }
        ("default".into(), &self.default)
    }
}

fn key(
    rule: &str,
    path: Option<&str>,
    data: Option<&str>,
    read_key: ReadKey<'_>,
) -> Result<PublicKey, PolicyError> {
    let wrong = |why: String| PolicyError::Key(rule.to_owned(), why);
    let pem = match (path, data) {
        (Some(path), None) => read_key(path).map_err(wrong)?,
        (None, Some(data)) => STANDARD.decode(data).map_err(|e| wrong(format!("keyData: {e}")))?,
        _ => return Err(wrong("want either keyPath or keyData".into())),
    };
    let text = std::str::from_utf8(&pem).map_err(|_| wrong("not PEM".into()))?;
    PublicKey::from_pem(text).map_err(|e| wrong(e.to_string()))
}

/// A reference without its tag.
fn repository(reference: &str) -> &str {
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => reference,
    }
}

impl Identity {
    fn fits(&self, wanted: &str, signed: &str) -> bool {
        match self {
            Self::MatchRepoDigestOrExact if repository(wanted) == wanted => repository(signed) == wanted,
            Self::MatchRepoDigestOrExact | Self::MatchExact {} => signed == wanted,
            Self::MatchRepository {} => repository(signed) == repository(wanted),
            Self::ExactReference { docker_reference } => signed == docker_reference,
            Self::ExactRepository { docker_repository } => repository(signed) == docker_repository,
        }
    }
}

#[cfg(test)]
mod tests;
