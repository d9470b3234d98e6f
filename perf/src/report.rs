//! From records to tables and plots.
//!
//! Owns: what is shown. Does not own: what was measured, and how a plot is drawn.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs, io,
    path::Path,
};

use coffer_chart::{Bar, Curve, bars, cdf, lines, work_between};

use crate::{
    fingerprint::Fingerprint,
    parallel,
    plan::Who,
    record::{Group, Record, Window},
    stats::{Samples, ratio},
};

/// Records of one group by runtime, in the plan's order.
type Runtimes<'a> = Vec<(&'a Who, Vec<&'a Record>)>;

/// Records by runtime and image.
type Rows<'a> = Vec<(&'a Who, &'a str, Vec<&'a Record>)>;

fn grouped(records: &[Record]) -> BTreeMap<Group, Runtimes<'_>> {
    let mut groups: BTreeMap<Group, Runtimes<'_>> = BTreeMap::new();
    for record in records {
        let runtimes = groups.entry(record.group()).or_default();
        match runtimes.iter_mut().find(|(who, _)| **who == record.who) {
            Some((_, list)) => list.push(record),
            None => runtimes.push((&record.who, vec![record])),
        }
    }
    for runtimes in groups.values_mut() {
        runtimes.sort_by_key(|(who, list)| order(who, list));
    }
    groups
}

/// The plan's order. Records that do not know it have one by kind and name.
fn order<'a>(who: &'a Who, records: &[&Record]) -> (Option<usize>, &'a Who) {
    (records.iter().map(|r| r.place).min(), who)
}

fn window(records: &[&Record], window: Window) -> Option<Samples> {
    // Nothing happens in no time: a 0 is from a clock that is not ours.
    Samples::new(
        records.iter().filter_map(|r| r.windows.get(&window).copied()).filter(|ms| *ms > 0.0).collect(),
    )
}

/// The whole summary as Markdown. Times are left out when instructions were counted: the plugin slows everything down.
#[must_use]
pub fn summary(name: &str, print: &Fingerprint, records: &[Record], counted: bool) -> String {
    let mut text = format!("# {name}\n\n");
    for (group, runtimes) in grouped(records) {
        let _ = writeln!(text, "## {}\n", group.words());
        if !counted {
            times(&mut text, &runtimes);
        }
        figures(&mut text, &runtimes);
    }
    if !counted {
        across(&mut text, records);
        at_once(&mut text, records);
    }
    let _ = writeln!(text, "## Machine\n");
    for (key, value) in print {
        let _ = writeln!(text, "- {key}: {value}");
    }
    text
}

fn times(text: &mut String, runtimes: &Runtimes<'_>) {
    let Some((base_who, base)) = runtimes.first() else { return };
    let _ = writeln!(
        text,
        "| window | runtime | n | p50 ms | p90 | p99 | max | {} / it, 95 % interval |\n|---|---|---|---|---|---|---|---|",
        base_who.words()
    );
    for which in Window::ALL {
        for (who, records) in runtimes {
            let Some(samples) = window(records, which) else { continue };
            let against = window(base, which).filter(|_| who != base_who).map(|b| ratio(&b, &samples));
            let against =
                against.map_or("–".to_owned(), |r| format!("{:.2} [{:.2}–{:.2}]", r.value, r.low, r.high));
            let p = |percent| samples.percentile(percent);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {against} |",
                which.words(),
                who.words(),
                samples.count(),
                p(50.0),
                p(90.0),
                p(99.0),
                samples.max()
            );
        }
    }
    let _ = writeln!(text);
}

