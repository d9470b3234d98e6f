//! The six hooks: where each runs, with which state, and what its failure does.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
};

use coffer_replay::{Bench, config, until};
use serde_json::{Value, json};

/// A hook that writes its stdin and namespaces to a file.
fn hook(path: &Path, exit: i32) -> Value {
    let script = format!(
        "cat > {0}.state; readlink /proc/self/ns/mnt /proc/self/ns/uts > {0}.ns; hostname > {0}.host; echo \"$A\" > {0}.env; exit {exit}",
        path.display()
    );
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b", "PATH=/usr/bin:/bin"] })
}

#[test]
fn each_hook_runs_where_the_specification_says() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    let names = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
    for name in names {
        config["hooks"][name] = json!([hook(&bench.path(name), 0)]);
    }
    config["hooks"]["startContainer"] = json!([hook(Path::new("/srv/startContainer"), 0)]);
    let bundle = bench.bundle("c", &config);
    let state = |name: &str| -> Value {
        serde_json::from_str(&bench.read(&format!("{name}.state"))).unwrap_or_else(|e| panic!("{name}: {e}"))
    };
    let own = fs::read_link("/proc/self/ns/mnt").unwrap().display().to_string();
    let _ = bench.create("c", &bundle).ok();
    let pid = bench.pid("c");
    for name in ["prestart", "createRuntime", "createContainer"] {
        let state = state(name);
        assert_eq!(
            (&state["id"], &state["status"], &state["pid"]),
            (&json!("c"), &json!("created"), &json!(pid)),
            "{name}"
        );
        assert_eq!(state["bundle"], json!(bundle), "{name}");
        assert_eq!(bench.read(&format!("{name}.env")), "b\n", "{name}");
    }
    // On the host, and in the container's own namespaces with the host's files.
    assert_eq!(bench.read("createRuntime.ns").lines().next(), Some(own.as_str()));
    let inside = bench.read("createContainer.ns");
    assert_eq!(
        inside.lines().nth(1).unwrap(),
        fs::read_link(format!("/proc/{pid}/ns/uts")).unwrap().display().to_string()
    );
    assert_eq!(
        inside.lines().next().unwrap(),
        fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap().display().to_string()
    );
    assert_eq!(bench.read("createContainer.host"), "bench\n");
    assert!(
        !bench.path("poststart.state").exists() && !bundle.join("rootfs/srv/startContainer.state").exists()
    );
    let _ = bench.call(&["start", "c"]).ok();
    // In the container: the path is its own.
    let text = fs::read_to_string(bundle.join("rootfs/srv/startContainer.state")).unwrap();
    let started: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&started["id"], &started["status"]), (&json!("c"), &json!("created")));
    assert_eq!(state("poststart")["status"], "running");
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    assert_eq!(state("poststop")["status"], "stopped");
}

#[test]
fn a_hook_that_fails_takes_create_down_with_it() {
    for name in ["prestart", "createRuntime", "createContainer"] {
        let bench = Bench::new();
        let mut config = config(&["true"]);
        let script = "echo it is the hook >&2; exit 3";
        config["hooks"][name] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
        let bundle = bench.bundle("c", &config);
        let said = bench.create("c", &bundle).failed(1);
        assert!(said.contains("hook failed with exit code 3: /bin/sh: it is the hook"), "{name}: {said}");
        assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0, "{name}");
    }
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["hooks"]["startContainer"] = json!([{ "path": "/bin/false" }]);
    let bundle = bench.bundle("c", &config);
    let _ = bench.create("c", &bundle).ok();
    assert!(bench.call(&["start", "c"]).failed(1).contains("startContainer hook /bin/false"));
    until(|| bench.status("c") == "stopped");
}

#[test]
fn a_hook_without_an_environment_has_its_callers() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    let to = |name: &str| bench.path(name).display().to_string();
    let own = format!("echo $PATH > {}", to("own"));
    config["hooks"]["createRuntime"] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", own] }]);
    let none = format!("/usr/bin/env > {}", to("none"));
    config["hooks"]["createContainer"] =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", none], "env": [] }]);
    config["process"]["env"] = json!(["PATH=/bin", "ONE=two"]);
    config["hooks"]["startContainer"] =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo $ONE > /srv/said"] }]);
    let bundle = bench.bundle("c", &config);
    let _ = bench.create("c", &bundle).ok();
    assert_eq!(bench.read("own"), "/usr/bin:/bin\n");
    assert!(!bench.read("none").contains("PATH=/usr/bin:/bin"), "{}", bench.read("none"));
    let _ = bench.call(&["start", "c"]).ok();
    assert_eq!(fs::read_to_string(bundle.join("rootfs/srv/said")).unwrap(), "two\n");
}

