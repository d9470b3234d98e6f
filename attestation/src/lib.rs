//! What makes a pod confidential, apart from the machine: evidence, the KBS's protocol, initdata, sealed secrets, policy.
//!
//! Owns: formats and their checks, the KBS client as a state machine, and thin drivers for sockets and devices. Used by
//! init, by the command line and by the test KBS. Does not own: where initdata comes from, what a secret is for, the
//! layers of images.
//!
//! The formats are Confidential Containers' as its source has them (kbs-types 0.18, guest-components and Trustee of
//! August 2026), where its documents say otherwise too.

#[cfg(all(feature = "tls", feature = "policy"))]
pub mod api;
pub mod config;
pub mod encoding;
pub mod evidence;
#[cfg(all(feature = "tls", feature = "policy"))]
pub mod guest;
pub mod hash;
pub mod initdata;
pub mod jwe;
pub mod jws;
pub mod kbs;
pub mod key;
pub mod policy;
pub mod sealed;
pub mod snp;
#[cfg(feature = "verify")]
pub mod verify;
pub mod yaml;
