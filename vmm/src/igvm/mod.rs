//! Reads an IGVM file where it lies: every offset and length checked, nothing copied, no panic on any bytes.
//!
//! Owns: the file format (version 2, x64, 4 KiB pages), for the native platform and SEV-SNP. Does not own: whether the guest fits
//! (see [`crate::launch`]).

mod abi;
#[cfg(test)]
mod tests;

use abi::Fields;
use coffer_layout::PAGE;
use thiserror::Error;

/// Most parameter areas of an image; ours have one.
const MOST_AREAS: usize = 16;

/// Why a file is refused. Always before the first system call that makes a VM.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ImageError {
    /// Shorter than its headers say, or than any image.
    #[error("image is truncated: {what} ends at byte {end}, the file at {size}")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// Not an IGVM file.
    #[error("image is no IGVM file (magic {0:#010x}): pass a file that coffer-image build made")]
    Magic(u32),
    /// Another version, architecture or page size.
    #[error("image has {what} {value:#x}: only version 2, x64, 4096-byte pages are supported")]
    Unsupported {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// The checksum over the headers is wrong.
    #[error(
        "image is damaged: checksum of the headers is {found:#010x}, the file says {expected:#010x}; copy it again"
    )]
    Checksum {
        /// Computed.
        found: u32,
        /// In the file.
        expected: u32,
    },
    /// A header of a type that must not be skipped.
    #[error("image header {index} has type {kind:#x}, which this VMM does not know")]
    UnknownHeader {
        /// Number in the file.
        index: usize,
        /// Type.
        kind: u32,
    },
    /// A header that is not what its type needs.
    #[error("image header {index}: {problem}")]
    Header {
        /// Number in the file.
        index: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Not for this platform.
    #[error("image is not for {0}: build it with coffer-image build for that platform")]
    NoPlatform(Platform),
}

/// What an image can be for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// A plain VM.
    Native,
    /// AMD SEV-SNP, real or emulated.
    Snp,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Native => "a plain VM",
            Self::Snp => "SEV-SNP",
        })
    }
}

/// One page of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest physical address.
    pub gpa: u64,
    /// Where its bytes lie in the file; `None` for zeros.
    pub offset: Option<u64>,
    /// The host may read and write it; it is not part of the launch.
    pub shared: bool,
    /// Launched, but not part of the digest.
    pub unmeasured: bool,
    /// What it holds.
    pub kind: PageKind,
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// The file's bytes.
    Normal,
    /// SEV-SNP's secrets, written by the firmware.
    Secrets,
    /// SEV-SNP's CPUID table, written by the VMM and checked by the firmware.
    Cpuid,
}

/// What a parameter is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// u32: number of processors.
    VpCount,
    /// Array of memory map entries.
    MemoryMap,
}

/// One directive of the platform, in file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directive {
    /// Load a page.
    Page(Page),
    /// Make a buffer.
    Area {
        /// Its number.
        index: u32,
        /// Bytes.
        size: u64,
        /// Its first contents in the file.
        initial: Option<u64>,
    },
    /// Fill part of a buffer.
    Parameter {
        /// With what.
        kind: ParameterKind,
        /// Buffer.
        area: u32,
        /// Offset in it.
        offset: u32,
    },
    /// Put a buffer into the guest.
    Insert {
        /// Where.
        gpa: u64,
        /// Buffer.
        area: u32,
    },
    /// This must be RAM.
    Required {
        /// Start.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
}

/// A whole file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// In file order.
    pub directives: Vec<Directive>,
    /// State of the first processor, apart from the directives because it is ten times as long as any of them.
    pub registers: Option<Registers>,
    /// What only SEV-SNP has.
    pub snp: Snp,
}

/// What an image says for SEV-SNP alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snp {
    /// Guest policy.
    pub policy: Option<u64>,
    /// State of the first processor.
    pub vmsa: Option<VmsaPage>,
    /// Signed identity of the image.
    pub id_block: Option<IdBlock>,
}

