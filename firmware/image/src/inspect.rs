//! What is in an image, for a person and for a script.
//!
//! Owns: the readable form. Reads with the igvm crate; the VMM has its own reader.

use std::fmt::Write as _;

use coffer_layout::{PAGE, boot, snp};
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader};
use serde::Serialize;
use thiserror::Error;

/// Why a file cannot be shown.
#[derive(Debug, Error)]
pub enum InspectError {
    /// Not an IGVM file.
    #[error("not a valid IGVM file: {0}: build it again with coffer-image build")]
    Invalid(#[from] igvm::Error),
    /// The fixed header does not even begin one; the library would take it for something else.
    #[error("not an IGVM file: {0} bytes, and its first four are not `IGVM`")]
    NotIgvm(usize),
}

/// A run of pages, or one directive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: String,
    /// Flags that are set.
    pub flags: String,
    /// Which platforms load it.
    pub compatibility_mask: u32,
    /// What the fixed layout says is there.
    pub holds: String,
}

/// A whole file.
#[derive(Clone, Debug, Serialize)]
pub struct Contents {
    /// Platform names with their masks.
    pub platforms: Vec<String>,
    /// In file order, neighbours of one kind joined.
    pub regions: Vec<Region>,
    /// The kernel's command line on a plain VM.
    pub command_line: String,
    /// The kernel's command line under SEV-SNP; empty when the image is not for it.
    pub snp_command_line: String,
}

/// Reads a file with all its platforms.
///
/// # Errors
/// [`InspectError`].
pub fn parse(file: &[u8]) -> Result<IgvmFile, InspectError> {
    if !file.starts_with(b"IGVM") || file.len() < 32 {
        return Err(InspectError::NotIgvm(file.len()));
    }
    Ok(IgvmFile::new_from_binary(file, None)?)
}

/// Reads a file for people and scripts.
///
/// # Errors
/// [`InspectError`].
pub fn inspect(file: &[u8]) -> Result<Contents, InspectError> {
    let image = parse(file)?;
    let platforms = image
        .platforms()
        .iter()
        .map(|IgvmPlatformHeader::SupportedPlatform(p)| {
            format!("{:?} (mask {:#x})", p.platform_type, p.compatibility_mask)
        })
        .collect();
    let mut regions: Vec<Region> = Vec::new();
    let (mut command_line, mut snp_command_line) = (String::new(), String::new());
    for directive in image.directives() {
        if let IgvmDirectiveHeader::PageData { gpa, data, .. } = directive {
            let line = match *gpa {
                boot::COMMAND_LINE => Some(&mut command_line),
                snp::PAYLOAD => Some(&mut snp_command_line),
                _ => None,
            };
            if let Some(line) = line {
                let text = data.split(|b| *b == 0).next().unwrap_or_default();
                *line = String::from_utf8_lossy(text).into_owned();
            }
        }
        let next = region(directive);
        match regions.last_mut() {
            Some(last) if joins(last, &next) => last.size += next.size,
            _ => regions.push(next),
        }
    }
    Ok(Contents { platforms, regions, command_line, snp_command_line })
}

fn joins(last: &Region, next: &Region) -> bool {
    last.kind == next.kind
        && last.kind.starts_with("page")
        && last.gpa.checked_add(last.size) == Some(next.gpa)
        && (&last.flags, last.compatibility_mask, &last.holds)
            == (&next.flags, next.compatibility_mask, &next.holds)
}

