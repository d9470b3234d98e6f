//! The kernel: an uncompressed ELF vmlinux, checked before anything of it goes into an image.
//!
//! Owns: what a usable kernel is. Does not own: where the image puts it (at its own physical addresses).

use std::io::Read;

use coffer_layout::{
    PAGE,
    boot::{HIGH_START, Handoff},
};
use object::{
    LittleEndian,
    elf::{EM_X86_64, ET_EXEC, FileHeader64, PT_LOAD},
    read::elf::{FileHeader, ProgramHeader},
};
use thiserror::Error;

/// Options without which no container can run in the guest: the machine's own, and what init uses.
const REQUIRED: [&str; 14] = [
    "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES",
    "CONFIG_VIRTIO_VSOCKETS",
    "CONFIG_VIRTIO_FS",
    "CONFIG_VIRTIO_NET",
    "CONFIG_VIRTIO_BLK",
    "CONFIG_HW_RANDOM_VIRTIO",
    "CONFIG_BLK_DEV_INITRD",
    "CONFIG_DEVTMPFS",
    "CONFIG_UNIX98_PTYS",
    "CONFIG_X86_IOPL_IOPERM",
    "CONFIG_CGROUPS",
    "CONFIG_PID_NS",
    "CONFIG_SECCOMP_FILTER",
    "CONFIG_KVM_GUEST",
];

/// Options without which a kernel is no SEV-SNP guest. Without PAT it stops in `early_memremap`, without AES `sev-guest`
/// does not bind, without ACPI it finds one processor.
const REQUIRED_BY_SNP: [&str; 6] = [
    "CONFIG_SMP",
    "CONFIG_AMD_MEM_ENCRYPT",
    "CONFIG_ACPI",
    "CONFIG_X86_PAT",
    "CONFIG_SEV_GUEST",
    "CONFIG_CRYPTO_AES",
];

/// Why a file is not a kernel for an image.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KernelError {
    /// Not an ELF file for x86-64.
    #[error("kernel is not an uncompressed x86-64 ELF file ({0}): pass vmlinux, not bzImage or vmlinuz")]
    NotElf(String),
    /// A segment is not where it can be.
    #[error("kernel segment {index} at {address:#x}, {size:#x} bytes: {problem}")]
    Segment {
        /// Number among the loadable ones.
        index: usize,
        /// Physical address.
        address: u64,
        /// Bytes in memory.
        size: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The entry is outside all segments.
    #[error("kernel entry {0:#x} lies in no segment: pass vmlinux as the kernel's build left it")]
    Entry(u64),
    /// An option that the guest needs is off.
    #[error("kernel lacks {0}: build it with guest-kernel-config/build, or turn the option on")]
    MissingOption(&'static str),
    /// The options cannot be read.
    #[error("kernel does not say how it was configured ({0}): build it with CONFIG_IKCONFIG=y")]
    NoConfiguration(&'static str),
}

/// A range of memory that the kernel fills.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address, a multiple of a page.
    pub address: u64,
    /// Contents, without the zeros that follow.
    pub data: Vec<u8>,
    /// Bytes in memory.
    pub size: u64,
}

/// A checked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Sorted, not overlapping.
    pub segments: Vec<Segment>,
    /// Physical address of the 64-bit entry.
    pub entry: u64,
}

impl Kernel {
    /// Reads and checks an ELF file; `snp` asks for what an SEV-SNP guest needs too.
    ///
    /// # Errors
    /// [`KernelError`], naming the segment or the option.
    pub fn parse(file: &[u8], snp: bool) -> Result<Self, KernelError> {
        let kernel = Self::parse_elf(file)?;
        check_options(file, if snp { &REQUIRED_BY_SNP } else { &[] })?;
        Ok(kernel)
    }

    fn parse_elf(file: &[u8]) -> Result<Self, KernelError> {
        let not_elf = |e: object::Error| KernelError::NotElf(e.to_string());
        let header = FileHeader64::<LittleEndian>::parse(file).map_err(not_elf)?;
        let endian = header.endian().map_err(not_elf)?;
        if header.e_machine(endian) != EM_X86_64 || header.e_type(endian) != ET_EXEC {
            return Err(KernelError::NotElf("another machine or not an executable".to_owned()));
        }
        let mut segments = Vec::new();
        for program in header.program_headers(endian, file).map_err(not_elf)? {
            if program.p_type(endian) != PT_LOAD || program.p_memsz(endian) == 0 {
                continue;
            }
            let (address, size) = (program.p_paddr(endian), program.p_memsz(endian));
            let wrong = |problem| KernelError::Segment { index: segments.len(), address, size, problem };
            let data = program.data(endian, file).map_err(|()| wrong("its bytes lie outside the file"))?;
            if data.len() as u64 > size {
                return Err(wrong("it is longer in the file than in memory"));
            }
            if address < HIGH_START || !address.is_multiple_of(PAGE) {
                return Err(wrong("it does not start on a page above 1 MiB"));
            }
            if address.checked_add(size).is_none_or(|end| end > coffer_layout::LOW_RAM_END) {
                return Err(wrong("it ends beyond the RAM below 3 GiB"));
            }
            segments.push(Segment { address, data: data.to_vec(), size });
        }
        segments.sort_by_key(|s| s.address);
        if let Some(index) = segments.windows(2).position(|w| w[0].address + w[0].size > w[1].address) {
            let Segment { address, size, .. } = segments[index];
            return Err(KernelError::Segment { index, address, size, problem: "it overlaps the next" });
        }
        let entry = header.e_entry(endian);
        if !segments.iter().any(|s| s.address <= entry && entry < s.address + s.data.len() as u64) {
            return Err(KernelError::Entry(entry));
        }
        Ok(Self { segments, entry })
    }

