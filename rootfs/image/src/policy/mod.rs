//! Who may vouch for an image: containers-policy.json(5), as far as a pod needs it.
//!
//! Owns: the file, the choice of the most specific scope, and the verdict. Does not own: the requirements' JSON (`requirement`), the
//! name that a signature must bear (`identity`), where signatures lie ([`sigstore`], [`simple`]).

mod identity;
mod name;
mod requirement;
pub mod sigstore;
pub mod simple;

use std::{
    collections::BTreeMap,
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use thiserror::Error;

pub use self::name::{Name, NameError};
use self::{
    identity::Identity,
    requirement::{Key, Requirement},
    sigstore::{PublicKey, SignatureError},
};
use crate::{digest::Digest, openpgp::Ring};

/// Largest policy in bytes.
pub const MOST_POLICY: usize = 1 << 20;
/// Signatures whose faults a refusal names.
const MOST_WHYS: usize = 4;

/// The policy cannot be read, or the image is refused by it.
#[derive(Debug, Error)]
pub enum PolicyError {
    /// Not a policy of known requirements.
    #[error("policy: {0}")]
    Json(#[from] serde_json::Error),
    /// Over [`MOST_POLICY`].
    #[error("policy: {0} bytes, more than {MOST_POLICY}")]
    TooLong(usize),
    /// A key.
    #[error("policy: key of the rule for {0}: {1}")]
    Key(String, String),
    /// A requirement that cannot be checked.
    #[error("policy: {image}: the rule for {rule}: {why}")]
    Unchecked {
        /// The image.
        image: String,
        /// The scope of the rule.
        rule: String,
        /// And what to write in its place.
        why: &'static str,
    },
    /// A name by digest, of another image.
    #[error("policy: {name} names another image than {digest}")]
    Misnamed {
        /// What it was called.
        name: String,
        /// What it is.
        digest: String,
    },
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

/// What a policy that lets an image run says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A signature vouches for its manifest.
    Signed,
    /// Nobody does: `insecureAcceptAnything`.
    Accepted,
}

type Scopes = BTreeMap<String, Vec<Requirement>>;

/// A policy.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    #[serde(deserialize_with = "requirements")]
    default: Vec<Requirement>,
    #[serde(default, deserialize_with = "transports")]
    transports: BTreeMap<String, Scopes>,
}

/// Requirements of one scope. The format asks for one at least: an empty list must not mean yes.
struct Requirements(Vec<Requirement>);

impl<'de> Deserialize<'de> for Requirements {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        requirements(d).map(Self)
    }
}

fn requirements<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Requirement>, D::Error> {
    let list = Vec::<Requirement>::deserialize(d)?;
    if list.is_empty() {
        Err(D::Error::custom("an empty list of requirements: write reject"))
    } else {
        Ok(list)
    }
}

fn transports<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, Scopes>, D::Error> {
    let Once(all) = Once::<Once<Requirements>>::deserialize(d)?;
    let scopes = |Once(scopes): Once<Requirements>| scopes.into_iter().map(|(k, v)| (k, v.0)).collect();
    Ok(all.into_iter().map(|(transport, of)| (transport, scopes(of))).collect())
}

/// A map in which no key comes twice: readers differ in which one they take.
struct Once<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Once<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Once<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once<T>, A::Error> {
                let mut all = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if all.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("{key:?} comes twice")));
                    }
                    let value = map.next_value()?;
                    all.insert(key, value);
                }
                Ok(Once(all))
            }
        }
        d.deserialize_map(Entries(std::marker::PhantomData))
    }
}

/// Reads keys that a policy names by path: `kbs:///…` or a file.
pub type ReadKey<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// What an image is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Transport `docker`: by its name in a registry.
    Registry(Name),
    /// Transport `oci`: by its layout's directory. Empty where nobody knows it, as in a pod: then only the transport's `""` fits.
    Layout(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(name) => write!(f, "{name}"),
            Self::Layout(path) if path.is_empty() => f.write_str("an image without a name"),
            Self::Layout(path) => f.write_str(path),
        }
    }
}

impl Origin {
    fn scopes(&self) -> (&'static str, Vec<String>) {
        match self {
            Self::Registry(name) => ("docker", name.scopes()),
            Self::Layout(path) => ("oci", name::directory_scopes(path)),
        }
    }
}

/// An image that is about to run.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Which rule it falls under, and what its signature must name.
    pub origin: &'a Origin,
    /// The digests that name it: of the manifest, and of the index that it came from.
    pub digests: &'a [Digest],
}

