//! Packs an image: every byte that a guest starts from, in one IGVM file.
//!
//! Owns: what lies where, and that the same inputs give the same bytes. Does not own: how it is launched.
//!
//! Kernel, initramfs and command line lie at the addresses at which they are used, so that a plain VM runs them in
//! place. What the hardware would measure page by page is little: shim, page tables, handoff and parameter page.

use coffer_layout::{
    LOW_RAM_END, PAGE,
    boot::{
        COMMAND_LINE, COMMAND_LINE_MAX, HANDOFF, Handoff, MEMORY_MAP_OFFSET, PAGE_TABLES, PARAMETERS,
        SHIM_BASE, SHIM_MAX, STACK_TOP, VP_COUNT_OFFSET,
    },
};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use object::{
    LittleEndian,
    elf::{FileHeader64, PT_LOAD},
    read::elf::{FileHeader, ProgramHeader},
};
use thiserror::Error;

use crate::{
    command_line::command_line,
    kernel::{Kernel, KernelError},
    page_tables,
};

/// The compatibility mask of the only platform so far.
pub const NATIVE_MASK: u32 = 1;
/// Alignment of the initramfs.
const INITRAMFS_ALIGNMENT: u64 = 2 << 20;

/// Which kernel and command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// One processor.
    Up,
    /// More than one.
    Smp,
    /// One processor, serial console.
    UpDebug,
    /// More than one, serial console.
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

    /// With more than one processor.
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
    #[error("shim: {0}: pass the coffer-shim that `./build` made")]
    Shim(&'static str),
    /// The command line is too long.
    #[error("command line of {0} bytes: at most {max} fit", max = COMMAND_LINE_MAX - 1)]
    CommandLine(usize),
    /// Kernel and initramfs do not fit below 3 GiB.
    #[error("initramfs of {0} bytes does not fit behind the kernel below 3 GiB")]
    Initramfs(usize),
    /// The library refused it.
    #[error("IGVM file: {0}")]
    Igvm(#[from] igvm::Error),
}

/// What goes in.
#[derive(Clone, Debug)]
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
}

/// Makes the file's bytes.
///
/// # Errors
/// [`BuildError`], naming the input.
pub fn build(inputs: &Inputs<'_>) -> Result<Vec<u8>, BuildError> {
    let shim = shim_bytes(inputs.shim)?;
    let kernel = Kernel::parse(inputs.kernel)?;
    let line = command_line(inputs.profile, inputs.extra_command_line);
    if line.len() as u64 >= COMMAND_LINE_MAX {
        return Err(BuildError::CommandLine(line.len()));
    }
    let initramfs_start = kernel.span().1.next_multiple_of(INITRAMFS_ALIGNMENT);
    if initramfs_start + inputs.initramfs.len() as u64 > LOW_RAM_END {
        return Err(BuildError::Initramfs(inputs.initramfs.len()));
    }
    let handoff = Handoff {
        initramfs_start,
        initramfs_size: inputs.initramfs.len() as u64,
        command_line_size: line.len() as u64,
        ..kernel.handoff()
    };

    let mut directives = vec![IgvmDirectiveHeader::ParameterArea {
        number_of_bytes: PAGE,
        parameter_area_index: 0,
        initial_data: Vec::new(),
    }];
    let parameter = |byte_offset| IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset };
    directives.push(IgvmDirectiveHeader::VpCount(parameter(VP_COUNT_OFFSET)));
    directives.push(IgvmDirectiveHeader::MemoryMap(parameter(MEMORY_MAP_OFFSET)));
    add_pages(&mut directives, SHIM_BASE, &shim);
    add_pages(&mut directives, PAGE_TABLES, &page_tables::identity());
    add_pages(&mut directives, HANDOFF, &handoff.to_page());
    directives.push(IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
        gpa: PARAMETERS,
        compatibility_mask: NATIVE_MASK,
        parameter_area_index: 0,
    }));
    add_pages(&mut directives, COMMAND_LINE, line.as_bytes());
    for segment in &kernel.segments {
        add_pages(&mut directives, segment.address, &segment.data);
    }
    add_pages(&mut directives, initramfs_start, inputs.initramfs);
    directives.push(IgvmDirectiveHeader::X64NativeVpContext {
        compatibility_mask: NATIVE_MASK,
        vp_index: 0,
        context: Box::new(entry_state()),
    });
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: NATIVE_MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::NATIVE,
        platform_version: 1,
        shared_gpa_boundary: 0,
    });
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE as u32 };
    let file = IgvmFile::new(revision, vec![platform], Vec::new(), directives)?;
    let mut bytes = Vec::new();
    file.serialize(&mut bytes)?;
    Ok(bytes)
}

