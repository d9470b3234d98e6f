//! One command in the emulated machine.
//!
//! Owns: the state directory that both share, QEMU's process, the copying of output, and that nothing stays behind.
//! Does not own: QEMU's words (`machine`), the kernel (`kernel`).

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::{self, IsTerminal, Read, Write},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use thiserror::Error;

use crate::{
    RIG_FAILED, TIMED_OUT,
    args::Run,
    kernel::Stock,
    machine,
    saved::{self, Turn, Way},
    signals,
};

/// The machine cannot be used.
#[derive(Debug, Error)]
pub(crate) enum EmulatedError {
    #[error("{what} {path}: {source}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> EmulatedError {
    move |source| EmulatedError::System { what, source }
}

/// How often output is looked for.
const TICK: Duration = Duration::from_millis(20);
/// How much of a console is shown.
const CONSOLE_TAIL: usize = 8000;

/// A directory that is removed even when this process is killed: by a shell that waits for the end of a pipe.
struct State {
    path: PathBuf,
    remover: Option<Child>,
}

impl State {
    fn new() -> Result<Self, EmulatedError> {
        let template = std::env::temp_dir().join("coffer-rig-XXXXXX");
        let path = nix::unistd::mkdtemp(&template).map_err(|e| EmulatedError::File {
            what: "make",
            path: template,
            source: e.into(),
        })?;
        // QEMU dies with this process and may make a file while that happens, so once more.
        let script = r#"read -r _; rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }"#;
        let remover = Command::new("/bin/sh")
            .args(["-c", script, "coffer-rig-remover"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0) // what kills this process's group must leave it
            .spawn()
            .map_err(system("start /bin/sh"))?;
        Ok(Self { path, remover: Some(remover) })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), EmulatedError> {
        let path = self.path.join(name);
        fs::write(&path, bytes).map_err(|source| EmulatedError::File { what: "write", path, source })
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read(self.path.join(name)).ok().map(|b| String::from_utf8_lossy(&b).into_owned())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(mut remover) = self.remover.take() {
            drop(remover.stdin.take());
            let _ = remover.wait();
        }
    }
}

/// A process that ends with this value.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Quotes for a shell: any bytes but NUL.
fn quote(bytes: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in bytes {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            _ => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// The shell script that becomes the command: its environment, its directory, its words.
fn script(environment: &BTreeMap<OsString, OsString>, directory: &Path, command: &[String]) -> Vec<u8> {
    let mut text = Vec::new();
    for (name, value) in environment {
        let identifier = |b: &[u8]| {
            !b.is_empty()
                && !b[0].is_ascii_digit()
                && b.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'_')
        };
        if identifier(name.as_bytes()) {
            text.extend([b"export ", name.as_bytes(), b"=", &quote(value.as_bytes()), b"\n"].concat());
        }
    }
    text.extend([b"cd ", &quote(directory.as_os_str().as_bytes())[..], b" || cd /\nexec"].concat());
    for word in command {
        text.push(b' ');
        text.extend(quote(word.as_bytes()));
    }
    text.push(b'\n');
    text
}

/// This process's environment, but for what names this host's directories of processes that are not in the machine.
fn environment() -> BTreeMap<OsString, OsString> {
    let left_out = ["TMPDIR", "XDG_RUNTIME_DIR", "_", "PWD", "OLDPWD", "SHLVL"];
    let mut all: BTreeMap<_, _> =
        std::env::vars_os().filter(|(name, _)| !left_out.iter().any(|l| name == l)).collect();
    all.insert("COFFER_RIG".into(), "emulated".into());
    all
}

/// A file that grows, copied to where it belongs.
struct Follower<W> {
    from: File,
    to: W,
    closed: bool,
}

impl<W: Write> Follower<W> {
    fn new(path: &Path, to: W) -> Result<Self, EmulatedError> {
        let failed = |source| EmulatedError::File { what: "open", path: path.to_owned(), source };
        Ok(Self { from: File::open(path).map_err(failed)?, to, closed: false })
    }

    fn copy(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = self.from.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            // A reader that has gone, as `| head` does, does not stop the command here as it would on a host.
            if !self.closed && self.to.write_all(&buffer[..n]).and_then(|()| self.to.flush()).is_err() {
                self.closed = true;
            }
        }
    }
}

fn lay_out(run: &Run, stock: &Stock, state: &State, writable: &[PathBuf]) -> Result<(), EmulatedError> {
    let directory = std::env::current_dir().map_err(system("find the working directory"))?;
    state.write("start", &script(&environment(), &directory, &run.command))?;
    let mut shares = Vec::new();
    for (n, directory) in writable.iter().enumerate() {
        shares.extend(format!("{} {}\n", machine::share_tag(n), directory.display()).into_bytes());
    }
    state.write("shares", &shares)?;
    state.write("modules", format!("{}\n", stock.modules.display()).as_bytes())?;
    for name in ["out", "err", "stdin", "console"] {
        state.write(name, b"")?;
    }
    if run.stdin && !io::stdin().is_terminal() {
        let path = state.path.join("stdin");
        let failed = |source| EmulatedError::File { what: "copy stdin to", path: path.clone(), source };
        let mut file = File::create(&path).map_err(failed)?;
        io::copy(&mut io::stdin().lock(), &mut file).map_err(failed)?;
    }
    Ok(())
}

fn start(argv: &[String], state: &State) -> Result<Machine, EmulatedError> {
    let log = state.path.join("qemu");
    let log = File::create(&log).map_err(|source| EmulatedError::File { what: "make", path: log, source })?;
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // Ctrl-C is for this process, which then ends QEMU.
    command.process_group(0);
    let die_with_parent = || nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
    // SAFETY: between fork and exec; one system call.
    unsafe { command.pre_exec(die_with_parent) };
    command.spawn().map(Machine).map_err(system("start qemu-system-x86_64 (apt-get install qemu-system-x86)"))
}

/// QEMU's messages and the end of the console.
fn explain(state: &State) {
    for name in ["qemu", "console"] {
        let text = state.read(name).unwrap_or_default();
        let from = text.char_indices().rev().nth(CONSOLE_TAIL).map_or(0, |(at, _)| at);
        eprintln!("--- {name}\n{}", text[from..].trim_end());
    }
}

/// How a machine that was started ended.
enum End {
    /// With the command's exit code, or one of the rig's.
    Code(u8),
    /// It did not come so far that the command ran.
    Lifeless,
}

/// Runs it. The exit code is the command's, or one of the rig's.
///
/// # Errors
/// [`EmulatedError`]: what this host lacks.
pub(crate) fn run(run: &Run, stock: &Stock) -> Result<u8, EmulatedError> {
    let canonical = |path: &PathBuf| {
        path.canonicalize().map_err(|source| EmulatedError::File {
            what: "share",
            path: path.clone(),
            source,
        })
    };
    let writable = run.writable.iter().map(canonical).collect::<Result<Vec<_>, _>>()?;
    let khz = machine::tsc_khz(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
    if khz.is_none() {
        eprintln!("rig: /proc/cpuinfo does not tell the TSC's rate: some guests will stall for seconds");
    }
    let state = State::new()?;
    lay_out(run, stock, &state, &writable)?;
    let way = saved::way(run, stock, &machine::common(run, stock, khz));
    let started = |way: &Way| {
        let argv = machine::command(run, stock, &state.path, &writable, khz, way);
        follow(run, &state, &argv, way)
    };
    match started(&way)? {
        End::Code(code) => return Ok(code),
        End::Lifeless => {}
    }
    // Nothing of the command has run.
    if let Way::Continue(file) = &way {
        eprintln!("rig: the saved machine does not go on: it is removed, and one boots");
        let _ = fs::remove_file(file);
    } else {
        eprintln!("rig: the machine did not come up: another one boots");
    }
    match started(&Way::Boot)? {
        End::Code(code) => Ok(code),
        End::Lifeless => {
            eprintln!("rig: nor did this one come up");
            explain(&state);
            Ok(RIG_FAILED)
        }
    }
}

fn follow(run: &Run, state: &State, argv: &[String], way: &Way) -> Result<End, EmulatedError> {
    let mut turn = match way {
        Way::Boot => None,
        Way::Save(_) | Way::Continue(_) => Some(
            Turn::new(&state.path, matches!(way, Way::Continue(_)))
                .map_err(|e| system("prepare the machine")(io::Error::other(e)))?,
        ),
    };
    let mut to_save = match way {
        Way::Save(file) => Some(file),
        Way::Boot | Way::Continue(_) => None,
    };
    let mut out = Follower::new(&state.path.join("out"), io::stdout())?;
    let mut err = Follower::new(&state.path.join("err"), io::stderr())?;
    let began = Instant::now();
    let mut machine = start(argv, state)?;
    loop {
        let code = state.read("rc");
        let ended = code.is_some() || machine.0.try_wait().map_err(system("wait for QEMU"))?.is_some();
        // After the look at the end: what was written before it is copied.
        out.copy().map_err(system("copy output"))?;
        err.copy().map_err(system("copy output"))?;
        if let Some(code) = signals::exit_code() {
            return Ok(End::Code(code));
        }
        if let Some(turn) = turn.as_mut().filter(|t| !t.has_gone_on()) {
            let lifeless = matches!(way, Way::Continue(_)) && (ended || began.elapsed() > saved::PATIENCE);
            if lifeless {
                return Ok(End::Lifeless);
            }
            if turn.can_be_saved()
                && let Some(file) = to_save.take()
                && let Err(error) = saved::save(&state.path, file)
            {
                eprintln!("rig: the machine is not kept for the next run: {error}");
            }
            if to_save.is_none() {
                turn.go_on().map_err(system("tell the machine to go on"))?;
            }
        }
        let up = state.read("up").unwrap_or_default();
        // A second time is for a machine that hangs, not for a limit shorter than that or a kernel that says why it ended.
        if up.is_empty() && !ended && began.elapsed() > run.ready && run.ready < run.time_out {
            return Ok(End::Lifeless);
        }
        if let Some(code) = code.or_else(|| if ended { state.read("rc") } else { None }) {
            if run.verbose {
                let took = began.elapsed().as_secs_f64();
                let came =
                    if matches!(way, Way::Continue(_)) { "went on from a saved one" } else { "booted" };
                eprintln!("rig: it {came}, ready after {} s of its time, {took:.2} s in all", up.trim());
                explain(state);
            }
            return code
                .trim()
                .parse()
                .map(End::Code)
                .map_err(|_| system("read the exit code")(io::Error::other(code)));
        }
        if ended {
            eprintln!("rig: the machine ended without a result");
            explain(state);
            return Ok(End::Code(RIG_FAILED));
        }
        if began.elapsed() > run.time_out {
            eprintln!("rig: no result after {} s", run.time_out.as_secs());
            if up.is_empty() {
                eprintln!("rig: the machine was not even ready");
                explain(state);
                return Ok(End::Code(RIG_FAILED));
            }
            // The command may be slow, or the machine's kernel may have something to say.
            explain(state);
            return Ok(End::Code(TIMED_OUT));
        }
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn the_script_gives_a_shell_the_same_words_and_environment() {
        let odd = "a'b \"c\" $d `e`\n\\";
        let environment = BTreeMap::from([
            ("ODD".into(), odd.into()),
            ("9X".into(), "no name for a shell".into()),
            ("BYTES".into(), OsString::from_vec(vec![0xff, b'\''])),
        ]);
        let print = "printf '%s|' \"$@\" \"$ODD\" \"$BYTES\"; pwd";
        let words = ["sh", "-c", print, "sh", odd, "", "é"].map(str::to_owned);
        let text = script(&environment, Path::new("/usr"), &words);
        let output = Command::new("sh").arg("-c").arg(OsString::from_vec(text)).output().unwrap();
        let expected =
            [odd.as_bytes(), b"||", "é".as_bytes(), b"|", odd.as_bytes(), b"|\xff'|/usr\n"].concat();
        assert_eq!(output.stdout, expected);
    }

    #[test]
    fn the_state_goes_away_with_its_owner() {
        let state = State::new().unwrap();
        let path = state.path.clone();
        state.write("x", b"y").unwrap();
        assert!(path.join("x").exists());
        drop(state);
        assert!(!path.exists());
    }
}
