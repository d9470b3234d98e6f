//! TDX evidence: a quote through configfs, and the firmware's event log.
//!
//! Owns: the JSON form, the event log's end. Does not own: the quote's making, which the kernel does with the host's
//! quoting service; reading `outblob` waits for it, nothing polls.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{Attester, BoundData, EvidenceError, tsm};
use crate::{encoding::to_base64, initdata::fit};

const EVENT_LOG: &str = "/sys/firmware/acpi/tables/data/CCEL";
const LOG_END: [u8; 8] = [0xff; 8];
/// Offset of the TD report's body in a quote of version 4, and of MRCONFIGID in the body.
const QUOTE_BODY: usize = 48;
const MR_CONFIG_ID: usize = 184;

/// Attests as a TD.
#[derive(Clone, Copy, Debug)]
pub struct Tdx;

fn failed(stage: &'static str) -> impl FnOnce(std::io::Error) -> EvidenceError {
    move |e| EvidenceError { tee: "tdx", stage, message: e.to_string() }
}

impl Tdx {
    /// True in a TD whose kernel can make quotes.
    #[must_use]
    pub fn probe() -> Option<Self> {
        (tsm::provider(Path::new(tsm::ROOT))? == "tdx_guest").then_some(Self)
    }

    fn quote(report_data: &[u8; 64]) -> Result<Vec<u8>, EvidenceError> {
        tsm::report(Path::new(tsm::ROOT), report_data)
            .map(|b| b.out)
            .map_err(failed("quote through configfs"))
    }
}

impl Attester for Tdx {
    fn tee(&self) -> &'static str {
        "tdx"
    }

    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError> {
        let quote = Self::quote(&fit(report_data))?;
        let log = fs::read(EVENT_LOG).ok().map(|area| {
            let mut log = event_log(&area).to_vec();
            log.extend_from_slice(&LOG_END);
            to_base64(&log)
        });
        Ok(json!({ "cc_eventlog": log, "quote": to_base64(&quote) }))
    }

    fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
        let quote = Self::quote(&[0; 64])?;
        mr_config_id(&quote).map(|id| Some(BoundData::MrConfigId(id))).ok_or_else(|| EvidenceError {
            tee: "tdx",
            stage: "read MRCONFIGID",
            message: format!("quote of {} bytes, version not 4 or 5", quote.len()),
        })
    }
}

/// MRCONFIGID of a quote of version 4 or 5; the latter has a descriptor of six bytes before the body.
#[must_use]
pub fn mr_config_id(quote: &[u8]) -> Option<[u8; 48]> {
    let body = match u16::from_le_bytes([*quote.first()?, *quote.get(1)?]) {
        4 => QUOTE_BODY,
        5 => QUOTE_BODY + 6,
        _ => return None,
    };
    quote.get(body + MR_CONFIG_ID..body + MR_CONFIG_ID + 48)?.try_into().ok()
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

    #[test]
    fn a_quote_of_another_version_has_no_config_id() {
        let mut quote = vec![0; 700];
        quote[0] = 4;
        quote[48 + 184] = 7;
        assert_eq!(mr_config_id(&quote).unwrap()[0], 7);
        quote[0] = 5;
        assert_eq!(mr_config_id(&quote).unwrap()[0], 0);
        quote[0] = 3;
        assert_eq!(mr_config_id(&quote), None);
    }

    proptest! {
        #[test]
        fn any_area_has_a_log_or_none(area in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(event_log(&area).len() <= area.len());
            let _ = mr_config_id(&area);
        }
    }
}
