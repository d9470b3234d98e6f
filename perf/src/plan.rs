//! What is run: a small TOML file, checked before anything starts.
//!
//! Owns: the file's format and the cells it stands for. Does not own: how a cell is run.
//!
//! Every list is multiplied with every other. Paths are relative to the repository's root, from which `perf/run` starts.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What is wrong with a plan.
#[derive(Debug, Error)]
pub enum PlanError {
    /// Not TOML, or not these fields.
    #[error("plan: {0}")]
    Format(#[from] toml::de::Error),
    /// Fields that mean nothing together.
    #[error("plan: {0}")]
    Meaning(String),
}

/// A start's class. Classes are never put into one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// The host's page cache is dropped before every round.
    Cold,
    /// The page cache holds every file.
    Warm,
    /// Restored from a snapshot.
    Template,
    /// Booted by a VMM that waited in a pool.
    Pool,
}

impl Class {
    /// In tables and file names.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Template => "template",
            Self::Pool => "pool",
        }
    }
}

/// How far a VM's start is watched; its memory and KVM's counters are read then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Until {
    /// To `main` of PID 1: the same for every VMM.
    #[default]
    Pid1,
    /// To an init that can take containers: needs our devices.
    Ready,
}

/// What starts something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Our VMM.
    CofferVmm,
    /// QEMU's microvm machine.
    QemuMicrovm,
    /// Cloud Hypervisor, when a path is given.
    CloudHypervisor,
    /// Firecracker, when a path is given.
    Firecracker,
    /// Alioth.
    Alioth,
    /// Our runtime with a container.
    Coffer,
    /// crun with a container.
    Crun,
    /// runc with a container.
    Runc,
    /// gVisor with a container.
    Runsc,
}

impl Kind {
    /// As in plans.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::CofferVmm => "coffer-vmm",
            Self::QemuMicrovm => "qemu-microvm",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
            Self::Alioth => "alioth",
            Self::Coffer => "coffer",
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Runsc => "runsc",
        }
    }

    /// It tells of the guest's writes to the mark port.
    #[must_use]
    pub fn passes_marks_on(self) -> bool {
        !matches!(self, Self::Firecracker | Self::Alioth)
    }

    /// It starts a container, not only a VM.
    #[must_use]
    pub fn is_container_runtime(self) -> bool {
        matches!(self, Self::Coffer | Self::Crun | Self::Runc | Self::Runsc)
    }
}

/// A runtime as it is kept and shown: of two of one kind, one at least has a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Who {
    /// Which one.
    #[serde(rename = "runtime")]
    pub kind: Kind,
    /// The plan's, when it has one.
    #[serde(rename = "runtime-name", default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Who {
    /// In tables.
    #[must_use]
    pub fn words(&self) -> &str {
        self.name.as_deref().unwrap_or(self.kind.word())
    }
}

impl From<Kind> for Who {
    fn from(kind: Kind) -> Self {
        Self { kind, name: None }
    }
}

/// Who tells of the guest's marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Marks {
    /// The VMM passes them on.
    Vmm,
    /// The host's kernel, by KVM's tracepoint `kvm_pio`: for VMMs that pass on no write to the mark port.
    Tracepoint,
}

/// A runtime with its program.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// Which one.
    pub kind: Kind,
    /// Its program; a name without a slash is looked up in PATH.
    pub program: PathBuf,
    /// In tables, where a plan has two of one kind.
    #[serde(default)]
    name: Option<String>,
    /// By default the VMM, where it can: see [`Runtime::marks`].
    #[serde(default)]
    marks: Option<Marks>,
    /// Words after ours, for what a host cannot do otherwise: the plan says why.
    #[serde(default)]
    pub arguments: Vec<String>,
}

impl Runtime {
    /// As whom its starts are kept.
    #[must_use]
    pub fn who(&self) -> Who {
        Who { kind: self.kind, name: self.name.clone() }
    }

