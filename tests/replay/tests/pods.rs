//! Several containers in one VM, as podman's pods, CRI-O and containerd ask for them.

use std::{
    fs,
    time::{Duration, Instant},
};

use coffer::pid::Pid;
use coffer_replay::{Bench, config, until};
use serde_json::{Value, json};

const SANDBOX: &str = "io.kubernetes.cri-o.SandboxID";

/// A member of `infra`'s pod as podman 4.3.1 configures it, which shares these namespaces.
fn member(bench: &Bench, args: &[&str], shared: &[&str]) -> Value {
    let mut config = config(args);
    config.as_object_mut().unwrap().remove("hostname");
    config["annotations"][SANDBOX] = json!("infra");
    for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
        let kind = namespace["type"].as_str().unwrap();
        if shared.contains(&kind) {
            let file = if kind == "network" { "net" } else { kind };
            namespace["path"] = json!(format!("/proc/{}/ns/{file}", bench.pid("infra")));
        }
    }
    config
}

fn vmm(bench: &Bench, id: &str) -> i64 {
    let state: Value = serde_json::from_str(&bench.read(&format!("state/{id}/state.json"))).unwrap();
    state["vmm"]["pid"].as_i64().unwrap()
}

const SHARED: &[&str] = &["network", "ipc", "uts"];

#[test]
fn members_run_in_the_vm_of_their_sandbox_each_with_its_own_files() {
    let bench = Bench::new();
    bench.start("infra", &config(&["sleep", "1000"]));
    bench.start("one", &member(&bench, &["sh", "-c", "hostname; echo mine > /srv/one; sleep 1000"], SHARED));
    bench.start("two", &member(&bench, &["sleep", "1000"], SHARED));
    assert_eq!((vmm(&bench, "one"), vmm(&bench, "two")), (vmm(&bench, "infra"), vmm(&bench, "infra")));
    until(|| bench.read("one.out") == "bench\n");
    assert_eq!(fs::read_to_string(bench.path("one/rootfs/srv/one")).unwrap(), "mine\n");
    assert!(!bench.path("two/rootfs/srv/one").exists());
    // Processes are each container's own, the network is one.
    assert_eq!(bench.call(&["exec", "two", "sh", "-c", "ps | grep -c 'sleep 1000$'"]).ok(), "1\n");
    let of =
        |id: &str, kind: &str| bench.call(&["exec", id, "readlink", &format!("/proc/self/ns/{kind}")]).ok();
    for kind in ["net", "ipc", "uts"] {
        assert_eq!(of("one", kind), of("infra", kind), "{kind}");
        let of = |id| fs::read_link(format!("/proc/{}/ns/{kind}", bench.pid(id))).unwrap();
        assert_eq!(of("one"), of("infra"), "{kind} of the stub");
    }
    assert_ne!(of("one", "pid"), of("infra", "pid"));
    // The end of one is not the end of the others.
    let _ = bench.call(&["delete", "--force", "one"]).ok();
    assert_eq!((bench.status("infra"), bench.status("two")), ("running".into(), "running".into()));
    assert_eq!(bench.call(&["exec", "two", "echo", "there"]).ok(), "there\n");
}

/// Engines wait for both, and podman's `rm -f` calls one after the other.
#[test]
fn a_vm_that_hangs_holds_up_neither_the_kill_nor_the_removal_of_a_member() {
    let bench = Bench::new();
    bench.start("infra", &config(&["sleep", "1000"]));
    bench.start("c", &member(&bench, &["sleep", "1000"], SHARED));
    let vm = Pid::of(i32::try_from(vmm(&bench, "infra")).unwrap()).unwrap();
    let stub = Pid::of(bench.pid("c")).unwrap();
    vm.signal(libc::SIGSTOP);
    let began = Instant::now();
    let _ = bench.call(&["kill", "c", "9"]).ok();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    until(|| !stub.is_alive());
    let began = Instant::now();
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    vm.signal(libc::SIGCONT);
    assert_eq!(bench.status("infra"), "running");
    assert!(bench.state("c").is_err());
}

