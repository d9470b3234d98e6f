//! What is in an image, for a person and for a script.
//!
//! Owns: the readable form. Reads with the igvm crate; the VMM has its own reader.

use std::fmt::Write as _;

use coffer_layout::{
    PAGE,
    boot::{self, Handoff, RegionKind},
    snp,
};
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

/// A line of the measured hash page: bytes in shared pages that the shim copies, hashes and compares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hashed {
    /// What it is.
    pub holds: String,
    /// Guest physical address in the shared window.
    pub source: u64,
    /// Guest physical address where it is used.
    pub destination: u64,
    /// Bytes.
    pub size: u64,
    /// SHA-384 of them, in hexadecimal.
    pub sha384: String,
}

/// A whole file.
#[derive(Clone, Debug, Serialize)]
pub struct Contents {
    /// Platform names with their masks.
    pub platforms: Vec<String>,
    /// In file order, neighbours of one kind joined.
    pub regions: Vec<Region>,
    /// What the hash page lists; empty when the image is not for SEV-SNP.
    pub hashed: Vec<Hashed>,
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
    let handoffs = handoffs(&image);
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
        let next = region(directive, &handoffs);
        match regions.last_mut() {
            Some(last) if joins(last, &next) => last.size += next.size,
            _ => regions.push(next),
        }
    }
    let hashed = handoffs.iter().flat_map(|(_, handoff)| handoff.used_regions()).map(hashed).collect();
    Ok(Contents { platforms, regions, hashed, command_line, snp_command_line })
}

/// The handoff pages, each with its platforms' mask.
fn handoffs(image: &IgvmFile) -> Vec<(u32, Handoff)> {
    let page = |directive: &IgvmDirectiveHeader| {
        let IgvmDirectiveHeader::PageData { gpa: boot::HANDOFF, compatibility_mask, data, .. } = directive
        else {
            return None;
        };
        let page = data.as_slice().try_into().ok()?;
        Some((*compatibility_mask, Handoff::from_page(page)?))
    };
    image.directives().iter().filter_map(page).collect()
}

fn hashed(region: &boot::Region) -> Hashed {
    let holds = match region.kind {
        RegionKind::Kernel => "kernel",
        RegionKind::Initramfs => "initramfs",
        RegionKind::CommandLine => "command line",
    };
    Hashed {
        holds: holds.to_owned(),
        source: region.source,
        destination: region.destination,
        size: region.length,
        sha384: region.sha384.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        }),
    }
}

fn joins(last: &Region, next: &Region) -> bool {
    last.kind == next.kind
        && last.kind.starts_with("page")
        && last.gpa.checked_add(last.size) == Some(next.gpa)
        && (&last.flags, last.compatibility_mask, &last.holds)
            == (&next.flags, next.compatibility_mask, &next.holds)
}

fn region(directive: &IgvmDirectiveHeader, handoffs: &[(u32, Handoff)]) -> Region {
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
    let handoff = handoffs.iter().find(|(of, _)| of & mask != 0).map(|(_, handoff)| handoff);
    Region {
        gpa,
        size,
        holds: holds(gpa, size, handoff).to_owned(),
        kind,
        flags: flags_text,
        compatibility_mask: mask,
    }
}

const SNP_STACK: u64 = boot::STACK_TOP - boot::STACK_SIZE;

/// What the fixed layout has at an address, or what the handoff page says is there.
fn holds(gpa: u64, size: u64, handoff: Option<&Handoff>) -> &'static str {
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
        boot::HIGH_START..snp::SHARED_BASE => match handoff {
            Some(page) if page.initramfs_size > 0 && gpa >= page.initramfs_start => "initramfs",
            _ => "kernel",
        },
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
            "{:>18} {:>12} {:>7}  {:<28} {:<12} {:>10}  holds",
            "GPA", "bytes", "pages", "what", "flags", "mask"
        );
        let same = |a: &Region, b: &Region| {
            a.kind.starts_with("page")
                && (&a.kind, &a.flags, a.compatibility_mask, &a.holds)
                    == (&b.kind, &b.flags, b.compatibility_mask, &b.holds)
        };
        for runs in self.regions.chunk_by(same) {
            let (first, bytes) = (&runs[0], runs.iter().map(|r| r.size).sum::<u64>());
            let holes =
                if runs.len() > 1 { format!(", {} runs, zeroes between", runs.len()) } else { String::new() };
            let _ = writeln!(
                text,
                "{:>#18x} {:>12} {:>7}  {:<28} {:<12} {:>#10x}  {}{holes}",
                first.gpa,
                bytes,
                bytes.div_ceil(PAGE),
                first.kind,
                if first.flags.is_empty() { "-" } else { &first.flags },
                first.compatibility_mask,
                first.holds,
            );
        }
        if !self.hashed.is_empty() {
            let _ =
                writeln!(text, "\nhashed by the shim, copied from the shared window to where it is used:");
            for h in &self.hashed {
                let _ = writeln!(
                    text,
                    "{:>#18x} {:>12}  to {:#x}, {}\n{:>31}  SHA-384 {}",
                    h.source, h.size, h.destination, h.holds, "", h.sha384
                );
            }
        }
        let _ = writeln!(text, "\ncommand line  {}", self.command_line);
        if !self.snp_command_line.is_empty() {
            let _ = writeln!(text, "under SEV-SNP  {}", self.snp_command_line);
        }
        text
    }
}
