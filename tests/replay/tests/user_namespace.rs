//! User namespaces: whose identifiers a container's processes and files have.

use std::{
    fs,
    io::Read,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        net::UnixListener,
    },
};

use coffer_replay::{Bench, config, finish, take_terminal, until};
use serde_json::{Value, json};

fn mount(config: &mut Value, mount: Value) {
    config["mounts"].as_array_mut().unwrap().push(mount);
}

/// As podman's `--userns=container:ID` and `ns:PATH` have it.
#[test]
fn a_user_namespace_by_a_path_has_that_ones_maps() {
    let bench = Bench::new();
    let user = |path: Option<String>| {
        let mut config = config(&["sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; sleep 1000"]);
        let mut entry = json!({ "type": "user" });
        if let Some(path) = path {
            entry["path"] = json!(path);
        }
        config["linux"]["namespaces"].as_array_mut().unwrap().push(entry);
        config
    };
    let maps = |id: &str| {
        until(|| bench.read(&format!("{id}.out")).lines().count() >= 2);
        let text = bench.read(&format!("{id}.out"));
        text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    let mut first = user(None);
    first["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    first["linux"]["gidMappings"] = json!([{ "containerID": 0, "hostID": 200_000, "size": 65_536 }]);
    bench.start("c", &first);
    let wanted = ["0 100000 65536", "0 200000 65536"];
    assert_eq!(maps("c"), wanted);
    // Another container's, and one that has it from that.
    bench.start("d", &user(Some(format!("/proc/{}/ns/user", bench.pid("c")))));
    assert_eq!(maps("d"), wanted);
    bench.start("e", &user(Some(format!("/proc/{}/ns/user", bench.pid("d")))));
    assert_eq!(maps("e"), wanted);
    // Who has none has the guest's, and so has who names it.
    bench.start("plain", &config(&["sleep", "1000"]));
    bench.start("f", &user(Some(format!("/proc/{}/ns/user", bench.pid("plain")))));
    assert_eq!(maps("f"), ["0 0 4294967295", "0 0 4294967295"]);
    // One of the host's.
    let mut holder = std::process::Command::new("unshare").args(["--user", "sleep", "600"]).spawn().unwrap();
    let file = |name: &str| format!("/proc/{}/{name}", holder.id());
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    until(|| fs::read_link(file("ns/user")).is_ok_and(|link| link != own));
    fs::write(file("uid_map"), "0 300000 1000").unwrap();
    fs::write(file("gid_map"), "0 400000 1000").unwrap();
    bench.start("g", &user(Some(format!("/proc/{}/ns/user", holder.id()))));
    assert_eq!(maps("g"), ["0 300000 1000", "0 400000 1000"]);
    holder.kill().unwrap();
    holder.wait().unwrap();
    for (path, why) in
        [("/proc/self/ns/user", "the host's own"), ("/no/such/namespace", "/no/such/namespace")]
    {
        let bundle = bench.bundle("h", &user(Some(path.into())));
        assert!(bench.create("h", &bundle).failed(1).contains(why), "{path}");
        assert!(bench.state("h").is_err());
    }
}

#[test]
fn a_user_namespace_has_the_configured_identifiers_inside_and_on_files() {
    let bench = Bench::new();
    let script = "id -u; cat /proc/self/uid_map; echo x > /srv/made; stat -c %u /srv /bin/sh /dev/null; hostname; ls /proc/1/ns >/dev/null && echo proc";
    let mut config = config(&["sh", "-c", script]);
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    config["linux"]["uidMappings"] = map.clone();
    config["linux"]["gidMappings"] = map;
    let bundle = bench.bundle("c", &config);
    fs::set_permissions(bench.path(""), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    chown(bundle.join("rootfs/srv"), Some(100_000), Some(100_000)).unwrap();
    let _ = bench.create("c", &bundle).ok();
    // One more process is in it, too.
    assert_eq!(
        bench
            .call(&["exec", "c", "sh", "-c", "id -u; readlink /proc/self/ns/user; true"])
            .ok()
            .lines()
            .next(),
        Some("0")
    );
    // On a terminal, which is its user's there.
    let listener = UnixListener::bind(bench.path("console")).unwrap();
    for user in ["0", "1000"] {
        let mut command = bench.command(&["exec", "-t", "-u", user, "--console-socket"]);
        let script = "tty; stat -c %u $(tty); read -r word";
        command.arg(bench.path("console")).args(["--detach", "c", "sh", "-c", script]);
        assert_eq!(finish(&mut command.spawn().unwrap()), 0);
        let (mut terminal, mut said) = (fs::File::from(take_terminal(&listener)), String::new());
        while said.lines().count() < 2 {
            let mut bytes = [0; 256];
            let count = terminal.read(&mut bytes).unwrap();
            said.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        assert!(said.starts_with("/dev/pts/") && said.ends_with(&format!("\r\n{user}\r\n")), "{said:?}");
    }
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    let words: Vec<String> = bench.read("c.out").split_whitespace().map(str::to_owned).collect();
    assert_eq!(
        words,
        ["0", "0", "100000", "65536", "0", "65534", "0", "bench", "proc"],
        "{}",
        bench.read("c.err")
    );
    assert_eq!(fs::metadata(bundle.join("rootfs/srv/made")).unwrap().uid(), 100_000);
}

/// As on a host, where they are mounted and made from within.
#[test]
fn with_a_user_namespace_file_systems_and_what_is_made_are_its_roots() {
    let bench = Bench::new();
    let script = "stat -c '%n %u %g' /plain /own /made /made/below /srv/cwd /srv/cwd/here /dev /dev/null /dev/mine /dev/fd /dev/pts/ptmx; \
                  touch /plain/x && echo written; grep -c '^devpts /dev/pts devpts .*gid=200005,' /proc/self/mounts";
    let mut config = config(&["sh", "-c", script]);
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    config["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    config["linux"]["gidMappings"] = json!([{ "containerID": 0, "hostID": 200_000, "size": 65_536 }]);
    config["linux"]["devices"] = json!([{ "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8 }]);
    config["process"]["cwd"] = json!("/srv/cwd/here");
    fs::create_dir(bench.path("volume")).unwrap();
    for (destination, kind, source, options) in [
        ("/plain", "tmpfs", json!("tmpfs"), json!(["mode=755"])),
        ("/own", "tmpfs", json!("tmpfs"), json!(["mode=755", "uid=5", "gid=6"])),
        ("/made/below/volume", "bind", json!(bench.path("volume")), json!(["bind"])),
    ] {
        mount(
            &mut config,
            json!({ "destination": destination, "type": kind, "source": source, "options": options }),
        );
    }
    let bundle = bench.bundle("c", &config);
    fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    chown(bundle.join("rootfs/srv"), Some(100_000), Some(200_000)).unwrap();
    bench.start("c", &config);
    bench.wait_stopped("c");
    let wanted = "/plain 0 0\n/own 5 6\n/made 0 0\n/made/below 0 0\n/srv/cwd 0 0\n/srv/cwd/here 0 0\n\
                  /dev 0 0\n/dev/null 0 0\n/dev/mine 7 8\n/dev/fd 0 0\n/dev/pts/ptmx 0 0\nwritten\n1\n";
    assert_eq!(bench.read("c.out"), wanted, "{}", bench.read("c.err"));
    // Whom the container does not know can own nothing in it.
    config["mounts"].as_array_mut().unwrap().last_mut().unwrap()["type"] = json!("tmpfs");
    config["mounts"].as_array_mut().unwrap().last_mut().unwrap()["options"] = json!(["uid=70000"]);
    let bundle = bench.bundle("d", &config);
    let said = bench.create("d", &bundle).failed(1);
    assert!(said.contains("/made/below/volume") && said.contains("uid=70000"), "{said}");
}
