//! The configuration's fields, seen from inside the container.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::PathBuf,
};

use coffer_replay::{Bench, config, until};
use serde_json::{Value, json};

/// Runs a script in a container with this configuration; what it printed.
#[track_caller]
fn inside(change: impl FnOnce(&Bench, &mut Value), script: &str) -> String {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", script]);
    change(&bench, &mut config);
    bench.start("c", &config);
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.err"), "");
    bench.read("c.out")
}

fn mount(config: &mut Value, mount: Value) {
    config["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn user_groups_umask_directory_and_environment() {
    let out = inside(
        |_, c| {
            c["process"]["user"] =
                json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o027 });
            c["process"]["cwd"] = json!("/srv/made/here");
            c["process"]["env"] = json!(["PATH=/bin", "X=a b"]);
        },
        "id -u; id -G; umask; pwd; stat -c '%a %u' /srv/made .; echo $X; hostname; echo x > /dev/null && echo null",
    );
    assert_eq!(out, "1000\n1001 5 6\n0027\n/srv/made/here\n755 0\n755 0\na b\nbench\nnull\n");
}

#[test]
fn capabilities_and_limits_are_those_that_were_asked_for() {
    let out = inside(
        |_, c| {
            c["process"]["rlimits"] = json!([
                { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }, { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }
            ]);
            c["process"]["noNewPrivileges"] = json!(true);
            c["process"]["oomScoreAdj"] = json!(123);
        },
        "grep -E '^(CapBnd|CapEff|NoNewPrivs)' /proc/self/status; grep -E 'open files|core file' /proc/self/limits; cat /proc/self/oom_score_adj",
    );
    // chown, dac_override, kill, setgid, setuid, sys_chroot: bits 0, 1, 5, 6, 7, 18.
    for line in ["CapEff:\t00000000000400e3", "CapBnd:\t00000000000400e3", "NoNewPrivs:\t1"] {
        assert!(out.contains(line), "{out}");
    }
    assert!(
        out.lines()
            .any(|l| l.split_whitespace().collect::<Vec<_>>()
                == ["Max", "open", "files", "100", "200", "files"]),
        "{out}"
    );
    assert!(out.ends_with("123\n"), "{out}");
}

/// Docker and containerd's CRI name none: what their services have is what their containers have, under runc.
#[test]
fn limits_that_nobody_names_are_an_engines_services() {
    let bench = Bench::new();
    let script = "echo $(ulimit -n) $(ulimit -Hn)";
    let mut config = config(&["sh", "-c", &format!("{script}; sleep 1000")]);
    config["process"].as_object_mut().unwrap().remove("rlimits");
    let bundle = bench.bundle("c", &config);
    let mut command = bench.command(&["create", "-b"]);
    command.arg(bundle).arg("c").stdout(fs::File::create(bench.path("c.out")).unwrap());
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to an rlimit that outlives the call.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    let low = libc::rlimit { rlim_cur: 1024, ..limit };
    let lower = move || {
        // SAFETY: the pointer is to an rlimit that outlives the call.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const low) };
        Ok(())
    };
    // SAFETY: one system call, and no memory is taken.
    unsafe { command.pre_exec(lower) };
    assert_eq!(command.status().unwrap().code(), Some(0));
    let _ = bench.call(&["start", "c"]).ok();
    until(|| bench.read("c.out").ends_with('\n'));
    // A guest's init has every right; the stand-in's may have the right to raise its own.
    let hard = limit.rlim_max;
    let wanted = [1 << 20, hard].map(|most| format!("{most} {most}\n"));
    assert!(wanted.contains(&bench.read("c.out")), "{} for {wanted:?}", bench.read("c.out"));
    let further = bench.call(&["exec", "c", "sh", "-c", script]).ok();
    assert_eq!(further, bench.read("c.out"));
}

