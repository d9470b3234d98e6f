//! The system call filter: an OCI profile as seccomp programs.
//!
//! Owns: the translation. One program holds one action; several are installed, and the kernel takes the strictest
//! answer. The default action's program comes first, so that of two errors the more special one is returned.

use std::collections::{BTreeMap, BTreeSet};

use coffer_protocol::ErrorKind;
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::ContainerError;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What a system call can fail with at most (MAX_ERRNO in linux/err.h). A filter has 16 bits for it, so that 65536 would be no error.
const MOST_ERRNO: u32 = 4095;
/// A filter's answer for a call that the kernel does not have.
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
/// linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `__X32_SYSCALL_BIT`.
const X32_BIT: u32 = 1 << 30;

fn action(from: LinuxSeccompAction, errno: Option<u32>) -> Result<SeccompAction, ContainerError> {
    Ok(match from {
        LinuxSeccompAction::ScmpActAllow => SeccompAction::Allow,
        LinuxSeccompAction::ScmpActErrno => match errno.unwrap_or(libc::EPERM as u32) {
            // Zero, for a call that does nothing and succeeds, as under runc; where an owner has a say it is refused before.
            code @ 0..=MOST_ERRNO => SeccompAction::Errno(code),
            other => {
                let message = format!(
                    "config.json: linux.seccomp: errnoRet {other} is no error: 1 to {MOST_ERRNO} are"
                );
                return Err(ContainerError::new(ErrorKind::Invalid, message));
            }
        },
        LinuxSeccompAction::ScmpActLog => SeccompAction::Log,
        LinuxSeccompAction::ScmpActTrace => SeccompAction::Trace(errno.unwrap_or(libc::EPERM as u32)),
        LinuxSeccompAction::ScmpActTrap => SeccompAction::Trap,
        LinuxSeccompAction::ScmpActKillProcess => SeccompAction::KillProcess,
        // A supervisor outside the guest cannot read its memory: refuse as without one.
        LinuxSeccompAction::ScmpActNotify => SeccompAction::Errno(libc::ENOSYS as u32),
        _ => SeccompAction::KillThread,
    })
}

fn condition(arg: &LinuxSeccompArg) -> Result<SeccompCondition, ContainerError> {
    let operator = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => SeccompCmpOp::Ne,
        LinuxSeccompOperator::ScmpCmpLt => SeccompCmpOp::Lt,
        LinuxSeccompOperator::ScmpCmpLe => SeccompCmpOp::Le,
        LinuxSeccompOperator::ScmpCmpEq => SeccompCmpOp::Eq,
        LinuxSeccompOperator::ScmpCmpGe => SeccompCmpOp::Ge,
        LinuxSeccompOperator::ScmpCmpGt => SeccompCmpOp::Gt,
        LinuxSeccompOperator::ScmpCmpMaskedEq => SeccompCmpOp::MaskedEq(arg.value()),
    };
    let value = if arg.op() == LinuxSeccompOperator::ScmpCmpMaskedEq {
        arg.value_two().unwrap_or(0)
    } else {
        arg.value()
    };
    // One that no call has is refused there.
    let index = u8::try_from(arg.index()).unwrap_or(u8::MAX);
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)
        .map_err(|e| ContainerError::guest("seccomp argument", e))
}

