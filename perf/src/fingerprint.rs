//! The machine on which something was measured: without it a time means nothing.
//!
//! Owns: reading it. What cannot be read of the machine is left out, not guessed; what the plan names must be there.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};
use thiserror::Error;

/// Names with values, all text.
pub type Fingerprint = BTreeMap<String, String>;

/// What the plan names is not there: what would be measured is not what it says.
#[derive(Debug, Error)]
pub enum FingerprintError {
    /// It cannot be read.
    #[error("the plan's {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A name without a slash.
    #[error("the plan's program `{0}` is nowhere in PATH")]
    Program(String),
}

/// Reads the machine's. `programs` are asked for their version; they and the `files` have their SHA-256 taken.
///
/// # Errors
/// [`FingerprintError`], naming the program or file that is missing.
pub fn read(programs: &[String], files: &[String]) -> Result<Fingerprint, FingerprintError> {
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
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in programs {
        let file = resolve(program, &path).ok_or_else(|| FingerprintError::Program(program.clone()))?;
        add(&format!("sha256 of {}", file.display()), Some(sum(&file)?));
    }
    for file in files {
        add(&format!("sha256 of {file}"), Some(sum(Path::new(file))?));
    }
    Ok(print)
}

/// The file that is run for a program's name: as it is with a slash, or else the first in `path` that can be run.
fn resolve(program: &str, path: &OsStr) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(program.into());
    }
    let can_run =
        |file: &PathBuf| fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    std::env::split_paths(path).map(|place| place.join(program)).find(can_run)
}

fn sum(path: &Path) -> Result<String, FingerprintError> {
    let of = || -> io::Result<String> {
        let mut hash = Sha256::new();
        io::copy(&mut File::open(path)?, &mut HashWriter(&mut hash))?;
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    };
    of().map_err(|source| FingerprintError::File { path: path.to_owned(), source })
}

/// A digest as what is written to.
struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
        let print = read(&["sh".into(), "/bin/sh".into()], std::slice::from_ref(&path)).unwrap();
        assert!(print.contains_key("kernel"), "{print:?}");
        // The published digest of nothing.
        assert_eq!(
            print[&format!("sha256 of {path}")],
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
    #[test]
    fn a_program_has_the_sum_of_the_file_that_path_leads_to() {
        let print = read(&["sh".into()], &[]).unwrap();
        let (key, sum) = print.iter().find(|(key, _)| key.starts_with("sha256 of ")).unwrap();
        let path = key.strip_prefix("sha256 of ").unwrap();
        assert!(path.ends_with("/sh"), "{path}");
        let wanted = output("sha256sum", &[path]).unwrap();
        assert_eq!(wanted.split(' ').next(), Some(sum.as_str()));
    }

    #[test]
    fn what_a_plan_names_and_is_not_there_is_named() {
        let error = read(&["sh-that-is-not-there".into()], &[]).unwrap_err().to_string();
        assert!(error.contains("sh-that-is-not-there") && error.contains("PATH"), "{error}");
        for (programs, files) in [(&["/no/program".to_owned()][..], &[][..]), (&[], &["/no/program".into()])]
        {
            let error = read(programs, files).unwrap_err().to_string();
            assert!(error.contains("/no/program"), "{error}");
        }
    }

    #[test]
    fn a_name_is_looked_up_where_it_can_be_run() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str, mode| {
            let place = directory.path().join(name);
            fs::create_dir(&place).unwrap();
            fs::write(place.join("vmm"), name).unwrap();
            fs::set_permissions(place.join("vmm"), fs::Permissions::from_mode(mode)).unwrap();
            place
        };
        let path =
            std::env::join_paths([place("no program", 0o644), place("one", 0o755), place("two", 0o755)]);
        let path = path.unwrap();
        assert_eq!(resolve("vmm", &path), Some(directory.path().join("one/vmm")));
        assert_eq!(resolve("a/vmm", &path), Some("a/vmm".into()));
        assert_eq!(resolve("other", &path), None);
    }
}
