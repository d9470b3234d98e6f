//! The VMM's process: in the pod's network, in a mount namespace of its own that shows it the container's files.
//!
//! Owns: its arguments, everything between fork and exec of `coffer-vmm`, and the same for a shell that takes the pod's arguments
//! (`pool`). What is mounted there is nowhere else, so that nothing is left behind when it ends.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use coffer_protocol::shell::FIRST_DESCRIPTOR;
use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::wait::waitpid,
    unistd::{Pid as NixPid, pipe2},
};

use crate::{
    clock,
    error::{Error, host},
    home::Home,
    network::Tap,
    pid::Pid,
    plan::{Bind, Plan},
    pool, scratch,
    state::Directory,
};

/// What a VMM is started with.
pub struct Start<'a> {
    /// Sizes and files.
    pub plan: &'a Plan,
    /// Where its socket and report go.
    pub directory: &'a Directory,
    /// The installation.
    pub home: &'a Home,
    /// The pod's network namespace, unless it is a new one.
    pub network: Option<&'a Path>,
    /// Tap devices, made in that namespace.
    pub taps: &'a [Tap],
    /// Read end of the pipe that tells it when nobody is left.
    pub lifeline: &'a OwnedFd,
    /// The template to start from, if it fits.
    pub template: Option<PathBuf>,
    /// The root directory whose pool has shells, if one is to be taken.
    pub pool: Option<&'a Path>,
    /// Where boot stages go.
    pub trace: Option<PathBuf>,
}

/// Whose process it is.
pub enum Started {
    /// This command's child.
    Child(Child),
    /// A shell's, which was there before.
    Shell(Pid),
}

const NONE: Option<&str> = None;
/// The VMM's log, in the container's directory.
const LOG: &str = "vmm-log";
/// Word of a process that is where it should be.
const ENTERED: &str = "entered";

fn show(share: &Path, binds: &[Bind]) -> io::Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    for (index, bind) in binds.iter().enumerate() {
        if binds[..index].iter().any(|before| before.target == bind.target) {
            continue;
        }
        let target = share.join(&bind.target);
        if bind.source.is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            fs::create_dir_all(target.parent().unwrap_or(share))?;
            File::create(&target)?;
        }
        let how = if bind.recursive { MsFlags::MS_BIND | MsFlags::MS_REC } else { MsFlags::MS_BIND };
        let context = |e: nix::Error| {
            io::Error::new(io::Error::from(e).kind(), format!("{}: {e}", bind.source.display()))
        };
        mount(Some(&bind.source), &target, NONE, how, NONE).map_err(context)?;
        if bind.read_only {
            let place = File::options().read(true).custom_flags(libc::O_PATH).open(&target)?;
            make_read_only(&place, bind.recursive).map_err(|e| {
                io::Error::new(e.kind(), format!("{}: read-only: {e}", bind.source.display()))
            })?;
        }
    }
    Ok(())
}

