//! Which devices a container's processes may make and open (`linux.resources.devices`): a program on its cgroup.
//!
//! Owns: the translation of the rules and its attachment (bpf(2), BPF_PROG_TYPE_CGROUP_DEVICE). Does not own: the nodes.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use coffer_protocol::ErrorKind;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::ContainerError;

/// Most rules of a container: podman writes some 15, and `--privileged` one.
const MOST: usize = 1024;

/// Numbers of linux/bpf.h and linux/bpf_common.h.
mod abi {
    pub(super) const PROG_LOAD: libc::c_long = 5;
    pub(super) const PROG_ATTACH: libc::c_long = 8;
    pub(super) const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    pub(super) const CGROUP_DEVICE: u32 = 6;
    /// Programs of a cgroup inside decide as well.
    pub(super) const F_ALLOW_MULTI: u32 = 2;
    pub(super) const BLOCK: i32 = 1;
    pub(super) const CHARACTER: i32 = 2;
    pub(super) const MKNOD: i32 = 1;
    pub(super) const READ: i32 = 2;
    pub(super) const WRITE: i32 = 4;
    pub(super) const ALL: i32 = MKNOD | READ | WRITE;

    /// `BPF_LDX | BPF_MEM | BPF_W`
    pub(super) const LOAD: u8 = 0x61;
    /// `BPF_ALU64 | BPF_MOV`, from a register and from the immediate.
    pub(super) const COPY: u8 = 0xbf;
    pub(super) const MOVE: u8 = 0xb7;
    /// `BPF_ALU64 | BPF_AND | BPF_K`, and `BPF_RSH`
    pub(super) const AND: u8 = 0x57;
    pub(super) const SHIFT: u8 = 0x77;
    /// `BPF_JMP | BPF_JEQ | BPF_K`, and `BPF_JNE`
    pub(super) const IF_EQUAL: u8 = 0x15;
    pub(super) const IF_OTHER: u8 = 0x55;
    pub(super) const EXIT: u8 = 0x95;

    /// `struct bpf_insn`: the registers are the target in the low half, the source in the high one.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(in super::super) struct Instruction {
        pub(in super::super) code: u8,
        pub(in super::super) registers: u8,
        pub(in super::super) offset: i16,
        pub(in super::super) immediate: i32,
    }

    /// `union bpf_attr` of BPF_PROG_LOAD, as far as it is used.
    #[repr(C)]
    pub(super) struct Load {
        pub(super) kind: u32,
        pub(super) count: u32,
        pub(super) instructions: u64,
        pub(super) licence: u64,
        pub(super) log_level: u32,
        pub(super) log_size: u32,
        pub(super) log: u64,
    }

    /// The same of BPF_PROG_ATTACH.
    #[repr(C)]
    pub(super) struct Attach {
        pub(super) target: u32,
        pub(super) program: u32,
        pub(super) kind: u32,
        pub(super) flags: u32,
    }

    const _: () = {
        assert!(size_of::<Instruction>() == 8 && size_of::<Load>() == 40 && size_of::<Attach>() == 16);
    };
}
pub(super) use abi::Instruction;

/// One rule. `None` is any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may do, whatever its rules say, as under runc: make any node, and use those that each has.
const ALWAYS: [Rule; 11] = {
    const fn node(kind: i32) -> Rule {
        Rule { allow: true, kind: Some(kind), major: None, minor: None, access: abi::MKNOD }
    }
    const fn own(major: i32, minor: Option<i32>) -> Rule {
        Rule { allow: true, kind: Some(abi::CHARACTER), major: Some(major), minor, access: abi::ALL }
    }
    [
        node(abi::CHARACTER),
        node(abi::BLOCK),
        own(1, Some(3)),
        own(1, Some(5)),
        own(1, Some(7)),
        own(1, Some(8)),
        own(1, Some(9)),
        // The terminal, the console, and pseudo-terminals.
        own(5, Some(0)),
        own(5, Some(1)),
        own(5, Some(2)),
        own(136, None),
    ]
};

/// Reads the configuration's rules; `None` when they forbid nothing.
pub(super) fn read(rules: &[LinuxDeviceCgroup]) -> Result<Option<Vec<Rule>>, ContainerError> {
    let wrong = |index: usize, why: &str| {
        let message = format!("config.json: linux.resources.devices[{index}]: {why}");
        Err(ContainerError::new(ErrorKind::Invalid, message))
    };
    if rules.len() > MOST {
        return wrong(MOST, &format!("more than {MOST} rules"));
    }
    let mut list = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => None,
            LinuxDeviceType::B => Some(abi::BLOCK),
            LinuxDeviceType::C | LinuxDeviceType::U => Some(abi::CHARACTER),
            LinuxDeviceType::P => return wrong(index, "a FIFO is no device: name type a, b or c"),
        };
        // Callers write -1 for any.
        let number = |value: Option<i64>| match value {
            None | Some(-1) => Some(None),
            Some(value) => i32::try_from(value).ok().filter(|v| *v >= 0).map(Some),
        };
        let (Some(major), Some(minor)) = (number(rule.major()), number(rule.minor())) else {
            return wrong(index, "major and minor are numbers of 31 bits");
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => abi::READ,
                'w' => abi::WRITE,
                'm' => abi::MKNOD,
                _ => return wrong(index, "access is made of r, w and m"),
            };
        }
        let rule = Rule { allow: rule.allow(), kind, major, minor, access };
        if rule.is_everything() {
            list.clear();
        }
        list.push(rule);
    }
    // Each is an exception from those before it. Nothing is allowed by itself.
    match list.as_slice() {
        [] => Ok(None),
        [Rule { allow: true, .. }] if list[0].is_everything() => Ok(None),
        _ => Ok(Some(list)),
    }
}

