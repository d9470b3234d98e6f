//! What a new process does before it is the container's program.
//!
//! Owns: the order: namespaces, mounts, terminal, limits, identity, filter, program. Never returns.

use std::{
    collections::HashSet,
    convert::Infallible,
    ffi::CString,
    fs,
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use coffer_protocol::ErrorKind;
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, sendmsg},
};
use oci_spec::runtime::{Process, Spec};

use super::{
    ContainerError, clocks, hooks,
    making::message,
    mounts, notify, path,
    process::{Shared, Theirs, fork},
    scheduling, security,
    terminal::Terminal,
    user,
};

/// The container's first process.
pub(super) fn first(id: &str, shared: &[Shared], spec: &Spec, process: &Process, theirs: &Theirs) -> ! {
    let result = (|| {
        hide_memory()?;
        // What is made for the container has the modes that are said; the process gets its own mask later.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        shared.iter().try_for_each(Shared::enter)?;
        clocks::enter(spec)?;
        let (late, terminal) = mounts::set_up(spec, |root| {
            let terminal = terminal(root, process, spec, theirs)?;
            terminal.iter().try_for_each(|t| t.be_console(root, user::root(spec)))?;
            Ok(terminal)
        })?;
        // As runc does, for nobody else to write to; where it cannot be made, the change into it says so.
        if !process.cwd().exists() {
            let _ = path::make(open_root()?.as_fd(), process.cwd(), false, user::root(spec));
        }
        if let Some(name) = spec.hostname() {
            nix::unistd::sethostname(name).map_err(|e| ContainerError::guest("set the host name", e))?;
        }
        if let Some(name) = spec.domainname() {
            set_domain_name(name)?;
        }
        for (key, value) in spec.linux().iter().flat_map(|l| l.sysctl().iter().flatten()) {
            fs::write(parameter(key)?, value)
                .map_err(|e| ContainerError::guest(&format!("set sysctl {key}"), e))?;
        }
        if let Some(socket) = &theirs.notify {
            let socket = notify::bind(socket)?;
            say(&theirs.sync, message::NOTIFY, "", Some(socket.as_raw_fd()));
        }
        mounts::protect(spec, late)?;
        become_program(Some(id), process, spec, theirs, terminal)
    })();
    give_up(&theirs.sync, result)
}

/// One more process: joins the namespaces of `target`, whose child it cannot be, so that a child of its own must run.
pub(super) fn further(process: &Process, spec: &Spec, target: i32, theirs: &Theirs) -> ! {
    let result = (|| {
        hide_memory()?;
        let namespaces = [
            ("ipc", CloneFlags::CLONE_NEWIPC),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("pid", CloneFlags::CLONE_NEWPID),
            ("cgroup", CloneFlags::CLONE_NEWCGROUP),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ];
        let open = |(name, flag): &(&str, CloneFlags)| {
            let file = fs::File::open(format!("/proc/{target}/ns/{name}"));
            file.map(|f| (f, *flag))
                .map_err(|e| ContainerError::guest(&format!("open the container's {name} namespace"), e))
        };
        // Before the container's user namespace, in which limits cannot be raised.
        security::limits(process)?;
        // That namespace is joined last: from inside it the others could not be.
        let user = user::wanted(spec).then(|| open(&("user", CloneFlags::CLONE_NEWUSER))).transpose()?;
        let time = clocks::wanted(spec).then_some(("time", clocks::NEW_TIME));
        let files = namespaces.iter().chain(&time).map(open).collect::<Result<Vec<_>, _>>()?;
        let join = |(file, flag): (fs::File, CloneFlags)| {
            setns(file, flag).map_err(|e| ContainerError::guest("join the container", e))
        };
        files.into_iter().try_for_each(join)?;
        // While an identifier of outside can still be given to it.
        let terminal = terminal(open_root()?.as_fd(), process, spec, theirs)?;
        user.map_or(Ok(()), join)?;
        // The child of PID 1 by CLONE_PARENT, so that PID 1 reaps it; its number is PID 1's, because this process's
        // own namespace is still that one.
        match fork(libc::CLONE_PARENT, None, 0).map_err(|e| ContainerError::guest("fork", e))? {
            Some(pid) => {
                say(&theirs.sync, message::PID, &pid.to_string(), None);
                std::process::exit(0)
            }
            None => become_program(None, process, spec, theirs, terminal),
        }
    })();
    give_up(&theirs.sync, result)
}

