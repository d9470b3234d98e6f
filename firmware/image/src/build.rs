//! Packs an image: every byte that a guest starts from, in one IGVM file.
//!
//! Owns: which inputs make an image, and that the same inputs give the same bytes. Does not own: what lies where for a
//! platform ([`crate::platform`]), how it is launched.

use coffer_layout::{
    LOW_RAM_END, PAGE,
    boot::{COMMAND_LINE_MAX, MEMORY_MAP_OFFSET, PARAMETERS, SHIM_BASE, VP_COUNT_OFFSET},
};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmRevision};
use igvm_defs::{IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT};
use p384::SecretKey;
use thiserror::Error;

use crate::{
    command_line::command_line,
    id_block,
    kernel::{Kernel, KernelError},
    measure::{self, MeasureError},
    platform::{self, NATIVE_MASK, SNP_MASK, native, snp},
    shim::{Shim, ShimError},
    sites::{self, SiteError},
};

/// Alignment of the initramfs.
const INITRAMFS_ALIGNMENT: u64 = 2 << 20;
/// The C-bit's position on Milan, Genoa and Turin.
pub const C_BIT: u32 = 51;

/// Which kernel and command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// One processor, no TEE.
    Up,
    /// More than one, or a TEE.
    Smp,
    /// One processor, no TEE, serial console.
    UpDebug,
    /// More than one, or a TEE, serial console.
    SmpDebug,
}

impl Profile {
    /// By its name on the command line.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "up" => Self::Up,
            "smp" => Self::Smp,
            "up-debug" => Self::UpDebug,
            "smp-debug" => Self::SmpDebug,
            _ => return None,
        })
    }

    /// With a console.
    #[must_use]
    pub fn is_debug(self) -> bool {
        matches!(self, Self::UpDebug | Self::SmpDebug)
    }

    /// With more than one processor. Only these kernels run as SEV-SNP guests: without SMP, Linux 6.12 loops for ever in
    /// `early_set_memory_enc_dec`.
    #[must_use]
    pub fn is_smp(self) -> bool {
        matches!(self, Self::Smp | Self::SmpDebug)
    }
}

/// Why no image was made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The kernel is not usable.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The shim is not one of ours.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// The command line is too long.
    #[error("command line of {0} bytes: at most {max} fit", max = COMMAND_LINE_MAX - 1)]
    CommandLine(usize),
    /// Kernel and initramfs do not fit below 3 GiB.
    #[error("initramfs of {0} bytes does not fit behind the kernel below 3 GiB")]
    Initramfs(usize),
    /// Kernel and initramfs do not fit in the shared window.
    #[error(
        "kernel, initramfs and command line take {0} bytes of shared pages: at most 256 MiB fit; make the initramfs smaller"
    )]
    Window(u64),
    /// The kernel has too many segments for the hash page.
    #[error("kernel of {0} segments: the hash page lists at most {max} regions", max = coffer_layout::handoff::REGIONS_MAX)]
    Regions(usize),
    /// The C-bit is nowhere where an address bit can be.
    #[error(
        "C-bit {0}: give a bit between 40 and 51 (51 on Milan, Genoa and Turin, 47 for --tee snp-emulated)"
    )]
    CBit(u32),
    /// The table of sites cannot be made.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// An ID block was asked for where none can be.
    #[error("an ID block needs an SEV-SNP image: use the smp profile")]
    IdBlock,
    /// The image's own digest cannot be computed.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// The library refused it.
    #[error("IGVM file: {0}")]
    Igvm(#[from] igvm::Error),
}

/// Keys that sign an SEV-SNP image, and what they sign for.
#[derive(Clone)]
pub struct Signing {
    /// Signs the ID block.
    pub id_key: SecretKey,
    /// Signs the ID key, when given.
    pub author_key: Option<SecretKey>,
    /// Number of processors: the digest in the ID block holds for no other.
    pub vcpus: u32,
}

/// What goes in.
#[derive(Clone)]
pub struct Inputs<'a> {
    /// ELF file of the shim.
    pub shim: &'a [u8],
    /// ELF file of the kernel.
    pub kernel: &'a [u8],
    /// Uncompressed cpio archive.
    pub initramfs: &'a [u8],
    /// Kernel profile.
    pub profile: Profile,
    /// More options for the kernel.
    pub extra_command_line: &'a str,
    /// Position of the C-bit for SEV-SNP.
    pub c_bit: u32,
    /// Signs the image for SEV-SNP.
    pub signing: Option<Signing>,
}

