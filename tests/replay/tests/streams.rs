//! What else crosses into a VM: notifications to a service manager, and the caller's open files.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            net::{UnixDatagram, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use coffer_replay::{Bench, PATIENCE, config, finish, gave, until};
use serde_json::json;

/// Gives a command these descriptors, from 3 on, and no others. They are open as long as the command is kept.
fn with(command: &mut Command, files: Vec<OwnedFd>) {
    // SAFETY: plain system calls between fork and exec. First to places where none of the last ones is.
    unsafe {
        command.pre_exec(move || {
            for (at, fd) in files.iter().enumerate() {
                libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100 + at as i32);
            }
            let count = files.len() as i32;
            for at in 0..count {
                if libc::dup2(100 + at, 3 + at) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            libc::close_range(3 + count as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
            Ok(())
        })
    };
}

fn received(socket: &UnixDatagram) -> String {
    let mut bytes = [0; 5000];
    let count = socket.recv(&mut bytes).expect("a message");
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

fn manager(bench: &Bench) -> UnixDatagram {
    let socket = UnixDatagram::bind(bench.path("manager")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A container whose program is this test's own, statically linked or with its libraries: `python3` of the host, to send datagrams.
fn notifier(script: &str) -> serde_json::Value {
    let mut config = config(&["/usr/bin/python3", "-c", &format!("{SEND}{script}")]);
    for directory in ["/usr", "/lib", "/lib64"] {
        config["mounts"].as_array_mut().unwrap().push(json!({
            "destination": directory, "type": "bind", "source": directory, "options": ["rbind", "ro"]
        }));
    }
    config
}

const SEND: &str = "
import os, socket, time
def say(*words):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.sendto('\\n'.join(words).encode(), os.environ['NOTIFY_SOCKET'])
";

/// As podman 4.3.1 configures a container whose socket is for conmon, which is this test.
fn podmans(bench: &Bench, script: &str) -> (serde_json::Value, UnixDatagram) {
    let mut config = notifier(script);
    let path = bench.path("notify/notify.sock");
    fs::create_dir(bench.path("notify")).unwrap();
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    config["process"]["env"].as_array_mut().unwrap().push(json!("NOTIFY_SOCKET=/run/notify/notify.sock"));
    // As podman 4.3.1 writes it.
    config["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/run/notify", "type": "bind", "source": bench.path("notify"), "options": ["bind", "rprivate"]
    }));
    (config, socket)
}

#[test]
fn podmans_socket_hears_an_owners_pod_as_well() {
    let bench = Bench::new();
    let (mut config, socket) = podmans(&bench, "say('READY=1')\n");
    let rules = [
        "CreateSandbox",
        "UpdateInterface",
        "CreateContainer",
        "StartContainer",
        "ReadStream",
        "RemoveContainer",
    ];
    let rules = rules.map(|rule| format!("{rule}Request := true\n")).concat();
    let text = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy.rego\" = '''\npackage agent_policy\nimport rego.v1\n{rules}'''\n"
    );
    fs::write(bench.path("initdata"), text).unwrap();
    config["annotations"]["io.coffer.initdata"] = json!(bench.path("initdata"));
    bench.start("c", &config);
    assert_eq!(received(&socket), "READY=1\n");
    bench.wait_stopped("c");
}

#[test]
fn podmans_socket_hears_how_the_service_is_and_not_who_it_is() {
    let bench = Bench::new();
    let script = "
say('READY=1', 'MAINPID=1', 'STATUS=up')
r, w = os.pipe()
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.connect(os.environ['NOTIFY_SOCKET'])
socket.send_fds(s, [b'BARRIER=1'], [w])
os.close(w)
os.read(r, 1)
print('past the barrier', flush=True)
say('x' * 5000)
say('STOPPING=1')
";
    let (config, socket) = podmans(&bench, script);
    bench.start("c", &config);
    assert_eq!(received(&socket), "READY=1\nSTATUS=up\n");
    // What is too long, and what is for the guest alone, is not heard.
    assert_eq!(received(&socket), "STOPPING=1\n");
    bench.wait_stopped("c");
    assert_eq!(bench.read("c.out"), "past the barrier\n", "{}", bench.read("c.err"));
}

#[test]
fn start_returns_when_the_container_is_ready_and_has_told_the_manager() {
    let bench = Bench::new();
    let manager = manager(&bench);
    let bundle = bench.bundle(
        "c",
        &notifier(
            "
while not os.path.exists('/srv/go'): time.sleep(0.01)
say('READY=1')
time.sleep(1000)
",
        ),
    );
    let command = |words: &[&str]| {
        let mut command = bench.command(words);
        command.env("NOTIFY_SOCKET", bench.path("manager")).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let mut create = command(&["create", "--bundle"]);
    create.arg(&bundle).arg("--pid-file").arg(bench.path("c.pid")).arg("c");
    assert_eq!(finish(&mut create.spawn().unwrap()), 0);
    let mut start = command(&["start", "c"]).spawn().unwrap();
    until(|| bench.status("c") == "running");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(start.try_wait().unwrap(), None, "it waits for the container");
    fs::write(bundle.join("rootfs/srv/go"), "").unwrap();
    assert_eq!(received(&manager), format!("READY=1\nMAINPID={}\n", bench.pid("c")));
    assert_eq!(received(&manager), "BARRIER=1");
    assert_eq!(finish(&mut start), 0);
}

#[test]
fn start_does_not_wait_for_a_container_that_ends_without_a_word() {
    let bench = Bench::new();
    let manager = manager(&bench);
    let bundle = bench.bundle("c", &config(&["true"]));
    let mut run = bench.command(&["run", "-d", "-b"]);
    run.arg(&bundle).arg("c").env("NOTIFY_SOCKET", bench.path("manager"));
    run.stdout(Stdio::null()).stderr(Stdio::null());
    assert_eq!(finish(&mut run.spawn().unwrap()), 0);
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut [0]).is_err());
}

