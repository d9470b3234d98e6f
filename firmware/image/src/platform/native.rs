//! The plain VM: kernel, initramfs and command line lie where they are used, so that nothing is copied in the guest.
//!
//! Owns: its pages and the first processor's state.

use coffer_layout::{
    PAGE,
    boot::{COMMAND_LINE, HANDOFF, Handoff, PAGE_TABLES, SHIM_BASE, STACK_TOP},
};
use igvm::{IgvmDirectiveHeader, IgvmPlatformHeader};
use igvm_defs::{
    IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64, IgvmPageDataFlags, IgvmPageDataType,
    IgvmPlatformType,
};

use super::{NATIVE_MASK, is_zero, padded, page_data};
use crate::{
    build::{BuildError, Parts},
    page_tables,
};

pub(crate) fn platform() -> IgvmPlatformHeader {
    IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: NATIVE_MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::NATIVE,
        platform_version: 1,
        shared_gpa_boundary: 0,
    })
}

/// A page of zeros is left out: RAM is zero on a plain VM.
pub(crate) fn add_pages(
    directives: &mut Vec<IgvmDirectiveHeader>,
    parts: &Parts<'_>,
) -> Result<(), BuildError> {
    let line = parts.command_line(false)?;
    let handoff = Handoff {
        initramfs_start: parts.initramfs_start,
        initramfs_size: parts.initramfs.len() as u64,
        command_line_size: line.len() as u64,
        ..parts.kernel.handoff()
    };
    let mut add = |address: u64, data: &[u8]| {
        for (index, page) in data.chunks(PAGE as usize).enumerate().filter(|(_, page)| !is_zero(page)) {
            let gpa = address + index as u64 * PAGE;
            let flags = IgvmPageDataFlags::new();
            directives.push(page_data(NATIVE_MASK, gpa, IgvmPageDataType::NORMAL, flags, padded(page)));
        }
    };
    add(PAGE_TABLES, &page_tables::native());
    add(HANDOFF, &handoff.to_page());
    add(COMMAND_LINE, line.as_bytes());
    for segment in &parts.kernel.segments {
        add(segment.address, &segment.data);
    }
    add(parts.initramfs_start, parts.initramfs);
    Ok(())
}

pub(crate) fn context() -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::X64NativeVpContext {
        compatibility_mask: NATIVE_MASK,
        vp_index: 0,
        context: Box::new(entry_state()),
    }
}

/// 64-bit mode at the shim's first byte, on the image's page tables, SSE on, interrupts off.
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
