//! A network that comes at each of its three moments: before create, in hooks, between create and start; and to what runs.
//!
//! The other end of each interface is in a namespace of the test's own, that of a process which sleeps. Guest and host's namespace are tied as in a
//! VM: only the device between the two taps is the stand-in's.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Child, Command, Stdio},
};

use coffer_replay::{Bench, config, until};
use serde_json::{Value, json};

/// A process in a network namespace of its own.
struct Outside(Child);

impl Outside {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        let child = command.args(["--net", "sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
        let outside = Self(child);
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let path = format!("/proc/{}/ns/net", outside.pid());
        until(|| fs::read_link(&path).is_ok_and(|link| link != own));
        outside
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// An interface of another process's namespace, with address `NET.2`; here the other end has `NET.1`.
    fn plug(&self, pid: i32, name: &str, net: &str) {
        let far = format!("far-{name}");
        ip(self.pid(), &format!("link add {far} type veth peer name {name} netns {pid}"));
        ip(self.pid(), &format!("addr add {net}.1/24 dev {far}"));
        ip(self.pid(), &format!("link set {far} up"));
        ip(pid, &format!("addr add {net}.2/24 dev {name}"));
        ip(pid, &format!("link set {name} up"));
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(pid: i32, words: &str) {
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid.to_string(), "-n", "ip"]).args(words.split(' '));
    assert!(command.status().unwrap().success(), "ip {words}");
}

/// A shell that may ping.
fn shell(script: &str) -> Value {
    let mut config = config(&["sh", "-c", script]);
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_NET_RAW"));
    }
    config
}

const SHOW: &str = "ip=\"busybox ip\"; $ip addr; $ip -4 route; $ip -6 route; $ip neigh; busybox ping -c 1 -W 10 10.77.0.1 && echo reached";

fn in_namespace(mut config: Value, pid: i32) -> Value {
    for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(format!("/proc/{pid}/ns/net"));
        }
    }
    config
}

/// A container that shows its network, which is there, with an interface, before `create`.
fn created(bench: &Bench, outside: &Outside, inside: &Outside) {
    outside.plug(inside.pid(), "eth0", "10.77.0");
    let bundle = bench.bundle("a", &in_namespace(shell(SHOW), inside.pid()));
    let _ = bench.create("a", &bundle).ok();
}

/// Waits until a container has shown its network, which has this and reaches the other end.
fn shows(bench: &Bench, id: &str, wanted: &str) {
    bench.wait_stopped(id);
    let said = bench.read(&format!("{id}.out"));
    assert!(
        said.contains(wanted) && said.ends_with("reached\n"),
        "{id}: {said}{}",
        bench.read(&format!("{id}.err"))
    );
}

#[test]
fn before_create() {
    let (bench, outside, inside) = (Bench::new(), Outside::new(), Outside::new());
    created(&bench, &outside, &inside);
    let _ = bench.call(&["start", "a"]).ok();
    shows(&bench, "a", "10.77.0.2/24");
}

#[test]
fn between_create_and_start_with_all_that_an_interface_has() {
    let (bench, outside) = (Bench::new(), Outside::new());
    let bundle = bench.bundle("a", &shell(SHOW));
    let _ = bench.create("a", &bundle).ok();
    let pid = bench.pid("a");
    outside.plug(pid, "eth0", "10.77.0");
    for words in [
        "link set eth0 mtu 1400",
        "addr add fd77::2/64 dev eth0 nodad",
        "route add default via 10.77.0.1",
        "route add 10.99.0.0/16 via 10.77.0.1 metric 7",
        "-6 route add fd99::/16 via fd77::1",
        "neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        // To a gateway that no other route leads to.
        "route add 10.98.0.0/16 via 192.168.9.9 dev eth0 onlink",
    ] {
        ip(pid, words);
    }
    let _ = bench.call(&["start", "a"]).ok();
    bench.wait_stopped("a");
    let said = bench.read("a.out");
    for wanted in [
        "mtu 1400",
        "10.77.0.2/24",
        "fd77::2/64",
        "default via 10.77.0.1 dev eth0",
        "10.99.0.0/16 via 10.77.0.1 dev eth0  metric 7",
        "10.98.0.0/16 via 192.168.9.9 dev eth0",
        "fd99::/16 via fd77::1 dev eth0",
        "10.77.0.9 dev eth0 lladdr 02:00:00:00:00:09",
        "reached",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}{}", bench.read("a.err"));
    }
}