/// Each VMM with each image, where a plan has several: what the kernel's configuration and the VMM make together.
fn across(text: &mut String, records: &[Record]) {
    let mut alike: BTreeMap<Group, Rows<'_>> = BTreeMap::new();
    for record in records.iter().filter(|r| !r.image.is_empty()) {
        let rows = alike.entry(Group { image: String::new(), ..record.group() }).or_default();
        match rows.iter_mut().find(|(who, image, _)| (*who, *image) == (&record.who, record.image.as_str())) {
            Some((_, _, list)) => list.push(record),
            None => rows.push((&record.who, &record.image, vec![record])),
        }
    }
    for (group, mut rows) in alike {
        rows.retain(|(_, _, list)| window(list, Window::Pid1).is_some());
        rows.sort_by_key(|(who, _, list)| order(who, list));
        let images: BTreeSet<&str> = rows.iter().map(|(_, image, _)| *image).collect();
        let Some(first) = rows.first().and_then(|(_, _, list)| window(list, Window::Pid1)) else { continue };
        if images.len() < 2 {
            continue;
        }
        let at = Group { image: "any".into(), ..group }.words();
        let _ = writeln!(text, "## {}, {at}\n", Window::Pid1.words());
        let _ = writeln!(
            text,
            "| runtime | image | n | p50 ms | first row / it, 95 % interval |\n|---|---|---|---|---|"
        );
        for (who, image, list) in &rows {
            let Some(samples) = window(list, Window::Pid1) else { continue };
            let r = ratio(&first, &samples);
            let _ = writeln!(
                text,
                "| {} | {image} | {} | {:.1} | {:.2} [{:.2}–{:.2}] |",
                who.words(),
                samples.count(),
                samples.median(),
                r.value,
                r.low,
                r.high
            );
        }
        let _ = writeln!(text);
    }
}

/// For each runtime and what was started: the stages by number of starts at the same time.
fn at_once(text: &mut String, records: &[Record]) {
    let mut alike: BTreeMap<(usize, &Who, Group), Vec<&Record>> = BTreeMap::new();
    for record in records {
        alike
            .entry((record.place, &record.who, Group { parallel: 1, ..record.group() }))
            .or_default()
            .push(record);
    }
    for ((_, who, group), records) in alike {
        if let Some(table) = parallel::table(who, &records) {
            let _ = writeln!(text, "## Starts at the same time: {}\n\n{table}", group.words());
        }
    }
}

/// Medians with the smallest and the largest.
fn figures(text: &mut String, runtimes: &Runtimes<'_>) {
    let mut names: Vec<&String> =
        runtimes.iter().flat_map(|(_, l)| l.iter().flat_map(|r| r.figures.keys())).collect();
    names.sort();
    names.dedup();
    let _ = write!(text, "| figure, median [min–max] |");
    runtimes.iter().for_each(|(who, _)| text.push_str(&format!(" {} |", who.words())));
    let _ = writeln!(text, "\n|---|{}", "---|".repeat(runtimes.len()));
    for name in names {
        let _ = write!(text, "| {name} |");
        for (_, records) in runtimes {
            let values = records.iter().filter_map(|r| r.figures.get(name)).map(|v| *v as f64).collect();
            let cell = Samples::new(values).map_or("–".to_owned(), |s| {
                if s.min() == s.max() {
                    format!("{:.0}", s.min())
                } else {
                    format!("{:.0} [{:.0}–{:.0}]", s.median(), s.min(), s.max())
                }
            });
            let _ = write!(text, " {cell} |");
        }
        let _ = writeln!(text);
    }
    let _ = writeln!(text);
}

