//! The VMSA: a processor's state as SEV-SNP keeps it (AMD APM volume 2, table B-4), and what of it KVM can import.
//!
//! Owns: the page's layout, the check, the registers for KVM. KVM measures the VMSA that it makes from its own registers:
//! state that it cannot take would be measured as something else, so it is refused.

use coffer_layout::PAGE;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_fpu, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use super::digest::Sha;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_MCE: u64 = 1 << 6;
const EFER_SVME: u64 = 1 << 12;
const DR7_FIXED: u64 = 0x400;
const XCR0_X87: u64 = 1;

mod at {
    pub(super) const ES: usize = 0x00;
    pub(super) const CS: usize = 0x10;
    pub(super) const SS: usize = 0x20;
    pub(super) const DS: usize = 0x30;
    pub(super) const FS: usize = 0x40;
    pub(super) const GS: usize = 0x50;
    pub(super) const GDTR: usize = 0x60;
    pub(super) const LDTR: usize = 0x70;
    pub(super) const IDTR: usize = 0x80;
    pub(super) const TR: usize = 0x90;
    pub(super) const CET: std::ops::Range<usize> = 0xa0..0xc8;
    pub(super) const VMPL: usize = 0xca;
    pub(super) const CPL: usize = 0xcb;
    pub(super) const EFER: usize = 0xd0;
    pub(super) const XSS: usize = 0x140;
    pub(super) const CR4: usize = 0x148;
    pub(super) const CR3: usize = 0x150;
    pub(super) const CR0: usize = 0x158;
    pub(super) const DR7: usize = 0x160;
    pub(super) const DR6: usize = 0x168;
    pub(super) const RFLAGS: usize = 0x170;
    pub(super) const RIP: usize = 0x178;
    pub(super) const RSP: usize = 0x1d8;
    pub(super) const SHADOW_STACK: std::ops::Range<usize> = 0x1e0..0x1f8;
    pub(super) const RAX: usize = 0x1f8;
    pub(super) const G_PAT: usize = 0x268;
    pub(super) const PKRU: std::ops::Range<usize> = 0x2e8..0x2ec;
    pub(super) const RCX: usize = 0x308;
    pub(super) const RDX: usize = 0x310;
    pub(super) const RBX: usize = 0x318;
    pub(super) const RBP: usize = 0x328;
    pub(super) const RSI: usize = 0x330;
    pub(super) const RDI: usize = 0x338;
    pub(super) const R8: usize = 0x340;
    pub(super) const SEV_FEATURES: usize = 0x3b0;
    pub(super) const VIRTUAL_TOM: usize = 0x3c8;
    pub(super) const XCR0: usize = 0x3e8;
    pub(super) const MXCSR: usize = 0x408;
    pub(super) const X87_FTW: usize = 0x40c;
    pub(super) const X87_FSW: usize = 0x40e;
    pub(super) const X87_FCW: usize = 0x410;
    pub(super) const VECTORS: std::ops::Range<usize> = 0x412..0x670;
}

/// Ranges that are reserved or belong to state of a running guest: zero in a state to start from.
const ZERO: [std::ops::Range<usize>; 10] = [
    0xc8..0xca,
    0xcc..0xd0,
    0xd8..0x140,
    0x180..0x1d8,
    0x200..0x268,
    0x270..0x2e8,
    0x2ec..0x308,
    0x320..0x328,
    0x380..0x3b0,
    0x670..PAGE as usize,
];

/// Why a VMSA cannot be launched.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VmsaError {
    /// KVM would set it, so the digest would differ from the image's.
    #[error(
        "the image's VMSA has {field} {value:#x}: KVM sets {needed} itself, and the launch digest would not be the image's"
    )]
    Forced {
        /// Register.
        field: &'static str,
        /// As in the image.
        value: u64,
        /// The bit.
        needed: &'static str,
    },
    /// KVM has no way to take it.
    #[error(
        "the image's VMSA sets {0}, which KVM cannot import: build the image with this VMM's coffer-image"
    )]
    NotImportable(&'static str),
    /// Not a state to start from.
    #[error("the image's VMSA has {field} {value:#x}: {wanted}")]
    Wrong {
        /// Register.
        field: &'static str,
        /// As in the image.
        value: u64,
        /// What it must be.
        wanted: &'static str,
    },
}

