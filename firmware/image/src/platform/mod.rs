//! What a platform loads where.
//!
//! Owns: the platforms' masks, and pages as directives.

pub(crate) mod native;
mod pieces;
pub mod snp;

use coffer_layout::PAGE;
use igvm::IgvmDirectiveHeader;
use igvm_defs::{IgvmPageDataFlags, IgvmPageDataType};

/// The compatibility mask of a plain VM.
pub const NATIVE_MASK: u32 = 1;
/// The compatibility mask of SEV-SNP.
pub const SNP_MASK: u32 = 2;

/// One directive for each page, with its bytes even when they are zeros: each is a page of the launch digest.
pub(crate) fn add_pages(directives: &mut Vec<IgvmDirectiveHeader>, mask: u32, address: u64, data: &[u8]) {
    for (index, page) in data.chunks(PAGE as usize).enumerate() {
        directives.push(page_data(
            mask,
            address + index as u64 * PAGE,
            IgvmPageDataType::NORMAL,
            IgvmPageDataFlags::new(),
            padded(page),
        ));
    }
}

pub(crate) fn page_data(
    compatibility_mask: u32,
    gpa: u64,
    data_type: IgvmPageDataType,
    flags: IgvmPageDataFlags,
    data: Vec<u8>,
) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData { gpa, compatibility_mask, flags, data_type, data }
}

/// A whole page.
pub(crate) fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut page = bytes.to_vec();
    page.resize(PAGE as usize, 0);
    page
}

pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}