#[test]
fn every_poststop_hook_runs_and_those_that_fail_are_named() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    let second = format!("echo ran > {}", bench.path("second").display());
    config["hooks"]["poststop"] =
        json!([{ "path": "/bin/false" }, { "path": "/bin/sh", "args": ["sh", "-c", second] }]);
    bench.start("c", &config);
    bench.wait_stopped("c");
    let gave = bench.call(&["delete", "c"]);
    assert_eq!((gave.code, bench.read("second").as_str()), (0, "ran\n"), "{}", gave.err);
    assert!(gave.err.contains("warning: poststop hook failed with exit code 1: /bin/false"), "{}", gave.err);
}

#[test]
fn hooks_run_in_the_specifications_order() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    for name in ["createContainer", "createRuntime", "poststart", "poststop", "prestart"] {
        let script = format!("cat > /dev/null; echo {name} >> {}", bench.path("order").display());
        let env = json!(["PATH=/usr/bin:/bin"]);
        config["hooks"][name] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": env }]);
    }
    let bundle = bench.bundle("c", &config);
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    let _ = bench.call(&["delete", "c"]).ok();
    let order = bench.read("order");
    let order: Vec<&str> = order.lines().collect();
    assert_eq!(order, ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]);
}

#[test]
fn a_poststart_hook_that_fails_stops_the_container() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["hooks"]["poststart"] = json!([{ "path": "/bin/false" }]);
    let bundle = bench.bundle("c", &config);
    let _ = bench.create("c", &bundle).ok();
    assert!(bench.call(&["start", "c"]).failed(1).contains("hook failed with exit code 1: /bin/false"));
    bench.wait_stopped("c");
}

#[test]
fn a_hook_that_does_not_end_is_ended() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    config["hooks"]["createRuntime"] =
        json!([{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }]);
    let bundle = bench.bundle("c", &config);
    assert!(bench.create("c", &bundle).failed(1).contains("timeout of 1 s"));
}

#[test]
fn a_poststop_hook_that_fails_keeps_nothing_else_from_running_and_is_in_the_log() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    let one = |text: &str| {
        let script = format!("{text} >> {}", bench.path("order").display());
        json!({ "path": "/bin/sh", "args": ["sh", "-c", script] })
    };
    config["hooks"]["poststop"] = json!([one("echo first"), { "path": "/bin/false" }, one("echo last")]);
    bench.start("c", &config);
    bench.wait_stopped("c");
    let log = bench.path("delete.log");
    let _ = bench.call(&["--log", log.to_str().unwrap(), "delete", "c"]).ok();
    assert_eq!(bench.read("order"), "first\nlast\n");
    let log = bench.read("delete.log");
    assert!(
        log.contains("level=warning") && log.contains("hook failed with exit code 1: /bin/false"),
        "{log}"
    );
    assert!(bench.state("c").is_err());
}

#[test]
fn a_hook_in_the_container_without_an_environment_has_the_processs() {
    for (env, wanted) in [(None, "of the process"), (Some(json!(["B=hook"])), ""), (Some(json!([])), "")] {
        let bench = Bench::new();
        let mut config = config(&["true"]);
        config["process"]["env"] = json!(["PATH=/bin", "A=of the process"]);
        let mut hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo \"$A\" > /srv/env"] });
        if let Some(env) = env {
            hook["env"] = env;
        }
        config["hooks"]["startContainer"] = json!([hook]);
        bench.start("c", &config);
        assert_eq!(bench.read("c/rootfs/srv/env"), format!("{wanted}\n"));
    }
}

/// `create` in the background, of a container whose hook takes so many seconds; returns once the hook runs.
fn slow_create(bench: &Bench, id: &str, seconds: u32) -> std::process::Child {
    let hook = bench.path("slow");
    fs::write(&hook, format!("#!/bin/sh\ntouch {}\nexec sleep {seconds}\n", bench.path("began").display()))
        .unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = config(&["sleep", "1000"]);
    config["hooks"] = json!({ "createRuntime": [{ "path": hook, "env": ["PATH=/usr/bin:/bin"] }] });
    let bundle = bench.bundle(id, &config);
    let mut command = bench.command(&["create", "--bundle"]);
    let files = ["out", "err"].map(|end| fs::File::create(bench.path(&format!("slow.{end}"))).unwrap());
    let [out, err] = files;
    // SAFETY: changes what the child does upon a signal, which a shell in the background may have told this process to ignore.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGINT, libc::SIG_DFL);
            Ok(())
        });
    }
    let child = command.arg(bundle).arg(id).stdout(out).stderr(err).spawn().unwrap();
    until(|| bench.path("began").exists());
    child
}

