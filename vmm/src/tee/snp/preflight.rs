//! Can this host start an SNP guest? What is missing, each with what to do, before anything of a guest is made.
//!
//! Owns: gathering facts and judging them; judging is pure. Does not own: KVM's later refusals.

use std::{
    arch::x86_64::__cpuid,
    fs::{self, File, OpenOptions},
    io,
    os::fd::AsRawFd,
};

use kvm_ioctls::Kvm;

use super::abi::CPUID_SEV;

/// Oldest firmware whose SNP ABI this VMM speaks.
const FIRMWARE: (u8, u8) = (1, 51);
/// KVM capabilities by number (`include/uapi/linux/kvm.h`), and what brings each.
const CAPABILITIES: [(u64, &str, &str); 5] = [
    (201, "KVM_CAP_EXIT_HYPERCALL", "Linux 5.19"),
    (231, "KVM_CAP_USER_MEMORY2", "Linux 6.8"),
    (232, "KVM_CAP_MEMORY_FAULT_INFO", "Linux 6.8"),
    (233, "KVM_CAP_MEMORY_ATTRIBUTES", "Linux 6.8 with CONFIG_KVM_AMD_SEV"),
    (234, "KVM_CAP_GUEST_MEMFD", "Linux 6.8 with CONFIG_KVM_AMD_SEV"),
];
const VM_TYPES: u64 = 235;
const SNP_VM_BIT: i32 = 1 << 4;

/// What was found out about a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// CPUID's vendor.
    pub vendor: String,
    /// CPUID 0x8000001F EAX, when there is such a leaf.
    pub sev_leaf: Option<u32>,
    /// kvm_amd's parameter `sev_snp`; `None` when the module is not loaded or too old.
    pub module: Option<bool>,
    /// Opening /dev/kvm.
    pub kvm: Result<Capabilities, i32>,
    /// Opening /dev/sev and asking for the firmware's status.
    pub firmware: Result<Firmware, DeviceError>,
}

/// What KVM offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Bit mask of KVM_CAP_VM_TYPES.
    pub vm_types: i32,
    /// Names of capabilities that are missing.
    pub missing: Vec<(&'static str, &'static str)>,
}

/// The firmware's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Firmware {
    /// API version.
    pub version: (u8, u8),
    /// SNP is initialised.
    pub initialised: bool,
}

/// Where asking the firmware failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// errno of opening /dev/sev.
    Open(i32),
    /// errno of SNP_PLATFORM_STATUS.
    Status(i32),
}

/// What is missing and what to do, one line each. Empty when an SNP guest can be started.
#[must_use]
pub fn judge(facts: &Facts) -> Vec<String> {
    let mut missing = Vec::new();
    let mut say = |text: String| missing.push(text);
    if facts.vendor != "AuthenticAMD" {
        say(format!("processor: {} has no SEV-SNP: an AMD EPYC 7003 or newer is needed", facts.vendor));
        return missing;
    }
    match facts.sev_leaf {
        Some(eax) if eax & 1 << 4 != 0 => {}
        Some(eax) if eax & 1 << 1 != 0 => say(
            "processor: it has SEV but not SEV-SNP: an EPYC 7003 or newer is needed, or SMEE and SNP are off in the BIOS".into(),
        ),
        _ => say("processor: CPUID shows no SEV: enable SMEE, SEV-ES and SEV-SNP (RMP coverage) in the BIOS; a guest of another hypervisor has none".into()),
    }
    match facts.module {
        Some(true) => {}
        Some(false) => say("kernel: kvm_amd runs with sev_snp=N: set SNP memory (RMP) coverage in the BIOS and boot with iommu on and without iommu=pt; see dmesg".into()),
        None => say("kernel: kvm_amd is not loaded or has no SEV-SNP: Linux 6.11 or newer with CONFIG_KVM_AMD_SEV is needed".into()),
    }
    match &facts.kvm {
        Err(errno) => say(format!(
            "/dev/kvm: {}: load kvm_amd, and add the user to the group kvm",
            io::Error::from_raw_os_error(*errno)
        )),
        Ok(kvm) => {
            if kvm.vm_types & SNP_VM_BIT == 0 {
                say("KVM: no VM type SNP: Linux 6.11 or newer with CONFIG_KVM_AMD_SEV, and kvm_amd with sev_snp=Y".into());
            }
            for (name, since) in &kvm.missing {
                say(format!("KVM: {name} is missing: {since} or newer is needed"));
            }
        }
    }
    match facts.firmware {
        Err(DeviceError::Open(libc::ENOENT)) => {
            say("/dev/sev: it is not there: load the module ccp, and enable the security processor in the BIOS".into());
        }
        Err(DeviceError::Open(libc::EACCES | libc::EPERM)) => {
            say("/dev/sev: no right to open it: add the user to the device's group, or chmod it".into());
        }
        Err(DeviceError::Open(errno)) => say(format!("/dev/sev: {}", io::Error::from_raw_os_error(errno))),
        Err(DeviceError::Status(errno)) => say(format!(
            "firmware: SNP_PLATFORM_STATUS: {}: update the BIOS or the kernel",
            io::Error::from_raw_os_error(errno)
        )),
        Ok(Firmware { version, initialised }) => {
            if version < FIRMWARE {
                let (major, minor) = version;
                say(format!(
                    "firmware: its API is {major}.{minor}, {}.{} or newer is needed: update the BIOS or amd_sev_*.sbin",
                    FIRMWARE.0, FIRMWARE.1
                ));
            }
            if !initialised {
                say("firmware: SNP is not initialised: load kvm_amd again, or reboot; see dmesg".into());
            }
        }
    }
    missing
}