#[test]
fn preserved_files_are_the_processs_from_3_on() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let (input, mut to_guest) = std::io::pipe().unwrap();
    let file = bench.path("file");
    fs::write(&file, "of a file\n").unwrap();
    let script = "cat <&4; echo to a file >&5; cat <&3; echo closed; ls /proc/self/fd";
    let mut command = bench.command(&["exec", "--preserve-fds", "3", "c", "sh", "-c", script]);
    let out = File::create(bench.path("out")).unwrap();
    with(&mut command, vec![input.into(), File::open(&file).unwrap().into(), out.into()]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    to_guest.write_all(b"rest").unwrap();
    drop(to_guest);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    // ls has its own directory open beside them, and nothing else is there.
    assert_eq!(text, "of a file\nrestclosed\n0\n1\n2\n3\n4\n5\n6\n");
    assert_eq!(bench.read("out"), "to a file\n");
}

#[test]
fn preserved_streams_are_whole_both_ways_at_once() {
    let bench = Bench::new();
    let mut config = config(&["sh", "-c", "cat <&3 >&4"]);
    config["process"]["rlimits"] = json!([]);
    let bundle = bench.bundle("c", &config);
    let (input, mut into) = std::io::pipe().unwrap();
    let (mut from, output) = std::io::pipe().unwrap();
    let data = bytes(8 << 20);
    let mut command = bench.command(&["run", "--preserve-fds=2", "-b"]);
    command.arg(&bundle).arg("c");
    with(&mut command, vec![input.into(), output.into()]);
    let mut child = command.spawn().unwrap();
    drop(command);
    let sent = data.clone();
    let writer = std::thread::spawn(move || into.write_all(&sent).unwrap());
    let mut got = Vec::new();
    from.read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert!(got == data, "{} of {} bytes", got.len(), data.len());
    assert_eq!(finish(&mut child), 0);
}

/// So many, in no pattern that a lost or doubled piece would keep.
fn bytes(count: u32) -> Vec<u8> {
    (0..count).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// A running `coffer run` whose container has one end of a socket as descriptor 3; the other end.
fn with_a_socket(bench: &Bench, id: &str, script: &str) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    (given(bench, id, script, theirs), ours)
}

