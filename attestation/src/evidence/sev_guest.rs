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

use super::{Attester, BoundData, EvidenceError, tsm::Tsm};
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
    Configfs(Tsm),
    Device(PathBuf, Ioctl),
}

/// The one call of the device's driver.
type Ioctl = fn(&File, &mut abi::Request) -> io::Result<()>;

/// Attests as an SNP guest.
#[derive(Clone, Debug)]
pub struct Snp(Way);

impl Snp {
    /// Found when this is an SNP guest whose kernel can make reports.
    #[must_use]
    pub fn probe() -> Option<Self> {
        let tsm = Tsm::default();
        if tsm.provider().as_deref() == Some("sev_guest") {
            return Some(Self(Way::Configfs(tsm)));
        }
        Path::new(DEVICE).exists().then(|| Self(Way::Device(DEVICE.into(), ioctl)))
    }

    /// A report with this data inside, and the certificates that the host has for it.
    ///
    /// # Errors
    /// [`EvidenceError`].
    pub fn report(&self, data: &[u8; 64]) -> Result<(Report, Vec<Certificate>), EvidenceError> {
        let failed = |stage: &'static str, message: String| EvidenceError { tee: "snp", stage, message };
        let (report, table) = match &self.0 {
            Way::Configfs(tsm) => {
                let blobs = tsm.report(data).map_err(|e| failed("report through configfs", e.to_string()))?;
                (blobs.out, blobs.auxiliary)
            }
            Way::Device(path, ioctl) => device_report(path, *ioctl, data)
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
    #[derive(Debug)]
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

fn ioctl(device: &File, request: &mut abi::Request) -> io::Result<()> {
    // SAFETY: the kernel reads what `request` points to and writes to what else it points to, for which `device_report` vouches.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), abi::GET_EXT_REPORT, &raw mut *request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn device_report(path: &Path, ioctl: Ioctl, data: &[u8; 64]) -> io::Result<(Vec<u8>, Vec<u8>)> {
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
    // The driver reads `extended`, writes at most RESPONSE bytes to `response` and at most CERTIFICATES to `table`; all three live
    // until the call returns, and nobody else looks at them.
    if let Err(error) = ioctl(&device, &mut request) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        evidence::tsm::testing,
        verify::{Expected, Trust, verify_snp},
    };

    const REPORT: &[u8] = include_bytes!("../../testdata/snp/test-report.bin");
    const VCEK: &[u8] = include_bytes!("../../testdata/snp/test-vcek.der");
    /// Of REPORT_DATA in a report (SEV-SNP firmware ABI, table "ATTESTATION_REPORT").
    const DATA: std::ops::Range<usize> = 0x50..0x90;
    const HOST_DATA: std::ops::Range<usize> = 0xc0..0xe0;

    /// The report, over other data: signed only for its own.
    fn report(data: &[u8; 64]) -> Vec<u8> {
        let mut report = REPORT.to_vec();
        report[DATA].copy_from_slice(data);
        report
    }

    /// A table of certificates as the GHCB specification has it.
    fn table() -> Vec<u8> {
        let vcek =
            [0x63, 0xda, 0x75, 0x8d, 0xe6, 0x64, 0x45, 0x64, 0xad, 0xc5, 0xf4, 0xb9, 0x3b, 0xe8, 0xac, 0xcd];
        let entry = [48u32.to_le_bytes(), (VCEK.len() as u32).to_le_bytes()].concat();
        [&vcek[..], &entry, &[0; 24], VCEK].concat()
    }

    /// The driver, as `<linux/sev-guest.h>` says what it reads and writes.
    fn driver(request: &mut abi::Request, status: u32, size: u32, report: fn(&[u8; 64]) -> Vec<u8>) {
        assert_eq!((request.version, request.reserved), (1, [0; 7]));
        // SAFETY: `device_report` gives pointers to these, and waits.
        let (asked, response, certificates) = unsafe {
            let asked = &*(request.request as *const abi::ExtendedReport);
            assert!(asked.certificates_length >= 4096 && asked.certificates_length.is_multiple_of(4096));
            (
                asked,
                std::slice::from_raw_parts_mut(request.response as *mut u8, abi::RESPONSE),
                std::slice::from_raw_parts_mut(
                    asked.certificates as *mut u8,
                    asked.certificates_length as usize,
                ),
            )
        };
        assert_eq!(asked.vmpl, 0);
        response[..4].copy_from_slice(&status.to_le_bytes());
        response[4..8].copy_from_slice(&size.to_le_bytes());
        response[32..32 + REPORT.len()].copy_from_slice(&report(&asked.user_data));
        certificates[..table().len()].copy_from_slice(&table());
    }

    fn honest(_: &File, request: &mut abi::Request) -> io::Result<()> {
        driver(request, 0, REPORT.len() as u32, report);
        Ok(())
    }

    fn device(ioctl: Ioctl) -> Snp {
        Snp(Way::Device("/dev/null".into(), ioctl))
    }

    fn entry(path: &Path) -> io::Result<()> {
        testing::entry(path, "sev_guest\n", &table(), report)
    }

    #[test]
    fn evidence_of_either_way_holds_before_amds_certificates() {
        let root = tempfile::tempdir().unwrap();
        let tsm = Tsm::of(root.path(), entry);
        assert_eq!(tsm.provider().as_deref(), Some("sev_guest"));
        let trust = Trust::from_pem(include_str!("../../testdata/snp/milan_ask_ark_asvk.pem")).unwrap();
        let report_data: [u8; 64] = REPORT[DATA].try_into().unwrap();
        for mut snp in [device(honest), Snp(Way::Configfs(tsm))] {
            // A digest is filled up with zeros.
            let evidence = snp.evidence(&report_data[..48]).unwrap();
            assert_eq!(evidence["cert_chain"].as_array().map(Vec::len), Some(1));
            verify_snp(&evidence, &trust, &Expected { report_data, host_data: None }).unwrap();
            let bound = snp.bound_data().unwrap();
            assert_eq!(bound, Some(BoundData::HostData(REPORT[HOST_DATA].try_into().unwrap())));
        }
    }

    #[test]
    fn what_the_driver_or_the_firmware_refuses_is_said_with_its_numbers() {
        let message = |ioctl| device(ioctl).evidence(&[1; 48]).unwrap_err().to_string();
        let refused = message(|_, request| {
            (request.firmware_error, request.vmm_error) = (0x16, 2);
            Err(io::ErrorKind::PermissionDenied.into())
        });
        assert!(
            refused.contains("/dev/sev-guest") && refused.contains("(firmware 0x16, VMM 0x2)"),
            "{refused}"
        );
        let status = message(|_, request| {
            driver(request, 0x1f, REPORT.len() as u32, report);
            Ok(())
        });
        assert!(status.contains("status 0x1f"), "{status}");
        let long = message(|_, request| {
            driver(request, 0, 4000, report);
            Ok(())
        });
        assert!(long.contains("a report of 4000 bytes"), "{long}");
        let other = message(|_, request| {
            driver(request, 0, REPORT.len() as u32, |_| REPORT.to_vec());
            Ok(())
        });
        assert!(other.contains("it carries other data than was asked for"), "{other}");
        let none = Snp(Way::Device("/nowhere".into(), honest)).evidence(&[1; 48]).unwrap_err().to_string();
        assert!(none.contains("No such file"), "{none}");
    }
}
