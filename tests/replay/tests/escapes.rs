//! What an image, a container or its files may have been made for: to get out of the container, or to hold its pod up.

use std::{fs, os::unix::fs::symlink, process::Stdio};

use coffer_replay::{Bench, config, until};
use serde_json::json;

/// CVE-2024-21626 of runc: a working directory by way of an open file of the runtime's.
#[test]
fn no_open_file_of_inits_is_a_way_out_of_the_root() {
    let bench = Bench::new();
    bench.start("runs", &config(&["sleep", "1000"]));
    for number in 3..24 {
        let place = format!("/proc/self/fd/{number}");
        let mut config = config(&["sh", "-c", "readlink /proc/self/cwd"]);
        config["process"]["cwd"] = json!(place);
        let said = bench.create("c", &bench.bundle("c", &config)).failed(1);
        assert!(said.contains("chdir to cwd"), "{place}: {said}");
        let said = bench.call(&["exec", "--cwd", &place, "runs", "true"]).failed(255);
        assert!(said.contains("chdir to cwd"), "{place}: {said}");
    }
}

/// CVE-2025-31133 of runc: a mask that is not what it is taken for.
#[test]
fn a_mask_is_the_null_device_and_nothing_of_the_images() {
    let bench = Bench::new();
    let mut config = config(&["cat", "/srv/masked"]);
    config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
    config["linux"]["maskedPaths"] = json!(["/srv/masked"]);
    let bundle = bench.bundle("c", &config);
    fs::write(bundle.join("rootfs/srv/masked"), "secret").unwrap();
    symlink("/etc/passwd", bundle.join("rootfs/dev/null")).unwrap();
    let said = bench.create("c", &bundle).failed(1);
    assert!(said.contains("mask /srv/masked: the container's /dev/null is something else"), "{said}");
    fs::remove_file(bundle.join("rootfs/dev/null")).unwrap();
    bench.start("c", &config);
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "");
}

#[test]
fn what_a_container_puts_in_place_of_passwd_holds_nobody_up() {
    let bench = Bench::new();
    let mut config =
        config(&["sh", "-c", "rm -f /etc/passwd; busybox mkfifo /etc/passwd; echo made; exec sleep 1000"]);
    config["process"]["env"] = json!(["PATH=/bin"]);
    let bundle = bench.bundle("c", &config);
    symlink("busybox", bundle.join("rootfs/bin/rm")).unwrap();
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    coffer_replay::until(|| bench.read("c.out") == "made\n");
    assert_eq!(bench.call(&["exec", "c", "sh", "-c", "echo $HOME"]).ok(), "/\n");
}

/// A FIFO opens once somebody writes to it.
#[test]
fn a_fifo_under_a_tmpfs_that_is_to_have_its_files_holds_nobody_up() {
    let bench = Bench::new();
    bench.start("runs", &config(&["sleep", "1000"]));
    let mut config = config(&["true"]);
    config["mounts"].as_array_mut().unwrap().push(json!(
        { "destination": "/srv/fifo", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }
    ));
    let bundle = bench.bundle("c", &config);
    nix::unistd::mkfifo(&bundle.join("rootfs/srv/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let said = bench.create("c", &bundle).failed(1);
    assert!(said.contains("mount tmpfs at /srv/fifo"), "{said}");
}

/// What a process calls itself is as long in JSON as it likes: six letters for one that does not print.
#[test]
fn no_names_of_processes_are_too_long_for_an_answer() {
    let bench = Bench::new();
    let mut config = config(&[
        "sh",
        "-c",
        "a=$(printf '\\001%.0s' $(seq 600)); i=0; while [ $i -lt 1500 ]; do sh -c 'read x < /fifo' \"$a\" & i=$((i+1)); done; echo made; wait",
    ]);
    config["linux"]["resources"]["pids"]["limit"] = json!(4096);
    let bundle = bench.bundle("c", &config);
    nix::unistd::mkfifo(&bundle.join("rootfs/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("busybox", bundle.join("rootfs/bin/printf")).unwrap();
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    coffer_replay::until(|| bench.read("c.out") == "made\n");
    coffer_replay::until(|| bench.call(&["ps", "c"]).ok().matches("/fifo ????").count() == 1500);
    assert_eq!(bench.status("c"), "running");
}

/// runc waits for the container to go on; here the whole pod would wait, and nobody could let it go on.
#[test]
fn exec_into_a_paused_container_says_so_and_the_pod_goes_on() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let _ = bench.call(&["pause", "c"]).ok();
    let said = bench.call(&["exec", "--ignore-paused", "c", "true"]).failed(255);
    assert!(said.contains("cannot exec in a paused container"), "{said}");
    let _ = bench.call(&["resume", "c"]).ok();
    let _ = bench.call(&["exec", "c", "true"]).ok();
}

/// What a container's root does to a process that is made in it must not reach the others of its pod.
#[test]
fn a_container_that_stops_what_is_made_in_it_holds_nobody_up() {
    let bench = Bench::new();
    let script = "echo $$; while :; do for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p -le 2 ] || kill -STOP $p; done; done 2>/dev/null";
    bench.start("c", &config(&["sh", "-c", script]));
    coffer_replay::until(|| bench.read("c.out") == "1\n");
    for _ in 0..5 {
        // It may be too late for some, which are stopped for good then and have their caller's output open.
        let mut exec = bench.command(&["exec", "--detach", "c", "true"]);
        let _ = exec.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    }
    assert_eq!(bench.status("c"), "running");
    let _ = bench.call(&["kill", "c", "KILL"]).ok();
    bench.wait_stopped("c");
}

/// A file system that the container itself is to serve, and never does.
#[test]
fn a_file_system_that_does_not_answer_holds_nobody_up_but_who_asks_it() {
    let bench = Bench::new();
    let script = "trap 'echo asked' USR1; exec 3<>/dev/fuse; \
        mount -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none /srv && echo mounted; while :; do sleep 0.1; done";
    let mut config = config(&["sh", "-c", script]);
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SYS_ADMIN"));
    }
    config["linux"]["devices"] = json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]);
    bench.start("c", &config);
    until(|| bench.read("c.out") == "mounted\n");
    let mut exec = bench.command(&["exec", "--cwd", "/srv/x", "c", "true"]).spawn().unwrap();
    // What is made in it is not its program yet.
    let is_made = || bench.call(&["ps", "c"]).ok().contains("coffer-vmm");
    until(is_made);
    let _ = bench.call(&["kill", "c", "USR1"]).ok();
    until(|| bench.read("c.out") == "mounted\nasked\n");
    assert_eq!(bench.call(&["exec", "c", "echo", "there"]).ok(), "there\n");
    // Whose caller has gone does not come to be.
    assert!(is_made());
    exec.kill().unwrap();
    let _ = exec.wait().unwrap();
    until(|| !is_made());
    assert_eq!(bench.status("c"), "running");
}
