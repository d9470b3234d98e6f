//! Evidence: what a TEE says about the guest, with the KBS's nonce and the TEE key inside.
//!
//! Owns: how report data is made, and an attester for each TEE. Does not own: checking evidence (`verify`).
//!
//! Source: guest-components `kbs_protocol/src/client/rcar_client.rs` and `attester/src/*`.

mod sample;
mod sev_guest;
mod silent;
mod tdx;
mod tsm;

pub use sample::{Sample, SampleDevice};
pub use sev_guest::Snp;
pub use silent::{Silent, kernel_tee};
pub use tdx::{Tdx, event_log};

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

use crate::{
    hash::{HashAlgorithm, canonical_json},
    key::PublicJwk,
};

/// No evidence could be made.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("evidence ({tee}): {stage}: {message}")]
pub struct EvidenceError {
    /// Which TEE.
    pub tee: &'static str,
    /// What was tried.
    pub stage: &'static str,
    /// What came of it.
    pub message: String,
}

/// Makes evidence for one TEE or device.
pub trait Attester: Send {
    /// Its name in the protocol.
    fn tee(&self) -> &'static str;

    /// Evidence that carries this: a digest, or at most 64 bytes of the workload's.
    ///
    /// # Errors
    /// [`EvidenceError`].
    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError>;

    /// What the host bound to the launch, where this TEE has such a field: HOST_DATA or MRCONFIGID by name.
    ///
    /// # Errors
    /// [`EvidenceError`].
    fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
        Ok(None)
    }
}

/// The field that initdata's digest is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BoundData {
    /// SNP.
    HostData([u8; 32]),
    /// TDX.
    MrConfigId([u8; 48]),
}

/// Everything that attests in this guest.
pub struct Attesters {
    /// The processor's.
    pub primary: Box<dyn Attester>,
    /// Devices', each of another kind.
    pub devices: Vec<Box<dyn Attester>>,
}

/// Evidence of processor and devices, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Composite {
    /// The processor's.
    pub primary_evidence: Value,
    /// JSON text: device to evidence; empty when there is no device.
    pub additional_evidence: String,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct RuntimeData<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    additional_evidence: Option<&'a str>,
    nonce: &'a str,
    tee_pubkey: &'a PublicJwk,
}

/// What the processor's evidence carries: the nonce, the TEE key, and the devices' evidence.
#[must_use]
pub fn primary_report_data(
    algorithm: HashAlgorithm,
    nonce: &str,
    key: &PublicJwk,
    additional: &str,
) -> Vec<u8> {
    let additional_evidence = Some(additional);
    algorithm.digest(&canonical_json(&RuntimeData { additional_evidence, nonce, tee_pubkey: key }))
}

/// What a device's evidence carries.
#[must_use]
pub fn device_report_data(algorithm: HashAlgorithm, nonce: &str, key: &PublicJwk) -> Vec<u8> {
    algorithm.digest(&canonical_json(&RuntimeData { additional_evidence: None, nonce, tee_pubkey: key }))
}

impl Attesters {
    /// One without devices.
    #[must_use]
    pub fn of(primary: impl Attester + 'static) -> Self {
        Self { primary: Box::new(primary), devices: Vec::new() }
    }

    /// Finds out where this runs: SNP, TDX, or nothing, for which the `sample` evidence stands. A TEE whose driver is not
    /// there is still a TEE: [`Silent`] stands for it, and nothing is trusted.
    #[must_use]
    pub fn probe() -> Self {
        let primary: Box<dyn Attester> = if let Some(snp) = Snp::probe() {
            Box::new(snp)
        } else if let Some(tdx) = Tdx::probe() {
            Box::new(tdx)
        } else if let Some(tee) = kernel_tee(Path::new("/")) {
            Box::new(Silent(tee))
        } else {
            Box::new(Sample)
        };
        Self { primary, devices: Vec::new() }
    }