/// Makes what is mounted at an open place read-only, with all that is mounted below it: a guest sees one file system there, and may not keep to its flags.
///
/// # Errors
/// The system's.
pub fn make_read_only(place: &impl AsRawFd, recursive: bool) -> io::Result<()> {
    // SAFETY: mount_attr is plain data for which zero is valid.
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = libc::MOUNT_ATTR_RDONLY;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: path and attributes outlive the call; the size is theirs.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            place.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The IGVM file that a pod boots from.
#[must_use]
pub fn image(plan: &Plan, home: &Home) -> PathBuf {
    let owner = plan.image.is_some() || plan.confidential.initdata.is_some() || plan.scratch.is_some();
    let usual = || home.image(plan.most_vcpus, plan.confidential.tee.as_deref(), owner);
    plan.igvm.clone().unwrap_or_else(usual)
}

/// Starts it. It boots while the caller goes on.
///
/// # Errors
/// The system's, with what was to be shown.
pub fn vmm(start: &Start<'_>) -> Result<Started, Error> {
    let share = start.directory.file("share");
    fs::create_dir(&share).map_err(host("make the shared directory"))?;
    let scratch = start.plan.scratch.map(scratch::make).transpose()?;
    let kept: Vec<RawFd> = std::iter::once(start.lifeline.as_raw_fd())
        .chain(start.taps.iter().map(|t| t.fd.as_raw_fd()))
        .chain(scratch.as_ref().map(AsRawFd::as_raw_fd))
        .collect();
    let network =
        start.network.map(File::open).transpose().map_err(host("open the pod's network namespace"))?;
    if let Some(root) = start.pool {
        let numbers: Vec<RawFd> = (FIRST_DESCRIPTOR..).take(kept.len()).collect();
        let request = pool::Request {
            program: start.home.vmm(),
            image: image(start.plan, start.home),
            words: words(start, &share, &numbers)?,
            descriptors: kept.clone(),
        };
        let namespaces = || namespaces(network.as_ref(), &share, &start.plan.binds);
        match pool::take(root, &request, namespaces)? {
            Ok(process) => return Ok(Started::Shell(process)),
            Err(why) => say(start.directory, &format!("no shell is taken, the VM is started anew: {why}")),
        }
    }
    let mut command = Command::new(start.home.vmm());
    command.args(words(start, &share, &kept)?);
    // Its messages are in its log: the caller's stderr may be a pipe that must end with the container.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    let binds = start.plan.binds.clone();
    // exec's own pipe carries a number only: the words go into a file.
    let problem = start.directory.file("problem");
    let words = problem.clone();
    let set_up = move || {
        nix::unistd::setsid()?;
        enter(network.as_ref(), &share, &binds)?;
        inherit_only(&kept)
    };
    // SAFETY: between fork and exec of a process with one thread; allocation is safe there.
    unsafe {
        command.pre_exec(move || {
            set_up().inspect_err(|e| {
                let _ = fs::write(&words, e.to_string());
            })
        })
    };
    command.spawn().map(Started::Child).map_err(|error| match fs::read_to_string(&problem) {
        Ok(words) => Error::State(format!("prepare the VMM's files and network: {words}")),
        Err(_) => host(format!("start {}", start.home.vmm().display()))(error),
    })
}

/// Its arguments. `numbers` are what it will know the descriptors by: the lifeline's, the taps', the scratch disk's.
fn words(start: &Start<'_>, share: &Path, numbers: &[RawFd]) -> Result<Vec<String>, Error> {
    let (plan, directory) = (start.plan, start.directory);
    let mut numbers = numbers.iter();
    let mut number = || numbers.next().copied().unwrap_or(-1);
    let mut words = Vec::new();
    let mut say = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
    let path = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| Error::State(format!("{}: a path that is not UTF-8", path.display())))
    };
    say("--image", path(&image(plan, start.home))?);
    say("--memory-mib", plan.memory_mib.to_string());
    say("--vcpus", plan.most_vcpus.to_string());
    if plan.most_vcpus > plan.vcpus {
        say("--boot-vcpus", plan.vcpus.to_string());
    }
    say("--vsock", path(&directory.socket())?);
    say("--fs", path(share)?);
    say("--lifeline-fd", number().to_string());
    say("--exit-report", path(&directory.file("exit-report"))?);
    say("--log", path(&directory.file(LOG))?);
    for tap in start.taps {
        say("--net", format!("fd={},mac={}", number(), tap.mac));
    }
    if plan.scratch.is_some() {
        // The VMM opens it anew, by the descriptor that it inherits.
        say("--disk", format!("/proc/self/fd/{}", number()));
    }
    if let Some(template) = &start.template {
        say("--template", path(template)?);
    }
    if let Some(console) = plan.console() {
        say("--console", path(console)?);
    }
    if let Some(trace) = &start.trace {
        say("--trace", path(trace)?);
        say("--trace-from", clock::began_ns().to_string());
    }
    words.extend(plan.confidential.flags()?);
    Ok(words)
}

/// Says something in the VMM's log, before there is a VMM.
fn say(directory: &Directory, message: &str) {
    let line = format!("level=warning msg={message:?}\n");
    let file = File::options().create(true).append(true).open(directory.file(LOG));
    // A message that cannot be written is no reason not to start.
    let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
}

/// Moves this process to where its VMM works: the pod's network, and mounts that no other process has.
fn enter(network: Option<&File>, share: &Path, binds: &[Bind]) -> io::Result<()> {
    if let Some(network) = network {
        setns(network, CloneFlags::CLONE_NEWNET)?;
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    show(share, binds)
}

/// The mount and the network namespace of a process that has [entered](enter) and is gone: for who joins them.
fn namespaces(network: Option<&File>, share: &Path, binds: &[Bind]) -> Result<Vec<OwnedFd>, Error> {
    let failed = || host("prepare the VMM's files and network");
    let (ready, mut tell_ready) = pipe()?;
    let (mut go, tell_go) = pipe()?;
    let Some(child) = clone(0).map_err(failed())? else {
        drop((ready, tell_go));
        let word = enter(network, share, binds).err().map_or_else(|| ENTERED.into(), |e| e.to_string());
        let _ = tell_ready.write_all(word.as_bytes());
        drop(tell_ready);
        // Until its namespaces are held, or who asked for them is gone.
        let _ = go.read(&mut [0]);
        std::process::exit(0);
    };
    drop((tell_ready, go));
    let mut word = String::new();
    let _ = io::BufReader::new(ready).read_to_string(&mut word);
    let open = |kind| File::open(format!("/proc/{child}/ns/{kind}")).map(OwnedFd::from);
    let opened = ["mnt", "net"].into_iter().map(open).collect::<io::Result<_>>();
    drop(tell_go);
    let _ = waitpid(NixPid::from_raw(child), None);
    if word == ENTERED {
        opened.map_err(failed())
    } else {
        Err(Error::State(format!("prepare the VMM's files and network: {word}")))
    }
}

fn pipe() -> Result<(File, File), Error> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(host("make a pipe"))?;
    Ok((read.into(), write.into()))
}

/// Lets exec keep these descriptors and no other: callers leak sockets of published ports and more.
pub(crate) fn inherit_only(kept: &[i32]) -> io::Result<()> {
    // SAFETY: sets a flag on descriptors of this process.
    if unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in kept {
        // SAFETY: clears that flag on an open descriptor.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Forks into new namespaces. `None` in the child. This program has one thread.
pub(crate) fn clone(flags: i32) -> std::io::Result<Option<i32>> {
    // SAFETY: clone_args is plain data for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM the child has a copy of everything, and there is no other thread whose locks it could miss.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match pid {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(pid as i32)),
        _ => Err(std::io::Error::last_os_error()),
    }
}