/// A processor's state as SEV-SNP keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmsaPage {
    /// Guest physical address.
    pub gpa: u64,
    /// Where its 4096 bytes lie in the file.
    pub offset: u64,
    /// No page directive follows it.
    pub is_last: bool,
}

/// An ID block's body as the file has it (IGVM_VHS_SNP_ID_BLOCK, without the mask).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdBlock {
    /// The author's key is there too.
    pub author: bool,
    /// Expected launch digest.
    pub digest: [u8; 48],
    /// Family and image ids.
    pub ids: [u8; 32],
    /// Version, security version, algorithms of id key and author key.
    pub numbers: [u32; 4],
    /// Signature of the block, id key, signature of that key, author's key: r, s; curve, reserved, x, y.
    pub keys: [u8; 592],
}

/// State in which the first processor starts (IgvmNativeVpContextX64).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the processor's")]
pub struct Registers {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
    pub general: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub idtr: (u64, u16),
    pub gdtr: (u64, u16),
    pub code: Segment,
    pub data: Segment,
    pub gs_base: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// A segment register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the processor's")]
pub struct Segment {
    pub selector: u16,
    /// Access rights as in a VMCS.
    pub attributes: u16,
    pub base: u32,
    pub limit: u32,
}

/// Reads and checks a whole file; what it says for other platforms is left out.
///
/// # Errors
/// [`ImageError`], naming the header.
pub fn read(file: &[u8], platform: Platform) -> Result<Image, ImageError> {
    let headers = check_fixed_header(file)?;
    let mut reader = Reader {
        file,
        platform,
        mask: 0,
        index: 0,
        // Nearly all headers are pages', and one that grew step by step would be copied and faulted in again each time.
        directives: Vec::with_capacity(headers.len() / abi::PAGE_HEADER),
        areas: Vec::new(),
        registers: None,
        snp: Snp::default(),
    };
    let mut rest = headers;
    while !rest.is_empty() {
        let (kind, body, after) = split_header(rest).ok_or_else(|| reader.wrong("it is cut off"))?;
        reader.header(kind, body)?;
        reader.index += 1;
        rest = after;
    }
    match reader.mask {
        0 => Err(ImageError::NoPlatform(platform)),
        _ => Ok(Image { directives: reader.directives, registers: reader.registers, snp: reader.snp }),
    }
}

fn check_fixed_header(file: &[u8]) -> Result<&[u8], ImageError> {
    let size = file.len() as u64;
    let truncated = |what, end| ImageError::Truncated { what, end, size };
    let fixed =
        file.get(..abi::FIXED_HEADER).ok_or(truncated("the fixed header", abi::FIXED_HEADER as u64))?;
    let fields = Fields(fixed);
    if fields.u32(0) != abi::MAGIC {
        return Err(ImageError::Magic(fields.u32(0)));
    }
    for (what, value, wanted) in [
        ("format version", fields.u32(4), abi::VERSION),
        ("architecture", fields.u32(24), abi::ARCHITECTURE_X64),
        ("page size", fields.u32(28), PAGE as u32),
    ] {
        if value != wanted {
            return Err(ImageError::Unsupported { what, value });
        }
    }
    let total = u64::from(fields.u32(16));
    if total != size {
        return Err(truncated("the image", total));
    }
    let (start, length) = (fields.u32(8) as usize, fields.u32(12) as usize);
    let end = start.saturating_add(length);
    let headers = file.get(start..end).ok_or(truncated("the headers", end as u64))?;
    if start != abi::FIXED_HEADER || !length.is_multiple_of(8) {
        return Err(ImageError::Unsupported { what: "header offset or length", value: fields.u32(8) });
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&fixed[..abi::CHECKSUM_AT]);
    hasher.update(&[0; 4]);
    hasher.update(&fixed[abi::CHECKSUM_AT + 4..]);
    hasher.update(headers);
    let (found, expected) = (hasher.finalize(), fields.u32(abi::CHECKSUM_AT));
    if found == expected { Ok(headers) } else { Err(ImageError::Checksum { found, expected }) }
}

/// Type and body of the first header, and what follows it: bodies are padded to 8 bytes.
fn split_header(bytes: &[u8]) -> Option<(u32, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    let fields = Fields(head);
    let length = fields.u32(4) as usize;
    let body = rest.get(..length)?;
    Some((fields.u32(0), body, rest.get(length.checked_next_multiple_of(8)?..)?))
}

struct Reader<'a> {
    file: &'a [u8],
    platform: Platform,
    /// Compatibility mask of the platform; 0 until it was seen.
    mask: u32,
    index: usize,
    directives: Vec<Directive>,
    /// Those among the directives, which are thousands.
    areas: Vec<Area>,
    registers: Option<Registers>,
    snp: Snp,
}

