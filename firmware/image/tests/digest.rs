//! The launch digest against two implementations that are not ours: the igvm crate's and the sev crate's.

mod support;

use coffer_image::{
    build::{Inputs, Profile, build},
    inspect::parse,
    measure::{MeasureError, MeasuredPage, PageKind, hex, measure},
    platform::SNP_MASK,
};
use coffer_layout::{PAGE, boot, snp, vmsa};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmRevision, measurement::generate_snp_measurement};
use igvm_defs::{IgvmPageDataFlags, IgvmPageDataType};
use sev::measurement::{
    snp::{SnpMeasurementArgs, snp_calc_launch_digest},
    vcpu_types::CpuType,
    vmsa::{GuestFeatures, VMMType, VMSA},
};
use zerocopy::FromBytes;

const REVISION: IgvmRevision = IgvmRevision::V2 { arch: Arch::X64, page_size: 4096 };

/// What the igvm crate makes of an image with more than one processor, their VMSAs being the sev crate's.
fn by_igvm(file: &IgvmFile, vcpus: u32) -> [u8; 48] {
    let mut directives = file.directives().to_vec();
    for vp_index in 1..vcpus as u16 {
        directives.push(vmsa_directive(vp_index, &reset_vmsa_by_sev()));
    }
    generate_snp_measurement(file.initializations(), &directives, SNP_MASK).unwrap()
}

fn vmsa_directive(vp_index: u16, page: &vmsa::Vmsa) -> IgvmDirectiveHeader {
    let vmsa = Box::new(igvm::snp_defs::SevVmsa::read_from_bytes(page).unwrap());
    IgvmDirectiveHeader::SnpVpContext { gpa: snp::VMSA_GPA, compatibility_mask: SNP_MASK, vp_index, vmsa }
}

/// The sev crate measures OVMF only: a file that ends at 4 GiB, and what the table at its end names. So the image's
/// measured pages go into such a file, and the same pages at the same addresses into an IGVM file. Returns both digests.
fn rebased(file: &IgvmFile) -> ([u8; 48], [u8; 48]) {
    let is_snp = |d: &&IgvmDirectiveHeader| d.compatibility_mask().is_none_or(|mask| mask & SNP_MASK != 0);
    let mut pages: Vec<Vec<u8>> = Vec::new();
    for directive in file.directives().iter().filter(is_snp) {
        if let IgvmDirectiveHeader::PageData { flags, data_type: IgvmPageDataType::NORMAL, data, .. } =
            directive
            && !flags.shared()
        {
            pages.push(data.clone());
        }
    }
    pages.push(ovmf_tables());
    let bytes = pages.concat();
    let base = (4 << 30) - bytes.len() as u64;

    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("ovmf");
    std::fs::write(&path, &bytes).unwrap();
    let theirs = snp_calc_launch_digest(SnpMeasurementArgs {
        vcpus: 1,
        vcpu_type: CpuType::EpycMilan,
        ovmf_file: path,
        guest_features: GuestFeatures(1),
        kernel_file: None,
        initrd_file: None,
        append: None,
        ovmf_hash_str: None,
        vmm_type: Some(VMMType::QEMU),
    });
    let theirs: [u8; 48] = hex::decode(theirs.unwrap().get_hex_ld()).unwrap().try_into().unwrap();

    let page = |gpa, data_type, data| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: SNP_MASK,
        flags: IgvmPageDataFlags::new(),
        data_type,
        data,
    };
    let mut directives: Vec<_> = pages
        .into_iter()
        .enumerate()
        .map(|(i, data)| page(base + i as u64 * PAGE, IgvmPageDataType::NORMAL, data))
        .collect();
    directives.push(page(snp::SECRETS, IgvmPageDataType::SECRETS, Vec::new()));
    directives.push(page(snp::CPUID, IgvmPageDataType::CPUID_DATA, Vec::new()));
    let vmsa = VMSA::new(0, CpuType::EpycMilan, VMMType::QEMU, None, GuestFeatures(1));
    directives.push(vmsa_directive(0, vmsa.pages(1).unwrap()[0].as_slice().try_into().unwrap()));
    let (platforms, initializations) = (file.platforms().to_vec(), file.initializations().to_vec());
    let rebased = IgvmFile::new(REVISION, platforms, initializations, directives).unwrap();
    (measure(&rebased, 1).unwrap().digest, theirs)
}

