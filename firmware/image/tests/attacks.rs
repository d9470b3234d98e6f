//! A host that lies to the shim: whole images on a model of the machine, one lie at a time.

#[path = "support/machine.rs"]
mod machine;
mod support;

use std::sync::OnceLock;

use coffer_image::{build::build, inspect::parse, measure::measure};
use coffer_layout::{
    PAGE,
    boot::{HANDOFF, MEMORY_MAP_MAX, Refusal, RegionKind, SHIM_BASE},
    snp::{CPUID_COHERENT, LAUNCH_START, MEMORY_TOP, SHARED_BASE},
};
use coffer_shim::honest::{MILAN, cpuid_page, parameter_page};
use machine::{Machine, RAM};
use proptest::prelude::*;

/// One image for all tests.
fn image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(build_image)
}

fn build_image() -> Vec<u8> {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let initramfs: Vec<u8> = (0..0x5001u32).map(|i| i as u8).collect();
    build(&support::inputs(&shim, &kernel, &initramfs)).unwrap()
}

fn refusal(change: impl FnOnce(&mut Machine)) -> Refusal {
    let mut machine = Machine::launch(image());
    change(&mut machine);
    let refusal = machine.boot().unwrap_err();
    assert!(!machine.marks.contains(&coffer_layout::mark::KERNEL_ENTRY));
    refusal
}

#[test]
fn an_honest_host_boots_and_every_region_is_in_place() {
    let mut machine = Machine::launch(image());
    let handoff = machine.boot().unwrap();
    assert_eq!(machine.marks, [coffer_layout::mark::SHIM_ENTRY]);
    for region in handoff.used_regions() {
        assert!(
            machine
                .bytes(region.destination + region.length, region.memory - region.length)
                .iter()
                .all(|b| *b == 0),
            "bss"
        );
    }
    let initramfs = machine.bytes(handoff.initramfs_start, handoff.initramfs_size);
    assert!(initramfs.iter().enumerate().all(|(i, b)| *b == i as u8));
    let line = machine.bytes(coffer_layout::boot::COMMAND_LINE, handoff.command_line_size + 1);
    assert!(line.starts_with(b"rdinit=/init ") && line.ends_with(b"\0"));
    // The first 2 MiB in small pages but for those that were launched (11), the rest in large ones.
    assert_eq!(machine.validations, (RAM / (2 << 20) - 1, 512 - 11));
}

#[test]
fn memory_in_small_pages_is_validated_page_by_page() {
    let mut machine = Machine::launch(image());
    machine.large_pages = false;
    machine.boot().unwrap();
    assert_eq!(machine.validations, (0, RAM / PAGE - 11));
}

#[test]
fn every_page_is_touched_unless_hardware_keeps_caches_coherent() {
    let mut machine = Machine::launch(image());
    machine.boot().unwrap();
    assert_eq!(machine.touched.len() as u64, RAM / PAGE - 11);
    let mut machine = Machine::launch(image());
    let mut leaves = MILAN;
    leaves[8][3] |= CPUID_COHERENT;
    machine.cpuid = cpuid_page(&leaves);
    machine.boot().unwrap();
    assert!(machine.touched.is_empty());
}

#[test]
fn one_bit_of_kernel_initramfs_or_command_line_is_refused_in_its_own_words() {
    let handoff = Machine::launch(image()).boot().unwrap();
    for region in handoff.used_regions() {
        for offset in [0, region.length / 2, region.length - 1] {
            for bit in [0, 7] {
                let found = refusal(|m| {
                    let at = region.source + offset;
                    m.shared.get_mut(&(at & !0xfff)).unwrap()[at as usize % 4096] ^= 1 << bit;
                });
                let wanted = match region.kind {
                    RegionKind::Kernel => Refusal::KernelHash,
                    RegionKind::Initramfs => Refusal::InitramfsHash,
                    RegionKind::CommandLine => Refusal::CommandLineHash,
                };
                assert_eq!(found, wanted, "{region:?} + {offset:#x}");
            }
        }
    }
}

#[test]
fn one_bit_of_shim_or_hash_page_changes_what_the_hardware_reports() {
    let file = image();
    let digest = measure(&parse(file).unwrap(), 1).unwrap().digest;
    let directives = parse(file).unwrap();
    for (wanted, bit) in
        [(SHIM_BASE, 0), (SHIM_BASE + 2 * PAGE, 3), (HANDOFF, 7), (LAUNCH_START + 4 * PAGE, 1)]
    {
        let changed: Vec<_> = directives
            .directives()
            .iter()
            .cloned()
            .map(|mut d| {
                if let igvm::IgvmDirectiveHeader::PageData { gpa, data, .. } = &mut d
                    && *gpa == wanted
                {
                    data[100] ^= 1 << bit;
                }
                d
            })
            .collect();
        let changed = igvm::IgvmFile::new(
            igvm::IgvmRevision::V2 { arch: igvm::Arch::X64, page_size: 4096 },
            directives.platforms().to_vec(),
            directives.initializations().to_vec(),
            changed,
        );
        assert_ne!(measure(&changed.unwrap(), 1).unwrap().digest, digest, "{wanted:#x}");
    }
}

#[test]
fn one_bit_of_a_hash_is_refused_too() {
    // Region 1 is the kernel's first segment; its hash begins 40 bytes into it.
    assert_eq!(refusal(|m| m.handoff[88 + 88 + 40] ^= 1), Refusal::KernelHash);
}

#[test]
fn pages_swapped_between_reading_and_hashing_change_nothing() {
    let mut machine = Machine::launch(image());
    machine.swaps_after_reading = true;
    machine.boot().unwrap();
}

