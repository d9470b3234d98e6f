//! Resource URIs: `kbs:///repository/type/tag`, `kbs+plugin:///path`.
//!
//! Owns: the form and its path on the server. The authority is ignored, as upstream's client does.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// Most characters of a URI.
const LONGEST: usize = 512;

/// A URI that names no resource.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("resource URI {uri:?}: {message}")]
pub struct UriError {
    uri: String,
    message: &'static str,
}

/// A resource's name, checked: nothing in it can leave its path on the server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResourceUri {
    plugin: String,
    path: String,
    query: Option<String>,
}

fn is_segment(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.~+@:".contains(c);
    !text.is_empty() && text != "." && text != ".." && text.chars().all(allowed)
}

impl FromStr for ResourceUri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        let wrong = |message| UriError { uri: uri.chars().take(LONGEST).collect(), message };
        if uri.len() > LONGEST {
            return Err(wrong("longer than 512 characters"));
        }
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| wrong("begins not with kbs:///"))?;
        let plugin = match scheme.split_once('+') {
            None if scheme == "kbs" => "resource",
            Some(("kbs", plugin)) if is_segment(plugin) => plugin,
            _ => return Err(wrong("begins not with kbs:/// or kbs+plugin:///")),
        };
        let (_authority, path) = rest.split_once('/').ok_or_else(|| wrong("has no path"))?;
        Self::checked(plugin, path).map_err(wrong)
    }
}

impl ResourceUri {
    /// From `repository/type/tag`, as `/cdh/resource/…` has it.
    ///
    /// # Errors
    /// [`UriError`].
    pub fn from_path(path: &str) -> Result<Self, UriError> {
        Self::checked("resource", path).map_err(|message| UriError { uri: path.to_owned(), message })
    }

    fn checked(plugin: &str, path: &str) -> Result<Self, &'static str> {
        let (path, query) = match path.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (path, None),
        };
        let segments: Vec<&str> = path.split('/').collect();
        if !segments.iter().all(|s| is_segment(s)) {
            return Err("a part is empty, or has characters other than letters, digits and -_.~+@:");
        }
        if plugin == "resource" && segments.len() != 3 {
            return Err("is not repository/type/tag");
        }
        let in_query = |c: char| c.is_ascii_alphanumeric() || "-_.~+@:=&%".contains(c);
        if query.is_some_and(|q| !q.chars().all(in_query)) {
            return Err("its query has characters that must be escaped");
        }
        Ok(Self { plugin: plugin.into(), path: path.into(), query: query.map(str::to_owned) })
    }

    /// Path and query below the server's base path.
    #[must_use]
    pub fn server_path(&self) -> String {
        let query = self.query.as_ref().map_or_else(String::new, |q| format!("?{q}"));
        format!("/{}/{}{query}", self.plugin, self.path)
    }
}

impl fmt::Display for ResourceUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plugin = if self.plugin == "resource" { String::new() } else { format!("+{}", self.plugin) };
        let query = self.query.as_ref().map_or_else(String::new, |q| format!("?{q}"));
        write!(f, "kbs{plugin}:///{}{query}", self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_on_the_server_are_upstreams() {
        let path = |uri: &str| uri.parse::<ResourceUri>().unwrap().server_path();
        assert_eq!(path("kbs:///one/2/trois"), "/resource/one/2/trois");
        assert_eq!(path("kbs://127.0.0.1:8080/one/2/trois"), "/resource/one/2/trois");
        assert_eq!(path("kbs+pkcs11:///a/b?c=d"), "/pkcs11/a/b?c=d");
    }

    #[test]
    fn nothing_leaves_its_path() {
        for wrong in [
            "http://a/b/c",
            "kbs:///a/b",
            "kbs:///a/../c",
            "kbs:///a//c",
            "kbs:///a/b/c d",
            "kbs:///a/b/c\r\nX: y",
            "kbs",
        ] {
            assert!(wrong.parse::<ResourceUri>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_uri_that_reads_back_or_an_error(text in "(kbs(\\+a)?://)?[ -~]{0,40}") {
            if let Ok(uri) = text.parse::<ResourceUri>() {
                prop_assert_eq!(uri.to_string().parse::<ResourceUri>().unwrap(), uri);
            }
        }
    }
}
