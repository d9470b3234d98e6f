//! Images and what is planned from them.

use coffer_layout::{
    PAGE,
    boot::{Handoff, Platform as Kind},
};
use coffer_shim::plan as shim;
use coffer_vmm::{
    igvm::{self, Directive, ParameterKind, Platform, Registers, Snp},
    launch, memory,
    tee::{emulated::C_BIT, snp},
};

use crate::seeds;

/// Headers' place in a file, and where its pages begin.
const HEADERS: usize = 32;
const RAM: u64 = 64 << 20;

/// An image: the input as it is, and as headers of a file whose fixed header and pages are right.
pub fn igvm(data: &[u8]) {
    read(data);
    read(&whole(data));
}

/// A file with these headers, a processor's state as its first page and eight more.
#[must_use]
pub fn whole(headers: &[u8]) -> Vec<u8> {
    let headers = &headers[..headers.len().min(seeds::PAGES as usize - HEADERS) & !7];
    let mut file = vec![0; seeds::PAGES as usize];
    file[HEADERS..HEADERS + headers.len()].copy_from_slice(headers);
    file.extend(seeds::vmsa());
    for fill in 1..9 {
        file.extend([fill; PAGE as usize]);
    }
    let size = file.len() as u32;
    for (at, word) in [
        (0, u32::from_le_bytes(*b"IGVM")),
        (4, 2),
        (8, HEADERS as u32),
        (12, headers.len() as u32),
        (16, size),
        (28, PAGE as u32),
    ] {
        file[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    let sum = crc32fast::hash(&file[..HEADERS + headers.len()]);
    file[20..24].copy_from_slice(&sum.to_le_bytes());
    file
}

fn read(file: &[u8]) {
    let ram = memory::layout(RAM);
    let inside = |gpa: u64, size: u64| gpa.checked_add(size).is_some_and(|end| end <= RAM);
    if let Ok(image) = igvm::read(file, Platform::Native)
        && let Ok(plan) = launch::plan(&image, &ram, 2, file)
    {
        for copy in &plan.copies {
            let size = copy.size.checked_mul(copy.times).unwrap();
            assert!(inside(copy.gpa, size) && copy.offset + copy.size <= file.len() as u64);
        }
        assert!(plan.areas.iter().all(|(gpa, bytes)| inside(*gpa, bytes.len() as u64)));
        assert!(plan.areas.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() <= 16 << 20);
    }
    let options = snp::plan::Options { ram: &ram, vcpus: 2, policy: None, host_data: [7; 32], c_bit: C_BIT };
    if let Ok(image) = igvm::read(file, Platform::Snp)
        && let Ok(plan) = snp::plan::plan(&image, file, &options)
    {
        assert!(plan.pages() <= snp::plan::PAGES_MAX && plan.commands() <= snp::plan::COMMANDS_MAX);
        let mut pages: Vec<u64> =
            plan.updates.iter().flat_map(|u| (u.gpa..u.gpa + u.size).step_by(PAGE as usize)).collect();
        assert!(pages.iter().all(|gpa| inside(*gpa, PAGE)));
        pages.sort_unstable();
        assert!(pages.windows(2).all(|w| w[0] != w[1]), "a page is launched twice");
    }
}

/// The parameter page, from the VMM's hand to the shim's: what one writes the other reads as the same machine.
pub fn parameter_page(data: &[u8]) {
    let mut input = crate::input::Input(data);
    let (bytes, vcpus) = ((input.number(3) << 20).clamp(2 << 20, 1 << 40), input.number(1) as u32);
    let (size, offset) = ((input.number(2) % 4 + 1) * PAGE, input.number(2) as u32);
    let ram = memory::layout(bytes);
    let directives = vec![
        Directive::Area { index: 3, size, initial: None },
        Directive::Parameter { kind: ParameterKind::VpCount, area: 3, offset: 0 },
        Directive::Parameter { kind: ParameterKind::MemoryMap, area: 3, offset },
        Directive::Insert { gpa: 0xa000, area: 3 },
    ];
    let image = igvm::Image { directives, registers: Some(Registers::default()), snp: Snp::default() };
    let Ok(plan) = launch::plan(&image, &ram, vcpus, &[]) else { return };
    if offset != coffer_layout::boot::MEMORY_MAP_OFFSET as u32 {
        return;
    }
    let page = plan.areas[0].1.first_chunk().expect("an area is pages");
    let handoff = Handoff {
        platform: Kind::Native,
        kernel_start: 0x10_0000,
        kernel_end: 0x10_1000,
        kernel_entry: 0x10_0000,
        ..Handoff::default()
    };
    match shim::plan(&handoff, page) {
        Ok(seen) => {
            assert_eq!(seen.processors, vcpus);
            assert!(seen.ram().map(|r| (r.start, r.end - r.start)).eq(ram));
        }
        Err(_) => assert!(!(1..=64).contains(&vcpus) || bytes < 16 << 20, "the shim refuses {ram:x?}"),
    }
}