/// The slower of two takes nothing of the container that has got the id meanwhile.
#[test]
fn who_deletes_a_container_second_leaves_the_next_of_its_id() {
    let bench = Bench::new();
    bench.start("infra", &config(&["sleep", "1000"]));
    let member = member(&bench, &["sleep", "1000"], SHARED);
    bench.start("c", &member);
    let vm = i32::try_from(vmm(&bench, "infra")).unwrap();
    let signal = |pid: i32, signal: i32| {
        // SAFETY: signals a process of this test's own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    };
    let stub = Pid::of(bench.pid("c")).unwrap();
    // Both wait for the guest, or for each other.
    signal(vm, libc::SIGSTOP);
    let mut first = bench.command(&["delete", "--force", "c"]).spawn().unwrap();
    until(|| !stub.is_alive());
    let mut second = bench.command(&["delete", "--force", "c"]).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    signal(second.id() as i32, libc::SIGSTOP);
    signal(vm, libc::SIGCONT);
    assert_eq!(coffer_replay::finish(&mut first), 0);
    bench.start("c", &member);
    signal(second.id() as i32, libc::SIGCONT);
    assert_eq!(coffer_replay::finish(&mut second), 0);
    assert_eq!(bench.status("c"), "running");
    assert_eq!(bench.call(&["exec", "c", "echo", "there"]).ok(), "there\n");
}

#[test]
fn the_vm_grows_for_a_member_that_needs_more_than_there_is() {
    let bench = Bench::new();
    let limited = |mut config: Value, mib: u64| {
        config["linux"]["resources"] = json!({ "memory": { "limit": mib << 20 } });
        config
    };
    // MiB at boot, and more than that.
    let size = || {
        let size = coffer::client::vm_size(&bench.path("state/infra/vsock"), None).unwrap();
        assert_eq!(size.wanted_mib, size.plugged_mib);
        (size.boot_mib, size.plugged_mib)
    };
    bench.start("infra", &config(&["sleep", "1000"]));
    assert_eq!(size(), (512, 0));
    bench.start("one", &limited(member(&bench, &["sleep", "1000"], SHARED), 300));
    assert_eq!(size(), (512, 0), "300 and 64 of the guest's own are there");
    bench.start("two", &limited(member(&bench, &["sleep", "1000"], SHARED), 300));
    assert_eq!(size(), (512, 300 + 300 + 64 - 512));
    // More than the stand-in has: the member runs with what there is, and the log says so.
    bench.start("three", &limited(member(&bench, &["sleep", "1000"], SHARED), 8192));
    assert_eq!((bench.status("three"), size()), ("running".into(), (512, 152)));
    assert!(bench.read("three.log").contains("at most 4096 MiB"), "{}", bench.read("three.log"));
    // Who leaves takes along what the VM has for it alone.
    let _ = bench.call(&["delete", "--force", "three"]).ok();
    assert_eq!(size(), (512, 152));
    let _ = bench.call(&["delete", "--force", "two"]).ok();
    assert_eq!(size(), (512, 0));
    assert_eq!(bench.status("one"), "running");
}

#[test]
fn processors_that_wait_work_for_a_member_that_may_use_them() {
    let bench = Bench::new();
    let limited = |mut config: Value, processors: u64| {
        config["linux"]["resources"] = json!({ "cpu": { "quota": processors * 50_000, "period": 50_000 } });
        config
    };
    // What the guest was told last.
    let online = || bench.read("state/infra/stand-in-processors");
    let mut infra = config(&["sleep", "1000"]);
    infra["annotations"]["io.coffer.vcpus-max"] = json!("4");
    bench.start("infra", &infra);
    bench.start("free", &member(&bench, &["sleep", "1000"], SHARED));
    assert_eq!(online(), "", "nobody asked for any");
    bench.start("two", &limited(member(&bench, &["sleep", "1000"], SHARED), 2));
    assert_eq!(online(), "2");
    bench.start("three", &limited(member(&bench, &["sleep", "1000"], SHARED), 3));
    assert_eq!(online(), "3");
    bench.start("one", &limited(member(&bench, &["sleep", "1000"], SHARED), 1));
    assert_eq!(online(), "3", "another has three");
    assert!(!bench.read("one.log").contains("processors"), "{}", bench.read("one.log"));
    // More than the VM was made with: the member runs with what there is, and the log says what helps.
    bench.start("nine", &limited(member(&bench, &["sleep", "1000"], SHARED), 9));
    assert_eq!((bench.status("nine"), online()), ("running".into(), "4".into()));
    let log = bench.read("nine.log");
    assert!(log.contains("may use 9, and its pod's VM was made with 4"), "{log}");
    assert!(log.contains("io.coffer.vcpus-max=9"), "{log}");
    for (gone, left) in [("nine", "3"), ("three", "2"), ("two", "1")] {
        let _ = bench.call(&["delete", "--force", gone]).ok();
        assert_eq!(online(), left, "without {gone}");
    }
    assert_eq!(bench.status("free"), "running");
}

#[test]
fn an_id_can_be_used_again_at_once_in_the_same_vm() {
    let bench = Bench::new();
    bench.start("infra", &config(&["sleep", "1000"]));
    for round in ["a", "b", "c"] {
        let script = format!("cat /srv/before; echo {round} > /srv/before; sleep 1000");
        bench.start("m", &member(&bench, &["sh", "-c", &script], SHARED));
        until(|| {
            bench.path("m/rootfs/srv/before").exists()
                && fs::read_to_string(bench.path("m/rootfs/srv/before")).unwrap() == format!("{round}\n")
        });
        let _ = bench.call(&["delete", "--force", "m"]).ok();
    }
    assert_eq!(vmm(&bench, "infra") > 0, bench.status("infra") == "running");
}

#[test]
fn the_vm_ends_with_the_last_of_its_containers_whichever_that_is() {
    let bench = Bench::new();
    bench.start("infra", &config(&["sleep", "1000"]));
    bench.start("m", &member(&bench, &["sleep", "1000"], SHARED));
    let process = Pid::of(vmm(&bench, "infra") as i32).unwrap();
    // Not podman's order, but it must not take the member along.
    let _ = bench.call(&["delete", "--force", "infra"]).ok();
    assert!(bench.state("infra").is_err());
    assert_eq!(bench.status("m"), "running");
    assert_eq!(bench.call(&["exec", "m", "echo", "there"]).ok(), "there\n");
    let _ = bench.call(&["delete", "--force", "m"]).ok();
    assert!(!process.is_alive());
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
    // An infra container that ends by itself does not either.
    bench.start("infra", &config(&["sleep", "1000"]));
    bench.start("m", &member(&bench, &["sleep", "1000"], SHARED));
    let _ = bench.call(&["kill", "infra", "9"]).ok();
    bench.wait_stopped("infra");
    assert_eq!(bench.call(&["exec", "m", "echo", "still"]).ok(), "still\n");
}

#[test]
fn processes_and_shared_memory_may_be_the_pods() {
    let bench = Bench::new();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let shm = json!({ "destination": "/dev/shm", "type": "bind", "source": memory.path(), "options": ["bind", "nosuid", "noexec", "nodev"] });
    let with = |mut config: Value| {
        config["mounts"].as_array_mut().unwrap().push(shm.clone());
        config
    };
    bench.start("infra", &with(config(&["sh", "-c", "echo word > /dev/shm/x; exec sleep 4321"])));
    until(|| bench.call(&["exec", "infra", "cat", "/dev/shm/x"]).out == "word\n");
    let mut all = SHARED.to_vec();
    all.push("pid");
    bench.start("m", &with(member(&bench, &["sh", "-c", "cat /dev/shm/x; ps; sleep 1000"], &all)));
    until(|| bench.read("m.out").contains("sleep 4321"));
    assert!(bench.read("m.out").starts_with("word\n"));
    let of = |id| fs::read_link(format!("/proc/{}/ns/pid", bench.pid(id))).unwrap();
    assert_eq!(of("m"), of("infra"));
    // Nothing of it reached the host.
    assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 0);
}

