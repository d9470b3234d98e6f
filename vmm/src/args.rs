//! The command line of `coffer-vmm`.
//!
//! Owns: flags and their checks. Does not own: files, which are opened later.

use std::{os::fd::RawFd, path::PathBuf};

use coffer_layout::slot;
use thiserror::Error;

/// Shown by `--help`.
pub const USAGE: &str = "\
coffer-vmm: boots an IGVM image in a microVM

  --image FILE           IGVM file made by coffer-image build
  --memory-mib N         RAM of the guest
  --vcpus N              processors, 1 to 64 (more than 1 needs an smp image)
  --boot-vcpus N         of them, those that the guest starts with; the others wait until it takes them (an smp image, no TEE)
  --vsock PATH           unix socket to make: `CONNECT PORT` on it reaches the guest
  --fs DIR               directory that the guest sees as virtio-fs `coffer`
  --disk PATH[,readonly] file or block device that the guest sees as a disk; up to 4 times
  --net fd=N,mac=MAC     tap device, open already; up to 3 times
  --console FILE         serial console of a debug image; - is standard error
  --trace FILE           boot stages with their times, one JSON object a line
  --trace-from NS        when whoever starts this VMM began (CLOCK_MONOTONIC): the trace's first stage
  --log FILE             messages go there too
  --log-format FORMAT    text or json
  --lifeline-fd N        the VM ends when this pipe's other end is closed
  --exit-report FILE     how the VM ended, as one JSON object
  --tee KIND             none; snp: AMD SEV-SNP; snp-emulated: the same boot without the hardware, WHICH PROTECTS NOTHING
  --make-template DIR    saves the machine into DIR when its init is ready, and ends
  --template DIR         starts from the machine saved in DIR, when it fits; else boots, and says why
  --shell DIR            with --image alone: makes what no pod decides, then waits on DIR/socket for the rest of these arguments
  --policy HEX           SNP guest policy, in place of the image's
  --host-data HEX        32 bytes that the guest's attestation reports carry
  --certificates FILE    certificate table that extended guest requests get
  --development-keys DIR root that signs an emulated guest's reports, made when it is not there
  --probe                can this host's KVM run a guest? exit code 0 or 1, and why not
  --probe-snp            can it run a guest with --tee snp? exit code 0 or 78, and what is missing, a line each
  --version, --help";

