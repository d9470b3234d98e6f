//! Further processes, as podman, containerd and CRI-O add them.

use std::{fs, os::unix::fs::PermissionsExt, process::Stdio};

use coffer_replay::{Bench, config, finish, gave, until};
use serde_json::{Value, json};

fn process(args: &[&str]) -> Value {
    json!({ "user": { "uid": 0, "gid": 0 }, "args": args, "cwd": "/", "env": ["PATH=/bin"] })
}

/// `exec` as conmon calls it for podman: detached, with files for stdio; the stub's exit code cannot be waited for by this test.
fn detached(bench: &Bench, name: &str, process: &Value) -> coffer_replay::Gave {
    fs::write(bench.path(&format!("{name}.json")), process.to_string()).unwrap();
    let mut command = bench.command(&["--log-format=json", "--log"]);
    command.arg(bench.path(&format!("{name}.log"))).arg("exec");
    command.arg("--pid-file").arg(bench.path(&format!("{name}.pid")));
    command.arg("--process").arg(bench.path(&format!("{name}.json"))).args(["--detach", "c"]);
    command.stdout(fs::File::create(bench.path(&format!("{name}.out"))).unwrap());
    command.stderr(fs::File::create(bench.path(&format!("{name}.err"))).unwrap());
    let code = finish(&mut command.spawn().unwrap());
    coffer_replay::Gave { code, out: String::new(), err: bench.read(&format!("{name}.err")) }
}

#[test]
fn a_detached_process_has_its_own_stub_in_the_containers_namespaces() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let _ = detached(
        &bench,
        "e",
        &process(&["sh", "-c", "trap 'echo term; exit 0' TERM; echo up; while :; do sleep 0.05; done"]),
    )
    .ok();
    let (stub, own) = (bench.pid("e"), bench.pid("c"));
    assert_ne!(stub, own);
    for name in ["pid", "net", "ipc", "uts", "mnt"] {
        let of = |pid| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        assert_eq!(of(stub), of(own), "{name}");
        assert_ne!(of(stub), fs::read_link(format!("/proc/self/ns/{name}")).unwrap(), "{name}");
    }
    until(|| bench.read("e.out").lines().count() == 1);
    // containerd and podman signal the pid itself.
    // SAFETY: signals a process of this test's own.
    unsafe { libc::kill(stub, libc::SIGTERM) };
    until(|| bench.read("e.out").contains("term"));
    until(|| {
        !std::path::Path::new(&format!("/proc/{stub}/root")).exists()
            || fs::read_to_string(format!("/proc/{stub}/stat")).map_or(true, |s| s.contains(") Z "))
    });
    assert_eq!(bench.status("c"), "running");
}

/// podman's `top` without options for `ps` shows what the host's /proc has for the process ids that it knows.
#[test]
fn a_stub_is_listed_by_the_command_that_it_stands_for() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000", "1000"]));
    let _ = detached(&bench, "e", &process(&["sh", "-c", "while :; do sleep 0.05; done"])).ok();
    let listed = |name| fs::read_to_string(format!("/proc/{}/cmdline", bench.pid(name))).unwrap();
    // Zeros fill the place of the words that it was started with.
    assert_eq!(listed("c").trim_end_matches('\0'), ["sleep", "1000", "1000"].join("\0"));
    assert_eq!(listed("e").trim_end_matches('\0'), ["sh", "-c", "while :; do sleep 0.05; done"].join("\0"));
    let short = fs::read_to_string(format!("/proc/{}/comm", bench.pid("c"))).unwrap();
    assert!(short.starts_with("coffer"), "{short}");
}

#[test]
fn a_process_that_says_nothing_of_its_mask_has_the_containers() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["process"]["user"]["umask"] = json!(0o724);
    bench.start("c", &config);
    let mut further = process(&["sh", "-c", "umask"]);
    let _ = detached(&bench, "e", &further).ok();
    until(|| bench.read("e.out") == "0724\n");
    further["user"]["umask"] = json!(0o077);
    let _ = detached(&bench, "f", &further).ok();
    until(|| bench.read("f.out") == "0077\n");
}

