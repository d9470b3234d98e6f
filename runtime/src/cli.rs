//! The command line, as runc's: global options, a command, options before and after the id.
//!
//! Owns: words to values. Does not own: what a command does.

use std::{collections::HashMap, path::PathBuf};

use crate::error::Error;

/// Shown by `--help`.
pub const USAGE: &str = "\
coffer: runs OCI containers in microVMs, with runc's command line

  coffer [--root DIR] [--log FILE] [--log-format text|json] [--debug] COMMAND

  create -b BUNDLE [--pid-file F] [--console-socket S] ID   make a container; its VM boots
  start ID                                                  let it run
  run -b BUNDLE [--pid-file F] [--console-socket S] [-d] ID create and start
  exec [-p F] [-d] [-t] [--pid-file F] [--console-socket S]
       [-u UID[:GID]] [--cwd D] [-e K=V] ID COMMAND...      one more process
  state ID, ps ID [-f json], list [-f json|table] [-q]      what is there
  kill ID [SIGNAL] [--all]                                  signal it
  pause ID, resume ID, update -r FILE ID                    freeze, go on, change limits
  delete [-f] ID                                            remove it
  image COMMAND...                                          encrypt, inspect, unpack images
  features, spec, doctor, --version, --help                 about coffer and this host";

/// Options before the command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its flag")]
pub struct Global {
    pub root: Option<PathBuf>,
    pub log: Option<PathBuf>,
    pub log_json: bool,
    pub debug: bool,
    pub systemd_cgroup: bool,
}

/// A command with its options and words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Options before the command.
    pub global: Global,
    /// The command's name.
    pub command: String,
    /// Words that are no options; the id first.
    pub words: Vec<String>,
    values: HashMap<&'static str, Vec<String>>,
    switches: Vec<&'static str>,
}

/// Options of a command: long name, other spellings, whether it takes a value.
type Options = &'static [(&'static str, &'static [&'static str], bool)];

const BUNDLE: (&str, &[&str], bool) = ("bundle", &["-b"], true);
const CONSOLE: (&str, &[&str], bool) = ("console-socket", &[], true);
const PID_FILE: (&str, &[&str], bool) = ("pid-file", &[], true);
const PRESERVE: (&str, &[&str], bool) = ("preserve-fds", &[], true);
const NO_PIVOT: (&str, &[&str], bool) = ("no-pivot", &[], false);
const NO_KEYRING: (&str, &[&str], bool) = ("no-new-keyring", &[], false);
const FORMAT: (&str, &[&str], bool) = ("format", &["-f"], true);
const DETACH: (&str, &[&str], bool) = ("detach", &["-d"], false);

fn options(command: &str) -> Option<Options> {
    Some(match command {
        "create" => &[BUNDLE, CONSOLE, PID_FILE, PRESERVE, NO_PIVOT, NO_KEYRING],
        "run" => &[
            BUNDLE,
            CONSOLE,
            PID_FILE,
            PRESERVE,
            NO_PIVOT,
            NO_KEYRING,
            DETACH,
            ("keep", &[], false),
            ("no-subreaper", &[], false),
        ],
        "start" | "state" | "pause" | "resume" | "features" | "doctor" => &[],
        "kill" => &[("all", &["-a"], false)],
        "delete" => &[("force", &["-f"], false)],
        "exec" => &[
            CONSOLE,
            PID_FILE,
            PRESERVE,
            DETACH,
            ("process", &["-p"], true),
            ("tty", &["-t"], false),
            ("user", &["-u"], true),
            ("additional-gids", &["-g"], true),
            ("cwd", &[], true),
            ("env", &["-e"], true),
            ("cap", &["-c"], true),
            ("no-new-privs", &[], false),
            ("process-label", &[], true),
            ("apparmor", &[], true),
            ("cgroup", &[], true),
            ("ignore-paused", &[], false),
        ],
        "ps" => &[FORMAT],
        "list" => &[FORMAT, ("quiet", &["-q"], false)],
        "update" => &[("resources", &["-r"], true)],
        "spec" => &[BUNDLE, ("rootless", &[], false)],
        _ => return None,
    })
}

impl Call {
    /// The last value of an option.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).and_then(|v| v.last()).map(String::as_str)
    }

    /// All values of an option.
    #[must_use]
    pub fn values(&self, name: &str) -> &[String] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }

    /// An option without a value is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.switches.contains(&name)
    }

    /// The id.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is none, or more words than the command takes.
    pub fn id(&self) -> Result<&str, Error> {
        let most = match self.command.as_str() {
            "exec" => usize::MAX,
            "kill" => 2,
            _ => 1,
        };
        match self.words.first() {
            Some(id) if self.words.len() <= most => Ok(id),
            Some(_) => Err(Error::Usage(format!(
                "{}: too many arguments: {}",
                self.command,
                self.words[most..].join(" ")
            ))),
            None => {
                Err(Error::Usage(format!("{}: a container id is missing: see coffer --help", self.command)))
            }
        }
    }
}