fn given(bench: &Bench, id: &str, script: &str, socket: UnixStream) -> Child {
    let bundle = bench.bundle(id, &config(&["sh", "-c", script]));
    let mut command = bench.command(&["run", "--preserve-fds=1", "-b"]);
    command.arg(&bundle).arg(id);
    with(&mut command, vec![socket.into()]);
    command.spawn().unwrap()
}

#[test]
fn a_connected_socket_is_whole_both_ways_at_once_and_each_way_ends_by_itself() {
    let bench = Bench::new();
    for round in 0..4 {
        let script = "cat <&3 >&3; echo and the rest >&3";
        let (mut child, mut socket) = with_a_socket(&bench, &format!("c{round}"), script);
        let data = bytes(8 << 20);
        let (mut writes, sent) = (socket.try_clone().unwrap(), data.clone());
        // A caller that did not read meanwhile would wait for itself.
        let writer = std::thread::spawn(move || {
            writes.write_all(&sent).unwrap();
            writes.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        socket.read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        assert!(got.ends_with(b"and the rest\n"), "{} bytes, round {round}", got.len());
        assert!(got[..data.len()] == data, "{} bytes, round {round}", got.len());
        assert_eq!(finish(&mut child), 0);
    }
}

#[test]
fn a_sockets_end_is_seen_although_the_caller_has_it_too() {
    let bench = Bench::new();
    for (id, script) in
        [("ended-first", "cat <&3 >&3"), ("ends-first", "echo word >&3; exec 3<&-; sleep 1000")]
    {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let kept = theirs.try_clone().unwrap();
        let mut child = given(&bench, id, script, theirs);
        ours.write_all(b"word\n").unwrap();
        if id == "ended-first" {
            ours.shutdown(Shutdown::Write).unwrap();
        }
        let mut got = String::new();
        ours.read_to_string(&mut got).unwrap();
        assert_eq!(got, "word\n");
        drop(kept);
        let _ = bench.call(&["kill", id, "KILL"]);
        finish(&mut child);
    }
}

#[test]
fn questions_and_answers_alternate_over_a_socket() {
    let bench = Bench::new();
    let (mut child, socket) = with_a_socket(
        &bench,
        "c",
        "while read -r line <&3; do echo \"got $line\" >&3; [ \"$line\" != last ] || exit 7; done",
    );
    let mut answers = BufReader::new(socket.try_clone().unwrap()).lines();
    for question in ["one", "two", "last"] {
        writeln!(&socket, "{question}").unwrap();
        assert_eq!(answers.next().unwrap().unwrap(), format!("got {question}"));
    }
    assert!(answers.next().is_none());
    assert_eq!(finish(&mut child), 7);
}

#[test]
fn what_a_process_has_answered_arrives_although_it_left_its_question_unread() {
    let bench = Bench::new();
    for round in 0..4 {
        // Closing a socket with bytes in it is an error to its other end, which has the answer before it.
        let script = "head -c 1 <&3 >/dev/null; head -c 300000 /dev/zero >&3";
        let (mut child, mut socket) = with_a_socket(&bench, &format!("c{round}"), script);
        socket.write_all(&bytes(100_000)).unwrap();
        let mut got = Vec::new();
        socket.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), 300_000, "round {round}");
        assert_eq!(finish(&mut child), 0);
    }
}

#[test]
fn what_is_no_stream_fails_in_one_line_and_makes_nothing() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["true"]));
    let mut command = bench.command(&["create", "--preserve-fds=1", "-b"]);
    command.arg(&bundle).arg("c");
    with(&mut command, vec![File::open("/").unwrap().into()]);
    let said = gave(&mut command).failed(1);
    assert_eq!(
        said,
        "coffer: error: open file 3 cannot be given to a VM: a directory is no stream: mount it as a volume\n"
    );
    assert!(bench.state("c").is_err());
    let said = gave(&mut activated(&bench, &bundle, &[], Vec::new())).failed(1);
    assert_eq!(said, "coffer: error: open file 3 cannot be given to a VM: it is not open\n");
}

