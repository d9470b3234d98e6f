//! Messages to the hypervisor: the MSR protocol and one exit (AMD 56421, revision 2.03, tables 3 to 6).
//!
//! Owns: requests, and what of an answer is acceptable. The hypervisor may answer anything.

use coffer_layout::{boot::Refusal, snp::GHCB};

/// SEV information: protocol versions and the C-bit.
pub const INFORMATION_REQUEST: u64 = 0x002;
const INFORMATION_RESPONSE: u64 = 0x001;
/// Hypervisor features.
pub const FEATURES_REQUEST: u64 = 0x080;
const FEATURES_RESPONSE: u64 = 0x081;
/// Registers [`GHCB`].
pub const REGISTRATION_REQUEST: u64 = GHCB | 0x012;
const REGISTRATION_RESPONSE: u64 = GHCB | 0x013;

const VERSION: u64 = 2;
const FEATURE_SNP: u64 = 1;
const FEATURE_AP_CREATION: u64 = 2;

/// Protocol version 2 must be offered; another C-bit than the image's is refused.
///
/// # Errors
/// [`Refusal::GhcbProtocol`], [`Refusal::CBit`].
pub fn check_protocol(answer: u64, c_bit: u32) -> Result<(), Refusal> {
    let (least, most) = (answer >> 32 & 0xffff, answer >> 48);
    if answer & 0xfff != INFORMATION_RESPONSE || !(least..=most).contains(&VERSION) {
        return Err(Refusal::GhcbProtocol);
    }
    if answer >> 24 & 0xff != u64::from(c_bit) {
        return Err(Refusal::CBit);
    }
    Ok(())
}

/// SEV-SNP, and AP creation when there are APs.
///
/// # Errors
/// [`Refusal::HypervisorFeatures`].
pub fn check_features(answer: u64, processors: u32) -> Result<(), Refusal> {
    let needed = if processors > 1 { FEATURE_SNP | FEATURE_AP_CREATION } else { FEATURE_SNP };
    if answer & 0xfff != FEATURES_RESPONSE || answer >> 12 & needed != needed {
        return Err(Refusal::HypervisorFeatures);
    }
    Ok(())
}

/// The hypervisor repeats the address.
///
/// # Errors
/// [`Refusal::GhcbRegistration`].
pub fn check_registration(answer: u64) -> Result<(), Refusal> {
    if answer == REGISTRATION_RESPONSE { Ok(()) } else { Err(Refusal::GhcbRegistration) }
}

const RAX: u16 = 0x1f8;
const EXIT_CODE: u16 = 0x390;
/// Offset of `sw_exit_info_1`, which the hypervisor answers in.
pub const EXIT_INFO_1: u16 = 0x398;
const EXIT_INFO_2: u16 = 0x3a0;
const VALID_BITMAP: u16 = 0x3f0;
/// Protocol version (u16 at 0xffa) and usage (u32 at 0xffc), in the page's last word.
const VERSION_AND_USAGE: u16 = 0xff8;

const EXIT_IOIO: u64 = 0x7b;
/// IOIO information: one byte, 64-bit addresses, out.
const OUT_BYTE: u64 = 1 << 4 | 1 << 9;

/// The fields of an exit that writes a byte to a port.
#[must_use]
pub fn port_write(port: u16, byte: u8) -> [(u16, u64); 7] {
    // One bit for each eight bytes of the save area that hold something.
    let valid = |offset: u16| 1u128 << (offset / 8);
    let bitmap = valid(RAX) | valid(EXIT_CODE) | valid(EXIT_INFO_1) | valid(EXIT_INFO_2);
    [
        (RAX, u64::from(byte)),
        (EXIT_CODE, EXIT_IOIO),
        (EXIT_INFO_1, u64::from(port) << 16 | OUT_BYTE),
        (EXIT_INFO_2, 0),
        (VALID_BITMAP, bitmap as u64),
        (VALID_BITMAP + 8, (bitmap >> 64) as u64),
        (VERSION_AND_USAGE, VERSION << 16),
    ]
}

/// The low half of `sw_exit_info_1` must be zero: no error, no exception to raise.
///
/// # Errors
/// [`Refusal::GhcbExit`].
pub fn check_exit(exit_info_1: u64) -> Result<(), Refusal> {
    if exit_info_1 as u32 == 0 { Ok(()) } else { Err(Refusal::GhcbExit) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvms_answers_are_accepted() {
        // Linux 6.12 KVM: versions 1 to 2, C-bit 51.
        assert_eq!(check_protocol(2 << 48 | 1 << 32 | 51 << 24 | 1, 51), Ok(()));
        // GHCB_HV_FT_SNP | GHCB_HV_FT_SNP_AP_CREATION.
        assert_eq!(check_features(3 << 12 | 0x81, 4), Ok(()));
        assert_eq!(check_features(1 << 12 | 0x81, 1), Ok(()));
        assert_eq!(check_registration(0xc000_0013), Ok(()));
        assert_eq!(check_exit(0xdead_0000_0000), Ok(()));
    }

    #[test]
    fn other_answers_are_refused_in_their_own_words() {
        for answer in [
            0,
            0x002,
            1 << 48 | 1 << 32 | 51 << 24 | 1,
            4 << 48 | 3 << 32 | 51 << 24 | 1,
            2 << 48 | 1 << 32 | 51 << 24 | 0x101,
        ] {
            assert_eq!(check_protocol(answer, 51), Err(Refusal::GhcbProtocol), "{answer:#x}");
        }
        assert_eq!(check_protocol(2 << 48 | 1 << 32 | 47 << 24 | 1, 51), Err(Refusal::CBit));
        assert_eq!(check_features(1 << 12 | 0x81, 2), Err(Refusal::HypervisorFeatures));
        assert_eq!(check_features(2 << 12 | 0x81, 1), Err(Refusal::HypervisorFeatures));
        assert_eq!(check_features(3 << 12 | 0x80, 1), Err(Refusal::HypervisorFeatures));
        for answer in [!0xfff | 0x013, 0xc000_1013, 0xc000_0012, 0] {
            assert_eq!(check_registration(answer), Err(Refusal::GhcbRegistration));
        }
        assert_eq!(check_exit(2), Err(Refusal::GhcbExit));
    }

    #[test]
    fn a_port_write_is_as_linux_has_it() {
        let mut page = [0u8; 4096];
        for (at, value) in port_write(0x80, 0xc1) {
            page[usize::from(at)..usize::from(at) + 8].copy_from_slice(&value.to_le_bytes());
        }
        // struct ghcb of Linux's <asm/svm.h>, offsets by hand: rax, exit code and infos, valid_bitmap, version, usage.
        assert_eq!(page[0x1f8], 0xc1);
        assert_eq!(&page[0x390..0x398], &[0x7b, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&page[0x398..0x39c], &[0x10, 2, 0x80, 0]);
        let set: Vec<usize> = (0..128).filter(|bit| page[0x3f0 + bit / 8] >> (bit % 8) & 1 == 1).collect();
        assert_eq!(set, [0x1f8 / 8, 0x390 / 8, 0x398 / 8, 0x3a0 / 8]);
        assert_eq!(&page[0xffa..], &[2, 0, 0, 0, 0, 0]);
    }
}