/// A parameter area that was made.
struct Area {
    index: u32,
    size: u64,
    /// It was put into the guest: nothing fills it any more.
    inserted: bool,
}

impl Reader<'_> {
    fn wrong(&self, problem: &'static str) -> ImageError {
        ImageError::Header { index: self.index, problem }
    }

    fn header(&mut self, kind: u32, body: &[u8]) -> Result<(), ImageError> {
        // Nearly all are these, and where the length is known no field is checked again.
        if let (abi::PAGE_DATA, Ok(page)) = (kind, <&[u8; abi::PAGE_BODY]>::try_from(body)) {
            return self.page(page);
        }
        let fields = Fields(body);
        let length_of = |kind| match kind {
            abi::SUPPORTED_PLATFORM | abi::VP_CONTEXT => Some(if kind == abi::VP_CONTEXT { 20 } else { 16 }),
            abi::PARAMETER_AREA | abi::PARAMETER_INSERT | abi::GUEST_POLICY => Some(16),
            abi::SNP_ID_BLOCK => Some(abi::SNP_ID_BLOCK_SIZE),
            abi::PAGE_DATA => Some(abi::PAGE_BODY),
            abi::REQUIRED_MEMORY => Some(24),
            abi::VP_COUNT | abi::MEMORY_MAP => Some(8),
            _ => None,
        };
        match length_of(kind) {
            Some(wanted) if body.len() != wanted => return Err(self.wrong("its length is not its type's")),
            Some(_) => {}
            None if kind == abi::VERSION_STRING || kind & abi::OPTIONAL != 0 => return Ok(()),
            None => return Err(ImageError::UnknownHeader { index: self.index, kind }),
        }
        match kind {
            abi::SUPPORTED_PLATFORM => self.platform(fields),
            abi::PARAMETER_AREA => self.area(fields),
            abi::VP_COUNT => self.parameter(ParameterKind::VpCount, fields),
            abi::MEMORY_MAP => self.parameter(ParameterKind::MemoryMap, fields),
            abi::PARAMETER_INSERT => self.insert(fields),
            abi::REQUIRED_MEMORY => self.required(fields),
            abi::GUEST_POLICY => self.policy(fields),
            abi::SNP_ID_BLOCK => self.id_block(body),
            _ => self.context(fields),
        }
    }

    fn platform(&mut self, fields: Fields<'_>) -> Result<(), ImageError> {
        let mask = fields.u32(0);
        if mask.count_ones() != 1 {
            return Err(self.wrong("a platform's mask must have one bit"));
        }
        let (kind, wanted) = (
            fields.u8(5),
            match self.platform {
                Platform::Native => abi::PLATFORM_NATIVE,
                Platform::Snp => abi::PLATFORM_SNP,
            },
        );
        if kind == wanted {
            if self.mask != 0 {
                return Err(self.wrong("a platform is there twice"));
            }
            if fields.u8(4) != 0 || fields.u64(8) != 0 {
                return Err(self.wrong("a platform with a paravisor or a shared boundary is not supported"));
            }
            self.mask = mask;
        }
        Ok(())
    }

    fn policy(&mut self, fields: Fields<'_>) -> Result<(), ImageError> {
        if !self.is_ours(fields.u32(8)) {
            return Ok(());
        }
        if self.platform != Platform::Snp || self.snp.policy.is_some() {
            return Err(self.wrong("a guest policy is for SEV-SNP, and there once"));
        }
        self.snp.policy = Some(fields.u64(0));
        Ok(())
    }

    fn id_block(&mut self, body: &[u8]) -> Result<(), ImageError> {
        let fields = Fields(body);
        if !self.is_ours(fields.u32(0)) {
            return Ok(());
        }
        if self.platform != Platform::Snp || self.snp.id_block.is_some() {
            return Err(self.wrong("an ID block is for SEV-SNP, and there once"));
        }
        self.snp.id_block = Some(IdBlock {
            author: fields.u8(4) != 0,
            digest: fields.bytes(8),
            ids: fields.bytes(56),
            numbers: std::array::from_fn(|i| fields.u32(88 + i * 4)),
            keys: fields.bytes(104),
        });
        Ok(())
    }

    fn is_ours(&self, mask: u32) -> bool {
        mask & self.mask != 0
    }

    fn add(&mut self, directive: Directive) -> Result<(), ImageError> {
        self.directives.push(directive);
        Ok(())
    }

    #[inline]
    fn page(&mut self, body: &[u8; abi::PAGE_BODY]) -> Result<(), ImageError> {
        let fields = Fields(body);
        let (gpa, mask, offset, flags, kind) =
            (fields.u64(0), fields.u32(8), fields.u32(12), fields.u32(16), fields.u16(20));
        if !gpa.is_multiple_of(PAGE) || gpa.checked_add(PAGE).is_none() {
            return Err(self.wrong("a page's address is not a page's"));
        }
        if flags & !abi::KNOWN_FLAGS != 0 || flags & abi::FLAG_2MIB != 0 {
            return Err(self.wrong("a page has flags that this VMM does not know, or is a 2 MiB page"));
        }
        if !self.is_ours(mask) {
            return Ok(());
        }
        let (shared, unmeasured) = (flags & abi::FLAG_SHARED != 0, flags & abi::FLAG_UNMEASURED != 0);
        let kind = match (self.platform, kind) {
            (_, abi::PAGE_TYPE_NORMAL) => PageKind::Normal,
            (Platform::Snp, abi::PAGE_TYPE_SECRETS) => PageKind::Secrets,
            (Platform::Snp, abi::PAGE_TYPE_CPUID) => PageKind::Cpuid,
            _ => return Err(self.wrong("a page has a type that its platform does not have")),
        };
        if shared && unmeasured || kind != PageKind::Normal && (shared || unmeasured || offset != 0) {
            return Err(self.wrong("a page's flags do not fit its type"));
        }
        if let Some(vmsa) = &mut self.snp.vmsa {
            vmsa.is_last = false;
        }
        let offset = self.data(offset, PAGE, "a page's bytes lie outside the file")?;
        self.add(Directive::Page(Page { gpa, offset, shared, unmeasured, kind }))
    }

    /// Checks a reference into the file; 0 means none.
    fn data(&self, offset: u32, size: u64, problem: &'static str) -> Result<Option<u64>, ImageError> {
        let offset = u64::from(offset);
        match offset.checked_add(size) {
            _ if offset == 0 => Ok(None),
            Some(end) if offset >= abi::FIXED_HEADER as u64 && end <= self.file.len() as u64 => {
                Ok(Some(offset))
            }
            _ => Err(self.wrong(problem)),
        }
    }

    fn area(&mut self, fields: Fields<'_>) -> Result<(), ImageError> {
        const LARGEST: u64 = 1 << 20;
        let (size, index) = (fields.u64(0), fields.u32(8));
        if size == 0 || !size.is_multiple_of(PAGE) || size > LARGEST {
            return Err(self.wrong("a parameter area must be pages, 1 MiB at most"));
        }
        let initial = self.data(fields.u32(12), size, "a parameter area's bytes lie outside the file")?;
        if self.areas.iter().any(|area| area.index == index) {
            return Err(self.wrong("a parameter area is there twice"));
        }
        // Each becomes a buffer of this process.
        if self.areas.len() == MOST_AREAS {
            return Err(self.wrong("there are more parameter areas than any guest needs"));
        }
        self.areas.push(Area { index, size, inserted: false });
        self.add(Directive::Area { index, size, initial })
    }

    /// An area that takes parameters.
    fn open_area(&mut self, wanted: u32) -> Option<&mut Area> {
        self.areas.iter_mut().find(|area| area.index == wanted && !area.inserted)
    }

    fn parameter(&mut self, kind: ParameterKind, fields: Fields<'_>) -> Result<(), ImageError> {
        let (area, offset) = (fields.u32(0), fields.u32(4));
        match self.open_area(area) {
            Some(open) if u64::from(offset) < open.size => {
                self.add(Directive::Parameter { kind, area, offset })
            }
            _ => Err(self.wrong("a parameter lies in no area that is still open")),
        }
    }

    fn insert(&mut self, fields: Fields<'_>) -> Result<(), ImageError> {
        let (gpa, mask, area) = (fields.u64(0), fields.u32(8), fields.u32(12));
        if !self.is_ours(mask) {
            return Ok(());
        }
        match self.open_area(area) {
            Some(open) if gpa.is_multiple_of(PAGE) && gpa.checked_add(open.size).is_some() => {
                open.inserted = true;
                self.add(Directive::Insert { gpa, area })
            }
            _ => Err(self.wrong("a parameter area cannot be put there, or was put before")),
        }
    }

    fn required(&mut self, fields: Fields<'_>) -> Result<(), ImageError> {
        let (gpa, mask, size) = (fields.u64(0), fields.u32(8), u64::from(fields.u32(12)));
        if gpa.checked_add(size).is_none() {
            return Err(self.wrong("required memory wraps around"));
        }
        if self.is_ours(mask) { self.add(Directive::Required { gpa, size }) } else { Ok(()) }
    }

    fn context(&mut self, fields: Fields<'_>) -> Result<(), ImageError> {
        let (mask, offset, vp) = (fields.u32(8), fields.u32(12), fields.u16(16));
        if !self.is_ours(mask) {
            return Ok(());
        }
        if vp != 0 || self.registers.is_some() || self.snp.vmsa.is_some() {
            return Err(self.wrong("only the first processor has a context, and one"));
        }
        let size = match self.platform {
            Platform::Native => abi::NATIVE_CONTEXT as u64,
            Platform::Snp => PAGE,
        };
        let start = self.data(offset, size, "a context's bytes lie outside the file")?;
        let offset = start.ok_or_else(|| self.wrong("a context without bytes"))?;
        match self.platform {
            Platform::Native => {
                let start = offset as usize;
                self.registers = Some(registers(&self.file[start..start + abi::NATIVE_CONTEXT]));
            }
            Platform::Snp => {
                self.snp.vmsa = Some(VmsaPage { gpa: fields.u64(0), offset, is_last: true });
            }
        }
        Ok(())
    }
}

fn registers(bytes: &[u8]) -> Registers {
    let f = Fields(bytes);
    let segment = |at| Segment {
        selector: f.u16(at),
        attributes: f.u16(at + 2),
        base: f.u32(at + 4),
        limit: f.u32(at + 8),
    };
    Registers {
        general: std::array::from_fn(|i| f.u64(i * 8)),
        rip: f.u64(128),
        rflags: f.u64(136),
        idtr: (f.u64(144), f.u16(152)),
        gdtr: (f.u64(160), f.u16(158)),
        code: segment(168),
        data: segment(180),
        gs_base: f.u64(192),
        cr0: f.u64(200),
        cr3: f.u64(208),
        cr4: f.u64(216),
        efer: f.u64(224),
    }
}
