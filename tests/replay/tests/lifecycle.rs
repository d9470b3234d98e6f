//! The calls of podman 4.3.1 and conmon 2.1.6 for a container's life, as they were recorded.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use coffer_replay::{Bench, config, copy_busybox, until};
use serde_json::json;

#[test]
fn a_container_goes_from_created_to_running_to_stopped_to_gone() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo out; echo err >&2; exit 42"]));
    assert_eq!(bench.create("c", &bundle).ok(), "");
    let state = bench.state("c").unwrap();
    let pid = bench.pid("c");
    assert_eq!(
        (&state["ociVersion"], &state["id"], &state["status"], &state["pid"], &state["bundle"]),
        (&json!("1.0.2-dev"), &json!("c"), &json!("created"), &json!(pid), &json!(bundle))
    );
    assert_eq!(state["annotations"], json!({ "io.container.manager": "libpod" }));
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    assert_eq!(bench.state("c").unwrap()["pid"], 0);
    assert_eq!((bench.read("c.out"), bench.read("c.err")), ("out\n".into(), "err\n".into()));
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    assert!(bench.state("c").unwrap_err().contains("container does not exist"));
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
    // podman says it twice at times.
    let _ = bench.call(&["delete", "--force", "c"]).ok();
}

#[test]
fn root_and_installation_may_be_named_from_where_the_caller_is() {
    let bench = Bench::new();
    let _ = bench.bundle("c", &config(&["sh", "-c", "echo it runs; sleep 1000"]));
    let call = |words: &[&str]| {
        let mut command = bench.command(&["--root", "state"]);
        command.args(words).env("COFFER_HOME", "home").current_dir(bench.path(""));
        command.stdout(fs::File::create(bench.path("out")).unwrap());
        let stderr = fs::File::create(bench.path("err")).unwrap();
        let code = coffer_replay::finish(&mut command.stderr(stderr).spawn().unwrap());
        assert_eq!(code, 0, "{words:?}: {}", bench.read("err"));
    };
    call(&["run", "--detach", "--bundle", "c", "c"]);
    until(|| bench.read("out") == "it runs\n");
    assert_eq!(bench.status("c"), "running");
    call(&["delete", "--force", "c"]);
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

/// In a namespace of processes of its own it would be that one's first, which such a signal does not end.
#[test]
fn a_realtime_signal_ends_a_container_like_any_other() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", "kill -40 $$; sleep 1000"]);
    config["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "pid");
    let bundle = bench.bundle("c", &config);
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
}

/// The specification has it refused; runc ends it, and its callers count on that.
#[test]
fn a_created_container_can_be_deleted_and_a_running_one_cannot() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sleep", "1000"]));
    let _ = bench.create("c", &bundle).ok();
    assert_eq!(bench.call(&["delete", "c"]).ok(), "");
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    assert!(bench.call(&["delete", "c"]).failed(1).contains("that is not stopped: running"));
    let _ = bench.call(&["delete", "--force", "c"]).ok();
}

/// As under runc, whose `init` ends: podman's `init` and `stop` need not wait for SIGKILL. By the command, and by the process on the host.
#[test]
fn a_created_container_ends_with_the_signals_that_end_runcs() {
    let bench = Bench::new();
    for (signal, wanted) in [("TERM", 143), ("INT", 130), ("HUP", 129), ("QUIT", 131), ("ABRT", 134)] {
        for shares_processes in [false, true] {
            let mut config = config(&["sleep", "1000"]);
            if shares_processes {
                config["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "pid");
            }
            let bundle = bench.bundle("c", &config);
            assert_eq!(
                ended(&bench, &bundle, |_| {
                    let _ = bench.call(&["kill", "c", signal]).ok();
                }),
                wanted,
                "{signal} {shares_processes}"
            );
        }
    }
    let bundle = bench.bundle("c", &config(&["sleep", "1000"]));
    // SAFETY: signals a process of this test's own.
    let of_stub = |pid: i32| assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    assert_eq!(ended(&bench, &bundle, of_stub), 143);
    // Others it outlives.
    let _ = bench.create("c", &bundle).ok();
    for signal in ["USR1", "CHLD", "WINCH", "40"] {
        let _ = bench.call(&["kill", "c", signal]).ok();
    }
    let _ = bench.call(&["start", "c"]).ok();
    assert_eq!(bench.status("c"), "running");
}

/// Creates a container as this process's descendant, has it signalled, and waits for its end; the exit code of its process on the host.
fn ended(bench: &Bench, bundle: &Path, signal: impl FnOnce(i32)) -> i32 {
    // SAFETY: has descendants that lose their parents become this process's children.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, 0);
    let _ = bench.create("c", bundle).ok();
    let (pid, mut status) = (bench.pid("c"), 0);
    assert_eq!(bench.status("c"), "created");
    signal(pid);
    until(|| {
        // SAFETY: the pointer is to an int that outlives the call.
        unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) == pid }
    });
    let _ = bench.call(&["delete", "c"]).ok();
    assert!(libc::WIFEXITED(status), "{status}");
    libc::WEXITSTATUS(status)
}