/// Asks processor, kernel and firmware.
#[must_use]
pub fn facts() -> Facts {
    let basic = __cpuid(0);
    let vendor: Vec<u8> =
        [basic.ebx, basic.edx, basic.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
    let sev_leaf = (__cpuid(0x8000_0000).eax >= CPUID_SEV).then(|| __cpuid(CPUID_SEV).eax);
    let parameter = fs::read_to_string("/sys/module/kvm_amd/parameters/sev_snp");
    Facts {
        vendor: String::from_utf8_lossy(&vendor).into_owned(),
        sev_leaf,
        module: parameter.ok().map(|text| matches!(text.trim(), "Y" | "1")),
        kvm: Kvm::new().map(|kvm| capabilities(&kvm)).map_err(|e| e.errno()),
        firmware: firmware(),
    }
}

fn capabilities(kvm: &Kvm) -> Capabilities {
    let has = |number| kvm.check_extension_raw(number);
    let missing = CAPABILITIES.iter().filter(|(number, ..)| has(*number) <= 0);
    Capabilities {
        vm_types: has(VM_TYPES),
        missing: missing.map(|(_, name, since)| (*name, *since)).collect(),
    }
}

/// `struct sev_issue_cmd` of `include/uapi/linux/psp-sev.h`, packed.
#[repr(C, packed)]
struct IssueCommand {
    command: u32,
    data: u64,
    error: u32,
}

/// `struct sev_user_data_snp_status`, packed.
#[repr(C, packed)]
#[derive(Default)]
struct SnpStatus {
    api_major: u8,
    api_minor: u8,
    state: u8,
    rmp: u8,
    build: u32,
    mask: u32,
    guests: u32,
    current_tcb: u64,
    reported_tcb: u64,
}

const _: () = assert!(size_of::<IssueCommand>() == 16 && size_of::<SnpStatus>() == 32);

fn firmware() -> Result<Firmware, DeviceError> {
    const SEV_ISSUE_CMD: libc::c_ulong = 0xc010_5300;
    const SNP_PLATFORM_STATUS: u32 = 9;
    let errno = |e: io::Error| e.raw_os_error().unwrap_or(libc::EIO);
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/sev")
        .map_err(|e| DeviceError::Open(errno(e)))?;
    let mut status = SnpStatus::default();
    let mut command = IssueCommand { command: SNP_PLATFORM_STATUS, data: (&raw mut status) as u64, error: 0 };
    // SAFETY: the kernel reads the command and writes `status`, whose size is the uapi's; both live over the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), SEV_ISSUE_CMD, &raw mut command) };
    if done < 0 {
        return Err(DeviceError::Status(errno(io::Error::last_os_error())));
    }
    Ok(Firmware { version: (status.api_major, status.api_minor), initialised: status.state != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            vendor: "AuthenticAMD".into(),
            sev_leaf: Some(0x1a),
            module: Some(true),
            kvm: Ok(Capabilities { vm_types: 0x11, missing: vec![] }),
            firmware: Ok(Firmware { version: (1, 55), initialised: true }),
        }
    }

    #[test]
    fn a_host_with_everything_lacks_nothing() {
        assert_eq!(judge(&good()), Vec::<String>::new());
    }

    #[test]
    fn each_thing_that_is_missing_is_named_with_a_remedy() {
        let one = |change: fn(&mut Facts), start: &str| {
            let mut facts = good();
            change(&mut facts);
            let missing = judge(&facts);
            assert_eq!(missing.len(), 1, "{missing:?}");
            assert!(missing[0].starts_with(start), "{missing:?}");
        };
        one(|f| f.vendor = "GenuineIntel".into(), "processor: GenuineIntel");
        one(|f| f.sev_leaf = Some(0xa), "processor: it has SEV but not SEV-SNP");
        one(|f| f.sev_leaf = None, "processor: CPUID shows no SEV");
        one(|f| f.module = Some(false), "kernel: kvm_amd runs with sev_snp=N");
        one(|f| f.module = None, "kernel: kvm_amd is not loaded");
        one(|f| f.kvm = Err(libc::EACCES), "/dev/kvm: Permission denied");
        one(|f| f.kvm = Ok(Capabilities { vm_types: 1, missing: vec![] }), "KVM: no VM type SNP");
        one(
            |f| f.kvm = Ok(Capabilities { vm_types: 0x11, missing: vec![("X", "Linux 9")] }),
            "KVM: X is missing: Linux 9",
        );
        one(|f| f.firmware = Err(DeviceError::Open(libc::ENOENT)), "/dev/sev: it is not there");
        one(|f| f.firmware = Err(DeviceError::Open(libc::EACCES)), "/dev/sev: no right");
        one(|f| f.firmware = Err(DeviceError::Status(libc::EINVAL)), "firmware: SNP_PLATFORM_STATUS");
        one(
            |f| f.firmware = Ok(Firmware { version: (1, 50), initialised: true }),
            "firmware: its API is 1.50, 1.51 or newer is needed",
        );
        one(
            |f| f.firmware = Ok(Firmware { version: (1, 55), initialised: false }),
            "firmware: SNP is not initialised",
        );
    }
}
