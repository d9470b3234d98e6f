//! Limits, user, capabilities and the system call filter of a process.
//!
//! Owns: their order, which matters: limits while still root, capabilities around the change of user, the filter last.

use std::{fs, io::Read, os::unix::fs::OpenOptionsExt, path::Path};

use caps::{CapSet, CapsHashSet};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Capabilities, PosixRlimitType, Process, Spec};

use super::{ContainerError, scheduling, seccomp};

/// Where the configuration names none: runc's.
const DEFAULT_UMASK: u32 = 0o022;

/// Rlimits, the OOM score and how it is scheduled.
pub(super) fn limits(process: &Process) -> Result<(), ContainerError> {
    for limit in process.rlimits().iter().flatten() {
        let resource = match limit.typ() {
            PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
            PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
            PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
            PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
            PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
            PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
            PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
            PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
            PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
            PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
            PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
            PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
            PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
            PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
            PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
            PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
        };
        let value = libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() };
        // SAFETY: the pointer is to an rlimit that outlives the call.
        if unsafe { libc::setrlimit(resource, &raw const value) } < 0 {
            let error = std::io::Error::last_os_error();
            return Err(ContainerError::guest(
                &format!("set {:?} to {}:{}", limit.typ(), limit.soft(), limit.hard()),
                error,
            ));
        }
    }
    if let Some(score) = process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|e| ContainerError::guest("set oom_score_adj", e))?;
    }
    scheduling::apply(process)
}

pub(super) fn set(wanted: Option<&Capabilities>) -> CapsHashSet {
    // Names that this kernel does not know are left out, as runc does.
    wanted.into_iter().flatten().filter_map(|c| format!("CAP_{c}").parse().ok()).collect()
}

/// User, groups, file mode mask and capabilities. A further process that says nothing of the mask has the first one's, as under crun.
pub(super) fn identity(process: &Process, spec: &Spec) -> Result<(), ContainerError> {
    let failed = |stage: &'static str| move |e: nix::Error| ContainerError::guest(stage, e);
    let caps_failed = |stage: &'static str| move |e: caps::errors::CapsError| ContainerError::guest(stage, e);
    let wanted = process.capabilities().as_ref();
    let of = |pick: fn(&oci_spec::runtime::LinuxCapabilities) -> &Option<Capabilities>| {
        set(wanted.and_then(|c| pick(c).as_ref()))
    };
    let user = process.user();
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    let bounding = of(|c| c.bounding());
    for capability in caps::all() {
        if !bounding.contains(&capability)
            && caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false)
        {
            caps::drop(None, CapSet::Bounding, capability)
                .map_err(caps_failed("drop bounding capabilities"))?;
        }
    }
    // Kept over the change of user, to be set below.
    // SAFETY: changes a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) };
    setgroups(&groups).map_err(failed("set additional groups"))?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).map_err(failed("set the group"))?;
    setresuid(uid, uid, uid).map_err(failed("set the user"))?;
    let first = spec.process().as_ref().and_then(|process| process.user().umask());
    let mask = user.umask().or(first).unwrap_or(DEFAULT_UMASK);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
    let inheritable = of(|c| c.inheritable());
    caps::set(None, CapSet::Inheritable, &inheritable)
        .map_err(caps_failed("set inheritable capabilities"))?;
    // The effective set first shrinks to what both have, because it must stay within the permitted one.
    let (permitted, effective) = (of(|c| c.permitted()), of(|c| c.effective()));
    caps::set(None, CapSet::Effective, &effective.intersection(&permitted).copied().collect())
        .map_err(caps_failed("set effective capabilities"))?;
    caps::set(None, CapSet::Permitted, &permitted).map_err(caps_failed("set permitted capabilities"))?;
    // An ambient one has to be permitted and inheritable (capabilities(7)). `podman build` asks for others as well; runc and crun
    // leave them out, too.
    let mut ambient = of(|c| c.ambient());
    ambient.retain(|c| permitted.contains(c) && inheritable.contains(c));
    caps::set(None, CapSet::Ambient, &ambient)
        .or_else(|e| if ambient.is_empty() { Ok(()) } else { Err(e) })
        .map_err(caps_failed("set ambient capabilities"))
}

/// Most bytes of a container's passwd that are looked at.
const MOST_PASSWD: u64 = 1 << 20;

/// The home directory of a user by the container's own passwd, as runc sets it where the configuration does not.
pub(super) fn home(uid: u32) -> String {
    home_in(&String::from_utf8_lossy(&passwd(Path::new("/etc/passwd"))), uid)
        .unwrap_or_else(|| "/".to_owned())
}

/// The container may have put anything there: PID 1 waits for this process, and must not wait for whoever writes to a FIFO.
fn passwd(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    let file = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    if let Some(file) = file.ok().filter(|file| file.metadata().is_ok_and(|meta| meta.is_file())) {
        let _ = file.take(MOST_PASSWD).read_to_end(&mut text);
    }
    text
}

pub(super) fn home_in(passwd: &str, uid: u32) -> Option<String> {
    let mut lines = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>());
    let line = lines.find(|f| f.get(2).and_then(|u| u.parse().ok()) == Some(uid))?;
    line.get(5).filter(|home| !home.is_empty() && !home.contains('\0')).map(|home| (*home).to_owned())
}

/// No new privileges, and the filter. Last: the filter may forbid anything above.
pub(super) fn filter(spec: &Spec, process: &Process) -> Result<(), ContainerError> {
    let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    if process.no_new_privileges().unwrap_or(false) {
        // SAFETY: changes a flag of this process.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
            return Err(ContainerError::guest("set no_new_privs", std::io::Error::last_os_error()));
        }
    }
    profile.map_or(Ok(()), seccomp::install)
}

#[cfg(test)]
mod tests {
    use super::{home_in, passwd};
    use std::fs;

    #[test]
    fn a_fifo_in_place_of_passwd_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passwd");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(passwd(&path).is_empty());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "root").unwrap();
        assert_eq!(passwd(&path), b"root");
    }

    #[test]
    fn a_users_home_is_its_lines_sixth_field() {
        let text = "root:x:0:0:root:/root:/bin/sh\nbroken\nnone:x:5:5::\napp:x:1000:1000::/srv:/bin/sh\n";
        assert_eq!(home_in(text, 1000).as_deref(), Some("/srv"));
        assert_eq!((home_in(text, 7), home_in(text, 5)), (None, None));
    }
}