/// A VMSA's bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Vmsa(Box<[u8; PAGE as usize]>);

impl std::fmt::Debug for Vmsa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vmsa {{ rip: {:#x}, cr3: {:#x} }}", self.u64(at::RIP), self.u64(at::CR3))
    }
}

impl Vmsa {
    /// A page's bytes, not checked.
    #[must_use]
    pub fn new(bytes: [u8; PAGE as usize]) -> Self {
        Self(Box::new(bytes))
    }

    /// The page.
    #[must_use]
    pub fn bytes(&self) -> &[u8; PAGE as usize] {
        &self.0
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|i| self.0[at + i]))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        self.u64(at) as u32
    }

    /// SEV_FEATURES.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.u64(at::SEV_FEATURES)
    }

    /// CR3, C-bit included.
    #[must_use]
    pub fn cr3(&self) -> u64 {
        self.u64(at::CR3)
    }

    /// Checks that KVM makes the same page from the registers that it is given, on a processor that starts an image.
    ///
    /// # Errors
    /// [`VmsaError`], naming the register.
    pub fn check_importable(&self) -> Result<(), VmsaError> {
        for (field, at, bit, needed) in [
            ("CR0", at::CR0, CR0_ET, "CR0.ET"),
            ("CR4", at::CR4, CR4_MCE, "CR4.MCE"),
            ("EFER", at::EFER, EFER_SVME, "EFER.SVME"),
            ("SEV_FEATURES", at::SEV_FEATURES, 1, "SNP_ACTIVE"),
        ] {
            let value = self.u64(at);
            if value & bit == 0 {
                return Err(VmsaError::Forced { field, value, needed });
            }
        }
        for (what, range) in [
            ("CET state", at::CET),
            ("shadow stacks", at::SHADOW_STACK),
            ("PKRU", at::PKRU),
            ("x87, MMX or vector registers", at::VECTORS),
            ("the x87 tag word", at::X87_FTW..at::X87_FTW + 2),
            ("a virtual top of memory", at::VIRTUAL_TOM..at::VIRTUAL_TOM + 8),
            ("XSS", at::XSS..at::XSS + 8),
        ] {
            if self.0[range].iter().any(|b| *b != 0) {
                return Err(VmsaError::NotImportable(what));
            }
        }
        for (what, at) in [("a GDT limit over 64 KiB", at::GDTR), ("an IDT limit over 64 KiB", at::IDTR)] {
            if self.u32(at + 4) > 0xffff {
                return Err(VmsaError::NotImportable(what));
            }
        }
        if let Some(range) = ZERO.iter().find(|r| self.0[(*r).clone()].iter().any(|b| *b != 0)) {
            return Err(VmsaError::Wrong {
                field: "a reserved field at offset",
                value: range.start as u64,
                wanted: "state of a guest that has run, or reserved",
            });
        }
        let one = |field, value, wanted, good: bool| match good {
            true => Ok(()),
            false => Err(VmsaError::Wrong { field, value, wanted }),
        };
        one("VMPL", self.0[at::VMPL].into(), "must be 0", self.0[at::VMPL] == 0)?;
        one("CPL", self.0[at::CPL].into(), "must be 0", self.0[at::CPL] == 0)?;
        one("DR7", self.u64(at::DR7), "must be 0x400", self.u64(at::DR7) == DR7_FIXED)?;
        one("XCR0", self.u64(at::XCR0), "must have bit 0", self.u64(at::XCR0) & XCR0_X87 != 0)?;
        let features = self.features();
        one("SEV_FEATURES", features, "this VMM starts guests with SNP_ACTIVE alone", features == 1)?;
        let cr0 = self.u64(at::CR0);
        one("CR0", cr0, "must enable paging and protection", cr0 & (CR0_PG | CR0_PE) == CR0_PG | CR0_PE)
    }

    /// Segment, descriptor table and control registers over those that KVM has.
    pub fn set_sregs(&self, sregs: &mut kvm_sregs) {
        (sregs.es, sregs.cs, sregs.ss) = (self.segment(at::ES), self.segment(at::CS), self.segment(at::SS));
        (sregs.ds, sregs.fs, sregs.gs) = (self.segment(at::DS), self.segment(at::FS), self.segment(at::GS));
        (sregs.ldt, sregs.tr) = (self.segment(at::LDTR), self.segment(at::TR));
        (sregs.gdt.limit, sregs.gdt.base) = (self.u32(at::GDTR + 4) as u16, self.u64(at::GDTR + 8));
        (sregs.idt.limit, sregs.idt.base) = (self.u32(at::IDTR + 4) as u16, self.u64(at::IDTR + 8));
        // SVME is the host's; KVM adds it to the guest's VMSA by itself.
        sregs.efer = self.u64(at::EFER) & !EFER_SVME;
        (sregs.cr0, sregs.cr3, sregs.cr4) =
            (self.u64(at::CR0), self.u64(at::CR3), self.u64(at::CR4) & !CR4_MCE);
    }

    /// Puts a processor into this state, with these segment, descriptor table and control registers.
    ///
    /// # Errors
    /// KVM's.
    pub fn enter(&self, vcpu: &VcpuFd, sregs: &kvm_sregs) -> Result<(), kvm_ioctls::Error> {
        vcpu.set_sregs(sregs)?;
        vcpu.set_regs(&self.regs())?;
        vcpu.set_fpu(&self.fpu())?;
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
    }

    /// General registers.
    #[must_use]
    pub fn regs(&self) -> kvm_regs {
        let r = |at| self.u64(at);
        kvm_regs {
            rax: r(at::RAX),
            rbx: r(at::RBX),
            rcx: r(at::RCX),
            rdx: r(at::RDX),
            rsi: r(at::RSI),
            rdi: r(at::RDI),
            rsp: r(at::RSP),
            rbp: r(at::RBP),
            r8: r(at::R8),
            r9: r(at::R8 + 0x8),
            r10: r(at::R8 + 0x10),
            r11: r(at::R8 + 0x18),
            r12: r(at::R8 + 0x20),
            r13: r(at::R8 + 0x28),
            r14: r(at::R8 + 0x30),
            r15: r(at::R8 + 0x38),
            rip: r(at::RIP),
            rflags: r(at::RFLAGS),
        }
    }

    /// FPU control words.
    #[must_use]
    pub fn fpu(&self) -> kvm_fpu {
        kvm_fpu {
            fcw: self.u16(at::X87_FCW),
            fsw: self.u16(at::X87_FSW),
            mxcsr: self.u32(at::MXCSR),
            ..Default::default()
        }
    }

    /// XCR0.
    #[must_use]
    pub fn xcr0(&self) -> u64 {
        self.u64(at::XCR0)
    }

    /// The page attribute table.
    #[must_use]
    pub fn pat(&self) -> u64 {
        self.u64(at::G_PAT)
    }

    fn segment(&self, at: usize) -> kvm_segment {
        let attributes = self.u16(at + 2);
        let bit = |n: u16| (attributes >> n & 1) as u8;
        kvm_segment {
            base: self.u64(at + 8),
            limit: self.u32(at + 4),
            selector: self.u16(at),
            type_: (attributes & 15) as u8,
            s: bit(4),
            dpl: (attributes >> 5 & 3) as u8,
            present: bit(7),
            avl: bit(8),
            l: bit(9),
            db: bit(10),
            g: bit(11),
            unusable: 1 - bit(7),
            padding: 0,
        }
    }

    /// The state in which KVM leaves a processor that nobody has started, which it measures for every processor but the
    /// first. RDX is 0x600 on every model: at KVM_CREATE_VCPU there is no CPUID table yet to take the signature from.
    #[must_use]
    pub fn of_reset() -> Self {
        let mut page = [0; PAGE as usize];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        let segment = |attributes: u16, selector: u16, base: u64| {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&selector.to_le_bytes());
            bytes[2..4].copy_from_slice(&attributes.to_le_bytes());
            bytes[4..8].copy_from_slice(&0xffffu32.to_le_bytes());
            bytes[8..].copy_from_slice(&base.to_le_bytes());
            bytes
        };
        for at in [at::ES, at::SS, at::DS, at::FS, at::GS] {
            put(at, &segment(0x92, 0, 0));
        }
        put(at::CS, &segment(0x9a, 0xf000, 0xffff_0000));
        put(at::GDTR, &segment(0, 0, 0));
        put(at::IDTR, &segment(0, 0, 0));
        put(at::LDTR, &segment(0x82, 0, 0));
        put(at::TR, &segment(0x83, 0, 0));
        for (at, value) in [
            (at::EFER, EFER_SVME),
            (at::CR4, CR4_MCE),
            (at::CR0, CR0_ET),
            (at::DR7, DR7_FIXED),
            (at::DR6, 0xffff_0ff0),
            (at::RFLAGS, 2),
            (at::RIP, 0xfff0),
            (at::G_PAT, 0x0007_0406_0007_0406),
            (at::RDX, 0x600),
            (at::SEV_FEATURES, 1),
            (at::XCR0, XCR0_X87),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(at::MXCSR, &0x1f80u32.to_le_bytes());
        put(at::X87_FCW, &0x37fu16.to_le_bytes());
        Self::new(page)
    }

    /// SHA-384 of the page.
    #[must_use]
    pub fn sha384(&self) -> Sha {
        super::digest::sha384(self.bytes())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A state that KVM takes.
    pub(crate) fn startable() -> [u8; PAGE as usize] {
        let mut page = *Vmsa::of_reset().bytes();
        page[at::CR0..at::CR0 + 8].copy_from_slice(&0x8001_0031u64.to_le_bytes());
        page[at::CR3..at::CR3 + 8].copy_from_slice(&(0xc000u64 | 1 << 47).to_le_bytes());
        page[at::EFER..at::EFER + 8].copy_from_slice(&0x1500u64.to_le_bytes());
        page[at::RDX..at::RDX + 8].fill(0);
        page
    }

    #[test]
    fn a_startable_state_is_taken_and_its_registers_reach_kvm() {
        let mut page = startable();
        page[at::RIP..at::RIP + 8].copy_from_slice(&0x1_0000u64.to_le_bytes());
        page[at::R8 + 0x38] = 9;
        page[at::CS + 2..at::CS + 4].copy_from_slice(&0xa9bu16.to_le_bytes());
        let vmsa = Vmsa::new(page);
        vmsa.check_importable().unwrap();
        let mut sregs = kvm_sregs::default();
        vmsa.set_sregs(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.g, sregs.cs.type_, sregs.cs.present), (1, 1, 11, 1));
        assert_eq!((sregs.cr0, sregs.efer, sregs.cr3 >> 47), (0x8001_0031, 0x500, 1));
        assert_eq!((vmsa.regs().rip, vmsa.regs().r15), (0x1_0000, 9));
        assert_eq!((vmsa.fpu().fcw, vmsa.fpu().mxcsr), (0x37f, 0x1f80));
    }

    #[test]
    fn rejects_vmsa_state_kvm_cannot_import() {
        let with = |at: usize, bytes: &[u8]| {
            let mut page = startable();
            page[at..at + bytes.len()].copy_from_slice(bytes);
            Vmsa::new(page).check_importable().unwrap_err()
        };
        assert!(matches!(with(at::CR0, &[0x21]), VmsaError::Forced { field: "CR0", .. }));
        assert!(matches!(with(at::CR4, &[0x20]), VmsaError::Forced { field: "CR4", .. }));
        assert!(matches!(with(at::EFER, &[0, 5]), VmsaError::Forced { field: "EFER", .. }));
        assert!(matches!(with(at::SEV_FEATURES, &[0]), VmsaError::Forced { .. }));
        assert!(matches!(with(at::SEV_FEATURES, &[3]), VmsaError::Wrong { field: "SEV_FEATURES", .. }));
        for (at, what) in [
            (0xa0, "CET state"),
            (0x1e8, "shadow stacks"),
            (0x2e8, "PKRU"),
            (0x470, "x87, MMX or vector registers"),
            (0x66f, "x87, MMX or vector registers"),
            (0x40d, "the x87 tag word"),
            (0x3cf, "a virtual top of memory"),
            (0x66, "a GDT limit over 64 KiB"),
            (0x86, "an IDT limit over 64 KiB"),
        ] {
            assert_eq!(with(at, &[1]), VmsaError::NotImportable(what), "{at:#x}");
        }
        for at in [0xca, 0xcb, 0x160, 0x3f0 - 8, 0x670, 0xfff, 0xd8, 0x3a8] {
            assert!(matches!(with(at, &[2]), VmsaError::Wrong { .. }), "{at:#x}");
        }
    }
}
