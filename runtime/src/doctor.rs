//! `coffer doctor`: what this host can do, and what to do about the rest.
//!
//! Owns: looking at the host, and the words. Does not own: the probes of KVM and of SEV-SNP, which are
//! `coffer-vmm --probe` and `--probe-snp`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{confidential::EMULATION, home::Home};

/// What was found. Nothing here is decided yet, so that the report can be tested without a host.
#[derive(Clone, Debug, Default)]
struct Facts {
    root: bool,
    /// What `coffer-vmm --probe` says: fine, or why not. None without a VMM.
    kvm: Option<Result<(), String>>,
    /// The processor's flags.
    flags: Vec<String>,
    vmm: PathBuf,
    image_up: bool,
    image_smp: bool,
    tun: bool,
    cgroup2: bool,
    /// What `coffer-vmm --probe-snp` says is missing, a line each. None without a VMM.
    snp: Option<Vec<String>>,
    /// The operator allows the emulated SNP machine.
    emulation: bool,
    /// `/sys/module/kvm_intel/parameters/tdx`.
    tdx: bool,
    /// First line of `podman --version`.
    podman: Option<String>,
    conmon: bool,
    /// For tests/rig on hosts without KVM.
    qemu: bool,
    /// MiB that are free for guests.
    available_mib: u64,
}

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is there.
    Good,
    /// It is not, and something does not work without it.
    Lacking,
    /// Nothing works without it.
    Fatal,
    /// Neither good nor bad.
    Note,
}

/// One line of the report.
#[derive(Clone, Debug)]
struct Line {
    what: &'static str,
    verdict: Verdict,
    words: String,
}

fn readable(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn is_on(path: &str) -> bool {
    readable(path).is_some_and(|value| matches!(value.as_str(), "Y" | "1"))
}

fn opens(path: &str) -> bool {
    fs::File::options().read(true).write(true).open(path).is_ok()
}

fn found(program: &str, also: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|d| d.join(program))
        .chain(also.iter().map(PathBuf::from))
        .any(|p| p.exists())
}

/// A probe's own words, without the program's name.
fn probe(vmm: &Path, flag: &str) -> Option<Result<(), String>> {
    let output = Command::new(vmm).arg(flag).stdin(Stdio::null()).output().ok()?;
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.trim().trim_start_matches("coffer-vmm: ").to_owned();
    Some(if output.status.success() { Ok(()) } else { Err(words) })
}

