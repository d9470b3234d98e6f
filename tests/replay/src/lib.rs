//! A bench for `coffer`: an installation whose VMM is a stand-in, bundles, and callers' calls.
//!
//! Owns: making and removing all of that. Does not own: what is expected of the calls.
//!
//! It needs root, as `coffer` does, and Debian's `busybox-static` and `python3` for the containers' programs.

use std::{
    fs,
    io::{IoSliceMut, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::symlink, net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg},
};
use serde_json::{Value, json};

/// Long enough for a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An installation, a root directory and bundles, all removed at the end.
pub struct Bench {
    directory: tempfile::TempDir,
    coffer: PathBuf,
    /// Calls say no `--root`.
    by_default: bool,
}

/// What a call gave.
#[derive(Debug)]
pub struct Gave {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Gave {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The call succeeded; its output.
    ///
    /// # Panics
    /// When it did not.
    #[must_use]
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self.out
    }

    /// The call failed with this code; what it said.
    ///
    /// # Panics
    /// When it did something else.
    #[must_use]
    #[track_caller]
    pub fn failed(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        self.err
    }
}

/// A configuration as podman 4.3.1 writes it for `run IMAGE COMMAND`, without what a test has no use for.
#[must_use]
pub fn config(args: &[&str]) -> Value {
    let capabilities =
        json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT"]);
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": { "uid": 0, "gid": 0, "umask": 18 }, "args": args, "cwd": "/",
            "env": ["PATH=/usr/bin:/bin", "TERM=xterm", "container=podman", "HOME=/root"],
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }]
        },
        "root": { "path": "rootfs" },
        "hostname": "bench",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] }
        ],
        "annotations": { "io.container.manager": "libpod" },
        "linux": {
            "resources": { "pids": { "limit": 2048 } },
            "namespaces": [{ "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }]
        }
    })
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

impl Bench {
    /// Makes one.
    ///
    /// # Panics
    /// Without root or busybox.
    #[must_use]
    pub fn new() -> Self {
        // SAFETY: reads a number.
        assert_eq!(unsafe { libc::geteuid() }, 0, "these tests make containers: run them as root");
        let directory = tempfile::tempdir().expect("a directory");
        let programs = std::env::current_exe().expect("this program's path");
        let programs = programs.ancestors().nth(2).expect("target/PROFILE").to_owned();
        let home = directory.path().join("home");
        fs::create_dir_all(home.join("bin")).expect("home/bin");
        fs::create_dir_all(home.join("images")).expect("home/images");
        symlink(programs.join("vmm-stand-in"), home.join("bin/coffer-vmm")).expect("the stand-in");
        for image in ["up", "smp"] {
            fs::write(home.join(format!("images/{image}.igvm")), "stand-in").expect("an image");
        }
        let bench = Self { coffer: programs.join("coffer-under-test"), directory, by_default: false };
        for program in [&bench.coffer, &programs.join("vmm-stand-in")] {
            assert!(program.exists(), "{} is not built: cargo build -p coffer-replay", program.display());
        }
        bench
    }

