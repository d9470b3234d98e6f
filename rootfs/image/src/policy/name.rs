//! Names of images in registries, and the scopes of a policy that they fall under.
//!
//! Owns: the normal form of a name (distribution/reference: `busybox` is `docker.io/library/busybox`) and the order in which scopes are
//! looked up (containers/image, docker/policyconfiguration and oci/layout). Does not own: what the rule of a scope asks for.

use std::{fmt, str::FromStr};

use thiserror::Error;

use crate::digest::Digest;

/// Longest `registry/repository`, in bytes (distribution/reference, `RepositoryNameTotalLengthMax`).
const MOST_REPOSITORY: usize = 255;
/// Longest tag, in bytes.
const MOST_TAG: usize = 128;

/// Not a name.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no image name: want REGISTRY/REPOSITORY[:TAG][@sha256:…] in lower case")]
pub struct NameError(pub(crate) String);

/// A name in its normal form: shown, it is what two equal names have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let wrong = || NameError(text.to_owned());
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) || is_identifier(name) {
            return Err(wrong());
        }
        let repository = normal(name).filter(|name| name.len() <= MOST_REPOSITORY).ok_or_else(wrong)?;
        Ok(Self { repository, tag: tag.map(str::to_owned), digest })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl Name {
    /// As an image is asked for: without tag and digest it is `latest`.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn of_image(text: &str) -> Result<Self, NameError> {
        let mut name: Self = text.strip_prefix("docker://").unwrap_or(text).parse()?;
        if name.is_bare() {
            name.tag = Some("latest".into());
        }
        Ok(name)
    }

    /// `registry/repository`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Its digest.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Its tag.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Has a tag.
    #[must_use]
    pub fn is_tagged(&self) -> bool {
        self.tag.is_some()
    }

    /// Has neither tag nor digest.
    #[must_use]
    pub fn is_bare(&self) -> bool {
        self.tag.is_none() && self.digest.is_none()
    }

    /// The same in another repository.
    #[must_use]
    pub(super) fn moved(&self, repository: &str) -> Self {
        Self { repository: repository.to_owned(), ..self.clone() }
    }

    /// Scopes, the most specific first: the name, its repository and what that lies in, the registry without its port as a
    /// wildcard (`*.example.com`).
    #[must_use]
    pub fn scopes(&self) -> Vec<String> {
        let mut scopes = vec![self.to_string()];
        let mut rest = self.repository.as_str();
        loop {
            if scopes.first().is_none_or(|first| first != rest) {
                scopes.push(rest.to_owned());
            }
            let Some((shorter, _)) = rest.rsplit_once('/') else { break };
            rest = shorter;
        }
        let mut host = rest.split(':').next().unwrap_or_default();
        while let Some((_, parent)) = host.split_once('.') {
            scopes.push(format!("*.{parent}"));
            host = parent;
        }
        scopes
    }
}

/// Scopes of a layout: its directory and those that it lies in. `/` is none: `""` says that.
#[must_use]
pub(super) fn directory_scopes(path: &str) -> Vec<String> {
    let mut scopes = Vec::new();
    let mut rest = path.trim_end_matches('/');
    while !rest.is_empty() {
        scopes.push(rest.to_owned());
        rest = rest.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    scopes
}

/// With its registry and, at Docker's, its `library`.
fn normal(name: &str) -> Option<String> {
    let (registry, path) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (if first == "index.docker.io" { "docker.io" } else { first }, rest.to_owned())
        }
        _ => ("docker.io", name.to_owned()),
    };
    let path = if registry == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path };
    (is_registry(registry) && path.split('/').all(is_component)).then(|| format!("{registry}/{path}"))
}

/// Sixty-four hexadecimal digits are an image's identifier, which names nothing in a registry.
fn is_identifier(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= MOST_TAG
        && bytes.next().is_some_and(word)
        && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

/// Letters and digits, between them one `.`, one or two `_`, or any number of `-`.
fn is_component(component: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(first), Some(last)) = (component.bytes().next(), component.bytes().next_back()) else {
        return false;
    };
    let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    plain(first)
        && plain(last)
        && separators.into_iter().all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

/// A host, with a port or without; an IPv6 address in brackets.
fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let good = match address {
        Some(address) => !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':'),
        None => host.split('.').all(label),
    };
    good && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By the Go package, written down from its own tests (distribution/reference, normalize_test.go).
    #[test]
    fn names_get_their_normal_form() {
        for (text, normal) in [
            ("busybox", "docker.io/library/busybox"),
            ("docker.io/busybox", "docker.io/library/busybox"),
            ("index.docker.io/library/busybox:1", "docker.io/library/busybox:1"),
            ("user/app", "docker.io/user/app"),
            ("localhost/app", "localhost/app"),
            ("127.0.0.1:5000/a/b__c:T_1.x-y", "127.0.0.1:5000/a/b__c:T_1.x-y"),
            ("[fc00::1]:5000/a", "[fc00::1]:5000/a"),
            ("Registry/a", "Registry/a"),
            ("r.io/a---b", "r.io/a---b"),
        ] {
            assert_eq!(text.parse::<Name>().map(|n| n.to_string()).as_deref(), Ok(normal), "{text}");
        }
        for bad in [
            "",
            "/",
            ":1",
            "a/",
            "/a",
            "a//b",
            "r.io/A",
            "r.io/a_",
            "r.io/a..b",
            "r.io/a___b",
            "r.io/a:",
            "r.io/a:-",
            "r.io/a@sha256:0",
            "r.io/a b",
            "r.io/é",
            "-r.io/a",
            "r.io:x/a",
            "https://r.io/a",
            "1234567890abcdef1234567890abcdef1234567890abcdef1234567890abcdef",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
        let long = format!("r.io/{}", "a".repeat(251));
        assert!(long.parse::<Name>().is_err() && long[..255].parse::<Name>().is_ok());
    }

    #[test]
    fn an_image_without_tag_and_digest_is_the_latest() {
        let digest = Digest::sha256(b"");
        for (text, normal) in [
            ("docker://r.io/a", "r.io/a:latest".to_owned()),
            ("r.io/a:1", "r.io/a:1".to_owned()),
            (&format!("r.io/a@{digest}"), format!("r.io/a@{digest}")),
        ] {
            assert_eq!(Name::of_image(text).unwrap().to_string(), normal);
        }
    }

    /// containers/image, docker/policyconfiguration/naming_test.go, has such lists.
    #[test]
    fn scopes_go_from_the_name_to_the_registrys_domain() {
        let name: Name = "registry.example.com:5000/ns/app:1".parse().unwrap();
        assert_eq!(
            name.scopes(),
            [
                "registry.example.com:5000/ns/app:1",
                "registry.example.com:5000/ns/app",
                "registry.example.com:5000/ns",
                "registry.example.com:5000",
                "*.example.com",
                "*.com",
            ]
        );
        assert_eq!("localhost/a".parse::<Name>().unwrap().scopes(), ["localhost/a", "localhost"]);
        assert_eq!(directory_scopes("/a/b/"), ["/a/b", "/a"]);
        assert_eq!(directory_scopes("/"), [""; 0]);
    }

    proptest! {
        #[test]
        fn a_normal_form_is_its_own(text in "[a-zA-Z0-9._:/@\\[\\]-]{0,40}") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert_eq!(&name.to_string().parse::<Name>(), &Ok(name.clone()));
                let scopes = name.scopes();
                prop_assert_eq!(&scopes[0], &name.to_string());
                let unique: std::collections::BTreeSet<_> = scopes.iter().collect();
                prop_assert_eq!(unique.len(), scopes.len());
            }
        }
    }
}
