//! Counts against a committed baseline: what grew, and by how much.
//!
//! Owns: which figures are noise-free, and the limit. Does not own: how they are counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{record::Record, stats::Samples};

/// Per cent by which a figure may grow.
const LIMIT: u64 = 2;

/// A figure that is nearly the same on every run of the same files.
#[derive(Clone, Copy)]
struct Gate {
    figure: &'static str,
    /// What it stands for.
    stage: &'static str,
    of: Of,
    /// What a busy machine adds at most beyond [`LIMIT`]: a slow run has more timer interrupts.
    slack: u64,
    /// What it may be at most, whatever the baseline says.
    cap: Option<u64>,
}

/// Which start of a run stands for it.
#[derive(Clone, Copy)]
enum Of {
    /// What disturbs the figure only adds to it.
    Smallest,
    /// It is disturbed both ways.
    Median,
}

impl Of {
    fn take(self, samples: &Samples) -> u64 {
        match self {
            Self::Smallest => samples.min() as u64,
            Self::Median => samples.median() as u64,
        }
    }
}

const fn gate(figure: &'static str, stage: &'static str, of: Of, slack: u64) -> Gate {
    Gate { figure, stage, of, slack, cap: None }
}

/// In boot order. perf/README.md has the spreads that the slacks are from.
const GATES: [Gate; 14] = [
    gate("instructions-vmm-until-kernel", "VMM: image, VM, memory, processors, devices", Of::Median, 0),
    gate(
        "instructions-host-kernel-until-kernel",
        "host's kernel for the VMM until the kernel",
        Of::Smallest,
        40_000,
    ),
    gate("instructions-firmware", "shim", Of::Smallest, 0),
    gate("instructions-kernel-early", "kernel before its own page tables", Of::Smallest, 0),
    gate("instructions-kernel", "kernel to PID 1", Of::Smallest, 0),
    gate("string-steps-guest", "copying and clearing memory in the guest", Of::Smallest, 0),
    gate(
        "instructions-host-kernel-until-pid1",
        "host's kernel: KVM and memory, to PID 1",
        Of::Smallest,
        300_000,
    ),
    gate("guest-entries-until-pid1", "entries into the guest, to PID 1", Of::Smallest, 45),
    gate("kvm-exits-of-its-own", "exits that no interrupt caused", Of::Smallest, 0),
    gate("instructions-init-until-ready", "init to ready", Of::Smallest, 0),
    gate("instructions-kernel-for-init-until-ready", "kernel's work for init to ready", Of::Smallest, 20_000),
    gate("page-faults", "VMM's page faults", Of::Smallest, 0),
    gate("vmm-private-kib", "VMM's own memory", Of::Smallest, 8),
    Gate { cap: Some(5 << 10), ..gate("vmm-peak-kib", "VMM's peak beside guest RAM", Of::Median, 96) },
];

