//! What this process can no longer ask of the host's kernel once its guest may run: a guest that takes it over starts no
//! program, opens no socket, mounts nothing, looks into no other process, loads nothing into the kernel, administers nothing.
//!
//! Owns: the capabilities that stay, the list of refused calls, the words of a violation. The filter (seccomp) names
//! what is refused, not what is allowed: files can still be opened, as virtio-fs does, by whoever may open them; where the
//! process runs is its caller's doing.

mod filter;

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use filter::Verdict;
use syscalls::Sysno;

/// Exit code after a refused call.
pub const REFUSED: i32 = 76;

/// What virtio-fs needs to act on files as the guest's users; of these the process keeps what it has.
const CAPABILITIES: [Capability; 9] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// Calls that neither devices nor processors make. Sockets that devices need are made before the guest runs.
const CALLS: [Sysno; 79] = [
    Sysno::execve,
    Sysno::execveat,
    Sysno::fork,
    Sysno::vfork,
    Sysno::ptrace,
    Sysno::process_vm_readv,
    Sysno::process_vm_writev,
    Sysno::process_madvise,
    Sysno::process_mrelease,
    Sysno::pidfd_open,
    Sysno::pidfd_getfd,
    Sysno::pidfd_send_signal,
    Sysno::kcmp,
    Sysno::kill,
    Sysno::tkill,
    Sysno::rt_sigqueueinfo,
    Sysno::rt_tgsigqueueinfo,
    Sysno::get_robust_list,
    Sysno::sched_setaffinity,
    Sysno::sched_setscheduler,
    Sysno::sched_setparam,
    Sysno::sched_setattr,
    Sysno::setpriority,
    Sysno::ioprio_set,
    Sysno::migrate_pages,
    Sysno::move_pages,
    Sysno::socket,
    Sysno::socketpair,
    Sysno::connect,
    Sysno::bind,
    Sysno::listen,
    Sysno::mount,
    Sysno::umount2,
    Sysno::pivot_root,
    Sysno::chroot,
    Sysno::setns,
    Sysno::move_mount,
    Sysno::open_tree,
    Sysno::fsopen,
    Sysno::fsmount,
    Sysno::fsconfig,
    Sysno::fspick,
    Sysno::mount_setattr,
    Sysno::init_module,
    Sysno::finit_module,
    Sysno::delete_module,
    Sysno::kexec_load,
    Sysno::kexec_file_load,
    Sysno::reboot,
    Sysno::bpf,
    Sysno::perf_event_open,
    Sysno::userfaultfd,
    Sysno::io_uring_setup,
    Sysno::io_uring_enter,
    Sysno::io_uring_register,
    Sysno::keyctl,
    Sysno::add_key,
    Sysno::request_key,
    Sysno::swapon,
    Sysno::swapoff,
    Sysno::acct,
    Sysno::quotactl,
    Sysno::quotactl_fd,
    Sysno::syslog,
    Sysno::sethostname,
    Sysno::setdomainname,
    Sysno::settimeofday,
    Sysno::clock_settime,
    Sysno::adjtimex,
    Sysno::clock_adjtime,
    Sysno::ioperm,
    Sysno::iopl,
    Sysno::modify_ldt,
    Sysno::personality,
    Sysno::vhangup,
    Sysno::uselib,
    Sysno::lookup_dcookie,
    Sysno::fanotify_init,
    Sysno::shmget,
];

/// FIOSETOWN and SIOCSPGRP (asm-generic/sockios.h), F_SETOWN_EX (asm-generic/fcntl.h): as F_SETOWN they say whom a descriptor's
/// signals go to, which may be any process of this user.
const FIOSETOWN: u32 = 0x8901;
const SIOCSPGRP: u32 = 0x8902;
const F_SETOWN_EX: u32 = 15;

