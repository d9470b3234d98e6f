//! CRI-O's calls, in its words: those that its conmon makes, and its own. They are from the sources of CRI-O's `runtime_oci.go` and of
//! conmon's `configure_runtime_args`, not recorded. `create` with `--systemd-cgroup` wants a systemd: e2e `systemd`.

use std::{
    fs,
    io::Write,
    os::unix::net::UnixListener,
    process::{Command, Stdio},
    thread,
};

use coffer_replay::{Bench, Gave, config, finish, gave, until};
use serde_json::{Value, json};

const TRAPS: &str = "trap 'echo asked; exit 3' TERM; echo up; while :; do sleep 0.05; done";

/// A configuration with CRI-O's annotations; `sandbox` is whose member it is, if anybody's.
fn of_crio(args: &[&str], sandbox: Option<(&Bench, &str)>) -> Value {
    let mut config = config(args);
    config["annotations"] = json!({
        "io.container.manager": "cri-o",
        "io.kubernetes.cri-o.ContainerType": if sandbox.is_some() { "container" } else { "sandbox" },
        "io.kubernetes.cri-o.SandboxID": sandbox.map_or("pod", |(_, id)| id),
    });
    if let Some((bench, id)) = sandbox {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        for (name, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
            let namespace = namespaces.iter_mut().find(|n| n["type"] == name).unwrap();
            namespace["path"] = json!(format!("/proc/{}/ns/{file}", bench.pid(id)));
        }
    }
    config
}

/// A call of conmon's: `--runtime-arg`s come first, CRI-O's being `--root=DIRECTORY`, and there is no log.
fn conmon(bench: &Bench, words: &[&str]) -> Command {
    let root = format!("--root={}", bench.root().display());
    bench.by_conmon(&bench.call_of(&[&[root.as_str()], words].concat()))
}

/// A call of CRI-O's own, with its cgroup manager being systemd's, which it then says in each.
fn own(bench: &Bench, words: &[&str]) -> Command {
    let root = bench.root();
    bench.call_of(&[&["--root", root.to_str().unwrap(), "--systemd-cgroup"], words].concat())
}

fn call(bench: &Bench, words: &[&str]) -> Gave {
    gave(&mut own(bench, words))
}

/// `create` by conmon, with what the program says in `ID.out`.
#[track_caller]
fn create(bench: &Bench, id: &str, config: &Value, more: &[&str]) {
    let (bundle, pid_file) = (bench.bundle(id, config), bench.path(&format!("{id}.pid")));
    let words = ["create", "--bundle", bundle.to_str().unwrap(), "--pid-file", pid_file.to_str().unwrap()];
    let mut create = conmon(bench, &[&words, more, &[id]].concat());
    let out = fs::File::create(bench.path(&format!("{id}.out"))).unwrap();
    let mut child = create.stderr(out.try_clone().unwrap()).stdout(out).spawn().unwrap();
    assert_eq!(finish(&mut child), 0, "{}", bench.read(&format!("{id}.out")));
}

#[track_caller]
fn status(bench: &Bench, id: &str) -> String {
    let state: Value = serde_json::from_str(&call(bench, &["state", id]).ok()).unwrap();
    assert!(state["created"].as_str().is_some_and(|time| time.ends_with('Z')), "{state}");
    assert_eq!(state["id"], id);
    if state["status"] != "stopped" {
        assert_eq!(state["pid"], bench.pid(id));
    }
    state["status"].as_str().unwrap().to_owned()
}

fn stopped(bench: &Bench, id: &str) {
    until(|| status(bench, id) == "stopped");
}

