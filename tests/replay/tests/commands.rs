//! The commands that look at a container or change it while it runs.

use std::{fs, io::Write, process::Stdio};

use coffer_replay::{Bench, config, until};
use serde_json::{Value, json};

/// Says each signal that it gets; 15 ends it with code 3.
const TRAPS: &str = "trap 'echo got USR1' USR1; trap 'echo got WINCH' WINCH; trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done";

#[test]
fn signals_by_number_and_by_name_reach_the_first_process() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", TRAPS]));
    until(|| bench.read("c.out").contains("up"));
    for (signal, words) in [("10", "got USR1"), ("SIGWINCH", "got WINCH")] {
        let _ = bench.call(&["kill", "c", signal]).ok();
        until(|| bench.read("c.out").contains(words));
    }
    assert!(bench.call(&["kill", "c", "NOSUCH"]).failed(1).contains("NOSUCH"));
    let _ = bench.call(&["kill", "c", "0"]).ok();
    assert_eq!(bench.status("c"), "running");
    // No signal named: SIGTERM.
    let _ = bench.call(&["kill", "c"]).ok();
    bench.wait_stopped("c");
}

#[test]
fn a_signal_to_the_stub_itself_is_handed_on() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", TRAPS]));
    until(|| bench.read("c.out").contains("up"));
    // SAFETY: signals a process of this test's own container.
    assert_eq!(unsafe { libc::kill(bench.pid("c"), libc::SIGUSR1) }, 0);
    until(|| bench.read("c.out").contains("got USR1"));
    // SAFETY: likewise.
    assert_eq!(unsafe { libc::kill(bench.pid("c"), libc::SIGKILL) }, 0);
    bench.wait_stopped("c");
}

#[test]
fn kill_all_reaches_every_process() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", "sh -c 'trap \"echo child\" USR1; echo up; while :; do sleep 0.05; done' & trap 'echo parent' USR1; while :; do wait; done"]));
    until(|| bench.read("c.out").contains("up"));
    let _ = bench.call(&["kill", "-a", "c", "USR1"]).ok();
    until(|| bench.read("c.out").contains("child") && bench.read("c.out").contains("parent"));
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", "while :; do echo x; sleep 0.01; done"]));
    until(|| bench.read("c.out").len() > 10);
    let _ = bench.call(&["pause", "c"]).ok();
    // What was on its way arrives.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let before = bench.read("c.out").len();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(bench.read("c.out").len(), before);
    // Another process would stand still as well: refused, also with the flag that has the host try.
    let said = bench.call(&["exec", "c", "true"]).failed(255);
    assert_eq!(said.trim_end(), "coffer: error: cannot exec in a paused container (resume it first)");
    let said = bench.call(&["exec", "--ignore-paused", "c", "true"]).failed(255);
    assert_eq!(said.trim_end(), "coffer: error: cannot exec in a paused container");
    let _ = bench.call(&["resume", "c"]).ok();
    until(|| bench.read("c.out").len() > before);
    assert!(bench.call(&["resume", "c"]).failed(1).contains("not paused"));
    // Paused before its start: it cannot be started until it goes on.
    let bundle = bench.bundle("d", &config(&["true"]));
    let _ = bench.create("d", &bundle).ok();
    let _ = bench.call(&["pause", "d"]).ok();
    assert!(bench.call(&["start", "d"]).failed(1).contains("cannot start a container in the paused state"));
    // Whatever its state, it can be removed by force.
    let _ = bench.call(&["delete", "--force", "d"]).ok();
    let _ = bench.call(&["pause", "c"]).ok();
    let _ = bench.call(&["delete", "-f", "c"]).ok();
}

#[test]
fn lists_have_runcs_columns_and_fields() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["list", "-f", "json"]).ok(), "null\n");
    bench.start("b", &config(&["sleep", "1000"]));
    let bundle = bench.bundle("a", &config(&["true"]));
    let _ = bench.create("a", &bundle).ok();
    assert_eq!(bench.call(&["list", "-q"]).ok(), "a\nb\n");
    let list: Value = serde_json::from_str(&bench.call(&["list", "--format=json"]).ok()).unwrap();
    assert_eq!(
        (&list[0]["id"], &list[0]["status"], &list[1]["status"], &list[1]["pid"], &list[1]["owner"]),
        (&json!("a"), &json!("created"), &json!("running"), &json!(bench.pid("b")), &json!("root"))
    );
    assert_eq!(list[0]["rootfs"], json!(bundle.join("rootfs")));
    let table = bench.call(&["list"]).ok();
    let head: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(head, ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    assert!(bench.call(&["list", "-f", "xml"]).failed(1).contains("xml"));
}

