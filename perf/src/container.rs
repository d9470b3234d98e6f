//! One start of a container under an OCI runtime, from exec of `RUNTIME run` to its return.
//!
//! Owns: the bundle and the windows of containers. The container's program (`perf/guest/stamp.c`) prints the clock at its
//! first instruction; a container that shares the host's clock so dates it, ours is dated by the VMM's trace.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    boot::{BootError, Started, system, words_in},
    counts, figures,
    plan::{Class, Kind},
    record::{Stage, Window},
};

/// Makes a bundle whose container is `program`, a static executable; a guest that it gets has `memory_mib`.
///
/// # Errors
/// The system's.
pub fn make_bundle(
    directory: &Path,
    program: &Path,
    trace: &Path,
    memory_mib: u64,
    class: Class,
) -> Result<(), BootError> {
    let root = directory.join("rootfs");
    for name in ["bin", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(name)).map_err(system("make the bundle"))?;
    }
    fs::copy(program, root.join("bin/stamp")).map_err(system("copy the container's program"))?;
    let namespaces: Vec<_> =
        ["pid", "mount", "ipc", "uts", "network"].iter().map(|n| json!({ "type": n })).collect();
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": ["/bin/stamp"], "cwd": "/",
            "env": ["PATH=/bin"], "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "bench",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }
        ],
        "linux": { "namespaces": namespaces },
        "annotations": {
            "io.coffer.trace": trace.display().to_string(),
            "io.coffer.memory-mib": memory_mib.to_string(),
            "io.coffer.start": if class == Class::Pool { "pool" } else { "boot" }
        }
    });
    fs::write(directory.join("config.json"), config.to_string()).map_err(system("write config.json"))
}

