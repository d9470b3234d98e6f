//! Whole images: what is in them, that they are the same every time, and the ID block.

mod support;

use coffer_image::{
    build::{BuildError, Inputs, Profile, Signing, build},
    id_block::id_block,
    inspect::{inspect, parse},
    measure::measure,
};
use coffer_layout::{
    PAGE,
    boot::{Handoff, Platform, RegionKind},
    sites::{self, SiteKind},
    snp,
};
use igvm::IgvmDirectiveHeader;
use p384::{
    SecretKey,
    ecdsa::{Signature, VerifyingKey, signature::Verifier},
};
use sha2::{Digest, Sha384};

fn key(byte: u8) -> SecretKey {
    SecretKey::from_slice(&[byte; 48]).unwrap()
}

fn page(file: &[u8], mask: u32, wanted: u64) -> Option<[u8; 4096]> {
    parse(file).unwrap().directives().iter().find_map(|d| match d {
        IgvmDirectiveHeader::PageData { gpa, compatibility_mask, data, .. }
            if *gpa == wanted && compatibility_mask & mask != 0 =>
        {
            let mut page = [0; 4096];
            page[..data.len()].copy_from_slice(data);
            Some(page)
        }
        _ => None,
    })
}

#[test]
fn the_same_inputs_give_the_same_bytes_with_and_without_a_key() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let base = support::inputs(&shim, &kernel, &[7; 0x5001]);
    assert_eq!(build(&base).unwrap(), build(&base).unwrap());
    let signing = Some(Signing { id_key: key(3), author_key: Some(key(4)), vcpus: 2 });
    let signed = Inputs { signing, ..base.clone() };
    assert_eq!(build(&signed).unwrap(), build(&signed).unwrap());
}

#[test]
fn the_hash_page_lists_what_lies_in_the_shared_window() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let file = build(&support::inputs(&shim, &kernel, &[7; 0x5001])).unwrap();
    let handoff = Handoff::from_page(&page(&file, 2, 0xb000).unwrap()).unwrap();
    assert_eq!((handoff.platform, handoff.c_bit, handoff.sev_status), (Platform::Snp, 51, 7));
    assert_eq!(handoff.launch_end, 0x13000);
    let kinds: Vec<_> = handoff.used_regions().iter().map(|r| r.kind).collect();
    assert_eq!(
        kinds,
        [RegionKind::CommandLine, RegionKind::Kernel, RegionKind::Kernel, RegionKind::Initramfs]
    );
    for region in handoff.used_regions() {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < region.length {
            bytes.extend(page(&file, 2, region.source + bytes.len() as u64).unwrap());
        }
        bytes.truncate(region.length as usize);
        assert_eq!(Sha384::digest(&bytes).as_slice(), region.sha384, "{region:?}");
        assert!(region.source >= snp::PAYLOAD && region.memory >= region.length);
    }
    assert_eq!(handoff.used_regions()[2].memory, 0x3000);
    // A plain VM has its own page, and nothing to hash.
    let native = Handoff::from_page(&page(&file, 1, 0xb000).unwrap()).unwrap();
    assert_eq!((native.platform, native.region_count), (Platform::Native, 0));
}

#[test]
fn the_table_of_sites_names_physical_addresses() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let file = build(&support::inputs(&shim, &kernel, b"")).unwrap();
    let table = page(&file, 2, snp::SITES).unwrap();
    let found: Vec<_> = sites::from_page(&table).unwrap().map(|s| (s.gpa, s.kind)).collect();
    assert_eq!(found, [(0x10002, SiteKind::Pvalidate), (0x100_0001, SiteKind::Vmgexit)]);
}

#[test]
fn kernel_pages_are_in_the_file_once_for_both_platforms() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let noise: Vec<u8> = (0..0x8_0000u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let smp = build(&support::inputs(&shim, &kernel, &noise)).unwrap();
    assert!(smp.len() < noise.len() + noise.len() / 10, "{} of {}", smp.len(), noise.len());
}

#[test]
fn an_image_for_one_processor_is_for_plain_vms_only() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let base = Inputs { profile: Profile::Up, ..support::inputs(&shim, &kernel, b"") };
    let contents = inspect(&build(&base).unwrap()).unwrap();
    assert_eq!(contents.platforms.len(), 1);
    assert_eq!(contents.snp_command_line, "");
    let signing = Some(Signing { id_key: key(3), author_key: None, vcpus: 1 });
    assert!(matches!(build(&Inputs { signing, ..base }), Err(BuildError::IdBlock)));
}