impl Facts {
    fn of_this_host() -> Self {
        let home = Home::find().ok();
        let exists = |path: Option<PathBuf>| path.is_some_and(|p| p.exists());
        let vmm = home.as_ref().map(Home::vmm).unwrap_or_default();
        let cpuinfo = readable("/proc/cpuinfo").unwrap_or_default();
        let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
        let podman = Command::new("podman").arg("--version").stdin(Stdio::null()).output().ok();
        let podman = podman.filter(|o| o.status.success());
        let meminfo = readable("/proc/meminfo").unwrap_or_default();
        let available = meminfo.lines().find(|l| l.starts_with("MemAvailable:"));
        let kib = available.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse::<u64>().ok());
        Self {
            root: nix::unistd::geteuid().is_root(),
            kvm: probe(&vmm, "--probe"),
            snp: probe(&vmm, "--probe-snp")
                .map(|said| said.err().map(|e| e.lines().map(str::to_owned).collect()).unwrap_or_default()),
            emulation: Path::new(EMULATION).exists(),
            flags: flags.split_whitespace().map(str::to_owned).collect(),
            vmm,
            image_up: exists(home.as_ref().map(|h| h.image(1, None, false))),
            image_smp: exists(home.as_ref().map(|h| h.image(2, None, false))),
            tun: opens("/dev/net/tun"),
            cgroup2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            tdx: is_on("/sys/module/kvm_intel/parameters/tdx"),
            podman: podman.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()),
            conmon: found("conmon", &["/usr/libexec/podman/conmon", "/usr/lib/podman/conmon"]),
            qemu: found("qemu-system-x86_64", &[]),
            available_mib: kib.unwrap_or(0) / 1024,
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.flags.iter().any(|f| f == name)
    }

    fn kvm_line(&self) -> (Verdict, String) {
        let rig = "; without such a host, tests/rig/rig emulates one";
        match &self.kvm {
            Some(Ok(())) => {
                (Verdict::Good, "runs a stock guest: it went to ring 3 and made a system call".into())
            }
            Some(Err(words)) if self.flag("svm") || self.flag("vmx") => (Verdict::Fatal, words.clone()),
            Some(Err(words)) => {
                let hint = "neither svm nor vmx in the processor's flags: virtualisation is off in the firmware, or this is itself a guest";
                (Verdict::Fatal, format!("{words}; {hint}{rig}"))
            }
            None => (Verdict::Fatal, "cannot be looked at without coffer-vmm".into()),
        }
    }

    /// One for each thing that is missing, in the words with which `--tee snp` fails.
    fn snp_lines(&self) -> Vec<(Verdict, String)> {
        match self.snp.as_deref() {
            None => vec![(Verdict::Lacking, "cannot be looked at without coffer-vmm".into())],
            Some([]) => vec![(Verdict::Good, "processor, kernel and firmware have it".into())],
            Some(missing) => missing.iter().map(|words| (Verdict::Lacking, words.clone())).collect(),
        }
    }

    fn tdx_line(&self) -> (Verdict, String) {
        if self.tdx {
            (Verdict::Good, "kvm_intel has TDX on".into())
        } else if self.flag("tdx_host_platform") {
            (
                Verdict::Lacking,
                "the processor has it, KVM does not: boot Linux 6.16 or later with kvm_intel.tdx=1".into(),
            )
        } else {
            (
                Verdict::Lacking,
                "this processor has none, or the firmware has it off: Xeon of the 5th generation or later"
                    .into(),
            )
        }
    }

    fn report(&self) -> Vec<Line> {
        use Verdict::{Fatal, Good, Lacking, Note};
        let mut lines = Vec::new();
        let mut line = |what, (verdict, words): (Verdict, String)| lines.push(Line { what, verdict, words });
        let either = |good: bool, words: &str, bad: Verdict, remedy: &str| {
            if good { (Good, words.to_owned()) } else { (bad, remedy.to_owned()) }
        };
        line(
            "user",
            either(self.root, "root", Fatal, "not root: coffer makes namespaces, mounts and taps: use sudo"),
        );
        let vmm = self.vmm.display();
        line(
            "VMM",
            either(
                self.kvm.is_some(),
                &format!("{vmm}"),
                Fatal,
                &format!("{vmm} cannot be started: run ./make"),
            ),
        );
        line("KVM", self.kvm_line());
        line(
            "image up",
            either(self.image_up, "for one processor", Fatal, "images/up.igvm is missing: run ./make up"),
        );
        let remedy = "images/smp.igvm is missing: no containers with more than one processor, with initdata, an image that the guest unpacks, a scratch disk or a TEE: run ./make smp";
        line("image smp", either(self.image_smp, "for more processors", Lacking, remedy));
        let remedy = "/dev/net/tun does not open: only --network none works: modprobe tun";
        line("tap devices", either(self.tun, "/dev/net/tun opens", Lacking, remedy));
        let remedy = "no unified hierarchy: limits hold in the guest only: boot with systemd.unified_cgroup_hierarchy=1";
        line("cgroup version 2", either(self.cgroup2, "unified hierarchy", Lacking, remedy));
        line("vsock", (Note, "nothing of the host is needed: coffer-vmm has its own".into()));
        let memory = format!("{} MiB available for guests", self.available_mib);
        let remedy =
            format!("{memory}: a pod that asks for no limit gets 512 MiB, as far as it touches them");
        line("memory", either(self.available_mib >= 300, &memory, Lacking, &remedy));
        let podman = self.podman.as_deref().unwrap_or_default();
        line("podman", either(self.podman.is_some(), podman, Lacking, "none: apt-get install podman"));
        line(
            "conmon",
            either(self.conmon, "found", Lacking, "none, and podman needs it: apt-get install conmon"),
        );
        for missing in self.snp_lines() {
            line("SEV-SNP", missing);
        }
        if self.emulation {
            let words = format!("{EMULATION} lets pods ask for snp-emulated, which protects nothing");
            line("emulated SNP", (Note, words));
        }
        line("TDX", self.tdx_line());
        line("Secure Execution", (Lacking, "an IBM Z matter; coffer runs on x86-64 only".into()));
        let remedy = "tests/rig/rig installs qemu-system-x86 when it is first used";
        line("rig", either(self.qemu, "QEMU is there, for what this host cannot run", Note, remedy));
        lines
    }
}