/// Before a program: ENOSYS for calls that are newer than `newest`. x86-64's only, as the numbers of x32 have a bit of their own.
fn unknown(newest: u32) -> BpfProgram {
    let (number, architecture) = (0, 4);
    let own = |code, jt, jf, k| seccompiler::sock_filter { code: code as u16, jt, jf, k };
    let load = |at| own(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let jump = |kind, jt, jf, k| own(libc::BPF_JMP | kind | libc::BPF_K, jt, jf, k);
    vec![
        load(architecture),
        jump(libc::BPF_JEQ, 0, 4, AUDIT_ARCH_X86_64),
        load(number),
        jump(libc::BPF_JSET, 2, 0, X32_BIT),
        jump(libc::BPF_JGT, 0, 1, newest),
        own(libc::BPF_RET | libc::BPF_K, 0, 0, ENOSYS),
    ]
}

/// The largest number of a call that the profile names. As under runc, calls past it are newer than the profile, whose default says nothing of
/// them: a C library tries the new one first, and takes the old one at ENOSYS alone. A default that lets them through has no such limit.
fn newest(profile: &LinuxSeccomp, default: &SeccompAction) -> Option<u32> {
    if matches!(default, SeccompAction::Allow | SeccompAction::Log | SeccompAction::Trace(_))
        || profile.default_errno_ret() == Some(libc::ENOSYS as u32)
    {
        return None;
    }
    let names = profile.syscalls().iter().flatten().flat_map(|group| group.names());
    let numbers = names.filter_map(|name| name.parse::<syscalls::Sysno>().ok());
    numbers.map(|call| call.id() as u32).max().filter(|newest| *newest > 0)
}

/// The programs, in the order to install.
pub(super) fn programs(profile: &LinuxSeccomp) -> Result<Vec<BpfProgram>, ContainerError> {
    let failed = |e: seccompiler::BackendError| ContainerError::guest("seccomp profile", e);
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut by_action: Vec<(SeccompAction, Rules)> = Vec::new();
    for group in profile.syscalls().iter().flatten() {
        let group_action = action(group.action(), group.errno_ret())?;
        if group_action == default {
            continue;
        }
        let index = by_action.iter().position(|(a, _)| *a == group_action).unwrap_or_else(|| {
            by_action.push((group_action.clone(), Rules::new()));
            by_action.len() - 1
        });
        let conditions = group.args().iter().flatten().map(condition).collect::<Result<Vec<_>, _>>()?;
        let indices: BTreeSet<usize> = group.args().iter().flatten().map(LinuxSeccompArg::index).collect();
        let doubled = indices.len() < conditions.len();
        // Names that this architecture does not have are left out, as libseccomp does.
        for number in group.names().iter().filter_map(|n| n.parse::<syscalls::Sysno>().ok()) {
            let rules = &mut by_action[index].1;
            let number = i64::from(number.id());
            if conditions.is_empty() {
                rules.insert(number, Vec::new());
            } else if rules.get(&number).is_none_or(|r| !r.is_empty()) {
                let of = |all: &[SeccompCondition]| SeccompRule::new(all.to_vec()).map_err(failed);
                // As libseccomp's callers have it, whose rules take one condition for an argument (libcontainer's matchCall).
                let own = if doubled {
                    conditions.chunks(1).map(of).collect::<Result<Vec<_>, _>>()?
                } else {
                    vec![of(&conditions)?]
                };
                rules.entry(number).or_default().extend(own);
            }
        }
    }
    // A call that some group names must pass the default's program, whatever its own group says of it.
    let mut named = Rules::new();
    for (number, list) in by_action.iter().flat_map(|(_, rules)| rules) {
        match named.get_mut(number) {
            Some(there) if there.is_empty() => {}
            Some(_) if list.is_empty() => drop(named.insert(*number, Vec::new())),
            Some(there) => there.extend(list.iter().cloned()),
            None => drop(named.insert(*number, list.clone())),
        }
    }
    let build = |rules: Rules, mismatch, matched| -> Result<BpfProgram, ContainerError> {
        SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)
            .and_then(BpfProgram::try_from)
            .map_err(failed)
    };
    let mut list = Vec::new();
    if default != SeccompAction::Allow {
        let before = newest(profile, &default).map_or_else(Vec::new, unknown);
        list.push([before, build(named, default, SeccompAction::Allow)?].concat());
    }
    for (a, rules) in by_action.into_iter().filter(|(a, _)| *a != SeccompAction::Allow) {
        list.push(build(rules, SeccompAction::Allow, a)?);
    }
    Ok(list)
}

/// Flags of seccomp(2). That which is for supervisors only has no meaning without one.
pub(super) fn flags(profile: &LinuxSeccomp) -> libc::c_ulong {
    profile.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        }
    })
}

