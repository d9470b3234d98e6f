//! The seccomp program, as a tree of comparisons: whatever is called, eight of them or so tell whether it is refused. The kernel runs a program once
//! for each of its call numbers when it takes it; one comparison after the other cost a start a quarter of a millisecond there.
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

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_FROM: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// A program that allows all calls but these, which raise SIGSYS, as does every x32 call. Another architecture's calls end the process.
/// None when there are so many that a jump would be too long.
#[must_use]
pub(super) fn program(refused: &[u32]) -> Option<BpfProgram> {
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let mut program = vec![
        step(LOAD, 0, 0, ARCHITECTURE_AT),
        step(JUMP_IF_EQUAL, 1, 0, X86_64),
        step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        step(LOAD, 0, 0, NUMBER_AT),
    ];
    tree(&mut program, &edges(refused), false)?;
    Some(program)
}

/// The numbers at which the verdict changes, beginning with that of 0, which is allowed.
fn edges(refused: &[u32]) -> Vec<u32> {
    let mut sorted: Vec<u32> = refused.iter().copied().filter(|number| *number < X32).collect();
    sorted.sort_unstable();
    sorted.dedup();
    let mut edges = Vec::new();
    for number in sorted {
        match edges.last() {
            Some(end) if *end == number => {
                edges.pop();
            }
            _ => edges.push(number),
        }
        edges.push(number + 1);
    }
    edges.push(X32);
    edges
}

/// Adds the steps that decide among the stretches that `edges` part; `refuses` is the verdict on the first.
fn tree(program: &mut BpfProgram, edges: &[u32], refuses: bool) -> Option<()> {
    let middle = edges.len() / 2;
    let Some(edge) = edges.get(middle) else {
        let verdict = if refuses { libc::SECCOMP_RET_TRAP } else { libc::SECCOMP_RET_ALLOW };
        program.push(sock_filter { code: RETURN, jt: 0, jf: 0, k: verdict });
        return Some(());
    };
    let fork = program.len();
    program.push(sock_filter { code: JUMP_FROM, jt: 0, jf: 0, k: *edge });
    tree(program, &edges[..middle], refuses)?;
    // Over those of the numbers below the edge.
    program[fork].jt = u8::try_from(program.len() - fork - 1).ok()?;
    tree(program, &edges[middle + 1..], refuses ^ middle.is_multiple_of(2))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};

    use super::*;

    /// What the kernel would do: the verdict and the steps to it.
    fn run(program: &[sock_filter], number: u32, architecture: u32) -> (u32, usize) {
        let (mut at, mut held) = (0, 0);
        for steps in 1..=program.len() {
            let step = &program[at];
            at += 1;
            match step.code {
                LOAD if step.k == NUMBER_AT => held = number,
                LOAD => held = architecture,
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

    fn seccompilers(refused: &[u32]) -> BpfProgram {
        let rules: BTreeMap<i64, _> = refused.iter().map(|number| (i64::from(*number), Vec::new())).collect();
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Trap, TargetArch::x86_64)
            .unwrap()
            .try_into()
            .unwrap()
    }

    proptest! {
        #[test]
        fn it_decides_as_seccompilers_program_does(refused in prop::collection::vec(0u32..600, 1..120)) {
            let (ours, theirs) = (program(&refused).unwrap(), seccompilers(&refused));
            for number in (0..700).chain([X32 - 1]) {
                prop_assert_eq!(run(&ours, number, X86_64).0, run(&theirs, number, X86_64).0, "{}", number);
            }
        }
    }

    #[test]
    fn the_vmms_own_list_takes_a_dozen_steps_for_any_call() {
        let refused: Vec<u32> = super::super::CALLS.iter().map(|call| call.id() as u32).collect();
        let (ours, theirs) = (program(&refused).unwrap(), seccompilers(&refused));
        for number in 0..1000 {
            let (verdict, steps) = run(&ours, number, X86_64);
            assert_eq!(verdict, run(&theirs, number, X86_64).0, "{number}");
            assert!(steps <= 12, "{number}: {steps} steps");
        }
    }

    #[test]
    fn x32_calls_and_another_architectures_are_refused() {
        let ours = program(&[libc::SYS_execve as u32]).unwrap();
        for number in [X32, X32 + 520, u32::MAX] {
            assert_eq!(run(&ours, number, X86_64).0, libc::SECCOMP_RET_TRAP);
        }
        let i386 = 0x4000_0003;
        assert_eq!(run(&ours, 0, i386).0, libc::SECCOMP_RET_KILL_PROCESS);
    }
}