#[test]
fn a_route_of_ipv4_by_a_gateway_of_ipv6() {
    let (bench, outside) = (Bench::new(), Outside::new());
    let script = "busybox ping -c 1 -W 10 10.97.0.1 && busybox ping -c 1 -W 10 10.96.0.1 && echo reached";
    let bundle = bench.bundle("a", &shell(script));
    let _ = bench.create("a", &bundle).ok();
    let pid = bench.pid("a");
    outside.plug(pid, "eth0", "10.77.0");
    ip(outside.pid(), "addr add fd77::1/64 dev far-eth0 nodad");
    // Not asked for by ARP: only a gateway leads there.
    for address in ["10.97.0.1/32", "10.96.0.1/32"] {
        ip(outside.pid(), &format!("addr add {address} dev lo"));
    }
    let mut command = Command::new("nsenter");
    let ignore = "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore";
    command.args(["-t", &outside.pid().to_string(), "-n", "sh", "-c", ignore]);
    assert!(command.status().unwrap().success());
    ip(pid, "addr add fd77::2/64 dev eth0 nodad");
    ip(pid, "-4 route add default via inet6 fd77::1 dev eth0");
    ip(pid, "route add 10.96.0.0/16 via inet6 fd77::1 dev eth0 metric 7");
    let _ = bench.call(&["start", "a"]).ok();
    shows(&bench, "a", "1 packets received");
}

#[test]
fn in_hooks() {
    let (bench, outside) = (Bench::new(), Outside::new());
    let hook = bench.path("hook");
    let text = format!(
        r#"#!/bin/sh -e
pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/')
at() {{ nsenter -t "$1" -n ip $2; }}
at {0} "link add far type veth peer name eth0 netns $pid"
at {0} 'addr add 10.77.0.1/24 dev far'
at {0} 'link set far up'
at $pid 'addr add 10.77.0.2/24 dev eth0'
at $pid 'link set eth0 up'
"#,
        outside.pid()
    );
    fs::write(&hook, text).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = shell(SHOW);
    config["hooks"] =
        json!({ "prestart": [{ "path": hook, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }] });
    bench.start("a", &config);
    shows(&bench, "a", "10.77.0.2/24");
}

#[test]
fn what_is_not_there_any_more_at_start_goes_and_what_a_container_added_stays() {
    let (bench, outside, inside) = (Bench::new(), Outside::new(), Outside::new());
    outside.plug(inside.pid(), "eth0", "10.76.0");
    ip(inside.pid(), "route add default via 10.76.0.1");
    let script = "busybox ip addr; busybox ip route; echo shown; while ! test -e /srv/go; do sleep 0.1; done; \
                  busybox ip addr add 10.70.0.1/24 dev eth0; echo added; sleep 1000";
    let mut first = in_namespace(shell(script), inside.pid());
    for set in ["bounding", "effective", "permitted"] {
        first["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_NET_ADMIN"));
    }
    let bundle = bench.bundle("a", &first);
    let _ = bench.create("a", &bundle).ok();
    ip(inside.pid(), "addr del 10.76.0.2/24 dev eth0");
    ip(inside.pid(), "addr add 10.75.0.2/24 dev eth0");
    let _ = bench.call(&["start", "a"]).ok();
    until(|| bench.read("a.out").contains("shown"));
    let said = bench.read("a.out");
    assert!(
        said.contains("10.75.0.2/24") && !said.contains("10.76.0") && !said.contains("default"),
        "{said}"
    );
    fs::write(bundle.join("rootfs/srv/go"), "").unwrap();
    until(|| bench.read("a.out").contains("added"));
    // A further container of the pod, with an interface that came meanwhile.
    outside.plug(inside.pid(), "eth1", "10.77.0");
    bench.start("b", &in_namespace(shell(SHOW), inside.pid()));
    shows(&bench, "b", "10.70.0.1/24");
}