/// A page that ends as OVMF does: a table of entries behind each other's back, which names the reset address and the
/// description of pages to launch.
fn ovmf_tables() -> Vec<u8> {
    let guid = |text: &str| {
        let digits = text.replace('-', "");
        let mut bytes = hex::decode(digits).unwrap();
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    };
    let entry = |data: &[u8], name: &str| {
        let size = (data.len() + 18) as u16;
        [data, &size.to_le_bytes(), &guid(name)].concat()
    };
    // The description lies at the page's start.
    let mut page = b"ASEV".to_vec();
    let sections = [(snp::SECRETS, 2u32), (snp::CPUID, 3)];
    for number in [16 + 12 * sections.len() as u32, 1, sections.len() as u32] {
        page.extend(number.to_le_bytes());
    }
    for (gpa, kind) in sections {
        for number in [gpa as u32, PAGE as u32, kind] {
            page.extend(number.to_le_bytes());
        }
    }
    let reset = entry(&0xffff_fff0u32.to_le_bytes(), "00f771de-1a7e-4fcb-890e-68c77e2fb44e");
    let description = entry(&(PAGE as u32).to_le_bytes(), "dc886566-984a-4798-a75e-5585a7bf67cc");
    let table = [description, reset].concat();
    let footer =
        [((table.len() + 18) as u16).to_le_bytes().to_vec(), guid("96b582de-1fb2-45f7-baea-a366c55a082d")]
            .concat();
    page.resize(4096 - 32 - footer.len() - table.len(), 0);
    page.extend(table);
    page.extend(footer);
    page.resize(4096, 0);
    page
}

/// The sev crate's VMSA of a first processor at the reset vector under Firecracker's KVM, with the fields that differ on
/// a processor that no VMM has touched: no round trip through KVM_SET_SREGS, which sets the accessed bit of data
/// segments; RDX as KVM_CREATE_VCPU leaves it; x87 and SSE as after FINIT.
fn reset_vmsa_by_sev() -> vmsa::Vmsa {
    let theirs = VMSA::new(0, CpuType::EpycMilan, VMMType::EC2, None, GuestFeatures(1));
    let mut page: vmsa::Vmsa = theirs.pages(1).unwrap()[0].as_slice().try_into().unwrap();
    for data in [vmsa::field::ES, vmsa::field::DS, vmsa::field::FS, vmsa::field::GS] {
        assert_eq!(page[data + 2], 0x93);
        page[data + 2] = 0x92;
    }
    page[0x310..0x312].copy_from_slice(&0x600u16.to_le_bytes());
    page[0x408..0x40a].copy_from_slice(&0x1f80u16.to_le_bytes());
    page[0x410..0x412].copy_from_slice(&0x37fu16.to_le_bytes());
    page
}

fn image(inputs: &Inputs<'_>) -> IgvmFile {
    parse(&build(inputs).unwrap()).unwrap()
}

#[test]
fn three_implementations_agree_on_every_image() {
    let kernels = [support::kernel(1), support::kernel(2)];
    let shim = support::shim(0x90);
    for kernel in &kernels {
        for initramfs in [&b""[..], &[7; 0x5001]] {
            for (profile, c_bit) in [(Profile::Smp, 51), (Profile::SmpDebug, 47)] {
                let inputs = Inputs { profile, c_bit, ..support::inputs(&shim, kernel, initramfs) };
                let file = image(&inputs);
                for vcpus in [1, 2, 4, 64] {
                    let ours = measure(&file, vcpus).unwrap();
                    assert_eq!(ours.digest, by_igvm(&file, vcpus), "{vcpus} processors");
                    assert_eq!(ours.pages.last().unwrap().digest, hex(&ours.digest));
                }
                let (ours, sevs) = rebased(&file);
                assert_eq!(ours, sevs);
            }
        }
    }
}

