//! Shells here are second runs of this test program, which answer as a VMM would.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixListener},
};

use coffer_protocol::shell::{GO, TAKEN};

use super::*;

/// A second run is told by this variable in which directory it is a shell, and by the other what it answers.
const CHILD: &str = "COFFER_TEST_SHELL";
const ANSWER: &str = "COFFER_TEST_ANSWER";

#[test]
fn stand_in() {
    let Some(directory) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
    println!("listens");
    let answer = std::env::var(ANSWER).unwrap();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut head = [0; 4];
        if stream.read(&mut head).unwrap() == 0 {
            continue;
        }
        let mut body = vec![0; u32::from_le_bytes(head) as usize];
        stream.read_exact(&mut body).unwrap();
        assert_eq!(body, b"--image\0/i\0");
        stream.write_all(answer.as_bytes()).unwrap();
        if answer == TAKEN {
            let mut word = [0];
            stream.read_exact(&mut word).unwrap();
            assert_eq!(word, [GO]);
            // It is a VM from now on.
            drop((listener, stream));
            thread::sleep(Duration::from_secs(600));
            return;
        }
    }
}

struct Pool {
    root: tempfile::TempDir,
    image: PathBuf,
    children: Vec<Child>,
}

impl Pool {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let image = root.path().join("up.igvm");
        fs::write(&image, "an image").unwrap();
        Self { root, image, children: Vec::new() }
    }

    fn path(&self) -> &Path {
        self.root.path()
    }

    /// A shell that gives this answer; its directory's name.
    fn add(&mut self, answer: &str) -> String {
        let place = make(self.path()).unwrap();
        fs::write(place.path.join(IMAGE), serde_json::to_vec(&Source::of(&self.image).unwrap()).unwrap())
            .unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "pool::tests::stand_in", "--nocapture"]);
        command.env(CHILD, &place.path).env(ANSWER, answer).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.ends_with("listens")));
        self.children.push(child);
        place.name()
    }

    fn take(&self) -> Result<Pid, String> {
        let program = std::env::current_exe().unwrap();
        let words = vec!["--image".into(), "/i".into()];
        let request = Request { program, image: self.image.clone(), words, descriptors: vec![0] };
        let namespaces = || Ok(vec![OwnedFd::from(File::open("/dev/null").unwrap())]);
        take(self.path(), &request, namespaces).unwrap()
    }

    fn names(&self) -> Vec<String> {
        places(self.path()).iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn of_two_takers_each_gets_a_shell_of_its_own_and_the_third_none() {
    let mut pool = Pool::new();
    for _ in 0..2 {
        pool.add(TAKEN);
    }
    let ours: Vec<i32> = pool.children.iter().map(|child| child.id() as i32).collect();
    let taken: Vec<_> = thread::scope(|scope| {
        let takers: Vec<_> = (0..3).map(|_| scope.spawn(|| pool.take())).collect();
        takers.into_iter().map(|taker| taker.join().unwrap()).collect()
    });
    let mut pids: Vec<i32> = taken.iter().flatten().map(|process| process.pid).collect();
    pids.sort_unstable();
    assert_eq!(pids, ours);
    assert_eq!(taken.into_iter().find_map(Result::err).as_deref(), Some("the pool is empty"));
    assert!(!pool.path().join(DIRECTORY).exists());
}

#[test]
fn a_dead_shell_is_removed_and_the_next_is_taken() {
    let mut pool = Pool::new();
    pool.add(TAKEN);
    pool.add(TAKEN);
    fs::create_dir(pool.path().join(DIRECTORY).join("3")).unwrap();
    pool.children[0].kill().unwrap();
    pool.children[0].wait().unwrap();
    assert_eq!(pool.take().map(|process| process.pid), Ok(pool.children[1].id() as i32));
    assert_eq!(pool.names(), ["3"]);
    assert_eq!(pool.take(), Err("the pool is empty".into()));
    assert!(pool.names().is_empty());
}

#[test]
fn one_that_does_not_fit_stays_and_one_that_refuses_goes() {
    let mut pool = Pool::new();
    let (unfit, refusing) = (pool.add(TAKEN), pool.add("it is too small\n"));
    let place = pool.path().join(DIRECTORY).join(&unfit);
    let other = Source { path: "/other".into(), ..Source::of(&pool.image).unwrap() };
    fs::write(place.join(IMAGE), serde_json::to_vec(&other).unwrap()).unwrap();
    assert_eq!(pool.take(), Err(format!("shell {refusing}: it is too small")));
    assert_eq!(pool.names().join(" "), unfit);
    assert!(pool.children[1].wait().unwrap().code().is_none(), "it was killed");
    let why = pool.take().unwrap_err();
    assert!(why.starts_with(&format!("shell {unfit}: it has /other")), "{why}");
    // The same name, and another file.
    fs::write(place.join(IMAGE), serde_json::to_vec(&Source::of(&pool.image).unwrap()).unwrap()).unwrap();
    fs::write(&pool.image, "another image").unwrap();
    assert!(pool.take().unwrap_err().contains("is another file"));
    assert!(matches!(pool.children[0].try_wait(), Ok(None)));
}

#[test]
fn shells_are_listed_with_their_use_and_drained_with_their_directories() {
    let mut pool = Pool::new();
    let name = pool.add(TAKEN);
    fs::create_dir(pool.path().join(DIRECTORY).join("9")).unwrap();
    let program = std::env::current_exe().unwrap();
    let (pid, image) = (pool.children[0].id() as i32, pool.image.clone());
    assert_eq!(list(pool.path(), &program), [Shown { name, pid, image, unfit: None }]);
    let unfit = list(pool.path(), Path::new("/bin/sh")).remove(0).unfit.unwrap();
    assert!(unfit.contains("another program"), "{unfit}");
    drain(pool.path()).unwrap();
    drain(pool.path()).unwrap();
    assert!(pool.children[0].wait().unwrap().code().is_none(), "it was killed");
    assert!(!pool.path().join(DIRECTORY).exists());
}

#[test]
fn a_shell_that_does_not_get_ready_says_why_and_is_gone() {
    let pool = Pool::new();
    let program = pool.path().join("vmm");
    // --shell DIR --image FILE --log FILE
    fs::write(&program, "#!/bin/sh\necho 'no luck today' >$6\nexit 3\n").unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = fill(pool.path(), &program, &pool.image, 2).unwrap_err().to_string();
    assert!(error.contains("no luck today"), "{error}");
    assert!(
        fill(pool.path(), &program, Path::new("/no/such"), 1).unwrap_err().to_string().contains("/no/such")
    );
    // The second one ends by itself, and whoever comes next removes what it left.
    let began = Instant::now();
    while !pool.names().is_empty() && began.elapsed() < LIMIT {
        assert!(list(pool.path(), &program).is_empty());
    }
    assert!(!pool.path().join(DIRECTORY).exists());
}
