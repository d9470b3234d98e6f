//! Counts against a committed baseline: what grew, and by how much.
//!
//! Owns: which figures are noise-free, and the limit. Does not own: how they are counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{record::Record, stats::Samples};

/// Per cent by which a figure may grow.
const LIMIT: u64 = 2;

/// Figures that are the same on every run of the same files, with the stage that they stand for, in boot order.
const GATED: [(&str, &str); 8] = [
    ("instructions-vmm-until-kernel", "VMM: image, VM, memory, processors, devices"),
    ("instructions-firmware", "shim"),
    ("instructions-kernel-early", "kernel before its own page tables"),
    ("instructions-kernel", "kernel to PID 1"),
    ("string-steps-guest", "copying and clearing memory in the guest"),
    ("instructions-init-until-ready", "init to ready"),
    ("instructions-kernel-for-init-until-ready", "kernel's work for init to ready"),
    ("vmm-private-kib", "VMM's own memory"),
];

/// The committed file: cell → figure → median.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baseline(BTreeMap<String, BTreeMap<String, u64>>);

/// A figure beside its baseline.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Runtime and cell.
    pub cell: String,
    /// The figure.
    pub figure: &'static str,
    /// What it stands for.
    pub stage: &'static str,
    /// In the baseline.
    pub before: u64,
    /// Now.
    pub now: u64,
    /// Smallest and largest of this run.
    pub spread: (u64, u64),
}

impl Finding {
    /// Per cent.
    #[must_use]
    pub fn growth(&self) -> f64 {
        (self.now as f64 / self.before.max(1) as f64 - 1.0) * 100.0
    }

    /// It is over the limit.
    #[must_use]
    pub fn is_regression(&self) -> bool {
        // Whole numbers: 1020 is not over 2 % of 1000.
        u128::from(self.now) * 100 > u128::from(self.before) * u128::from(100 + LIMIT)
    }
}

fn cell(record: &Record) -> String {
    format!("{} {}", record.runtime.word(), record.group().file_name())
}

fn samples(records: &[Record]) -> BTreeMap<(String, &'static str), (&'static str, Samples)> {
    let mut values: BTreeMap<(String, &'static str), (&'static str, Vec<f64>)> = BTreeMap::new();
    for record in records {
        for (figure, stage) in GATED {
            if let Some(value) = record.figures.get(figure) {
                values.entry((cell(record), figure)).or_insert((stage, Vec::new())).1.push(*value as f64);
            }
        }
    }
    values.into_iter().filter_map(|(key, (stage, v))| Some((key, (stage, Samples::new(v)?)))).collect()
}

impl Baseline {
    /// From a run.
    #[must_use]
    pub fn of(records: &[Record]) -> Self {
        let mut cells: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for ((cell, figure), (_, samples)) in samples(records) {
            cells.entry(cell).or_default().insert(figure.to_owned(), samples.median() as u64);
        }
        Self(cells)
    }

    /// Every figure of the baseline beside this run's, in boot order. One that this run does not have is `Err` with its name.
    #[must_use]
    pub fn compare(&self, records: &[Record]) -> Vec<Result<Finding, String>> {
        let now = samples(records);
        let mut findings = Vec::new();
        for (cell, figures) in &self.0 {
            for (figure, stage) in GATED {
                let Some(before) = figures.get(figure).copied() else { continue };
                findings.push(match now.get(&(cell.clone(), figure)) {
                    None => Err(format!("{cell}: {figure}")),
                    Some((_, s)) => Ok(Finding {
                        cell: cell.clone(),
                        figure,
                        stage,
                        before,
                        now: s.median() as u64,
                        spread: (s.min() as u64, s.max() as u64),
                    }),
                });
            }
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Class, Kind};

    fn run(kernel: u64) -> Vec<Record> {
        let record = |round, kernel| Record {
            sequence: round,
            runtime: Kind::CofferVmm,
            image: "up".into(),
            class: Class::Warm,
            memory_mib: 128,
            vcpus: 1,
            parallel: 1,
            round,
            windows: BTreeMap::new(),
            stages: Vec::new(),
            figures: [("instructions-kernel".to_owned(), kernel), ("cpu-user-us".to_owned(), 3)].into(),
        };
        vec![record(1, kernel - 5), record(2, kernel), record(3, kernel + 9)]
    }

    #[test]
    fn over_two_per_cent_is_a_regression_that_names_its_stage() {
        let baseline = Baseline::of(&run(1000));
        let stored = serde_json::to_string(&baseline).unwrap();
        assert!(stored.contains("\"instructions-kernel\":1000") && !stored.contains("cpu-user"), "{stored}");
        let finding = |kernel| baseline.compare(&run(kernel)).remove(0).unwrap();
        assert!(!finding(1020).is_regression() && !finding(500).is_regression());
        let worse = finding(1021);
        assert!(worse.is_regression());
        assert_eq!((worse.stage, worse.spread), ("kernel to PID 1", (1016, 1030)));
    }

    #[test]
    fn a_figure_that_is_missing_is_no_pass() {
        let baseline = Baseline::of(&run(1000));
        assert_eq!(baseline.compare(&[]).len(), 1);
        assert!(baseline.compare(&[])[0].as_ref().unwrap_err().contains("instructions-kernel"));
    }
}
