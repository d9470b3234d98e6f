//! Small inputs from which the tests build whole images.

use std::io::Write;

use coffer_image::build::{Inputs, Profile};
use coffer_layout::sites::SiteKind;

/// Options that `coffer-image` wants from an smp kernel.
const OPTIONS: [&str; 20] = [
    "VIRTIO_MMIO_CMDLINE_DEVICES",
    "VIRTIO_VSOCKETS",
    "VIRTIO_FS",
    "VIRTIO_NET",
    "VIRTIO_BLK",
    "HW_RANDOM_VIRTIO",
    "BLK_DEV_INITRD",
    "DEVTMPFS",
    "UNIX98_PTYS",
    "X86_IOPL_IOPERM",
    "CGROUPS",
    "PID_NS",
    "SECCOMP_FILTER",
    "KVM_GUEST",
    "SMP",
    "AMD_MEM_ENCRYPT",
    "ACPI",
    "X86_PAT",
    "SEV_GUEST",
    "CRYPTO_AES",
];

/// One segment that is also a section of code.
struct Segment {
    virtual_address: u64,
    physical_address: u64,
    bytes: Vec<u8>,
    memory: u64,
}

fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let count = segments.len() as u64;
    let data_start = 64 + 56 * count;
    let data_size: u64 = segments.iter().map(|s| s.bytes.len() as u64).sum();
    let sections_start = (data_start + data_size).next_multiple_of(8);
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for word in [entry, 64, sections_start] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    // Sizes and counts: header, program headers, section headers; the first section is the empty one.
    for half in [64, 56, count as u16, 64, 1 + count as u16, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = data_start;
    for s in segments {
        file.extend([1u32.to_le_bytes(), 7u32.to_le_bytes()].concat());
        for word in [offset, s.virtual_address, s.physical_address, s.bytes.len() as u64, s.memory, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        offset += s.bytes.len() as u64;
    }
    for s in segments {
        file.extend(&s.bytes);
    }
    file.resize(sections_start as usize, 0);
    file.extend([0; 64]);
    let mut offset = data_start;
    for s in segments {
        file.extend([0u32.to_le_bytes(), 1u32.to_le_bytes()].concat());
        // Allocated and executable.
        for word in [6, s.virtual_address, offset, s.bytes.len() as u64, 0, 1, 0] {
            file.extend(u64::to_le_bytes(word));
        }
        offset += s.bytes.len() as u64;
    }
    file
}

/// Two segments: code with an embedded configuration and `fill`, then data with bss.
pub(crate) fn kernel(fill: u8) -> Vec<u8> {
    kernel_without("", fill)
}

/// The same without one of the options.
pub(crate) fn kernel_without(missing: &str, fill: u8) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for option in OPTIONS.into_iter().filter(|&option| option != missing) {
        writeln!(gzip, "CONFIG_{option}=y").unwrap();
    }
    let mut code = vec![0xf4];
    code.extend(SiteKind::Vmgexit.bytes());
    code.resize(0x1801, fill);
    code.extend(b"IKCFG_ST");
    code.extend(gzip.finish().unwrap());
    code.extend(b"IKCFG_ED");
    let at = |physical_address: u64, bytes: Vec<u8>, memory| Segment {
        virtual_address: physical_address + 0xffff_ffff_8000_0000,
        physical_address,
        bytes,
        memory,
    };
    elf(0x100_0000, &[at(0x100_0000, code, 0x4000), at(0x120_0000, vec![fill; 0x1234], 0x3000)])
}

/// Two and a half pages with one PVALIDATE at their third byte.
pub(crate) fn shim(fill: u8) -> Vec<u8> {
    let mut code = vec![0x90, 0x90];
    code.extend(SiteKind::Pvalidate.bytes());
    code.resize(0x2800, fill);
    elf(
        0x10000,
        &[Segment { virtual_address: 0x10000, physical_address: 0x10000, bytes: code, memory: 0x2801 }],
    )
}

/// An smp image of these files.
pub(crate) fn inputs<'a>(shim: &'a [u8], kernel: &'a [u8], initramfs: &'a [u8]) -> Inputs<'a> {
    Inputs {
        shim,
        kernel,
        initramfs,
        profile: Profile::Smp,
        extra_command_line: "",
        c_bit: 51,
        signing: None,
    }
}
