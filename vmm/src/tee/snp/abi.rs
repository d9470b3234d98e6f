//! Numbers and structures of SEV-SNP: KVM's uapi, the firmware ABI (AMD 56860), the GHCB protocol (AMD 56421).
//!
//! Owns: every raw integer and every layout. The structures are kvm-bindings'; their sizes and offsets are asserted here
//! against Linux's `arch/x86/include/uapi/asm/kvm.h` and `include/uapi/linux/kvm.h`, because the kernel copies that many bytes.

use std::mem::{offset_of, size_of};

pub use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_SNP_VM, kvm_create_guest_memfd,
    kvm_memory_attributes, kvm_sev_cmd, kvm_sev_init, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update, kvm_userspace_memory_region2,
};

/// KVM_SEV_INIT2.
pub const SEV_INIT2: u32 = 22;
/// KVM_SEV_SNP_LAUNCH_START.
pub const SNP_LAUNCH_START: u32 = 100;
/// KVM_SEV_SNP_LAUNCH_UPDATE.
pub const SNP_LAUNCH_UPDATE: u32 = 101;
/// KVM_SEV_SNP_LAUNCH_FINISH.
pub const SNP_LAUNCH_FINISH: u32 = 102;
/// KVM_SEV_SNP_ENABLE_REQ_CERTS, Linux 7.0.
pub const SNP_ENABLE_REQ_CERTS: u32 = 103;
/// KVM_HC_MAP_GPA_RANGE.
pub const HC_MAP_GPA_RANGE: u64 = 12;
/// KVM_EXIT_SNP_REQ_CERTS, Linux 7.0: `{gpa, npages, ret}` in kvm_run.
pub const EXIT_SNP_REQ_CERTS: u32 = 43;
/// KVM_SYSTEM_EVENT_SEV_TERM.
pub const SYSTEM_EVENT_SEV_TERM: u32 = 6;
/// KVM_MEMORY_EXIT_FLAG_PRIVATE.
pub const MEMORY_EXIT_PRIVATE: u64 = 1 << 3;
/// The GHCB version that Linux's guests speak.
pub const GHCB_VERSION: u16 = 2;

/// Bytes of an ID block.
pub const ID_BLOCK: usize = 96;
/// Bytes of an ID authentication structure.
pub const ID_AUTH: usize = 4096;

/// Policy bits that Linux's KVM checks: SMT allowed, always one, no migration agent, debugging, single socket.
pub mod policy {
    /// SMT is allowed.
    pub const SMT: u64 = 1 << 16;
    /// Must be one.
    pub const ONE: u64 = 1 << 17;
    /// The host may decrypt the guest.
    pub const DEBUG: u64 = 1 << 19;
    /// One socket only, which KVM refuses.
    pub const SINGLE_SOCKET: u64 = 1 << 20;
    /// Bits that KVM knows (SNP_POLICY_MASK_VALID: ABI version, SMT, one, debugging).
    pub const KNOWN: u64 = 0xffff | SMT | ONE | DEBUG;
}

/// SEV_STATUS and CPUID 0x8000001F.
pub const CPUID_SEV: u32 = 0x8000_001f;

const _: () = {
    assert!(size_of::<kvm_sev_cmd>() == 24 && offset_of!(kvm_sev_cmd, data) == 8);
    assert!(offset_of!(kvm_sev_cmd, error) == 16 && offset_of!(kvm_sev_cmd, sev_fd) == 20);
    assert!(size_of::<kvm_sev_init>() == 48 && offset_of!(kvm_sev_init, flags) == 8);
    assert!(offset_of!(kvm_sev_init, ghcb_version) == 12 && offset_of!(kvm_sev_init, pad2) == 16);
    assert!(size_of::<kvm_sev_snp_launch_start>() == 64);
    assert!(offset_of!(kvm_sev_snp_launch_start, gosvw) == 8);
    assert!(offset_of!(kvm_sev_snp_launch_start, flags) == 24);
    assert!(size_of::<kvm_sev_snp_launch_update>() == 64);
    assert!(offset_of!(kvm_sev_snp_launch_update, uaddr) == 8);
    assert!(offset_of!(kvm_sev_snp_launch_update, len) == 16);
    assert!(offset_of!(kvm_sev_snp_launch_update, type_) == 24);
    assert!(offset_of!(kvm_sev_snp_launch_update, flags) == 26);
    assert!(size_of::<kvm_sev_snp_launch_finish>() == 88);
    assert!(offset_of!(kvm_sev_snp_launch_finish, id_block_en) == 16);
    assert!(offset_of!(kvm_sev_snp_launch_finish, vcek_disabled) == 18);
    assert!(offset_of!(kvm_sev_snp_launch_finish, host_data) == 19);
    assert!(offset_of!(kvm_sev_snp_launch_finish, flags) == 54);
    assert!(size_of::<kvm_memory_attributes>() == 32);
    assert!(size_of::<kvm_create_guest_memfd>() == 64);
    assert!(size_of::<kvm_userspace_memory_region2>() == 160);
    assert!(offset_of!(kvm_userspace_memory_region2, guest_memfd_offset) == 32);
    assert!(offset_of!(kvm_userspace_memory_region2, guest_memfd) == 40);
};