/// The inputs, checked and placed.
pub(crate) struct Parts<'a> {
    pub(crate) shim: Shim,
    pub(crate) kernel: Kernel,
    pub(crate) initramfs: &'a [u8],
    /// Guest physical address.
    pub(crate) initramfs_start: u64,
    pub(crate) profile: Profile,
    pub(crate) extra_command_line: &'a str,
    pub(crate) c_bit: u32,
    /// The table of sites.
    pub(crate) sites: [u8; PAGE as usize],
}

impl Parts<'_> {
    /// The command line of one platform.
    pub(crate) fn command_line(&self, tee: bool) -> Result<String, BuildError> {
        let line = command_line(self.profile, tee, self.extra_command_line);
        if line.len() as u64 >= COMMAND_LINE_MAX {
            Err(BuildError::CommandLine(line.len()))
        } else {
            Ok(line)
        }
    }
}

/// Makes the file's bytes.
///
/// # Errors
/// [`BuildError`], naming the input.
pub fn build(inputs: &Inputs<'_>) -> Result<Vec<u8>, BuildError> {
    let kernel = Kernel::parse(inputs.kernel, inputs.profile.is_smp())?;
    let initramfs_start = kernel.span().1.next_multiple_of(INITRAMFS_ALIGNMENT);
    if initramfs_start + inputs.initramfs.len() as u64 > LOW_RAM_END {
        return Err(BuildError::Initramfs(inputs.initramfs.len()));
    }
    if !(40..=51).contains(&inputs.c_bit) {
        return Err(BuildError::CBit(inputs.c_bit));
    }
    let parts = Parts {
        shim: Shim::parse(inputs.shim)?,
        kernel,
        initramfs: inputs.initramfs,
        initramfs_start,
        profile: inputs.profile,
        extra_command_line: inputs.extra_command_line,
        c_bit: inputs.c_bit,
        sites: sites::table(inputs.shim, inputs.kernel)?,
    };
    let tee = inputs.profile.is_smp();
    let mut file = assemble(&parts, tee)?;
    if let Some(signing) = &inputs.signing {
        if !tee {
            return Err(BuildError::IdBlock);
        }
        let digest = measure::measure(&file, signing.vcpus)?.digest;
        let mut directives = file.directives().to_vec();
        // Before everything else, so that the VMSA stays last.
        directives.insert(0, id_block::directive(&digest, signing));
        file =
            IgvmFile::new(REVISION, file.platforms().to_vec(), file.initializations().to_vec(), directives)?;
    }
    let mut bytes = Vec::new();
    file.serialize(&mut bytes)?;
    Ok(bytes)
}

const REVISION: IgvmRevision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE as u32 };

/// Everything but the ID block. Pages of both platforms come first, in the order in which they lie.
fn assemble(parts: &Parts<'_>, tee: bool) -> Result<IgvmFile, BuildError> {
    let mask = if tee { NATIVE_MASK | SNP_MASK } else { NATIVE_MASK };
    let parameter = |byte_offset| IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset };
    let mut directives = vec![
        IgvmDirectiveHeader::ParameterArea {
            number_of_bytes: PAGE,
            parameter_area_index: 0,
            initial_data: Vec::new(),
        },
        IgvmDirectiveHeader::VpCount(parameter(VP_COUNT_OFFSET)),
        IgvmDirectiveHeader::MemoryMap(parameter(MEMORY_MAP_OFFSET)),
    ];
    let contents = if tee { Some(snp::contents(parts)?) } else { None };
    if tee {
        snp::add_firmware_pages(&mut directives);
    }
    directives.push(IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
        gpa: PARAMETERS,
        compatibility_mask: mask,
        parameter_area_index: 0,
    }));
    if let Some(contents) = &contents {
        contents.add_measured_pages(&mut directives);
    }
    platform::add_pages(&mut directives, mask, SHIM_BASE, &parts.shim.bytes);
    native::add_pages(&mut directives, parts)?;
    let (mut platforms, mut initializations) = (vec![native::platform()], Vec::new());
    if let Some(contents) = &contents {
        platforms.push(snp::platform());
        initializations.push(snp::policy());
        contents.add_shared_pages(&mut directives, &parts.sites);
    }
    directives.push(native::context());
    if tee {
        directives.push(snp::context(parts.c_bit));
    }
    Ok(IgvmFile::new(REVISION, platforms, initializations, directives)?)
}