/// What is wrong with a command line. One line, exit code 64.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ArgsError {
    /// No such flag.
    #[error("unknown flag `{0}`: see coffer-vmm --help")]
    Unknown(String),
    /// The flag is last.
    #[error("{0} wants a value: see coffer-vmm --help")]
    NoValue(String),
    /// The value means nothing.
    #[error("{flag} {value}: {wanted}")]
    Value {
        /// Which flag.
        flag: String,
        /// What was given.
        value: String,
        /// What it wants.
        wanted: &'static str,
    },
    /// A flag that means nothing without a TEE.
    #[error("{0} needs --tee snp or --tee snp-emulated")]
    WithoutTee(&'static str),
    /// A flag that would change what a TEE measures.
    #[error("{0} goes with --tee none alone: it is told on the kernel's command line, which a TEE measures")]
    MeasuredLine(&'static str),
    /// A machine that cannot be saved.
    #[error("{flag} with {with}: {why}")]
    NoTemplate {
        /// The flag.
        flag: &'static str,
        /// What it does not go with.
        with: &'static str,
        /// Why.
        why: &'static str,
    },
    /// A shell is told the rest later.
    #[error("--shell takes --image, --log and --log-format alone: the rest comes with the pod")]
    Shell,
    /// A flag that must be there.
    #[error("{0} is missing: see coffer-vmm --help")]
    Missing(&'static str),
}

/// One network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetArgs {
    /// Inherited descriptor of a tap.
    pub fd: RawFd,
    /// Its MAC address in the guest.
    pub mac: [u8; 6],
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArgs {
    /// File or block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// What protects the guest from the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tee {
    /// Nothing.
    #[default]
    None,
    /// AMD SEV-SNP.
    Snp,
    /// Nothing either: SEV-SNP played by this process, for development.
    SnpEmulated,
}

/// A checked command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its flag")]
pub struct Args {
    pub image: PathBuf,
    pub memory_mib: u64,
    pub vcpus: u32,
    pub boot_vcpus: Option<u32>,
    pub vsock: Option<PathBuf>,
    pub fs: Option<PathBuf>,
    pub nets: Vec<NetArgs>,
    pub disks: Vec<DiskArgs>,
    pub console: Option<PathBuf>,
    pub trace: Option<PathBuf>,
    pub trace_from: Option<u64>,
    pub log: Option<PathBuf>,
    pub log_json: bool,
    pub lifeline: Option<RawFd>,
    pub exit_report: Option<PathBuf>,
    pub tee: Tee,
    pub policy: Option<u64>,
    pub host_data: Option<[u8; 32]>,
    pub certificates: Option<PathBuf>,
    pub development_keys: Option<PathBuf>,
    pub make_template: Option<PathBuf>,
    pub template: Option<PathBuf>,
}

/// A shell's command line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its flag")]
pub struct ShellArgs {
    pub directory: PathBuf,
    pub image: PathBuf,
    pub log: Option<PathBuf>,
    pub log_json: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a VM.
    Run(Box<Args>),
    /// Prepare one and wait for a pod.
    Shell(ShellArgs),
    /// Print [`USAGE`].
    Help,
    /// Print the version.
    Version,
    /// Say whether this host's KVM can run a stock guest.
    Probe,
    /// Say what this host lacks for SEV-SNP.
    ProbeSnp,
}

/// Reads the words after the program's name.
///
/// # Errors
/// [`ArgsError`], naming the flag.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Command, ArgsError> {
    let mut words = words.into_iter();
    let mut args = Args { vcpus: 1, ..Args::default() };
    let mut shell = None;
    while let Some(word) = words.next() {
        let (flag, inline) = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag.to_owned(), Some(value.to_owned())),
            _ => (word, None),
        };
        if matches!(flag.as_str(), "--help" | "-h") {
            return Ok(Command::Help);
        }
        if flag == "--version" {
            return Ok(Command::Version);
        }
        if flag == "--probe" {
            return Ok(Command::Probe);
        }
        if flag == "--probe-snp" {
            return Ok(Command::ProbeSnp);
        }
        let known = [
            "--image",
            "--memory-mib",
            "--vcpus",
            "--boot-vcpus",
            "--vsock",
            "--fs",
            "--net",
            "--disk",
            "--console",
            "--trace",
            "--trace-from",
            "--log",
            "--log-format",
            "--lifeline-fd",
            "--exit-report",
            "--tee",
            "--policy",
            "--host-data",
            "--certificates",
            "--development-keys",
            "--make-template",
            "--template",
            "--shell",
        ];
        if !known.contains(&flag.as_str()) {
            return Err(ArgsError::Unknown(flag));
        }
        let value = inline.or_else(|| words.next()).ok_or_else(|| ArgsError::NoValue(flag.clone()))?;
        if flag == "--shell" {
            shell = Some(PathBuf::from(value));
            continue;
        }
        args.set(&flag, &value)?;
    }
    if args.image.as_os_str().is_empty() {
        return Err(ArgsError::Missing("--image"));
    }
    if let Some(directory) = shell {
        return args.shell(directory);
    }
    if args.memory_mib == 0 {
        return Err(ArgsError::Missing("--memory-mib"));
    }
    let of_a_tee = [
        ("--policy", args.policy.is_some()),
        ("--host-data", args.host_data.is_some()),
        ("--certificates", args.certificates.is_some()),
        ("--development-keys", args.development_keys.is_some()),
    ];
    if let Some((flag, _)) = of_a_tee.into_iter().find(|(_, given)| *given && args.tee == Tee::None) {
        return Err(ArgsError::WithoutTee(flag));
    }
    args.can_wait()?;
    args.can_be_saved()?;
    Ok(Command::Run(Box::new(args)))
}

impl Args {
    fn shell(self, directory: PathBuf) -> Result<Command, ArgsError> {
        let Self { image, log, log_json, .. } = self.clone();
        if self != (Self { image, log, log_json, vcpus: 1, ..Self::default() }) {
            return Err(ArgsError::Shell);
        }
        let Self { image, log, log_json, .. } = self;
        Ok(Command::Shell(ShellArgs { directory, image, log, log_json }))
    }

    /// Refuses processors that wait where there is nobody to tell the guest's kernel so.
    fn can_wait(&self) -> Result<(), ArgsError> {
        let Some(count) = self.boot_vcpus else { return Ok(()) };
        if count > self.vcpus {
            let (flag, value) = ("--boot-vcpus".to_owned(), count.to_string());
            return Err(ArgsError::Value { flag, value, wanted: "at most as many as --vcpus" });
        }
        if self.tee != Tee::None {
            return Err(ArgsError::MeasuredLine("--boot-vcpus"));
        }
        Ok(())
    }

