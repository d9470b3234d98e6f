//! `coffer-bench`: runs a plan, shows what was measured, compares counts with a baseline.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use coffer_perf::{
    baseline::Baseline,
    counts,
    fingerprint::{self, Fingerprint},
    fresh,
    plan::Plan,
    record::Record,
    report, run, symbols,
};

const USAGE: &str = "\
coffer-bench: boot latency, measured (perf/run and perf/check call it)

  coffer-bench run PLAN.toml --out DIR --stamp FILE [--fresh-memory]
                                                      every start of a plan: DIR/raw.jsonl and DIR/machine.json; with the flag and
                                                      on QEMU's own processor, all free memory is written before each start
  coffer-bench report DIR                             DIR/summary.md and plots, from those two files
  coffer-bench where DIR SYSTEM.MAP [N [DIRECTORIES]] the N functions of the guest's kernel with the most instructions, or
                                                      directories of its source, by the list that perf/peer-kernel makes
  coffer-bench check DIR BASELINE.json [--write]      counts against the baseline; with --write it becomes the baseline

DIR/counts.jsonl, when it is there, is the QEMU plugin's: then times are not shown.";

fn main() -> ExitCode {
    match try_main() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("coffer-bench: {}", words(&error));
            ExitCode::from(2)
        }
    }
}

/// An error with what caused it, where its own words do not already end with that.
fn words(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.as_str() {
        "" => cause,
        text if text.ends_with(&cause) => said,
        _ => format!("{said}: {cause}"),
    })
}

fn try_main() -> Result<bool> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["run", plan, "--out", out, "--stamp", stamp] => {
            measure(Path::new(plan), Path::new(out), Path::new(stamp), false).map(|()| true)
        }
        ["run", plan, "--out", out, "--stamp", stamp, "--fresh-memory"] => {
            let fresh_memory = fresh::is_translated();
            measure(Path::new(plan), Path::new(out), Path::new(stamp), fresh_memory).map(|()| true)
        }
        ["report", directory] => show(Path::new(directory)).map(|()| true),
        ["check", directory, baseline] => check(Path::new(directory), Path::new(baseline), false),
        ["check", directory, baseline, "--write"] => check(Path::new(directory), Path::new(baseline), true),
        ["where", directory, map] => functions(Path::new(directory), Path::new(map), 40, None),
        ["where", directory, map, most] => {
            functions(Path::new(directory), Path::new(map), most.parse().context("N is a number")?, None)
        }
        ["where", directory, map, most, list] => {
            let most = most.parse().context("N is a number")?;
            functions(Path::new(directory), Path::new(map), most, Some(Path::new(list)))
        }
        ["--help"] => {
            println!("{USAGE}");
            Ok(true)
        }
        _ => bail!("what is to be done?\n{USAGE}"),
    }
}

fn measure(plan_file: &Path, out: &Path, stamp: &Path, fresh_memory: bool) -> Result<()> {
    let text = fs::read_to_string(plan_file).with_context(|| format!("read {}", plan_file.display()))?;
    let plan = Plan::parse(&text).with_context(|| plan_file.display().to_string())?;
    fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let programs: Vec<String> = plan.runtime.iter().map(|r| r.program.display().to_string()).collect();
    let files: Vec<String> = plan.files().iter().map(|p| p.display().to_string()).collect();
    let mut print = fingerprint::read(&programs, &files)
        .with_context(|| format!("{}: what it names must be there", plan_file.display()))?;
    print.insert("plan".into(), plan.name.clone());
    if fresh_memory {
        print.insert("free memory".into(), "written before each start: the processor is emulated".into());
    }
    if let Ok(note) = std::env::var("COFFER_PERF_NOTE") {
        print.insert("note".into(), note);
    }
    let scratch = std::env::temp_dir().join(format!("coffer-bench-{}", std::process::id()));
    fs::create_dir(&scratch).with_context(|| format!("make {}", scratch.display()))?;
    let raw_path = out.join("raw.jsonl");
    let mut raw = File::create(&raw_path).with_context(|| format!("make {}", raw_path.display()))?;
    let result = run::run(&plan, stamp, &scratch, fresh_memory, &mut raw);
    let removed = fs::remove_dir_all(&scratch);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    print.insert("load average at the end".into(), load.trim().to_owned());
    let print = serde_json::to_vec_pretty(&print)?;
    fs::write(out.join("machine.json"), print).context("write machine.json")?;
    raw.flush()?;
    let records = result?;
    removed.with_context(|| format!("remove {}", scratch.display()))?;
    println!("{} starts in {}", records.len(), raw_path.display());
    Ok(())
}

