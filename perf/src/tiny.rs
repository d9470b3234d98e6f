//! A guest that reports at once: its first instructions write a mark and halt.
//!
//! Owns: its bytes, as an ELF kernel that starts by the PVH note (Xen's ELF note 18), which QEMU, Cloud Hypervisor and others take, and
//! as an IGVM image for our VMM, made of one of ours. Does not own: when it is written.

use coffer_layout::{MARK_PORT, PAGE, mark};
use igvm::{IgvmDirectiveHeader, IgvmFile};

const LOADED_AT: u64 = 0x10_0000;
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit entry point.
const PVH_NOTE: u32 = 18;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The same in 32 and in 64 bits: mov dx, MARK_PORT; mov al, KERNEL_ENTRY; out dx, al; hlt; jmp to the hlt.
fn code() -> [u8; 10] {
    let [low, high] = MARK_PORT.to_le_bytes();
    [0x66, 0xba, low, high, 0xb0, mark::KERNEL_ENTRY, 0xee, 0xf4, 0xeb, 0xfd]
}

/// An image of ours without what lies above the first MiB, kernel and initramfs, and with the code where the shim begins.
///
/// # Errors
/// The library's, when it is no image.
pub fn image(ours: &[u8]) -> Result<Vec<u8>, igvm::Error> {
    let file = IgvmFile::new_from_binary(ours, None)?;
    let mut directives = file.directives().to_vec();
    directives.retain(|d| !matches!(d, IgvmDirectiveHeader::PageData { gpa, .. } if *gpa >= LOADED_AT));
    let entry = directives.iter().find_map(|d| match d {
        IgvmDirectiveHeader::X64NativeVpContext { context, .. } => Some(context.rip),
        _ => None,
    });
    for directive in &mut directives {
        if let IgvmDirectiveHeader::PageData { gpa, data, .. } = directive
            && Some(*gpa) == entry
        {
            *data = code().to_vec();
            data.resize(PAGE as usize, 0);
        }
    }
    let revision = igvm::IgvmRevision::V2 { arch: igvm::Arch::X64, page_size: PAGE as u32 };
    let file =
        IgvmFile::new(revision, file.platforms().to_vec(), file.initializations().to_vec(), directives)?;
    let mut bytes = Vec::new();
    file.serialize(&mut bytes)?;
    Ok(bytes)
}

/// The whole ELF file.
#[must_use]
pub fn kernel() -> Vec<u8> {
    let code = code();
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let note_size = 12 + 4 + 8;
    let code_at = note_at + note_size;
    let entry = LOADED_AT + code_at;
    let end = code_at + code.len() as u64;

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let word = |file: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let long = |file: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    half(&mut file, &[2, 62]); // executable, x86-64
    word(&mut file, &[1]);
    long(&mut file, &[entry, HEADER, 0]);
    word(&mut file, &[0]);
    half(&mut file, &[HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0]);
    word(&mut file, &[PT_LOAD, 7]);
    long(&mut file, &[0, LOADED_AT, LOADED_AT, end, end, 0x1000]);
    word(&mut file, &[PT_NOTE, 4]);
    long(&mut file, &[note_at, LOADED_AT + note_at, LOADED_AT + note_at, note_size, note_size, 4]);
    word(&mut file, &[4, 8, PVH_NOTE]);
    file.extend(b"Xen\0");
    long(&mut file, &[entry]);
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn an_image_keeps_its_state_and_loses_its_kernel() {
        use igvm::{Arch, IgvmPlatformHeader, IgvmRevision};
        use igvm_defs::{
            IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64, IgvmPageDataFlags, IgvmPageDataType,
            IgvmPlatformType,
        };
        use zerocopy::FromZeros;

        let page = |gpa, byte| IgvmDirectiveHeader::PageData {
            gpa,
            compatibility_mask: 1,
            flags: IgvmPageDataFlags::new(),
            data_type: IgvmPageDataType::NORMAL,
            data: vec![byte; 4096],
        };
        let context = IgvmDirectiveHeader::X64NativeVpContext {
            compatibility_mask: 1,
            vp_index: 0,
            context: Box::new(IgvmNativeVpContextX64 {
                rip: 0x1_0000,
                ..IgvmNativeVpContextX64::new_zeroed()
            }),
        };
        let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: 1,
            highest_vtl: 0,
            platform_type: IgvmPlatformType::NATIVE,
            platform_version: 1,
            shared_gpa_boundary: 0,
        });
        let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: 4096 };
        let directives =
            vec![page(0x1_0000, 0x11), page(0x2_2000, 0x22), page(0x100_0000, 0x33), context.clone()];
        let mut ours = Vec::new();
        IgvmFile::new(revision, vec![platform], vec![], directives).unwrap().serialize(&mut ours).unwrap();
        let tiny = IgvmFile::new_from_binary(&image(&ours).unwrap(), None).unwrap();
        let [IgvmDirectiveHeader::PageData { gpa: 0x1_0000, data, .. }, kept, last] = tiny.directives()
        else {
            panic!("{:?}", tiny.directives());
        };
        assert_eq!(data[..10], [0x66, 0xba, 0x80, 0, 0xb0, 0xc1, 0xee, 0xf4, 0xeb, 0xfd]);
        assert_eq!((kept, last), (&page(0x2_2000, 0x22), &context));
        assert!(image(b"no image").is_err());
    }

    /// binutils reads it as what it is meant to be.
    #[test]
    fn readelf_sees_a_kernel_with_a_pvh_note() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), kernel()).unwrap();
        let output = Command::new("readelf").args(["-hln"]).arg(file.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(warnings.is_empty(), "{warnings}");
        assert!(text.contains("Entry point address:               0x1000c8"), "{text}");
        assert!(text.contains("Xen") && text.contains("0x00000012"), "{text}");
    }
}