/// Prints the report. 0 when containers can run here, 1 when not.
#[must_use]
pub fn run() -> i32 {
    let lines = Facts::of_this_host().report();
    for line in &lines {
        let sign = match line.verdict {
            Verdict::Good => "ok",
            Verdict::Lacking => "no",
            Verdict::Fatal => "NO",
            Verdict::Note => "--",
        };
        println!("{sign} {:<17} {}", line.what, line.words);
    }
    let fatal = lines.iter().filter(|l| l.verdict == Verdict::Fatal).count();
    match fatal {
        0 => println!("containers can run here"),
        n => println!("containers cannot run here: {n} of the above to be put right first (NO)"),
    }
    i32::from(fatal > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            root: true,
            kvm: Some(Ok(())),
            image_up: true,
            image_smp: true,
            tun: true,
            cgroup2: true,
            podman: Some("podman version 4.3.1".into()),
            conmon: true,
            available_mib: 4096,
            ..Facts::default()
        }
    }

    fn verdict(facts: &Facts, what: &str) -> (Verdict, String) {
        let line = facts.report().into_iter().find(|l| l.what == what).unwrap();
        (line.verdict, line.words)
    }

    fn fatal(facts: &Facts) -> Vec<&'static str> {
        facts.report().iter().filter(|l| l.verdict == Verdict::Fatal).map(|l| l.what).collect()
    }

    #[test]
    fn only_what_every_container_needs_is_fatal() {
        assert!(fatal(&good()).is_empty());
        let nothing = Facts::default();
        assert_eq!(fatal(&nothing), ["user", "VMM", "KVM", "image up"]);
        let without_extras =
            Facts { image_smp: false, tun: false, cgroup2: false, podman: None, conmon: false, ..good() };
        assert!(fatal(&without_extras).is_empty());
    }

    #[test]
    fn a_kvm_that_runs_no_guest_is_named_with_what_to_do() {
        let facts = Facts { kvm: Some(Err("the probe's words".into())), ..good() };
        let (kind, words) = verdict(&facts, "KVM");
        assert_eq!(kind, Verdict::Fatal);
        assert!(words.starts_with("the probe's words") && words.contains("tests/rig/rig"), "{words}");
        let facts = Facts { flags: vec!["svm".into()], ..facts };
        assert_eq!(verdict(&facts, "KVM").1, "the probe's words");
    }

    #[test]
    fn what_snp_lacks_is_said_line_by_line_and_is_not_fatal() {
        let lines = |snp: Option<&[&str]>| {
            let snp = snp.map(|lines| lines.iter().map(|l| (*l).to_owned()).collect());
            let facts = Facts { snp, ..good() };
            assert!(fatal(&facts).is_empty());
            let lines = facts.report().into_iter().filter(|l| l.what == "SEV-SNP");
            lines.map(|l| (l.verdict, l.words)).collect::<Vec<_>>()
        };
        assert_eq!(lines(Some(&[]))[0].0, Verdict::Good);
        assert_eq!(lines(None)[0].0, Verdict::Lacking);
        let missing = lines(Some(&["processor: none", "/dev/sev: none"]));
        assert_eq!(
            missing,
            [(Verdict::Lacking, "processor: none".into()), (Verdict::Lacking, "/dev/sev: none".into())]
        );
    }

    #[test]
    fn an_operator_who_allows_the_emulated_machine_is_reminded() {
        let facts = Facts { emulation: true, ..good() };
        assert!(verdict(&facts, "emulated SNP").1.contains("protects nothing"));
        assert!(good().report().iter().all(|l| l.what != "emulated SNP"));
    }
}