#[test]
fn the_vmsa_of_a_processor_that_nobody_set_up_is_the_sev_crates() {
    assert_eq!(vmsa::reset(), reset_vmsa_by_sev());
}

#[test]
fn two_dozen_pages_at_most_in_one_run_and_few_commands() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let measurement = measure(&image(&support::inputs(&shim, &kernel, &[7; 0x10_0000])), 4).unwrap();
    // Secrets, CPUID, parameters, hash page, two page tables, two of stack, three of shim.
    assert_eq!(measurement.launch_pages(), 11);
    assert_eq!(measurement.launch_commands(), 6);
    let launched: Vec<&MeasuredPage> =
        measurement.pages.iter().filter(|p| p.kind != PageKind::Vmsa).collect();
    assert_eq!(launched[0].gpa, snp::LAUNCH_START);
    assert!(launched.windows(2).all(|w| w[0].gpa + PAGE == w[1].gpa));
    let vmsas: Vec<_> = measurement.pages[11..].iter().map(|p| (p.kind, p.gpa)).collect();
    assert_eq!(vmsas, [(PageKind::Vmsa, snp::VMSA_GPA); 4]);
    // A shim of full length still stays within two dozen.
    assert!(measurement.launch_pages() as u64 - 3 + boot::SHIM_MAX / PAGE <= 24);
}

#[test]
fn every_input_and_the_number_of_processors_change_the_digest() {
    let (shim, kernel, initramfs) = (support::shim(0x90), support::kernel(1), [7; 0x5001]);
    let base = support::inputs(&shim, &kernel, &initramfs);
    let (other_shim, other_kernel) = (support::shim(0x91), support::kernel(2));
    let digest = |inputs: &Inputs<'_>, vcpus| measure(&image(inputs), vcpus).unwrap().digest;
    let mut all = vec![
        digest(&base, 1),
        digest(&base, 2),
        digest(&Inputs { shim: &other_shim, ..base.clone() }, 1),
        digest(&Inputs { kernel: &other_kernel, ..base.clone() }, 1),
        digest(&Inputs { initramfs: &[8; 0x5001], ..base.clone() }, 1),
        digest(&Inputs { extra_command_line: "x", ..base.clone() }, 1),
        digest(&Inputs { c_bit: 47, ..base.clone() }, 1),
        digest(&Inputs { profile: Profile::SmpDebug, ..base.clone() }, 1),
    ];
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 8);
}

#[test]
fn what_kvm_cannot_launch_or_nobody_can_start_has_no_digest() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let base = support::inputs(&shim, &kernel, b"");
    assert_eq!(measure(&image(&base), 0), Err(MeasureError::Vcpus(0)));
    assert_eq!(measure(&image(&base), 65), Err(MeasureError::Vcpus(65)));
    let native = image(&Inputs { profile: Profile::Up, ..base.clone() });
    assert_eq!(measure(&native, 1), Err(MeasureError::NoPlatform));
    let file = image(&base);
    let with = |directives: Vec<IgvmDirectiveHeader>| {
        let file =
            IgvmFile::new(REVISION, file.platforms().to_vec(), file.initializations().to_vec(), directives);
        measure(&file.unwrap(), 1)
    };
    let mut late = file.directives().to_vec();
    let vmsa = late.pop().unwrap();
    late.insert(0, vmsa);
    assert!(matches!(with(late), Err(MeasureError::NotForKvm(_))));
    let mut headless = file.directives().to_vec();
    headless.pop();
    assert!(matches!(with(headless), Err(MeasureError::NotForKvm(_))));
}