/// The committed file: cell → figure → what stands for the run.
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
    /// The largest of the run.
    pub most: u64,
    slack: u64,
    cap: Option<u64>,
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
        let grew = u128::from(self.now) * 100
            > u128::from(self.before) * u128::from(100 + LIMIT) + u128::from(self.slack) * 100;
        grew || self.cap.is_some_and(|cap| self.most > cap)
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
        let samples = samples(records);
        for ((cell, figure), samples) in &samples {
            let of = GATES.iter().find(|gate| gate.figure == *figure).map_or(Of::Smallest, |gate| gate.of);
            cells.entry(cell.clone()).or_default().insert((*figure).to_owned(), of.take(samples));
        }
        Self(cells)
    }

    /// Every gate beside the baseline, in boot order. One that this run or the baseline does not have is `Err` with its name.
    #[must_use]
    pub fn compare(&self, records: &[Record]) -> Vec<Result<Finding, String>> {
        let now = samples(records);
        let mut findings = Vec::new();
        for (cell, figures) in &self.0 {
            for Gate { figure, stage, of, slack, cap } in GATES {
                let finding = match (figures.get(figure), now.get(&(cell.clone(), figure))) {
                    (Some(before), Some(samples)) => Ok(Finding {
                        cell: cell.clone(),
                        figure,
                        stage,
                        before: *before,
                        now: of.take(samples),
                        most: samples.max() as u64,
                        slack,
                        cap,
                    }),
                    (None, _) => Err(format!("{cell}: {figure} has no baseline")),
                    (_, None) => Err(format!("{cell}: {figure}")),
                };
                findings.push(finding);
            }
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Kind;

    /// Three starts. Every gate's figure is 100, but for these: its name, and what it is in each start.
    fn run(others: &[(&str, [u64; 3])]) -> Vec<Record> {
        let record = |round: usize| {
            let mut figures: BTreeMap<String, u64> = GATES.map(|gate| (gate.figure.to_owned(), 100)).into();
            figures.insert("cpu-user-us".to_owned(), 3);
            figures.extend(others.iter().map(|(figure, values)| ((*figure).to_owned(), values[round])));
            Record { sequence: round, round, figures, ..Record::of_a_test(Kind::CofferVmm) }
        };
        vec![record(0), record(1), record(2)]
    }

    /// What grew between two runs.
    fn grew(before: &[(&str, [u64; 3])], now: &[(&str, [u64; 3])]) -> Vec<Finding> {
        let findings = Baseline::of(&run(before)).compare(&run(now));
        assert_eq!(findings.len(), GATES.len());
        findings.into_iter().map(Result::unwrap).filter(Finding::is_regression).collect()
    }

    #[test]
    fn over_two_per_cent_is_a_regression_that_names_its_stage() {
        let stored =
            serde_json::to_string(&Baseline::of(&run(&[("instructions-kernel", [1000, 995, 1009])])))
                .unwrap();
        assert!(stored.contains("\"instructions-kernel\":995") && !stored.contains("cpu-user"), "{stored}");
        let before = [("instructions-kernel", [995, 1000, 1009])];
        let grew = |least| grew(&before, &[("instructions-kernel", [least + 14, least, least + 5])]);
        // 995 and 2 % are 1014.9.
        assert!(grew(1014).is_empty() && grew(500).is_empty());
        let worse = grew(1015).remove(0);
        assert_eq!((worse.stage, worse.now, worse.most), ("kernel to PID 1", 1015, 1029));
    }

    #[test]
    fn a_figure_that_is_disturbed_both_ways_is_compared_by_its_median() {
        let vmm = |values| [("instructions-vmm-until-kernel", values)];
        assert!(grew(&vmm([960, 1000, 1001]), &vmm([1020, 1020, 9999])).is_empty());
        assert_eq!(grew(&vmm([960, 1000, 1001]), &vmm([960, 1021, 1021])).len(), 1);
    }

    #[test]
    fn each_gate_fails_by_itself() {
        for gate in GATES {
            let worse = 103 + gate.slack;
            let findings = grew(&[], &[(gate.figure, [worse; 3])]);
            assert_eq!(findings.iter().map(|f| f.figure).collect::<Vec<_>>(), [gate.figure]);
        }
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
            cap: None,
        };
        assert!(!finding(112).is_regression() && finding(113).is_regression());
    }

    #[test]
    fn more_than_5_mib_beside_guest_ram_fails_whatever_the_baseline_says() {
        let peak = |most| [("vmm-peak-kib", [5000, 5000, most])];
        assert!(grew(&peak(5120), &peak(5120)).is_empty());
        assert_eq!(grew(&peak(5121), &peak(5121)).remove(0).figure, "vmm-peak-kib");
    }

    #[test]
    fn a_figure_that_is_missing_on_either_side_is_no_pass() {
        let baseline = Baseline::of(&run(&[]));
        assert!(baseline.compare(&[]).iter().all(Result::is_err));
        let mut partly = baseline.clone();
        for figures in partly.0.values_mut() {
            figures.remove("page-faults");
        }
        let missing: Vec<_> = partly.compare(&run(&[])).into_iter().filter_map(Result::err).collect();
        assert!(missing.len() == 1 && missing[0].contains("page-faults has no baseline"), "{missing:?}");
    }
}
