//! The launch digest as the firmware computes it (AMD 56860, PAGE_INFO of SNP_LAUNCH_UPDATE): a chain of SHA-384 over one
//! 112-byte record for each page.
//!
//! Owns: the chain. The image tool has its own; both are compared on every image in the suite.

use sha2::{Digest as _, Sha384};

/// A SHA-384.
pub type Sha = [u8; 48];

/// What the firmware does with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageType {
    /// Measured with its contents.
    Normal = 1,
    /// A processor's state; KVM launches these by itself.
    Vmsa = 2,
    /// Zeros.
    Zero = 3,
    /// Contents not measured.
    Unmeasured = 4,
    /// Written by the firmware.
    Secrets = 5,
    /// Checked by the firmware.
    Cpuid = 6,
}

impl PageType {
    /// By its number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Normal, Self::Vmsa, Self::Zero, Self::Unmeasured, Self::Secrets, Self::Cpuid]
            .into_iter()
            .find(|t| *t as u8 == number)
    }

    /// For messages and counters.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Vmsa => "vmsa",
            Self::Zero => "zero",
            Self::Unmeasured => "unmeasured",
            Self::Secrets => "secrets",
            Self::Cpuid => "cpuid",
        }
    }
}

/// SHA-384 of bytes.
#[must_use]
pub fn sha384(bytes: &[u8]) -> Sha {
    Sha384::digest(bytes).into()
}

/// The digest after one more page. `contents` are those of a page whose type is measured with them.
#[must_use]
pub fn extend(digest: &Sha, kind: PageType, gpa: u64, contents: &[u8]) -> Sha {
    const LENGTH: usize = 0x70;
    let mut record = [0; LENGTH];
    record[..48].copy_from_slice(digest);
    if matches!(kind, PageType::Normal | PageType::Vmsa) {
        record[48..96].copy_from_slice(&sha384(contents));
    }
    record[96..98].copy_from_slice(&(LENGTH as u16).to_le_bytes());
    record[98] = kind as u8;
    // No initial migration image, no rights for VMPL 1 to 3.
    record[104..].copy_from_slice(&gpa.to_le_bytes());
    sha384(&record)
}
