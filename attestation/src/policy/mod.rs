//! The owner's policy: what the host may ask of the guest.
//!
//! Owns: the engine, package `agent_policy`, the decision on a request and the words of a denial, and writing such a policy.
//! The names of rules and of their input are Kata's, where Kata has the request. Does not own: carrying a decision out.
//!
//! A policy that wants to explain itself defines `reasons`, a set of objects `{field, value, allowed}`; all three are
//! things that the host sent or that initdata says, so a denial tells nobody anything new. Values of environment
//! variables are left out all the same, in whatever form a reason has them: an encrypted image's are among them.

#[cfg(feature = "policy")]
mod engine;
mod generate;
mod input;
#[cfg(feature = "policy")]
mod nesting;
mod pod;
mod unseen;

/// What is allowed under a TEE when initdata has no policy: only images that were verified in the guest, no exec, no stdin.
pub const CLOSED: &str =
    concat!(include_str!("closed.rego"), include_str!("masked.rego"), include_str!("signals.rego"));

#[cfg(feature = "policy")]
pub use engine::{Denied, Policy, PolicyError, Rule};
pub use generate::{Allowed, generate};
pub use input::{VerifiedImage, container_input, create_input, process_input, with_container};
pub use pod::{PodContainer, PodMount, PodUser, generate_pod};
pub use unseen::{Unseen, unseen};