#[test]
fn a_container_that_shares_anothers_network_is_in_its_vm_and_one_of_an_unknown_sandbox_is_not() {
    let bench = Bench::new();
    bench.start("infra", &config(&["sleep", "1000"]));
    let mut other = member(&bench, &["sleep", "1000"], &["network"]);
    other["annotations"].as_object_mut().unwrap().remove(SANDBOX);
    bench.start("joined", &other);
    assert_eq!(vmm(&bench, "joined"), vmm(&bench, "infra"));
    let mut alone = config(&["sleep", "1000"]);
    alone["annotations"][SANDBOX] = json!("no-such-infra");
    bench.start("alone", &alone);
    assert_ne!(vmm(&bench, "alone"), vmm(&bench, "infra"));
}

/// Asks for a container in another's network, as `--network container:NAME` does, without an annotation.
fn joins(bench: &Bench, other: &str, args: &[&str]) -> Value {
    let mut config = config(args);
    for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(format!("/proc/{}/ns/net", bench.pid(other)));
        }
    }
    config
}

#[test]
fn no_file_of_the_host_goes_with_a_member_whatever_its_root_directory_is_called() {
    let bench = Bench::new();
    // As Docker's: /var/run is a link, and what the kernel lists has neither links nor blanks.
    fs::create_dir(bench.path("real one")).unwrap();
    std::os::unix::fs::symlink("real one", bench.root()).unwrap();
    let volume = bench.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("kept"), "data").unwrap();
    bench.start("infra", &config(&["sleep", "1000"]));
    for end in ["deleted", "failed"] {
        let program = if end == "failed" { "no-such-program" } else { "sleep" };
        let mut config = joins(&bench, "infra", &[program, "1000"]);
        config["mounts"].as_array_mut().unwrap().push(
            json!({ "destination": "/srv", "type": "bind", "source": volume, "options": ["rbind", "rw"] }),
        );
        let bundle = bench.bundle("m", &config);
        let made = bench.create("m", &bundle);
        assert_eq!(made.code == 0, end == "deleted", "{}", made.err);
        if end == "deleted" {
            let _ = bench.call(&["start", "m"]).ok();
            let _ = bench.call(&["delete", "--force", "m"]).ok();
        }
        assert_eq!(bench.read("volume/kept"), "data", "{end}");
        assert!(bundle.join("rootfs/bin/busybox").exists(), "{end}");
        // Nor does the VM's process have it any more.
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", vmm(&bench, "infra"))).unwrap();
        assert!(!mounts.contains("/m."), "{end}: {mounts}");
    }
}

