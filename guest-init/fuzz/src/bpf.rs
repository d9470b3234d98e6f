//! What the kernel does with the programs that init gives it: BPF of system call filters, and of device rules.
//!
//! Owns: as many instructions as those programs have (linux/bpf_common.h, linux/bpf.h), and what the kernel refuses.

/// Runs a filter on a call of x86-64.
///
/// # Panics
/// When it is not one that the kernel takes.
#[must_use]
pub fn seccomp(program: &[(u16, u8, u8, u32)], number: u32, arguments: [u64; 6]) -> u32 {
    assert!((1..=4096).contains(&program.len()));
    // struct seccomp_data: number, architecture, instruction pointer, arguments.
    let mut data = vec![number, 0xc000_003e, 0, 0];
    data.extend(arguments.iter().flat_map(|a| [*a as u32, (*a >> 32) as u32]));
    let (mut accumulator, mut next) = (0u32, 0usize);
    loop {
        let (code, yes, no, k) = *program.get(next).expect("within the program");
        next += 1;
        let mut jump = |taken: bool| next += usize::from(if taken { yes } else { no });
        match code {
            // BPF_LD | BPF_W | BPF_ABS
            0x20 => {
                assert!(k % 4 == 0);
                accumulator = data[k as usize / 4];
            }
            // BPF_ALU | BPF_AND | BPF_K
            0x54 => accumulator &= k,
            // BPF_JMP with JA, JEQ, JGT, JGE, JSET
            0x05 => next += k as usize,
            0x15 => jump(accumulator == k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            0x45 => jump(accumulator & k != 0),
            // BPF_RET | BPF_K
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

const JUMPS: [u8; 2] = [0x15, 0x55];
const EXIT: u8 = 0x95;

/// The kernel's own demand: every instruction is reached, and every way ends.
///
/// # Panics
/// When it is not so.
pub fn verify(program: &[(u8, u8, i16, i32)]) {
    let (mut reached, mut open) = (vec![false; program.len()], vec![0]);
    while let Some(at) = open.pop() {
        assert!(at < program.len(), "a way out of the program");
        if std::mem::replace(&mut reached[at], true) {
            continue;
        }
        let (code, _, offset, _) = program[at];
        if JUMPS.contains(&code) {
            assert!(offset >= 0, "a way back");
            open.push(at + 1 + offset as usize);
        }
        if code != EXIT {
            open.push(at + 1);
        }
    }
    assert!(reached.into_iter().all(|is| is), "an instruction that is never reached");
}

/// Whether device rules allow it.
///
/// # Panics
/// When it is no such program.
#[must_use]
pub fn device(program: &[(u8, u8, i16, i32)], kind: i64, major: i64, minor: i64, access: i64) -> bool {
    let (mut registers, mut next) = ([0i64; 11], 0);
    loop {
        let (code, both, offset, value) = program[next];
        next += 1;
        let (to, from, value) = (usize::from(both & 15), usize::from(both >> 4), i64::from(value));
        match code {
            // struct bpf_cgroup_dev_ctx
            0x61 => registers[to] = [access << 16 | kind, major, minor][offset as usize / 4],
            0xbf => registers[to] = registers[from],
            0xb7 => registers[to] = value,
            0x57 => registers[to] &= value,
            0x77 => registers[to] >>= value,
            0x15 | 0x55 if (registers[to] == value) == (code == 0x15) => next += offset as usize,
            0x15 | 0x55 => {}
            EXIT => return registers[0] == 1,
            other => panic!("instruction {other:#x}"),
        }
    }
}
