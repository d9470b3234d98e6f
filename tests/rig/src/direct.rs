//! The command on this host, with the emulated machine's time limit and exit codes.

use std::{
    io::{self, IsTerminal},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{TIMED_OUT, args::Run, signals};

/// Runs it. The exit code is the command's, or 128 + the signal that ended it.
///
/// # Errors
/// The command cannot be started.
pub(crate) fn run(run: &Run) -> io::Result<u8> {
    let mut command = Command::new(&run.command[0]);
    command.args(&run.command[1..]).env("COFFER_RIG", "direct");
    if !run.stdin {
        command.stdin(Stdio::null());
    }
    // Its own group, so that its children end with it; but a background group cannot read a terminal.
    let group = !io::stdin().is_terminal();
    if group {
        command.process_group(0);
    }
    let mut child = match command.spawn() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            eprintln!("rig: {}: {e}", run.command[0]);
            return Ok(127);
        }
        other => other?,
    };
    let pid = child.id() as i32;
    let target = Pid::from_raw(if group { -pid } else { pid });
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(255);
            return Ok(code as u8);
        }
        let ended = signals::exit_code().or_else(|| {
            (began.elapsed() > run.time_out).then(|| {
                eprintln!("rig: no result after {} s", run.time_out.as_secs());
                TIMED_OUT
            })
        });
        if let Some(code) = ended {
            let _ = kill(target, Signal::SIGTERM);
            for _ in 0..100 {
                if child.try_wait()?.is_some() {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
            let _ = kill(target, Signal::SIGKILL);
            child.wait()?;
            return Ok(code);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