#[test]
fn an_address_that_changes_between_create_and_start_is_the_guests_too() {
    let (bench, outside, inside) = (Bench::new(), Outside::new(), Outside::new());
    created(&bench, &outside, &inside);
    ip(inside.pid(), "link set eth0 address 02:00:00:00:77:02");
    let _ = bench.call(&["start", "a"]).ok();
    shows(&bench, "a", "02:00:00:00:77:02");
}

#[test]
fn containers_of_one_pod_that_start_at_one_moment_share_what_came() {
    let (bench, outside, inside) = (Bench::new(), Outside::new(), Outside::new());
    outside.plug(inside.pid(), "eth0", "10.76.0");
    bench.start("a", &in_namespace(shell("sleep 1000"), inside.pid()));
    let members = ["b", "c", "d", "e"];
    for id in members {
        let _ = bench.create(id, &bench.bundle(id, &in_namespace(shell(SHOW), inside.pid()))).ok();
    }
    outside.plug(inside.pid(), "eth1", "10.77.0");
    let start = |id| {
        let mut command = bench.command(&["start", id]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for started in members.map(start) {
        let gave = started.wait_with_output().unwrap();
        assert!(gave.status.success(), "{}", String::from_utf8_lossy(&gave.stderr));
    }
    for id in members {
        shows(&bench, id, "10.77.0.2/24");
    }
}

#[test]
fn an_interface_too_many_fails_start_in_one_line_and_what_it_tied_is_free_again() {
    let (bench, outside) = (Bench::new(), Outside::new());
    let bundle = bench.bundle("a", &shell(SHOW));
    let _ = bench.create("a", &bundle).ok();
    let pid = bench.pid("a");
    for number in 0..4 {
        outside.plug(pid, &format!("net{number}"), &format!("10.7{}.0", number + 4));
    }
    let said = bench.call(&["start", "a"]).failed(1);
    assert!(said.contains("interface net3: a VM has 3 network devices at most"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(bench.status("a"), "created");
    ip(pid, "link del net3");
    let _ = bench.call(&["start", "a"]).ok();
    bench.wait_stopped("a");
    // The fourth is gone; the one of the address that is asked for is net3's.
    let said = bench.read("a.out");
    assert!(said.contains("net2") && !said.contains("net3"), "{said}");
}

#[test]
fn an_interface_that_comes_to_what_runs_is_there_at_the_next_exec() {
    let (bench, outside) = (Bench::new(), Outside::new());
    bench.start("a", &shell("sleep 1000"));
    let pid = bench.pid("a");
    for (name, net) in [("first", "10.75.0"), ("second", "10.76.0"), ("third", "10.77.0")] {
        outside.plug(pid, name, net);
        let show = format!("busybox ip addr show {name} && busybox ping -c 1 -W 10 {net}.1");
        let said = bench.call(&["exec", "--cap", "CAP_NET_RAW", "a", "sh", "-c", &show]).ok();
        assert!(said.contains(&format!("{net}.2/24")) && said.contains("1 packets received"), "{said}");
        // The engine takes one away again: the next one is new all the same.
        if name == "first" {
            ip(pid, "link del first");
        }
    }
    // A VM has three places; who asks for no network is not refused for one.
    outside.plug(pid, "fourth", "10.78.0");
    let log = bench.path("log");
    let log = log.to_str().unwrap();
    let _ = bench.call(&["--log", log, "exec", "a", "true"]).ok();
    let said = bench.read("log");
    assert!(said.contains("interface fourth: a VM has 3 network devices at most"), "{said}");
}

#[test]
fn an_interface_of_a_vm_that_is_gone_can_be_used_again() {
    let (bench, outside, inside) = (Bench::new(), Outside::new(), Outside::new());
    outside.plug(inside.pid(), "eth0", "10.77.0");
    let config = in_namespace(shell(SHOW), inside.pid());
    for _ in 0..2 {
        bench.start("a", &config);
        bench.wait_stopped("a");
        assert!(bench.read("a.out").ends_with("reached\n"), "{}", bench.read("a.err"));
        let _ = bench.call(&["delete", "a"]).ok();
    }
}