#[test]
fn a_stub_that_is_killed_takes_its_process_along() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let _ = detached(&bench, "e", &process(&["sleep", "4321"])).ok();
    until(|| bench.call(&["ps", "c"]).ok().contains("sleep 4321"));
    // SAFETY: signals a process of this test's own.
    unsafe { libc::kill(bench.pid("e"), libc::SIGKILL) };
    until(|| !bench.call(&["ps", "c"]).ok().contains("sleep 4321"));
}

#[test]
fn what_cannot_be_executed_writes_no_pid_file() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    for (args, words) in [
        ("no-such", "executable file not found in $PATH"),
        ("/no/such", "no such file or directory"),
        ("/srv/not-executable", "permission denied"),
    ] {
        let said = detached(&bench, "e", &process(&[args])).failed(255);
        assert!(said.contains(words), "{said}");
        assert!(bench.logged("e").contains(words));
        assert!(!bench.path("e.pid").exists());
    }
    let mut wrong = process(&["pwd"]);
    wrong["cwd"] = json!("/etc/passwd");
    assert!(detached(&bench, "e", &wrong).failed(255).contains("cwd"));
    // podman's exit code for these words is 127.
    wrong["cwd"] = json!("/none");
    let said = detached(&bench, "e", &wrong).failed(255);
    let words = "chdir to cwd (\"/none\") set in config.json failed: no such file or directory";
    assert!(said.contains(words), "{said}");
    assert!(bench.logged("e").contains(words));
}

/// Whoever called takes it for one that never ran.
#[test]
fn a_process_of_which_the_caller_cannot_be_told_does_not_stay() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let sleep = ["c", "sleep", "4324"];
    for (flags, said) in [
        (&["exec", "--detach", "--pid-file", "/no/such/directory/pid"][..], "/no/such/directory/pid"),
        (&["exec", "--detach", "--tty", "--console-socket", "/no/such/socket"], "/no/such/socket"),
    ] {
        let mut command = bench.command(&[flags, &sleep].concat());
        command.stdout(Stdio::null()).stderr(fs::File::create(bench.path("said")).unwrap());
        assert_eq!(finish(&mut command.spawn().unwrap()), 255);
        assert!(bench.read("said").contains(said), "{}", bench.read("said"));
        until(|| !bench.call(&["ps", "c"]).ok().contains("sleep 4324"));
    }
    assert_eq!(bench.status("c"), "running");
}

#[test]
fn ps_as_json_has_the_stub_of_every_process() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let bundle = bench.bundle("other", &config(&["sleep", "1000"]));
    let _ = bench.create("other", &bundle).ok();
    for name in ["e", "f"] {
        let _ = detached(&bench, name, &process(&["sleep", "1000"])).ok();
    }
    // As `podman top` does, whose `ps` is no process of the container.
    let own = bench.pid("c").to_string();
    let mut entered = std::process::Command::new("nsenter")
        .args(["-m", "-t", &own, "/bin/busybox", "sleep", "60"])
        .spawn()
        .unwrap();
    let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
    until(|| mounts(&entered.id().to_string()) == mounts(&own));
    let listed =
        || -> Vec<i32> { serde_json::from_str(&bench.call(&["ps", "--format", "json", "c"]).ok()).unwrap() };
    let mut wanted = [bench.pid("e"), bench.pid("f")];
    wanted.sort_unstable();
    assert_eq!(listed(), [bench.pid("c"), wanted[0], wanted[1]]);
    // SAFETY: kills a process of this test's own container.
    assert_eq!(unsafe { libc::kill(bench.pid("e"), libc::SIGKILL) }, 0);
    until(|| listed() == [bench.pid("c"), bench.pid("f")]);
    entered.kill().unwrap();
    entered.wait().unwrap();
}

