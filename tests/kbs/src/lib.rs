//! A KBS for tests and for the demo: Trustee's protocol, in one process, in memory.
//!
//! Owns: sessions, verification of `sample` and `snp` evidence, tokens, resources, the resource policy, the calls that
//! upstream's `kbs-client` makes. It reads requests with upstream's own types (kbs-types), not with the client's. Does not
//! own: storage that outlives it, or anybody's real secrets: a Trustee takes its place by a URL.
#![forbid(unsafe_code)]

mod admin;
mod answer;
mod policy;
mod reference;
mod serve;
mod session;

pub use answer::{Answer, Query};
pub use serve::{Identity, Running, serve, serve_by};
pub use session::{Config, Kbs};
