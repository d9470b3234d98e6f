//! Hooks that run inside the container, right before its program (OCI runtime specification, `startContainer`).
//!
//! Owns: running them with the state on stdin. Runs in the child, with its user and capabilities.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use oci_spec::runtime::{Hook, Spec};

use super::ContainerError;

/// Runs them in order; the first that fails ends it.
pub(super) fn start_container(spec: &Spec, id: &str) -> Result<(), ContainerError> {
    let Some(list) = spec.hooks().as_ref().and_then(|h| h.start_container().as_ref()) else { return Ok(()) };
    let state = serde_json::json!({
        // Process numbers and paths of the host mean nothing in here.
        "ociVersion": spec.version(), "id": id, "status": "created", "pid": std::process::id(), "bundle": "/",
        "annotations": spec.annotations().clone().unwrap_or_default(),
    })
    .to_string();
    // Without one of its own a hook has the program's environment, as with runc.
    let inherited = spec.process().as_ref().and_then(|p| p.env().as_deref()).unwrap_or_default();
    list.iter().try_for_each(|hook| one(hook, hook.env().as_deref().unwrap_or(inherited), &state))
}

fn one(hook: &Hook, environment: &[String], state: &str) -> Result<(), ContainerError> {
    let stage = format!("startContainer hook {}", hook.path().display());
    let failed = |e: std::io::Error| ContainerError::guest(&stage, e);
    let mut command = Command::new(hook.path());
    if let Some((first, rest)) = hook.args().as_ref().and_then(|a| a.split_first()) {
        command.arg0(first).args(rest);
    }
    command.env_clear();
    command.envs(environment.iter().filter_map(|pair| pair.split_once('=')));
    let mut child = command.stdin(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state.as_bytes());
    }
    let limit =
        hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0).map(Duration::from_secs);
    let began = Instant::now();
    let ended = loop {
        let now = if limit.is_some() { child.try_wait() } else { child.wait().map(Some) };
        match now.map_err(failed)? {
            Some(ended) => break ended,
            None if limit.is_some_and(|l| began.elapsed() >= l) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(ContainerError::guest(&stage, "it did not end within its timeout"));
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    };
    if ended.success() { Ok(()) } else { Err(ContainerError::guest(&stage, ended)) }
}
