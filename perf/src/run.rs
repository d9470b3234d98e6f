//! A plan's starts, in turns.
//!
//! Owns: order, classes, scratch directories. Does not own: one start (`boot`, `container`).

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use thiserror::Error;

use crate::{
    boot::{self, BootError, Started},
    container, fresh,
    peers::{Guest, Peer},
    plan::{Cell, Class, Image, Plan, Runtime, Until},
    record::Record,
    tiny,
};

/// A run cannot go on.
#[derive(Debug, Error)]
pub enum RunError {
    /// A start gave no figure.
    #[error("{runtime}: {source}")]
    Start {
        /// Which runtime.
        runtime: String,
        /// Why.
        source: BootError,
    },
    /// The image from which the tiny one is made is none.
    #[error("{}: {source}: build it with perf/build", path.display())]
    Tiny {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: igvm::Error,
    },
    /// The operating system refused something.
    #[error("{stage}: {source}")]
    System {
        /// What was being done.
        stage: String,
        /// Its answer.
        source: io::Error,
    },
}

fn system(stage: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::System { stage: stage.into(), source }
}

/// Runs all of a plan and writes each record to `raw` when it is known. Warm-ups are run and not written.
///
/// With `fresh_memory`, all free memory is written before each start (`fresh`).
///
/// # Errors
/// The first start that gives no figure ends the run: a sample without its failures would lie.
pub fn run(
    plan: &Plan,
    stamp: &Path,
    scratch: &Path,
    fresh_memory: bool,
    raw: &mut impl Write,
) -> Result<Vec<Record>, RunError> {
    let mut records = Vec::new();
    let mut sequence = 0;
    let limit = Duration::from_secs(plan.time_limit_s);
    let setting = Setting { stamp, scratch, limit, until: plan.until, tiny: tiny_image(plan)? };
    for cell in plan.cells() {
        if cell.class == Class::Template {
            make_templates(&cell, &setting)?;
        }
        for round in 0..plan.warm_up + plan.repetitions {
            for turn in 0..cell.runtimes.len() {
                // Each round another one begins, so that nobody always follows the same neighbour.
                let runtime = cell.runtimes[(turn + round) % cell.runtimes.len()];
                if cell.class == Class::Cold {
                    drop_caches()?;
                }
                if fresh_memory {
                    fresh::write_free_memory().map_err(system("write all free memory"))?;
                }
                let started = starts(runtime, &cell, &setting)?;
                for started in started {
                    if round >= plan.warm_up {
                        let record = Record {
                            sequence,
                            round: round - plan.warm_up + 1,
                            place: plan.place(runtime),
                            ..to_record(&cell, runtime, started)
                        };
                        let line = serde_json::to_string(&record).map_err(io::Error::from);
                        let line = line.map_err(system("write a record"))?;
                        writeln!(raw, "{line}").map_err(system("write raw.jsonl"))?;
                        records.push(record);
                    }
                    sequence += 1;
                }
            }
        }
    }
    Ok(records)
}

/// Without what only the run knows.
fn to_record(cell: &Cell<'_>, runtime: &Runtime, started: Started) -> Record {
    Record {
        sequence: 0,
        who: runtime.who(),
        place: 0,
        image: cell.image.map(|i| i.name.clone()).unwrap_or_default(),
        class: cell.class,
        memory_mib: cell.memory_mib,
        vcpus: cell.vcpus,
        parallel: cell.parallel,
        round: 0,
        windows: started.windows,
        stages: started.stages,
        figures: started.figures,
    }
}

/// What is the same for all starts.
struct Setting<'a> {
    stamp: &'a Path,
    scratch: &'a Path,
    limit: Duration,
    until: Until,
    /// The bytes of the IGVM image that reports at once.
    tiny: Option<Vec<u8>>,
}

/// All starts of one runtime in one round, at the same time when the cell says so.
fn starts(runtime: &Runtime, cell: &Cell<'_>, setting: &Setting<'_>) -> Result<Vec<Started>, RunError> {
    let one = |index: usize| -> Result<Started, RunError> {
        let directory = setting.scratch.join(index.to_string());
        fs::create_dir(&directory).map_err(system(format!("make {}", directory.display())))?;
        let started = start(runtime, cell, setting, &directory, index);
        let removed = fs::remove_dir_all(&directory);
        // Why a start failed is told first: what it left may be why its directory cannot be removed.
        let started = started
            .map_err(|source| RunError::Start { runtime: runtime.who().words().to_owned(), source })?;
        removed.map_err(system(format!("remove {}", directory.display())))?;
        Ok(started)
    };
    if cell.parallel == 1 {
        return Ok(vec![one(0)?]);
    }
    thread::scope(|scope| {
        let threads: Vec<_> = (0..cell.parallel).map(|i| scope.spawn(move || one(i))).collect();
        let panicked = |_| system("a start's thread")(io::Error::other("it panicked"));
        threads.into_iter().map(|t| t.join().map_err(panicked)?).collect()
    })
}

