//! `coffer doctor`: what this host can do, and what to do about the rest.

use std::{fs, path::Path};

use crate::home::Home;

/// One line of the report.
struct Check {
    what: &'static str,
    good: bool,
    /// Found, or the remedy.
    words: String,
    /// Without it nothing runs.
    needed: bool,
}

fn check(what: &'static str, needed: bool, good: bool, found: &str, remedy: &str) -> Check {
    Check { what, good, words: if good { found } else { remedy }.to_owned(), needed }
}

fn flags() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines().find(|l| l.starts_with("flags")).unwrap_or_default().to_owned()
}

/// Prints the report. 0 when containers can run here, 1 when not.
#[must_use]
pub fn run() -> i32 {
    let home = Home::find().ok();
    let file = |path: Option<std::path::PathBuf>| path.is_some_and(|p| p.exists());
    let openable = |path: &str| fs::File::options().read(true).write(true).open(path).is_ok();
    let flags = flags();
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    let hardware = has("svm") || has("vmx");
    let checks = [
        check(
            "KVM",
            true,
            openable("/dev/kvm"),
            "/dev/kvm opens",
            "/dev/kvm does not open: load kvm_amd or kvm_intel, run as root; without such a processor use tests/rig/rig",
        ),
        check(
            "virtualisation",
            true,
            hardware,
            "the processor has it",
            "neither svm nor vmx in the processor's flags: Linux guests cannot run on this KVM; use tests/rig/rig",
        ),
        check(
            "tap devices",
            false,
            openable("/dev/net/tun"),
            "/dev/net/tun opens",
            "/dev/net/tun does not open: modprobe tun; until then only --network none works",
        ),
        check(
            "cgroup version 2",
            false,
            Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            "unified hierarchy",
            "no unified hierarchy: limits hold in the guest only; boot with systemd.unified_cgroup_hierarchy=1",
        ),
        check(
            "VMM",
            true,
            file(home.as_ref().map(Home::vmm)),
            "installed",
            "bin/coffer-vmm is missing: run ./build",
        ),
        check(
            "image up",
            true,
            file(home.as_ref().map(|h| h.image(1))),
            "installed",
            "images/up.igvm is missing: run ./build",
        ),
        check(
            "image smp",
            false,
            file(home.as_ref().map(|h| h.image(2))),
            "installed",
            "images/smp.igvm is missing: containers with more than one CPU cannot run; run ./build",
        ),
        check(
            "SEV-SNP",
            false,
            Path::new("/dev/sev").exists(),
            "/dev/sev is there; coffer cannot launch SNP guests yet",
            "no /dev/sev, and coffer cannot launch SNP guests yet",
        ),
    ];
    for c in &checks {
        let word = if c.good {
            "ok"
        } else if c.needed {
            "NO"
        } else {
            "no"
        };
        println!("{word:<3} {:<18} {}", c.what, c.words);
    }
    i32::from(checks.iter().any(|c| c.needed && !c.good))
}
