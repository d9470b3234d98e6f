//! Terminals: what conmon asks for over its console socket, and what a user's own terminal sees.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixListener, process::CommandExt},
    },
    path::Path,
    process::Command,
    thread,
};

use coffer_replay::{Bench, config, finish, take_terminal, until};
use nix::pty::{Winsize, openpty};
use serde_json::json;

fn size(terminal: &impl AsRawFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the structure outlives the call.
    assert_eq!(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
}

/// Everything that comes out of a terminal, kept where it can be looked at.
fn record(terminal: File, bench: &Bench, name: &str) {
    let mut file = File::create(bench.path(name)).unwrap();
    thread::spawn(move || {
        let (mut terminal, mut buffer) = (terminal, [0; 4096]);
        while let Ok(count @ 1..) = terminal.read(&mut buffer) {
            let _ = file.write_all(&buffer[..count]);
        }
    });
}

/// Says its terminal, its size at first and at each change, and ends at a line.
const SCRIPT: &str = "trap 'echo size $(stty size)' WINCH; tty; stat -c 'owner %u' $(tty); echo size $(stty size); while ! read -r word; do :; done; echo got $word; exit 4";

/// Makes container `c`, as podman does with a terminal; the terminal.
fn created(bench: &Bench, bundle: &Path) -> File {
    let listener = UnixListener::bind(bench.path("console")).unwrap();
    let mut command = bench.command(&["create", "--bundle"]);
    command.arg(bundle).arg("--console-socket").arg(bench.path("console")).arg("c");
    let mut child = command.spawn().unwrap();
    let terminal = File::from(take_terminal(&listener));
    assert_eq!(finish(&mut child), 0);
    terminal
}

#[test]
fn conmons_console_socket_gets_the_terminal_before_create_returns() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", SCRIPT]);
    config["process"]["terminal"] = json!(true);
    config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    let bundle = bench.bundle("c", &config);
    assert!(bench.create("c", &bundle).failed(1).contains("--console-socket"));
    let mut terminal = created(&bench, &bundle);
    size(&terminal, 30, 90);
    record(terminal.try_clone().unwrap(), &bench, "out");
    let _ = bench.call(&["start", "c"]).ok();
    until(|| bench.read("out").contains("size 30 90"));
    assert!(bench.read("out").starts_with("/dev/pts/0\r\nowner 1000\r\n"), "{:?}", bench.read("out"));
    size(&terminal, 40, 100);
    until(|| bench.read("out").contains("size 40 100"));
    terminal.write_all(b"word\n").unwrap();
    // The guest's line discipline echoes; there is no second one.
    until(|| bench.read("out").contains("got word"));
    assert_eq!(bench.read("out").matches("word\r\n").count(), 2, "{:?}", bench.read("out"));
    bench.wait_stopped("c");
}

/// config-linux.md, "Default Devices".
#[test]
fn the_console_is_the_first_processs_terminal() {
    for (read_only, mapped) in [(false, false), (true, false), (true, true)] {
        let bench = Bench::new();
        let script =
            "test -c /dev/console && echo seen >/dev/console; readlink /proc/self/fd/0; read -r word";
        let mut config = config(&["sh", "-c", script]);
        config["process"]["terminal"] = json!(true);
        config["root"]["readonly"] = json!(read_only);
        if mapped {
            config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
            let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
            config["linux"]["uidMappings"] = map.clone();
            config["linux"]["gidMappings"] = map;
        }
        let bundle = bench.bundle("c", &config);
        fs::set_permissions(bench.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        let mut terminal = created(&bench, &bundle);
        record(terminal.try_clone().unwrap(), &bench, "out");
        let _ = bench.call(&["start", "c"]).ok();
        until(|| bench.read("out").lines().count() == 2);
        assert_eq!(bench.read("out"), "seen\r\n/dev/pts/0\r\n", "mapped: {mapped}");
        // A further process has it, too, whatever its own terminal.
        let _ = bench.call(&["exec", "c", "sh", "-c", "echo further >/dev/console"]).ok();
        until(|| bench.read("out").contains("further"));
        terminal.write_all(b"word\n").unwrap();
        bench.wait_stopped("c");
    }
}

#[test]
fn a_further_process_has_the_configured_size_from_its_beginning() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let process = json!({
        "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", "echo size $(stty size)"], "cwd": "/",
        "env": ["PATH=/bin"], "terminal": true, "consoleSize": { "height": 31, "width": 91 }
    });
    std::fs::write(bench.path("process.json"), process.to_string()).unwrap();
    let listener = UnixListener::bind(bench.path("console")).unwrap();
    let mut command = bench.command(&["exec", "--detach", "--process"]);
    command.arg(bench.path("process.json")).arg("--console-socket").arg(bench.path("console")).arg("c");
    let mut child = command.spawn().unwrap();
    record(File::from(take_terminal(&listener)), &bench, "out");
    assert_eq!(finish(&mut child), 0);
    until(|| bench.read("out").contains("size"));
    until(|| bench.read("out").ends_with('\n'));
    assert_eq!(bench.read("out"), "size 31 91\r\n");
}