    /// Evidence of everything, devices first, because the processor's covers theirs. The digests in it are of the algorithm that the KBS chose.
    ///
    /// # Errors
    /// [`EvidenceError`] of the first that has none.
    pub fn collect(
        &mut self,
        algorithm: HashAlgorithm,
        nonce: &str,
        key: &PublicJwk,
    ) -> Result<Composite, EvidenceError> {
        let digest = device_report_data(algorithm, nonce, key);
        let mut devices = BTreeMap::new();
        for device in &mut self.devices {
            devices.insert(device.tee(), device.evidence(&digest)?);
        }
        let additional_evidence = if devices.is_empty() {
            String::new()
        } else {
            serde_json::to_string(&devices).map_err(|e| EvidenceError {
                tee: "devices",
                stage: "write as JSON",
                message: e.to_string(),
            })?
        };
        let digest = primary_report_data(algorithm, nonce, key, &additional_evidence);
        Ok(Composite { primary_evidence: self.primary.evidence(&digest)?, additional_evidence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{encoding::to_hex, key::ECDH_ES_A256KW};

    /// The P-256 key of RFC 7517 appendix A.1, and a nonce of zeros.
    fn worked() -> (String, PublicJwk) {
        let key = PublicJwk::EC {
            crv: "P-256".into(),
            alg: ECDH_ES_A256KW.into(),
            x: "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4".into(),
            y: "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM".into(),
        };
        (crate::encoding::to_base64(&[0; 32]), key)
    }

    #[test]
    fn report_data_is_that_of_the_worked_vector() {
        let (nonce, key) = worked();
        let sha384 = HashAlgorithm::Sha384;
        assert_eq!(
            to_hex(&primary_report_data(sha384, &nonce, &key, "")),
            "1341202dde83ec1a934a297c4db4ce6f906acdb7d46d1dd9a9cc7081ff62bf4351d9731d2cf253c5b69005bde4d4592f"
        );
        assert_eq!(
            to_hex(&device_report_data(sha384, &nonce, &key)),
            "c384a9e6ebe921473845b44470202e43976a28d84977016c1db23755ed5ae995656081055ab94168aef66e2aa3ab79ce"
        );
    }

    /// Of the same text by sha256sum and sha512sum.
    #[test]
    fn report_data_is_by_the_algorithm_that_was_chosen() {
        let (nonce, key) = worked();
        assert_eq!(
            to_hex(&primary_report_data(HashAlgorithm::Sha256, &nonce, &key, "")),
            "4260620d2b1c435c36aad02267e5e9fe801ffe9398493daab475e783cf21c825"
        );
        assert_eq!(
            to_hex(&device_report_data(HashAlgorithm::Sha512, &nonce, &key)),
            "50f93ef1d4f9c0095acd55886b91759d4fb9843d8476926b7fc139c6d8fc800510701e301113aaf434d5a312df54417108ab8ddf47214c6df03d43e5cc6fbc04"
        );
    }

    #[test]
    fn devices_evidence_is_inside_the_processors() {
        let ((nonce, key), algorithm) = (worked(), HashAlgorithm::Sha384);
        let mut attesters = Attesters { primary: Box::new(Sample), devices: vec![Box::new(SampleDevice)] };
        let composite = attesters.collect(algorithm, &nonce, &key).unwrap();
        let devices: Value = serde_json::from_str(&composite.additional_evidence).unwrap();
        assert_eq!(devices["sampledevice"]["svn"], "2");
        let digest = crate::encoding::to_base64(&device_report_data(algorithm, &nonce, &key));
        assert_eq!(devices["sampledevice"]["report_data"], digest);
        let covered = primary_report_data(algorithm, &nonce, &key, &composite.additional_evidence);
        assert_eq!(composite.primary_evidence["report_data"], crate::encoding::to_base64(&covered));
        assert_ne!(covered, primary_report_data(algorithm, &nonce, &key, ""));
    }
}