#[test]
fn a_signal_while_a_container_is_made_takes_down_what_there_is() {
    let bench = Bench::new();
    for signal in ["TERM", "INT", "HUP"] {
        let _ = fs::remove_file(bench.path("began"));
        let mut child = slow_create(&bench, "c", 1);
        let sent = std::process::Command::new("kill")
            .args([&format!("-{signal}"), &child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
        assert_eq!(coffer_replay::finish(&mut child), 1, "{signal}");
        let said = bench.read("slow.err");
        assert!(said.contains("interrupted by a signal"), "{signal}: {said}");
        assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0, "{signal}");
    }
    bench.start("c", &config(&["sleep", "1000"]));
}

#[test]
fn a_create_whose_container_was_deleted_meanwhile_does_nothing_to_the_next_of_its_id() {
    let bench = Bench::new();
    let mut child = slow_create(&bench, "c", 3);
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    bench.start("c", &config(&["sleep", "1000"]));
    let _ = child.wait().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert_eq!(bench.status("c"), "running");
    assert_eq!(bench.call(&["exec", "c", "echo", "there"]).ok(), "there\n");
}

/// A container whose startContainer hook is this script, in the pod of `beside`, which answers USR1.
fn with_a_hook(bench: &Bench, script: &str) -> PathBuf {
    let waits = "trap 'echo asked' USR1; while :; do sleep 0.1; done";
    bench.start("beside", &config(&["sh", "-c", waits]));
    let mut member = config(&["echo", "program"]);
    member["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!("beside");
    member["hooks"]["startContainer"] =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] }]);
    let bundle = bench.bundle("m", &member);
    let _ = bench.create("m", &bundle).ok();
    bundle
}

#[test]
fn a_hook_in_the_container_holds_nobody_up() {
    let bench = Bench::new();
    // More than a pipe holds.
    let script = "head -c 400000 /dev/zero; until test -e /srv/go; do sleep 0.05; done";
    let bundle = with_a_hook(&bench, script);
    std::thread::scope(|scope| {
        let start = scope.spawn(|| bench.call(&["start", "m"]));
        until(|| bench.read("m.out").len() == 400_000);
        let _ = bench.call(&["kill", "beside", "USR1"]).ok();
        until(|| bench.read("beside.out") == "asked\n");
        assert_eq!(bench.call(&["exec", "beside", "echo", "there"]).ok(), "there\n");
        assert_eq!(bench.call(&["exec", "m", "echo", "here"]).ok(), "here\n");
        // As long as its engine likes.
        let _ = bench.call(&["pause", "m"]).ok();
        fs::write(bundle.join("rootfs/srv/go"), "").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(!start.is_finished());
        let _ = bench.call(&["resume", "m"]).ok();
        let _ = start.join().unwrap().ok();
    });
    bench.wait_stopped("m");
    assert!(bench.read("m.out").ends_with("\0program\n"));
}

#[test]
fn a_container_that_is_killed_during_its_hook_was_not_started() {
    let bench = Bench::new();
    let _ = with_a_hook(&bench, "exec sleep 1000");
    std::thread::scope(|scope| {
        let start = scope.spawn(|| bench.call(&["start", "m"]));
        until(|| bench.call(&["ps", "m"]).ok().contains("sleep 1000"));
        let _ = bench.call(&["kill", "m", "KILL"]).ok();
        let said = start.join().unwrap().failed(1);
        assert!(said.contains("died while it was made"), "{said}");
    });
    bench.wait_stopped("m");
    let _ = bench.call(&["delete", "m"]).ok();
    assert_eq!(bench.call(&["exec", "beside", "echo", "there"]).ok(), "there\n");
}

/// As under runc, whose fifo is gone before its hooks run.
#[test]
fn a_container_that_was_let_go_runs_before_its_start_returns() {
    let bench = Bench::new();
    let bundle = with_a_hook(&bench, "echo hook; until test -e /srv/go; do sleep 0.05; done");
    let mut start = bench.command(&["start", "m"]).spawn().unwrap();
    until(|| bench.read("m.out") == "hook\n");
    assert_eq!(bench.status("m"), "running");
    assert!(bench.call(&["delete", "m"]).failed(1).contains("that is not stopped: running"));
    assert!(bench.call(&["start", "m"]).failed(1).contains("cannot start an already running container"));
    let signal = |signal| {
        // SAFETY: signals a process of this test's own.
        assert_eq!(unsafe { libc::kill(start.id() as i32, signal) }, 0);
    };
    // It ends and is removed before its start has seen the answer.
    signal(libc::SIGSTOP);
    fs::write(bundle.join("rootfs/srv/go"), "").unwrap();
    bench.wait_stopped("m");
    let _ = bench.call(&["delete", "--force", "m"]).ok();
    signal(libc::SIGCONT);
    assert_eq!(coffer_replay::finish(&mut start), 0);
    assert_eq!(bench.read("m.out"), "hook\nprogram\n");
}
