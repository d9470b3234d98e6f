//! What this process can no longer ask of the host's kernel once its guest may run: a guest that takes it over starts no
//! program, opens no socket, mounts nothing, looks into no other process, loads nothing into the kernel, administers nothing.
//!
//! Owns: the capabilities that stay, the list of refused calls, the words of a violation. The filter (seccomp) names
//! what is refused, not what is allowed: files can still be opened, as virtio-fs does, by whoever may open them; where the
//! process runs is its caller's doing.

mod filter;

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
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
const CALLS: [Sysno; 69] = [
    Sysno::execve,
    Sysno::execveat,
    Sysno::fork,
    Sysno::vfork,
    Sysno::ptrace,
    Sysno::process_vm_readv,
    Sysno::process_vm_writev,
    Sysno::process_madvise,
    Sysno::pidfd_open,
    Sysno::pidfd_getfd,
    Sysno::pidfd_send_signal,
    Sysno::kcmp,
    Sysno::kill,
    Sysno::tkill,
    Sysno::rt_sigqueueinfo,
    Sysno::rt_tgsigqueueinfo,
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

/// Takes capabilities from this thread and from all that it starts, and refuses them the calls, for good. No program that they
/// could start would gain rights either (no_new_privs).
///
/// # Errors
/// The kernel has no seccomp.
pub fn install() -> io::Result<()> {
    give_up_capabilities().map_err(io::Error::other)?;
    say_which();
    let refused: Vec<u32> = CALLS.iter().map(|call| call.id() as u32).collect();
    let program =
        filter::program(&refused).ok_or_else(|| io::Error::other("too many calls for one filter"))?;
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
    use std::process::Command;

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
        for call in ["execve", "socket", "mount", "ptrace"] {
            let output = child("confine::tests::a_refused_call_ends_the_process_with_its_name", call);
            let words = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(REFUSED), "{call}: {words}");
            assert!(words.contains(&format!("the system call {call},")), "{words}");
        }
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
