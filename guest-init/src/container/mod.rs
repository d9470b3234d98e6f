//! Containers, as the OCI runtime specification says: own namespaces, mounts, cgroup, and a first process.
//!
//! Owns: making them and their further processes. Does not own: who asks, or stdio's transport.
//!
//! Written here rather than taken from `libcontainer`: that is 4.3 MB by itself, forks helpers that it waits for, and
//! wants state on disk, where PID 1 is to stay small and reap every child itself.

mod accounting;
mod cgroup;
mod child;
mod clocks;
mod device_rules;
mod devices;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod hooks;
mod making;
mod mounts;
mod notify;
mod options;
mod path;
mod places;
mod process;
mod scheduling;
mod seccomp;
mod security;
mod shm;
mod terminal;
mod user;

pub use cgroup::Cgroup;
pub use making::{Making, Stage};
pub use notify::{Socket as NotifySocket, check_usual as check_notify};
#[cfg(feature = "confidential")]
pub(crate) use places::is_in_share;
pub use process::{Files, Shared, exec, launch};
pub(crate) use terminal::set_window;

use coffer_protocol::ErrorKind;
use oci_spec::runtime::{Process, Spec};
use thiserror::Error;

/// Why a container or process was not made.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{message}")]
pub struct ContainerError {
    /// For the caller's exit code.
    pub kind: ErrorKind,
    /// One line.
    pub message: String,
}

impl ContainerError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn guest(stage: &str, error: impl std::fmt::Display) -> Self {
        Self::new(ErrorKind::Guest, format!("{stage}: {error}"))
    }
}

/// A container id: the runtime's rule, checked again because it names cgroups and paths here.
#[must_use]
pub fn is_id(id: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    !id.is_empty() && id.len() <= 1024 && id.chars().all(allowed) && id != "." && id != ".."
}

/// Reads and checks a configuration.
///
/// # Errors
/// [`ContainerError`] of kind `Invalid`, naming the field.
pub fn parse_spec(value: serde_json::Value) -> Result<Spec, ContainerError> {
    let invalid = |message: String| ContainerError::new(ErrorKind::Invalid, message);
    let spec: Spec = serde_json::from_value(value).map_err(|e| invalid(format!("config.json: {e}")))?;
    let root = spec.root().as_ref().ok_or_else(|| invalid("config.json: no root".into()))?;
    if !root.path().is_absolute() {
        return Err(invalid(format!("config.json: root.path {} is not absolute", root.path().display())));
    }
    check_process(spec.process().as_ref().ok_or_else(|| invalid("config.json: no process".into()))?)?;
    user::check(&spec)?;
    clocks::check(&spec)?;
    Ok(spec)
}

/// Checks that what a configuration of the host's binds is the host's.
///
/// # Errors
/// [`ContainerError`] of kind `Invalid`, naming the field.
pub fn check_places(spec: &serde_json::Value) -> Result<(), ContainerError> {
    places::check(spec)
}

/// Makes what a configuration's mounts share with other containers of the pod, and says so in it.
///
/// # Errors
/// [`ContainerError`].
pub fn prepare_shared_memory(spec: &mut serde_json::Value) -> Result<(), ContainerError> {
    shm::prepare(spec)
}

/// Makes the host's directories that a configuration mounts file systems here, once for all containers. Runs in init, before the container's process
/// has mounts of its own.
pub fn enter_volumes(spec: &Spec) {
    spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref()).for_each(|s| places::enter(s));
}

/// Checks what every process needs.
///
/// # Errors
/// [`ContainerError`] of kind `Invalid`.
pub fn check_process(process: &Process) -> Result<(), ContainerError> {
    let invalid = |message: &str| ContainerError::new(ErrorKind::Invalid, message);
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("config.json: process.args is empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("config.json: process.cwd is not absolute"));
    }
    let texts = process.args().iter().flatten().chain(process.env().iter().flatten());
    if texts.into_iter().any(|t| t.contains('\0')) {
        return Err(invalid("config.json: a NUL byte in process.args or process.env"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_are_the_runtimes() {
        for good in ["a", "libpod-1.2_3+x", "9f8e"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\0"] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn a_configuration_without_root_or_process_is_named() {
        let error = parse_spec(serde_json::json!({ "ociVersion": "1.0.2" })).unwrap_err();
        assert_eq!(error.message, "config.json: no root");
        let error =
            parse_spec(serde_json::json!({ "ociVersion": "1.0.2", "root": { "path": "/r" } })).unwrap_err();
        assert_eq!(error.message, "config.json: no process");
    }

    proptest! {
        #[test]
        fn any_json_is_a_configuration_or_an_error(text in "\\PC{0,200}") {
            if let Ok(value) = serde_json::from_str(&text) {
                let _ = parse_spec(value);
            }
        }
    }
}