fn region(directive: &IgvmDirectiveHeader) -> Region {
    let (mut gpa, mut size, mut flags_text, mut mask) =
        (0, 0, String::new(), directive.compatibility_mask().unwrap_or(u32::MAX));
    let kind = match directive {
        IgvmDirectiveHeader::PageData { gpa: at, flags, data_type, .. } => {
            (gpa, size) = (*at, PAGE);
            for (set, word) in
                [(flags.shared(), "shared"), (flags.unmeasured(), "unmeasured"), (flags.is_2mb_page(), "2m")]
            {
                if set {
                    flags_text += if flags_text.is_empty() { "" } else { "," };
                    flags_text += word;
                }
            }
            format!("page {data_type:?}")
        }
        IgvmDirectiveHeader::ParameterArea { number_of_bytes, parameter_area_index, .. } => {
            size = *number_of_bytes;
            format!("parameter area {parameter_area_index}")
        }
        IgvmDirectiveHeader::VpCount(p) => format!("parameter VpCount at {:#x}", p.byte_offset),
        IgvmDirectiveHeader::MemoryMap(p) => format!("parameter MemoryMap at {:#x}", p.byte_offset),
        IgvmDirectiveHeader::ParameterInsert(p) => {
            (gpa, size, mask) = (p.gpa, PAGE, p.compatibility_mask);
            format!("parameter insert {}", p.parameter_area_index)
        }
        IgvmDirectiveHeader::X64NativeVpContext { vp_index, context, .. } => {
            gpa = context.rip;
            format!("native VP context {vp_index}")
        }
        IgvmDirectiveHeader::SnpVpContext { gpa: at, vp_index, .. } => {
            (gpa, size) = (*at, PAGE);
            format!("VMSA {vp_index}")
        }
        IgvmDirectiveHeader::SnpIdBlock { author_key_enabled, .. } => {
            if *author_key_enabled == 0 { "ID block" } else { "ID block with author key" }.to_owned()
        }
        IgvmDirectiveHeader::RequiredMemory { gpa: at, number_of_bytes, .. } => {
            (gpa, size) = (*at, u64::from(*number_of_bytes));
            "required memory".to_owned()
        }
        other => other.to_string().lines().next().unwrap_or_default().trim_end_matches('{').trim().to_owned(),
    };
    Region {
        gpa,
        size,
        holds: holds(gpa, size).to_owned(),
        kind,
        flags: flags_text,
        compatibility_mask: mask,
    }
}

const SNP_STACK: u64 = boot::STACK_TOP - boot::STACK_SIZE;

/// What the fixed layout has at an address.
fn holds(gpa: u64, size: u64) -> &'static str {
    match gpa {
        _ if size == 0 && gpa == 0 => "",
        snp::SECRETS..snp::CPUID => "secrets",
        snp::CPUID..boot::PARAMETERS => "CPUID",
        boot::PARAMETERS..boot::HANDOFF => "parameters",
        boot::HANDOFF..snp::PAGE_TABLES => "handoff",
        snp::PAGE_TABLES..SNP_STACK => "page tables",
        SNP_STACK..boot::SHIM_BASE => "stack",
        boot::SHIM_BASE..boot::PAGE_TABLES => "shim",
        boot::PAGE_TABLES..boot::COMMAND_LINE => "page tables",
        boot::COMMAND_LINE..boot::BOOT_PARAMS => "command line",
        snp::GHCB..snp::SITES => "GHCB",
        snp::SITES..snp::PAYLOAD => "sites",
        snp::PAYLOAD..snp::SHARED_END => "to be hashed",
        boot::HIGH_START..snp::SHARED_BASE => "kernel or initramfs",
        snp::VMSA_GPA => "first processor",
        _ => "",
    }
}

impl Contents {
    /// A table of fixed columns.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("platforms  {}\n\n", self.platforms.join(", "));
        let _ = writeln!(
            text,
            "{:>18} {:>12} {:>7}  {:<28} {:<12} {:>6}  holds",
            "GPA", "bytes", "pages", "what", "flags", "mask"
        );
        for r in &self.regions {
            let _ = writeln!(
                text,
                "{:>#18x} {:>12} {:>7}  {:<28} {:<12} {:>#6x}  {}",
                r.gpa,
                r.size,
                r.size.div_ceil(PAGE),
                r.kind,
                if r.flags.is_empty() { "-" } else { &r.flags },
                r.compatibility_mask,
                r.holds
            );
        }
        let _ = writeln!(text, "\ncommand line  {}", self.command_line);
        if !self.snp_command_line.is_empty() {
            let _ = writeln!(text, "under SEV-SNP  {}", self.snp_command_line);
        }
        text
    }
}
