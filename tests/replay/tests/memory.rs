//! How much memory `coffer` itself takes at most, in a container's life.
//!
//! Its own peak (`VmHWM`), read where the kernel stops a traced process right before it ends: `ru_maxrss` of a child begins with the peak of
//! whoever started it. `COFFER_RELEASE` names the release build, for which the aim is (`tests/steps/46-memory`); without optimisation a program is
//! larger, and has twice as much.

use std::{env, fs, io, os::unix::process::CommandExt, process::Command};

use coffer_replay::{Bench, config, until};

/// KiB that a release build takes at most.
const MOST: u64 = 8 << 10;

/// A call of the program that is measured.
fn call(bench: &Bench, words: &[&str]) -> Command {
    let call = bench.command(words);
    let Some(release) = env::var_os("COFFER_RELEASE") else { return call };
    let mut command = Command::new(release);
    command.args(call.get_args()).env_clear();
    command.envs(call.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdin(std::process::Stdio::null());
    command
}

fn traced(command: &mut Command) -> u64 {
    // SAFETY: one system call, and no memory is taken.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let pid = command.spawn().expect("coffer").id() as i32;
    let mut peak = None;
    let wait = || {
        let mut status = 0;
        // SAFETY: `status` outlives the call; the child is ours and nobody else waits for it.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        status
    };
    let go_on = |signal: i32| {
        // SAFETY: the child is stopped, and ours to trace.
        assert_eq!(unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, signal) }, 0);
    };
    // The first stop is that of its exec.
    assert!(libc::WIFSTOPPED(wait()));
    // SAFETY: likewise.
    assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, libc::PTRACE_O_TRACEEXIT) }, 0);
    go_on(0);
    loop {
        let status = wait();
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0, "{command:?}");
            return peak.expect("it was stopped before its end");
        }
        assert!(libc::WIFSTOPPED(status), "{status:#x}: {command:?}");
        if status >> 8 == libc::SIGTRAP | libc::PTRACE_EVENT_EXIT << 8 {
            let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line =
                text.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it has memory still");
            peak = line.split_whitespace().next().and_then(|kib| kib.parse().ok());
            go_on(0);
        } else {
            go_on(libc::WSTOPSIG(status));
        }
    }
}

#[test]
fn coffer_takes_at_most_8_mib_in_create_start_and_delete() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo up; sleep 1000"]));
    let out = || fs::File::create(bench.path("out")).unwrap();
    let mut create = call(&bench, &["create", "--bundle"]);
    create.arg(&bundle).arg("--pid-file").arg(bench.path("c.pid")).arg("c").stdout(out()).stderr(out());
    let mut peaks =
        vec![("create", traced(&mut create)), ("start", traced(&mut call(&bench, &["start", "c"])))];
    until(|| bench.read("out") == "up\n");
    // Who stays for as long as the container does.
    let status = fs::read_to_string(format!("/proc/{}/status", bench.pid("c"))).unwrap();
    let stub = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peaks.push(("stub", stub.split_whitespace().next().unwrap().parse().unwrap()));
    peaks.push(("state", traced(call(&bench, &["state", "c"]).stdout(out()))));
    peaks.push(("delete", traced(&mut call(&bench, &["delete", "--force", "c"]))));
    println!("peaks in KiB: {peaks:?}");
    let most = if env::var_os("COFFER_RELEASE").is_some() { MOST } else { 2 * MOST };
    assert!(peaks.iter().all(|(_, peak)| (500..=most).contains(peak)), "at most {most} KiB: {peaks:?}");
}
