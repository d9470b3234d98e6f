//! SNP evidence: through configfs where the kernel has it, else through `/dev/sev-guest`.
//!
//! Owns: asking for a report with the host's certificates. Does not own: the report's layout (`snp`).

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{Attester, BoundData, EvidenceError, tsm};
use crate::{
    initdata::fit,
    snp::{Certificate, Report, certificate_table, evidence_json},
};

const DEVICE: &str = "/dev/sev-guest";
/// Room for the host's certificates, in bytes; the kernel's own limit.
const CERTIFICATES: usize = 16 * 1024;

/// Which way reports come.
#[derive(Clone, Debug)]
enum Way {
    Configfs(PathBuf),
    Device(PathBuf),
}

/// Attests as an SNP guest.
#[derive(Clone, Debug)]
pub struct Snp(Way);

impl Snp {
    /// Found when this is an SNP guest whose kernel can make reports.
    #[must_use]
    pub fn probe() -> Option<Self> {
        if tsm::provider(Path::new(tsm::ROOT)).as_deref() == Some("sev_guest") {
            return Some(Self(Way::Configfs(tsm::ROOT.into())));
        }
        Path::new(DEVICE).exists().then(|| Self(Way::Device(DEVICE.into())))
    }

    /// A report with this data inside, and the certificates that the host has for it.
    ///
    /// # Errors
    /// [`EvidenceError`].
    pub fn report(&self, data: &[u8; 64]) -> Result<(Report, Vec<Certificate>), EvidenceError> {
        let failed = |stage: &'static str, message: String| EvidenceError { tee: "snp", stage, message };
        let (report, table) = match &self.0 {
            Way::Configfs(root) => {
                let blobs =
                    tsm::report(root, data).map_err(|e| failed("report through configfs", e.to_string()))?;
                (blobs.out, blobs.auxiliary)
            }
            Way::Device(path) => device_report(path, data)
                .map_err(|e| failed("report through /dev/sev-guest", e.to_string()))?,
        };
        let report = Report::from_bytes(&report).map_err(|e| failed("read the report", e.to_string()))?;
        if report.report_data() != *data {
            return Err(failed("read the report", "it carries other data than was asked for".into()));
        }
        // A host that gives rubbish for certificates gives none: the KBS looks for them elsewhere.
        Ok((report, certificate_table(&table).unwrap_or_default()))
    }
}

impl Attester for Snp {
    fn tee(&self) -> &'static str {
        "snp"
    }

    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError> {
        let (report, certificates) = self.report(&fit(report_data))?;
        Ok(evidence_json(&report, &certificates))
    }

    fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
        let (report, _) = self.report(&[0; 64])?;
        Ok(Some(BoundData::HostData(report.host_data())))
    }
}

/// The kernel's structures, from `<linux/sev-guest.h>`.
mod abi {
    /// `struct snp_guest_request_ioctl`.
    #[repr(C)]
    pub(super) struct Request {
        pub(super) version: u8,
        pub(super) reserved: [u8; 7],
        pub(super) request: u64,
        pub(super) response: u64,
        pub(super) firmware_error: u32,
        pub(super) vmm_error: u32,
    }

    /// `struct snp_ext_report_req`.
    #[repr(C)]
    pub(super) struct ExtendedReport {
        pub(super) user_data: [u8; 64],
        pub(super) vmpl: u32,
        pub(super) reserved: [u8; 28],
        pub(super) certificates: u64,
        pub(super) certificates_length: u32,
        pub(super) padding: u32,
    }

    /// Of `struct snp_report_resp`.
    pub(super) const RESPONSE: usize = 4000;
    /// Status, size and reserved bytes before the report in the response.
    pub(super) const REPORT_OFFSET: usize = 32;
    /// `SNP_GET_EXT_REPORT`: _IOWR('S', 2, struct snp_guest_request_ioctl).
    pub(super) const GET_EXT_REPORT: u64 = 0xc020_5302;

    const _: () = assert!(size_of::<Request>() == 32);
    const _: () = assert!(size_of::<ExtendedReport>() == 112);
}

fn device_report(path: &Path, data: &[u8; 64]) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let device = File::options().read(true).write(true).open(path)?;
    let mut table = vec![0u8; CERTIFICATES];
    let mut response = vec![0u8; abi::RESPONSE];
    let extended = abi::ExtendedReport {
        user_data: *data,
        vmpl: 0,
        reserved: [0; 28],
        certificates: table.as_mut_ptr() as u64,
        certificates_length: CERTIFICATES as u32,
        padding: 0,
    };
    let mut request = abi::Request {
        version: 1,
        reserved: [0; 7],
        request: &raw const extended as u64,
        response: response.as_mut_ptr() as u64,
        firmware_error: 0,
        vmm_error: 0,
    };
    // SAFETY: the kernel reads `extended`, writes at most RESPONSE bytes to `response` and at most CERTIFICATES to
    // `table`; all three live until the call returns, and nobody else looks at them.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), abi::GET_EXT_REPORT, &raw mut request) };
    if result < 0 {
        let error = io::Error::last_os_error();
        let (firmware, vmm) = (request.firmware_error, request.vmm_error);
        return Err(io::Error::other(format!("{error} (firmware {firmware:#x}, VMM {vmm:#x})")));
    }
    let word =
        |at: usize| u32::from_le_bytes([response[at], response[at + 1], response[at + 2], response[at + 3]]);
    let (status, size) = (word(0), word(4) as usize);
    if status != 0 {
        return Err(io::Error::other(format!("the firmware refused: status {status:#x}")));
    }
    let report = abi::REPORT_OFFSET.checked_add(size).and_then(|end| response.get(abi::REPORT_OFFSET..end));
    let report = report.ok_or_else(|| io::Error::other(format!("a report of {size} bytes")))?.to_vec();
    Ok((report, table))
}
