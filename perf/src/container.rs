//! One start of a container under an OCI runtime, from exec of `RUNTIME run` to its return.
//!
//! Owns: the bundle and the windows of containers. The container's program (`perf/guest/stamp.c`) prints the clock at its
//! first instruction; a container that shares the host's clock so dates it, ours is dated by the VMM's trace.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    boot::{BootError, Started, system},
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
    command.args(words(kind, directory, id)).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    counts::begin();
    let (began_ns, began) = (figures::monotonic_ns(), Instant::now());
    let mut child = command.spawn().map_err(system("start the runtime"))?;
    let out = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut line = String::new();
        let mut out = BufReader::new(out?);
        out.read_line(&mut line).ok()?;
        let at = Instant::now();
        // To its end, so that the runtime can close it.
        let _ = out.read_to_end(&mut Vec::new());
        Some((line, at))
    });
    let watchdog = watch(child.id(), limit);
    let mut started = Started::default();
    figures::reap(&mut child, &mut started.figures);
    let deleted = Instant::now();
    drop(watchdog);
    counts::end();
    let printed = reader.join().ok().flatten();
    let parsed = printed.as_ref().and_then(|(line, at)| line.trim().parse::<u64>().ok().map(|ns| (ns, *at)));
    let Some((stamp_ns, at)) = parsed else {
        return Err(BootError::NoMark {
            vmm: kind.word(),
            mark: "container's output",
            seconds: limit.as_secs(),
            end: String::new(),
            messages: fs::read_to_string(&messages).unwrap_or_default().trim().to_owned(),
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

fn words(kind: Kind, directory: &Path, id: &str) -> Vec<String> {
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
    let bundle = directory.join("bundle").display().to_string();
    words.extend(["run".into(), "--bundle".into(), bundle, id.to_owned()]);
    words
}

/// Kills a process that takes too long, unless the guard is dropped first.
fn watch(pid: u32, limit: Duration) -> std::sync::mpsc::Sender<()> {
    let (guard, ended) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            figures::signal(pid, libc::SIGKILL);
        }
    });
    guard
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
