//! TDX evidence: a quote through configfs, the firmware's event log, and what is bound to the launch.
//!
//! Owns: the JSON form, the event log's end, where MRCONFIGID is. Does not own: the quote's making, which the kernel does with the host's
//! quoting service; reading `outblob` waits for it, nothing polls.
//!
//! A quote comes from the host, and nobody here checks who signed it. MRCONFIGID is therefore read in the report that the TDX module itself
//! writes into this machine's memory.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::PathBuf,
};

use serde_json::{Value, json};

use super::{Attester, BoundData, EvidenceError, tsm::Tsm};
use crate::{encoding::to_base64, initdata::fit};

const EVENT_LOG: &str = "/sys/firmware/acpi/tables/data/CCEL";
const DEVICE: &str = "/dev/tdx_guest";
const LOG_END: [u8; 8] = [0xff; 8];

/// `<linux/tdx-guest.h>`, and TDREPORT_STRUCT of the TDX module's ABI specification.
mod abi {
    /// `struct tdx_report_req`.
    #[repr(C)]
    #[derive(Debug)]
    pub(super) struct Request {
        pub(super) data: [u8; 64],
        pub(super) report: [u8; 1024],
    }

    /// `TDX_CMD_GET_REPORT0`: _IOWR('T', 1, struct tdx_report_req).
    pub(super) const GET_REPORT: u64 = 0xc440_5401;
    /// The data that was asked for, in REPORTMACSTRUCT.
    pub(super) const DATA: usize = 128;
    /// TDINFO_STRUCT, after 256 bytes of REPORTMACSTRUCT, 239 of TEE_TCB_INFO and 17 reserved; in it ATTRIBUTES, XFAM, MRTD come first.
    pub(super) const MR_CONFIG_ID: usize = 512 + 8 + 8 + 48;

    const _: () = assert!(size_of::<Request>() == 0x440);
}

/// The one call of the device's driver.
type Ioctl = fn(&mut abi::Request) -> io::Result<()>;

/// Attests as a TD.
#[derive(Clone, Debug)]
pub struct Tdx {
    tsm: Tsm,
    event_log: PathBuf,
    ioctl: Ioctl,
}

fn failed(stage: &'static str) -> impl FnOnce(io::Error) -> EvidenceError {
    move |e| EvidenceError { tee: "tdx", stage, message: e.to_string() }
}

fn ioctl(request: &mut abi::Request) -> io::Result<()> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    // SAFETY: the kernel reads and writes a `Request`, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), abi::GET_REPORT, &raw mut *request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Tdx {
    /// True in a TD whose kernel can make quotes.
    #[must_use]
    pub fn probe() -> Option<Self> {
        let tsm = Tsm::default();
        (tsm.provider()? == "tdx_guest").then(|| Self { tsm, event_log: EVENT_LOG.into(), ioctl })
    }
}

impl Attester for Tdx {
    fn tee(&self) -> &'static str {
        "tdx"
    }

    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError> {
        let quote = self.tsm.report(&fit(report_data)).map_err(failed("quote through configfs"))?.out;
        let log = fs::read(&self.event_log).ok().map(|area| {
            let mut log = event_log(&area).to_vec();
            log.extend_from_slice(&LOG_END);
            to_base64(&log)
        });
        Ok(json!({ "cc_eventlog": log, "quote": to_base64(&quote) }))
    }

    fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
        let mut request = abi::Request { data: fit(b"what is bound to this launch"), report: [0; 1024] };
        (self.ioctl)(&mut request).map_err(failed("report through /dev/tdx_guest"))?;
        let (data, id) = (&request.report[abi::DATA..][..64], &request.report[abi::MR_CONFIG_ID..][..48]);
        if data != request.data {
            return Err(failed("read the report")(io::Error::other(
                "it carries other data than was asked for",
            )));
        }
        Ok(Some(BoundData::MrConfigId(fit(id))))
    }
}

/// The log's own bytes at the start of the ACPI area, which is filled up with zeros or 0xff. The end is found by walking
/// the events: the last one's data may itself end in zeros. A log that breaks off is given as far as it is whole.
#[must_use]
pub fn event_log(area: &[u8]) -> &[u8] {
    &area[..log_length(area)]
}

fn log_length(area: &[u8]) -> usize {
    let word =
        |at: usize| area.get(at..at.checked_add(4)?)?.try_into().ok().map(|b| u32::from_le_bytes(b) as usize);
    // The first event has the old form: register, type, SHA-1 digest, length, data.
    let Some(length) = word(28) else { return 0 };
    let Some(mut end) = 32usize.checked_add(length).filter(|end| *end <= area.len()) else { return 0 };
    while let (Some(register), Some(kind)) = (word(end), word(end + 4)) {
        if (register, kind) == (0, 0) || register == 0xffff_ffff {
            break;
        }
        let Some(next) = event_end(area, end) else { break };
        end = next;
    }
    end
}