    /// Who tells of its guest's marks.
    #[must_use]
    pub fn marks(&self) -> Marks {
        let default = if self.kind.passes_marks_on() { Marks::Vmm } else { Marks::Tracepoint };
        self.marks.unwrap_or(default)
    }
}

/// What a VM boots: every VMM the same kernel and initramfs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Name in tables.
    pub name: String,
    /// The IGVM image made of the two files below. Without one, only VMMs that read kernels boot it.
    #[serde(default)]
    pub igvm: Option<PathBuf>,
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// A file with the kernel's command line, without the devices of our machine.
    pub command_line: PathBuf,
    /// It expects ACPI tables: no kernel of ours does, and only QEMU has them.
    #[serde(default)]
    pub acpi: bool,
}

/// A checked plan.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Name in tables.
    pub name: String,
    /// Measured starts of each cell.
    pub repetitions: usize,
    /// Rounds before them that are thrown away.
    #[serde(default = "one")]
    pub warm_up: usize,
    /// Seconds that one start may take.
    #[serde(default = "limit")]
    pub time_limit_s: u64,
    /// How far VMs are watched.
    #[serde(default)]
    pub until: Until,
    /// Classes.
    pub classes: Vec<Class>,
    /// MiB of RAM of a guest.
    pub memory_mib: Vec<u64>,
    /// Processors of a guest.
    #[serde(default = "one_vcpu")]
    pub vcpus: Vec<u32>,
    /// Starts at the same time.
    #[serde(default = "one_at_a_time")]
    pub parallel: Vec<usize>,
    /// MiB of RAM of the emulated machine, when the plan runs in one: `perf/run` reads this line itself.
    #[serde(default)]
    pub rig_memory_mib: Option<u64>,
    /// Processors of the emulated machine, likewise.
    #[serde(default)]
    pub rig_processors: Option<u32>,
    /// What starts them. The first one is what the others are compared with.
    pub runtime: Vec<Runtime>,
    /// What VMs boot. A container runtime takes none of them.
    #[serde(default)]
    pub image: Vec<Image>,
}

fn one() -> usize {
    1
}

fn limit() -> u64 {
    60
}

fn one_vcpu() -> Vec<u32> {
    vec![1]
}

fn one_at_a_time() -> Vec<usize> {
    vec![1]
}

/// One combination, without the runtime: these are run in turns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell<'a> {
    /// Its class.
    pub class: Class,
    /// The image, none for containers.
    pub image: Option<&'a Image>,
    /// MiB of RAM.
    pub memory_mib: u64,
    /// Processors.
    pub vcpus: u32,
    /// Starts at the same time.
    pub parallel: usize,
    /// Who takes part.
    pub runtimes: Vec<&'a Runtime>,
}

