//! SEV-SNP: a run of launched pages below 640 KiB, and a window of shared pages that the shim checks against hashes.
//!
//! Owns: its pages, the hash page and the VMSA. Why it lies where it lies stands in `coffer_layout::snp`.

use coffer_layout::{
    PAGE,
    boot::{COMMAND_LINE, HANDOFF, Handoff, Platform, Region, RegionKind, SHIM_BASE, STACK_SIZE, STACK_TOP},
    handoff::REGIONS_MAX,
    snp,
};
use igvm::{
    IgvmDirectiveHeader, IgvmInitializationHeader, IgvmPlatformHeader,
    snp_defs::{SevFeatures, SevSelector, SevVmsa},
};
use igvm_defs::{
    IGVM_SEV_SNP_PLATFORM_VERSION, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType,
    IgvmPlatformType,
};
use sha2::{Digest, Sha384};
use zerocopy::FromZeros;

use super::{SNP_MASK, add_pages, is_zero, padded, page_data, pieces};
use crate::{
    build::{BuildError, Parts},
    page_tables,
};

pub(crate) fn platform() -> IgvmPlatformHeader {
    IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: SNP_MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::SEV_SNP,
        platform_version: IGVM_SEV_SNP_PLATFORM_VERSION,
        shared_gpa_boundary: 0,
    })
}

pub(crate) fn policy() -> IgvmInitializationHeader {
    IgvmInitializationHeader::GuestPolicy { policy: snp::POLICY, compatibility_mask: SNP_MASK }
}

/// Pages whose contents the firmware makes.
pub(crate) fn add_firmware_pages(directives: &mut Vec<IgvmDirectiveHeader>) {
    for (gpa, data_type) in
        [(snp::SECRETS, IgvmPageDataType::SECRETS), (snp::CPUID, IgvmPageDataType::CPUID_DATA)]
    {
        directives.push(page_data(SNP_MASK, gpa, data_type, IgvmPageDataFlags::new(), Vec::new()));
    }
}

/// The hash page, and what it lists.
pub(crate) struct Contents {
    handoff: Handoff,
    regions: Vec<Vec<u8>>,
}

impl Contents {
    /// Hash page, page tables and stack.
    pub(crate) fn add_measured_pages(&self, directives: &mut Vec<IgvmDirectiveHeader>) {
        add_pages(directives, SNP_MASK, HANDOFF, &self.handoff.to_page());
        add_pages(directives, SNP_MASK, snp::PAGE_TABLES, &page_tables::snp(self.handoff.c_bit));
        add_pages(directives, SNP_MASK, STACK_TOP - STACK_SIZE, &[0; STACK_SIZE as usize]);
    }

    /// The shared window: GHCB, sites, and every region. Pages of zeros are there too, as the VMM maps what the file
    /// names.
    pub(crate) fn add_shared_pages(
        &self,
        directives: &mut Vec<IgvmDirectiveHeader>,
        sites: &[u8; PAGE as usize],
    ) {
        let mut add = |address: u64, bytes: &[u8]| {
            for (index, page) in bytes.chunks(PAGE as usize).enumerate() {
                let data = if is_zero(page) { Vec::new() } else { padded(page) };
                let flags = IgvmPageDataFlags::new().with_shared(true);
                let gpa = address + index as u64 * PAGE;
                directives.push(page_data(SNP_MASK, gpa, IgvmPageDataType::NORMAL, flags, data));
            }
        };
        add(snp::GHCB, &[0; PAGE as usize]);
        add(snp::SITES, sites);
        for (region, bytes) in self.handoff.used_regions().iter().zip(&self.regions) {
            add(region.source, bytes);
        }
    }
}

/// Places and hashes every region.
pub(crate) fn contents(parts: &Parts<'_>) -> Result<Contents, BuildError> {
    let mut line = parts.command_line(true)?.into_bytes();
    let command_line_size = line.len() as u64;
    line.push(0);
    let size = line.len() as u64;
    let mut regions = vec![(RegionKind::CommandLine, COMMAND_LINE, line, size)];
    let room = REGIONS_MAX - 2;
    for piece in
        pieces::of(&parts.kernel.segments, room).ok_or(BuildError::Regions(parts.kernel.segments.len()))?
    {
        regions.push((RegionKind::Kernel, piece.address, piece.data, piece.size));
    }
    if !parts.initramfs.is_empty() {
        let size = parts.initramfs.len() as u64;
        regions.push((RegionKind::Initramfs, parts.initramfs_start, parts.initramfs.to_vec(), size));
    }
    let mut handoff = Handoff {
        platform: Platform::Snp,
        initramfs_start: parts.initramfs_start,
        initramfs_size: parts.initramfs.len() as u64,
        command_line_size,
        launch_end: SHIM_BASE + (parts.shim.bytes.len() as u64).next_multiple_of(PAGE),
        sev_status: snp::SEV_STATUS_SNP,
        c_bit: parts.c_bit,
        region_count: regions.len() as u32,
        ..parts.kernel.handoff()
    };
    let mut source = snp::PAYLOAD;
    for (to, (kind, destination, bytes, memory)) in handoff.regions.iter_mut().zip(&regions) {
        let sha384 = Sha384::digest(bytes).into();
        *to = Region {
            source,
            destination: *destination,
            length: bytes.len() as u64,
            memory: *memory,
            kind: *kind,
            sha384,
        };
        source += to.length.next_multiple_of(PAGE);
    }
    if source > snp::SHARED_END {
        return Err(BuildError::Window(source - snp::SHARED_BASE));
    }
    Ok(Contents { handoff, regions: regions.into_iter().map(|(_, _, bytes, _)| bytes).collect() })
}

pub(crate) fn context(c_bit: u32) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::SnpVpContext {
        gpa: snp::VMSA_GPA,
        compatibility_mask: SNP_MASK,
        vp_index: 0,
        vmsa: Box::new(entry_state(c_bit)),
    }
}

/// The first processor's VMSA, a page of the launch digest: as on a plain VM, with what KVM adds or needs: SVME, MCE, the debug registers' fixed bits, x87 and SSE as after reset.
#[must_use]
pub fn entry_state(c_bit: u32) -> SevVmsa {
    let segment = |selector, attrib, limit| SevSelector { selector, attrib, limit, base: 0 };
    let data = segment(0x18, 0xc93, u32::MAX);
    SevVmsa {
        es: data,
        cs: segment(0x10, 0xa9b, u32::MAX),
        ss: data,
        ds: data,
        fs: data,
        gs: data,
        ldtr: segment(0, 0x82, 0xffff),
        tr: segment(0, 0x83, 0xffff),
        efer: 0x1500,
        cr4: 0x660,
        cr3: snp::PAGE_TABLES | 1 << c_bit,
        cr0: 0x8001_0033,
        dr7: 0x400,
        dr6: 0xffff_0ff0,
        rflags: 2,
        rip: SHIM_BASE,
        rsp: STACK_TOP,
        pat: 0x0007_0406_0007_0406,
        sev_features: SevFeatures::new().with_snp(true),
        xcr0: 1,
        mxcsr: 0x1f80,
        x87_fcw: 0x37f,
        ..SevVmsa::new_zeroed()
    }
}