/// Installs a profile in this process, for good.
pub(super) fn install(profile: &LinuxSeccomp) -> Result<(), ContainerError> {
    let flags = flags(profile);
    for program in programs(profile)? {
        // Without no_new_privs, as the specification leaves that to the process; it needs CAP_SYS_ADMIN then, which a
        // process without it gets an error for.
        let mut filters: Vec<libc::sock_filter> =
            program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
        let length = u16::try_from(filters.len())
            .map_err(|e| ContainerError::guest("seccomp profile is too long", e))?;
        let prog = libc::sock_fprog { len: length, filter: filters.as_mut_ptr() };
        // SAFETY: `prog` and its filters outlive the call.
        let installed = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog)
        };
        // A positive number is a thread that has other filters: there is none beside this one.
        if installed != 0 {
            return Err(ContainerError::guest(
                "install the seccomp profile",
                std::io::Error::last_os_error(),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(value: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_default_and_two_other_actions_make_two_programs() {
        let list = programs(&profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "syscalls": [
                { "names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW" },
                { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
                { "names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }
            ]
        })))
        .unwrap();
        assert_eq!(list.len(), 2);
    }

    #[test]
    fn an_error_is_one_that_a_call_can_have() {
        for code in [0, 1, 4095, 4096, 65536, u32::MAX] {
            for value in [
                serde_json::json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": code }),
                serde_json::json!({ "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{ "names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": code }] }),
            ] {
                assert_eq!(programs(&profile(value)).is_ok(), code <= 4095, "{code}");
            }
        }
    }

    #[test]
    fn flags_are_the_kernels() {
        let profile = profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
        }));
        assert_eq!(flags(&profile), 0b110);
    }

    #[test]
    fn a_call_that_is_to_be_logged_is_not_denied_by_the_default() {
        let others: Vec<&str> =
            syscalls::Sysno::iter().map(|call| call.name()).filter(|n| *n != "getpriority").collect();
        let profile = profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 99,
            "syscalls": [
                { "names": others, "action": "SCMP_ACT_ALLOW" },
                { "names": ["getpriority"], "action": "SCMP_ACT_LOG" }
            ]
        }));
        let seen = std::thread::spawn(move || {
            install(&profile).map_err(|e| e.message)?;
            // SAFETY: the call has no effect.
            let logged = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
            Ok::<_, String>((logged, std::io::Error::last_os_error().raw_os_error().filter(|_| logged < 0)))
        });
        let (logged, errno) = seen.join().unwrap().unwrap();
        assert!(errno.is_none(), "{logged}: {errno:?}");
    }

    /// As under runc (libcontainer's matchCall): conditions of which two are about one argument hold one by one, others all together.
    #[test]
    fn two_conditions_on_one_argument_are_a_rule_each() {
        let equal = |index: u32, value: u32| serde_json::json!({ "index": index, "value": value, "op": "SCMP_CMP_EQ" });
        for (args, denied) in [
            ([equal(0, 1), equal(0, 2)], [false, true, true]),
            // Nobody has this number.
            ([equal(0, 1), equal(1, 4711)], [false, false, false]),
        ] {
            let profile = profile(serde_json::json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99, "args": args }]
            }));
            let seen = std::thread::spawn(move || {
                install(&profile).map_err(|e| e.message)?;
                Ok::<_, String>([0, 1, 2].map(|which| {
                    // SAFETY: the call has no effect.
                    let got = unsafe { libc::getpriority(which, 0) };
                    got < 0 && std::io::Error::last_os_error().raw_os_error() == Some(99)
                }))
            });
            assert_eq!(seen.join().unwrap(), Ok(denied));
        }
    }

    /// As under runc: a C library tries what is newer than the profile first, and goes on with the older call at ENOSYS only.
    #[test]
    fn a_call_that_is_newer_than_the_profile_is_none() {
        let number = |call: &syscalls::Sysno| call.id() <= 450;
        let names: Vec<&str> = syscalls::Sysno::iter()
            .filter(number)
            .map(|c| c.name())
            .filter(|n| *n != "getpriority")
            .collect();
        for code in [None, Some(99), Some(libc::ENOSYS)] {
            let profile = profile(serde_json::json!({
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": code,
                "syscalls": [{ "names": names, "action": "SCMP_ACT_ALLOW" }]
            }));
            let seen = std::thread::spawn(move || {
                install(&profile).map_err(|e| e.message)?;
                // The last two: one of x32, which is newer than nothing, and one within the profile's range.
                Ok::<_, String>([452, 9999, 0x4000_0000 | 140, libc::SYS_getpriority].map(|number| {
                    // SAFETY: the calls have no effect, and none of them is made.
                    let got = unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
                    std::io::Error::last_os_error().raw_os_error().filter(|_| got < 0)
                }))
            });
            let own = code.unwrap_or(libc::EPERM);
            let wanted = [libc::ENOSYS, libc::ENOSYS, own, own].map(Some);
            assert_eq!(seen.join().unwrap(), Ok(wanted), "{code:?}");
        }
    }

    /// Its own programs only: nothing comes before those of a profile that lets everything else through, or names no call.
    #[test]
    fn a_profile_that_lets_new_calls_through_or_names_none_says_nothing_of_them() {
        let first = |action: &str, names: &[&str]| {
            let list = programs(&profile(serde_json::json!({
                "defaultAction": action, "syscalls": [{ "names": names, "action": "SCMP_ACT_ALLOW" }]
            })));
            let list = list.unwrap();
            list.first().map(|program| program.iter().any(|i| i.k == ENOSYS))
        };
        assert_eq!(first("SCMP_ACT_ALLOW", &["mount"]), None);
        for action in ["SCMP_ACT_LOG", "SCMP_ACT_TRACE"] {
            assert_eq!(first(action, &["mount"]), Some(false));
        }
        for action in ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"] {
            assert_eq!(first(action, &["mount"]), Some(true));
            assert_eq!(first(action, &["no_such_call"]), Some(false));
        }
    }

    #[test]
    fn a_filter_that_denies_one_call_denies_it_and_no_other() {
        let profile = profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99 }]
        }));
        // A thread of its own keeps the filter from the other tests.
        let seen = std::thread::spawn(move || {
            install(&profile).map_err(|e| e.message)?;
            // SAFETY: both calls have no effect.
            let denied = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
            let errno = std::io::Error::last_os_error().raw_os_error();
            // SAFETY: likewise.
            let allowed = unsafe { libc::getpid() };
            Ok::<_, String>((denied, errno, allowed > 0))
        });
        assert_eq!(seen.join().unwrap(), Ok((-1, Some(99), true)));
    }
}