#[test]
fn default_devices_are_for_everybody_and_others_as_configured() {
    let out = inside(
        |_, c| {
            c["linux"]["devices"] = json!([
                { "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8 },
                { "path": "/dev/below/pipe", "type": "p", "fileMode": 0o600 }
            ]);
        },
        "stat -c '%n %a %u %g %t:%T %F' /dev/null /dev/mine /dev/below/pipe; ls -l /dev/fd /dev/ptmx | grep -c -- '->'",
    );
    assert_eq!(
        out,
        "/dev/null 666 0 0 1:3 character special file\n/dev/mine 640 7 8 1:5 character special file\n/dev/below/pipe 600 0 0 0:0 fifo\n2\n"
    );
}

#[test]
fn masked_and_read_only_paths_are_what_they_are_called() {
    let out = inside(
        |_, c| {
            c["linux"]["maskedPaths"] = json!(["/srv", "/etc/passwd", "/proc/not/there"]);
            c["linux"]["readonlyPaths"] = json!(["/etc", "/not/there"]);
            c["root"]["readonly"] = json!(true);
        },
        "ls /srv | wc -l; wc -c < /etc/passwd; touch /etc/x 2>/dev/null || echo ro; touch /x 2>/dev/null || echo ro",
    );
    assert_eq!(out, "0\n0\nro\nro\n");
}

/// A mount of the host's, undone in the end.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: PathBuf) -> Self {
        let none = None::<&str>;
        nix::mount::mount(Some("below"), &path, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn recursive_options_hold_for_what_is_mounted_below() {
    // Seen with the same volume without them: the mount below is the writable one that the host has.
    let script = "for d in /v /v/below; do touch $d/x 2>/dev/null && echo written; $d/run 2>/dev/null && echo ran; \
                  grep -c \" $d .*nosuid.*noexec\" /proc/self/mounts; done";
    for (options, wanted) in [
        (json!(["rbind"]), "written\nran\n0\nwritten\nran\n0\n"),
        (json!(["rbind", "rro", "rnosuid", "rnoexec"]), "1\n1\n"),
    ] {
        let bench = Bench::new();
        fs::create_dir_all(bench.path("v/below")).unwrap();
        let _below = Mounted::tmpfs(bench.path("v/below"));
        for file in ["v/run", "v/below/run"] {
            fs::write(bench.path(file), "#!/bin/sh\n").unwrap();
            fs::set_permissions(bench.path(file), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut config = config(&["sh", "-c", script]);
        let source = bench.path("v");
        mount(
            &mut config,
            json!({ "destination": "/v", "type": "bind", "source": source, "options": options }),
        );
        bench.start("c", &config);
        bench.wait_stopped("c");
        assert_eq!(bench.read("c.out"), wanted, "{options}: {}", bench.read("c.err"));
        let _ = bench.call(&["delete", "--force", "c"]).ok();
    }
}

#[test]
fn tmpfs_may_keep_what_lay_there_and_propagation_is_set() {
    let out = inside(
        |_, c| {
            mount(
                c,
                json!({ "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=755", "size=1m"] }),
            );
            mount(
                c,
                json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["rshared", "noexec", "size=64k"] }),
            );
            c["linux"]["rootfsPropagation"] = json!("shared");
        },
        "head -n 1 /etc/passwd; grep -E ' / | /tmp ' /proc/self/mountinfo | grep -c shared:; grep -c '/tmp tmpfs.*noexec.*size=64k' /proc/self/mounts",
    );
    assert_eq!(out, "root:x:0:0:root:/root:/bin/sh\n2\n1\n");
}

/// As with runc: what has to be written there is written before.
#[test]
fn a_read_only_tmpfs_and_dev_are_read_only_once_everything_is_in_them() {
    let out = inside(
        |bench, c| {
            let options = json!(["ro", "tmpcopyup", "nosuid", "noexec", "size=1m"]);
            mount(
                c,
                json!({ "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": options }),
            );
            fs::create_dir(bench.path("volume")).unwrap();
            mount(
                c,
                json!({ "destination": "/etc/below/volume", "type": "bind", "source": bench.path("volume"), "options": ["bind"] }),
            );
            let dev = &mut c["mounts"][1];
            assert_eq!(dev["destination"], "/dev");
            dev["options"].as_array_mut().unwrap().push(json!("ro"));
        },
        "head -n 1 /etc/passwd; touch /etc/below/volume/x && echo written; echo x >/dev/null; \
         for d in /etc /dev /etc/below; do touch $d/x 2>/dev/null || echo ro; done; \
         grep -c ' /etc tmpfs ro,nosuid,noexec,' /proc/self/mounts; grep -c ' /dev tmpfs ro,nosuid,' /proc/self/mounts",
    );
    assert_eq!(out, "root:x:0:0:root:/root:/bin/sh\nwritten\nro\nro\nro\n1\n1\n");
}

#[test]
fn sysctls_and_seccomp_hold() {
    let out = inside(
        |_, c| {
            c["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1" });
            c["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 }]
            });
        },
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced; busybox mkdir /d 2>&1",
    );
    assert_eq!(out, "1\n1\nmkdir: can't create directory '/d': No space left on device\n");
}