    /// Refuses a template of what cannot be saved, or not be told apart from what was saved.
    fn can_be_saved(&self) -> Result<(), ArgsError> {
        let flag = match (&self.make_template, &self.template) {
            (Some(_), Some(_)) => {
                let why = "a template is made from a boot";
                return Err(ArgsError::NoTemplate { flag: "--make-template", with: "--template", why });
            }
            (Some(_), None) => "--make-template",
            (None, Some(_)) => "--template",
            (None, None) => return Ok(()),
        };
        let reasons = [
            (self.tee != Tee::None, "--tee", "a snapshot's state cannot be measured at launch"),
            (self.boot_vcpus.is_some(), "--boot-vcpus", "a saved machine's processors all run"),
            (!self.disks.is_empty(), "--disk", "a disk's size is read when the kernel starts"),
            (self.console.is_some(), "--console", "the console's port is not saved"),
        ];
        match reasons.into_iter().find(|(there, ..)| *there) {
            Some((_, with, why)) => Err(ArgsError::NoTemplate { flag, with, why }),
            None => Ok(()),
        }
    }

    fn set(&mut self, flag: &str, value: &str) -> Result<(), ArgsError> {
        let wrong = |wanted| ArgsError::Value { flag: flag.to_owned(), value: value.to_owned(), wanted };
        match flag {
            "--image" => self.image = value.into(),
            "--memory-mib" => self.memory_mib = value.parse().map_err(|_| wrong("a number of MiB"))?,
            "--vcpus" => {
                let wanted = "a number from 1 to 64";
                self.vcpus = value.parse().map_err(|_| wrong(wanted))?;
                if !(1..=64).contains(&self.vcpus) {
                    return Err(wrong(wanted));
                }
            }
            "--boot-vcpus" => {
                let count = value.parse().ok().filter(|count| *count > 0);
                self.boot_vcpus = Some(count.ok_or_else(|| wrong("a number from 1 to that of --vcpus"))?);
            }
            "--vsock" => self.vsock = Some(value.into()),
            "--fs" => self.fs = Some(value.into()),
            "--net" => {
                if self.nets.len() == slot::NETS {
                    return Err(wrong("at most 3 network devices"));
                }
                self.nets.push(net(value).ok_or_else(|| wrong("fd=N,mac=xx:xx:xx:xx:xx:xx"))?);
            }
            "--disk" => {
                if self.disks.len() == slot::BLKS {
                    return Err(wrong("at most 4 disks"));
                }
                let (path, read_only) = match value.strip_suffix(",readonly") {
                    Some(path) => (path, true),
                    None => (value, false),
                };
                if path.is_empty() {
                    return Err(wrong("PATH or PATH,readonly"));
                }
                self.disks.push(DiskArgs { path: path.into(), read_only });
            }
            "--console" => self.console = Some(value.into()),
            "--trace" => self.trace = Some(value.into()),
            "--trace-from" => self.trace_from = Some(value.parse().map_err(|_| wrong("nanoseconds"))?),
            "--log" => self.log = Some(value.into()),
            "--log-format" => match value {
                "text" => self.log_json = false,
                "json" => self.log_json = true,
                _ => return Err(wrong("text or json")),
            },
            "--lifeline-fd" => {
                self.lifeline = Some(descriptor(value).ok_or_else(|| wrong("a descriptor over 2"))?)
            }
            "--exit-report" => self.exit_report = Some(value.into()),
            "--policy" => {
                self.policy = Some(hex_number(value).ok_or_else(|| wrong("0x and hexadecimal digits"))?)
            }
            "--host-data" => {
                self.host_data = Some(hex_bytes(value).ok_or_else(|| wrong("64 hexadecimal digits"))?)
            }
            "--certificates" => self.certificates = Some(value.into()),
            "--development-keys" => self.development_keys = Some(value.into()),
            "--make-template" => self.make_template = Some(value.into()),
            "--template" => self.template = Some(value.into()),
            _ => {
                self.tee = match value {
                    "none" => Tee::None,
                    "snp" => Tee::Snp,
                    "snp-emulated" => Tee::SnpEmulated,
                    _ => return Err(wrong("none, snp or snp-emulated")),
                }
            }
        }
        Ok(())
    }
}

fn descriptor(text: &str) -> Option<RawFd> {
    text.parse().ok().filter(|fd| *fd > 2)
}

fn hex_number(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u64::from_str_radix(digits, 16).ok()
}

fn hex_bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(bytes)
}