fn start(
    runtime: &Runtime,
    cell: &Cell<'_>,
    setting: &Setting<'_>,
    directory: &Path,
    index: usize,
) -> Result<Started, BootError> {
    match (cell.image, Peer::new(runtime)) {
        (Some(image), Some(peer)) => {
            let template = (cell.class == Class::Template).then(|| template_of(setting));
            let guest = Guest { until: setting.until, template, ..guest(image, cell, setting, directory)? };
            boot::measure(&peer, &guest, directory, setting.limit)
        }
        _ => {
            let trace = directory.join("trace");
            let bundle = directory.join("bundle");
            container::make_bundle(&bundle, setting.stamp, &trace, cell.memory_mib, cell.class)?;
            if cell.class == Class::Pool {
                container::fill_pool(&runtime.program, directory)?;
            }
            let id = format!("bench-{}-{index}", std::process::id());
            let started = container::measure(runtime.kind, &runtime.program, directory, &id, setting.limit)?;
            container::check_class(cell.class, &started)?;
            Ok(started)
        }
    }
}

/// One cell's at a time: a plan with templates has one VMM.
fn template_of(setting: &Setting<'_>) -> PathBuf {
    setting.scratch.join("template")
}

/// Saves the machine that the cell's starts come from. It is not measured.
fn make_templates(cell: &Cell<'_>, setting: &Setting<'_>) -> Result<(), RunError> {
    for runtime in &cell.runtimes {
        if let (Some(image), Some(peer)) = (cell.image, Peer::new(runtime)) {
            let directory = template_of(setting);
            let made = guest(image, cell, setting, setting.scratch)
                .and_then(|guest| boot::make_template(&peer, &guest, &directory));
            made.map_err(|source| RunError::Start { runtime: runtime.who().words().to_owned(), source })?;
        }
    }
    Ok(())
}

/// The name of the image whose files this harness makes itself.
pub const TINY: &str = "tiny";

/// The IGVM image that reports at once, when the plan has one.
fn tiny_image(plan: &Plan) -> Result<Option<Vec<u8>>, RunError> {
    let Some(path) = plan.image.iter().find(|i| i.name == TINY).and_then(|i| i.igvm.as_ref()) else {
        return Ok(None);
    };
    let bytes = fs::read(path).map_err(system(format!("read {}", path.display())))?;
    tiny::image(&bytes).map(Some).map_err(|source| RunError::Tiny { path: path.clone(), source })
}

fn guest(
    image: &Image,
    cell: &Cell<'_>,
    setting: &Setting<'_>,
    directory: &Path,
) -> Result<Guest, BootError> {
    let command_line = fs::read_to_string(&image.command_line)
        .map_err(|source| BootError::Image { path: image.command_line.clone(), source })?;
    let mut guest = Guest {
        kernel: image.kernel.clone(),
        initramfs: image.initramfs.clone(),
        image: image.igvm.clone().unwrap_or_default(),
        command_line: command_line.trim().to_owned(),
        memory_mib: cell.memory_mib,
        vcpus: cell.vcpus,
        acpi: image.acpi,
        tiny: false,
        until: Until::Pid1,
        template: None,
    };
    if image.name == TINY {
        boot::write_tiny(&mut guest, setting.tiny.as_deref(), directory)?;
    }
    Ok(guest)
}

fn drop_caches() -> Result<(), RunError> {
    // SAFETY: writes dirty pages back; nothing else.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(system("drop the page cache (class cold needs root)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A script in crun's place.
    fn run_script(text: &str) -> Result<Vec<Record>, RunError> {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("runtime");
        fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let plan = format!(
            "name = \"x\"\nrepetitions = 2\nwarm_up = 1\nclasses = [\"warm\"]\nmemory_mib = [128]\n
            [[runtime]]\nkind = \"crun\"\nname = \"old\"\nprogram = {script:?}\n
            [[runtime]]\nkind = \"crun\"\nname = \"new\"\nprogram = {script:?}\n"
        );
        let scratch = directory.path().join("scratch");
        fs::create_dir(&scratch).unwrap();
        run(&Plan::parse(&plan).unwrap(), &script, &scratch, false, &mut Vec::new())
    }

    #[test]
    fn what_cannot_be_removed_does_not_hide_why_a_start_failed() {
        // Its second word is a path in the directory of the start.
        let error = run_script("rm -rf \"${2%/state}\"; echo 1; exit 1").unwrap_err().to_string();
        assert!(error.contains("exit code 1"), "{error}");
    }

    #[test]
    fn records_know_their_place_in_the_plan() {
        let records = run_script("echo 1").unwrap();
        let got: Vec<_> = records.iter().map(|r| (r.who.words(), r.place)).collect();
        // Each round another one begins.
        assert_eq!(got, [("new", 1), ("old", 0), ("old", 0), ("new", 1)]);
    }
}
