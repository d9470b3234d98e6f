//! Evidence that proves nothing: what upstream uses without a TEE, and we with `--tee none`.

use serde_json::{Value, json};

use super::{Attester, EvidenceError};
use crate::encoding::to_base64;

/// Instead of a TEE.
#[derive(Clone, Copy, Debug)]
pub struct Sample;

/// Instead of a device.
#[derive(Clone, Copy, Debug)]
pub struct SampleDevice;

impl Attester for Sample {
    fn tee(&self) -> &'static str {
        "sample"
    }

    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError> {
        Ok(json!({ "svn": "1", "report_data": to_base64(report_data) }))
    }
}

impl Attester for SampleDevice {
    fn tee(&self) -> &'static str {
        "sampledevice"
    }

    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError> {
        Ok(json!({ "svn": "2", "report_data": to_base64(report_data) }))
    }
}