/// Has one shell wait for the next start.
///
/// # Errors
/// [`BootError::NoShell`], with the runtime's words.
pub fn fill_pool(program: &Path, directory: &Path) -> Result<(), BootError> {
    let mut command = Command::new(program);
    command.arg("--root").arg(directory.join("state")).args(["pool", "fill"]).stdin(Stdio::null());
    let output = command.output().map_err(system("start the runtime"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(BootError::NoShell { messages: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

/// Refuses a start that was of another class than its plan's.
///
/// # Errors
/// [`BootError::NoShell`].
pub fn check_class(class: Class, started: &Started) -> Result<(), BootError> {
    let taken = started.stages.iter().any(|stage| stage.stage == "shell-taken");
    if taken == (class == Class::Pool) {
        return Ok(());
    }
    let messages = if taken { "a start of another class took one" } else { "the VM was started anew" };
    Err(BootError::NoShell { messages: messages.to_owned() })
}

/// Runs one container; `directory` is scratch of this start alone and holds a bundle in `bundle`.
///
/// # Errors
/// [`BootError`]; the runtime's own words when it fails.
pub fn measure(
    kind: Kind,
    program: &Path,
    directory: &Path,
    id: &str,
    limit: Duration,
) -> Result<Started, BootError> {
    let messages = directory.join("stderr");
    let stderr = File::create(&messages).map_err(system("create the file for messages"))?;
    let trace = directory.join("trace");
    let _ = fs::remove_file(&trace);
    let mut command = Command::new(program);
    command.args(words(kind, directory, &["run", "--bundle"])).arg(directory.join("bundle")).arg(id);
    // In a group of its own, so that the limit holds for what it starts, too.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).process_group(0);
    counts::begin();
    let (began_ns, began) = (figures::monotonic_ns(), Instant::now());
    let mut child = command.spawn().map_err(system("start the runtime"))?;
    let (sender, printed) = mpsc::channel();
    let out = child.stdout.take();
    // Nobody waits for its end: whoever has the runtime's output open may live on.
    thread::spawn(move || {
        let mut line = String::new();
        let mut out = BufReader::new(out?);
        out.read_line(&mut line).ok()?;
        // When nobody listens any more the start is over.
        let _ = sender.send((line, Instant::now()));
        // To its end, so that the runtime can close it.
        out.read_to_end(&mut Vec::new()).ok()
    });
    let watchdog = Watchdog::new(child.id(), limit);
    let end = figures::end_of(child.id(), true);
    let deleted = Instant::now();
    counts::end();
    let in_time = watchdog.stop();
    let left = limit.saturating_sub(began.elapsed()).max(Duration::from_millis(100));
    let good = in_time && end.is_some_and(|end| end.success());
    let printed = printed.recv_timeout(if good { left } else { Duration::ZERO }).ok();
    let parsed = printed.and_then(|(line, at)| line.trim().parse::<u64>().ok().map(|ns| (ns, at)));
    if !good || parsed.is_none() {
        figures::kill_group(child.id());
    }
    let mut started = Started::default();
    figures::reap(&mut child, &mut started.figures);
    let (true, Some((stamp_ns, at))) = (good, parsed) else {
        delete(kind, program, directory, id, limit.min(DELETE_LIMIT));
        let messages = words_in(&messages);
        let (vmm, seconds) = (kind.word(), limit.as_secs());
        return Err(match end {
            _ if !in_time => BootError::TimeLimit { vmm, seconds, messages },
            Some(end) if !end.success() => BootError::Failed { vmm, end: figures::words(end), messages },
            _ => BootError::NoMark { vmm, mark: "container's output", seconds, end: String::new(), messages },
        });
    };
    let ms = |at: Instant| at.duration_since(began).as_secs_f64() * 1e3;
    started.windows.insert(Window::Output, ms(at));
    started.windows.insert(Window::Deleted, ms(deleted));
    if kind == Kind::Coffer {
        started.stages = stages(&trace, began_ns);
        for stage in &started.stages {
            if let Some(window) = Window::of_stage(&stage.stage) {
                started.windows.entry(window).or_insert(stage.ms);
            }
        }
    } else if kind != Kind::Runsc {
        // gVisor's sandbox has a clock of its own.
        started.windows.insert(Window::Container, stamp_ns.saturating_sub(began_ns) as f64 / 1e6);
    }
    Ok(started)
}

/// What a runtime is called with: its own settings and then `rest`.
fn words(kind: Kind, directory: &Path, rest: &[&str]) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let state = directory.join("state").display().to_string();
    words.extend(["--root".into(), state]);
    match kind {
        Kind::Crun => words.extend(["--cgroup-manager".into(), "cgroupfs".into()]),
        // Its manual: no network stack of its own, no cgroup: the least that it does.
        Kind::Runsc => {
            words.extend(["--network=none", "--ignore-cgroups", "--platform=ptrace"].map(str::to_owned));
        }
        _ => {}
    }
    words.extend(rest.iter().map(|word| (*word).to_owned()));
    words
}

/// What a runtime has at most for deleting what a start that failed has left.
const DELETE_LIMIT: Duration = Duration::from_secs(10);

/// Has the runtime delete what a start that failed has left outside its process group. Whether it could is nobody's question: the start's failure is told.
fn delete(kind: Kind, program: &Path, directory: &Path, id: &str, limit: Duration) {
    let mut command = Command::new(program);
    command.args(words(kind, directory, &["delete", "--force", id]));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    if let Ok(mut child) = command.spawn() {
        let watchdog = Watchdog::new(child.id(), limit);
        let _ = figures::end_of(child.id(), true);
        watchdog.stop();
        figures::kill_group(child.id());
        let _ = child.wait();
    }
}

/// Ends a process group that takes too long.
struct Watchdog {
    guard: mpsc::Sender<()>,
    thread: thread::JoinHandle<bool>,
}

impl Watchdog {
    /// Of the child that leads the group. It must not be reaped before [`Watchdog::stop`].
    fn new(pid: u32, limit: Duration) -> Self {
        let (guard, ended) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            let late = ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                figures::kill_group(pid);
            }
            late
        });
        Self { guard, thread }
    }

    /// Kills nobody from now on; whether it had not yet.
    fn stop(self) -> bool {
        drop(self.guard);
        self.thread.join().is_ok_and(|late| !late)
    }
}

fn stages(trace: &PathBuf, began_ns: u64) -> Vec<Stage> {
    crate::boot::trace_stages(&fs::read(trace).unwrap_or_default(), began_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_bundle_is_one_and_a_runtime_that_prints_the_clock_has_windows_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().join("runtime");
        fs::write(&runtime, "#!/bin/sh\nread up idle </proc/uptime\necho 1${up%.*}000000000\nsleep 0.05\n")
            .unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        make_bundle(&directory.path().join("bundle"), &runtime, Path::new("/t"), 128, Class::Warm).unwrap();
        let config = fs::read(directory.path().join("bundle/config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["annotations"]["io.coffer.trace"], "/t");
        let started = measure(Kind::Crun, &runtime, directory.path(), "a", Duration::from_secs(60)).unwrap();
        // By how much is a busy host's to say.
        assert!(started.windows[&Window::Deleted] > started.windows[&Window::Output], "{started:?}");
    }

    /// What a shell script in a runtime's place comes to, and how long that took.
    fn run_script(text: &str, limit: Duration) -> (Result<Started, BootError>, Duration) {
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().join("runtime");
        fs::write(&runtime, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        let began = Instant::now();
        let result = measure(Kind::Crun, &runtime, directory.path(), "a", limit);
        (result, began.elapsed())
    }

    #[test]
    fn the_time_limit_ends_a_runtime_whose_child_holds_its_output() {
        let (result, took) = run_script("sleep 1000 & wait", Duration::from_secs(1));
        let error = result.unwrap_err().to_string();
        assert!(error.contains("not done within 1 s"), "{error}");
        // `delete` of this runtime hangs as well.
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[test]
    fn the_time_limit_holds_where_only_a_child_is_left() {
        let (result, took) = run_script("sleep 1000 &", Duration::from_secs(1));
        let error = result.unwrap_err().to_string();
        assert!(error.contains("container's output"), "{error}");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[test]
    fn nothing_of_a_start_that_failed_is_left() {
        let text = "case $* in *'delete --force a') echo gone >$2.deleted; exit;; esac
            sleep 1000 & echo $! >$2.child; wait";
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().join("runtime");
        fs::write(&runtime, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        measure(Kind::Crun, &runtime, directory.path(), "a", Duration::from_secs(1)).unwrap_err();
        assert!(directory.path().join("state.deleted").exists());
        let child = fs::read_to_string(directory.path().join("state.child")).unwrap();
        // It is killed, but a busy host takes its time, and so may whoever inherits it.
        let lives = || {
            let state = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
            !state.is_empty() && !state.contains(") Z ")
        };
        let began = Instant::now();
        while lives() {
            assert!(began.elapsed() < Duration::from_secs(60), "{child}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_runtime_that_prints_and_fails_is_no_start() {
        let (result, _) = run_script("echo no luck >&2; echo 1; exit 1", Duration::from_secs(60));
        let error = result.unwrap_err().to_string();
        assert!(error.contains("exit code 1") && error.contains("no luck"), "{error}");
    }

    #[test]
    fn a_start_from_a_shell_is_of_no_other_class() {
        let with = |stage: &str| Started {
            stages: vec![Stage { stage: stage.to_owned(), ms: 1.0 }],
            ..Started::default()
        };
        assert!(check_class(Class::Pool, &with("shell-taken")).is_ok());
        assert!(check_class(Class::Warm, &with("process-entry")).is_ok());
        assert!(check_class(Class::Pool, &with("process-entry")).is_err());
        assert!(check_class(Class::Warm, &with("shell-taken")).is_err());
        let error = fill_pool(Path::new("/bin/false"), Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(error, BootError::NoShell { .. }), "{error}");
    }
}
