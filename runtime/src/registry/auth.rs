//! Who asks: credentials of podman's or Docker's file, and what a registry wants to see.
//!
//! Owns: containers-auth.json(5) as far as it holds passwords, and `WWW-Authenticate` (RFC 9110, 11.6.1; distribution's token
//! specification). Credential helpers are not asked.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;
use zeroize::Zeroizing;

/// Longest file, in bytes.
const MOST_FILE: u64 = 1 << 20;

/// What is sent for `Basic`: name and password, in Base64.
pub(super) type Basic = Zeroizing<String>;

/// Where podman and Docker keep them, the first that is there.
pub(super) fn usual_file() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = variable("HOME");
    let files = [
        variable("REGISTRY_AUTH_FILE"),
        variable("XDG_RUNTIME_DIR").map(|path| path.join("containers/auth.json")),
        // root's, where there is no session.
        Some(PathBuf::from(format!("/run/containers/{}/auth.json", nix::unistd::geteuid()))),
        home.as_ref().map(|path| path.join(".config/containers/auth.json")),
        home.as_ref().map(|path| path.join(".docker/config.json")),
    ];
    files.into_iter().flatten().find(|path| path.exists())
}

/// The entry for `registry/repository`, the most specific one.
pub(super) fn find(file: &Path, repository: &str) -> io::Result<Option<Basic>> {
    let long = fs::metadata(file)?.len() > MOST_FILE;
    let text = Zeroizing::new(if long { Vec::new() } else { fs::read(file)? });
    let value: Value = serde_json::from_slice(&text).map_err(io::Error::other)?;
    Ok(entry(&value, repository))
}

fn entry(file: &Value, repository: &str) -> Option<Basic> {
    let mut scope = repository;
    let registry = repository.split('/').next().unwrap_or_default();
    let mut scopes = Vec::new();
    while !scope.is_empty() {
        scopes.push(scope.to_owned());
        scope = scope.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    if registry == "docker.io" {
        scopes.push("https://index.docker.io/v1/".into());
    }
    scopes.extend([format!("https://{registry}"), format!("https://{registry}/v2/")]);
    let found = scopes.iter().find_map(|scope| file["auths"][scope]["auth"].as_str());
    let plain = |text: &&str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
    };
    found.filter(plain).map(|text| Zeroizing::new(text.to_owned()))
}

/// What a registry wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// One header's value; what is not understood is none.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let parameters = parameters(rest)?;
        let get = |name: &str| {
            parameters.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.clone())
        };
        Some(Self::Bearer { realm: get("realm")?, service: get("service"), scope: get("scope") })
    }
}

/// `name="value", name=value`: commas within quotes separate nothing.
fn parameters(text: &str) -> Option<Vec<(String, String)>> {
    let mut all = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=')?;
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut letters = quoted.char_indices();
                let end = loop {
                    match letters.next()? {
                        (at, '"') => break at,
                        (_, '\\') => value.push(letters.next()?.1),
                        (_, letter) => value.push(letter),
                    }
                };
                (value, &quoted[end + 1..])
            }
            None => {
                let end = after.find([',', ' ']).unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
        };
        all.push((name.trim().to_owned(), value));
        rest = after.trim_start_matches([' ', ',']);
    }
    Some(all)
}

/// A query's value: everything that is not unreserved (RFC 3986, 2.3) by its bytes.
pub(super) fn encoded(text: &str) -> String {
    let letter = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(str::to_owned),
                scope: scope.map(str::to_owned),
            })
        };
        assert_eq!(Challenge::parse("Basic realm=\"x\""), Some(Challenge::Basic));
        let text = r#"Bearer realm="https://a/token",service="r",scope="repository:a/b:pull,push""#;
        assert_eq!(
            Challenge::parse(text),
            bearer("https://a/token", Some("r"), Some("repository:a/b:pull,push"))
        );
        assert_eq!(Challenge::parse(r#"bearer scope=s, realm="\"q\"""#), bearer("\"q\"", None, Some("s")));
        for none in ["Digest x=y", "Bearer", "Bearer realm=\"open", "Bearer service=\"s\"", ""] {
            assert_eq!(Challenge::parse(none), None, "{none}");
        }
        assert_eq!(encoded("repository:a/b:pull é"), "repository%3Aa%2Fb%3Apull%20%C3%A9");
    }

    #[test]
    fn the_most_specific_entry_counts() {
        let file = json!({"auths": {"r.io": {"auth": "QQ=="}, "r.io/team": {"auth": "Qg=="}, "r.io/evil": {"auth": "a\r\nb"},
            "https://index.docker.io/v1/": {"auth": "Qw=="}, "r.io/helper": {}}});
        let found = |name: &str| entry(&file, name).map(|basic| basic.to_string());
        assert_eq!(found("r.io/app").as_deref(), Some("QQ=="));
        assert_eq!(found("r.io/team/app").as_deref(), Some("Qg=="));
        assert_eq!(found("docker.io/library/app").as_deref(), Some("Qw=="));
        assert_eq!((found("r.io.evil/app"), found("r.io/evil")), (None, None));
    }

    proptest! {
        #[test]
        fn any_text_is_a_challenge_or_none(text in "(Bearer )?[ -~]{0,60}") {
            let _ = Challenge::parse(&text);
        }
    }
}