    /// One whose calls name no `--root`, as podman's, so that states are in `/run/coffer`: of a mount namespace that is this thread's own
    /// from here on, with an empty `/run`.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn by_default_root() -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let mount = |source, target, kind, flags| {
            mount(source, target, kind, flags, None::<&str>)
                .unwrap_or_else(|error| panic!("{target}: {error}"));
        };
        mount(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty());
        let mut bench = Self::new();
        bench.by_default = true;
        bench
    }

    /// A file or directory of this bench's own.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where states are: the `--root` of calls.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        if self.by_default { "/run/coffer".into() } else { self.path("state") }
    }

    /// No guest comes up any more.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn break_image(&self) {
        fs::write(self.path("home/images/up.igvm"), "broken").expect("an image");
    }

    /// A bundle with busybox in its root, and this configuration.
    ///
    /// # Panics
    /// Without busybox.
    #[must_use]
    pub fn bundle(&self, name: &str, config: &Value) -> PathBuf {
        let bundle = self.path(name);
        let rootfs = bundle.join("rootfs");
        for directory in ["bin", "etc", "proc", "dev", "sys", "tmp", "root", "srv"] {
            fs::create_dir_all(rootfs.join(directory)).expect("a directory");
        }
        // A new file each time: a process of a container that just ended may still have the old one open.
        let fresh = rootfs.join("bin/busybox.new");
        copy_busybox(&fresh);
        fs::rename(&fresh, rootfs.join("bin/busybox")).expect("rename busybox");
        for applet in [
            "sh", "cat", "echo", "env", "false", "grep", "head", "hostname", "id", "kill", "ls", "mount",
            "ps", "readlink", "pwd", "seq", "sleep", "stat", "stty", "tail", "test", "touch", "true",
            "umask", "wc",
        ] {
            let _ = symlink("busybox", rootfs.join("bin").join(applet));
        }
        fs::write(
            rootfs.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n",
        )
        .expect("passwd");
        fs::write(rootfs.join("srv/not-executable"), "#!/bin/sh\n").expect("a file");
        self.configure(name, config);
        bundle
    }

    /// Writes a bundle's configuration again.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn configure(&self, name: &str, config: &Value) {
        let text = serde_json::to_vec(config).expect("JSON");
        fs::write(self.path(name).join("config.json"), text).expect("config.json");
    }

    /// A call with the environment that podman gives to create and exec, not run yet.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let root = self.root();
        let of_root = ["--root", root.to_str().expect("a path")];
        self.call_of(&[if self.by_default { &[] } else { &of_root[..] }, words].concat())
    }

    /// The same with these words alone.
    #[must_use]
    pub fn call_of(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.coffer);
        command
            .args(words)
            .env_clear()
            .env("COFFER_HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", "")
            .env("PATH", "/usr/bin:/bin");
        command.env("_OCI_SYNCPIPE", "3").env("_OCI_STARTPIPE", "4").stdin(Stdio::null());
        command
    }

    /// [`Self::command`] as conmon calls it.
    #[must_use]
    pub fn command_of_conmon(&self, words: &[&str]) -> Command {
        self.by_conmon(&self.command(words))
    }

    /// A call as conmon makes it: it is killed when its caller ends, and it has what the caller has left open by mistake, for podman a
    /// published port at 5 and two files of the user's own shell at 10 and 251. Here all three are [`Self::leaked`].
    #[must_use]
    pub fn by_conmon(&self, call: &Command) -> Command {
        let mut command = Command::new("/bin/bash");
        command.args(["-c", "exec 5<>\"$0\" 10<>\"$0\" 251<>\"$0\"; exec \"$@\""]).arg(self.leaked());
        command.arg(call.get_program()).args(call.get_args()).env_clear();
        command.envs(call.get_envs().filter_map(|(name, value)| Some((name, value?)))).stdin(Stdio::null());
        let dies_with_its_caller = || {
            // SAFETY: the option takes one number.
            match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: one system call, and no memory is taken.
        unsafe { command.pre_exec(dies_with_its_caller) };
        command
    }

    /// The file that calls of [`Self::command_of_conmon`] have open.
    #[must_use]
    pub fn leaked(&self) -> PathBuf {
        self.path("leaked")
    }

    /// A call as podman makes all others: no environment but one variable.
    ///
    /// # Panics
    /// When the program cannot be run, or runs for longer than [`PATIENCE`].
    #[must_use]
    pub fn call(&self, words: &[&str]) -> Gave {
        let mut command = self.command(words);
        command.env_clear().env("XDG_RUNTIME_DIR", "");
        gave(&mut command)
    }

    /// `create` as conmon calls it, with stdio that goes to files `ID.out` and `ID.err`.
    ///
    /// # Panics
    /// When the program cannot be run.
    #[must_use]
    pub fn create(&self, id: &str, bundle: &Path) -> Gave {
        let mut command = self.command_of_conmon(&["--log-format=json", "--log"]);
        command.arg(self.path(&format!("{id}.log"))).arg("create").arg("--bundle").arg(bundle);
        command.arg("--pid-file").arg(self.path(&format!("{id}.pid"))).arg(id);
        command.stdout(fs::File::create(self.path(&format!("{id}.out"))).expect("a file"));
        command.stderr(fs::File::create(self.path(&format!("{id}.err"))).expect("a file"));
        let code = finish(&mut command.spawn().expect("coffer"));
        Gave { code, out: self.read(&format!("{id}.out")), err: self.read(&format!("{id}.err")) }
    }

    /// A container that runs; its output is in `ID.out` and `ID.err`.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn start(&self, id: &str, config: &Value) {
        let bundle = self.bundle(id, config);
        let _ = self.create(id, &bundle).ok();
        let _ = self.call(&["start", id]).ok();
    }

    /// A pod `kbs` whose KBS, in its own network, reads what it is asked and never answers, and a container `beside` in it, which says
    /// `asked` when it gets USR1. The KBS goes at TERM, and says `over` last.
    ///
    /// # Panics
    /// When they do not run.
    #[track_caller]
    pub fn start_silent_kbs(&self) {
        let initdata = self.path("initdata");
        let text = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"coffer.toml\" = 'allow_plain_http = true'\n\
                    \"cdh.toml\" = \"\"\"\n[kbc]\nname = 'cc_kbc'\nurl = 'http://127.0.0.1:8080'\n\"\"\"\n";
        fs::write(&initdata, text).expect("initdata");
        let script = "trap 'echo over; exit 3' TERM; sleep 1000 | busybox nc -l -p 8080 & wait";
        let mut kbs = config(&["sh", "-c", script]);
        kbs["annotations"]["io.coffer.initdata"] = json!(initdata);
        self.start("kbs", &kbs);
        let mut beside = config(&["sh", "-c", "trap 'echo asked' USR1; while :; do sleep 0.1; done"]);
        beside["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!("kbs");
        self.start("beside", &beside);
    }

    /// The state, or the words of the error.
    ///
    /// # Errors
    /// What `coffer state` said.
    pub fn state(&self, id: &str) -> Result<Value, String> {
        let gave = self.call(&["state", id]);
        if gave.code == 0 { Ok(serde_json::from_str(&gave.out).expect("state JSON")) } else { Err(gave.err) }
    }

    /// The status of a container that is there.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    #[track_caller]
    pub fn status(&self, id: &str) -> String {
        self.state(id).expect("a container")["status"].as_str().expect("a status").to_owned()
    }

    /// The stub's process id.
    ///
    /// # Panics
    /// When there is no container.
    #[must_use]
    #[track_caller]
    pub fn pid(&self, id: &str) -> i32 {
        self.read(&format!("{id}.pid")).parse().expect("a pid file without a newline")
    }

    /// The text of a file of this bench's own.
    #[must_use]
    pub fn read(&self, name: &str) -> String {
        let mut text = Vec::new();
        let _ = fs::File::open(self.path(name)).and_then(|mut f| f.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The last message of level error in a container's log.
    #[must_use]
    pub fn logged(&self, id: &str) -> String {
        let text = self.read(&format!("{id}.log"));
        let mut lines = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        let last = lines.rfind(|l| l["level"] == "error");
        last.and_then(|l| l["msg"].as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// Waits until a container's stub has ended.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait_stopped(&self, id: &str) {
        until(|| self.status(id) == "stopped");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.root()).into_iter().flatten().flatten() {
            let id = entry.file_name();
            let _ = Command::new(&self.coffer)
                .arg("--root")
                .arg(self.root())
                .args(["delete", "--force"])
                .arg(id)
                .output();
        }
    }
}

/// A copy of busybox under this name, to be run at once. Another program makes it: what this one has open for writing, a child
/// that another thread starts has too, until it runs its own program, and so long the file counts as busy.
///
/// # Panics
/// Without busybox.
pub fn copy_busybox(to: &Path) {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|p| p.exists());
    let copied =
        Command::new("cp").arg(busybox.expect("busybox: apt-get install busybox-static")).arg(to).status();
    assert!(copied.expect("cp").success(), "copy busybox to {}", to.display());
}

/// Waits for something.
///
/// # Panics
/// When it does not come within [`PATIENCE`].
#[track_caller]
pub fn until(mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "it does not come");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a call to its end.
///
/// # Panics
/// When it cannot be run.
#[must_use]
pub fn gave(command: &mut Command) -> Gave {
    Gave::of(command.output().expect("coffer"))
}

/// Waits for a child with patience; its exit code.
///
/// # Panics
/// When it does not end.
#[track_caller]
pub fn finish(child: &mut Child) -> i32 {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status.code().unwrap_or(-1);
        }
        assert!(began.elapsed() < PATIENCE, "it does not end");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Takes the terminal of a console socket as conmon does: one message with one descriptor.
///
/// # Panics
/// When something else comes.
#[must_use]
pub fn take_terminal(listener: &UnixListener) -> OwnedFd {
    let (stream, _) = listener.accept().expect("a connection");
    let mut bytes = [0; 64];
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(i32);
    let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::empty())
        .expect("a message");
    let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().expect("control messages").next() else {
        panic!("no descriptor")
    };
    assert!(message.bytes > 0 && fds.len() == 1);
    // SAFETY: the kernel made this descriptor for us with the message.
    unsafe { OwnedFd::from_raw_fd(fds[0]) }
}
