use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use proptest::prelude::*;

use super::*;

const MASK: u32 = 1;

fn page(gpa: u64, fill: u8) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: MASK,
        flags: IgvmPageDataFlags::new(),
        data_type: IgvmPageDataType::NORMAL,
        data: if fill == 0 { vec![] } else { vec![fill; PAGE as usize] },
    }
}

/// Written by the igvm crate, the independent oracle of this reader.
fn image(pages: &[(u64, u8)]) -> Vec<u8> {
    let parameter = |byte_offset| IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset };
    let mut directives = vec![
        IgvmDirectiveHeader::ParameterArea {
            number_of_bytes: PAGE,
            parameter_area_index: 0,
            initial_data: vec![],
        },
        IgvmDirectiveHeader::VpCount(parameter(0)),
        IgvmDirectiveHeader::MemoryMap(parameter(64)),
        IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa: 0x21000,
            compatibility_mask: MASK,
            parameter_area_index: 0,
        }),
    ];
    directives.extend(pages.iter().map(|(gpa, fill)| page(*gpa, *fill)));
    directives.push(IgvmDirectiveHeader::X64NativeVpContext {
        compatibility_mask: MASK,
        vp_index: 0,
        context: Box::new(IgvmNativeVpContextX64 {
            rax: 1,
            rcx: 2,
            rdx: 3,
            rbx: 4,
            rsp: 5,
            rbp: 6,
            rsi: 7,
            rdi: 8,
            r8: 9,
            r9: 10,
            r10: 11,
            r11: 12,
            r12: 13,
            r13: 14,
            r14: 15,
            r15: 16,
            rip: 17,
            rflags: 18,
            idtr_base: 19,
            idtr_limit: 20,
            reserved: [0; 2],
            gdtr_limit: 21,
            gdtr_base: 22,
            code_selector: 23,
            code_attributes: 0xa09b,
            code_base: 25,
            code_limit: 26,
            data_selector: 27,
            data_attributes: 0xc093,
            data_base: 29,
            data_limit: 30,
            gs_base: 31,
            cr0: 32,
            cr3: 33,
            cr4: 34,
            efer: 35,
        }),
    });
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::NATIVE,
        platform_version: 1,
        shared_gpa_boundary: 0,
    });
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE as u32 };
    let mut bytes = Vec::new();
    IgvmFile::new(revision, vec![platform], vec![], directives).unwrap().serialize(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_the_igvm_crate_wrote_is_read_to_the_last_field() {
    let file = image(&[(0x1000, 7), (0x5000, 0), (0x2000, 9)]);
    let Image { directives, registers, snp } = read(&file, Platform::Native).unwrap();
    assert_eq!(snp, Snp::default());
    let pages: Vec<_> = directives
        .iter()
        .filter_map(|d| match d {
            Directive::Page(p) => Some((p.gpa, p.offset.map(|o| file[o as usize]))),
            _ => None,
        })
        .collect();
    assert_eq!(pages, [(0x1000, Some(7)), (0x5000, None), (0x2000, Some(9))]);
    let registers = registers.unwrap();
    assert_eq!(registers.general, std::array::from_fn(|i| i as u64 + 1));
    assert_eq!((registers.rip, registers.rflags), (17, 18));
    assert_eq!((registers.idtr, registers.gdtr), ((19, 20), (22, 21)));
    assert_eq!(registers.code, Segment { selector: 23, attributes: 0xa09b, base: 25, limit: 26 });
    assert_eq!(registers.data, Segment { selector: 27, attributes: 0xc093, base: 29, limit: 30 });
    let control = [registers.gs_base, registers.cr0, registers.cr3, registers.cr4, registers.efer];
    assert_eq!(control, [31, 32, 33, 34, 35]);
}

#[test]
fn an_image_cut_anywhere_is_refused() {
    let file = image(&[(0x1000, 7), (0x2000, 9)]);
    for length in 0..file.len() {
        assert!(read(&file[..length], Platform::Native).is_err(), "cut at {length}");
    }
}

#[test]
fn any_flipped_bit_of_any_header_is_refused() {
    let file = image(&[(0x1000, 7), (0x2000, 9)]);
    let headers = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize + 32;
    for bit in 0..headers * 8 {
        let mut changed = file.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&changed, Platform::Native).is_err(), "bit {bit}");
    }
}

/// Puts the right checksum over headers that were changed, so that what lies behind it is reached.
fn sealed(mut file: Vec<u8>) -> Vec<u8> {
    let length = (u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize).min(file.len() - 32);
    file[20..24].fill(0);
    let sum = crc32fast::hash(&file[..32 + length]);
    file[20..24].copy_from_slice(&sum.to_le_bytes());
    file
}