#[test]
fn swapped_or_wrong_cpuid_leaves_are_refused() {
    for (one, other) in [(0, 1), (1, 6), (5, 8), (7, 8), (1, 8), (3, 7)] {
        let found = refusal(|m| {
            let mut leaves = MILAN;
            let (left, right) = (leaves[one], leaves[other]);
            leaves[one][2..].copy_from_slice(&right[2..]);
            leaves[other][2..].copy_from_slice(&left[2..]);
            m.cpuid = cpuid_page(&leaves);
        });
        assert!(matches!(found, Refusal::CpuidLeaves | Refusal::CpuidPage | Refusal::CBit), "{found:?}");
    }
    assert_eq!(refusal(|m| m.cpuid = [0; 4096]), Refusal::CpuidPage);
}

#[test]
fn a_wrong_c_bit_is_refused_whoever_says_it() {
    assert_eq!(refusal(|m| m.c_bit = 47), Refusal::CBit);
    let mut leaves = MILAN;
    leaves[8][3] = 47;
    assert_eq!(refusal(|m| m.cpuid = cpuid_page(&leaves)), Refusal::CBit);
}

#[test]
fn other_features_than_the_measured_ones_are_refused() {
    // No TEE, SEV, SEV-ES, virtual top of memory, debug swap.
    for status in [0, 1, 3, 7 | 1 << 3, 7 | 1 << 7] {
        assert_eq!(refusal(|m| m.sev_status = status), Refusal::SevStatus);
    }
}

#[test]
fn a_hypervisor_without_what_is_needed_is_refused() {
    assert_eq!(refusal(|m| m.versions = (1, 1)), Refusal::GhcbProtocol);
    assert_eq!(refusal(|m| m.features = 0), Refusal::HypervisorFeatures);
    // Two processors need AP creation.
    assert_eq!(refusal(|m| m.features = 1), Refusal::HypervisorFeatures);
    assert_eq!(refusal(|m| m.registers = false), Refusal::GhcbRegistration);
    assert_eq!(refusal(|m| m.exit_error = 2), Refusal::GhcbExit);
}

#[test]
fn a_page_that_was_valid_before_is_refused_wherever_it_is() {
    for page in [0, 0x7000, 0x9_f000, 0x10_0000, 2 << 20, 0x124_4000, RAM - PAGE] {
        let with = |large_pages| {
            refusal(|m| {
                m.valid_before = Some(page);
                m.large_pages = large_pages;
            })
        };
        assert_eq!((with(true), with(false)), (Refusal::AlreadyValid, Refusal::AlreadyValid), "{page:#x}");
    }
}

#[test]
fn a_lying_memory_map_is_refused() {
    let with = |map: &[(u64, u64, u16)]| refusal(|m| m.parameters = parameter_page(1, map));
    let all = (0, RAM / PAGE, 0);
    assert_eq!(with(&[all, (RAM / PAGE - 1, 1, 0)]), Refusal::MemoryMap, "overlap");
    assert_eq!(with(&[all, (u64::MAX >> 12, 2, 0)]), Refusal::MemoryMap, "wrap-around");
    assert_eq!(with(&[all, (u64::MAX, u64::MAX, 0)]), Refusal::MemoryMap, "wrap-around");
    assert_eq!(with(&[all, (MEMORY_TOP / PAGE, 1, 0)]), Refusal::MemoryMap, "beyond the page tables");
    assert_eq!(with(&[all, (SHARED_BASE / PAGE, 1, 0)]), Refusal::MemoryMap, "in the shared window");
    assert_eq!(with(&[all, (0xf_fff0, 0x20, 0)]), Refusal::MemoryMap, "across 4 GiB");
    assert_eq!(with(&[(0, 0x10, 0), (0x11, RAM / PAGE - 0x11, 0)]), Refusal::LaunchPages);
    assert_eq!(with(&[(0, 0xa0, 1), (0xa0, RAM / PAGE - 0xa0, 0)]), Refusal::LaunchPages);
    assert_eq!(with(&[(0, 0x1000, 0)]), Refusal::DoesNotFit);
    assert_eq!(with(&[]), Refusal::MemoryMap);
    assert_eq!(refusal(|m| m.parameters = parameter_page(0, &[all])), Refusal::Processors);
    assert_eq!(refusal(|m| m.parameters = parameter_page(10_000, &[all])), Refusal::Processors);
    // Ten thousand entries do not fit a page; as many as fit are read, and no more. Here each overlaps the one before.
    let many = vec![(0, RAM / PAGE, 0); 10_000];
    assert_eq!(with(&many), Refusal::MemoryMap);
}

#[test]
fn as_many_ranges_as_a_page_holds_are_each_validated_once() {
    let mut machine = Machine::launch(image());
    // Low memory and the kernel's in large ranges, then single pages up to the end of the page, without gaps.
    let mut map = vec![(0, 0x100, 0), (0x100, 0x1500, 0)];
    let singles = MEMORY_MAP_MAX as u64 - 3;
    map.extend((0..singles).map(|i| (0x1600 + i, 1, 0)));
    map.push((0x1600 + singles, RAM / PAGE - 0x1600 - singles, 0));
    assert_eq!(map.len(), MEMORY_MAP_MAX);
    machine.parameters = parameter_page(1, &map);
    machine.boot().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn no_memory_map_gets_memory_used_that_is_not_valid(map in prop::collection::vec((0u64..0x2000, 0u64..0x2000, 0u16..3), 0..6), processors in 0u32..70) {
        let mut machine = Machine::launch(image());
        machine.parameters = parameter_page(processors, &map);
        // The model panics when a page is validated twice or used without; boot() when RAM is left out.
        let whole = map.first().is_some_and(|r| *r == (0, RAM / PAGE, 0));
        prop_assert!(machine.boot().is_err() || whole);
    }
}
