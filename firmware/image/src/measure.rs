//! The launch digest that SEV-SNP hardware reports for an image, page by page.
//!
//! Owns: the chain of hashes (AMD 56860, SNP_LAUNCH_UPDATE, table "PAGE_INFO") over an image's directives in file order,
//! and the VMSAs that KVM adds. Does not own: other platforms.

use std::collections::HashMap;

use coffer_layout::{PAGE, snp::VMSA_GPA, vmsa};
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader};
use igvm_defs::{IgvmPageDataType, IgvmPlatformType};
use serde::Serialize;
use sha2::{Digest, Sha384};
use thiserror::Error;
use zerocopy::IntoBytes;

/// Most processors: what the shim and the kernel take.
const VCPUS_MAX: u32 = coffer_layout::boot::VP_MAX;

/// Why there is no digest.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MeasureError {
    /// No SEV-SNP platform in the file.
    #[error("image is not for SEV-SNP: build it with the smp or smp-debug profile")]
    NoPlatform,
    /// A count that no image of ours starts.
    #[error("{0} processors: give 1 to {VCPUS_MAX}")]
    Vcpus(u32),
    /// KVM cannot launch the file in an order that gives one digest.
    #[error("image cannot be launched by KVM: {0}; build it again with coffer-image build")]
    NotForKvm(&'static str),
}

/// What a page is to the firmware, with its number in PAGE_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names are the firmware's")]
pub enum PageKind {
    Normal = 1,
    Vmsa = 2,
    Unmeasured = 4,
    Secrets = 5,
    Cpuid = 6,
}

/// One page's part in the digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeasuredPage {
    /// Guest physical address.
    pub gpa: u64,
    /// How it is launched.
    pub kind: PageKind,
    /// SHA-384 of its contents in hexadecimal; zeros where the firmware takes none.
    pub contents: String,
    /// The launch digest once it is in.
    pub digest: String,
}

/// A launch, measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// The launch digest.
    pub digest: [u8; 48],
    /// In launch order, VMSAs last.
    pub pages: Vec<MeasuredPage>,
}

impl Measurement {
    /// Pages that the image launches privately, VMSAs not among them.
    #[must_use]
    pub fn launch_pages(&self) -> usize {
        self.pages.iter().filter(|p| p.kind != PageKind::Vmsa).count()
    }

    /// Commands that a VMM issues: START, one LAUNCH_UPDATE for each run of neighbours of one kind, FINISH. KVM adds the
    /// VMSAs within FINISH.
    #[must_use]
    pub fn launch_commands(&self) -> usize {
        let pages: Vec<_> = self.pages.iter().filter(|p| p.kind != PageKind::Vmsa).collect();
        let breaks =
            pages.windows(2).filter(|w| w[0].kind != w[1].kind || w[0].gpa + PAGE != w[1].gpa).count();
        2 + breaks + usize::from(!pages.is_empty())
    }
}

/// Measures a file's SEV-SNP launch with `vcpus` processors.
///
/// # Errors
/// [`MeasureError`].
pub fn measure(file: &IgvmFile, vcpus: u32) -> Result<Measurement, MeasureError> {
    if vcpus == 0 || vcpus > VCPUS_MAX {
        return Err(MeasureError::Vcpus(vcpus));
    }
    let platform = file.platforms().iter().find_map(|IgvmPlatformHeader::SupportedPlatform(p)| {
        (p.platform_type == IgvmPlatformType::SEV_SNP).then_some(p.compatibility_mask)
    });
    let mask = platform.ok_or(MeasureError::NoPlatform)?;
    let mut chain = Chain { digest: [0; 48], pages: Vec::new() };
    let (mut areas, mut has_vmsa) = (HashMap::new(), false);
    for directive in file.directives() {
        if directive.compatibility_mask().is_some_and(|m| m & mask == 0) {
            continue;
        }
        let launches = matches!(
            directive,
            IgvmDirectiveHeader::ParameterInsert(_) | IgvmDirectiveHeader::SnpVpContext { .. }
        ) || matches!(directive, IgvmDirectiveHeader::PageData { flags, .. } if !flags.shared());
        if has_vmsa && launches {
            // KVM measures VMSAs at the end, wherever the file has them.
            return Err(MeasureError::NotForKvm("a page follows the VMSA, or there is a second VMSA"));
        }
        match directive {
            IgvmDirectiveHeader::ParameterArea { number_of_bytes, parameter_area_index, .. } => {
                areas.insert(*parameter_area_index, *number_of_bytes);
            }
            IgvmDirectiveHeader::ParameterInsert(insert) => {
                let size = areas.remove(&insert.parameter_area_index);
                let size = size.ok_or(MeasureError::NotForKvm("a parameter area is not there"))?;
                for page in 0..size.div_ceil(PAGE) {
                    chain.add(PageKind::Unmeasured, insert.gpa.wrapping_add(page * PAGE), None);
                }
            }
            IgvmDirectiveHeader::PageData { gpa, flags, data_type, data, .. } if !flags.shared() => {
                match *data_type {
                    IgvmPageDataType::SECRETS => chain.add(PageKind::Secrets, *gpa, None),
                    IgvmPageDataType::CPUID_DATA => chain.add(PageKind::Cpuid, *gpa, None),
                    IgvmPageDataType::NORMAL if flags.unmeasured() => {
                        chain.add(PageKind::Unmeasured, *gpa, None);
                    }
                    IgvmPageDataType::NORMAL => chain.add(PageKind::Normal, *gpa, Some(data)),
                    _ => return Err(MeasureError::NotForKvm("a page has a type that KVM does not launch")),
                }
            }
            IgvmDirectiveHeader::SnpVpContext { gpa, vmsa, .. } => {
                if *gpa != VMSA_GPA {
                    return Err(MeasureError::NotForKvm("its VMSA is not at 0xfffffffff000"));
                }
                chain.add(PageKind::Vmsa, VMSA_GPA, Some(vmsa.as_bytes()));
                has_vmsa = true;
            }
            _ => {}
        }
    }
    if !has_vmsa {
        return Err(MeasureError::NotForKvm("it has no VMSA"));
    }
    for _ in 1..vcpus {
        chain.add(PageKind::Vmsa, VMSA_GPA, Some(&vmsa::reset()));
    }
    Ok(Measurement { digest: chain.digest, pages: chain.pages })
}

struct Chain {
    digest: [u8; 48],
    pages: Vec<MeasuredPage>,
}

impl Chain {
    /// Adds a page; contents shorter than one are followed by zeros.
    fn add(&mut self, kind: PageKind, gpa: u64, contents: Option<&[u8]>) {
        const LENGTH: u16 = 0x70;
        let contents: [u8; 48] = contents.map_or([0; 48], |bytes| {
            let mut page = bytes.to_vec();
            page.resize(PAGE as usize, 0);
            Sha384::digest(&page).into()
        });
        let mut hash = Sha384::new();
        hash.update(self.digest);
        hash.update(contents);
        hash.update(LENGTH.to_le_bytes());
        // Type, initial migration image, permissions of VMPL 3 to 1, reserved.
        hash.update([kind as u8, 0, 0, 0, 0, 0]);
        hash.update(gpa.to_le_bytes());
        self.digest = hash.finalize().into();
        self.pages.push(MeasuredPage { gpa, kind, contents: hex(&contents), digest: hex(&self.digest) });
    }
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