#[test]
fn a_users_own_terminal_is_raw_while_run_lasts_and_its_size_follows() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", SCRIPT]);
    config["process"]["terminal"] = json!(true);
    let bundle = bench.bundle("c", &config);
    let pair = openpty(None, None).unwrap();
    size(&pair.master, 20, 70);
    let mut command: Command = bench.command(&["run", "-b"]);
    let slave = || pair.slave.try_clone().unwrap();
    command.arg(&bundle).arg("c").stdin(slave()).stdout(slave()).stderr(slave());
    // SAFETY: between fork and exec; both calls are safe there.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    let mut master = File::from(pair.master);
    record(master.try_clone().unwrap(), &bench, "out");
    until(|| bench.read("out").contains("size 20 70"));
    size(&master, 25, 75);
    until(|| bench.read("out").contains("size 25 75"));
    master.write_all(b"word\n").unwrap();
    assert_eq!(finish(&mut child), 4);
    until(|| bench.read("out").contains("got word"));
    let after = nix::sys::termios::tcgetattr(&pair.slave).unwrap();
    assert!(after.local_flags.contains(nix::sys::termios::LocalFlags::ICANON));
}

#[test]
fn a_users_own_terminal_is_for_keys_and_what_is_printed_goes_to_stdout() {
    // As in `run … >file` on a terminal; runc and crun copy to their stdout.
    let bench = Bench::new();
    let mut config = config(&[
        "sh",
        "-c",
        "tty; echo $(stty size); read -r word; echo got $word; while :; do sleep 1; done",
    ]);
    config["process"]["terminal"] = json!(true);
    let bundle = bench.bundle("c", &config);
    let pair = openpty(None, None).unwrap();
    size(&pair.master, 20, 70);
    let on_terminal = |arguments: &[&str], output: &str| {
        let mut command: Command = bench.command(arguments);
        let slave = || pair.slave.try_clone().unwrap();
        command.stdin(slave()).stdout(File::create(bench.path(output)).unwrap()).stderr(slave());
        command
    };
    let mut command = on_terminal(&["run", "-b"], "run-out");
    let mut child = command.arg(&bundle).arg("c").spawn().unwrap();
    let mut master = File::from(pair.master.try_clone().unwrap());
    record(master.try_clone().unwrap(), &bench, "terminal");
    until(|| bench.read("run-out").contains("20 70"));
    master.write_all(b"word\n").unwrap();
    until(|| bench.read("run-out").contains("got word"));
    let mut exec = on_terminal(&["exec", "-t", "c", "sh", "-c", "tty; exit 5"], "exec-out").spawn().unwrap();
    assert_eq!(finish(&mut exec), 5);
    assert!(bench.read("exec-out").contains("/dev/pts/1"), "{:?}", bench.read("exec-out"));
    let _ = bench.call(&["kill", "c", "KILL"]).ok();
    assert_eq!(finish(&mut child), 137);
    assert_eq!(bench.read("terminal"), "");
}
