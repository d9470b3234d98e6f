//! Questions and answers, without HTTP's letters around them.

use serde_json::{Value, json};

/// What a client asks.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// `GET`, `POST` or `DELETE`.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// Value of the session's cookie.
    pub cookie: Option<String>,
    /// Bearer token.
    pub bearer: Option<String>,
    /// Body.
    pub body: Vec<u8>,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP's number.
    pub status: u16,
    /// Session to set as a cookie.
    pub cookie: Option<String>,
    /// Body.
    pub body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(value: &Value) -> Self {
        Self { status: 200, cookie: None, body: value.to_string().into_bytes() }
    }

    pub(crate) fn empty() -> Self {
        Self { status: 200, cookie: None, body: Vec::new() }
    }

    pub(crate) fn with_cookie(mut self, id: &str) -> Self {
        self.cookie = Some(id.to_owned());
        self
    }

    /// An error as upstream words it: 404 for two kinds, 401 for every other.
    pub(crate) fn error(variant: &str, detail: impl Into<String>) -> Self {
        let status = if matches!(variant, "InvalidRequestPath" | "PluginNotFound") { 404 } else { 401 };
        let kind = format!("https://github.com/confidential-containers/kbs/errors/{variant}");
        let body = json!({ "type": kind, "detail": detail.into() }).to_string().into_bytes();
        Self { status, cookie: None, body }
    }
}
