//! `coffer boot-chart`: the last start of a pod as an SVG, stage by stage, host and guest on one clock.
//!
//! Owns: from the VMM's trace to spans. Does not own: writing the trace (`coffer-vmm --trace`), drawing (`coffer-chart`).

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use coffer_chart::{Span, timeline, work_between};
use serde::Deserialize;

use crate::{
    cli::Call,
    error::{Error, host},
    state::Directory,
};

/// The file of a container's directory to which its VMM writes boot stages when nobody named another.
pub(super) const TRACE: &str = "boot-trace";

/// One line of a trace; lines with counts have no stage.
#[derive(Deserialize)]
struct Line {
    stage: Option<String>,
    ns: Option<u64>,
}

/// Writes the chart to `-o FILE`, or to standard output.
///
/// # Errors
/// [`Error::NoContainer`]; [`Error::State`] when it has not been traced.
pub(super) fn boot_chart(call: &Call, root: &Path) -> Result<(), Error> {
    let directory = Directory::of(root, call.id()?)?;
    let record = directory.read()?;
    let path = trace_of(&directory, record.annotations.get("io.coffer.trace"));
    let text = fs::read_to_string(&path).map_err(|e| {
        Error::State(format!("{}: {e}: the chart is drawn from what the VMM wrote there", path.display()))
    })?;
    let stages = last_start(&text);
    if stages.len() < 2 {
        return Err(Error::State(format!("{}: holds no start of a VM", path.display())));
    }
    let image = format!("bundle {}", record.bundle.display());
    let svg = timeline(&format!("Start of {}, {}", record.id, record.created), &spans(&stages), &[image]);
    match call.value("output") {
        Some(file) => fs::write(file, svg).map_err(host(format!("write {file}"))),
        // A reader that has seen enough may close.
        None => {
            let _ = std::io::stdout().write_all(svg.as_bytes());
            Ok(())
        }
    }
}

/// Where a container's trace is: the annotation's file, or the one in its directory.
pub(super) fn trace_of(directory: &Directory, annotation: Option<&String>) -> PathBuf {
    annotation.map_or_else(|| directory.file(TRACE), PathBuf::from)
}

/// The stages of the last start in a trace to which several were appended. What is no line of a trace is left out.
fn last_start(text: &str) -> Vec<(String, u64)> {
    let mut stages = Vec::new();
    for line in text.lines().filter_map(|l| serde_json::from_str::<Line>(l).ok()) {
        let (Some(stage), Some(ns)) = (line.stage, line.ns) else { continue };
        let follows = stages.last().is_some_and(|(before, _): &(String, u64)| before == "create-entry");
        if stage == "create-entry" || matches!(stage.as_str(), "process-entry" | "shell-taken") && !follows {
            stages.clear();
        }
        // The end of the VM belongs to no start.
        if !matches!(stage.as_str(), "orderly-end" | "ended") {
            stages.push((stage, ns));
        }
    }
    stages
}

fn spans(stages: &[(String, u64)]) -> Vec<Span> {
    let origin = stages.first().map_or(0, |s| s.1);
    let ms = |ns: u64| ns.saturating_sub(origin) as f64 / 1e6;
    stages
        .windows(2)
        .map(|pair| {
            let (name, owner) = work_between(Some(&pair[0].0), &pair[1].0);
            // A clock that runs backwards is a broken trace, not a reason to draw backwards.
            let (from_ms, to_ms) = (ms(pair[0].1), ms(pair[1].1).max(ms(pair[0].1)));
            Span { name: name.to_owned(), owner: owner.to_owned(), from_ms, to_ms }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TRACE: &str = "{\"stage\":\"process-entry\",\"ns\":1}\n{\"stage\":\"first-run\",\"ns\":2}\n\
        {\"stage\":\"process-entry\",\"ns\":5000000}\n{\"stage\":\"image-checked\",\"ns\":6500000}\n\
        {\"counts\":{\"mmio-exits\":3}}\n{\"stage\":\"shim-entry\",\"ns\":9000000}\n{\"stage\":\"ended\",\"ns\":99000000}\n";

    #[test]
    fn the_last_start_is_drawn_from_its_own_beginning() {
        let spans = spans(&last_start(TRACE));
        let got: Vec<_> = spans.iter().map(|s| (s.name.as_str(), s.from_ms, s.to_ms)).collect();
        assert_eq!(got, [("read and check the image", 0.0, 1.5), ("first entry into the guest", 1.5, 4.0)]);
    }

    #[test]
    fn what_coffer_does_itself_is_a_part_of_the_start() {
        let trace = TRACE.replace(
            "{\"stage\":\"process-entry\",\"ns\":5000000}",
            "{\"stage\":\"create-entry\",\"ns\":3000000}\n{\"stage\":\"process-entry\",\"ns\":5000000}",
        );
        let spans = spans(&last_start(&trace));
        let got: Vec<_> =
            spans.iter().map(|s| (s.name.as_str(), s.owner.as_str(), s.from_ms, s.to_ms)).collect();
        assert_eq!(got[0], ("plan the pod, start the VMM", "coffer", 0.0, 2.0));
        assert_eq!((got[1].0, got[1].2), ("read and check the image", 2.0));
    }

    #[test]
    fn the_chart_of_a_traced_container_is_an_svg_and_of_another_an_error_that_names_the_file() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), "pod").unwrap();
        directory.create().unwrap();
        let state = serde_json::json!({
            "id": "pod", "oci_version": "1.2.0", "bundle": "/b", "rootfs": "/b/rootfs", "annotations": {},
            "created": "2026-01-01T00:00:00Z", "stub": null, "vmm": { "pid": 1, "start": 0 }, "cgroup": null
        });
        fs::write(directory.file("state.json"), state.to_string()).unwrap();
        let chart = root.path().join("chart.svg");
        let words = ["boot-chart", "-o", chart.to_str().unwrap(), "pod"].map(str::to_owned);
        let call = crate::cli::parse(words).unwrap();
        let error = boot_chart(&call, root.path()).unwrap_err().to_string();
        assert!(error.contains(super::TRACE), "{error}");
        fs::write(directory.file(super::TRACE), TRACE).unwrap();
        boot_chart(&call, root.path()).unwrap();
        let svg = fs::read_to_string(&chart).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("first entry into the guest"), "{svg}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_trace(text in "\\PC*", numbers in prop::collection::vec(any::<u64>(), 0..9)) {
            let lines: String =
                numbers.iter().map(|n| format!("{{\"stage\":\"s\",\"ns\":{n}}}\n")).collect();
            for span in spans(&last_start(&(text + "\n" + &lines))) {
                prop_assert!(span.to_ms >= span.from_ms && span.from_ms.is_finite());
            }
        }
    }
}