/// Engines know these words, and no others: containerd takes the container for stopped then.
#[test]
fn a_signal_that_comes_with_the_end_of_the_vm_finds_nothing_that_runs() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let stub = coffer::pid::Pid::of(bench.pid("c")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&bench.read("state/c/state.json")).unwrap();
    let vmm = coffer::pid::Pid::of(state["vmm"]["pid"].as_i64().unwrap() as i32).unwrap();
    // The stub has not seen yet that the VM has ended.
    stub.signal(libc::SIGSTOP);
    vmm.signal(libc::SIGKILL);
    until(|| !vmm.is_alive());
    assert_eq!(bench.status("c"), "running");
    let said = bench.call(&["kill", "c", "TERM"]).failed(1);
    assert!(said.contains("container not running"), "{said}");
    let _ = bench.call(&["kill", "--all", "c", "TERM"]).ok();
    stub.signal(libc::SIGCONT);
    bench.wait_stopped("c");
}

/// A process called conmon that makes and starts a container and then waits.
fn conmon(bench: &Bench, id: &str, bundle: &Path) -> Child {
    let program = bench.path("conmon");
    if !program.exists() {
        copy_busybox(&program);
    }
    let create = bench.command(&["create", "--bundle", bundle.to_str().unwrap(), "--pid-file"]);
    let words: Vec<&str> =
        std::iter::once(create.get_program()).chain(create.get_args()).map(|w| w.to_str().unwrap()).collect();
    let pid_file = bench.path(&format!("{id}.pid"));
    let script = format!("{} {} {id}; sleep 1000", words.join(" "), pid_file.display());
    let mut command = Command::new(&program);
    command.arg0("sh").args(["-c", &script]).env_clear().env("COFFER_HOME", bench.path("home"));
    command.env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    until(|| pid_file.exists());
    let _ = bench.call(&["start", id]).ok();
    fs::remove_file(pid_file).unwrap();
    child
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// podman 4.3.1 calls `kill ID 9` for `rm -f`; when it then finds no conmon it does not call `delete`.
#[test]
fn a_container_whose_conmon_was_killed_is_gone_once_it_is_killed() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sleep", "1000"]));
    let alive = conmon(&bench, "c", &bundle);
    let _ = bench.call(&["kill", "c", "9"]).ok();
    bench.wait_stopped("c");
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    end(alive);
    end(conmon(&bench, "c", &bundle));
    // It lives on, as under runc, and takes other signals.
    let _ = bench.call(&["kill", "c", "28"]).ok();
    assert_eq!(bench.status("c"), "running");
    let _ = bench.call(&["kill", "c", "9"]).ok();
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

#[test]
fn an_id_can_be_used_again_when_its_conmon_was_killed_and_it_has_stopped() {
    let bench = Bench::new();
    let bundle =
        bench.bundle("c", &config(&["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]));
    end(conmon(&bench, "c", &bundle));
    assert!(bench.create("c", &bundle).failed(1).contains("already exists"));
    let _ = bench.call(&["kill", "c", "15"]).ok();
    bench.wait_stopped("c");
    end(conmon(&bench, "c", &bundle));
    assert_eq!(bench.status("c"), "running");
}

/// A `create` whose hook waits until it is told to go on, or until the bench is gone; the child, and the file that tells it.
fn create_that_waits(bench: &Bench) -> (Child, std::path::PathBuf) {
    let mut config = config(&["echo", "ran"]);
    let place = bench.path("hook");
    let script = format!(
        "touch {0}.there; while [ -e {0}.there ] && [ ! -e {0}.go ]; do sleep 0.01; done",
        place.display()
    );
    let env = json!(["PATH=/usr/bin:/bin"]);
    config["hooks"]["createRuntime"] =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": env }]);
    let bundle = bench.bundle("c", &config);
    let mut command = bench.command(&["create", "-b"]);
    command.arg(bundle).arg("c").stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    until(|| bench.path("hook.there").exists());
    (child, bench.path("hook.go"))
}

/// A caller that reads create's stdout to its end reads the container's, and cannot wait for create before it calls start.
#[test]
fn a_start_that_comes_before_create_has_returned_waits_for_it() {
    let bench = Bench::new();
    let (create, go) = create_that_waits(&bench);
    assert_eq!(bench.status("c"), "creating");
    assert!(bench.call(&["delete", "c"]).failed(1).contains("that is not stopped: creating"));
    assert!(bench.call(&["exec", "c", "true"]).failed(255).contains("being created"));
    let mut start = bench.command(&["start", "c"]).spawn().unwrap();
    fs::write(go, "").unwrap();
    assert_eq!(coffer_replay::finish(&mut start), 0);
    let output = create.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success());
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("ran\n".into(), String::new()));
    bench.wait_stopped("c");
}

#[test]
fn a_container_whose_create_was_killed_has_stopped() {
    let bench = Bench::new();
    let (create, go) = create_that_waits(&bench);
    end(create);
    bench.wait_stopped("c");
    assert!(bench.call(&["start", "c"]).failed(1).contains("cannot start a container that has stopped"));
    let _ = bench.call(&["delete", "c"]).ok();
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
    fs::write(go, "").unwrap();
}

/// The median of five, since a machine that does much else may delay one or two.
#[test]
fn a_stop_is_under_a_second_when_the_workload_handles_it() {
    let bench = Bench::new();
    let script = "trap 'echo asked; exit 5' TERM; echo ready; sleep 1000 & wait";
    let mut took = Vec::new();
    for _ in 0..5 {
        bench.start("c", &config(&["sh", "-c", script]));
        until(|| bench.read("c.out") == "ready\n");
        // As podman does it: a signal, and then whoever waits for the process sees its end.
        let (pid, began) = (bench.pid("c"), Instant::now());
        let stub = coffer::pid::Pid::of(pid).unwrap();
        let _ = bench.call(&["kill", "c", "15"]).ok();
        assert!(stub.wait(coffer_replay::PATIENCE));
        took.push(began.elapsed());
        assert_eq!(bench.read("c.out"), "ready\nasked\n");
        let _ = bench.call(&["delete", "c"]).ok();
    }
    took.sort_unstable();
    assert!(took[2] < Duration::from_secs(1), "{took:?}");
}

#[test]
fn a_stub_has_no_rights_left() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let pid_file = bench.path("exec.pid");
    let words = ["exec", "--detach", "--pid-file", pid_file.to_str().unwrap(), "c", "sleep", "1000"];
    let mut exec = bench.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(coffer_replay::finish(&mut exec), 0);
    let further: i32 = bench.read("exec.pid").parse().unwrap();
    for pid in [bench.pid("c"), further] {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            line.unwrap_or_else(|| panic!("no {name}: {status}")).to_owned()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set} of {pid}");
        }
        assert_eq!(field("NoNewPrivs"), "1", "{pid}");
    }
}