#[test]
fn in_the_foreground_its_code_is_execs() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    // Signals from 34 on are the realtime ones.
    for (script, code) in [
        ("exit 0", 0),
        ("exit 255", 255),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
        ("kill -34 $$", 162),
        ("kill -64 $$", 192),
    ] {
        assert_eq!(bench.call(&["exec", "c", "sh", "-c", script]).code, code, "{script}");
    }
    // CRI-O's streaming exec: a process file, pipes, no --detach.
    fs::write(bench.path("p"), process(&["sh", "-c", "cat; exit 5"]).to_string()).unwrap();
    let mut command = bench.command(&["exec", "--process"]);
    command.arg(bench.path("p")).arg("c").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"in").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(5), &b"in"[..]));
}

/// As runc: root enters first; where only the user may, that one does.
#[test]
fn a_directory_that_only_root_may_enter_is_one_for_a_user_too() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", "id -u; readlink /proc/self/cwd; exec sleep 1000"]);
    config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    config["process"]["capabilities"] = json!({ "bounding": ["CAP_CHOWN"] });
    config["process"]["cwd"] = json!("/root");
    let bundle = bench.bundle("c", &config);
    fs::set_permissions(bundle.join("rootfs/root"), fs::Permissions::from_mode(0o700)).unwrap();
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    until(|| bench.read("c.out") == "1000\n/root\n");
    let out = bench.call(&["exec", "-u", "1000", "--cwd", "/root", "c", "readlink", "/proc/self/cwd"]).ok();
    assert_eq!(out, "/root\n");
}

#[test]
fn flags_say_who_where_and_with_what() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let line = ["exec", "-u", "1000:1001", "-g", "7", "--cwd", "/srv", "-e", "X=y", "c", "sh", "-c"];
    let script = "id -u; id -g; id -G; pwd; echo $X; grep CapEff /proc/self/status";
    let out = gave(bench.command(&line).arg(script)).ok();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..5], ["1000", "1001", "1001 7", "/srv", "y"], "{out}");
    let out = bench
        .call(&[
            "exec",
            "--cap",
            "CAP_NET_RAW",
            "--no-new-privs",
            "c",
            "grep",
            "-E",
            "CapPrm|NoNewPrivs",
            "/proc/self/status",
        ])
        .ok();
    let caps =
        u64::from_str_radix(out.lines().next().unwrap().split_whitespace().next_back().unwrap(), 16).unwrap();
    assert!(caps & (1 << 13) != 0 && caps & (1 << 21) == 0, "{out}");
    assert!(out.contains("NoNewPrivs:\t1"), "{out}");
}

#[test]
fn unknown_capabilities_are_no_error_but_a_warning() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["process"]["capabilities"]["bounding"].as_array_mut().unwrap().push(json!("CAP_NEWER"));
    bench.start("c", &config);
    let warned = |log: &str, name: &str| {
        log.lines().any(|line| line.contains("warning") && line.contains(name) && line.contains("left out"))
    };
    assert!(warned(&bench.read("c.log"), "CAP_NEWER"), "{}", bench.read("c.log"));
    let gave = bench.call(&["exec", "--cap", "CAP_NO_SUCH", "c", "grep", "CapBnd", "/proc/self/status"]);
    assert!(warned(&gave.err, "CAP_NO_SUCH"), "{}", gave.err);
    assert_eq!(gave.ok(), "CapBnd:\t00000000000400e3\n");
}

#[test]
fn a_process_may_be_in_a_cgroup_below_the_containers() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", "busybox mkdir /sys/fs/cgroup/below; echo made; sleep 1000"]);
    config["mounts"].as_array_mut().unwrap().push(
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"] }),
    );
    bench.start("c", &config);
    until(|| bench.read("c.out") == "made\n");
    let of = |cgroup: &str| bench.call(&["exec", "--cgroup", cgroup, "c", "cat", "/proc/self/cgroup"]);
    let line = |text: String| text.lines().find(|l| l.starts_with("0::")).unwrap().to_owned();
    for (cgroup, wanted) in [("/", "0::/"), (".", "0::/"), ("below", "0::/below"), ("/below", "0::/below")] {
        assert_eq!(line(of(cgroup).ok()), wanted, "{cgroup}");
    }
    for cgroup in ["none", "..", "below/../..", "cpu:below"] {
        assert!(of(cgroup).failed(255).contains("--cgroup"), "{cgroup}");
    }
    // ps shows it and kill --all reaches it there, too.
    let mut sleeper = bench.command(&["exec", "--cgroup", "below", "c", "sleep", "4322"]).spawn().unwrap();
    until(|| bench.call(&["ps", "c"]).ok().contains("sleep 4322"));
    let _ = bench.call(&["kill", "--all", "c", "9"]).ok();
    assert_eq!(finish(&mut sleeper), 137);
}

