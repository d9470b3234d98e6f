//! The machine on which something was measured: without it a time means nothing.
//!
//! Owns: reading it. What cannot be read is left out, not guessed.

use std::{collections::BTreeMap, fs, process::Command};

/// Names with values, all text.
pub type Fingerprint = BTreeMap<String, String>;

/// Reads the machine's. `programs` are asked for their version, `files` for their SHA-256.
#[must_use]
pub fn read(programs: &[String], files: &[String]) -> Fingerprint {
    let mut print = Fingerprint::new();
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value.map(|v| v.trim().to_owned()).filter(|v| !v.is_empty()) {
            print.insert(name.to_owned(), value);
        }
    };
    let file = |path: &str| fs::read_to_string(path).ok();
    let cpu = file("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpu.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == name))?;
        line.split(':').nth(1).map(str::to_owned)
    };
    add("processor", field("model name"));
    add("microcode", field("microcode"));
    add("processors", Some(cpu.lines().filter(|l| l.starts_with("processor")).count().to_string()));
    let virtual_machine = field("flags").is_some_and(|f| f.split_whitespace().any(|w| w == "hypervisor"));
    add("in a virtual machine", Some(if virtual_machine { "yes" } else { "no" }.to_owned()));
    add("kernel", file("/proc/sys/kernel/osrelease"));
    add("memory", file("/proc/meminfo").and_then(|m| m.lines().next().map(|l| l.replace("MemTotal:", ""))));
    add("clock source", file("/sys/devices/system/clocksource/clocksource0/current_clocksource"));
    add("governor", file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"));
    add("SMT", file("/sys/devices/system/cpu/smt/control"));
    add("huge pages", file("/sys/kernel/mm/transparent_hugepage/enabled"));
    add("kvm nx_huge_pages", file("/sys/module/kvm/parameters/nx_huge_pages"));
    let mounts = file("/proc/mounts").unwrap_or_default();
    let cgroup = mounts.lines().find(|l| l.split(' ').nth(1) == Some("/sys/fs/cgroup"));
    add("cgroup", cgroup.map(|l| l.split(' ').skip(2).take(2).collect::<Vec<_>>().join(" ")));
    add("load average at the start", file("/proc/loadavg"));
    add("commit", output("git", &["describe", "--always", "--dirty", "--abbrev=12"]));
    for program in programs {
        add(&format!("version of {program}"), output(program, &["--version"]).and_then(first_line));
    }
    for path in files {
        let sum = output("sha256sum", &[path]);
        add(&format!("sha256 of {path}"), sum.and_then(|s| s.split(' ').next().map(str::to_owned)));
    }
    print
}

fn output(program: &str, words: &[&str]) -> Option<String> {
    let output = Command::new(program).args(words).output().ok().filter(|o| o.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn first_line(text: String) -> Option<String> {
    text.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_kernel_and_a_file_has_its_sum() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display().to_string();
        let print = read(&["sh-that-is-not-there".into()], std::slice::from_ref(&path));
        assert!(print.contains_key("kernel"), "{print:?}");
        // The published digest of nothing.
        assert_eq!(
            print[&format!("sha256 of {path}")],
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