/// What is not allowed of all calls. Libraries make some for this process that could be made for another: `pthread_kill` and `abort` do
/// `tgkill` with the process's own id, limits are read and set of process 0, which is the caller.
fn rules(own: u32) -> Vec<(u32, Verdict)> {
    let refused = CALLS.iter().map(|call| (*call, Verdict::Refuse));
    let compared = [
        (Sysno::tgkill, Verdict::AllowOnly { argument: 0, value: own }),
        (Sysno::prlimit64, Verdict::AllowOnly { argument: 0, value: 0 }),
        (Sysno::fcntl, Verdict::AllowBut { argument: 1, values: &[libc::F_SETOWN as u32, F_SETOWN_EX] }),
        (Sysno::ioctl, Verdict::AllowBut { argument: 1, values: &[FIOSETOWN, SIOCSPGRP] }),
    ];
    refused.chain(compared).map(|(call, verdict)| (call.id() as u32, verdict)).collect()
}

/// Takes capabilities from this thread and from all that it starts, and refuses them the calls, for good. No program that they
/// could start would gain rights either (no_new_privs).
///
/// # Errors
/// The kernel has no seccomp.
pub fn install() -> io::Result<()> {
    give_up_capabilities().map_err(io::Error::other)?;
    say_which();
    let program = filter::program(&rules(std::process::id()))
        .ok_or_else(|| io::Error::other("too many calls for one filter"))?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

fn give_up_capabilities() -> Result<(), caps::errors::CapsError> {
    let has = caps::read(None, CapSet::Permitted)?;
    let stays: CapsHashSet = CAPABILITIES.into_iter().filter(|c| has.contains(c)).collect();
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &stays)?;
    caps::set(None, CapSet::Permitted, &stays)
}

