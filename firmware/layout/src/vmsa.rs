//! The VMSA: the page that holds an SEV-SNP processor's registers (AMD 24593, table B-4).
//!
//! Owns: where the fields lie, and the page that KVM measures for a processor nobody has set up. Does not own: the
//! first processor's, which is the image's.

use crate::{PAGE, snp};

/// A page of registers.
pub type Vmsa = [u8; PAGE as usize];

/// Offsets of fields, in bytes.
#[expect(missing_docs, reason = "the names are the processor's")]
pub mod field {
    pub const ES: usize = 0x00;
    pub const CS: usize = 0x10;
    pub const SS: usize = 0x20;
    pub const DS: usize = 0x30;
    pub const FS: usize = 0x40;
    pub const GS: usize = 0x50;
    pub const GDTR: usize = 0x60;
    pub const LDTR: usize = 0x70;
    pub const IDTR: usize = 0x80;
    pub const TR: usize = 0x90;
    pub const EFER: usize = 0xd0;
    pub const CR4: usize = 0x148;
    pub const CR3: usize = 0x150;
    pub const CR0: usize = 0x158;
    pub const DR7: usize = 0x160;
    pub const DR6: usize = 0x168;
    pub const RFLAGS: usize = 0x170;
    pub const RIP: usize = 0x178;
    pub const RSP: usize = 0x1d8;
    pub const RAX: usize = 0x1f8;
    pub const PAT: usize = 0x268;
    pub const RDX: usize = 0x310;
    pub const SEV_FEATURES: usize = 0x3b0;
    pub const XCR0: usize = 0x3e8;
    pub const MXCSR: usize = 0x408;
    pub const X87_FCW: usize = 0x410;
}

/// Writes a number at a field.
pub fn put(vmsa: &mut Vmsa, at: usize, value: u64) {
    vmsa[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Writes a segment register: selector, attributes (type, S, DPL, P in bits 0 to 7; AVL, L, D/B, G in 8 to 11), limit, base.
pub fn put_segment(vmsa: &mut Vmsa, at: usize, selector: u16, attributes: u16, limit: u32, base: u64) {
    put(vmsa, at, u64::from(selector) | u64::from(attributes) << 16 | u64::from(limit) << 32);
    put(vmsa, at + 8, base);
}

/// What KVM measures at SNP_LAUNCH_FINISH for each processor behind the first.
///
/// It is the state in which KVM_CREATE_VCPU leaves a processor (Linux 6.12 `init_vmcb` and `kvm_vcpu_reset`), the FPU as
/// FINIT has it. The digest holds only if the VMM sets neither general nor segment registers of such a processor. RDX is
/// 0x600 on every model, because at that moment KVM has no CPUID table from which to take the signature: one digest for
/// Milan, Genoa and Turin.
#[must_use]
pub fn reset() -> Vmsa {
    let mut vmsa = [0; PAGE as usize];
    for data in [field::ES, field::SS, field::DS, field::FS, field::GS] {
        put_segment(&mut vmsa, data, 0, 0x92, 0xffff, 0);
    }
    put_segment(&mut vmsa, field::CS, 0xf000, 0x9a, 0xffff, 0xffff_0000);
    put_segment(&mut vmsa, field::GDTR, 0, 0, 0xffff, 0);
    put_segment(&mut vmsa, field::IDTR, 0, 0, 0xffff, 0);
    put_segment(&mut vmsa, field::LDTR, 0, 0x82, 0xffff, 0);
    put_segment(&mut vmsa, field::TR, 0, 0x83, 0xffff, 0);
    for (at, value) in [
        // SVME, which KVM needs in the VMCB.
        (field::EFER, 0x1000),
        // MCE, which KVM takes from the host.
        (field::CR4, 0x40),
        // Extension type; KVM clears CD and NW.
        (field::CR0, 0x10),
        (field::DR7, 0x400),
        (field::DR6, 0xffff_0ff0),
        (field::RFLAGS, 2),
        (field::RIP, 0xfff0),
        (field::PAT, 0x0007_0406_0007_0406),
        (field::RDX, 0x600),
        (field::SEV_FEATURES, snp::SEV_FEATURE_SNP_ACTIVE),
        (field::XCR0, 1),
        (field::MXCSR, 0x1f80),
        (field::X87_FCW, 0x37f),
    ] {
        put(&mut vmsa, at, value);
    }
    vmsa
}