#[test]
fn a_sandbox_and_its_container_live_and_end_by_its_calls() {
    let bench = Bench::new();
    create(&bench, "pod", &of_crio(&["sh", "-c", TRAPS], None), &[]);
    assert_eq!(status(&bench, "pod"), "created");
    assert_eq!(call(&bench, &["start", "pod"]).ok(), "");
    create(&bench, "c", &of_crio(&["sh", "-c", TRAPS], Some((&bench, "pod"))), &[]);
    assert_eq!(call(&bench, &["start", "c"]).ok(), "");
    until(|| bench.read("c.out") == "up\n" && bench.read("pod.out") == "up\n");
    assert_eq!((status(&bench, "pod"), status(&bench, "c")), ("running".into(), "running".into()));
    // One VM: both are processes of its init.
    let vmm = |id: &str| -> Value {
        serde_json::from_str::<Value>(&bench.read(&format!("state/{id}/state.json"))).unwrap()["vmm"].clone()
    };
    assert_eq!(vmm("c"), vmm("pod"));

    // `UpdateContainer`: what the kubelet changes, on standard input. This host may have no controllers to set, and the guest has its own.
    let root = bench.root();
    let mut update = bench.call_of(&["--root", root.to_str().unwrap(), "update", "--resources", "-", "c"]);
    let mut child =
        update.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let resources = json!({ "memory": {}, "cpu": {}, "pids": null });
    child.stdin.take().unwrap().write_all(resources.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    // `ExecSync`: by another conmon.
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", "echo synced; exit 7"], "cwd": "/", "env": ["PATH=/bin"] });
    fs::write(bench.path("process"), process.to_string()).unwrap();
    let (pid_file, file) = (bench.path("e.pid"), bench.path("process"));
    let words = ["exec", "--pid-file", pid_file.to_str().unwrap(), "--process", file.to_str().unwrap()];
    let mut exec = conmon(&bench, &[&words[..], &["--detach", "c"]].concat());
    let out = fs::File::create(bench.path("e.out")).unwrap();
    let mut child = exec.stderr(out.try_clone().unwrap()).stdout(out).spawn().unwrap();
    assert_eq!(finish(&mut child), 0, "{}", bench.read("e.out"));
    until(|| bench.read("e.out") == "synced\n");
    // A streaming `Exec`: in the foreground, with pipes.
    let gave = call(&bench, &["exec", "--process", file.to_str().unwrap(), "c"]);
    assert_eq!((gave.code, gave.out.as_str()), (7, "synced\n"));

    // `StopContainer` with its patience, and without; what is removed again is no error.
    assert_eq!(call(&bench, &["kill", "c", "SIGTERM"]).ok(), "");
    stopped(&bench, "c");
    assert_eq!(bench.read("c.out"), "up\nasked\n");
    assert_eq!(call(&bench, &["delete", "--force", "c"]).ok(), "");
    assert!(call(&bench, &["state", "c"]).failed(1).contains("does not exist"));
    assert_eq!(call(&bench, &["kill", "pod", "KILL"]).ok(), "");
    stopped(&bench, "pod");
    assert_eq!(bench.read("pod.out"), "up\n");
    // It asks once more for what has ended already, and takes this for the answer.
    assert!(call(&bench, &["kill", "pod", "KILL"]).failed(1).contains("not running"));
    for _ in 0..2 {
        assert_eq!(call(&bench, &["delete", "--force", "pod"]).ok(), "");
    }
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

/// `crictl stopp` of a pod whose container goes on: every process at once, by number.
#[test]
fn kill_all_by_number_and_delete_by_force_of_what_runs() {
    let bench = Bench::new();
    create(&bench, "pod", &of_crio(&["sh", "-c", "trap '' TERM; sleep 1000 & echo up; wait"], None), &[]);
    assert_eq!(call(&bench, &["start", "pod"]).ok(), "");
    until(|| bench.read("pod.out") == "up\n");
    assert_eq!(call(&bench, &["kill", "-a", "pod", "9"]).ok(), "");
    stopped(&bench, "pod");
    assert_eq!(call(&bench, &["delete", "--force", "pod"]).ok(), "");
    create(&bench, "other", &of_crio(&["sleep", "1000"], None), &[]);
    assert_eq!(call(&bench, &["start", "other"]).ok(), "");
    assert_eq!(call(&bench, &["delete", "--force", "other"]).ok(), "");
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

#[test]
fn with_a_terminal_conmon_gets_it_by_its_socket() {
    let bench = Bench::new();
    let socket = bench.path("console");
    let listener = UnixListener::bind(&socket).unwrap();
    let taken = thread::spawn(move || listener.accept().unwrap());
    let mut config = of_crio(&["sh", "-c", "test -t 0 && sleep 1000"], None);
    config["process"]["terminal"] = json!(true);
    create(&bench, "pod", &config, &["--console-socket", socket.to_str().unwrap()]);
    let _terminal = taken.join().unwrap();
    assert_eq!(call(&bench, &["start", "pod"]).ok(), "");
    assert_eq!(status(&bench, "pod"), "running");
    assert_eq!(call(&bench, &["kill", "pod", "KILL"]).ok(), "");
    stopped(&bench, "pod");
}
