//! A recorded launch: every command's bytes in order, and each error injected in turn.

use super::*;
use crate::tee::snp::plan::{self, tests as plans};

const UADDR: u64 = 0x7000_0000_0000;

/// What the recorder does with a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Good,
    Fail(i32, u32),
    /// Takes so many pages of an update and leaves the rest.
    Pages(u64),
    /// Says that it is done, but leaves `len` as it was.
    Stuck,
    /// Writes a corrected CPUID page and refuses.
    Corrected,
}

/// Takes commands as the kernel would: copies the structure's bytes.
struct Recorder {
    /// Command id and structure's bytes as they were given.
    commands: Vec<(u32, Vec<u8>)>,
    attributes: Vec<(u64, u64, u64)>,
    /// Pages that are launched by now: address and type.
    launched: Vec<(u64, u8)>,
    discarded: Vec<(u64, u64)>,
    memory: std::collections::BTreeMap<u64, [u8; PAGE as usize]>,
    /// What the command with this number gets.
    script: Vec<(usize, Reply)>,
    attributes_fail: bool,
}

fn recorder(script: &[(usize, Reply)]) -> Recorder {
    Recorder {
        commands: vec![],
        attributes: vec![],
        launched: vec![],
        discarded: vec![],
        memory: Default::default(),
        script: script.to_vec(),
        attributes_fail: false,
    }
}

/// The bytes of a structure.
fn bytes_of<T>(value: &T) -> Vec<u8> {
    let (start, size) = (std::ptr::from_ref(value).cast::<u8>(), size_of::<T>());
    // SAFETY: the uapi structures are plain numbers without gaps (their sizes are asserted), valid for `size` bytes.
    unsafe { std::slice::from_raw_parts(start, size) }.to_vec()
}

impl Host for Recorder {
    fn encrypt(&mut self, command: &mut Command<'_>) -> Result<(), Failure> {
        let bytes = match command {
            Command::Init(c) => bytes_of(*c),
            Command::Start(c) => bytes_of(*c),
            Command::Update(c) => bytes_of(*c),
            Command::Finish(c) => bytes_of(*c),
        };
        let number = self.commands.len();
        self.commands.push((command.id(), bytes));
        let reply = self.script.iter().find(|(n, _)| *n == number).map_or(Reply::Good, |(_, r)| *r);
        let Command::Update(update) = command else {
            return match reply {
                Reply::Fail(errno, status) => Err(Failure { errno, status }),
                _ => Ok(()),
            };
        };
        let pages = match reply {
            Reply::Good => update.len / PAGE,
            Reply::Pages(pages) => pages,
            Reply::Stuck => return Ok(()),
            Reply::Fail(errno, status) => return Err(Failure { errno, status }),
            Reply::Corrected => {
                let page = self.memory.get_mut(&(update.gfn_start * PAGE)).unwrap();
                page[16 + 24] ^= 0xff;
                return Err(Failure { errno: libc::EIO, status: status::INVALID_PARAM });
            }
        };
        for _ in 0..pages {
            assert!(!self.launched.iter().any(|(gpa, _)| *gpa == update.gfn_start * PAGE), "launched twice");
            self.launched.push((update.gfn_start * PAGE, update.type_));
            update.gfn_start += 1;
            update.uaddr += PAGE;
            update.len -= PAGE;
        }
        Ok(())
    }

    fn set_attributes(&mut self, a: &kvm_memory_attributes) -> Result<(), i32> {
        if self.attributes_fail {
            return Err(libc::EINVAL);
        }
        self.attributes.push((a.address, a.size, a.attributes));
        Ok(())
    }

    fn address(&self, gpa: u64, size: u64) -> Option<u64> {
        (gpa + size <= 64 << 20).then_some(UADDR + gpa)
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        for (index, part) in bytes.chunks(PAGE as usize).enumerate() {
            let page = self.memory.entry(gpa + index as u64 * PAGE).or_insert([0; PAGE as usize]);
            page[..part.len()].copy_from_slice(part);
        }
        true
    }