#[test]
fn ps_gives_the_hosts_processes_as_json_and_the_guests_as_a_table() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", "sleep 1234 & wait"]));
    let pids: Value = serde_json::from_str(&bench.call(&["ps", "--format", "json", "c"]).ok()).unwrap();
    assert_eq!(pids, json!([bench.pid("c")]));
    until(|| bench.call(&["ps", "c"]).ok().contains("sleep 1234"));
    let table = bench.call(&["ps", "c", "-ef"]).ok();
    assert_eq!(table.lines().next().unwrap().split_whitespace().next_back(), Some("CMD"));
    assert_eq!(table.lines().count(), 3, "{table}");
    let chosen = bench.call(&["ps", "c", "-o", "pid,args"]).ok();
    let head: Vec<&str> = chosen.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(head, ["PID", "CMD"], "{chosen}");
    assert!(chosen.lines().any(|line| line.ends_with("   sleep 1234")), "{chosen}");
    assert!(bench.call(&["ps", "c", "-o", "rss"]).failed(1).contains("ps: -o rss"));
    let gave = bench.call(&["ps", "c", "aux"]);
    assert!(gave.err.contains("aux: left out"), "{}", gave.err);
    assert_eq!(gave.ok(), table);
}

#[test]
fn events_have_runcs_form_and_end_with_the_container() {
    let bench = Bench::new();
    bench.start("c", &config(&["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"]));
    let line = bench.call(&["events", "--stats", "c"]).ok();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!("c")));
    assert!(event["data"]["cpu"]["usage"]["total"].as_u64().unwrap() > 0);
    for path in
        ["/data/memory/usage/limit", "/data/memory/raw", "/data/pids/current", "/data/blkio", "/data/hugetlb"]
    {
        assert!(event.pointer(path).is_some(), "{path} of {event}");
    }
    let out = fs::File::create(bench.path("events")).unwrap();
    let mut stream = bench.command(&["events", "--interval", "50ms", "c"]).stdout(out).spawn().unwrap();
    until(|| bench.read("events").lines().count() >= 3);
    let _ = bench.call(&["kill", "c"]).ok();
    assert_eq!(coffer_replay::finish(&mut stream), 0);
}

/// The stand-in's host need not have the controller. What the stub does when the guest says that memory ran out is its own test; that an
/// engine's `events` then says so is this one.
#[test]
fn events_end_with_a_line_when_the_container_ended_for_want_of_memory() {
    let bench = Bench::new();
    for (marked, lines) in [(true, 1), (false, 0)] {
        bench.start("c", &config(&["sleep", "1000"]));
        let out = fs::File::create(bench.path("events")).unwrap();
        let mut stream =
            bench.command(&["events", "--interval", "1h0m0.5s", "c"]).stdout(out).spawn().unwrap();
        until(|| bench.read("events").lines().count() == 1);
        if marked {
            fs::write(bench.path("state/c/oom.1"), "").unwrap();
        }
        // As an engine does: the mark is gone before the stream looks again.
        let _ = bench.call(&["delete", "--force", "c"]).ok();
        assert_eq!(coffer_replay::finish(&mut stream), 0);
        let said = bench.read("events");
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!(said.lines().count(), 1 + lines, "{said}");
        assert_eq!(last["type"] == json!("oom"), marked, "{said}");
    }
}

#[test]
fn update_takes_a_file_stdin_or_flags() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    // Limits that set nothing: the host of this test may have no controllers to set.
    fs::write(bench.path("limits"), "{}").unwrap();
    let path = bench.path("limits");
    let _ = bench.call(&["update", "--resources", path.to_str().unwrap(), "c"]).ok();
    let mut child = bench.command(&["update", "--resources=-", "c"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"{}").unwrap();
    assert_eq!(coffer_replay::finish(&mut child), 0);
    assert_eq!(bench.call(&["update", "c"]).ok(), "");
    assert!(bench.call(&["update", "no-such"]).failed(1).contains("does not exist"));
    assert!(bench.call(&["update", "-r", "/no/limits", "c"]).failed(1).contains("/no/limits"));
}

#[test]
fn update_says_in_one_line_why_a_vm_stays_as_it_is() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let said = bench.call(&["update", "--memory", "8g", "c"]).failed(1);
    assert!(said.contains("booted with 512 MiB and needs 8256: at most 4096 MiB"), "{said}");
    let size = coffer::client::vm_size(&bench.path("state/c/vsock"), None).unwrap();
    assert_eq!((size.wanted_mib, size.plugged_mib), (0, 0));
}