struct Results {
    print: Fingerprint,
    records: Vec<Record>,
    counted: bool,
}

/// What a run left, with the plugin's counts in their records.
fn read(directory: &Path) -> Result<Results> {
    let text = |name: &str| -> Result<String> {
        let path: PathBuf = directory.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let print = serde_json::from_str(&text("machine.json")?).context("machine.json")?;
    let raw = text("raw.jsonl")?;
    let parse = |(n, line)| serde_json::from_str(line).with_context(|| format!("raw.jsonl, line {}", n + 1));
    let mut records: Vec<Record> = raw.lines().enumerate().map(parse).collect::<Result<_>>()?;
    let counted = directory.join("counts.jsonl").exists();
    if counted {
        let counts = counts::parse(&text("counts.jsonl")?)?;
        for record in &mut records {
            let figures = counts
                .get(record.sequence)
                .with_context(|| format!("counts.jsonl has no record of start {}", record.sequence))?;
            record.figures.extend(figures.clone());
        }
    }
    Ok(Results { print, records, counted })
}

fn show(directory: &Path) -> Result<()> {
    let results = read(directory)?;
    let name = results.print.get("plan").map_or("run", String::as_str).to_owned();
    let text = report::summary(&name, &results.print, &results.records, results.counted);
    fs::write(directory.join("summary.md"), &text).context("write summary.md")?;
    if !results.counted {
        report::plots(directory, &results.records).context("write plots")?;
    }
    print!("{text}");
    Ok(())
}

fn functions(directory: &Path, map: &Path, most: usize, list: Option<&Path>) -> Result<bool> {
    let text = |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    let addresses = text(&directory.join("addresses"))?;
    let map = text(map).context("the kernel's System.map lies beside its vmlinux in the build's cache")?;
    let functions = symbols::attribute(&addresses, &map)?;
    print!(
        "{}",
        match list {
            Some(list) =>
                symbols::table("directory", &symbols::by_directory(&functions, &text(list)?)?, most),
            None => symbols::table("function", &functions, most),
        }
    );
    Ok(true)
}

fn check(directory: &Path, file: &Path, write: bool) -> Result<bool> {
    let results = read(directory)?;
    if !results.counted {
        bail!("{}: counts.jsonl is missing: run it with perf/check", directory.display());
    }
    if write {
        let text = serde_json::to_string_pretty(&Baseline::of(&results.records))? + "\n";
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
        println!("{} is the baseline now", file.display());
        return Ok(true);
    }
    let text = fs::read_to_string(file)
        .with_context(|| format!("read {}: perf/check --write makes it", file.display()))?;
    let baseline: Baseline = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    let findings = baseline.compare(&results.records);
    if findings.is_empty() {
        bail!("{}: holds nothing to compare with", file.display());
    }
    let mut good = true;
    for finding in findings {
        match finding {
            Err(missing) => {
                good = false;
                println!("MISSING {missing}");
            }
            Ok(f) => {
                good &= !f.is_regression();
                let word = if f.is_regression() { "GREW" } else { "ok" };
                println!(
                    "{word:4} {:+6.2} %  {:>10} (baseline {:>10}, largest of this run {:>10})  {}: {}",
                    f.growth(),
                    f.now,
                    f.before,
                    f.most,
                    f.stage,
                    f.cell
                );
            }
        }
    }
    Ok(good)
}
