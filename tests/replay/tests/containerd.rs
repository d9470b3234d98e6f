//! The calls of containerd 1.6.20's shim (`containerd-shim-runc-v2`), as they were recorded under `ctr`.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use coffer_replay::{Bench, PATIENCE, config, until};
use serde_json::json;

/// A call as the shim makes them: in the bundle, with the log there and the daemon's environment.
fn shim(bench: &Bench, bundle: &Path, words: &[&str]) -> Command {
    let mut command = bench.command(&["--log"]);
    command.arg(bundle.join("log.json")).args(["--log-format", "json"]).args(words).current_dir(bundle);
    command.env("TTRPC_ADDRESS", "/run/containerd/containerd.sock.ttrpc").env("GOMAXPROCS", "4");
    command
}

/// What a call says on a pipe that is its stdout and its stderr, once nobody has that open any more.
#[track_caller]
fn whole_output(mut command: Command) -> String {
    let (mut reader, writer) = std::io::pipe().unwrap();
    command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        let _ = reader.read_to_string(&mut text);
        let _ = tell.send(text);
    });
    let text = told.recv_timeout(PATIENCE).expect("somebody keeps the caller's stdout open");
    assert!(child.wait().unwrap().success(), "{text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A container that `create` made, by the shim's words.
#[track_caller]
fn created(bench: &Bench, config: &serde_json::Value, more: &[&str]) -> PathBuf {
    let bundle = bench.bundle("c", config);
    let pid_file = bundle.join("init.pid");
    let mut words = vec!["create", "--bundle", text(&bundle), "--pid-file", text(&pid_file)];
    words.extend_from_slice(more);
    words.push("c");
    assert_eq!(whole_output(shim(bench, &bundle, &words)), "");
    bundle
}

/// With a terminal the shim gives `create` and `exec` one pipe for what they say, and reads it to the end before it goes on: the stubs
/// that they leave must not have it.
#[test]
fn with_a_terminal_nobody_keeps_what_create_and_exec_say() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["process"]["terminal"] = json!(true);
    let socket = bench.path("pty.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // The shim takes the terminal from there and keeps it; a connection is as good for this.
    let taken = thread::spawn(move || [listener.accept().unwrap(), listener.accept().unwrap()]);
    let bundle = created(&bench, &config, &["--console-socket", text(&socket)]);
    assert_eq!(whole_output(shim(&bench, &bundle, &["start", "c"])), "");
    let (process, pid_file) = (bundle.join("process"), bundle.join("e.pid"));
    let exec = json!({ "terminal": true, "user": { "uid": 0, "gid": 0 }, "args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"] });
    fs::write(&process, exec.to_string()).unwrap();
    let words = [
        ["exec", "--process", text(&process)].as_slice(),
        &["--console-socket", text(&socket), "--detach", "--pid-file", text(&pid_file), "c"],
    ]
    .concat();
    assert_eq!(whole_output(shim(&bench, &bundle, &words)), "");
    // Without the other side the terminals would hang up, and what runs in them end.
    let _kept = taken.join().unwrap();
    // What they have instead is the terminal.
    for pid in [bundle.join("init.pid"), pid_file] {
        let pid = fs::read_to_string(pid).unwrap();
        for stdio in 0..3 {
            let link = fs::read_link(format!("/proc/{pid}/fd/{stdio}")).unwrap();
            assert!(link.starts_with("/dev/pts"), "{stdio}: {}", link.display());
        }
    }
    assert_eq!(whole_output(shim(&bench, &bundle, &["kill", "c", "9"])), "");
    until(|| bench.status("c") == "stopped");
    assert_eq!(whole_output(shim(&bench, &bundle, &["delete", "c"])), "");
}

/// `create` and `exec` without a terminal have three pipes, everything else one for all that it says. Descriptor 3 is the shim's own.
#[test]
fn a_life_by_the_shims_words() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo begun; cat; echo err >&2; sleep 1000"]));
    let pid_file = bundle.join("init.pid");
    let (out, err) = (bench.path("out"), bench.path("err"));
    let (input, mut typed) = std::io::pipe().unwrap();
    let mut create =
        shim(&bench, &bundle, &["create", "--bundle", text(&bundle), "--pid-file", text(&pid_file), "c"]);
    create.stdin(input).stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
    assert!(create.status().unwrap().success());
    drop(create);
    assert_eq!(whole_output(shim(&bench, &bundle, &["start", "c"])), "");
    typed.write_all(b"typed\n").unwrap();
    drop(typed);
    until(|| bench.read("err") == "err\n");
    assert_eq!(bench.read("out"), "begun\ntyped\n");

    let process = bundle.join("runc-process");
    let what = json!({ "user": { "uid": 0, "gid": 0, "additionalGids": [0] }, "args": ["sh", "-c", "pwd; cat"], "cwd": "/srv", "env": ["PATH=/bin"] });
    fs::write(&process, what.to_string()).unwrap();
    let exec_pid = bundle.join("e1.pid");
    let words = ["exec", "--process", text(&process), "--detach", "--pid-file", text(&exec_pid), "c"];
    let mut exec = shim(&bench, &bundle, &words);
    let (mut said, says) = std::io::pipe().unwrap();
    exec.stdin(fs::File::open(bundle.join("runc-process")).unwrap())
        .stdout(says.try_clone().unwrap())
        .stderr(says);
    assert!(exec.status().unwrap().success());
    drop(exec);
    assert!(fs::read_to_string(&exec_pid).unwrap().parse::<i32>().unwrap() > 1);
    let mut all = String::new();
    said.read_to_string(&mut all).unwrap();
    assert_eq!(all, format!("/srv\n{what}"));

    let pid = fs::read_to_string(&pid_file).unwrap();
    // The stub of exec ends right after its output has.
    until(|| {
        let listed = whole_output(shim(&bench, &bundle, &["ps", "--format", "json", "c"]));
        serde_json::from_str::<Vec<i32>>(&listed).unwrap() == [pid.parse::<i32>().unwrap()]
    });
    assert_eq!(whole_output(shim(&bench, &bundle, &["pause", "c"])), "");
    assert_eq!(bench.status("c"), "paused");
    assert_eq!(whole_output(shim(&bench, &bundle, &["resume", "c"])), "");
    assert_eq!(whole_output(shim(&bench, &bundle, &["kill", "c", "9"])), "");
    bench.wait_stopped("c");
    // In a pod with one namespace of processes it kills what may be left, twice.
    for _ in 0..2 {
        assert_eq!(whole_output(shim(&bench, &bundle, &["kill", "--all", "c", "9"])), "");
    }
    // The shim deletes, and the program that cleans up after it does once more.
    assert_eq!(whole_output(shim(&bench, &bundle, &["delete", "c"])), "");
    assert_eq!(whole_output(shim(&bench, &bundle, &["delete", "--force", "c"])), "");
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

/// What it shows is the last error of the log.
#[test]
fn a_create_that_fails_says_why_in_the_log_and_leaves_nothing() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["no-such-program"]));
    let pid_file = bundle.join("init.pid");
    let words = ["create", "--bundle", text(&bundle), "--pid-file", text(&pid_file), "c"];
    let output = shim(&bench, &bundle, &words).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = fs::read_to_string(bundle.join("log.json")).unwrap();
    let error = log
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
        .rfind(|l| l["level"] == "error");
    let message = error.unwrap()["msg"].as_str().unwrap().to_owned();
    assert!(message.contains("executable file not found in"), "{message}");
    assert!(!pid_file.exists());
    assert_eq!(whole_output(shim(&bench, &bundle, &["delete", "--force", "c"])), "");
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}
