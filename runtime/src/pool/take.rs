//! Giving a shell to a pod.
//!
//! Owns: which one, what must be alike in it and in this process, what it has of this process from then on, the request. After it a
//! shell differs from a child of this process by its parent alone, which a VMM never asks for.

use std::{
    fs,
    io::{BufRead, BufReader, IoSlice, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use coffer_protocol::shell::{GO, MOST_ANSWER, TAKEN, encode};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use super::{Content, Place, SOCKET, places};
use crate::{cgroup, error::Error, pid::Pid};

/// How long a shell may take to answer: it checks words and joins namespaces.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How long a shell may be looked at by others before a start goes on without it.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// What a pod wants of a shell.
pub struct Request {
    /// The VMM that is installed.
    pub program: PathBuf,
    /// The IGVM file.
    pub image: PathBuf,
    /// Arguments, which know the descriptors by their numbers in the shell.
    pub words: Vec<String>,
    /// Descriptors of this process, in the order of those numbers.
    pub descriptors: Vec<RawFd>,
}

/// Gives a shell to a pod, and returns its process; or says why there is none. `namespaces` makes those that it is to join.
///
/// # Errors
/// Those of `namespaces`.
pub fn take(
    root: &Path,
    request: &Request,
    namespaces: impl Fn() -> Result<Vec<OwnedFd>, Error>,
) -> Result<Result<Pid, String>, Error> {
    let bytes = match encode(&request.words) {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let (mut joined, began) = (None, Instant::now());
    loop {
        let (mut why, mut busy) = ("the pool is empty".to_owned(), false);
        for path in places(root) {
            let is_ready = path.join(SOCKET).exists();
            let Some(place) = Place::lock(path) else {
                busy |= is_ready;
                continue;
            };
            let name = place.name();
            let mut shell = match place.look() {
                Content::Shell(shell) => shell,
                Content::Dead => {
                    place.remove();
                    continue;
                }
            };
            let differs = || unlike(&Alike::of("self")?, &Alike::of(&shell.process.pid.to_string())?);
            if let Some(reason) = shell.unfit(&request.program, &request.image).or_else(differs) {
                why = format!("shell {name}: {reason}");
                continue;
            }
            let namespaces = match joined.take() {
                Some(made) => made,
                None => namespaces()?,
            };
            let descriptors: Vec<RawFd> = namespaces
                .iter()
                .map(AsRawFd::as_raw_fd)
                .chain(request.descriptors.iter().copied())
                .collect();
            let asked = ask(&shell.stream, &bytes, &descriptors)
                .and_then(|()| adopt(shell.process.pid))
                .and_then(|()| shell.stream.write_all(&[GO]).map_err(|e| format!("it ended: {e}")));
            match asked {
                Ok(()) => {
                    let process = shell.process;
                    place.remove();
                    return Ok(Ok(process));
                }
                Err(reason) => {
                    // It may be half this pod's, or refuse everybody else, too.
                    why = format!("shell {name}: {reason}");
                    place.clear()?;
                    joined = Some(namespaces);
                }
            }
        }
        if !busy || began.elapsed() > BUSY_LIMIT {
            return Ok(Err(why));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Sends the request and waits for the answer.
fn ask(stream: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) -> Result<(), String> {
    let words = |e: std::io::Error| format!("it does not answer: {e}");
    stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(words)?;
    stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(words)?;
    let sent = sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &[ControlMessage::ScmRights(descriptors)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    match sent {
        Ok(sent) if sent == bytes.len() => {}
        Ok(sent) => return Err(format!("it took {sent} bytes of {}", bytes.len())),
        Err(error) => return Err(words(error.into())),
    }
    let mut answer = String::new();
    BufReader::new(stream.take(MOST_ANSWER as u64)).read_line(&mut answer).map_err(words)?;
    match answer.as_str() {
        TAKEN => Ok(()),
        "" => Err("it ended".into()),
        other => Err(other.trim_end().to_owned()),
    }
}

/// What a child has of its parent and a shell cannot be given later: rights and namespaces.
#[derive(Debug, PartialEq, Eq)]
struct Alike(Vec<(String, String)>);

/// Of `/proc/PID/status`. Capabilities that a program would inherit are none of a VMM's.
const RIGHTS: [&str; 7] = ["Uid", "Gid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"];
/// Beside mounts and network, which are joined.
const NAMESPACES: [&str; 6] = ["cgroup", "ipc", "pid", "time", "user", "uts"];

impl Alike {
    /// `None` for a process that is gone.
    fn of(process: &str) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let lines = status.lines().filter_map(|line| line.split_once(":\t"));
        let rights = lines.filter(|(name, _)| RIGHTS.contains(name));
        let rights = rights.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let namespace = |kind: &str| {
            // A kernel without that kind has no such file, for anybody.
            let link = fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap_or_default();
            (format!("namespace {kind}"), link.display().to_string())
        };
        Some(Self(rights.chain(NAMESPACES.map(namespace)).collect()))
    }
}

fn unlike(ours: &Alike, its: &Alike) -> Option<String> {
    let differs = ours.0.iter().zip(&its.0).find(|(ours, its)| ours != its);
    if let Some(((name, ours), (_, its))) = differs {
        return Some(format!("its {name} is {its}, this command's is {ours}"));
    }
    (ours != its).then(|| "it has other rights than this command".to_owned())
}

/// What a child has of its parent and can be given later: cgroup, limits, the place among those that end when memory is short.
fn adopt(pid: i32) -> Result<(), String> {
    if cgroup::is_unified() {
        let of = |process: &str| {
            let text = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
            text.lines().find_map(|line| line.strip_prefix("0::/")).map(str::to_owned)
        };
        let own = of("self").ok_or("this process has no cgroup")?;
        if of(&pid.to_string()).as_ref() != Some(&own) {
            cgroup::join(&Path::new(cgroup::ROOT).join(own), pid).map_err(|e| e.to_string())?;
        }
    }
    let score = fs::read_to_string("/proc/self/oom_score_adj");
    score
        .and_then(|score| fs::write(format!("/proc/{pid}/oom_score_adj"), score.trim()))
        .map_err(|e| format!("give it this process's oom_score_adj: {e}"))?;
    for resource in libc::RLIMIT_CPU..=libc::RLIMIT_RTTIME {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the buffer is a whole rlimit.
        let got = unsafe { libc::prlimit(0, resource, std::ptr::null(), &raw mut limit) };
        // SAFETY: the buffer is a whole rlimit, and only read.
        if got < 0 || unsafe { libc::prlimit(pid, resource, &raw const limit, std::ptr::null_mut()) } < 0 {
            return Err(format!("give it this process's limits: {}", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_like_itself_and_a_missing_right_is_named() {
        let me = Alike::of("self").unwrap();
        assert_eq!(me.0.len(), RIGHTS.len() + NAMESPACES.len());
        assert_eq!(unlike(&me, &Alike::of(&std::process::id().to_string()).unwrap()), None);
        let mut other = Alike::of("self").unwrap();
        other.0[4].1 = "0000000000000000".into();
        let words = unlike(&me, &other).unwrap();
        assert!(words.starts_with("its CapBnd is 0000000000000000, "), "{words}");
        assert!(unlike(&me, &Alike(Vec::new())).is_some());
        assert_eq!(Alike::of("0"), None);
    }

    #[test]
    fn a_child_that_is_adopted_has_this_process_limits() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id() as i32;
        let low = libc::rlimit { rlim_cur: 77, rlim_max: 100 };
        // SAFETY: the limit is whole, and only read.
        let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const low, std::ptr::null_mut()) };
        assert_eq!(set, 0);
        let limits = |pid: &str| fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let adopted = adopt(pid);
        let (ours, its) = (limits("self"), limits(&pid.to_string()));
        child.kill().unwrap();
        child.wait().unwrap();
        // Without the right to raise a limit it is refused, and says so.
        match adopted {
            Ok(()) => assert_eq!(ours, its),
            Err(words) => assert!(words.contains("this process's") || words.contains("cgroup"), "{words}"),
        }
    }
}