/// This process has a copy of PID 1's memory, with keys and secrets of all containers, until its program runs. Those in the container
/// may be the same user with the same capabilities: none of them may look (ptrace(2), `/proc/PID/mem`).
fn hide_memory() -> Result<(), ContainerError> {
    // SAFETY: changes a flag of this process, which exec sets back.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(ContainerError::guest("hide this process's memory", std::io::Error::last_os_error())),
    }
}

/// Changes into the process's directory and takes its identity. As runc does: first as root, since the directory may be one that nobody
/// else may enter, and where root may not, as on a share that knows it as nobody, as the user.
///
/// An image may have named the directory by way of an open file of this process's (`/proc/self/fd/7`): what is not below the container's
/// root has no name here.
fn enter_directory(
    path: &Path,
    identity: impl FnOnce() -> Result<(), ContainerError>,
) -> Result<(), ContainerError> {
    // runc's sentence, from which podman takes its exit code: 127 for one that is not there, as for a program.
    let failed = |kind, why| {
        ContainerError::new(kind, format!("chdir to cwd ({path:?}) set in config.json failed: {why}"))
    };
    let refused = |error| match error {
        nix::Error::ENOENT => failed(ErrorKind::NotFound, words(error)),
        _ => failed(ErrorKind::Guest, words(error)),
    };
    let entered = match nix::unistd::chdir(path) {
        Ok(()) => true,
        Err(nix::Error::EACCES | nix::Error::EPERM) => false,
        Err(error) => return Err(refused(error)),
    };
    identity()?;
    if !entered {
        nix::unistd::chdir(path).map_err(refused)?;
    }
    match nix::unistd::getcwd() {
        Ok(name) if name.is_absolute() => Ok(()),
        _ => Err(failed(ErrorKind::Guest, "it is outside of the container's root")),
    }
}

fn give_up(sync: &OwnedFd, result: Result<Infallible, ContainerError>) -> ! {
    let Err(error) = result;
    let kind = match error.kind {
        ErrorKind::NotFound => message::NOT_FOUND,
        ErrorKind::NotExecutable => message::NOT_EXECUTABLE,
        _ => message::FAILED,
    };
    say(sync, kind, &error.message, None);
    std::process::exit(1)
}