    /// First byte, and first byte behind.
    #[must_use]
    pub fn span(&self) -> (u64, u64) {
        let start = self.segments.first().map_or(0, |s| s.address);
        (start, self.segments.last().map_or(start, |s| s.address + s.size))
    }

    /// The handoff page's part about the kernel.
    #[must_use]
    pub fn handoff(&self) -> Handoff {
        let (kernel_start, kernel_end) = self.span();
        Handoff { kernel_entry: self.entry, kernel_start, kernel_end, ..Handoff::default() }
    }
}

/// Reads the configuration that CONFIG_IKCONFIG leaves between two marks, and looks for what is needed.
fn check_options(file: &[u8], more: &[&'static str]) -> Result<(), KernelError> {
    const START: &[u8] = b"IKCFG_ST";
    const END: &[u8] = b"IKCFG_ED";
    const LONGEST: u64 = 16 << 20;
    let find = |needle: &[u8]| file.windows(needle.len()).position(|w| w == needle);
    let start = find(START).ok_or(KernelError::NoConfiguration("no mark"))? + START.len();
    let end = find(END).filter(|end| *end > start).ok_or(KernelError::NoConfiguration("no end mark"))?;
    let mut text = String::new();
    flate2::read::GzDecoder::new(&file[start..end])
        .take(LONGEST)
        .read_to_string(&mut text)
        .map_err(|_| KernelError::NoConfiguration("it does not inflate"))?;
    match REQUIRED
        .iter()
        .chain(more)
        .find(|option| !text.lines().any(|l| l.strip_suffix("=y") == Some(option)))
    {
        Some(option) => Err(KernelError::MissingOption(option)),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// A tiny vmlinux: one segment at 16 MiB with code and bss, and a configuration.
    pub(crate) fn vmlinux(options: &[&str], address: u64) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for option in options {
            writeln!(gzip, "{option}=y").unwrap();
        }
        let mut body = b"\xf4code".to_vec();
        body.extend(b"IKCFG_ST");
        body.extend(gzip.finish().unwrap());
        body.extend(b"IKCFG_ED");
        let mut file = Vec::new();
        file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        for word in [address, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [120u64, 0xffff_ffff_8100_0000, address, body.len() as u64, 0x5000, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        file.extend(body);
        file
    }

    #[test]
    fn a_kernel_is_read() {
        let kernel = Kernel::parse(&vmlinux(&REQUIRED, 0x100_0000), false).unwrap();
        assert_eq!(kernel.entry, 0x100_0000);
        assert_eq!(kernel.span(), (0x100_0000, 0x100_5000));
    }

    #[test]
    fn a_missing_option_is_named() {
        let error = Kernel::parse(&vmlinux(&REQUIRED[1..], 0x100_0000), false).unwrap_err();
        assert_eq!(error, KernelError::MissingOption("CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"));
    }

    #[test]
    fn an_snp_guest_needs_more() {
        let error = Kernel::parse(&vmlinux(&REQUIRED, 0x100_0000), true).unwrap_err();
        assert_eq!(error, KernelError::MissingOption("CONFIG_SMP"));
        let all: Vec<&str> = REQUIRED.into_iter().chain(REQUIRED_BY_SNP).collect();
        assert!(Kernel::parse(&vmlinux(&all, 0x100_0000), true).is_ok());
    }

    #[test]
    fn what_is_no_vmlinux_is_refused_in_words() {
        assert!(matches!(Kernel::parse(b"MZ bzImage", false), Err(KernelError::NotElf(_))));
        assert!(matches!(
            Kernel::parse(&vmlinux(&REQUIRED, 0x8000), false),
            Err(KernelError::Segment { .. })
        ));
        assert!(matches!(
            Kernel::parse(&vmlinux(&REQUIRED, !0xfff), false),
            Err(KernelError::Segment { .. })
        ));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_makes_it_panic(at in 0usize..200, value in any::<u8>()) {
            let mut file = vmlinux(&REQUIRED, 0x100_0000);
            file[at] = value;
            let _ = Kernel::parse(&file, false);
        }
    }
}
