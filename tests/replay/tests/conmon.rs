//! What conmon and the user's shell hand on without meaning to, and what podman leaves out.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
};

use coffer_replay::{Bench, config, finish, until};
use serde_json::{Value, json};

/// Descriptors of a process that are the caller's leaked file.
fn leaked(bench: &Bench, pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let ours = entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|to| to == bench.leaked()));
    let mut numbers: Vec<i32> =
        ours.map(|entry| entry.file_name().to_str().unwrap().parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

#[test]
fn what_the_caller_has_open_reaches_no_stub_and_no_vmm() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"] });
    fs::write(bench.path("process"), process.to_string()).unwrap();
    let mut exec = bench.command_of_conmon(&["exec", "--pid-file"]);
    exec.arg(bench.path("e.pid")).arg("--process").arg(bench.path("process")).args(["--detach", "c"]);
    let mut exec = exec.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(finish(&mut exec), 0);
    // One in the foreground has them itself, or this test would show nothing.
    let mut own = bench.command_of_conmon(&["exec", "c", "sleep", "1000"]).spawn().unwrap();
    until(|| leaked(&bench, own.id() as i32) == [5, 10, 251]);

    let state: Value = serde_json::from_str(&bench.read("state/c/state.json")).unwrap();
    let vmm = state["vmm"]["pid"].as_i64().unwrap() as i32;
    let mut pids = vec![bench.pid("c"), bench.pid("e"), vmm];
    // What they started: here the stand-in's guest with its programs, which has what the VMM has.
    let mut next = 0;
    while next < pids.len() {
        pids.extend(children(pids[next]));
        next += 1;
    }
    assert!(pids.len() >= 6, "{pids:?}");
    for pid in pids {
        assert!(
            leaked(&bench, pid).is_empty(),
            "{}",
            fs::read_to_string(format!("/proc/{pid}/comm")).unwrap()
        );
    }
    own.kill().unwrap();
    own.wait().unwrap();
}

/// The kernel sends the signal when the thread that called ends, which for conmon is conmon.
#[test]
fn stubs_and_vmm_outlive_the_caller_that_create_and_exec_die_with() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo up; exec sleep 1000"]));
    let by_another_thread =
        |call: &(dyn Fn() + Sync)| thread::scope(|scope| scope.spawn(call).join().unwrap());
    by_another_thread(&|| assert_eq!(bench.create("c", &bundle).ok(), ""));
    assert_eq!(bench.status("c"), "created");
    let _ = bench.call(&["start", "c"]).ok();
    until(|| bench.read("c.out") == "up\n");
    by_another_thread(&|| {
        let mut exec = bench.command_of_conmon(&["exec", "--detach", "--pid-file"]);
        exec.arg(bench.path("e.pid")).args(["c", "sleep", "4321"]);
        let exec = exec.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(exec.success());
    });
    until(|| bench.call(&["ps", "c"]).ok().contains("sleep 4321"));
    assert!(fs::read_to_string(format!("/proc/{}/comm", bench.pid("e"))).unwrap().starts_with("coffer"));
    assert_eq!(bench.status("c"), "running");
    // It does die with its caller: `create` that still waits is gone, and what it began is a container that has stopped.
    let mut waits = config(&["true"]);
    let script =
        format!("touch {0}.there; while [ -e {0}.there ]; do sleep 0.01; done", bench.path("hook").display());
    waits["hooks"]["createRuntime"] =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }]);
    let bundle = bench.bundle("d", &waits);
    let mut child = None;
    thread::scope(|scope| {
        let spawn = || {
            let mut create = bench.command_of_conmon(&["create", "--bundle"]);
            create.arg(&bundle).arg("d").stdout(Stdio::null()).stderr(Stdio::null());
            let child = create.spawn().unwrap();
            until(|| bench.path("hook.there").exists());
            child
        };
        child = Some(scope.spawn(spawn).join().unwrap());
    });
    assert_eq!(finish(&mut child.unwrap()), -1, "it is killed");
    bench.wait_stopped("d");
    fs::remove_file(bench.path("hook.there")).unwrap();
}

/// podman says nothing of a place for states.
#[test]
fn a_life_without_root_is_in_run_coffer() {
    let bench = Bench::by_default_root();
    assert_eq!(bench.root().to_str(), Some("/run/coffer"));
    assert!(!bench.root().exists());
    bench.start("c", &config(&["sh", "-c", "echo out; exit 42"]));
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "out\n");
    assert!(bench.root().join("c/state.json").exists());
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
    assert!(!bench.command(&["state", "c"]).get_args().any(|word| word == "--root"));
    // The host's own directory has nothing of it.
    let host = Command::new("nsenter").args(["-t", "1", "-m", "ls", "/run/coffer"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&host.stdout).lines().any(|id| id == "c"));
}
