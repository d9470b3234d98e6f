//! What fails says so in the words and with the codes that callers look for.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use coffer_replay::{Bench, config, gave};
use serde_json::{Value, json};

/// A full file system, for one: a limit of what a file may have stands for it.
#[test]
fn a_create_that_cannot_write_its_state_leaves_nothing() {
    let bench = Bench::new();
    let mut long = config(&["sleep", "1000"]);
    long["annotations"]["long"] = json!("x".repeat(100_000));
    let bundle = bench.bundle("c", &long);
    let mut create = bench.command(&["create", "-b"]);
    create.arg(bundle).arg("c").stdout(Stdio::null());
    let small = || {
        let most = libc::rlimit { rlim_cur: 50_000, rlim_max: 50_000 };
        // SAFETY: the pointer is to an rlimit that outlives the call, and the other call changes what a signal does.
        unsafe {
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const most);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
        Ok(())
    };
    // SAFETY: two system calls, and no memory is taken.
    unsafe { create.pre_exec(small) };
    let said = gave(&mut create).failed(1);
    assert!(said.contains("config.json"), "{said}");
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

#[test]
fn a_command_that_is_not_there_fails_create_with_podmans_words_for_127() {
    let bench = Bench::new();
    for (args, words) in [
        (json!(["no-such-program"]), r#"exec: "no-such-program": executable file not found in $PATH"#),
        (json!(["/no/such"]), "no such file or directory"),
        (json!(["/srv/not-executable"]), "permission denied"),
        (json!(["/srv"]), "permission denied"),
    ] {
        let mut config = config(&["x"]);
        config["process"]["args"] = args;
        let bundle = bench.bundle("c", &config);
        let said = bench.create("c", &bundle).failed(1);
        assert!(said.contains(words), "{said}");
        assert!(bench.logged("c").contains(words), "{}", bench.logged("c"));
        // Nothing is left, and no pid file was written.
        assert!(!bench.path("c.pid").exists());
        assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
        // podman calls this after every create that failed.
        let _ = bench.call(&["delete", "--force", "c"]).ok();
    }
}

#[test]
fn a_vm_that_does_not_boot_is_no_missing_command() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["true"]));
    bench.break_image();
    let said = bench.create("c", &bundle).failed(1);
    assert!(said.contains("VM failed: "), "{said}");
    let low = bench.logged("c").to_lowercase();
    assert!(
        low.contains("vm failed") && !low.contains("no such file") && !low.contains("not permitted"),
        "{low}"
    );
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_done_in_a_state_is_refused_as_runc_does() {
    let bench = Bench::new();
    let unknown = [
        &["state", "x"][..],
        &["start", "x"],
        &["kill", "x", "9"],
        &["delete", "x"],
        &["pause", "x"],
        &["ps", "x"],
        &["events", "--stats", "x"],
        &["update", "--memory", "64m", "x"],
    ];
    for words in unknown {
        assert!(bench.call(words).failed(1).contains("container does not exist"), "{words:?}");
    }
    assert!(bench.call(&["exec", "x", "true"]).failed(255).contains("container does not exist"));
    let _ = bench.call(&["delete", "--force", "x"]).ok();

    let bundle = bench.bundle("c", &config(&["sleep", "1000"]));
    let _ = bench.create("c", &bundle).ok();
    assert!(bench.create("c", &bundle).failed(1).contains("container with given ID already exists"));
    let _ = bench.call(&["start", "c"]).ok();
    assert!(bench.call(&["start", "c"]).failed(1).contains("cannot start"));
    assert!(bench.call(&["delete", "c"]).failed(1).contains("that is not stopped: running"));
    let _ = bench.call(&["pause", "c"]).ok();
    assert_eq!(bench.status("c"), "paused");
    let said = bench.call(&["exec", "c", "true"]).failed(255);
    assert!(said.contains("cannot exec in a paused container (resume it first)"), "{said}");
    let _ = bench.call(&["resume", "c"]).ok();
    let _ = bench.call(&["kill", "c", "9"]).ok();
    bench.wait_stopped("c");
    assert!(bench.call(&["start", "c"]).failed(1).contains("cannot start a container that has stopped"));
    assert!(bench.call(&["kill", "c", "15"]).failed(1).contains("container not running"));
    let _ = bench.call(&["kill", "--all", "c", "9"]).ok();
    assert!(bench.call(&["exec", "c", "true"]).failed(255).contains("cannot exec in a stopped container"));
    assert!(bench.call(&["pause", "c"]).failed(1).contains("container not running"));
    let _ = bench.call(&["delete", "c"]).ok();
    let said = bench.call(&["state", "../c"]).failed(1);
    assert!(said.contains("invalid container ID format") && said.contains("invalid character `/`"), "{said}");
}

