//! The VMM's process: in the pod's network, in a mount namespace of its own that shows it the container's files.
//!
//! Owns: everything between fork and exec of `coffer-vmm`. What is mounted there is nowhere else, so that nothing is
//! left behind when it ends.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    error::{Error, host},
    home::Home,
    network::Tap,
    plan::{Bind, Plan},
    scratch,
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
    /// Where boot stages go.
    pub trace: Option<PathBuf>,
}

const NONE: Option<&str> = None;

fn show(share: &Path, binds: &[Bind]) -> io::Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    for bind in binds {
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
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NONE, &target, NONE, flags, NONE).map_err(context)?;
        }
    }
    Ok(())
}

/// The IGVM file that a pod boots from.
#[must_use]
pub fn image(plan: &Plan, home: &Home) -> PathBuf {
    let owner = plan.image.is_some() || plan.confidential.file.is_some() || plan.scratch.is_some();
    let usual = || home.image(plan.vcpus, plan.confidential.tee.as_deref(), owner);
    plan.igvm.clone().unwrap_or_else(usual)
}

/// Starts it. It boots while the caller goes on.
///
/// # Errors
/// The system's, with what was to be shown.
pub fn vmm(start: &Start<'_>) -> Result<Child, Error> {
    let share = start.directory.file("share");
    fs::create_dir(&share).map_err(host("make the shared directory"))?;
    let mut command = Command::new(start.home.vmm());
    command
        .arg("--image")
        .arg(image(start.plan, start.home))
        .args(["--memory-mib", &start.plan.memory_mib.to_string(), "--vcpus", &start.plan.vcpus.to_string()])
        .arg("--vsock")
        .arg(start.directory.socket())
        .arg("--fs")
        .arg(&share)
        .args(["--lifeline-fd", &start.lifeline.as_raw_fd().to_string()])
        .arg("--exit-report")
        .arg(start.directory.file("exit-report"))
        .arg("--log")
        .arg(start.directory.file("vmm-log"));
    command.args(start.plan.confidential.flags()?);
    for tap in start.taps {
        command.args(["--net", &format!("fd={},mac={}", tap.fd.as_raw_fd(), tap.mac)]);
    }
    if let Some(template) = &start.template {
        command.arg("--template").arg(template);
    }
    let scratch = start.plan.scratch.map(scratch::make).transpose()?;
    if let Some(file) = &scratch {
        // The VMM opens it anew, by the descriptor that it inherits.
        command.args(["--disk", &format!("/proc/self/fd/{}", file.as_raw_fd())]);
    }
    if let Some(trace) = &start.trace {
        command.arg("--trace").arg(trace);
    }
    // Its messages are in its log: the caller's stderr may be a pipe that must end with the container.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    let kept: Vec<i32> = std::iter::once(start.lifeline.as_raw_fd())
        .chain(start.taps.iter().map(|t| t.fd.as_raw_fd()))
        .chain(scratch.as_ref().map(File::as_raw_fd))
        .collect();
    let network =
        start.network.map(File::open).transpose().map_err(host("open the pod's network namespace"))?;
    let binds = start.plan.binds.clone();
    // exec's own pipe carries a number only: the words go into a file.
    let problem = start.directory.file("problem");
    let words = problem.clone();
    let set_up = move || {
        nix::unistd::setsid()?;
        if let Some(network) = &network {
            setns(network, CloneFlags::CLONE_NEWNET)?;
        }
        unshare(CloneFlags::CLONE_NEWNS)?;
        show(&share, &binds)?;
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
    command.spawn().map_err(|error| match fs::read_to_string(&problem) {
        Ok(words) => Error::State(format!("prepare the VMM's files and network: {words}")),
        Err(_) => host(format!("start {}", start.home.vmm().display()))(error),
    })
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