/// A caller may count more than it has open: those numbers are not open in the container either.
#[test]
fn what_is_counted_and_not_open_stays_so() {
    let bench = Bench::new();
    let script = "ls /proc/$$/fd; cat <&5";
    let bundle = bench.bundle("c", &config(&["sh", "-c", script]));
    let mut command = bench.command(&["run", "--preserve-fds=100", "-b"]);
    command.arg(&bundle).arg("c");
    fs::write(bench.path("text"), "five\n").unwrap();
    let five = File::open(bench.path("text")).unwrap();
    with(&mut command, vec![five.try_clone().unwrap().into(), five.try_clone().unwrap().into(), five.into()]);
    // SAFETY: closes two numbers in the child, which uses neither.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, || {
            libc::close(3);
            libc::close(4);
            Ok(())
        });
    }
    assert_eq!(gave(&mut command).ok(), "0\n1\n2\n5\nfive\n");
    let mut command = bench.command(&["run", "--preserve-fds=100", "-b"]);
    command.arg(bench.bundle("d", &config(&["sh", "-c", "ls /proc/$$/fd; true"]))).arg("d");
    with(&mut command, Vec::new());
    assert_eq!(gave(&mut command).ok(), "0\n1\n2\n");
}

#[test]
fn files_by_listen_fds_come_first_and_are_announced() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; cat <&3; cat <&4"]));
    let files = ["one\n", "two\n"].map(|text| {
        fs::write(bench.path("text"), text).unwrap();
        let file = File::open(bench.path("text")).unwrap();
        fs::remove_file(bench.path("text")).unwrap();
        OwnedFd::from(file)
    });
    let gave = gave(&mut activated(&bench, &bundle, &["--preserve-fds=1"], files.into()));
    assert_eq!(gave.ok(), "1 1\none\ntwo\n");
}

#[test]
fn a_connection_that_systemd_accepted_is_the_processs_to_serve() {
    let bench = Bench::new();
    let script = "read -r word <&3; echo \"$LISTEN_FDS hello $word\" >&3";
    let bundle = bench.bundle("c", &config(&["sh", "-c", script]));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let mut command = activated(&bench, &bundle, &[], vec![accepted.into()]);
    let mut child = command.spawn().unwrap();
    drop(command);
    client.write_all(b"world\n").unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "1 hello world\n");
    assert_eq!(finish(&mut child), 0);
}

/// `run` as systemd starts a service with sockets: LISTEN_FDS=1, and whatever else these options say.
fn activated(bench: &Bench, bundle: &Path, options: &[&str], files: Vec<OwnedFd>) -> Command {
    // LISTEN_PID must be the runtime's own number: a shell that becomes it knows.
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\""]);
    let inner = bench.command(&["run", "-b"]);
    command.arg(inner.get_program()).args(inner.get_args()).arg(bundle).args(options).arg("c").env_clear();
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("LISTEN_FDS", "1");
    with(&mut command, files);
    command.stdin(Stdio::null());
    command
}

/// What a reader who stalls does not take the guest keeps, and the stub goes on hearing its caller.
#[test]
fn a_reader_that_stalls_keeps_no_signal_from_the_process() {
    let bench = Bench::new();
    bench.start("c", &config(&["sleep", "1000"]));
    let pid_file = bench.path("e.pid");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut exec = bench.command(&["exec", "--pid-file", pid_file.to_str().unwrap(), "c"]);
    exec.args(["busybox", "cat", "/dev/zero"]);
    let mut child = exec.stdout(writer).spawn().unwrap();
    drop(exec);
    let waiting = || {
        let mut count = 0i32;
        // SAFETY: the pointer is to an integer that outlives the call.
        assert_eq!(unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &raw mut count) }, 0);
        count
    };
    until(|| waiting() >= 60 * 1024 && !bench.read("e.pid").is_empty());
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", bench.pid("e"))).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap()
    };
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(memory() < 8 * 1024, "{} KiB", memory());
    assert!(bench.call(&["ps", "c"]).ok().contains("/dev/zero"));
    // SAFETY: signals a process of this test's own container.
    assert_eq!(unsafe { libc::kill(bench.pid("e"), libc::SIGTERM) }, 0);
    until(|| !bench.call(&["ps", "c"]).ok().contains("/dev/zero"));
    // Nothing of what it had written is lost.
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert!(all.len() >= 64 * 1024 && all.iter().all(|byte| *byte == 0), "{}", all.len());
    assert_eq!(finish(&mut child), 143);
}
