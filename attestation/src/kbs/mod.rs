//! The KBS protocol, version 0.4.0: request, challenge, attestation, response, and then resources.
//!
//! Owns: the client as a state machine without I/O (`client`), HTTP/1.1 (`http`), addresses of
//! names (`resolve`), and a blocking driver (`transport`) with one limit on time (`deadline`).
//! Does not own: evidence, or what a resource is for.
//!
//! Source: kbs-types 0.18, guest-components `kbs_protocol` and Trustee's `kbs/src` as of August 2026.

mod client;
mod deadline;
mod http;
mod message;
mod resolve;
#[cfg(feature = "tls")]
mod tls;
mod transport;
mod uri;

pub use client::{Client, ClientError, Credential, Outcome, Step};
pub use deadline::Deadline;
pub use http::{HttpError, MOST_BODY, Request, Response, ResponseReader};
pub use message::{Challenge, ErrorBody, TokenBody};
pub use resolve::{DnsError, Kind as AddressKind, MOST_SERVERS, addresses, question};
#[cfg(feature = "tls")]
pub use tls::{TlsError, trusting};
pub use transport::{Connect, Stream, Tcp, Transport, TransportError, Url};
pub use uri::{ResourceUri, UriError};

/// The protocol's version. Servers accept this one and no other.
pub const PROTOCOL_VERSION: &str = "0.4.0";

/// Path below which everything is.
pub const BASE_PATH: &str = "/kbs/v0";

/// Name of the session's cookie.
pub const COOKIE: &str = "kbs-session-id";
