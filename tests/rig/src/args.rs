//! The command line.

use std::{path::PathBuf, time::Duration};

use thiserror::Error;

/// Shown by `--help`.
pub(crate) const USAGE: &str = "\
rig: runs a command, as root, where KVM works

  rig run [OPTIONS] [--] COMMAND [ARGUMENT...]
  rig probe      can this host's KVM run a stock guest? exit code 0 or 1
  rig fetch      get the emulated machine's kernel now

On a host whose KVM can run a stock guest the command runs there. Elsewhere it runs in an emulated machine, which
sees this host's files; what it writes there vanishes with the machine, except below --rw.
stdout, stderr, stdin and the exit code are the command's own. stdin is read to its end before the machine starts.
Exit code 124: out of time. 125: the rig failed, and says how.

  --mem MIB          RAM of the machine (2048)
  --smp N            its processors (1)
  --timeout S        seconds until the command is killed (120)
  --ready S          seconds for the machine to come so far that it runs the command, else another one boots, once (180)
  --rw DIR           directory shared for writing; more than once
  --iommu none|intel with intel the machine has an IOMMU with interrupt remapping, for VFIO (none)
  --qemu-arg ARG     one more word for QEMU; more than once
  --append TEXT      more words for the machine's kernel
  --boot             boot the machine, in place of going on with one that was saved after its boot
  --no-stdin         the command's stdin is empty
  --force-rig        emulate even where KVM works
  -q, --quiet        do not say where the command runs
  -v, --verbose      say when the machine was ready, and show its console at the end";

/// What is wrong with a command line.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("unknown option `{0}`: see rig --help")]
    Unknown(String),
    #[error("{0} wants a value: see rig --help")]
    NoValue(String),
    #[error("{0} {1}: not a value that it takes: see rig --help")]
    Value(String, String),
    #[error("run: a command is missing: see rig --help")]
    NoCommand,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Iommu {
    #[default]
    None,
    Intel,
}

/// `rig run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) memory_mib: u32,
    pub(crate) processors: u32,
    pub(crate) time_out: Duration,
    pub(crate) ready: Duration,
    pub(crate) writable: Vec<PathBuf>,
    pub(crate) iommu: Iommu,
    pub(crate) qemu: Vec<String>,
    pub(crate) append: String,
    pub(crate) boot: bool,
    pub(crate) stdin: bool,
    pub(crate) force: bool,
    pub(crate) quiet: bool,
    pub(crate) verbose: bool,
    pub(crate) command: Vec<String>,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            memory_mib: 2048,
            processors: 1,
            time_out: Duration::from_secs(120),
            ready: Duration::from_secs(180),
            writable: Vec::new(),
            iommu: Iommu::None,
            qemu: Vec::new(),
            append: String::new(),
            boot: false,
            stdin: true,
            force: false,
            quiet: false,
            verbose: false,
            command: Vec::new(),
        }
    }
}

impl Run {
    /// The command needs what only the emulated machine has, or its caller wants that.
    pub(crate) fn wants_emulation(&self) -> bool {
        self.force || self.iommu != Iommu::None || !self.qemu.is_empty() || !self.append.is_empty()
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Run(Run),
    Probe,
    Fetch,
    Help,
}

/// Reads the words after the program's name.
pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Command, ArgsError> {
    let mut words = words.into_iter();
    match words.next().as_deref() {
        Some("run") => {}
        Some("probe") => return Ok(Command::Probe),
        Some("fetch") => return Ok(Command::Fetch),
        None | Some("--help" | "-h" | "help") => return Ok(Command::Help),
        Some(other) => return Err(ArgsError::Unknown(other.to_owned())),
    }
    let mut run = Run::default();
    while let Some(word) = words.next() {
        let (option, inline) = match word.split_once('=') {
            Some((option, value)) if option.starts_with("--") => (option.to_owned(), Some(value.to_owned())),
            _ => (word.clone(), None),
        };
        let mut value =
            || inline.clone().or_else(|| words.next()).ok_or_else(|| ArgsError::NoValue(option.clone()));
        match option.as_str() {
            "--" => {
                run.command.extend(words);
                break;
            }
            "--mem" => run.memory_mib = number(&option, value()?, 256)?,
            "--smp" => run.processors = number(&option, value()?, 1)?,
            "--timeout" => run.time_out = Duration::from_secs(number(&option, value()?, 1)?.into()),
            "--ready" => run.ready = Duration::from_secs(number(&option, value()?, 1)?.into()),
            "--rw" => run.writable.push(value()?.into()),
            "--qemu-arg" => run.qemu.push(value()?),
            "--append" => run.append = value()?,
            "--iommu" => {
                run.iommu = match value()?.as_str() {
                    "none" => Iommu::None,
                    "intel" => Iommu::Intel,
                    other => return Err(ArgsError::Value(option, other.to_owned())),
                }
            }
            "--boot" => run.boot = true,
            "--no-stdin" => run.stdin = false,
            "--force-rig" => run.force = true,
            "-q" | "--quiet" => run.quiet = true,
            "-v" | "--verbose" => run.verbose = true,
            "--help" | "-h" => return Ok(Command::Help),
            _ if word.starts_with('-') => return Err(ArgsError::Unknown(word)),
            _ => {
                run.command.push(word);
                run.command.extend(words);
                break;
            }
        }
    }
    if run.command.is_empty() { Err(ArgsError::NoCommand) } else { Ok(Command::Run(run)) }
}

fn number(option: &str, text: String, least: u32) -> Result<u32, ArgsError> {
    match text.parse() {
        Ok(n) if n >= least => Ok(n),
        _ => Err(ArgsError::Value(option.to_owned(), text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Command, ArgsError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let Ok(Command::Run(run)) = words("run --mem 512 --rw /a --rw=/b sh -c --smp") else {
            panic!("refused")
        };
        assert_eq!((run.memory_mib, run.processors), (512, 1));
        assert_eq!(run.writable, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(run.command, ["sh", "-c", "--smp"]);
        assert!(!run.wants_emulation());
        let Ok(Command::Run(run)) = words("run --iommu intel -- --mem") else { panic!("refused") };
        assert_eq!(run.command, ["--mem"]);
        assert!(run.wants_emulation());
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(words("run"), Err(ArgsError::NoCommand));
        assert_eq!(words("run --mem"), Err(ArgsError::NoValue("--mem".into())));
        assert_eq!(words("run --mem 5 x"), Err(ArgsError::Value("--mem".into(), "5".into())));
        assert_eq!(words("run --iommu amd x"), Err(ArgsError::Value("--iommu".into(), "amd".into())));
        assert_eq!(words("run --memory 5 x"), Err(ArgsError::Unknown("--memory".into())));
        assert_eq!(words("walk"), Err(ArgsError::Unknown("walk".into())));
    }
}