/// podman's profile, with the default that Docker's has.
#[test]
fn a_system_call_that_is_newer_than_the_profile_is_none_and_an_older_one_is_denied() {
    let podman = include_str!("../../../guest-init/fuzz/testdata/podman.json");
    let mut seccomp = serde_json::from_str::<Value>(podman).unwrap()["linux"]["seccomp"].take();
    seccomp["defaultErrnoRet"] = json!(1);
    // fchmodat2, then one of the future, then nfsservctl, which the profile does not name.
    let script = "import ctypes; call = ctypes.CDLL(None, use_errno=True).syscall; \
                  print([call(n, -1, 0, 0, 0) and ctypes.get_errno() for n in (452, 9999, 180)])";
    let bench = Bench::new();
    let mut config = config(&["/usr/bin/python3", "-c", script]);
    for directory in ["/usr", "/lib", "/lib64"] {
        mount(
            &mut config,
            json!({ "destination": directory, "type": "bind", "source": directory, "options": ["rbind", "ro"] }),
        );
    }
    config["linux"]["seccomp"] = seccomp;
    bench.start("c", &config);
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "[38, 38, 1]\n", "{}", bench.read("c.err"));
}

#[test]
fn domain_name_personality_scheduling_and_priorities_hold() {
    let out = inside(
        |_, c| {
            c["domainname"] = json!("example.org");
            c["linux"]["personality"] = json!({ "domain": "LINUX32" });
            c["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 5 });
            c["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
            c["linux"]["seccomp"] =
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"] });
        },
        // The 19th word of stat is the nice value, the 41st the policy.
        "cat /proc/sys/kernel/domainname; busybox uname -m; busybox cut -d' ' -f19,41 /proc/self/stat; busybox ionice -p $$",
    );
    assert_eq!(out, "example.org\ni686\n5 3\nidle\n");
}

#[test]
fn what_a_vm_cannot_give_fails_create_with_one_line() {
    let bench = Bench::new();
    for (path, entry, words) in [
        ("/linux/intelRdt", json!({ "closID": "x" }), "linux.intelRdt"),
        ("/linux/timeOffsets", json!({ "boottime": { "secs": 1, "nanosecs": 0 } }), "there is none"),
        (
            "/linux/seccomp",
            json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock" }),
            "linux.seccomp",
        ),
        ("/mounts/0/options", json!(["idmap"]), "idmapped"),
        ("/linux/resources/rdma", json!({ "mlx5": { "hcaObjects": 1 } }), "linux.resources.rdma"),
        (
            "/vm",
            json!({ "kernel": { "path": "/boot/vmlinuz", "parameters": ["quiet"] } }),
            "vm.kernel.parameters",
        ),
    ] {
        let mut config = config(&["true"]);
        let (parent, key) = path.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[key] = entry;
        let bundle = bench.bundle("c", &config);
        let said = bench.create("c", &bundle).failed(1);
        assert!(said.contains(words) && said.trim_end().lines().count() == 1, "{path}: {said}");
        assert!(bench.state("c").is_err(), "{path}");
    }
}

#[test]
fn the_hosts_network_by_its_path_is_refused_and_left_as_it_is() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "network");
    namespaces.push(json!({ "type": "network", "path": format!("/proc/{}/ns/net", std::process::id()) }));
    let bundle = bench.bundle("c", &config);
    assert!(bench.create("c", &bundle).failed(1).contains("the host's network cannot be given to a VM"));
}

#[test]
fn a_time_namespace_has_the_configured_offsets_also_in_further_processes() {
    let bench = Bench::new();
    let mut config = config(&["cat", "/proc/self/timens_offsets", "/proc/uptime"]);
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
    config["linux"]["timeOffsets"] =
        json!({ "monotonic": { "secs": 1, "nanosecs": 2 }, "boottime": { "secs": 4_000_000_000_u32 } });
    let bundle = bench.bundle("c", &config);
    let _ = bench.create("c", &bundle).ok();
    let further = bench.call(&["exec", "c", "cat", "/proc/self/timens_offsets", "/proc/uptime"]).ok();
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    for out in [further, bench.read("c.out")] {
        let words: Vec<&str> = out.split_whitespace().take(7).collect();
        assert_eq!(words[..6], ["monotonic", "1", "2", "boottime", "4000000000", "0"], "{out}");
        assert!(words[6].parse::<f64>().unwrap() > 4_000_000_000.0, "{out}");
    }
    let own = fs::read_to_string("/proc/uptime").unwrap();
    assert!(own.split_whitespace().next().unwrap().parse::<f64>().unwrap() < 4_000_000_000.0);
}