impl Plan {
    /// Reads and checks.
    ///
    /// # Errors
    /// [`PlanError`], naming the field.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let plan: Self = toml::from_str(text)?;
        let wrong = |words: &str| Err(PlanError::Meaning(words.to_owned()));
        if !(1..=100_000).contains(&plan.repetitions) {
            return wrong("repetitions: 1 to 100000");
        }
        let only_ours = plan.runtime.iter().all(|r| r.kind == Kind::CofferVmm);
        if plan.classes.contains(&Class::Template) && !(only_ours && plan.until == Until::Ready) {
            return wrong(
                "classes: template: only coffer-vmm starts from one, and until = \"ready\" is where it starts",
            );
        }
        if plan.classes.contains(&Class::Pool) && plan.runtime.iter().any(|r| r.kind != Kind::Coffer) {
            return wrong("classes: pool: only coffer has a pool");
        }
        if plan.classes.is_empty() || plan.memory_mib.is_empty() || plan.vcpus.is_empty() {
            return wrong("classes, memory_mib and vcpus want one value each at least");
        }
        if plan.parallel.iter().any(|n| !(1..=256).contains(n)) || plan.parallel.is_empty() {
            return wrong("parallel: numbers from 1 to 256");
        }
        if plan.until == Until::Ready && plan.runtime.iter().any(|r| r.kind != Kind::CofferVmm) {
            return wrong("until = \"ready\": only coffer-vmm has the devices that init waits for");
        }
        if plan.runtime.is_empty() {
            return wrong("[[runtime]] is missing");
        }
        if plan.runtime.iter().any(|r| r.marks.is_some() && r.kind.is_container_runtime()) {
            return wrong("marks: a container runtime's are read from its VMM's trace");
        }
        if plan.runtime.iter().any(|r| !r.arguments.is_empty() && r.kind.is_container_runtime()) {
            return wrong("arguments: only a VMM takes some");
        }
        if let Some(r) = plan.runtime.iter().find(|r| !r.kind.passes_marks_on() && r.marks() == Marks::Vmm) {
            return wrong(&format!("marks = \"vmm\": {} passes none on", r.kind.word()));
        }
        if plan.image.iter().any(|i| i.acpi) && plan.runtime.iter().any(|r| r.kind != Kind::QemuMicrovm) {
            return wrong("acpi = true: only qemu-microvm has ACPI tables");
        }
        if plan.image.iter().any(|i| i.igvm.is_none()) && only_ours {
            return wrong("igvm is missing: coffer-vmm boots nothing else");
        }
        if plan.image.is_empty() && plan.runtime.iter().any(|r| !r.kind.is_container_runtime()) {
            return wrong("a VMM wants an [[image]]");
        }
        let mut everyone = BTreeSet::new();
        if let Some(twice) =
            plan.runtime.iter().map(Runtime::who).find(|who| !everyone.insert(who.words().to_owned()))
        {
            return wrong(&format!("name: two runtimes would both be `{}` in tables", twice.words()));
        }
        Ok(plan)
    }

    /// All cells, in the plan's order.
    #[must_use]
    pub fn cells(&self) -> Vec<Cell<'_>> {
        let mut cells = Vec::new();
        let (containers, vmms): (Vec<_>, Vec<_>) =
            self.runtime.iter().partition(|r| r.kind.is_container_runtime());
        for &class in &self.classes {
            for &parallel in &self.parallel {
                for &memory_mib in &self.memory_mib {
                    for &vcpus in &self.vcpus {
                        let cell = |image, runtimes: &Vec<&'_ Runtime>| Cell {
                            class,
                            image,
                            memory_mib,
                            vcpus,
                            parallel,
                            runtimes: runtimes.iter().map(|r| &self.runtime[self.place(r)]).collect(),
                        };
                        if !vmms.is_empty() {
                            cells.extend(self.image.iter().map(|image| {
                                let mut able = vmms.clone();
                                able.retain(|r| r.kind != Kind::CofferVmm || image.igvm.is_some());
                                cell(Some(image), &able)
                            }));
                        }
                        if !containers.is_empty() {
                            cells.push(cell(None, &containers));
                        }
                    }
                }
            }
        }
        cells
    }

    /// The files that it names, each once: what VMs boot.
    #[must_use]
    pub fn files(&self) -> BTreeSet<&Path> {
        let of = |image| {
            let Image { igvm, kernel, initramfs, command_line, .. }: &Image = image;
            igvm.iter().chain([kernel, initramfs, command_line]).map(PathBuf::as_path)
        };
        self.image.iter().flat_map(of).collect()
    }

    /// Which of the plan's runtimes one is, from 0.
    #[must_use]
    pub fn place(&self, runtime: &Runtime) -> usize {
        self.runtime.iter().position(|r| r == runtime).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = r#"
        name = "x"
        repetitions = 3
        classes = ["cold", "warm"]
        memory_mib = [128, 256]
        parallel = [1, 4]
        [[runtime]]
        kind = "coffer-vmm"
        program = "a"
        [[runtime]]
        kind = "crun"
        program = "crun"
        [[image]]
        name = "up"
        igvm = "i"
        kernel = "k"
        initramfs = "r"
        command_line = "c"
    "#;

    #[test]
    fn lists_are_multiplied_and_containers_have_cells_of_their_own() {
        let plan = Plan::parse(TEXT).unwrap();
        let cells = plan.cells();
        assert_eq!(cells.len(), 2 * 2 * 2 * 2);
        let kinds = |c: &Cell<'_>| c.runtimes.iter().map(|r| r.kind).collect::<Vec<_>>();
        assert_eq!((kinds(&cells[0]), cells[0].image.is_some()), (vec![Kind::CofferVmm], true));
        assert_eq!((kinds(&cells[1]), cells[1].image.is_some()), (vec![Kind::Crun], false));
    }

    #[test]
    fn all_files_of_all_images_are_named() {
        let names = |text: &str| {
            Plan::parse(text).unwrap().files().iter().map(|p| p.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(TEXT), ["c", "i", "k", "r"]);
        let other = "[[image]]\nname = \"y\"\nkernel = \"k\"\ninitramfs = \"s\"\ncommand_line = \"c\"\n";
        assert_eq!(names(&format!("{TEXT}\n{other}")), ["c", "i", "k", "r", "s"]);
    }

    #[test]
    fn an_image_without_igvm_is_for_the_others() {
        let without = TEXT.replace("igvm = \"i\"\n", "");
        let plan = Plan::parse(&without.replace("kind = \"crun\"", "kind = \"qemu-microvm\"")).unwrap();
        for cell in plan.cells() {
            assert_eq!(cell.runtimes.iter().map(|r| r.kind).collect::<Vec<_>>(), [Kind::QemuMicrovm]);
        }
        let ours = without.replace("kind = \"crun\"", "kind = \"coffer-vmm\"");
        assert!(Plan::parse(&ours).unwrap_err().to_string().contains("igvm is missing"));
    }

    #[test]
    fn two_of_one_kind_have_names() {
        let text = TEXT.replace("kind = \"crun\"", "kind = \"coffer-vmm\"\nname = \"the other\"");
        let plan = Plan::parse(&text).unwrap();
        let cell = &plan.cells()[0];
        let words: Vec<String> = cell.runtimes.iter().map(|r| r.who().words().to_owned()).collect();
        assert_eq!(words, ["coffer-vmm", "the other"]);
        assert_eq!(cell.runtimes[1].program, PathBuf::from("crun"));
    }

    #[test]
    fn what_cannot_be_run_is_refused_with_the_field() {
        for (from, to, words) in [
            ("repetitions = 3", "repetitions = 0", "repetitions"),
            ("\"cold\", \"warm\"", "\"template\"", "only coffer-vmm starts from one"),
            ("\"cold\", \"warm\"", "\"pool\"", "only coffer has a pool"),
            ("[1, 4]", "[0]", "parallel"),
            ("repetitions = 3", "repetitions = 3\nuntil = \"ready\"", "until"),
            ("igvm = \"i\"", "igvm = \"i\"\nacpi = true", "acpi"),
            ("kind = \"crun\"", "kind = \"krun\"", "krun"),
            ("kind = \"crun\"", "kind = \"crun\"\nmarks = \"tracepoint\"", "marks"),
            ("kind = \"crun\"", "kind = \"crun\"\narguments = [\"--debug\"]", "only a VMM takes some"),
            ("kind = \"crun\"", "kind = \"firecracker\"\nmarks = \"vmm\"", "firecracker passes none on"),
            ("kind = \"crun\"", "kind = \"alioth\"\nmarks = \"vmm\"", "alioth passes none on"),
            ("kind = \"crun\"", "kind = \"coffer-vmm\"", "both be `coffer-vmm`"),
            ("kind = \"crun\"", "kind = \"crun\"\nname = \"coffer-vmm\"", "both be `coffer-vmm`"),
            ("name = \"x\"", "name = \"x\"\nspeed = 1", "speed"),
        ] {
            let error = Plan::parse(&TEXT.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_plan_or_an_error(text in "\\PC*") {
            let _ = Plan::parse(&text);
        }
    }
}