#[test]
fn what_env_says_comes_in_place_of_the_containers_own() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["process"]["env"] = json!(["PATH=/bin", "A=config", "B=config"]);
    bench.start("c", &config);
    let out = bench.call(&["exec", "-e", "A=option", "-e", "C=option", "c", "busybox", "env"]).ok();
    let ours: Vec<&str> = out.lines().filter(|l| ["A=", "B=", "C="].contains(&&l[..2])).collect();
    assert_eq!(ours, ["B=config", "A=option", "C=option"]);
}

#[test]
fn fifty_at_once_all_end_with_their_own_code() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let children: Vec<_> = (0..50)
        .map(|n| {
            let script = format!("sleep 0.1; exit {n}");
            bench.command(&["exec", "c", "sh", "-c", &script]).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(n as i32), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn it_works_before_the_start_as_with_runc() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sleep", "1000"]));
    let _ = bench.create("c", &bundle).ok();
    assert_eq!(bench.call(&["exec", "c", "echo", "early"]).ok(), "early\n");
    assert_eq!(bench.status("c"), "created");
}

/// podman's 075-exec does that: `exec` of what the container waits for to end. The stub of such a process ends with the container's, at any point.
#[test]
fn a_process_that_ends_its_container_is_no_failure_of_exec() {
    let bench = Bench::new();
    for round in 0..10 {
        bench.start("c", &config(&["sh", "-c", "trap 'exit 0' TERM; while :; do :; done"]));
        // A signal that comes before the shell has its trap is nobody's: it is the first process of a namespace.
        let kill = "until grep -q '^SigCgt:.*[4567cdef]...$' /proc/1/status; do :; done; kill 1";
        let gave = bench.call(&["exec", "c", "sh", "-c", kill]);
        assert!([0, 137].contains(&gave.code), "{round}: {}: {}", gave.code, gave.err);
        assert_eq!(gave.err, "", "{round}");
        bench.wait_stopped("c");
        let _ = bench.call(&["delete", "c"]).ok();
    }
}

/// runc 1.1.5 falls back for capabilities and the OOM score; limits are its caller's own there, whom a guest does not have.
#[test]
fn what_a_process_file_does_not_say_is_the_containers() {
    let bench = Bench::new();
    let mut config = config(&["sleep", "1000"]);
    config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 777, "soft": 777 }]);
    config["process"]["oomScoreAdj"] = json!(123);
    let some = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    config["process"]["capabilities"] = json!({ "bounding": some, "effective": some, "permitted": some });
    bench.start("c", &config);
    let script = "grep -h -E '^Cap(Eff|Bnd)|open files' /proc/self/status /proc/self/limits; cat /proc/self/oom_score_adj";
    let shown = |more: Value| -> Vec<String> {
        let mut process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", script], "cwd": "/",
            "env": ["PATH=/bin"] });
        process.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        fs::write(bench.path("p"), process.to_string()).unwrap();
        let mut exec = bench.command(&["exec", "--process"]);
        let text = gave(exec.arg(bench.path("p")).arg("c")).ok();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let words = |capabilities: &str, files: &str, score: &str| -> Vec<String> {
        let text = format!(
            "CapEff: {capabilities} CapBnd: {capabilities} Max open files {files} {files} files {score}"
        );
        text.split_whitespace().map(str::to_owned).collect()
    };
    // Bits 5 and 10 (capabilities(7)).
    assert_eq!(shown(json!({})), words("0000000000000420", "777", "123"));
    let said = json!({ "capabilities": {}, "oomScoreAdj": 200, "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 70, "soft": 70 }] });
    assert_eq!(shown(said), words("0000000000000000", "70", "200"));
    assert_eq!(shown(json!({ "rlimits": [] })), words("0000000000000420", "777", "123"));
}
