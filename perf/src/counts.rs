//! Instruction counts from the QEMU plugin (`perf/plugin/count.c`) when the harness runs in the rig.
//!
//! Owns: the two markers that the plugin looks for, and its records. On a processor the markers do nothing.

use std::{arch::asm, collections::BTreeMap};

use serde::Deserialize;
use thiserror::Error;

use crate::figures::Figures;

/// The plugin's file is not what it should be.
#[derive(Debug, Error)]
#[error("counts: line {line}: {source}")]
pub struct CountsError {
    /// From 1.
    line: usize,
    source: serde_json::Error,
}

/// A record begins here.
#[inline(always)]
pub fn begin() {
    // SAFETY: a NOP with a displacement of eight bytes in all; it touches no memory, register or flag.
    unsafe {
        asm!(".byte 0x0f, 0x1f, 0x84, 0x00", ".long 0xc0ffee00", options(nomem, nostack, preserves_flags))
    }
}

/// A record ends here.
#[inline(always)]
pub fn end() {
    // SAFETY: as in `begin`.
    unsafe {
        asm!(".byte 0x0f, 0x1f, 0x84, 0x00", ".long 0xc0ffee01", options(nomem, nostack, preserves_flags))
    }
}

#[derive(Deserialize)]
struct Entry {
    stages: Vec<Sums>,
}

#[derive(Deserialize)]
struct Sums {
    stage: String,
    #[serde(flatten)]
    counts: BTreeMap<String, u64>,
}

/// One record per start, in the order of the starts: figures with names that say whose instructions and up to where.
///
/// # Errors
/// [`CountsError`], naming the line.
pub fn parse(text: &str) -> Result<Vec<Figures>, CountsError> {
    let entry = |(index, line)| {
        serde_json::from_str(line)
            .map_err(|source| CountsError { line: index + 1, source })
            .map(|e| figures(&e))
    };
    text.lines().enumerate().map(entry).collect()
}

fn figures(entry: &Entry) -> Figures {
    let mut figures = Figures::new();
    let find = |stage: &str| entry.stages.iter().find(|s| s.stage == stage);
    let mut take = |stage: &str, names: &[(&str, &str)]| {
        if let Some(sums) = find(stage) {
            for (from, to) in names {
                if let Some(count) = sums.counts.get(*from) {
                    figures.insert((*to).to_owned(), *count);
                }
            }
        }
    };
    take(
        "kernel-first-instruction",
        &[
            ("firmware", "instructions-firmware"),
            ("host-program", "instructions-vmm-until-kernel"),
            ("host-kernel", "instructions-host-kernel-until-kernel"),
        ],
    );
    take(
        "pid1-first-instruction",
        &[
            ("kernel-early", "instructions-kernel-early"),
            ("kernel", "instructions-kernel"),
            ("string-steps", "string-steps-guest"),
            ("host-program", "instructions-vmm-until-pid1"),
            ("host-kernel", "instructions-host-kernel-until-pid1"),
            ("guest-entries", "guest-entries-until-pid1"),
        ],
    );
    // The second mark of PID 1 is its last before it waits for the host.
    take("mark-1", &[("program", "instructions-init-until-ready")]);
    // With a container, the third is its making and the fourth its start.
    for (stage, name) in [("mark-2", "created"), ("mark-3", "started")] {
        if let Some(sums) = entry.stages.iter().find(|s| s.stage == stage) {
            for (from, whose) in [("program", "guest-programs"), ("kernel", "kernel")] {
                if let Some(count) = sums.counts.get(from) {
                    figures.insert(format!("instructions-{whose}-until-{name}"), *count);
                }
            }
        }
    }
    // The whole of a runtime's run: its own programs and the host's kernel for them.
    if let Some(sums) = find("end") {
        for (from, whose) in [("host-program", "host-programs"), ("host-kernel", "host-kernel")] {
            if let Some(count) = sums.counts.get(from) {
                figures.insert(format!("instructions-{whose}-in-all"), *count);
            }
        }
    }
    if let (Some(from), Some(to)) = (find("pid1-first-instruction"), find("mark-1"))
        && let (Some(from), Some(to)) = (from.counts.get("kernel"), to.counts.get("kernel"))
    {
        figures.insert("instructions-kernel-for-init-until-ready".into(), to.saturating_sub(*from));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_becomes_figures() {
        begin();
        end();
        let text = r#"{"stages":[{"stage":"kernel-first-instruction","guest-entries":5,"firmware":7,"host-program":3,"host-kernel":4},
            {"stage":"pid1-first-instruction","guest-entries":50,"firmware":7,"kernel":100,"host-program":5,"host-kernel":9},
            {"stage":"mark-0","program":1},{"stage":"mark-1","program":11,"kernel":160},
            {"stage":"mark-2","program":12,"kernel":161},{"stage":"end","host-kernel":99}]}"#
            .replace('\n', "");
        let all = parse(&text).unwrap();
        let figure = |name: &str| all[0][name];
        assert_eq!((figure("instructions-firmware"), figure("instructions-kernel")), (7, 100));
        assert_eq!(figure("instructions-kernel-for-init-until-ready"), 60);
        assert_eq!(figure("guest-entries-until-pid1"), 50);
        assert_eq!(
            (figure("instructions-kernel-until-created"), figure("instructions-host-kernel-in-all")),
            (161, 99)
        );
        assert!(parse("{\"stages\":[]}\nx").unwrap_err().to_string().contains("line 2"));
    }

    proptest! {
        #[test]
        fn any_text_is_counts_or_an_error(text in "\\PC*") {
            let _ = parse(&text);
        }
    }
}