/// One directive for each page. A page of zeros is left out: RAM is zero on a plain VM.
fn add_pages(directives: &mut Vec<IgvmDirectiveHeader>, address: u64, data: &[u8]) {
    for (index, page) in data.chunks(PAGE as usize).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            let mut data = page.to_vec();
            data.resize(PAGE as usize, 0);
            directives.push(IgvmDirectiveHeader::PageData {
                gpa: address + index as u64 * PAGE,
                compatibility_mask: NATIVE_MASK,
                flags: IgvmPageDataFlags::new(),
                data_type: IgvmPageDataType::NORMAL,
                data,
            });
        }
    }
}

/// 64-bit mode at the shim's first byte, on the measured page tables, SSE on, interrupts off.
fn entry_state() -> IgvmNativeVpContextX64 {
    IgvmNativeVpContextX64 {
        rax: 0,
        rcx: 0,
        rdx: 0,
        rbx: 0,
        rsp: STACK_TOP,
        rbp: 0,
        rsi: 0,
        rdi: 0,
        r8: 0,
        r9: 0,
        r10: 0,
        r11: 0,
        r12: 0,
        r13: 0,
        r14: 0,
        r15: 0,
        rip: SHIM_BASE,
        rflags: 2,
        idtr_base: 0,
        idtr_limit: 0,
        reserved: [0; 2],
        gdtr_limit: 0,
        gdtr_base: 0,
        // Execute/read, accessed, present, long; granularity of a page.
        code_selector: 0x10,
        code_attributes: 0xa09b,
        code_base: 0,
        code_limit: 0xffff_ffff,
        data_selector: 0x18,
        data_attributes: 0xc093,
        data_base: 0,
        data_limit: 0xffff_ffff,
        gs_base: 0,
        // Paging, write protection, native FPU errors, extension type, monitor coprocessor, protected mode.
        cr0: 0x8001_0033,
        cr3: PAGE_TABLES,
        // Physical address extension, FXSAVE and SSE exceptions.
        cr4: 0x620,
        // Long mode, enabled and active.
        efer: 0x500,
    }
}

/// The shim's one segment.
fn shim_bytes(file: &[u8]) -> Result<Vec<u8>, BuildError> {
    let elf = |_| BuildError::Shim("not an x86-64 ELF file");
    let header = FileHeader64::<LittleEndian>::parse(file).map_err(elf)?;
    let endian = header.endian().map_err(elf)?;
    let programs = header.program_headers(endian, file).map_err(elf)?;
    let mut loads = programs.iter().filter(|p| p.p_type(endian) == PT_LOAD);
    let (Some(segment), None) = (loads.next(), loads.next()) else {
        return Err(BuildError::Shim("it does not have exactly one segment"));
    };
    if segment.p_vaddr(endian) != SHIM_BASE || header.e_entry(endian) != SHIM_BASE {
        return Err(BuildError::Shim("it is linked at another address"));
    }
    if segment.p_memsz(endian) > SHIM_MAX {
        return Err(BuildError::Shim("it is longer than 32 KiB"));
    }
    let data = segment.data(endian, file).map_err(|()| BuildError::Shim("its bytes lie outside the file"))?;
    Ok(data.to_vec())
}