/// Writes all plots that the records allow into a directory; the names of the files.
///
/// # Errors
/// The system's.
pub fn plots(directory: &Path, records: &[Record]) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut write = |name: String, svg: String| {
        files.push(name.clone());
        fs::write(directory.join(name), svg)
    };
    let groups = grouped(records);
    for (group, runtimes) in &groups {
        let which = if group.image.is_empty() { Window::Output } else { Window::Pid1 };
        let which = if runtimes.iter().any(|(_, l)| window(l, which).is_some()) {
            which
        } else {
            Window::KernelEntry
        };
        let curves: Vec<Curve> = runtimes
            .iter()
            .map(|(who, list)| {
                let samples: Vec<f64> = list.iter().filter_map(|r| r.windows.get(&which).copied()).collect();
                Curve::of_samples(who.words(), &samples)
            })
            .collect();
        let title = format!("{}: {}", which.words(), group.words());
        write(format!("cdf-{}.svg", group.file_name()), cdf(&title, "ms", &curves))?;
    }
    let stacked: Vec<Bar> = groups.iter().flat_map(|(group, runtimes)| stage_bars(group, runtimes)).collect();
    if !stacked.is_empty() {
        write(
            "stages.svg".into(),
            bars("Where the time goes, median of each stage", "ms from the exec", &stacked),
        )?;
    }
    let slopes = slopes(&groups);
    if !slopes.is_empty() {
        let svg = lines(
            "Starts at the same time: until the last guest is at PID 1, p50",
            "starts at the same time",
            "ms",
            &slopes,
        );
        write("parallel.svg".into(), svg)?;
    }
    Ok(files)
}

/// A bar for each runtime whose stages are known; for the others one part up to PID 1.
fn stage_bars(group: &Group, runtimes: &Runtimes<'_>) -> Vec<Bar> {
    let bar = |(who, list): &(&Who, Vec<&Record>)| {
        let name = [who.words(), group.image.as_str(), group.class.word()]
            .map(str::trim)
            .join(" ")
            .replace("  ", " ");
        let mut parts = Vec::new();
        let (mut before, mut before_ms) = (None, vec![0.0; list.len()]);
        for (stage, ms) in reached(list) {
            let lengths = ms.iter().zip(&before_ms).map(|(to, from)| to - from).collect();
            let name = if stage == OUTPUT { OUTPUT } else { work_between(before, stage).0 };
            parts.push((name.to_owned(), Samples::new(lengths)?.median()));
            (before, before_ms) = (Some(stage), ms);
        }
        if parts.is_empty() {
            let up_to = if group.image.is_empty() {
                [Window::Output; 2]
            } else {
                [Window::Pid1, Window::KernelEntry]
            };
            let which = up_to.into_iter().find(|which| window(list, *which).is_some())?;
            parts.push((which.words().to_owned(), window(list, which)?.median()));
        }
        Some(Bar { name, parts })
    };
    if group.parallel == 1 { runtimes.iter().filter_map(bar).collect() } else { Vec::new() }
}

/// The part of a container's bar that no stage of the trace ends.
const OUTPUT: &str = "output at the caller";

/// Up to where one runtime's bar is known: stages in order, with the ms of each record. Only those that all records have: a VMM that is stopped when a
/// tracepoint tells of a mark may or may not have written it. The windows, which have the mark in any case, close the bar, and a container's ends with its
/// output, as the other runtimes' do. Nothing without a trace.
fn reached<'a>(list: &[&'a Record]) -> Vec<(&'a str, Vec<f64>)> {
    // The end of the VM belongs to no start.
    let of_the_start = |stage: &str| !matches!(stage, "orderly-end" | "ended");
    let at = |record: &Record, name: &str| record.stages.iter().find(|s| s.stage == name).map(|s| s.ms);
    let names = list.first().into_iter().flat_map(|r| &r.stages).map(|s| s.stage.as_str());
    let in_all =
        |name: &'a str| Some((name, list.iter().map(|r| at(r, name)).collect::<Option<Vec<f64>>>()?));
    let mut reached: Vec<_> = names.filter(|name| of_the_start(name)).filter_map(in_all).collect();
    if reached.is_empty() {
        return reached;
    }
    let known = reached.iter().filter_map(|(name, _)| Window::of_stage(name)).max();
    for which in Window::ALL.into_iter().filter(|which| known.is_none_or(|known| *which > known)) {
        let container = list.iter().all(|r| r.image.is_empty());
        let name = which.stage().or((which == Window::Output && container).then_some(OUTPUT));
        let ms = list.iter().map(|r| r.windows.get(&which).copied().filter(|ms| *ms > 0.0)).collect();
        if let (Some(name), Some(ms)) = (name, ms) {
            reached.push((name, ms));
        }
    }
    reached
}