    fn page(&self, gpa: u64) -> Option<[u8; PAGE as usize]> {
        self.memory.get(&gpa).copied()
    }

    fn discard(&mut self, gpa: u64, size: u64) {
        self.discarded.push((gpa, size));
    }
}

/// One CPUID entry.
fn cpuid() -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    (page[0], page[16], page[40]) = (1, 1, 9);
    page
}

fn run(recorder: &mut Recorder) -> (Result<(), SnpError>, Launch, Vec<String>) {
    let file = plans::file();
    let plan = plan::plan(&plans::image(), &file, &plans::options()).unwrap();
    let (mut launch, mut lines) = (Launch::default(), Vec::new());
    let mut log = |line: &str| lines.push(line.to_owned());
    let page = cpuid();
    let guest = Guest { ram: &plans::RAM, file: &file, cpuid: &page };
    let result = launch
        .init(plan.vmsa.features(), recorder)
        .and_then(|()| launch.run(&plan, &guest, recorder, &mut log));
    (result, launch, lines)
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect()
}

/// The structures' bytes written down from Linux's uapi headers, not from the code.
#[test]
fn every_command_has_the_uapis_bytes_in_order() {
    let mut host = recorder(&[]);
    let (result, launch, _) = run(&mut host);
    result.unwrap();
    let ids: Vec<u32> = host.commands.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [22, 100, 101, 101, 101, 101, 102]);
    // kvm_sev_init: vmsa_features, flags, ghcb_version (u16 at 12), pad.
    assert_eq!(words(&host.commands[0].1), [0, 2 << 32, 0, 0, 0, 0]);
    // kvm_sev_snp_launch_start: policy, gosvw, flags, pad.
    assert_eq!(words(&host.commands[1].1), [0x30000, 0, 0, 0, 0, 0, 0, 0]);
    // kvm_sev_snp_launch_update: gfn_start, uaddr, len, type (u8), pad.
    for (index, gfn, pages, kind) in [(2, 8, 1, 5), (3, 9, 1, 6), (4, 10, 1, 4), (5, 11, 3, 1)] {
        let wanted = [gfn, UADDR + gfn * PAGE, pages * PAGE, kind, 0, 0, 0, 0];
        assert_eq!(words(&host.commands[index].1), wanted, "{index}");
    }
    // kvm_sev_snp_launch_finish: two addresses, id_block_en, auth_key_en, vcek_disabled, host_data from 19, pad.
    let finish = &host.commands[6].1;
    assert_eq!((finish.len(), &finish[..19], &finish[51..]), (88, &[0; 19][..], &[0; 37][..]));
    assert_eq!(finish[19..51], [7; 32]);
    assert_eq!(host.attributes, [(0, 64 << 20, 8)]);
    assert_eq!(host.discarded, [(0x8000, PAGE), (0x9000, PAGE), (0xa000, PAGE), (0xb000, 3 * PAGE)]);
    assert_eq!(host.memory[&0xb000], [1; PAGE as usize]);
    assert_eq!(host.memory[&0xc000], [2; PAGE as usize]);
    assert_eq!(launch.state(), State::Finished);
    assert_eq!((launch.counts.update, launch.counts.pages[1], launch.counts.pages[5]), (4, 3, 1));
}

#[test]
fn a_short_update_goes_on_where_it_stands_and_a_busy_one_is_given_again() {
    let mut host = recorder(&[(5, Reply::Pages(1)), (6, Reply::Fail(libc::EAGAIN, 0)), (7, Reply::Pages(2))]);
    let (result, launch, _) = run(&mut host);
    result.unwrap();
    assert_eq!(words(&host.commands[6].1)[..3], [12, UADDR + 12 * PAGE, 2 * PAGE]);
    assert_eq!(host.commands[7], host.commands[6]);
    assert_eq!(launch.counts.again, 1);
    let launched: Vec<u64> = host.launched.iter().map(|(gpa, _)| gpa / PAGE).collect();
    assert_eq!(launched, [8, 9, 10, 11, 12, 13]);
}