#[test]
fn inspect_shows_every_region_of_both_platforms() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let file = build(&support::inputs(&shim, &kernel, &[7; 0x5001])).unwrap();
    let contents = inspect(&file).unwrap();
    assert_eq!(contents.platforms.len(), 2);
    let holds: Vec<&str> = contents.regions.iter().map(|r| r.holds.as_str()).collect();
    for part in
        ["secrets", "CPUID", "parameters", "handoff", "stack", "shim", "GHCB", "sites", "first processor"]
    {
        assert!(holds.contains(&part), "{part}: {holds:?}");
    }
    assert_eq!(contents.regions.last().unwrap().kind, "VMSA 0");
    assert!(contents.snp_command_line.contains("swiotlb="));
    let table = contents.table();
    assert!(table.contains("under SEV-SNP"));
    // An independent SHA-384 of what was put in.
    let initramfs = contents.hashed.iter().find(|h| h.holds == "initramfs").unwrap();
    assert_eq!((initramfs.size, initramfs.destination % PAGE), (0x5001, 0));
    let sum: String = Sha384::digest([7; 0x5001]).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(initramfs.sha384, sum);
    assert!(table.contains(&sum));
}

#[test]
fn a_table_has_one_line_for_runs_with_zeroes_between() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let mut initramfs = vec![0; 0x9000];
    for at in [0, 0x4000, 0x8fff] {
        initramfs[at] = 1;
    }
    let contents = inspect(&build(&support::inputs(&shim, &kernel, &initramfs)).unwrap()).unwrap();
    let native = |r: &&coffer_image::inspect::Region| r.compatibility_mask == 1 && r.holds == "initramfs";
    assert_eq!(contents.regions.iter().filter(native).count(), 3);
    let table = contents.table();
    let lines: Vec<&str> = table.lines().filter(|line| line.contains(" runs, zeroes between")).collect();
    assert!(lines.iter().any(|line| line.ends_with("initramfs, 3 runs, zeroes between")), "{lines:?}");
}

#[test]
fn a_c_bit_that_is_no_address_bit_is_refused() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    for c_bit in [0, 39, 52, 64] {
        let inputs = Inputs { c_bit, ..support::inputs(&shim, &kernel, b"") };
        assert!(matches!(build(&inputs), Err(BuildError::CBit(_))));
    }
}

/// Numbers of 72 bytes, little-endian, as 48 bytes, big-endian.
fn number(bytes: &[u8; 72]) -> [u8; 48] {
    assert!(bytes[48..].iter().all(|b| *b == 0));
    let mut number: [u8; 48] = bytes[..48].try_into().unwrap();
    number.reverse();
    number
}

#[test]
fn the_id_block_is_signed_by_the_id_key_and_that_by_the_author_key() {
    let (shim, kernel) = (support::shim(0x90), support::kernel(1));
    let base = support::inputs(&shim, &kernel, &[7; 0x5001]);
    let digest = measure(&parse(&build(&base).unwrap()).unwrap(), 2).unwrap().digest;
    let signing = Some(Signing { id_key: key(3), author_key: Some(key(4)), vcpus: 2 });
    let file = parse(&build(&Inputs { signing, ..base }).unwrap()).unwrap();
    // The block does not change what it signs.
    assert_eq!(measure(&file, 2).unwrap().digest, digest);
    let Some(IgvmDirectiveHeader::SnpIdBlock {
        ld,
        author_key_enabled,
        version,
        id_key_signature,
        id_public_key,
        author_key_signature,
        author_public_key,
        ..
    }) = file.directives().iter().find(|d| matches!(d, IgvmDirectiveHeader::SnpIdBlock { .. }))
    else {
        panic!("no ID block")
    };
    assert_eq!((*ld, *author_key_enabled, *version), (digest, 1, 1));
    let verify = |key: &igvm_defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY,
                  signature: &igvm_defs::IGVM_VHS_SNP_ID_BLOCK_SIGNATURE,
                  message: &[u8]| {
        assert_eq!(key.curve, 2);
        let point = [&[4][..], &number(&key.qx), &number(&key.qy)].concat();
        let key = VerifyingKey::from_sec1_bytes(&point).unwrap();
        let (r, s) = (number(&signature.r_comp), number(&signature.s_comp));
        key.verify(message, &Signature::from_scalars(r, s).unwrap())
    };
    let block = id_block(&digest);
    assert_eq!(&block[80..96], &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0]);
    assert!(verify(id_public_key, id_key_signature, &block).is_ok());
    assert!(verify(author_public_key, id_key_signature, &block).is_err());
    let mut id_key = vec![2, 0, 0, 0];
    id_key.extend(id_public_key.qx);
    id_key.extend(id_public_key.qy);
    id_key.resize(0x404, 0);
    assert!(verify(author_public_key, author_key_signature, &id_key).is_ok());
}