impl Rule {
    fn is_everything(self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == abi::ALL
    }
}

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const PART: u8 = 6;

const fn instruction(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: target | source << 4, offset, immediate }
}

/// The program: the last rule that matches decides on each kind of access, so that they are asked from the last one on, and what is
/// left of the access once it is allowed is asked further.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access and type in one word, major, minor
    let mut list = vec![
        instruction(abi::LOAD, KIND, CONTEXT, 0, 0),
        instruction(abi::COPY, ACCESS, KIND, 0, 0),
        instruction(abi::AND, KIND, 0, 0, 0xffff),
        instruction(abi::SHIFT, ACCESS, 0, 0, 16),
        instruction(abi::LOAD, MAJOR, CONTEXT, 4, 0),
        instruction(abi::LOAD, MINOR, CONTEXT, 8, 0),
    ];
    let end = |allow: bool| {
        [instruction(abi::MOVE, RESULT, 0, 0, i32::from(allow)), instruction(abi::EXIT, 0, 0, 0, 0)]
    };
    for rule in rules.iter().rev().filter(|rule| rule.access != 0) {
        let mut body = Vec::new();
        match (rule.allow, rule.access == abi::ALL) {
            (_, true) => {}
            (true, false) => {
                body.push(instruction(abi::AND, ACCESS, 0, 0, !rule.access));
                body.push(instruction(abi::IF_OTHER, ACCESS, 0, 2, 0));
            }
            (false, false) => {
                body.push(instruction(abi::COPY, PART, ACCESS, 0, 0));
                body.push(instruction(abi::AND, PART, 0, 0, rule.access));
                body.push(instruction(abi::IF_EQUAL, PART, 0, 2, 0));
            }
        }
        body.extend(end(rule.allow));
        let conditions: Vec<(u8, i32)> = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        for (done, (register, value)) in conditions.iter().enumerate() {
            // At most two more conditions and five instructions: it fits.
            let skip = (conditions.len() - done - 1 + body.len()) as i16;
            list.push(instruction(abi::IF_OTHER, *register, 0, skip, *value));
        }
        list.extend(body);
        if rule.is_everything() {
            // What cannot be reached is refused by the kernel.
            return list;
        }
    }
    list.extend(end(false));
    list
}

/// The program of a configuration's rules, with what every container may do.
pub(super) fn with_defaults(mut rules: Vec<Rule>) -> Vec<Instruction> {
    rules.extend(ALWAYS);
    program(&rules)
}