/// As the process of a container has it under runc; the guest's memory is the VMM's.
#[test]
fn the_hosts_processes_have_the_containers_oom_score_adj() {
    let bench = Bench::new();
    let score =
        |pid: i32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    let own = score(std::process::id() as i32);
    let mut with = config(&["sleep", "1000"]);
    with["process"]["oomScoreAdj"] = json!(500);
    bench.start("c", &with);
    bench.start("d", &config(&["sleep", "1000"]));
    let vmm = |id: &str| {
        let state: serde_json::Value =
            serde_json::from_str(&bench.read(&format!("state/{id}/state.json"))).unwrap();
        state["vmm"]["pid"].as_i64().unwrap() as i32
    };
    let scores = |id: &str| [score(bench.pid(id)), score(vmm(id))];
    assert_eq!(scores("c"), ["500", "500"]);
    assert_eq!(scores("d"), [own.as_str(), own.as_str()]);
    // A further process has the container's, whatever its own says.
    let pid_file = bench.path("exec.pid");
    let words = ["exec", "--detach", "--pid-file", pid_file.to_str().unwrap(), "c", "sleep", "1000"];
    let mut exec = bench.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(coffer_replay::finish(&mut exec), 0);
    assert_eq!(score(bench.pid("exec")), "500");
    // A pod's further container has its own, and leaves the VM's as it is.
    let mut member = config(&["sleep", "1000"]);
    member["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!("c");
    member["process"]["oomScoreAdj"] = json!(700);
    bench.start("e", &member);
    assert_eq!((score(bench.pid("e")), score(vmm("c"))), ("700".into(), "500".into()));
}