/// A refused call raises SIGSYS, whose handler ends the process with the call's name.
fn say_which() {
    /// Place of the call's number in siginfo_t (`si_syscall`).
    const NUMBER_AT: usize = 24;
    extern "C" fn refused(_: libc::c_int, information: *const libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel hands over a whole siginfo_t, and for SIGSYS an int lies there.
        let number = unsafe { information.byte_add(NUMBER_AT).cast::<libc::c_int>().read_unaligned() };
        let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
        for words in
            ["coffer-vmm: stopped at the system call ", name, ", which no VMM makes once its guest runs\n"]
        {
            // SAFETY: the bytes are valid, and the call may be made in a signal handler.
            unsafe { libc::write(2, words.as_ptr().cast(), words.len()) };
        }
        // SAFETY: it may be called in a signal handler, and ends the process.
        unsafe { libc::_exit(REFUSED) };
    }
    // SAFETY: an all-zero sigaction is valid; the handler has the signature that SA_SIGINFO asks for, makes only calls that a
    // handler may make, and does not return.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = refused as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::{
            fd::AsRawFd,
            unix::{process::ExitStatusExt, thread::JoinHandleExt},
        },
        process::Command,
    };

    use super::*;

    /// Tests in this process cannot confine it; a second one runs this same test, and is told by this variable.
    const CHILD: &str = "COFFER_TEST_CONFINED";

    fn child(test: &str, call: &str) -> std::process::Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(CHILD, call).output().unwrap()
    }

    #[test]
    fn a_refused_call_ends_the_process_with_its_name() {
        if let Ok(call) = std::env::var(CHILD) {
            let call: Sysno = call.parse().unwrap();
            install().unwrap();
            let made = move || {
                // SAFETY: every call of the list fails with null pointers and bad descriptors; none is reached here.
                unsafe { libc::syscall(i64::from(call.id()), -1i64, 0i64, 0i64, 0i64, 0i64, 0i64) }
            };
            // On a thread that was started later, as devices are.
            std::thread::spawn(made).join().unwrap();
            unreachable!("{call} was made");
        }
        let others =
            ["sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "setpriority"];
        let others =
            others.into_iter().chain(["ioprio_set", "migrate_pages", "move_pages", "get_robust_list"]);
        for call in ["execve", "socket", "mount", "ptrace", "process_mrelease"].into_iter().chain(others) {
            let output = child("confine::tests::a_refused_call_ends_the_process_with_its_name", call);
            let words = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(REFUSED), "{call}: {words}");
            assert!(words.contains(&format!("the system call {call},")), "{words}");
        }
    }

    #[test]
    fn calls_that_this_process_needs_for_itself_reach_no_other() {
        use libc::{SYS_fcntl, SYS_ioctl, SYS_prlimit64, SYS_tgkill};
        if let Ok(call) = std::env::var(CHILD) {
            let call: Vec<i64> = call.split(',').map(|number| number.parse().unwrap()).collect();
            install().unwrap();
            // SAFETY: none would change anything if it were made: signal 0, no limits, descriptor -1.
            let made = move || unsafe { libc::syscall(call[0], call[1], call[2], call[3], 0i64) };
            std::thread::spawn(made).join().unwrap();
            unreachable!("it was made");
        }
        let other = i64::from(std::process::id());
        for (name, call) in [
            ("tgkill", [SYS_tgkill, other, other, 0]),
            ("prlimit64", [SYS_prlimit64, other, 0, 0]),
            ("fcntl", [SYS_fcntl, -1, i64::from(libc::F_SETOWN), other]),
            // Of this one the kernel reads the lower half.
            ("fcntl", [SYS_fcntl, -1, 1 << 32 | i64::from(libc::F_SETOWN), other]),
            // F_SETOWN_EX, FIOSETOWN, SIOCSPGRP.
            ("fcntl", [SYS_fcntl, -1, 15, 0]),
            ("ioctl", [SYS_ioctl, -1, 0x8901, 0]),
            ("ioctl", [SYS_ioctl, -1, 0x8902, 0]),
        ] {
            let words = call.map(|number| number.to_string()).join(",");
            let test = "confine::tests::calls_that_this_process_needs_for_itself_reach_no_other";
            let output = child(test, &words);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(REFUSED), "{name} {words}: {said}");
            assert!(said.contains(&format!("the system call {name},")), "{name} {words}: {said}");
        }
    }

    #[test]
    fn what_it_needs_for_itself_still_works() {
        if std::env::var(CHILD).is_ok() {
            install().unwrap();
            let sleeper = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_millis(50)));
            // SAFETY: the handle keeps the thread's id valid; URG is ignored; the calls write into what outlives them.
            unsafe {
                assert_eq!(libc::pthread_kill(sleeper.as_pthread_t(), libc::SIGURG), 0);
                assert_eq!(libc::raise(libc::SIGURG), 0);
                let mut limit = std::mem::zeroed();
                assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
                assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
                let (file, mut waits) = (std::fs::File::open("/proc/self/status").unwrap(), 0);
                assert!(libc::fcntl(file.as_raw_fd(), libc::F_GETFL) >= 0);
                libc::ioctl(file.as_raw_fd(), libc::FIONREAD, &raw mut waits);
            }
            sleeper.join().unwrap();
            assert!(std::thread::available_parallelism().is_ok());
            std::thread::spawn(|| std::process::abort()).join().unwrap();
        }
        let output = child("confine::tests::what_it_needs_for_itself_still_works", "none");
        let words = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{:?}: {words}", output.status);
    }

    #[test]
    fn what_devices_do_still_works() {
        if std::env::var(CHILD).is_ok() {
            install().unwrap();
            std::thread::spawn(|| std::fs::read("/proc/thread-self/status").unwrap()).join().unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"), "{status}");
            let capabilities = |set: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(set)).unwrap();
                u64::from_str_radix(line.trim(), 16).unwrap()
            };
            // Bits of linux/capability.h, by their numbers: chown 0 to fsetid 4, setgid 6, setuid 7, mknod 27, setfcap 31.
            let files = 0b1_1111 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;
            assert_eq!(capabilities("CapPrm:") & !files, 0, "{status}");
            assert_eq!(capabilities("CapEff:") & !files, 0, "{status}");
            assert_eq!(capabilities("CapInh:"), 0, "{status}");
            return;
        }
        let output = child("confine::tests::what_devices_do_still_works", "none");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
