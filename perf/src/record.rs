//! One start as it is kept: a line of `raw.jsonl`.
//!
//! Owns: the format and the names of windows. Does not own: where the figures come from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::plan::{Class, Who};

/// From which event to which: no time is ever given without it. All begin with the exec of the runtime's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Window {
    /// To the first instruction that the guest runs (with us, of the shim).
    FirstGuestInstruction,
    /// To the jump to the kernel.
    KernelEntry,
    /// To `main` of PID 1.
    Pid1,
    /// To a guest that can take containers.
    Ready,
    /// To the first instruction of the container's process.
    Container,
    /// To the container's first byte, read by the caller.
    Output,
    /// To the return of the command that has deleted everything.
    Deleted,
}

impl Window {
    /// All, in order.
    pub const ALL: [Self; 7] = [
        Self::FirstGuestInstruction,
        Self::KernelEntry,
        Self::Pid1,
        Self::Ready,
        Self::Container,
        Self::Output,
        Self::Deleted,
    ];

    /// In tables.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::FirstGuestInstruction => "exec → first guest instruction",
            Self::KernelEntry => "exec → kernel entry",
            Self::Pid1 => "exec → PID 1",
            Self::Ready => "exec → init ready",
            Self::Container => "exec → container's first instruction",
            Self::Output => "exec → output at the caller",
            Self::Deleted => "exec → deleted",
        }
    }

    /// The stage of our trace with which it ends.
    #[must_use]
    pub fn stage(self) -> Option<&'static str> {
        Some(match self {
            Self::FirstGuestInstruction => "shim-entry",
            Self::KernelEntry => "kernel-entry",
            Self::Pid1 => "init-entry",
            Self::Ready => "init-ready",
            Self::Container => "container-started",
            Self::Output | Self::Deleted => return None,
        })
    }

    /// The window that ends with a stage of our trace.
    #[must_use]
    pub fn of_stage(stage: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|window| window.stage() == Some(stage))
    }
}

/// A stage that was reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Its name in the trace.
    pub stage: String,
    /// Milliseconds since the exec.
    pub ms: f64,
}

/// What is known of one start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of the start since the harness began, warm-ups counted: finds the plugin's counts.
    pub sequence: usize,
    /// Who.
    #[serde(flatten)]
    pub who: Who,
    /// Which of the plan's runtimes that is, from 0. Records that were written before this was kept all have 0.
    #[serde(default)]
    pub place: usize,
    /// Name of the image; empty for containers.
    pub image: String,
    /// Class.
    pub class: Class,
    /// MiB of RAM.
    pub memory_mib: u64,
    /// Processors.
    pub vcpus: u32,
    /// Starts at the same time.
    pub parallel: usize,
    /// Round, from 1; 0 is no round: warm-ups are not kept.
    pub round: usize,
    /// Milliseconds.
    pub windows: BTreeMap<Window, f64>,
    /// In order, from the VMM's own trace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
    /// Counts and sizes; their names say the unit.
    pub figures: BTreeMap<String, u64>,
}

/// What makes two starts comparable: everything but round and runtime.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Class.
    pub class: Class,
    /// Image, empty for containers.
    pub image: String,
    /// MiB of RAM.
    pub memory_mib: u64,
    /// Processors.
    pub vcpus: u32,
    /// Starts at the same time.
    pub parallel: usize,
}

#[cfg(test)]
impl Record {
    /// One start of a test's, by itself.
    pub(crate) fn of_a_test(kind: crate::plan::Kind) -> Self {
        Self {
            sequence: 0,
            who: kind.into(),
            place: 0,
            image: "up".into(),
            class: Class::Warm,
            memory_mib: 128,
            vcpus: 1,
            parallel: 1,
            round: 1,
            windows: BTreeMap::new(),
            stages: Vec::new(),
            figures: BTreeMap::new(),
        }
    }
}

impl Record {
    /// Its group.
    #[must_use]
    pub fn group(&self) -> Group {
        Group {
            class: self.class,
            image: self.image.clone(),
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            parallel: self.parallel,
        }
    }
}

impl Group {
    /// In headings.
    #[must_use]
    pub fn words(&self) -> String {
        let what =
            if self.image.is_empty() { "container".to_owned() } else { format!("image {}", self.image) };
        let at_once = if self.parallel == 1 { String::new() } else { format!(", {} at once", self.parallel) };
        format!("{what}, {}, {} MiB, {} vCPU{at_once}", self.class.word(), self.memory_mib, self.vcpus)
    }

    /// In file names.
    #[must_use]
    pub fn file_name(&self) -> String {
        let what = if self.image.is_empty() { "container" } else { &self.image };
        format!("{what}-{}-{}mib-{}vcpu-{}", self.class.word(), self.memory_mib, self.vcpus, self.parallel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Kind;

    #[test]
    fn a_record_is_one_line_that_reads_back() {
        let record = Record {
            sequence: 4,
            round: 2,
            windows: [(Window::Pid1, 3.5)].into(),
            stages: vec![Stage { stage: "init-entry".into(), ms: 3.5 }],
            figures: [("page-faults".to_owned(), 7)].into(),
            ..Record::of_a_test(Kind::CofferVmm)
        };
        let line = serde_json::to_string(&record).unwrap();
        assert!(line.contains("\"windows\":{\"pid1\":3.5}") && !line.contains('\n'), "{line}");
        assert!(line.contains("\"runtime\":\"coffer-vmm\",\"place\":0,\"image\""), "{line}");
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record);
        // A line of before records had it.
        let old = line.replace("\"place\":0,", "");
        assert_eq!(serde_json::from_str::<Record>(&old).unwrap(), record);
        let named = Record { who: Who { name: Some("new".into()), ..record.who.clone() }, ..record.clone() };
        let line = serde_json::to_string(&named).unwrap();
        assert!(line.contains("\"runtime\":\"coffer-vmm\",\"runtime-name\":\"new\""), "{line}");
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), named);
        assert_eq!(record.group().file_name(), "up-warm-128mib-1vcpu-1");
    }
}