proptest! {
    #[test]
    fn changed_headers_with_a_right_checksum_never_panic(
        changes in prop::collection::vec((0usize..400, any::<u8>()), 1..8),
    ) {
        let mut file = image(&[(0x1000, 7), (0x2000, 9)]);
        for (at, value) in changes {
            file[at] = value;
        }
        let _ = read(&sealed(file), Platform::Native);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut file = bytes;
        let _ = read(&file, Platform::Native);
        if file.len() >= 32 {
            let size = file.len() as u32;
            file[..8].copy_from_slice(&[b'I', b'G', b'V', b'M', 2, 0, 0, 0]);
            file[8..12].copy_from_slice(&32u32.to_le_bytes());
            file[12..16].copy_from_slice(&((size - 32) & !7).to_le_bytes());
            file[16..20].copy_from_slice(&size.to_le_bytes());
            file[24..32].copy_from_slice(&[0, 0, 0, 0, 0, 16, 0, 0]);
            let _ = read(&sealed(file), Platform::Native);
        }
    }
}

/// A header of 24 bytes takes a buffer of up to 1 MiB: a file of a megabyte of headers would take 40 GiB.
#[test]
fn more_parameter_areas_than_any_guest_needs_are_refused() {
    let file = |count: u32| {
        let mut file = [b"IGVM".as_slice(), &[2, 0, 0, 0, 32, 0, 0, 0], &[0; 20]].concat();
        let mut add = |words: &[u32]| file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        add(&[abi::SUPPORTED_PLATFORM, 16, MASK, 1 << 16, 0, 0]);
        for index in 0..count {
            add(&[abi::PARAMETER_AREA, 16, 1 << 20, 0, index, 0]);
        }
        let size = file.len() as u32;
        file[12..16].copy_from_slice(&(size - 32).to_le_bytes());
        file[16..20].copy_from_slice(&size.to_le_bytes());
        file[29] = 16;
        sealed(file)
    };
    assert!(read(&file(16), Platform::Native).is_ok());
    assert!(matches!(read(&file(17), Platform::Native), Err(ImageError::Header { index: 17, .. })));
}

/// An SNP image as the igvm crate writes it, with the native platform beside it.
fn snp_image() -> Vec<u8> {
    const SNP: u32 = 2;
    let platform = |compatibility_mask, platform_type| {
        IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask,
            highest_vtl: 0,
            platform_type,
            platform_version: 1,
            shared_gpa_boundary: 0,
        })
    };
    let data = |gpa, mask, flags, data_type, data: Vec<u8>| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: mask,
        flags,
        data_type,
        data,
    };
    let shared = IgvmPageDataFlags::new().with_shared(true);
    let mut vmsa: Box<igvm::snp_defs::SevVmsa> = zerocopy::FromZeros::new_box_zeroed().unwrap();
    vmsa.rip = 0x1_0000;
    let directives = vec![
        data(0x8000, SNP, IgvmPageDataFlags::new(), IgvmPageDataType::SECRETS, vec![]),
        data(0x9000, SNP, IgvmPageDataFlags::new(), IgvmPageDataType::CPUID_DATA, vec![]),
        data(0x1_0000, MASK | SNP, IgvmPageDataFlags::new(), IgvmPageDataType::NORMAL, vec![7; 4096]),
        data(0x10_0000, MASK, IgvmPageDataFlags::new(), IgvmPageDataType::NORMAL, vec![8; 4096]),
        data(0xc000_0000, SNP, shared, IgvmPageDataType::NORMAL, vec![9; 4096]),
        IgvmDirectiveHeader::SnpVpContext {
            gpa: 0xffff_ffff_f000,
            compatibility_mask: SNP,
            vp_index: 0,
            vmsa,
        },
    ];
    let policy = igvm::IgvmInitializationHeader::GuestPolicy { policy: 0x30000, compatibility_mask: SNP };
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE as u32 };
    let platforms = vec![platform(MASK, IgvmPlatformType::NATIVE), platform(SNP, IgvmPlatformType::SEV_SNP)];
    let mut bytes = Vec::new();
    IgvmFile::new(revision, platforms, vec![policy], directives).unwrap().serialize(&mut bytes).unwrap();
    bytes
}

#[test]
fn each_platform_reads_its_own_part() {
    let file = snp_image();
    let pages = |platform| {
        let image = read(&file, platform).unwrap();
        let pages = image.directives.iter().filter_map(|d| match d {
            Directive::Page(p) => Some((p.gpa, p.kind, p.shared)),
            _ => None,
        });
        (pages.collect::<Vec<_>>(), image.snp)
    };
    let (snp_pages, snp) = pages(Platform::Snp);
    assert_eq!(
        snp_pages,
        [
            (0x8000, PageKind::Secrets, false),
            (0x9000, PageKind::Cpuid, false),
            (0x1_0000, PageKind::Normal, false),
            (0xc000_0000, PageKind::Normal, true)
        ]
    );
    assert_eq!(snp.policy, Some(0x30000));
    let vmsa = snp.vmsa.unwrap();
    assert_eq!((vmsa.gpa, vmsa.is_last), (0xffff_ffff_f000, true));
    assert_eq!(file[vmsa.offset as usize + 0x178..][..8], 0x1_0000u64.to_le_bytes());
    let (native_pages, nothing) = pages(Platform::Native);
    assert_eq!(native_pages, [(0x1_0000, PageKind::Normal, false), (0x10_0000, PageKind::Normal, false)]);
    assert_eq!(nothing, Snp::default());
    assert_eq!(read(&image(&[]), Platform::Snp), Err(ImageError::NoPlatform(Platform::Snp)));
}
