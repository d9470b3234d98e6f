//! Where shim and kernel execute PVALIDATE, RMPADJUST and VMGEXIT.
//!
//! Owns: finding them, by disassembly: the four bytes can also lie inside another instruction. What the table is for
//! stands in `coffer_layout::snp`.

use coffer_layout::{
    PAGE,
    sites::{SITES_MAX, Site, SiteKind, to_page},
};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use object::{
    LittleEndian,
    elf::{FileHeader64, PT_LOAD, SHF_EXECINSTR, SHT_PROGBITS},
    read::elf::{FileHeader, ProgramHeader, SectionHeader},
};
use thiserror::Error;

/// Why there is no table.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SiteError {
    /// A file whose code cannot be found.
    #[error(
        "{what}: {problem}: its SEV-SNP instructions cannot be listed; pass the file as the linker left it"
    )]
    Unreadable {
        /// Shim or kernel.
        what: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// More than the table holds.
    #[error("shim and kernel have {0} SEV-SNP instructions: at most {SITES_MAX} can be listed")]
    TooMany(usize),
}

/// The page at `coffer_layout::snp::SITES`.
pub(crate) fn table(shim: &[u8], kernel: &[u8]) -> Result<[u8; PAGE as usize], SiteError> {
    let mut sites = find("shim", shim)?;
    sites.extend(find("kernel", kernel)?);
    to_page(&sites).ok_or(SiteError::TooMany(sites.len()))
}

/// Sorted by address.
fn find(what: &'static str, file: &[u8]) -> Result<Vec<Site>, SiteError> {
    let unreadable = |problem| SiteError::Unreadable { what, problem };
    let elf = |_| unreadable("not an x86-64 ELF file");
    let header = FileHeader64::<LittleEndian>::parse(file).map_err(elf)?;
    let endian = header.endian().map_err(elf)?;
    let programs = header.program_headers(endian, file).map_err(elf)?;
    let sections = header.section_headers(endian, file).map_err(elf)?;
    let mut sites = Vec::new();
    for section in sections.iter() {
        let flags = section.sh_flags(endian);
        if section.sh_type(endian) != SHT_PROGBITS || flags & u64::from(SHF_EXECINSTR) == 0 {
            continue;
        }
        let address = section.sh_addr(endian);
        let code = section.data(endian, file).map_err(|_| unreadable("a section lies outside the file"))?;
        let offsets = in_code(code);
        if offsets.is_empty() {
            continue;
        }
        // Linked at virtual addresses, loaded at physical ones.
        let segment = programs.iter().find(|p| {
            let start = p.p_vaddr(endian);
            p.p_type(endian) == PT_LOAD
                && start <= address
                && address.checked_add(code.len() as u64).is_some_and(|end| end - start <= p.p_filesz(endian))
        });
        let segment = segment.ok_or_else(|| unreadable("a section of code lies in no segment"))?;
        for (offset, kind) in offsets {
            let gpa = segment.p_paddr(endian).wrapping_add(address - segment.p_vaddr(endian) + offset as u64);
            let gpa = u32::try_from(gpa).map_err(|_| unreadable("code lies above 4 GiB"))?;
            sites.push(Site { gpa, kind });
        }
    }
    sites.sort_unstable();
    Ok(sites)
}

/// Offsets of the instructions. Only code that has the bytes is disassembled, and only as far as the last of them.
fn in_code(code: &[u8]) -> Vec<(usize, SiteKind)> {
    let kind_at = |at: usize| SiteKind::ALL.into_iter().find(|k| code[at..].starts_with(&k.bytes()));
    let Some(last) = (0..code.len()).rev().find(|at| kind_at(*at).is_some()) else { return Vec::new() };
    let mut found = Vec::new();
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() && decoder.position() <= last {
        let at = decoder.position();
        if let Some(kind) = kind_at(at) {
            found.push((at, kind));
        }
        decoder.decode_out(&mut instruction);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_found_and_bytes_inside_others_are_not() {
        let mut code = vec![0x90];
        code.extend(SiteKind::Pvalidate.bytes());
        // mov rax, imm64 with VMGEXIT's bytes in the immediate.
        code.extend([0x48, 0xb8]);
        code.extend(SiteKind::Vmgexit.bytes());
        code.extend([0; 4]);
        code.extend(SiteKind::Vmgexit.bytes());
        code.extend(SiteKind::Rmpadjust.bytes());
        // VMMCALL is VMGEXIT without its prefix.
        code.extend([0x0f, 0x01, 0xd9]);
        let found = in_code(&code);
        assert_eq!(found, [(1, SiteKind::Pvalidate), (15, SiteKind::Vmgexit), (19, SiteKind::Rmpadjust)]);
        assert!(in_code(&[0x90; 64]).is_empty());
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert!(matches!(find("kernel", b"MZ"), Err(SiteError::Unreadable { what: "kernel", .. })));
    }
}
