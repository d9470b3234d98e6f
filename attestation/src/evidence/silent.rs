//! A TEE that cannot attest: the kernel says that it runs in one, and no driver makes reports.
//!
//! Owns: failing closed. Without this such a guest would pass for one without a TEE, with `sample` evidence and an open policy.

use std::{fs, path::Path};

use serde_json::Value;

use super::{Attester, BoundData, EvidenceError};

/// The TEE that the kernel found at boot, whatever drivers it has.
///
/// Source: Linux, arch/x86/coco/sev/core.c (`sev_sysfs_init`: only an SNP guest has `cpu/sev`), the CPU flag `tdx_guest`, and
/// arch/s390/kernel/uv.c (`prot_virt_guest` is 1 in a guest of Secure Execution).
#[must_use]
pub fn kernel_tee(root: &Path) -> Option<&'static str> {
    if root.join("sys/devices/system/cpu/sev").exists() {
        return Some("snp");
    }
    if fs::read_to_string(root.join("sys/firmware/uv/prot_virt_guest")).is_ok_and(|text| text.trim() != "0") {
        return Some("se");
    }
    let cpus = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let flags = cpus.lines().filter(|line| line.starts_with("flags"));
    flags.flat_map(str::split_whitespace).any(|flag| flag == "tdx_guest").then_some("tdx")
}

/// Instead of a driver.
#[derive(Clone, Copy, Debug)]
pub struct Silent(
    /// The TEE's name in the protocol.
    pub &'static str,
);

impl Silent {
    fn error(self) -> EvidenceError {
        EvidenceError {
            tee: self.0,
            stage: "find the driver",
            message: "the kernel runs in a TEE and has neither configfs-tsm nor a report device: build the image with the \
                      smp profile's kernel"
                .to_owned(),
        }
    }
}

impl Attester for Silent {
    fn tee(&self) -> &'static str {
        self.0
    }

    fn evidence(&mut self, _: &[u8]) -> Result<Value, EvidenceError> {
        Err(self.error())
    }

    fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
        Err(self.error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{evidence::Attesters, guest::Guest};

    #[test]
    fn the_kernel_tells_the_tee_without_any_driver() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(kernel_tee(root.path()), None);
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cpuinfo"), "flags\t\t: fpu tdx_guest_not sse\n").unwrap();
        assert_eq!(kernel_tee(root.path()), None);
        fs::write(root.path().join("proc/cpuinfo"), "flags\t\t: fpu tdx_guest sse\n").unwrap();
        assert_eq!(kernel_tee(root.path()), Some("tdx"));
        fs::create_dir_all(root.path().join("sys/firmware/uv")).unwrap();
        fs::write(root.path().join("sys/firmware/uv/prot_virt_guest"), "1\n").unwrap();
        assert_eq!(kernel_tee(root.path()), Some("se"));
        fs::create_dir_all(root.path().join("sys/devices/system/cpu/sev")).unwrap();
        assert_eq!(kernel_tee(root.path()), Some("snp"));
    }

    #[test]
    fn a_tee_that_cannot_attest_sets_up_no_pod() {
        let refused = Guest::new(None, Attesters::of(Silent("snp"))).err().unwrap().to_string();
        assert!(refused.contains("find the driver"), "{refused}");
    }
}