/// Attaches the rules to a cgroup. Without rules, and where they allow everything, there is nothing to attach; neither is there where
/// the directory is no cgroup of version 2, which is so only outside a guest.
///
/// # Errors
/// [`ContainerError`], naming the rule or the kernel's call.
pub(super) fn apply(group: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), ContainerError> {
    let Some(rules) = read(rules)? else { return Ok(()) };
    let failed = |what: &str, e: io::Error| ContainerError::guest(&format!("device rules: {what}"), e);
    let directory = File::open(group).map_err(|e| failed("open the cgroup", e))?;
    let system = nix::sys::statfs::fstatfs(&directory).map_err(|e| failed("look at the cgroup", e.into()))?;
    if system.filesystem_type() != nix::sys::statfs::CGROUP2_SUPER_MAGIC {
        return Ok(());
    }
    let instructions = with_defaults(rules);
    let load = abi::Load {
        kind: abi::PROG_TYPE_CGROUP_DEVICE,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        licence: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    // SAFETY: the kernel reads a `Load`, and the instructions and the licence that it points to; all outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, abi::PROG_LOAD, &raw const load, size_of_val(&load)) };
    if fd < 0 {
        return Err(failed("BPF_PROG_LOAD", io::Error::last_os_error()));
    }
    // SAFETY: the call returned a descriptor that nobody else has.
    let loaded = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let attach = abi::Attach {
        target: directory.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        kind: abi::CGROUP_DEVICE,
        flags: abi::F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads an `Attach` that outlives the call. The cgroup keeps the program when the descriptor is closed.
    if unsafe { libc::syscall(libc::SYS_bpf, abi::PROG_ATTACH, &raw const attach, size_of_val(&attach)) } < 0
    {
        return Err(failed("BPF_PROG_ATTACH", io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would do with the program.
    fn run(program: &[Instruction], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        let mut registers = [0i64; 7];
        let mut next = 0;
        for _ in 0..program.len() {
            let i = program[next];
            next += 1;
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let value = i64::from(i.immediate);
            match i.code {
                abi::LOAD => {
                    registers[to] = match i.offset {
                        0 => i64::from(access << 16 | kind),
                        4 => i64::from(major),
                        8 => i64::from(minor),
                        other => panic!("a load from {other}"),
                    }
                }
                abi::COPY => registers[to] = registers[from],
                abi::MOVE => registers[to] = value,
                abi::AND => registers[to] &= value,
                abi::SHIFT => registers[to] >>= value,
                abi::IF_EQUAL if registers[to] == value => next += i.offset as usize,
                abi::IF_OTHER if registers[to] != value => next += i.offset as usize,
                abi::IF_EQUAL | abi::IF_OTHER => {}
                abi::EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
        panic!("no end")
    }

    /// The rules in words: for each kind of access, the last that matches.
    fn allowed(rules: &[Rule], kind: i32, major: i32, minor: i32, access: i32) -> bool {
        [abi::MKNOD, abi::READ, abi::WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            let fits = |r: &&Rule| {
                r.access & bit != 0
                    && r.kind.is_none_or(|k| k == kind)
                    && r.major.is_none_or(|m| m == major)
                    && r.minor.is_none_or(|m| m == minor)
            };
            rules.iter().rev().find(fits).is_some_and(|r| r.allow)
        })
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(0..4i32);
        (any::<bool>(), proptest::option::of(1..3i32), number(), number(), 0..8i32)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access })
    }

    proptest! {
        #[test]
        fn the_last_rule_that_matches_decides(
            rules in proptest::collection::vec(rule(), 0..12),
            kind in 1..3i32, major in 0..4i32, minor in 0..4i32, access in 1..8i32,
        ) {
            let wanted = allowed(&rules, kind, major, minor, access);
            prop_assert_eq!(run(&program(&rules), kind, major, minor, access), wanted);
        }

        #[test]
        fn every_instruction_can_be_reached(rules in proptest::collection::vec(rule(), 0..12)) {
            let program = program(&rules);
            let mut reached = vec![false; program.len()];
            let mut open = vec![0];
            while let Some(at) = open.pop() {
                if std::mem::replace(&mut reached[at], true) { continue }
                let i = program[at];
                if matches!(i.code, abi::IF_EQUAL | abi::IF_OTHER) { open.push(at + 1 + i.offset as usize) }
                if i.code != abi::EXIT { open.push(at + 1) }
            }
            prop_assert!(reached.into_iter().all(|r| r));
        }
    }

    fn parsed(text: &str) -> Result<Option<Vec<Rule>>, ContainerError> {
        read(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(text).unwrap())
    }

    #[test]
    fn podmans_rules_keep_the_fuse_device_out_until_it_is_asked_for() {
        let plain =
            r#"{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"}"#;
        for (more, wanted) in
            [("", false), (r#",{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}"#, true)]
        {
            let mut rules = parsed(&format!("[{plain}{more}]")).unwrap().unwrap();
            rules.extend(ALWAYS);
            let program = program(&rules);
            assert_eq!(run(&program, abi::CHARACTER, 10, 229, abi::READ | abi::WRITE), wanted);
            assert!(run(&program, abi::CHARACTER, 10, 229, abi::MKNOD));
            assert!(run(&program, abi::CHARACTER, 136, 7, abi::READ | abi::WRITE));
            assert!(!run(&program, abi::BLOCK, 254, 0, abi::READ));
        }
    }

    #[test]
    fn what_allows_everything_needs_no_program() {
        assert_eq!(parsed("[]").unwrap(), None);
        assert_eq!(
            parsed(r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#).unwrap(),
            None
        );
        assert!(
            parsed(r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","access":"w"}]"#)
                .unwrap()
                .is_some()
        );
        // Nothing is allowed by itself.
        assert!(parsed(r#"[{"allow":false,"access":"rwm"}]"#).unwrap().is_some());
    }

    #[test]
    fn a_rule_that_says_nothing_clear_is_named() {
        for (rule, words) in [
            (r#"{"allow":true,"type":"p"}"#, "FIFO"),
            (r#"{"allow":true,"major":-2}"#, "31 bits"),
            (r#"{"allow":true,"minor":4294967296}"#, "31 bits"),
            (r#"{"allow":true,"access":"rx"}"#, "made of r, w and m"),
        ] {
            let error = parsed(&format!(r#"[{{"allow":false}},{rule}]"#)).unwrap_err().to_string();
            assert!(error.contains("devices[1]") && error.contains(words), "{error}");
        }
    }
}