/// For each runtime: number of parallel starts → median over rounds of the slowest of them.
fn slopes(groups: &BTreeMap<Group, Runtimes<'_>>) -> Vec<Curve> {
    let mut curves: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (group, runtimes) in groups {
        for (who, list) in runtimes {
            let mut slowest: BTreeMap<usize, f64> = BTreeMap::new();
            for record in list {
                if let Some(ms) = record.windows.get(&Window::Pid1).or(record.windows.get(&Window::Output)) {
                    let most = slowest.entry(record.round).or_insert(0.0);
                    *most = most.max(*ms);
                }
            }
            if let Some(samples) = Samples::new(slowest.into_values().collect()) {
                let name = format!(
                    "{} {} {} {} MiB",
                    who.words(),
                    group.image,
                    group.class.word(),
                    group.memory_mib
                );
                curves.entry(name).or_default().push((group.parallel as f64, samples.median()));
            }
        }
    }
    let mut curves: Vec<Curve> = curves
        .into_iter()
        .filter(|(_, p)| p.len() > 1)
        .map(|(name, points)| Curve { name, points })
        .collect();
    curves.iter_mut().for_each(|c| c.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    curves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::Kind, record::Stage};

    fn record(runtime: Kind, round: usize, parallel: usize, ms: f64) -> Record {
        Record {
            parallel,
            round,
            windows: [(Window::Pid1, ms)].into(),
            stages: vec![Stage { stage: "init-entry".into(), ms }],
            figures: [("page-faults".to_owned(), round as u64)].into(),
            ..Record::of_a_test(runtime)
        }
    }

    #[test]
    fn a_table_compares_within_a_group_only() {
        let records: Vec<Record> = (1..=3)
            .flat_map(|n| {
                let n64 = n as f64;
                [
                    record(Kind::CofferVmm, n, 1, 10.0 + n64),
                    record(Kind::QemuMicrovm, n, 1, 20.0 + 2.0 * n64),
                    record(Kind::CofferVmm, n, 4, 40.0 + n64),
                ]
            })
            .collect();
        let text = summary("x", &Fingerprint::new(), &records, false);
        assert!(text.contains("| exec → PID 1 | qemu-microvm | 3 | 24.0 |"), "{text}");
        assert!(text.contains("| 0.50 [0."), "{text}");
        assert!(text.contains("warm, 128 MiB, 1 vCPU, 4 at once"), "{text}");
        assert!(text.contains("| page-faults | 2 [1–3] | 2 [1–3] |"), "{text}");
        assert!(!summary("x", &Fingerprint::new(), &records, true).contains("p50 ms"));
        let directory = tempfile::tempdir().unwrap();
        let files = plots(directory.path(), &records).unwrap();
        assert!(
            files.contains(&"parallel.svg".to_owned()) && files.contains(&"stages.svg".to_owned()),
            "{files:?}"
        );
    }

    #[test]
    fn two_of_one_kind_are_told_apart() {
        let named = |mut r: Record, name: &str| {
            r.who.name = Some(name.into());
            r
        };
        let records = [
            record(Kind::CofferVmm, 1, 1, 10.0),
            named(record(Kind::QemuMicrovm, 1, 1, 20.0), "old"),
            named(record(Kind::QemuMicrovm, 1, 1, 40.0), "new"),
        ];
        let text = summary("x", &Fingerprint::new(), &records, false);
        assert!(text.contains("| exec → PID 1 | old | 1 | 20.0 |"), "{text}");
        assert!(text.contains("| exec → PID 1 | new | 1 | 40.0 |"), "{text}");
        assert!(text.contains("| figure, median [min–max] | coffer-vmm | new | old |"), "{text}");
        let directory = tempfile::tempdir().unwrap();
        plots(directory.path(), &records).unwrap();
        let plot = fs::read_to_string(directory.path().join("cdf-up-warm-128mib-1vcpu-1.svg")).unwrap();
        assert!(plot.contains("old") && plot.contains("new"), "{plot}");
    }

    #[test]
    fn the_plan_s_first_is_what_the_others_are_compared_with() {
        let of = |place, name: &str, round, ms| {
            let record = record(Kind::CofferVmm, round, 1, ms);
            Record { place, who: Who { name: Some(name.into()), ..record.who.clone() }, ..record }
        };
        // Each round another one begins.
        let records =
            [of(1, "new", 1, 10.0), of(0, "old", 1, 20.0), of(0, "old", 2, 20.0), of(1, "new", 2, 10.0)];
        let text = summary("x", &Fingerprint::new(), &records, false);
        assert!(text.contains("| old / it, 95 % interval |"), "{text}");
        assert!(text.contains("| exec → PID 1 | new | 2 | 10.0 | 10.0 | 10.0 | 10.0 | 2.00 ["), "{text}");
        assert!(text.contains("| figure, median [min–max] | old | new |"), "{text}");
    }

    #[test]
    fn a_bar_reaches_to_pid_1_for_everybody() {
        let mut ours = record(Kind::CofferVmm, 1, 1, 50.0);
        ours.stages = vec![
            Stage { stage: "process-entry".into(), ms: 3.0 },
            Stage { stage: "kernel-entry".into(), ms: 10.0 },
        ];
        let mut theirs = record(Kind::Alioth, 1, 1, 60.0);
        theirs.stages.clear();
        let records = [ours, theirs];
        let directory = tempfile::tempdir().unwrap();
        plots(directory.path(), &records).unwrap();
        let plot = fs::read_to_string(directory.path().join("stages.svg")).unwrap();
        for part in ["exec: 3.0", "shim: 7.0", "kernel: 40.0", "exec → PID 1: 60.0"] {
            assert!(plot.contains(&format!("<title>{part}</title>")), "{part}: {plot}");
        }
    }

    /// Records of one runtime whose stages are these, in ms.
    fn with_stages(windows: &[(Window, f64)], all: &[&[(&str, f64)]]) -> Vec<Record> {
        let stages = |stages: &[(&str, f64)]| {
            stages.iter().map(|(stage, ms)| Stage { stage: (*stage).to_owned(), ms: *ms }).collect()
        };
        let windows: BTreeMap<Window, f64> = windows.iter().copied().collect();
        let of = |own: &&[(&str, f64)]| Record {
            stages: stages(own),
            windows: windows.clone(),
            ..Record::of_a_test(Kind::CofferVmm)
        };
        all.iter().map(of).collect()
    }

    fn only_bar(records: &[Record]) -> Vec<(String, f64)> {
        let bars: Vec<Bar> =
            grouped(records).iter().flat_map(|(group, all)| stage_bars(group, all)).collect();
        let [bar] = bars.as_slice() else { panic!("{bars:?}") };
        bar.parts.clone()
    }

    fn parts(parts: &[(&str, f64)]) -> Vec<(String, f64)> {
        parts.iter().map(|(name, ms)| ((*name).to_owned(), *ms)).collect()
    }

    /// A tracepoint tells of the mark before the VMM has written it, and then the VMM is stopped.
    #[test]
    fn a_stage_that_some_starts_lack_is_no_part_and_the_bar_still_ends_with_the_window() {
        let short: &[_] = &[("process-entry", 3.0), ("first-run", 8.0), ("kernel-entry", 10.0)];
        let long: &[_] =
            &[("process-entry", 3.0), ("first-run", 8.0), ("kernel-entry", 10.0), ("init-entry", 49.9)];
        let windows = [(Window::KernelEntry, 9.9), (Window::Pid1, 50.0)];
        let wanted = parts(&[
            ("exec", 3.0),
            ("start threads", 5.0),
            ("first entry into the guest", 2.0),
            ("kernel", 40.0),
        ]);
        for all in [[short, short, long], [long, short, short]] {
            assert_eq!(only_bar(&with_stages(&windows, &all)), wanted);
        }
        // One that is missing in the middle is a part of what follows.
        let other: &[_] = &[("process-entry", 3.0), ("kernel-entry", 10.0)];
        let wanted = parts(&[("exec", 3.0), ("first entry into the guest", 7.0), ("kernel", 40.0)]);
        let got = only_bar(&with_stages(&windows, &[short, other]));
        assert_eq!(
            got.iter().map(|p| p.1).collect::<Vec<_>>(),
            wanted.iter().map(|p| p.1).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_guest_without_shim_is_entered_and_has_no_shim() {
        let told: &[_] = &[("process-entry", 3.0), ("first-run", 8.0), ("kernel-entry", 10.0)];
        let wanted = parts(&[("exec", 3.0), ("start threads", 5.0), ("first entry into the guest", 2.0)]);
        for all in [[told, told], [told, &told[..2]], [&told[..2], told]] {
            assert_eq!(only_bar(&with_stages(&[(Window::KernelEntry, 10.0)], &all)), wanted);
        }
    }

    #[test]
    fn a_container_s_bar_ends_with_its_output_as_the_others_do() {
        let started: &[_] = &[("process-entry", 3.0), ("container-started", 50.0)];
        let ended: &[_] = &[("process-entry", 3.0), ("container-started", 50.0), ("ended", 99.0)];
        let wanted = parts(&[("exec", 3.0), ("wait for start; let it go", 47.0), (OUTPUT, 10.0)]);
        for all in [[started, ended], [ended, ended]] {
            let mut records = with_stages(
                &[(Window::Container, 50.0), (Window::Output, 60.0), (Window::Deleted, 100.0)],
                &all,
            );
            records.iter_mut().for_each(|r| r.image.clear());
            assert_eq!(only_bar(&records), wanted);
        }
    }

    /// The published run, whose starts do not all have the same stages.
    #[test]
    fn every_bar_of_a_real_run_is_as_long_as_its_window() {
        let raw = include_str!("../results/rig/peers/raw.jsonl");
        let records: Vec<Record> = raw.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        for (group, runtimes) in &grouped(&records) {
            for (who, list) in runtimes {
                let which = if group.image == "tiny" { Window::KernelEntry } else { Window::Pid1 };
                let bars = stage_bars(group, &vec![(*who, list.clone())]);
                let sum: f64 = bars[0].parts.iter().map(|p| p.1).sum();
                let wanted = window(list, which).unwrap().median();
                // Medians of parts do not add up to the median of the whole.
                assert!(
                    (sum / wanted - 1.0).abs() < 0.06,
                    "{} {}: {sum}, {wanted}",
                    who.words(),
                    group.words()
                );
                let shim = bars[0].parts.iter().any(|p| p.0 == "shim");
                assert_eq!(shim, who.kind == Kind::CofferVmm && group.image == "up", "{}", group.words());
            }
        }
    }

    #[test]
    fn vmms_with_images_of_their_own_are_compared_too() {
        let other = |mut r: Record| {
            r.image = "theirs".into();
            r
        };
        let records = [
            record(Kind::CofferVmm, 1, 1, 10.0),
            other(record(Kind::QemuMicrovm, 1, 1, 40.0)),
            record(Kind::QemuMicrovm, 1, 1, 20.0),
        ];
        let text = summary("x", &Fingerprint::new(), &records, false);
        assert!(text.contains("| qemu-microvm | theirs | 1 | 40.0 | 0.25 ["), "{text}");
        assert!(text.contains("| qemu-microvm | up | 1 | 20.0 | 0.50 ["), "{text}");
        let text = summary("x", &Fingerprint::new(), &records[..1], false);
        assert!(!text.contains("| runtime | image |"), "{text}");
    }
}