/// Register, type, count of digests, each with its algorithm, length, data.
fn event_end(area: &[u8], start: usize) -> Option<usize> {
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(area.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize)
    };
    let mut at = start.checked_add(12)?;
    for _ in 0..word(start + 8)?.min(16) {
        let size = match area.get(at..at.checked_add(2)?)? {
            [0x04, 0] => 20,
            [0x0b | 0x12, 0] => 32,
            [0x0c, 0] => 48,
            [0x0d, 0] => 64,
            _ => return None,
        };
        at = at.checked_add(2 + size)?;
    }
    let end = at.checked_add(4)?.checked_add(word(at)?)?;
    (end <= area.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log() -> Vec<u8> {
        let mut log = vec![0; 28];
        log[4] = 3;
        log.extend_from_slice(&4u32.to_le_bytes());
        log.extend_from_slice(b"spec");
        for data in [b"one".as_slice(), b"two\0\0\0"] {
            log.extend_from_slice(&1u32.to_le_bytes());
            log.extend_from_slice(&6u32.to_le_bytes());
            log.extend_from_slice(&1u32.to_le_bytes());
            log.extend_from_slice(&[0x0c, 0]);
            log.extend_from_slice(&[9; 48]);
            log.extend_from_slice(&(data.len() as u32).to_le_bytes());
            log.extend_from_slice(data);
        }
        log
    }

    #[test]
    fn the_end_of_the_log_is_found_in_either_filling() {
        let log = log();
        for filling in [0, 0xff] {
            let mut area = log.clone();
            area.resize(4096, filling);
            assert_eq!(event_log(&area), log);
        }
        assert_eq!(event_log(&log), log);
    }

    const QUOTE: &[u8] = include_bytes!("../../testdata/tdx/tdx_quote_4.dat");
    /// Of REPORTDATA in a quote of version 4: a header of 48 bytes, then the body.
    const DATA: std::ops::Range<usize> = 48 + 520..48 + 584;

    /// What upstream's verifier reads in the quote and the log.
    fn expected() -> Value {
        serde_json::from_str(include_str!("../../testdata/tdx/parse_tdx_claims_expected.json")).unwrap()
    }

    fn ccel() -> Vec<u8> {
        use std::io::Read;
        let mut area = Vec::new();
        let packed = include_bytes!("../../testdata/tdx/CCEL_data.gz").as_slice();
        flate2::read::GzDecoder::new(packed).read_to_end(&mut area).unwrap();
        area
    }

    fn entry(path: &std::path::Path) -> io::Result<()> {
        crate::evidence::tsm::testing::entry(path, "tdx_guest", &[], |data| {
            let mut quote = QUOTE.to_vec();
            quote[DATA].copy_from_slice(data);
            quote
        })
    }

    #[test]
    fn a_real_log_ends_where_its_last_event_does() {
        let area = ccel();
        let log = event_log(&area);
        // Ten thousand bytes of a megabyte of zeros; the last event's own data end in zeros as well.
        assert_eq!((area.len(), log.len()), (1 << 20, 9822));
        assert!(area[log.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn evidence_is_the_quote_over_what_was_asked_for_and_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let event_log = dir.path().join("CCEL");
        fs::write(&event_log, ccel()).unwrap();
        let root = dir.path().join("tsm");
        fs::create_dir(&root).unwrap();
        let mut tdx = Tdx { tsm: Tsm::of(&root, entry), event_log, ioctl: |_| Ok(()) };
        assert_eq!(tdx.tsm.provider().as_deref(), Some("tdx_guest"));
        let evidence = tdx.evidence(&[7; 48]).unwrap();
        let bytes = |name: &str| crate::encoding::from_base64(evidence[name].as_str().unwrap()).unwrap();
        let quote = bytes("quote");
        assert_eq!((&quote[DATA][..48], &quote[DATA][48..]), (&[7; 48][..], &[0; 16][..]));
        // The fields of the body are where upstream reads them.
        let body = &expected()["quote"]["body"];
        for (name, at, length) in [("mr_td", 136, 48), ("mr_config_id", 184, 48), ("rtmr_0", 328, 48)] {
            let found = crate::encoding::to_hex(&quote[48 + at..48 + at + length]);
            assert_eq!(body[name], found, "{name}");
        }
        let log = bytes("cc_eventlog");
        assert_eq!((log.len(), &log[log.len() - 8..]), (9822 + 8, &[0xff; 8][..]));
        fs::remove_file(&tdx.event_log).unwrap();
        assert_eq!(tdx.evidence(&[7; 48]).unwrap()["cc_eventlog"], Value::Null);
    }

    #[test]
    fn what_is_bound_to_the_launch_is_the_modules_word() {
        let of = |ioctl: Ioctl| Tdx { tsm: Tsm::default(), event_log: PathBuf::new(), ioctl }.bound_data();
        let bound = of(|request| {
            request.report[128..192].copy_from_slice(&request.data);
            request.report[576..624].copy_from_slice(&[9; 48]);
            request.report[624..].fill(1);
            Ok(())
        });
        assert_eq!(bound, Ok(Some(BoundData::MrConfigId([9; 48]))));
        let other = of(|_| Ok(())).unwrap_err().to_string();
        assert!(other.contains("other data than was asked for"), "{other}");
        let none = of(|_| Err(io::ErrorKind::NotFound.into())).unwrap_err().to_string();
        assert!(none.starts_with("evidence (tdx): report through /dev/tdx_guest: "), "{none}");
    }

    proptest! {
        #[test]
        fn any_area_has_a_log_or_none(area in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(event_log(&area).len() <= area.len());
        }
    }
}