#[test]
fn a_third_container_finds_the_vm_by_any_of_those_in_it() {
    let bench = Bench::new();
    bench.start("m", &config(&["sleep", "1000"]));
    // By its id before the first.
    bench.start("a", &joins(&bench, "m", &["sleep", "1000"]));
    bench.start("z", &joins(&bench, "m", &["sh", "-c", "echo third; sleep 1000"]));
    assert_eq!((vmm(&bench, "a"), vmm(&bench, "z")), (vmm(&bench, "m"), vmm(&bench, "m")));
    until(|| bench.read("z.out") == "third\n");
    // The first is gone, its VM goes on.
    let _ = bench.call(&["delete", "--force", "m"]).ok();
    bench.start("b", &joins(&bench, "a", &["sh", "-c", "echo fourth; sleep 1000"]));
    until(|| bench.read("b.out") == "fourth\n");
    assert_eq!(vmm(&bench, "b"), vmm(&bench, "a"));
    // What a member had is taken away there, too.
    let _ = bench.call(&["delete", "--force", "z"]).ok();
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", vmm(&bench, "a"))).unwrap();
    assert!(!mounts.contains("/z."), "{mounts}");
    for id in ["a", "b"] {
        let _ = bench.call(&["delete", "--force", id]).ok();
    }
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
}

#[test]
fn a_directory_that_two_containers_mount_is_one_and_stays_as_long_as_one_of_them_does() {
    let bench = Bench::new();
    let volume = bench.path("volume");
    fs::create_dir(&volume).unwrap();
    let with = |mut config: Value, places: &[&str]| {
        for place in places {
            let mount =
                json!({ "destination": place, "type": "bind", "source": volume, "options": ["rbind", "rw"] });
            config["mounts"].as_array_mut().unwrap().push(mount);
        }
        config
    };
    bench.start("infra", &with(config(&["sleep", "1000"]), &["/srv", "/tmp"]));
    let places = || {
        let text = fs::read_to_string(format!("/proc/{}/mountinfo", vmm(&bench, "infra"))).unwrap();
        text.lines().filter(|line| line.contains("/share/volumes/")).count()
    };
    // The stand-in has each mount of its share twice.
    assert_eq!(places(), 2);
    for id in ["one", "two"] {
        let script = format!("echo {id} >> /srv/said; sleep 1000");
        bench.start(id, &with(joins(&bench, "infra", &["sh", "-c", &script]), &["/srv"]));
    }
    until(|| bench.read("volume/said").lines().count() == 2);
    assert_eq!(places(), 2);
    let other = bench.path("other");
    fs::create_dir(&other).unwrap();
    let mut config = joins(&bench, "infra", &["sleep", "1000"]);
    let mount = json!({ "destination": "/srv", "type": "bind", "source": other, "options": ["rbind", "ro"] });
    config["mounts"].as_array_mut().unwrap().push(mount);
    bench.start("three", &config);
    assert_eq!(places(), 3);
    for id in ["three", "one", "two"] {
        let _ = bench.call(&["delete", "--force", id]).ok();
        assert_eq!(places(), 2, "{id}");
    }
    assert_eq!(bench.call(&["exec", "infra", "wc", "-l", "/srv/said"]).ok(), "2 /srv/said\n");
    assert_eq!(bench.call(&["exec", "infra", "wc", "-l", "/tmp/said"]).ok(), "2 /tmp/said\n");
}
