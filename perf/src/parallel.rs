//! What starts at the same time cost each other: each stage by the number of them.
//!
//! Owns: the table and the stage that it names. Does not own: the stages, which each start's trace has.

use std::{collections::BTreeMap, fmt::Write};

use coffer_chart::work_between;

use crate::{plan::Who, record::Record, stats::Samples};

/// Median length of each stage in ms, in order, by number of starts at the same time.
struct Growth {
    stages: Vec<(String, BTreeMap<usize, f64>)>,
}

impl Growth {
    /// None without stages, or when all records are of one number of starts.
    fn of(records: &[&Record]) -> Option<Self> {
        let mut stages: Vec<(String, BTreeMap<usize, Vec<f64>>)> = Vec::new();
        for record in records {
            let mut before = 0.0;
            for stage in &record.stages {
                let index = stages.iter().position(|(name, _)| *name == stage.stage).unwrap_or(stages.len());
                if index == stages.len() {
                    stages.push((stage.stage.clone(), BTreeMap::new()));
                }
                stages[index].1.entry(record.parallel).or_default().push(stage.ms - before);
                before = stage.ms;
            }
        }
        let stages: Vec<_> = stages
            .into_iter()
            .map(|(name, samples)| {
                let medians = samples.into_iter().filter_map(|(n, v)| Some((n, Samples::new(v)?.median())));
                (name, medians.collect::<BTreeMap<_, _>>())
            })
            .collect();
        (stages.iter().map(|(_, medians)| medians.len()).max()? > 1).then_some(Self { stages })
    }

    /// Numbers of starts at the same time.
    fn numbers(&self) -> Vec<usize> {
        let mut numbers: Vec<usize> = self.stages.iter().flat_map(|(_, m)| m.keys().copied()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}

/// ms that one more start adds to a stage between two numbers of starts.
fn slope(medians: &BTreeMap<usize, f64>, few: usize, many: usize) -> Option<f64> {
    Some((medians.get(&many)? - medians.get(&few)?) / (many - few) as f64)
}

/// A table of one runtime's stages by number of starts, ms per further start, and the stage that grew most beside its own length: work that needs only
/// a processor grows by the number of starts over the number of processors, and what grows faster waits for something else.
/// None without stages, or when all starts were alone.
#[must_use]
pub fn table(who: &Who, records: &[&Record]) -> Option<String> {
    let growth = Growth::of(records)?;
    let numbers = growth.numbers();
    let (few, many) = (*numbers.first()?, *numbers.last()?);
    let mut text = format!("| {}, p50 ms at once |", who.words());
    numbers.iter().for_each(|n| text.push_str(&format!(" {n} |")));
    let _ = writeln!(
        text,
        " ms per further start | {many} to {few} |\n|---|{}---|---|",
        "---|".repeat(numbers.len())
    );
    let mut most: Option<(&str, f64)> = None;
    let mut before = None;
    for (stage, medians) in &growth.stages {
        let work = work_between(before.replace(stage.as_str()), stage).0;
        let _ = write!(text, "| {work} |");
        let shown = |ms: Option<f64>, digits| ms.map_or("–".to_owned(), |ms| format!("{ms:.digits$}"));
        for n in &numbers {
            let _ = write!(text, " {} |", shown(medians.get(n).copied(), 1));
        }
        let times = medians.get(&many).zip(medians.get(&few)).map(|(m, f)| m / f).filter(|t| t.is_finite());
        let _ = writeln!(text, " {} | {} |", shown(slope(medians, few, many), 2), shown(times, 1));
        if let Some(times) = times.filter(|t| most.is_none_or(|(_, before)| *t > before)) {
            most = Some((work, times));
        }
    }
    if let Some((stage, times)) = most {
        let _ = writeln!(
            text,
            "\nThe stage that grows most: {stage}, {times:.1} times as long with {many} as with {few}."
        );
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::Kind, record::Stage};

    fn record(parallel: usize, created: f64, loaded: f64) -> Record {
        let stage = |stage: &str, ms| Stage { stage: stage.to_owned(), ms };
        Record {
            parallel,
            stages: vec![stage("vm-created", created), stage("memory-loaded", created + loaded)],
            ..Record::of_a_test(Kind::CofferVmm)
        }
    }

    #[test]
    fn the_stage_that_waits_for_the_others_is_named() {
        let sixteen = [90.0, 92.0, 94.0].map(|created| record(16, created, 85.0));
        let records: Vec<Record> = [record(1, 2.0, 10.0)].into_iter().chain(sixteen).collect();
        let text = table(&Kind::CofferVmm.into(), &records.iter().collect::<Vec<_>>()).unwrap();
        assert!(text.contains("| make the VM | 2.0 | 92.0 | 6.00 | 46.0 |"), "{text}");
        assert!(text.contains("| map memory, load the image | 10.0 | 85.0 | 5.00 | 8.5 |"), "{text}");
        assert!(text.ends_with("grows most: make the VM, 46.0 times as long with 16 as with 1.\n"), "{text}");
    }

    #[test]
    fn starts_that_were_all_alone_have_no_table() {
        assert_eq!(table(&Kind::CofferVmm.into(), &[&record(1, 2.0, 10.0)]), None);
        assert_eq!(table(&Kind::CofferVmm.into(), &[]), None);
    }
}
