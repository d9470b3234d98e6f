//! Hooks on the host: programs that get the state on stdin.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use oci_spec::runtime::Hook;

use crate::{
    error::{Error, host},
    state::{self, Record, Status},
};

/// Runs them in order; the first that fails ends it.
///
/// # Errors
/// [`Error::State`], naming the hook.
pub(super) fn run(hooks: Option<&Vec<Hook>>, record: &Record, status: Status) -> Result<(), Error> {
    for hook in hooks.into_iter().flatten() {
        let name = hook.path().display();
        let mut command = Command::new(hook.path());
        if let Some((first, rest)) = hook.args().as_ref().and_then(|a| a.split_first()) {
            std::os::unix::process::CommandExt::arg0(&mut command, first);
            command.args(rest);
        }
        command.env_clear();
        for pair in hook.env().iter().flatten() {
            if let Some((key, value)) = pair.split_once('=') {
                command.env(key, value);
            }
        }
        let mut child = command.stdin(Stdio::piped()).spawn().map_err(host(format!("run hook {name}")))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A hook need not read it.
            let _ = stdin.write_all(state::json(record, status).to_string().as_bytes());
        }
        let ended = child.wait().map_err(host(format!("wait for hook {name}")))?;
        if !ended.success() {
            return Err(Error::State(format!("hook {name}: {ended}")));
        }
    }
    Ok(())
}