/// Sends one message; when PID 1 does not listen there is nobody to tell.
fn say(sync: &OwnedFd, kind: u8, text: &str, fd: Option<RawFd>) {
    let text = &text.as_bytes()[..text.len().min(4000)];
    let fds = fd.map(|fd| [fd]);
    let control: Vec<ControlMessage<'_>> = fds.iter().map(|f| ControlMessage::ScmRights(f)).collect();
    let _ = sendmsg::<UnixAddr>(
        sync.as_raw_fd(),
        &[IoSlice::new(&[kind]), IoSlice::new(text)],
        &control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
}

fn open_root() -> Result<fs::File, ContainerError> {
    fs::File::open("/").map_err(|e| ContainerError::guest("open the container's root", e))
}

/// Of a process that has one: of the container's own devpts below `root`.
fn terminal(
    root: BorrowedFd<'_>,
    process: &Process,
    spec: &Spec,
    theirs: &Theirs,
) -> Result<Option<Terminal>, ContainerError> {
    let owner = user::outside(spec, process.user().uid());
    theirs.stdio.is_empty().then(|| Terminal::open(root, theirs.window, owner)).transpose()
}

/// `first` is the container's id for its first process.
fn become_program(
    first: Option<&str>,
    process: &Process,
    spec: &Spec,
    theirs: &Theirs,
    terminal: Option<Terminal>,
) -> Result<Infallible, ContainerError> {
    let sync = &theirs.sync;
    nix::unistd::setsid().map_err(|e| ContainerError::guest("start a session", e))?;
    for (target, fd) in theirs.stdio.iter().enumerate() {
        duplicate(fd.as_raw_fd(), target as RawFd)?;
    }
    let mut terminal = terminal;
    if first.is_some() {
        security::limits(process)?;
        if user::wanted(spec) {
            enter_user_namespace(sync)?;
            terminal = terminal.map(|t| t.reopened(open_root()?.as_fd())).transpose()?;
        }
    }
    let terminal = terminal.map(Terminal::take).transpose()?;
    scheduling::personality(spec)?;
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, which the change of identity takes away; with it the filter
    // comes as late as it can.
    let late = process.no_new_privileges().unwrap_or(false);
    if !late {
        security::filter(spec, process)?;
    }
    enter_directory(process.cwd(), || security::identity(process, spec))?;
    let program = resolve(process)?;
    say(sync, message::READY, "", terminal.as_ref().map(AsRawFd::as_raw_fd));
    drop(terminal);
    let mut byte = [0];
    match recv(sync.as_raw_fd(), &mut byte, MsgFlags::empty()) {
        Ok(1) => {}
        // PID 1 does not want this process any more.
        _ => std::process::exit(1),
    }
    keep_own_files()?;
    if let Some(id) = first {
        hooks::start_container(spec, id)?;
    }
    // Before the filter, which need not allow it. What fails from here on is said instead of the socket's end.
    say(sync, message::LAST, "", None);
    if late {
        security::filter(spec, process)?;
    }
    let argument =
        |text: &String| CString::new(text.as_bytes()).map_err(|e| ContainerError::guest("argument", e));
    let args = process.args().iter().flatten().map(argument).collect::<Result<Vec<_>, _>>()?;
    let pairs = environment(process, || security::home(process.user().uid()));
    let env = pairs.iter().map(argument).collect::<Result<Vec<_>, _>>()?;
    reset_signals();
    let path = CString::new(std::os::unix::ffi::OsStrExt::as_bytes(program.as_os_str()))
        .map_err(|e| ContainerError::guest("program", e))?;
    // Last: what else is open below has done its work, and everything that is still needed is above.
    for (number, fd) in theirs.further.iter().enumerate() {
        if let Some(fd) = fd {
            duplicate(fd.as_raw_fd(), 3 + number as RawFd)?;
        }
    }
    nix::unistd::execve(&path, &args, &env).map_err(|e| {
        let kind = if e == nix::Error::ENOENT { ErrorKind::NotFound } else { ErrorKind::NotExecutable };
        ContainerError::new(kind, format!("exec {}: {}", program.display(), words(e)))
    })
}

/// The file of a kernel's parameter, which names none elsewhere.
pub(super) fn parameter(name: &str) -> Result<PathBuf, ContainerError> {
    let inside = name.replace('.', "/");
    if inside.starts_with('/') || inside.is_empty() {
        let message = format!("config.json: linux.sysctl: {name:?} is no parameter");
        return Err(ContainerError::new(ErrorKind::Invalid, message));
    }
    Ok(Path::new("/proc/sys").join(inside))
}

/// Of the NIS domain, for which nix has no call.
fn set_domain_name(name: &str) -> Result<(), ContainerError> {
    // SAFETY: the name is as long as is said.
    let set = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    if set < 0 {
        return Err(ContainerError::guest("set the domain name", std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Makes the user namespace after everything that only the guest's root may do, with a mount namespace that belongs to it.
fn enter_user_namespace(sync: &OwnedFd) -> Result<(), ContainerError> {
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .map_err(|e| ContainerError::guest("make a user namespace", e))?;
    say(sync, message::MAP, "", None);
    match recv(sync.as_raw_fd(), &mut [0], MsgFlags::empty()) {
        Ok(1) => Ok(()),
        _ => std::process::exit(1),
    }
}

/// Errors as callers look for them: podman takes its exit code from these words.
fn words(error: nix::Error) -> &'static str {
    match error {
        nix::Error::ENOENT => "no such file or directory",
        nix::Error::EACCES => "permission denied",
        nix::Error::ENOEXEC => "exec format error",
        other => other.desc(),
    }
}

pub(super) fn duplicate(from: RawFd, to: RawFd) -> Result<(), ContainerError> {
    // SAFETY: both are descriptors of this process; `to` is 0, 1 or 2, which nothing else here owns, or one right before exec.
    if unsafe { libc::dup2(from, to) } < 0 {
        return Err(ContainerError::guest("set up stdio", std::io::Error::last_os_error()));
    }
    Ok(())
}

/// The environment of a program, with HOME. Of a name that is there twice the last counts, as with runc and crun: most programs take
/// the first that they find, and what a caller adds (`exec --env`) comes last.
pub(super) fn environment(process: &Process, home: impl FnOnce() -> String) -> Vec<String> {
    let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
    let mut seen = HashSet::new();
    let mut pairs: Vec<String> =
        process.env().iter().flatten().rev().filter(|pair| seen.insert(name(pair))).cloned().collect();
    pairs.reverse();
    // runc takes an empty one for none.
    pairs.retain(|pair| pair != "HOME=");
    if !pairs.iter().any(|pair| pair.starts_with("HOME=")) {
        pairs.push(format!("HOME={}", home()));
    }
    pairs
}

/// The program's path, found as execvp would, inside the container.
fn resolve(process: &Process) -> Result<PathBuf, ContainerError> {
    let name = process.args().as_ref().and_then(|a| a.first()).cloned().unwrap_or_default();
    let executable = |path: &Path| match nix::unistd::access(path, nix::unistd::AccessFlags::X_OK) {
        Ok(()) if path.is_dir() => Err(nix::Error::EACCES),
        other => other,
    };
    if name.contains('/') {
        return match executable(Path::new(&name)) {
            Ok(()) => Ok(name.into()),
            Err(e) => {
                let kind = if e == nix::Error::ENOENT || e == nix::Error::ENOTDIR {
                    ErrorKind::NotFound
                } else {
                    ErrorKind::NotExecutable
                };
                Err(ContainerError::new(kind, format!("exec: {name:?}: stat {name}: {}", words(e))))
            }
        };
    }
    let pairs = process.env().iter().flatten();
    let path = pairs.rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or("/bin:/usr/bin");
    let mut denied = false;
    for directory in path.split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(&name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(nix::Error::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    Err(if denied && !name.is_empty() {
        ContainerError::new(ErrorKind::NotExecutable, format!("exec: {name:?}: permission denied"))
    } else {
        ContainerError::new(
            ErrorKind::NotFound,
            format!("exec: {name:?}: executable file not found in $PATH"),
        )
    })
}

/// Lets no file of PID 1 into a program: what is open from 3 on closes when one starts, but for what is put there after this.
fn keep_own_files() -> Result<(), ContainerError> {
    // SAFETY: sets a flag of this process's descriptors.
    let set = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if set < 0 {
        Err(ContainerError::guest("keep open files", std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

/// A program starts with default actions and nothing blocked.
fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: sets the default action; signals that have none to set refuse.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_being_made_shows_its_memory_to_nobody() {
        // In a process of its own: the flag is the whole process's.
        match fork(0, None, libc::SIGCHLD).unwrap() {
            None => {
                let hidden = hide_memory().is_ok();
                // SAFETY: asks for a flag of this process, then ends it.
                unsafe { libc::_exit(if hidden { libc::prctl(libc::PR_GET_DUMPABLE) } else { 9 }) }
            }
            Some(pid) => {
                let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
                assert!(matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)), "{ended:?}");
            }
        }
    }

    #[test]
    fn a_parameter_is_a_file_of_the_kernels() {
        assert_eq!(parameter("net.ipv4.ip_forward").unwrap(), Path::new("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(parameter("net/../x").unwrap(), Path::new("/proc/sys/net////x"));
        for elsewhere in [".etc.passwd", "/etc/passwd", "..", ""] {
            let message = parameter(elsewhere).unwrap_err().message;
            assert!(message.starts_with("config.json: linux.sysctl: "), "{message}");
        }
    }

    #[test]
    fn of_a_variable_that_is_there_twice_the_last_counts() {
        let process = |env: &[&str]| -> Process {
            serde_json::from_value(
                serde_json::json!({ "cwd": "/", "args": ["x"], "env": env, "user": { "uid": 0, "gid": 0 } }),
            )
            .unwrap()
        };
        let home = || "/root".to_owned();
        assert_eq!(environment(&process(&["A=1", "B=2", "A=3=4"]), home), ["B=2", "A=3=4", "HOME=/root"]);
        assert_eq!(environment(&process(&["HOME=/a", "HOME=/b"]), home), ["HOME=/b"]);
        assert_eq!(environment(&process(&[]), home), ["HOME=/root"]);
        // runc takes an empty one for none.
        assert_eq!(environment(&process(&["HOME=", "A=1"]), home), ["A=1", "HOME=/root"]);
        assert_eq!(environment(&process(&["HOME=/a", "HOME="]), home), ["HOME=/root"]);
    }
}