#[test]
fn the_log_has_one_line_for_a_failure_in_the_format_that_was_asked_for() {
    let bench = Bench::new();
    let log = bench.path("log");
    let path = log.to_str().unwrap();
    let said = bench.call(&["--log", path, "--log-format", "json", "state", "x"]).failed(1);
    assert_eq!(said, "coffer: error: container does not exist\n");
    let line: Value = serde_json::from_str(fs::read_to_string(&log).unwrap().trim_end()).unwrap();
    assert_eq!((&line["level"], &line["msg"]), (&json!("error"), &json!("container does not exist")));
    let time = line["time"].as_str().unwrap();
    assert!(time.len() > 20 && time.starts_with("20") && time.ends_with('Z'), "{time}");
    fs::remove_file(&log).unwrap();
    let _ = bench.call(&["--log", path, "--debug", "state", "x"]).failed(1);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("level=debug"), "{text}");
    assert!(text.ends_with("level=error msg=\"container does not exist\"\n"), "{text}");
    // A word that is wrong after the log was named is said there, too.
    fs::remove_file(&log).unwrap();
    let _ = bench.call(&["--log", path, "--log-format=json", "kill", "--signal", "x"]).failed(1);
    assert!(fs::read_to_string(&log).unwrap().contains("unknown flag `--signal` of kill"));
}

#[test]
fn checkpoint_and_restore_say_that_they_cannot() {
    let bench = Bench::new();
    for words in
        [&["checkpoint", "--image-path", "/x", "c"][..], &["restore", "c"], &["checkpoint", "--help"]]
    {
        assert!(bench.call(words).failed(1).contains("not supported"), "{words:?}");
    }
}

#[test]
fn systemds_cgroups_are_asked_for_where_they_matter_and_ignored_elsewhere() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    let bundle = bench.bundle("c", &config);
    let create = || {
        let mut command = bench.command(&["--systemd-cgroup", "create", "c", "--bundle"]);
        // No bus is there, whatever runs on this host.
        command.arg(&bundle).env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/bus");
        gave(&mut command).failed(1)
    };
    let said = create();
    assert!(said.starts_with("coffer: error: --systemd-cgroup: ") && said.contains("cgroupfs"), "{said}");
    config["linux"]["cgroupsPath"] = "/libpod_parent/libpod-c".into();
    bench.configure("c", &config);
    let said = create();
    assert!(said.contains("linux.cgroupsPath") && said.contains("SLICE:PREFIX:NAME"), "{said}");
    assert!(bench.state("c").is_err());
    assert!(bench.call(&["--systemd-cgroup", "state", "c"]).failed(1).contains("container does not exist"));
}

#[test]
fn version_is_three_lines_without_an_environment() {
    let bench = Bench::new();
    let mut command: Command = bench.command(&[]);
    command.env_clear().arg("--version");
    let out = gave(&mut command).ok();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("coffer version "));
    assert!(lines[1].starts_with("commit: ") && lines[2].starts_with("spec: 1."), "{out}");
}

#[test]
fn create_takes_another_configuration_file() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sleep", "1000"]));
    std::fs::create_dir(bundle.join("other")).unwrap();
    std::fs::rename(bundle.join("config.json"), bundle.join("other/config.json")).unwrap();
    let mut command = bench.command(&["create", "--config", "other/config.json", "c", "-b"]);
    // Its stub would keep a pipe open.
    let out = std::fs::File::create(bench.path("out")).unwrap();
    let mut child = command.arg(&bundle).stderr(out.try_clone().unwrap()).stdout(out).spawn().unwrap();
    assert_eq!(coffer_replay::finish(&mut child), 0, "{}", bench.read("out"));
    assert_eq!(bench.status("c"), "created");
}

#[test]
fn help_for_a_reader_that_has_seen_enough_is_no_failure() {
    let bench = Bench::new();
    for words in [&["--help"][..], &["image", "--help"], &["policy"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(bench.command(&[]).get_program());
        let output = command.args(words).stdout(writer).output().unwrap();
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
            (Some(0), ""),
            "{words:?}"
        );
    }
}

#[test]
fn the_owners_commands_show_their_help_where_they_are_asked() {
    let bench = Bench::new();
    let asked = [
        &["image", "encrypt", "--help"][..],
        &["image", "unpack", "-h"],
        &["image", "help"],
        &["policy", "generate", "--help"],
        &["policy"],
    ];
    for words in asked {
        let said = bench.call(words).ok();
        let first = format!("coffer {}: ", words[0]);
        assert!(said.starts_with(&first), "{words:?}: {said}");
    }
    // Flags behind `podman run` are podman's.
    let _ = bench.call(&["policy", "generate", "podman", "--help"]).failed(1);
}
