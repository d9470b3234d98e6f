//! The seccomp program, as a tree of comparisons: whatever is called, eight of them or so tell whether it is refused, or which of its arguments tells. The
//! kernel runs a program once for each of its call numbers when it takes it; one comparison after the other cost a start a quarter of a millisecond there.
//!
//! Owns: the program's form. Does not own: which calls are refused.

use seccompiler::{BpfProgram, sock_filter};

/// `seccomp_data.nr` and `seccomp_data.arch` (linux/seccomp.h).
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
/// AUDIT_ARCH_X86_64 (linux/audit.h): EM_X86_64, 64 bits, little endian.
const X86_64: u32 = 0xc000_003e;
/// From here on numbers are the x32 ABI's (asm/unistd.h), names for the same calls.
const X32: u32 = 0x4000_0000;

/// `seccomp_data.args`, of 64 bits each, the lower half first.
const fn lower_half_at(argument: u32) -> u32 {
    16 + 8 * argument
}

const fn upper_half_at(argument: u32) -> u32 {
    lower_half_at(argument) + 4
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_FROM: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Refuse,
    /// Refused, unless all 64 bits of the argument are this value.
    AllowOnly {
        argument: u32,
        value: u32,
    },
    /// Allowed, unless the argument is one of these values. Its lower half counts: for a command the kernel reads no more.
    AllowBut {
        argument: u32,
        values: &'static [u32],
    },
}

const fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

const ALLOW: sock_filter = step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);
const REFUSE: sock_filter = step(RETURN, 0, 0, libc::SECCOMP_RET_TRAP);

impl Verdict {
    /// Adds the steps that come to it, in whose beginning the call's number is known. No list of its own for each: a start makes a hundred.
    fn add_to(self, program: &mut BpfProgram) {
        match self {
            Self::Allow => program.push(ALLOW),
            Self::Refuse => program.push(REFUSE),
            Self::AllowOnly { argument, value } => program.extend([
                step(LOAD, 0, 0, upper_half_at(argument)),
                step(JUMP_IF_EQUAL, 0, 3, 0),
                step(LOAD, 0, 0, lower_half_at(argument)),
                step(JUMP_IF_EQUAL, 0, 1, value),
                ALLOW,
                REFUSE,
            ]),
            Self::AllowBut { argument, values } => {
                program.push(step(LOAD, 0, 0, lower_half_at(argument)));
                for value in values {
                    program.extend([step(JUMP_IF_EQUAL, 0, 1, *value), REFUSE]);
                }
                program.push(ALLOW);
            }
        }
    }
}

/// A program that allows all calls but what these rules say; what is refused raises SIGSYS, as does every x32 call. Another architecture's
/// calls end the process. None when there are so many that a jump would be too long.
#[must_use]
pub(super) fn program(rules: &[(u32, Verdict)]) -> Option<BpfProgram> {
    let stretches = stretches(rules);
    // A comparison and an end for each, and room for arguments.
    let mut program = BpfProgram::with_capacity(3 * stretches.len() + 64);
    program.extend([
        step(LOAD, 0, 0, ARCHITECTURE_AT),
        step(JUMP_IF_EQUAL, 1, 0, X86_64),
        step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        step(LOAD, 0, 0, NUMBER_AT),
    ]);
    tree(&mut program, &stretches)?;
    Some(program)
}

/// Runs of numbers with one verdict: the first number of each, in order.
fn stretches(rules: &[(u32, Verdict)]) -> Vec<(u32, Verdict)> {
    let mut sorted: Vec<_> = rules.iter().copied().filter(|(number, _)| *number < X32).collect();
    sorted.sort_unstable_by_key(|(number, _)| *number);
    let mut stretches = vec![(0, Verdict::Allow)];
    for (number, verdict) in sorted {
        // The one that began after the number before, if that is this one.
        stretches.pop_if(|(first, _)| *first == number);
        if stretches.last().is_none_or(|(_, before)| *before != verdict) {
            stretches.push((number, verdict));
        }
        stretches.push((number + 1, Verdict::Allow));
    }
    stretches.push((X32, Verdict::Refuse));
    stretches
}

