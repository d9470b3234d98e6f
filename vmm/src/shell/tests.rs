//! Who gets a shell, and what nobody gets it with. Joining wants rights: without them a request that is right is answered by why not.

use std::{io::BufRead, io::BufReader, thread};

use coffer_protocol::shell::{MOST_BYTES, encode};

use super::*;

const WORDS: &str = "--image /i --memory-mib 64 --lifeline-fd 64 --net fd=65,mac=02:00:00:00:00:01";

fn words(line: &str) -> Vec<u8> {
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    encode(&words).unwrap()
}

/// This thread's own namespaces, and what stands for lifeline and tap.
fn descriptors(count: usize) -> Vec<File> {
    let names = ["/proc/thread-self/ns/mnt", "/proc/thread-self/ns/net"].into_iter();
    names.chain(std::iter::repeat("/dev/null")).take(count).map(|name| File::open(name).unwrap()).collect()
}

/// Sends bytes, and reads the answer: empty when the shell closes. One that is taken may go on.
fn ask(directory: &Path, bytes: &[u8], descriptors: &[File]) -> String {
    let Ok(stream) = UnixStream::connect(directory.join(SOCKET)) else { return String::new() };
    let fds: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let mut line = String::new();
    if stream.send_with_fds(&[bytes], &fds).is_ok() {
        let head = bytes.first_chunk().copied().map(length_of);
        if head != Some(Ok(bytes.len().saturating_sub(4))) {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let _ = BufReader::new(&stream).read_line(&mut line);
    }
    if line == TAKEN {
        (&stream).write_all(&[GO]).unwrap();
    }
    line
}

fn door() -> (tempfile::TempDir, PathBuf, Door) {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("1");
    fs::create_dir(&directory).unwrap();
    let door = Door::open(&directory).unwrap();
    (parent, directory, door)
}

/// A second run of this program that runs one test alone is told by this variable: what is taken gets fixed numbers.
const CHILD: &str = "COFFER_TEST_ALONE";

/// Whether this is that run; else it is made, and must succeed.
fn is_alone(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    false
}

fn is_right(answer: &str) -> bool {
    // SAFETY: has no arguments and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if root { answer == TAKEN } else { answer.contains("the pod's mount namespace") }
}

#[test]
fn of_many_takers_one_gets_the_shell() {
    if !is_alone("shell::tests::of_many_takers_one_gets_the_shell") {
        return;
    }
    let (_parent, directory, door) = door();
    let shell = thread::spawn(move || door.wait(|_| Ok(())));
    let takers: Vec<_> = (0..6)
        .map(|_| {
            let directory = directory.clone();
            thread::spawn(move || ask(&directory, &words(WORDS), &descriptors(4)))
        })
        .collect();
    let answers: Vec<String> = takers.into_iter().map(|taker| taker.join().unwrap()).collect();
    let answered: Vec<&String> = answers.iter().filter(|answer| !answer.is_empty()).collect();
    assert!(answered.len() == 1 && is_right(answered[0]), "{answers:?}");
    if let Ok(taken) = shell.join().unwrap() {
        let taken = taken.unwrap();
        assert_eq!((taken.args.lifeline, taken.args.nets[0].fd), (Some(64), 65));
        // Those numbers are the pod's now.
        for fd in [64, 65] {
            // SAFETY: the shell's thread made them and has ended.
            let file = unsafe { File::from_raw_fd(fd) };
            assert_eq!(fs::read_link(format!("/proc/self/fd/{fd}")).unwrap(), Path::new("/dev/null"));
            drop(file);
        }
    }
    assert!(!directory.exists());
}

#[test]
fn what_is_not_taken_leaves_the_shell_for_the_next() {
    if !is_alone("shell::tests::what_is_not_taken_leaves_the_shell_for_the_next") {
        return;
    }
    let (_parent, directory, door) = door();
    let fits = |args: &Args| if args.memory_mib == 64 { Ok(()) } else { Err("it is too small".to_owned()) };
    let shell = thread::spawn(move || door.wait(fits));
    let mut not_text = words("--image /i");
    *not_text.last_mut().unwrap() = 0xff;
    for (bytes, count, part) in [
        (&b"\xff\xff\xff\x7f"[..], 4, "65536 are the most"),
        (&words(WORDS)[..30], 4, "not whole"),
        (&words(WORDS)[..2], 0, "not whole"),
        (&not_text, 4, "each end with a NUL"),
        (&words("--imagee /i"), 4, "unknown flag `--imagee`"),
        (&words("--help"), 4, "not for a machine"),
        (&words("--shell /d --image /i"), 4, "not for a machine"),
        (&words(WORDS), 0, "comes with 0 descriptors"),
        (&words(WORDS), 3, "names descriptor 65"),
        (&words(&WORDS.replace("65", "3")), 4, "names descriptor 3"),
        (&words(&WORDS.replace("65", "64")), 4, "names descriptor 64"),
        (&words(WORDS), MOST_DESCRIPTORS + 1, "not whole"),
        (&words(&WORDS.replace("-mib 64", "-mib 32")), 4, "it is too small"),
        (&words(&format!("--trace /{} {WORDS}", "x".repeat(MOST_BYTES / 2))), 2, "names descriptor 64"),
    ] {
        let answer = ask(&directory, bytes, &descriptors(count));
        assert!(answer.contains(part), "{part}: {answer}");
    }
    // One that looks, and says nothing.
    drop(UnixStream::connect(directory.join(SOCKET)).unwrap());
    assert!(is_right(&ask(&directory, &words(WORDS), &descriptors(2 + 2))));
    let _ = shell.join().unwrap();
}

#[test]
fn a_shell_whose_taker_is_gone_does_not_go_on() {
    if !is_alone("shell::tests::a_shell_whose_taker_is_gone_does_not_go_on") {
        return;
    }
    let (_parent, directory, door) = door();
    let shell = thread::spawn(move || door.wait(|_| Ok(())));
    let stream = UnixStream::connect(directory.join(SOCKET)).unwrap();
    let came = descriptors(4);
    let fds: Vec<RawFd> = came.iter().map(AsRawFd::as_raw_fd).collect();
    stream.send_with_fds(&[&words(WORDS)[..]], &fds).unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    assert!(is_right(&line), "{line}");
    drop(stream);
    assert!(!matches!(shell.join().unwrap(), Ok(Some(_))));
    assert!(!directory.exists());
}

#[test]
fn a_socket_that_was_taken_away_or_replaced_is_noticed() {
    let (_parent, directory, door) = door();
    assert!(door.is_there());
    fs::remove_file(directory.join(SOCKET)).unwrap();
    assert!(!door.is_there());
    fs::write(directory.join(SOCKET), "").unwrap();
    assert!(!door.is_there());
}
