//! `signedIdentity`: which name a signature must bear for an image of a given name.
//!
//! Owns: the six kinds of containers-policy.json(5), decided as containers/image does (signature/policy_reference_match.go). Does not
//! own: whether the signature holds.

use serde::Deserialize;

use super::name::Name;

/// Which name a signature must bear.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
pub(super) enum Identity {
    // Braces: serde lets a variant without them have any members.
    /// The image's, to the tag; an image that is named by digest alone matches its repository.
    MatchRepoDigestOrExact {},
    /// The image's, to the tag.
    MatchExact {},
    /// Any of the image's repository.
    MatchRepository {},
    /// This one, whatever the image is called.
    #[serde(rename_all = "camelCase")]
    ExactReference { docker_reference: String },
    /// Any of this repository.
    #[serde(rename_all = "camelCase")]
    ExactRepository { docker_repository: String },
    /// As `matchRepoDigestOrExact`, for a mirror: `prefix` of the image's name stands for `signedPrefix`.
    #[serde(rename = "remapIdentity", rename_all = "camelCase")]
    Remap { prefix: String, signed_prefix: String },
}

impl Default for Identity {
    fn default() -> Self {
        Self::MatchRepoDigestOrExact {}
    }
}

impl Identity {
    /// Whether its own names are some.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(&self) -> Result<(), String> {
        let name = |field: &str, text: &str| {
            text.parse::<Name>().map_err(|e| format!("signedIdentity: {field}: {e}"))
        };
        match self {
            Self::ExactReference { docker_reference: text } if name("dockerReference", text)?.is_bare() => {
                return Err(format!(
                    "signedIdentity: dockerReference {text:?} has neither tag nor digest: write exactRepository"
                ));
            }
            Self::ExactRepository { docker_repository: text }
                if !name("dockerRepository", text)?.is_bare() =>
            {
                return Err(format!(
                    "signedIdentity: dockerRepository {text:?} has a tag or digest: write exactReference"
                ));
            }
            Self::Remap { prefix, signed_prefix } => {
                for (field, text) in [("prefix", prefix), ("signedPrefix", signed_prefix)] {
                    if !is_prefix(text) {
                        return Err(format!(
                            "signedIdentity: {field} {text:?} is neither a registry nor a repository in full"
                        ));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether an image of this name may run by a signature for `signed`. An image without a registry's name (a layout) fits
    /// only where the rule itself gives one.
    ///
    /// # Errors
    /// Why not, in words.
    pub(super) fn fits(&self, image: Option<&Name>, signed: &str) -> Result<(), String> {
        let signed: Name = signed.parse().map_err(|e| format!("it is for {e}"))?;
        let named = || {
            image.ok_or("the image has no registry's name: give it one (annotation io.coffer.image.name, option --name)")
        };
        let fits = match self {
            Self::MatchRepoDigestOrExact {} => exact_or_digest(named()?, &signed),
            Self::MatchExact {} => {
                let image = named()?;
                !image.is_bare() && *image == signed
            }
            Self::MatchRepository {} => named()?.repository() == signed.repository(),
            Self::ExactReference { docker_reference } => {
                !signed.is_bare() && docker_reference.parse().is_ok_and(|wanted: Name| wanted == signed)
            }
            Self::ExactRepository { docker_repository } => {
                docker_repository.parse().is_ok_and(|wanted: Name| wanted.repository() == signed.repository())
            }
            Self::Remap { prefix, signed_prefix } => {
                exact_or_digest(&remap(named()?, prefix, signed_prefix), &signed)
            }
        };
        match fits {
            true => Ok(()),
            // What cosign writes unless told otherwise.
            false if signed.is_bare() && self.wants_tag() => Err(format!(
                "it is for {signed} without a tag: let signedIdentity be matchRepository, or sign with \
                 --sign-container-identity"
            )),
            false => Err(format!("it is for {signed}")),
        }
    }

    fn wants_tag(&self) -> bool {
        !matches!(self, Self::MatchRepository {} | Self::ExactRepository { .. })
    }
}

fn exact_or_digest(image: &Name, signed: &Name) -> bool {
    if signed.is_bare() {
        return false;
    }
    if image.is_tagged() { image == signed } else { image.repository() == signed.repository() }
}

fn remap(image: &Name, prefix: &str, signed_prefix: &str) -> Name {
    match image.repository().strip_prefix(prefix) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            image.moved(&format!("{signed_prefix}{rest}"))
        }
        _ => image.clone(),
    }
}

/// A registry, or a repository in its normal form.
fn is_prefix(text: &str) -> bool {
    let registry = !text.contains('/')
        && format!("{text}/a").parse::<Name>().is_ok_and(|n| n.repository().starts_with(text));
    let repository = text.contains('/') && text.parse::<Name>().is_ok_and(|n| n.to_string() == text);
    registry || repository
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn identity(text: &str) -> Identity {
        serde_json::from_str(text).unwrap()
    }

    /// The tables of containers/image's policy_reference_match_test.go, in short.
    #[test]
    fn kinds() {
        let digest = Digest::sha256(b"");
        let by_digest = format!("r.io/a@{digest}");
        let both = format!("r.io/a:1@{digest}");
        for (kind, image, signed, fits) in [
            (r#"{"type":"matchExact"}"#, "r.io/a:1", "r.io/a:1", true),
            (r#"{"type":"matchExact"}"#, "r.io/a:1", "r.io/a:2", false),
            (r#"{"type":"matchExact"}"#, "r.io/a:1", "r.io/a", false),
            (r#"{"type":"matchExact"}"#, &by_digest, "r.io/a:1", false),
            (r#"{"type":"matchRepoDigestOrExact"}"#, "r.io/a:1", "r.io/a:1", true),
            (r#"{"type":"matchRepoDigestOrExact"}"#, &by_digest, "r.io/a:1", true),
            (r#"{"type":"matchRepoDigestOrExact"}"#, &by_digest, "r.io/b:1", false),
            // containers/image wants a tag of the signature even where it compares repositories only.
            (r#"{"type":"matchRepoDigestOrExact"}"#, &by_digest, "r.io/a", false),
            (r#"{"type":"matchRepoDigestOrExact"}"#, &both, "r.io/a:1", false),
            (r#"{"type":"matchRepository"}"#, "r.io/a:1", "r.io/a", true),
            (r#"{"type":"matchRepository"}"#, "busybox:1", "docker.io/library/busybox", true),
            (r#"{"type":"matchRepository"}"#, "r.io/a:1", "r.io/ab", false),
            (r#"{"type":"exactReference","dockerReference":"r.io/b:1"}"#, "r.io/a:1", "r.io/b:1", true),
            (r#"{"type":"exactReference","dockerReference":"r.io/b:1"}"#, "r.io/b:1", "r.io/b:2", false),
            (r#"{"type":"exactRepository","dockerRepository":"r.io/b"}"#, "r.io/a:1", "r.io/b:7", true),
            (r#"{"type":"exactRepository","dockerRepository":"r.io/b"}"#, "r.io/b:1", "r.io/a:1", false),
            (
                r#"{"type":"remapIdentity","prefix":"m.io","signedPrefix":"r.io/v"}"#,
                "m.io/a:1",
                "r.io/v/a:1",
                true,
            ),
            (
                r#"{"type":"remapIdentity","prefix":"m.io/x","signedPrefix":"r.io/v"}"#,
                "m.io/xy:1",
                "r.io/vy:1",
                false,
            ),
            (
                r#"{"type":"remapIdentity","prefix":"m.io/x","signedPrefix":"r.io/v"}"#,
                "m.io/xy:1",
                "m.io/xy:1",
                true,
            ),
        ] {
            let name: Name = image.parse().unwrap();
            let got = identity(kind).fits(Some(&name), signed);
            assert_eq!(got.is_ok(), fits, "{kind}: {image}, {signed}: {got:?}");
        }
        assert!(
            identity(r#"{"type":"matchRepository"}"#)
                .fits(None, "r.io/a")
                .unwrap_err()
                .contains("no registry's name")
        );
        let exact = identity(r#"{"type":"exactRepository","dockerRepository":"r.io/b"}"#);
        assert_eq!(exact.fits(None, "r.io/b"), Ok(()));
        let why = Identity::default().fits(Some(&"r.io/a:1".parse().unwrap()), "r.io/a").unwrap_err();
        assert!(why.contains("matchRepository"), "{why}");
    }

    #[test]
    fn what_is_no_identity() {
        for bad in [
            r#"{"type":"exactReference","dockerReference":"r.io/b"}"#,
            r#"{"type":"exactRepository","dockerRepository":"r.io/b:1"}"#,
            r#"{"type":"exactRepository","dockerRepository":"R io"}"#,
            r#"{"type":"remapIdentity","prefix":"busybox/x","signedPrefix":"r.io"}"#,
            r#"{"type":"remapIdentity","prefix":"r.io/","signedPrefix":"r.io"}"#,
        ] {
            assert!(identity(bad).check().is_err(), "{bad}");
        }
        for bad in [r#"{"type":"matchExact","x":1}"#, r#"{"type":"matchAny"}"#, r#"{}"#] {
            assert!(serde_json::from_str::<Identity>(bad).is_err(), "{bad}");
        }
    }
}