#[test]
fn the_cpuid_page_is_corrected_once_and_the_difference_is_told() {
    let mut host = recorder(&[(3, Reply::Corrected)]);
    let (result, _, lines) = run(&mut host);
    result.unwrap();
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains("leaf 0x1 index 0: eax 0x00000009 became 0x000000f6"), "{lines:?}");
    let mut host = recorder(&[(3, Reply::Corrected), (4, Reply::Corrected)]);
    let (result, _, _) = run(&mut host);
    assert!(matches!(result, Err(SnpError::Command { status: 0x16, .. })));
    // The same status for another page is an error at once.
    let mut host = recorder(&[(2, Reply::Fail(libc::EIO, 0x16))]);
    assert!(run(&mut host).0.is_err());
}

#[test]
fn each_error_at_each_command_ends_the_launch_and_nothing_follows() {
    let errors = [libc::EEXIST, libc::ENOSPC, libc::EINVAL, libc::ENOMEM, libc::ENOTTY].map(|e| (e, 0));
    let statuses = (1..=0x27).filter(|s| *s != 0x1e && *s != 0x16).map(|s| (libc::EIO, s));
    for (errno, status) in errors.into_iter().chain(statuses) {
        for at in 0..7 {
            let mut host = recorder(&[(at, Reply::Fail(errno, status))]);
            let (result, mut launch, _) = run(&mut host);
            let error = result.unwrap_err();
            assert_eq!(host.commands.len(), at + 1, "something followed {errno} {status:#x} at {at}");
            assert!(host.discarded.is_empty());
            let text = error.to_string();
            assert!(
                text.contains(super::status::name(status)) && text.contains("SNP_LAUNCH") | (at == 0),
                "{text}"
            );
            if (2..6).contains(&at) {
                let place =
                    ["0x8000, secrets", "0x9000, cpuid", "0xa000, unmeasured", "0xb000, normal"][at - 2];
                assert!(text.contains(place), "{text}");
            }
            assert_eq!(launch.state(), State::Failed);
            assert_eq!(launch.init(1, &mut host), Err(SnpError::Order(State::Failed)));
        }
    }
}

#[test]
fn a_kernel_that_is_busy_for_ever_or_makes_no_progress_ends_the_launch() {
    let busy: Vec<_> = (1..100).map(|n| (n, Reply::Fail(libc::EAGAIN, 0))).collect();
    let mut host = recorder(&busy);
    assert!(matches!(run(&mut host).0, Err(SnpError::Command { errno: libc::EAGAIN, .. })));
    assert_eq!(host.commands.len(), 2 + TRIES as usize);
    let mut host = recorder(&[(5, Reply::Stuck)]);
    assert_eq!(run(&mut host).0, Err(SnpError::NoProgress { gpa: 0xb000, left: 3 * PAGE }));
    let mut host = Recorder { attributes_fail: true, ..recorder(&[]) };
    assert!(matches!(run(&mut host).0, Err(SnpError::Attributes { errno: libc::EINVAL, .. })));
    assert_eq!(host.commands.len(), 1);
}

#[test]
fn a_finished_launch_is_not_done_again() {
    let mut host = recorder(&[]);
    let (result, mut launch, _) = run(&mut host);
    result.unwrap();
    let file = plans::file();
    let plan = plan::plan(&plans::image(), &file, &plans::options()).unwrap();
    let guest = Guest { ram: &plans::RAM, file: &file, cpuid: &cpuid() };
    let again = launch.run(&plan, &guest, &mut host, &mut |_| {});
    assert_eq!(again, Err(SnpError::Order(State::Finished)));
    assert_eq!(host.commands.len(), 7);
}