#[test]
fn a_capability_that_nobody_knows_yet_is_left_out() {
    let out = inside(
        |_, c| c["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_OF_TOMORROW"]),
        "grep CapBnd /proc/self/status",
    );
    assert_eq!(out, "CapBnd:\t0000000000000020\n");
}

/// `podman build` of 4.3.1 asks for ambient ones that are not inheritable, which no kernel allows.
#[test]
fn an_ambient_capability_that_cannot_be_is_left_out() {
    let out = inside(
        |_, c| {
            c["process"]["capabilities"]["inheritable"] = json!(["CAP_KILL", "CAP_SYS_CHROOT"]);
            c["process"]["capabilities"]["ambient"] = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]);
        },
        "grep CapAmb /proc/self/status",
    );
    assert_eq!(out, "CapAmb:\t0000000000000020\n");
}

#[test]
fn a_mount_on_a_link_to_what_is_not_there_is_where_the_link_leads() {
    let bench = Bench::new();
    fs::write(bench.path("resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let mut config = config(&["cat", "/run/resolve/stub.conf"]);
    let source = bench.path("resolv.conf");
    mount(
        &mut config,
        json!({ "destination": "/etc/resolv.conf", "type": "bind", "source": source, "options": ["bind"] }),
    );
    let bundle = bench.bundle("c", &config);
    symlink("../run/resolve/stub.conf", bundle.join("rootfs/etc/resolv.conf")).unwrap();
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "nameserver 192.0.2.1\n");
}

#[test]
fn a_mount_over_the_root_has_its_own_options() {
    let first = |c: &mut Value, mount: Value| c["mounts"].as_array_mut().unwrap().insert(0, mount);
    let copied = json!({ "destination": "/", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] });
    let kind = "stat -fc %T /; cat /etc/passwd | head -1";
    assert_eq!(inside(|_, c| first(c, copied), kind), "tmpfs\nroot:x:0:0:root:/root:/bin/sh\n");
    let out = inside(
        |bench, c| {
            let other = bench.bundle("other", c).join("rootfs");
            first(
                c,
                json!({ "destination": "/", "type": "bind", "source": other, "options": ["bind", "ro"] }),
            );
        },
        "touch /srv/x 2> /dev/null || echo read-only",
    );
    assert_eq!(out, "read-only\n");
}

#[test]
fn a_tmpfs_over_a_directory_has_its_permissions() {
    let tmpfs = |c: &mut Value, options: Value| {
        mount(c, json!({ "destination": "/srv", "type": "tmpfs", "source": "tmpfs", "options": options }));
        mount(c, json!({ "destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": ["ro"] }));
    };
    let script = "stat -c %a /srv /new";
    assert_eq!(inside(|_, c| tmpfs(c, json!(["ro"])), script), "755\n1777\n");
    assert_eq!(inside(|_, c| tmpfs(c, json!(["mode=712"])), script), "712\n1777\n");
}

#[test]
fn a_path_to_a_namespace_of_another_type_is_an_error() {
    let bench = Bench::new();
    let mut config = config(&["true"]);
    let list = config["linux"]["namespaces"].as_array_mut().unwrap();
    list.iter_mut().find(|n| n["type"] == "uts").unwrap()["path"] = json!("/proc/1/ns/ipc");
    let bundle = bench.bundle("c", &config);
    let said = bench.create("c", &bundle).failed(1);
    assert!(said.contains("/proc/1/ns/ipc"), "{said}");
}

#[test]
fn what_the_specification_does_not_know_is_no_error_and_what_is_wrong_is_named() {
    let out = inside(
        |_, c| {
            c["unknown"] = json!({ "x": 1 });
            c["ociVersion"] = json!("1.3.0");
            c["annotations"]["org.example.x"] = json!("y");
        },
        "echo fine",
    );
    assert_eq!(out, "fine\n");
    let bench = Bench::new();
    for (change, words) in [
        (json!({ "ociVersion": "2.0.0" }), "ociVersion"),
        (json!({ "root": { "path": "nowhere" } }), "nowhere"),
        (json!({ "process": { "args": ["sh"], "cwd": "relative", "user": { "uid": 0, "gid": 0 } } }), "cwd"),
    ] {
        let mut config = config(&["true"]);
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        let bundle = bench.bundle("c", &config);
        let said = bench.create("c", &bundle).failed(1);
        assert!(said.contains(words), "{said}");
    }
    fs::write(bench.path("c/config.json"), "{").unwrap();
    assert!(bench.create("c", &bench.path("c")).failed(1).contains("config.json"));
}