/// As a pod's member that may use more: the limit is set, and the log says what the VM has of it.
#[test]
fn more_processors_than_the_vm_has_are_a_limit_and_a_warning() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let gave = bench.call(&["update", "--cpu-quota", "150000", "--cpu-period=100000", "c"]);
    let said = &gave.err;
    if said.contains("the requested cgroup controller `cpu` is not available") {
        // The host of this test has none: the guest was asked, which is what a VM with fewer processors is no reason against.
        return;
    }
    assert!(said.contains("2 processors: the VM was made with 1"), "{said}");
    assert!(said.contains("io.coffer.vcpus-max=2"), "{said}");
    assert_eq!(gave.ok(), "");
    assert_eq!(bench.read("state/c/processors"), "2");
}

#[test]
fn spec_writes_a_configuration_that_runs() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["true"]));
    let path = bundle.to_str().unwrap();
    assert!(bench.call(&["spec", "-b", path]).failed(1).contains("config.json exists"));
    fs::remove_file(bundle.join("config.json")).unwrap();
    assert!(bench.call(&["spec", "--rootless", "-b", path]).failed(1).contains("--rootless"));
    let _ = bench.call(&["spec", "--bundle", path]).ok();
    let mut written: Value = serde_json::from_slice(&fs::read(bundle.join("config.json")).unwrap()).unwrap();
    // As `runc spec` of Debian's runc 1.1.5 wrote it, but for what names the runtime.
    let mut runcs: Value = serde_json::from_str(include_str!("runc-spec.json")).unwrap();
    (runcs["ociVersion"], runcs["hostname"]) = (json!("1.2.1"), json!("coffer"));
    assert_eq!(written, runcs);
    written["process"]["args"] = json!(["echo", "it runs"]);
    written["process"]["terminal"] = json!(false);
    bench.configure("c", &written);
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "it runs\n");
}

#[test]
fn run_in_the_foreground_has_the_programs_stdio_and_code() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "cat; echo err >&2; exit 7"]));
    let mut command = bench.command(&["run", "-b"]);
    command.arg(&bundle).arg("c").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"from stdin").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"from stdin"[..], &b"err\n"[..]));
    assert!(bench.state("c").is_err());
    let _ = bench.call(&["features"]).ok();
}

#[test]
fn signals_to_run_in_the_foreground_are_the_containers() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", TRAPS]));
    let out = fs::File::create(bench.path("out")).unwrap();
    let mut child = bench.command(&["run", "c", "-b"]).arg(&bundle).stdout(out).spawn().unwrap();
    until(|| bench.read("out").contains("up"));
    // SAFETY: signals our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGUSR1) };
    until(|| bench.read("out").contains("got USR1"));
    // SAFETY: likewise.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(coffer_replay::finish(&mut child), 3);
}

/// The container runs before `run` waits for it: here a hook, which has no signal blocked, holds `run` up.
#[test]
fn a_signal_to_run_is_kept_until_it_can_be_handed_on() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", TRAPS]);
    let place = bench.path("hook");
    let script = format!(
        "grep SigBlk /proc/self/status >{0}.mask; touch {0}.there; while [ -e {0}.there ] && [ ! -e {0}.go ]; do sleep 0.01; done",
        place.display()
    );
    config["hooks"]["poststart"] =
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }]);
    let bundle = bench.bundle("c", &config);
    let out = fs::File::create(bench.path("out")).unwrap();
    let mut child = bench.command(&["run", "c", "-b"]).arg(&bundle).stdout(out).spawn().unwrap();
    until(|| bench.path("hook.there").exists() && bench.read("out").contains("up"));
    // SAFETY: signals our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGUSR1) };
    fs::write(bench.path("hook.go"), "").unwrap();
    until(|| bench.read("out").contains("got USR1"));
    // SAFETY: likewise.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(coffer_replay::finish(&mut child), 3);
    assert_eq!(bench.read("hook.mask").trim(), "SigBlk:\t0000000000000000");
}

#[test]
fn a_daemon_that_closes_its_output_lets_readers_of_it_go() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo ready; exec >&- 2>&-; sleep 1000"]));
    let mut command = bench.command(&["run", "--detach", "c", "-b"]);
    command.arg(&bundle).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Waits for the end of both pipes.
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"ready\n"[..]));
    assert_eq!(bench.status("c"), "running");
}