/// Reads the words after the program's name. `--help` and `--version` become commands.
///
/// # Errors
/// [`Error::Usage`], naming the option.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Call, Error> {
    let mut words = words.into_iter();
    let mut call = Call::default();
    let unknown =
        |flag: &str, of: &str| Error::Usage(format!("unknown flag `{flag}`{of}: see coffer --help"));
    let no_value = |flag: &str| Error::Usage(format!("{flag} wants a value: see coffer --help"));
    loop {
        let Some(word) = words.next() else {
            call.command = "--help".into();
            return Ok(call);
        };
        let (flag, inline) = split(&word);
        let mut value = || inline.map(str::to_owned).or_else(|| words.next()).ok_or_else(|| no_value(flag));
        match flag.trim_start_matches('-') {
            "help" | "h" if flag.starts_with('-') => call.command = "--help".into(),
            "version" | "v" if flag.starts_with('-') => call.command = "--version".into(),
            _ if !flag.starts_with('-') => call.command = word.clone(),
            "root" => call.global.root = Some(value()?.into()),
            "log" => call.global.log = Some(value()?.into()),
            "log-format" => call.global.log_json = value()? == "json",
            "log-level" | "rootless" | "criu" | "cgroup-manager" => drop(value()?),
            "debug" => call.global.debug = true,
            "systemd-cgroup" => call.global.systemd_cgroup = true,
            _ => return Err(unknown(flag, "")),
        }
        if !call.command.is_empty() {
            break;
        }
    }
    if call.command.starts_with('-') {
        return Ok(call);
    }
    let command = call.command.clone();
    let known = options(&command).ok_or_else(|| match command.as_str() {
        "checkpoint" | "restore" => {
            Error::Usage(format!("{command}: a VM's memory cannot be saved by this runtime"))
        }
        _ => Error::Usage(format!("unknown command `{command}`: see coffer --help")),
    })?;
    while let Some(word) = words.next() {
        // What follows exec's id is the command, options and all.
        if command == "exec" && !call.words.is_empty() {
            call.words.push(word);
            continue;
        }
        if !word.starts_with('-') || word == "-" {
            call.words.push(word);
            continue;
        }
        if word == "--" {
            call.words.extend(words.by_ref());
            break;
        }
        let (flag, inline) = split(&word);
        if matches!(flag, "--help" | "-h") {
            call.command = "--help".into();
            return Ok(call);
        }
        let is = |(name, others, _): &&(&str, &[&str], bool)| {
            flag.strip_prefix("--") == Some(*name) || others.contains(&flag)
        };
        let (name, _, takes) =
            known.iter().find(is).ok_or_else(|| unknown(flag, &format!(" of {command}")))?;
        if *takes {
            let value = inline.map(str::to_owned).or_else(|| words.next()).ok_or_else(|| no_value(flag))?;
            call.values.entry(name).or_default().push(value);
        } else if inline != Some("false") {
            call.switches.push(name);
        }
    }
    Ok(call)
}

fn split(word: &str) -> (&str, Option<&str>) {
    match word.split_once('=') {
        Some((flag, value)) if word.starts_with('-') => (flag, Some(value)),
        _ => (word, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(text: &str) -> Result<Call, Error> {
        parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn podmans_calls_are_read() {
        // As recorded from podman 4.3.1 and conmon 2.1.6.
        let call = line("--log-format=json --log /r/oci-log create --bundle /b --pid-file /r/pidfile --console-socket /t/s abc").unwrap();
        assert!(call.global.log_json);
        assert_eq!(
            (call.id().unwrap(), call.value("bundle"), call.value("console-socket")),
            ("abc", Some("/b"), Some("/t/s"))
        );
        let call =
            line("--log-format=json --log=/l exec --pid-file /p --process /q --detach --preserve-fds 1 abc")
                .unwrap();
        assert!(call.has("detach"));
        assert_eq!((call.id().unwrap(), call.value("process")), ("abc", Some("/q")));
        assert_eq!(line("kill abc 15").unwrap().words, ["abc", "15"]);
        assert!(line("delete --force abc").unwrap().has("force"));
    }

    #[test]
    fn options_may_follow_the_id_but_not_execs() {
        assert_eq!(line("create abc --bundle=/b").unwrap().value("bundle"), Some("/b"));
        let call = line("exec -t abc ls --all -d").unwrap();
        assert_eq!(call.words, ["abc", "ls", "--all", "-d"]);
        assert!(call.has("tty") && !call.has("detach"));
    }

    #[test]
    fn what_is_unknown_is_named() {
        let message = |text| line(text).unwrap_err().to_string();
        assert_eq!(message("--rooot /x list"), "unknown flag `--rooot`: see coffer --help");
        assert_eq!(message("create --bundel /b a"), "unknown flag `--bundel` of create: see coffer --help");
        assert_eq!(message("fly a"), "unknown command `fly`: see coffer --help");
        assert_eq!(message("create --bundle"), "--bundle wants a value: see coffer --help");
        assert!(line("state a b").unwrap().id().is_err());
    }

    proptest! {
        #[test]
        fn no_words_make_it_panic(words in prop::collection::vec("[-a-z=]{0,12}", 0..8)) {
            if let Ok(call) = parse(words) {
                let _ = call.id();
            }
        }
    }
}