/// Adds the steps that decide among the stretches.
fn tree(program: &mut BpfProgram, stretches: &[(u32, Verdict)]) -> Option<()> {
    if let [(_, verdict)] = stretches {
        verdict.add_to(program);
        return Some(());
    }
    let (below, from) = stretches.split_at(stretches.len() / 2);
    let fork = program.len();
    program.push(step(JUMP_FROM, 0, 0, from.first()?.0));
    tree(program, below)?;
    // Over those of the numbers below.
    program[fork].jt = u8::try_from(program.len() - fork - 1).ok()?;
    tree(program, from)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        TargetArch,
    };

    use super::*;

    /// A call, as the kernel shows it to a program.
    #[derive(Clone, Copy, Debug)]
    struct Call {
        number: u32,
        architecture: u32,
        arguments: [u64; 6],
    }

    const fn call(number: u32, arguments: [u64; 6]) -> Call {
        Call { number, architecture: X86_64, arguments }
    }

    impl Call {
        fn word(&self, at: u32) -> u32 {
            match at {
                NUMBER_AT => self.number,
                ARCHITECTURE_AT => self.architecture,
                _ => {
                    let both = self.arguments[(at as usize - 16) / 8];
                    (both >> (at % 8 * 8)) as u32
                }
            }
        }
    }

    /// What the kernel would do: the verdict and the steps to it.
    fn run(program: &[sock_filter], call: &Call) -> (u32, usize) {
        let (mut at, mut held) = (0, 0);
        for steps in 1..=program.len() {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD => held = call.word(step.k),
                RETURN => return (step.k, steps),
                JUMP_IF_EQUAL => at += usize::from(if held == step.k { step.jt } else { step.jf }),
                JUMP_FROM => at += usize::from(if held >= step.k { step.jt } else { step.jf }),
                // BPF_JMP | BPF_JA, which seccompiler uses.
                0x05 => at += step.k as usize,
                other => unreachable!("{other:#x}"),
            }
        }
        unreachable!("it does not end")
    }

    fn seccompilers(rules: &[(u32, Verdict)]) -> BpfProgram {
        let when = |argument: u32, length, operator, value: u32| {
            let condition = SeccompCondition::new(argument as u8, length, operator, value.into()).unwrap();
            SeccompRule::new(vec![condition]).unwrap()
        };
        let of = |verdict| match verdict {
            Verdict::Allow => unreachable!("is no rule"),
            Verdict::Refuse => Vec::new(),
            Verdict::AllowOnly { argument, value } => {
                vec![when(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, value)]
            }
            Verdict::AllowBut { argument, values } => {
                let one = |value: &u32| when(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value);
                values.iter().map(one).collect()
            }
        };
        let rules: BTreeMap<i64, _> =
            rules.iter().map(|(number, verdict)| (i64::from(*number), of(*verdict))).collect();
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Trap, TargetArch::x86_64)
            .unwrap()
            .try_into()
            .unwrap()
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            8 => Just(Verdict::Refuse),
            1 => (0u32..6, 0u32..4).prop_map(|(argument, value)| Verdict::AllowOnly { argument, value }),
            1 => (0u32..6).prop_map(|argument| Verdict::AllowBut { argument, values: &[1, 3] }),
        ]
    }

    fn argument() -> impl Strategy<Value = u64> {
        (0u64..5, prop_oneof![Just(0), Just(1 << 32), Just(u64::MAX << 32)])
            .prop_map(|(low, high)| low | high)
    }

    proptest! {
        #[test]
        fn it_decides_as_seccompilers_program_does(
            rules in prop::collection::btree_map(0u32..600, verdict(), 1..100),
            arguments in prop::array::uniform6(argument()),
        ) {
            let rules: Vec<_> = rules.into_iter().collect();
            let (ours, theirs) = (program(&rules).unwrap(), seccompilers(&rules));
            for number in (0..700).chain([X32 - 1]) {
                let call = call(number, arguments);
                prop_assert_eq!(run(&ours, &call).0, run(&theirs, &call).0, "{:?}", call);
            }
        }
    }

    #[test]
    fn the_vmms_own_rules_take_a_dozen_steps_for_any_call_and_four_for_an_argument() {
        let rules = super::super::rules(1000);
        let (ours, theirs) = (program(&rules).unwrap(), seccompilers(&rules));
        for number in 0..1000 {
            let compares = rules.iter().any(|(n, verdict)| *n == number && *verdict != Verdict::Refuse);
            for first in [0, 1000, 1 << 32 | 1000] {
                let call = call(number, [first, 8, 0, 0, 0, 0]);
                let (verdict, steps) = run(&ours, &call);
                assert_eq!(verdict, run(&theirs, &call).0, "{number}");
                assert!(steps <= if compares { 16 } else { 12 }, "{number}: {steps} steps");
            }
        }
    }

    #[test]
    fn an_argument_is_compared_in_both_its_halves_where_one_value_is_allowed() {
        let ours = program(&[(234, Verdict::AllowOnly { argument: 1, value: 7 })]).unwrap();
        let of = |argument| run(&ours, &call(234, [7, argument, 7, 7, 7, 7])).0;
        assert_eq!(of(7), libc::SECCOMP_RET_ALLOW);
        for other in [0, 6, 1 << 32 | 7, 7 << 32, u64::MAX] {
            assert_eq!(of(other), libc::SECCOMP_RET_TRAP, "{other:#x}");
        }
    }

    #[test]
    fn a_command_is_refused_whatever_its_upper_half_is() {
        let ours = program(&[(72, Verdict::AllowBut { argument: 1, values: &[8, 15] })]).unwrap();
        let of = |argument| run(&ours, &call(72, [8, argument, 8, 8, 8, 8])).0;
        for refused in [8, 15, 1 << 32 | 8, u64::MAX << 32 | 15] {
            assert_eq!(of(refused), libc::SECCOMP_RET_TRAP, "{refused:#x}");
        }
        for other in [0, 7, 9, 14, 16, 8 << 32] {
            assert_eq!(of(other), libc::SECCOMP_RET_ALLOW, "{other:#x}");
        }
    }

    #[test]
    fn x32_calls_and_another_architectures_are_refused() {
        let ours = program(&[(libc::SYS_execve as u32, Verdict::Refuse)]).unwrap();
        for number in [X32, X32 + 520, u32::MAX] {
            assert_eq!(run(&ours, &call(number, [0; 6])).0, libc::SECCOMP_RET_TRAP);
        }
        let i386 = 0x4000_0003;
        let other = Call { number: 0, architecture: i386, arguments: [0; 6] };
        assert_eq!(run(&ours, &other).0, libc::SECCOMP_RET_KILL_PROCESS);
    }
}