/// What lies beside an image. All of it is the host's word.
#[derive(Clone, Debug, Default)]
pub struct Signatures {
    /// cosign's and skopeo's, among the blobs.
    pub sigstore: Vec<sigstore::Signature>,
    /// OpenPGP's.
    pub simple: Vec<simple::Signature>,
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// [`PolicyError::Json`], [`PolicyError::TooLong`].
    pub fn parse(bytes: &[u8]) -> Result<Self, PolicyError> {
        if bytes.len() > MOST_POLICY {
            return Err(PolicyError::TooLong(bytes.len()));
        }
        Ok(serde_json::from_slice(bytes)?)
    }

    /// Whether the image may run: every requirement of the most specific scope must hold.
    ///
    /// # Errors
    /// [`PolicyError`], naming the rule.
    pub fn check(
        &self,
        subject: &Subject<'_>,
        signatures: &Signatures,
        read_key: ReadKey<'_>,
    ) -> Result<Verdict, PolicyError> {
        // A name by digest is held to fewer words of a signature, so it has to be true.
        if let Origin::Registry(name) = subject.origin
            && name.digest().is_some_and(|digest| !subject.digests.contains(digest))
        {
            let digest = subject.digests.first().map(ToString::to_string).unwrap_or_default();
            return Err(PolicyError::Misnamed { name: name.to_string(), digest });
        }
        let (rule, requirements) = self.scope(subject.origin);
        let image = subject.origin.to_string();
        let mut verdict = Verdict::Accepted;
        for requirement in requirements {
            match requirement {
                Requirement::Accept => continue,
                Requirement::Reject => return Err(PolicyError::Rejected(image, rule)),
                Requirement::Unchecked(why) => return Err(PolicyError::Unchecked { image, rule, why }),
                Requirement::Signed { keys, identity } => {
                    let keys = read(keys, read_key, |bytes| {
                        PublicKey::from_pem_bytes(bytes).map_err(|e| e.to_string())
                    });
                    let keys: Vec<PublicKey> = keys.map_err(|why| PolicyError::Key(rule.clone(), why))?;
                    let said = signatures.sigstore.iter().map(|one| one.check(&keys, subject.digests));
                    let none = "there is none beside it: sign with cosign or `coffer image sign`";
                    signed(subject, said, identity, none)
                }
                Requirement::SignedBy { keys, identity } => {
                    let rings = read(keys, read_key, |bytes| Ring::parse(bytes).map_err(|e| e.to_string()));
                    let rings: Vec<Ring> = rings.map_err(|why| PolicyError::Key(rule.clone(), why))?;
                    let now = now();
                    let said = signatures.simple.iter().map(|one| one.check(&rings, subject.digests, now));
                    let none = "there is none beside it: sign with skopeo copy --sign-by, and put signature-1 and so on into \
                                signatures/sha256=… of the layout";
                    signed(subject, said, identity, none)
                }
            }
            .map_err(|why| PolicyError::Unsigned { image: image.clone(), rule: rule.clone(), why })?;
            verdict = Verdict::Signed;
        }
        Ok(verdict)
    }

    /// The most specific scope: the name, then what it lies in, then the transport's `""`, then the default.
    fn scope(&self, origin: &Origin) -> (String, &[Requirement]) {
        let (transport, names) = origin.scopes();
        if let Some(scopes) = self.transports.get(transport) {
            for name in names {
                if let Some(requirements) = scopes.get(&name) {
                    return (format!("{transport}:{name}"), requirements);
                }
            }
            if let Some(requirements) = scopes.get("") {
                return (format!("every image of {transport}"), requirements);
            }
        }
        ("default".into(), &self.default)
    }
}

fn read<K: Clone>(
    keys: &[Key<K>],
    read_key: ReadKey<'_>,
    parse: impl Fn(&[u8]) -> Result<K, String>,
) -> Result<Vec<K>, String> {
    let one = |key: &Key<K>| match key {
        Key::Read(key) => Ok(key.clone()),
        Key::Path(path) => parse(&read_key(path)?).map_err(|e| format!("{path}: {e}")),
    };
    keys.iter().map(one).collect()
}

/// Seconds since 1970. A clock before that makes every key one of the future.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Whether one of the signatures, each of which held for a name or did not, is for a fitting one.
fn signed(
    subject: &Subject<'_>,
    signatures: impl Iterator<Item = Result<String, SignatureError>>,
    identity: &Identity,
    none: &str,
) -> Result<(), String> {
    let name = match subject.origin {
        Origin::Registry(name) => Some(name),
        Origin::Layout(_) => None,
    };
    let mut whys = Vec::new();
    for signature in signatures {
        match signature.map_err(|why| why.to_string()).and_then(|signed| identity.fits(name, &signed)) {
            Ok(()) => return Ok(()),
            Err(why) => whys.push(why),
        }
    }
    Err(match whys.len() {
        0 => none.into(),
        n if n > MOST_WHYS => format!("{}; and {} more", whys[..MOST_WHYS].join("; "), n - MOST_WHYS),
        _ => whys.join("; "),
    })
}

#[cfg(test)]
mod tests;
