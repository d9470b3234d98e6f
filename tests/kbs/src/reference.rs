//! Reference values: what a launch has to be.
//!
//! Owns: the names that are known, those of upstream's SNP policy for the digest and all that `coffer-image measure
//! --reference-values` writes, and the comparison with a report. A name that nothing would be compared with is refused: its
//! owner would believe in a check that is not made. Does not own: how values come (`admin`), or signatures.

use std::collections::BTreeMap;

use coffer_attestation::{
    encoding::{from_hex, to_hex},
    snp::Report,
};
use serde_json::{Map, Value};

/// Names of the launch digest: upstream's in two ages, ours.
const DIGEST: [&str; 3] = ["measurement", "snp_launch_measurement", "coffer_snp_launch_measurement"];
const FAMILY: &str = "coffer_snp_cpuid_family";
const MODEL: &str = "coffer_snp_cpuid_model";
/// Followed by a component of the TCB version.
const MINIMUM: &str = "coffer_snp_minimum_";
const COMPONENTS: [&str; 4] = ["bootloader", "tee", "snp", "microcode"];

/// What is known. Of what nobody said, anything is good, which is for tests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reference {
    values: BTreeMap<String, Value>,
    measurements: Option<Vec<[u8; 48]>>,
    families: Option<Vec<u8>>,
    models: Option<Vec<u8>>,
    minimum: BTreeMap<&'static str, u8>,
}

impl Reference {
    /// Launch digests of the command line; none: any.
    pub(crate) fn new(measurements: Vec<[u8; 48]>) -> Self {
        Self { measurements: (!measurements.is_empty()).then_some(measurements), ..Self::default() }
    }

    /// As it was given.
    pub(crate) fn value(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// These values beside those of before. In a name given again the new value counts.
    pub(crate) fn with(&self, values: Map<String, Value>) -> Result<Self, String> {
        if values.keys().filter(|name| DIGEST.contains(&name.as_str())).count() > 1 {
            return Err(format!("the launch digest has one name: one of {}", DIGEST.join(", ")));
        }
        let mut new = self.clone();
        for (name, value) in values {
            let component = name.strip_prefix(MINIMUM).and_then(|c| COMPONENTS.iter().find(|k| **k == c));
            match (name.as_str(), component) {
                (name, _) if DIGEST.contains(&name) => {
                    DIGEST.iter().for_each(|other| drop(new.values.remove(*other)));
                    new.measurements = Some(list(name, &value, digest)?);
                }
                (FAMILY, _) => new.families = Some(list(FAMILY, &value, small)?),
                (MODEL, _) => new.models = Some(list(MODEL, &value, small)?),
                (name, Some(component)) => {
                    let least = small(&value).ok_or_else(|| wrong(name, &value))?;
                    new.minimum.insert(component, least);
                }
                (name, None) => {
                    return Err(format!(
                        "reference value {name:?}: nothing here is compared with it; known are {}, {FAMILY}, {MODEL}, {MINIMUM}… of {}",
                        DIGEST.join(", "),
                        COMPONENTS.join(", ")
                    ));
                }
            }
            new.values.insert(name, value);
        }
        Ok(new)
    }

    /// Compares a report, of which the signature holds.
    pub(crate) fn check(&self, report: &Report) -> Result<(), String> {
        let measurement = report.measurement();
        if self.measurements.as_ref().is_some_and(|good| !good.contains(&measurement)) {
            return Err(format!("measurement {} is no reference value", to_hex(&measurement)));
        }
        for (name, good, found) in
            [("CPUID family", &self.families, report.family()), ("CPUID model", &self.models, report.model())]
        {
            let Some(good) = good else { continue };
            let found =
                found.ok_or_else(|| format!("a report of version {} has no {name}", report.version()))?;
            if !good.contains(&found) {
                return Err(format!("{name} {found:#x} is no reference value"));
            }
        }
        for (name, found) in report.reported_tcb() {
            if let Some(least) = self.minimum.get(name).filter(|least| found < **least) {
                return Err(format!("reported TCB: {name} is {found}, at least {least} is wanted"));
            }
        }
        Ok(())
    }
}

fn wrong(name: &str, value: &Value) -> String {
    format!("reference value {name}: {value} is none")
}

/// One, or a list of them.
fn list<T>(name: &str, value: &Value, read: fn(&Value) -> Option<T>) -> Result<Vec<T>, String> {
    let all = match value {
        Value::Array(all) => all.as_slice(),
        one => std::slice::from_ref(one),
    };
    all.iter().map(|one| read(one).ok_or_else(|| wrong(name, one))).collect()
}

fn digest(value: &Value) -> Option<[u8; 48]> {
    from_hex(value.as_str()?).ok()?.try_into().ok()
}

fn small(value: &Value) -> Option<u8> {
    value.as_u64()?.try_into().ok()
}