fn net(text: &str) -> Option<NetArgs> {
    let (fd, mac) = text.strip_prefix("fd=")?.split_once(",mac=")?;
    Some(NetArgs { fd: descriptor(fd)?, mac: coffer_protocol::vm::parse_mac(mac)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Command, ArgsError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn both_forms_of_a_flag_are_read() {
        let Ok(Command::Run(args)) = run("--image=a --memory-mib 64 --net fd=5,mac=02:00:00:00:00:0a") else {
            panic!("refused")
        };
        assert_eq!((args.memory_mib, args.vcpus), (64, 1));
        assert_eq!(args.nets, [NetArgs { fd: 5, mac: [2, 0, 0, 0, 0, 10] }]);
    }

    #[test]
    fn disks_are_taken_in_order_and_counted() {
        let line = "--image a --memory-mib 64 --disk /a,b --disk /c,readonly";
        let Ok(Command::Run(args)) = run(line) else { panic!("refused") };
        let disk = |path: &str, read_only| DiskArgs { path: path.into(), read_only };
        assert_eq!(args.disks, [disk("/a,b", false), disk("/c", true)]);
        let five = format!("{line} --disk d --disk e --disk f");
        assert!(matches!(run(&five), Err(ArgsError::Value { wanted: "at most 4 disks", .. })));
        assert!(matches!(run("--disk ,readonly"), Err(ArgsError::Value { .. })));
    }

    #[test]
    fn wrong_flags_are_named() {
        assert_eq!(
            run("--imagee a").unwrap_err().to_string(),
            "unknown flag `--imagee`: see coffer-vmm --help"
        );
        assert_eq!(run("--image").unwrap_err().to_string(), "--image wants a value: see coffer-vmm --help");
        assert_eq!(
            run("--image a").unwrap_err().to_string(),
            "--memory-mib is missing: see coffer-vmm --help"
        );
        for line in [
            "--vcpus 0",
            "--vcpus 65",
            "--boot-vcpus 0",
            "--image a --memory-mib 64 --vcpus 2 --boot-vcpus 3",
            "--net fd=1,mac=00:00:00:00:00:00",
            "--net fd=4,mac=0:0",
            "--tee sev",
            "--policy 30000",
            "--policy 0x+3",
            "--host-data 00",
        ] {
            assert!(matches!(run(line), Err(ArgsError::Value { .. })), "{line}");
        }
        assert!(matches!(run(&format!("--host-data {}", "+1".repeat(32))), Err(ArgsError::Value { .. })));
    }

    #[test]
    fn what_cannot_be_saved_has_no_template() {
        for (flags, words) in [
            (
                "--make-template /t --tee snp",
                "--make-template with --tee: a snapshot's state cannot be measured",
            ),
            (
                "--template /t --tee snp-emulated",
                "--template with --tee: a snapshot's state cannot be measured",
            ),
            ("--template /t --disk /d", "--template with --disk"),
            ("--template /t --vcpus 2 --boot-vcpus 1", "--template with --boot-vcpus"),
            ("--make-template /t --console -", "--make-template with --console"),
            ("--make-template /t --template /t", "--make-template with --template"),
        ] {
            let error = run(&format!("--image a --memory-mib 64 {flags}")).unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
        let Ok(Command::Run(args)) = run("--image a --memory-mib 64 --template /t") else {
            panic!("refused")
        };
        assert_eq!(args.template, Some("/t".into()));
    }

    #[test]
    fn processors_wait_without_a_tee_alone() {
        let line = "--image a --memory-mib 64 --vcpus 4 --boot-vcpus 1";
        let Ok(Command::Run(args)) = run(line) else { panic!("refused") };
        assert_eq!((args.vcpus, args.boot_vcpus), (4, Some(1)));
        let refused = Err(ArgsError::MeasuredLine("--boot-vcpus"));
        assert_eq!(run(&format!("{line} --tee snp-emulated")), refused);
    }

    #[test]
    fn a_shell_has_an_image_and_nothing_of_a_pods() {
        let Ok(Command::Shell(shell)) = run("--shell /d --image /i --log /l") else { panic!("refused") };
        assert_eq!((shell.directory, shell.image, shell.log), ("/d".into(), "/i".into(), Some("/l".into())));
        for more in ["--memory-mib 64", "--vcpus 2", "--vsock /v", "--tee snp", "--template /t"] {
            assert_eq!(run(&format!("--shell /d --image /i {more}")), Err(ArgsError::Shell), "{more}");
        }
        assert_eq!(run("--shell /d"), Err(ArgsError::Missing("--image")));
    }

    #[test]
    fn what_a_tee_is_told_is_refused_without_one() {
        let flags = format!("--image a --memory-mib 64 --policy 0x30000 --host-data {}", "0aFf".repeat(16));
        assert_eq!(run(&flags), Err(ArgsError::WithoutTee("--policy")));
        let Ok(Command::Run(args)) = run(&format!("{flags} --tee snp-emulated")) else { panic!("refused") };
        assert_eq!((args.tee, args.policy), (Tee::SnpEmulated, Some(0x30000)));
        assert_eq!(args.host_data.map(|d| (d[0], d[31])), Some((0x0a, 0xff)));
    }
}
