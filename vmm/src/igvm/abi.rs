//! The bytes of an IGVM file: numbers and offsets, from the IGVM specification (igvm_defs has the same as types).
//!
//! Owns: every raw integer of the format. Does not own: what they mean for a launch.

pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"IGVM");
pub(super) const VERSION: u32 = 2;
pub(super) const ARCHITECTURE_X64: u32 = 0;
/// Fixed header of version 2: magic, version, header offset, header size, file size, checksum, architecture, page size.
pub(super) const FIXED_HEADER: usize = 32;
/// IGVM_VHS_PAGE_DATA.
pub(super) const PAGE_BODY: usize = 24;
/// A page's header: type, length and that.
pub(super) const PAGE_HEADER: usize = 8 + PAGE_BODY;
pub(super) const CHECKSUM_AT: usize = 20;

pub(super) const SUPPORTED_PLATFORM: u32 = 0x1;
pub(super) const GUEST_POLICY: u32 = 0x101;
pub(super) const VERSION_STRING: u32 = 0x107;
pub(super) const PARAMETER_AREA: u32 = 0x301;
pub(super) const PAGE_DATA: u32 = 0x302;
pub(super) const PARAMETER_INSERT: u32 = 0x303;
pub(super) const VP_CONTEXT: u32 = 0x304;
pub(super) const REQUIRED_MEMORY: u32 = 0x305;
pub(super) const VP_COUNT: u32 = 0x307;
pub(super) const SNP_ID_BLOCK: u32 = 0x30b;
pub(super) const MEMORY_MAP: u32 = 0x30c;
/// A header of a type with this bit may be skipped by a loader that does not know it.
pub(super) const OPTIONAL: u32 = 1 << 31;

pub(super) const PLATFORM_NATIVE: u8 = 0;
pub(super) const PLATFORM_SNP: u8 = 2;

pub(super) const FLAG_2MIB: u32 = 1;
pub(super) const FLAG_UNMEASURED: u32 = 2;
pub(super) const FLAG_SHARED: u32 = 4;
pub(super) const KNOWN_FLAGS: u32 = FLAG_2MIB | FLAG_UNMEASURED | FLAG_SHARED;
pub(super) const PAGE_TYPE_NORMAL: u16 = 0;
pub(super) const PAGE_TYPE_SECRETS: u16 = 1;
pub(super) const PAGE_TYPE_CPUID: u16 = 2;

/// Bytes of a native VP context (IgvmNativeVpContextX64).
pub(super) const NATIVE_CONTEXT: usize = 232;
/// Bytes of an ID block header's body (IGVM_VHS_SNP_ID_BLOCK): two signatures of 144 and two keys of 152 bytes behind 104.
pub(super) const SNP_ID_BLOCK_SIZE: usize = 104 + 2 * (144 + 152);

/// Little-endian fields of a structure whose length was checked before.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u8(self, at: usize) -> u8 {
        u8::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    /// All zero when they are not there. One check for all of them: a start reads some 3,000 headers.
    #[inline]
    pub(super) fn bytes<const N: usize>(self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
}
