//! Hooks on the host: programs that get the state on stdin.
//!
//! Owns: running them, their time limits, what they said when they failed. Does not own: when they run.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    signal::SigSet,
};
use oci_spec::runtime::Hook;

use crate::{
    error::{Error, host},
    log,
    state::{self, Record, Status},
};

/// Bytes of a hook's stderr that its failure shows.
const MOST_WORDS: u64 = 1024;

/// Runs them in order; the first that fails ends it.
///
/// # Errors
/// [`Error::State`], naming the hook.
pub(super) fn run(hooks: Option<&Vec<Hook>>, record: &Record, status: Status) -> Result<(), Error> {
    let state = state::json(record, status).to_string();
    hooks.into_iter().flatten().try_for_each(|hook| one(hook, &state))
}

/// Runs those of poststop in order; the log has a warning for each that fails, and the rest goes on (OCI runtime specification,
/// runtime.md, "Lifecycle").
pub(super) fn run_all(hooks: Option<&Vec<Hook>>, record: &Record, status: Status) {
    let state = state::json(record, status).to_string();
    for hook in hooks.into_iter().flatten() {
        if let Err(error) = one(hook, &state) {
            log::warn(&format!("poststop {}", error.line()));
        }
    }
}

fn one(hook: &Hook, state: &str) -> Result<(), Error> {
    let name = hook.path().display();
    // A file, not a pipe: a hook may leave a daemon that keeps its stderr.
    let said = memfd_create("hook", MFdFlags::MFD_CLOEXEC).map_err(host("make a file for a hook's words"))?;
    let mut said = File::from(said);
    let mut command = Command::new(hook.path());
    if let Some((first, rest)) = hook.args().as_ref().and_then(|a| a.split_first()) {
        command.arg0(first).args(rest);
    }
    // Without any a hook has this program's, as with runc and crun: hooks look programs up in PATH.
    if let Some(pairs) = hook.env() {
        command.env_clear();
        command.envs(pairs.iter().filter_map(|pair| pair.split_once('=')));
    }
    let copy = said.try_clone().map_err(host("make a file for a hook's words"))?;
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(copy);
    // This process may hold its own signals back.
    let unblock = || SigSet::empty().thread_set_mask().map_err(Into::into);
    // SAFETY: between fork and exec it makes one system call and takes no memory.
    unsafe { command.pre_exec(unblock) };
    let mut child = command.spawn().map_err(host(format!("run hook {name}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state.as_bytes());
    }
    let limit =
        hook.timeout().and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0).map(Duration::from_secs);
    let ended = wait(&mut child, limit).map_err(host(format!("wait for hook {name}")))?;
    let Some(ended) = ended else {
        let seconds = limit.map_or(0, |l| l.as_secs());
        return Err(Error::State(format!("hook {name} did not end within its timeout of {seconds} s")));
    };
    if ended.success() {
        return Ok(());
    }
    let mut words = String::new();
    let _ = said.rewind();
    let _ = said.take(MOST_WORDS).read_to_string(&mut words);
    let words = match words.trim() {
        "" => String::new(),
        words => format!(": {}", words.replace('\n', "; ")),
    };
    let how = match (ended.code(), ended.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => ended.to_string(),
    };
    // The words before the name are crun's.
    Err(Error::State(format!("hook {how}: {name}{words}")))
}

/// `None` when it took too long; it is gone then.
fn wait(child: &mut Child, limit: Option<Duration>) -> std::io::Result<Option<ExitStatus>> {
    let Some(limit) = limit else { return child.wait().map(Some) };
    let began = Instant::now();
    loop {
        if let Some(ended) = child.try_wait()? {
            return Ok(Some(ended));
        }
        if began.elapsed() >= limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2));
    }
}