#[test]
fn changes_of_the_bundle_after_create_have_no_effect() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo first; echo $HOME"]));
    let _ = bench.create("c", &bundle).ok();
    let mut other = config(&["echo", "second"]);
    other["hooks"]["poststart"] = json!([{ "path": "/bin/false" }]);
    bench.configure("c", &other);
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "first\n/root\n");
}

#[test]
fn what_is_mounted_has_the_configurations_name() {
    let out = inside(
        |_, c| {
            mount(
                c,
                json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=64k"] }),
            );
            mount(c, json!({ "destination": "/tmp", "type": "tmpfs" }));
        },
        "for x in /dev /dev/shm /tmp /dev/pts; do grep \" $x \" /proc/self/mountinfo | busybox sed 's/.* - //' | busybox cut -d' ' -f1,2; done",
    );
    assert_eq!(out, "tmpfs tmpfs\ntmpfs shm\ntmpfs tmpfs\ndevpts devpts\n");
}

#[test]
fn a_path_that_cannot_be_masked_fails_create() {
    let bench = Bench::new();
    for field in ["maskedPaths", "readonlyPaths"] {
        let mut config = config(&["true"]);
        // A link to itself: whatever is there cannot be looked at, and nobody knows that nothing is.
        config["linux"][field] = json!(["/srv/loop"]);
        let bundle = bench.bundle("c", &config);
        let _ = std::os::unix::fs::symlink("../srv/loop", bundle.join("rootfs/srv/loop"));
        let said = bench.create("c", &bundle).failed(1);
        assert!(said.contains("/srv/loop"), "{field}: {said}");
    }
}

#[test]
fn a_number_that_no_device_has_makes_a_node_as_on_a_host() {
    let out = inside(
        |_, c| {
            c["linux"]["devices"] = json!([
                { "path": "/dev/test1", "type": "c", "major": 10, "minor": 666, "fileMode": 0o660, "uid": 0, "gid": 0 },
                { "path": "/dev/test2", "type": "b", "major": 240, "minor": 666, "fileMode": 0o660, "uid": 3, "gid": 4 }
            ]);
        },
        "stat -c '%n %a %u %g %t:%T %F' /dev/test1 /dev/test2",
    );
    assert_eq!(
        out,
        "/dev/test1 660 0 0 a:29a character special file\n/dev/test2 660 3 4 f0:29a block special file\n"
    );
}

#[test]
fn a_link_in_place_of_proc_or_sys_fails_create() {
    let bench = Bench::new();
    for name in ["proc", "sys"] {
        let bundle = bench.bundle("c", &config(&["true"]));
        let place = bundle.join("rootfs").join(name);
        fs::remove_dir(&place).unwrap();
        std::os::unix::fs::symlink("tmp", &place).unwrap();
        let said = bench.create("c", &bundle).failed(1);
        assert!(said.contains("must be mounted on ordinary directory"), "{name}: {said}");
        fs::remove_file(&place).unwrap();
    }
}

/// The machine that the specification's `vm` section asks for: its image, and not ours, and its size.
#[test]
fn the_vm_section_says_which_image_boots_and_how_large_the_machine_is() {
    let bench = Bench::new();
    let own = bench.path("own.igvm");
    let mut config = config(&["sleep", "1000"]);
    config["vm"] = json!({ "kernel": { "path": own }, "hwConfig": { "vcpus": 3, "memory": 768 << 20 } });
    let bundle = bench.bundle("c", &config);
    // With ours nothing would come up any more.
    bench.break_image();
    std::fs::write(&own, "broken").unwrap();
    assert!(bench.create("c", &bundle).failed(1).contains("the guest's kernel or init failed"));
    std::fs::write(&own, "stand-in").unwrap();
    let _ = bench.create("c", &bundle).ok();
    let _ = bench.call(&["start", "c"]).ok();
    let state: Value = serde_json::from_str(&bench.read("state/c/state.json")).unwrap();
    let words = std::fs::read_to_string(format!("/proc/{}/cmdline", state["vmm"]["pid"])).unwrap();
    let words: Vec<&str> = words.split('\0').collect();
    let said = |name: &str| words.iter().position(|word| *word == name).map(|at| words[at + 1]);
    assert_eq!(said("--image"), own.to_str(), "{words:?}");
    assert_eq!((said("--vcpus"), said("--memory-mib")), (Some("3"), Some("768")), "{words:?}");
}
