//! Firmware status codes (AMD 56860 and `include/uapi/linux/psp-sev.h`), by name and with what to do about them.

/// The code's name.
#[must_use]
pub fn name(status: u32) -> &'static str {
    match status {
        0x00 => "SUCCESS",
        0x01 => "INVALID_PLATFORM_STATE",
        0x02 => "INVALID_GUEST_STATE",
        0x03 => "INVALID_CONFIG",
        0x04 => "INVALID_LEN",
        0x05 => "ALREADY_OWNED",
        0x06 => "INVALID_CERTIFICATE",
        0x07 => "POLICY_FAILURE",
        0x08 => "INACTIVE",
        0x09 => "INVALID_ADDRESS",
        0x0a => "BAD_SIGNATURE",
        0x0b => "BAD_MEASUREMENT",
        0x0c => "ASID_OWNED",
        0x0d => "INVALID_ASID",
        0x0e => "WBINVD_REQUIRED",
        0x0f => "DFFLUSH_REQUIRED",
        0x10 => "INVALID_GUEST",
        0x11 => "INVALID_COMMAND",
        0x12 => "ACTIVE",
        0x13 => "HWSEV_RET_PLATFORM",
        0x14 => "HWSEV_RET_UNSAFE",
        0x15 => "UNSUPPORTED",
        0x16 => "INVALID_PARAM",
        0x17 => "RESOURCE_LIMIT",
        0x18 => "SECURE_DATA_INVALID",
        0x19 => "INVALID_PAGE_SIZE",
        0x1a => "INVALID_PAGE_STATE",
        0x1b => "INVALID_MDATA_ENTRY",
        0x1c => "INVALID_PAGE_OWNER",
        0x1d => "AEAD_OFLOW",
        0x1f => "EXIT_RING_BUFFER",
        0x20 => "RMP_INIT_REQUIRED",
        0x21 => "BAD_SVN",
        0x22 => "BAD_VERSION",
        0x23 => "SHUTDOWN_REQUIRED",
        0x24 => "UPDATE_FAILED",
        0x25 => "RESTORE_REQUIRED",
        0x26 => "RMP_INITIALIZATION_FAILED",
        0x27 => "INVALID_KEY",
        _ => "unknown status",
    }
}

/// INVALID_PARAM: what a CPUID page gets that the firmware corrected.
pub const INVALID_PARAM: u32 = 0x16;

/// What a user can do.
#[must_use]
pub fn remedy(status: u32, errno: i32) -> &'static str {
    match (status, errno) {
        (0x07, _) => "the policy asks for what this platform does not allow: see --policy",
        (0x0a, _) => "the ID block's signature is wrong: build the image again with its --id-key",
        (0x0b, _) => {
            "the image or the number of processors is not the one that the ID block was signed for: see coffer-image measure"
        }
        (0x17, _) | (_, libc::ENOSPC) => {
            "all SNP guests that the host can hold are running: end one, or raise the number of ASIDs in the BIOS"
        }
        (0x19..=0x1c, _) | (_, libc::EEXIST) => {
            "the page belongs to a guest already: this is a fault of the VMM, report it"
        }
        (0x01 | 0x20 | 0x23 | 0x26, _) => {
            "the platform is not initialised for SNP: load ccp and kvm_amd again, or reboot"
        }
        (_, libc::ENOTTY) => {
            "this kernel's KVM has no SEV-SNP: Linux 6.11 or newer with CONFIG_KVM_AMD_SEV is needed"
        }
        (_, libc::EBUSY | libc::EAGAIN) => "the security processor is busy: try again",
        (_, libc::EACCES | libc::EPERM) => "no right to use /dev/sev: add the user to its group",
        (_, libc::ENOMEM) => "the host has no memory left",
        _ => "run coffer doctor on the host",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_of_the_kernels_header_has_a_name() {
        // psp-sev.h, sev_ret_code of Linux 6.12: 0 to 0x17 and on to SEV_RET_INVALID_KEY, 0x1e not used.
        for status in (0..=0x27).filter(|s| *s != 0x1e) {
            assert_ne!(name(status), "unknown status", "{status:#x}");
        }
        assert_eq!(name(0x1e), "unknown status");
    }
}
