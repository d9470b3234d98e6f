//! Counts against a committed baseline: what grew, and by how much.
//!
//! Owns: which figures are noise-free, and the limit. Does not own: how they are counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{record::Record, stats::Samples};

/// Per cent by which a figure may grow.
const LIMIT: u64 = 2;

/// A figure that is nearly the same on every run of the same files.
struct Gate {
    figure: &'static str,
    /// What it stands for.
    stage: &'static str,
    /// What a busy machine adds at most beyond [`LIMIT`]: a slow run has more timer interrupts.
    slack: u64,
}

const fn gate(figure: &'static str, stage: &'static str, slack: u64) -> Gate {
    Gate { figure, stage, slack }
}

/// In boot order.
const GATES: [Gate; 8] = [
    gate("instructions-vmm-until-kernel", "VMM: image, VM, memory, processors, devices", 50_000),
    gate("instructions-firmware", "shim", 0),
    gate("instructions-kernel-early", "kernel before its own page tables", 0),
    gate("instructions-kernel", "kernel to PID 1", 0),
    gate("string-steps-guest", "copying and clearing memory in the guest", 0),
    gate("instructions-init-until-ready", "init to ready", 0),
    gate("instructions-kernel-for-init-until-ready", "kernel's work for init to ready", 150_000),
    gate("vmm-private-kib", "VMM's own memory", 32),
];

/// The committed file: cell → figure → the smallest of the run, for what disturbs a count only adds to it.
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
    /// Now, the smallest of the run.
    pub now: u64,
    /// The largest of the run.
    pub most: u64,
    slack: u64,
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
        u128::from(self.now) * 100
            > u128::from(self.before) * u128::from(100 + LIMIT) + u128::from(self.slack) * 100
    }
}

fn cell(record: &Record) -> String {
    format!("{} {}", record.who.words(), record.group().file_name())
}

fn samples(records: &[Record]) -> BTreeMap<(String, &'static str), Samples> {
    let mut values: BTreeMap<(String, &'static str), Vec<f64>> = BTreeMap::new();
    for record in records {
        for gate in &GATES {
            if let Some(value) = record.figures.get(gate.figure) {
                values.entry((cell(record), gate.figure)).or_default().push(*value as f64);
            }
        }
    }
    values.into_iter().filter_map(|(key, v)| Some((key, Samples::new(v)?))).collect()
}

impl Baseline {
    /// From a run.
    #[must_use]
    pub fn of(records: &[Record]) -> Self {
        let mut cells: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for ((cell, figure), samples) in samples(records) {
            cells.entry(cell).or_default().insert(figure.to_owned(), samples.min() as u64);
        }
        Self(cells)
    }

    /// Every figure of the baseline beside this run's, in boot order. One that this run does not have is `Err` with its name.
    #[must_use]
    pub fn compare(&self, records: &[Record]) -> Vec<Result<Finding, String>> {
        let now = samples(records);
        let mut findings = Vec::new();
        for (cell, figures) in &self.0 {
            for Gate { figure, stage, slack } in GATES {
                let Some(before) = figures.get(figure).copied() else { continue };
                findings.push(match now.get(&(cell.clone(), figure)) {
                    None => Err(format!("{cell}: {figure}")),
                    Some(s) => Ok(Finding {
                        cell: cell.clone(),
                        figure,
                        stage,
                        before,
                        now: s.min() as u64,
                        most: s.max() as u64,
                        slack,
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
            who: Kind::CofferVmm.into(),
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
        assert!(stored.contains("\"instructions-kernel\":995") && !stored.contains("cpu-user"), "{stored}");
        let finding = |kernel| baseline.compare(&run(kernel)).remove(0).unwrap();
        // 995 and 2 % are 1014.9.
        assert!(!finding(1019).is_regression() && !finding(500).is_regression());
        let worse = finding(1020);
        assert!(worse.is_regression());
        assert_eq!((worse.stage, worse.now, worse.most), ("kernel to PID 1", 1015, 1029));
    }

    #[test]
    fn slack_is_beyond_the_limit() {
        let finding = |now| Finding {
            cell: String::new(),
            figure: "",
            stage: "",
            before: 100,
            now,
            most: now,
            slack: 10,
        };
        assert!(!finding(112).is_regression() && finding(113).is_regression());
    }

    #[test]
    fn a_figure_that_is_missing_is_no_pass() {
        let baseline = Baseline::of(&run(1000));
        assert_eq!(baseline.compare(&[]).len(), 1);
        assert!(baseline.compare(&[])[0].as_ref().unwrap_err().contains("instructions-kernel"));
    }
}
