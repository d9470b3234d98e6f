//! The command line, as runc's: global options, a command, options before and after the id.
//!
//! Owns: words to values. Does not own: what a command does.

mod options;

use std::{collections::HashMap, io::Write, path::PathBuf};

use crate::error::Error;

/// Shows a help text; a reader that has seen enough, as `head`, is no failure.
pub fn show(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Shown by `--help`.
pub const USAGE: &str = "\
coffer: runs OCI containers in microVMs, with runc's command line

  coffer [--root DIR] [--log FILE] [--log-format text|json] [--debug] [--systemd-cgroup] [--annotation KEY=VALUE]... COMMAND

  create -b BUNDLE [--pid-file F] [--console-socket S] ID   make a container; its VM boots
  start ID                                                  let it run
  run -b BUNDLE [--pid-file F] [--console-socket S] [-d] [--keep] ID
                                                            create and start
  exec [-p F] [-d] [-t] [--pid-file F] [--console-socket S]
       [-u UID[:GID]] [-g GID] [--cwd D] [-e K=V] [--cap C] [--no-new-privs] [--cgroup P] ID COMMAND...
                                                            one more process
  state ID, ps ID [-f json], list [-f json|table] [-q]      what is there
  events ID [--stats] [--interval 5s]                       what it uses, and when memory ran out
  kill ID [SIGNAL] [--all]                                  signal it
  pause ID, resume ID                                       freeze, go on
  update [-r FILE|-] [--memory BYTES] [--cpu-quota US] ... ID  change limits
  delete [-f] ID                                            remove it
  image COMMAND...                                          encrypt, inspect, unpack images: coffer image --help
  policy generate ...                                       what an attested pod's host may do: coffer policy --help
  boot-chart [-o FILE] ID                                   its last start, stage by stage, as an SVG
  template make [--memory MIB] [--vcpus N] [--nets N]       save a booted VM, from which pods of that shape start
  template list, template remove NAME                       (annotation io.coffer.start=template)
  pool fill [--count N] [--image FILE]                      start VMMs that wait for pods, until there are N
  pool list, pool drain                                     (annotation io.coffer.start=pool)
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
    /// For containers that do not have them: what an engine's command cannot say, as `podman pod create` of its infra container.
    pub annotations: Vec<(String, String)>,
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

    /// For a command that takes no words.
    ///
    /// # Errors
    /// [`Error::Usage`] when there are some.
    pub fn no_words(&self) -> Result<(), Error> {
        match self.words.as_slice() {
            [] => Ok(()),
            words => Err(Error::Usage(format!("{}: too many arguments: {}", self.command, words.join(" ")))),
        }
    }

    /// The id.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is none, or more words than the command takes.
    pub fn id(&self) -> Result<&str, Error> {
        let most = match self.command.as_str() {
            "exec" | "ps" => usize::MAX,
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
    call.command = before(&mut words, &mut call.global)?;
    if call.command.starts_with('-') {
        return Ok(call);
    }
    if matches!(call.command.as_str(), "image" | "policy") {
        // They have words and flags of their own.
        call.words = words.collect();
        return Ok(call);
    }
    let command = call.command.clone();
    let known = options::of(&command).ok_or_else(|| match command.as_str() {
        "checkpoint" | "restore" => Error::Usage(format!(
            "{command} is not supported: a VM's memory cannot be saved and restored by coffer"
        )),
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
        let Some((name, _, takes)) = known.iter().find(is) else {
            // runc hands these to ps(1).
            if command == "ps" && !call.words.is_empty() {
                call.words.push(word);
                continue;
            }
            return Err(unknown(flag, &format!(" of {command}")));
        };
        if *takes {
            let value = inline.map(str::to_owned).or_else(|| words.next()).ok_or_else(|| no_value(flag))?;
            call.values.entry(name).or_default().push(value);
        } else if inline != Some("false") {
            call.switches.push(name);
        }
    }
    Ok(call)
}

/// The options before the command, as far as they can be read: for saying where the caller listens that the rest cannot.
pub fn global(words: impl IntoIterator<Item = String>) -> Global {
    let mut global = Global::default();
    let _ = before(&mut words.into_iter(), &mut global);
    global
}

/// Reads options up to the command, which is returned.
fn before(words: &mut impl Iterator<Item = String>, global: &mut Global) -> Result<String, Error> {
    while let Some(word) = words.next() {
        let (flag, inline) = split(&word);
        let mut value = || inline.map(str::to_owned).or_else(|| words.next()).ok_or_else(|| no_value(flag));
        match flag.trim_start_matches('-') {
            _ if !flag.starts_with('-') => return Ok(word),
            "help" | "h" => break,
            "version" | "v" => return Ok("--version".into()),
            "root" => global.root = Some(value()?.into()),
            "log" => global.log = Some(value()?.into()),
            "log-format" => {
                global.log_json = match value()?.as_str() {
                    "json" => true,
                    "text" => false,
                    other => {
                        return Err(Error::Usage(format!(
                            "invalid log-format {other:?}: text or json is wanted"
                        )));
                    }
                }
            }
            "log-level" | "rootless" | "criu" => drop(value()?),
            // crun's spelling.
            "cgroup-manager" => global.systemd_cgroup |= value()? == "systemd",
            "annotation" => global.annotations.push(annotation(&value()?)?),
            "debug" => global.debug = inline != Some("false"),
            "systemd-cgroup" | "s" => global.systemd_cgroup = inline != Some("false"),
            _ => return Err(unknown(flag, "")),
        }
    }
    Ok("--help".into())
}

fn annotation(text: &str) -> Result<(String, String), Error> {
    let parts = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) =
        parts.ok_or_else(|| Error::Usage(format!("--annotation {text}: give it as KEY=VALUE")))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn unknown(flag: &str, of: &str) -> Error {
    Error::Usage(format!("unknown flag `{flag}`{of}: see coffer --help"))
}

fn no_value(flag: &str) -> Error {
    Error::Usage(format!("{flag} wants a value: see coffer --help"))
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
    fn annotations_come_before_any_command() {
        // podman --runtime-flag annotation=io.coffer.tee=snp
        let call = line("--annotation=io.coffer.tee=snp --annotation a=b=c start abc").unwrap();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(call.global.annotations, [pair("io.coffer.tee", "snp"), pair("a", "b=c")]);
        for wrong in ["--annotation a list", "--annotation =b list"] {
            assert!(line(wrong).unwrap_err().to_string().contains("give it as KEY=VALUE"));
        }
    }

    #[test]
    fn what_is_unknown_is_named() {
        let message = |text| line(text).unwrap_err().to_string();
        assert_eq!(message("--rooot /x list"), "unknown flag `--rooot`: see coffer --help");
        assert_eq!(message("create --bundel /b a"), "unknown flag `--bundel` of create: see coffer --help");
        assert_eq!(message("fly a"), "unknown command `fly`: see coffer --help");
        assert_eq!(message("create --bundle"), "--bundle wants a value: see coffer --help");
        assert!(line("state a b").unwrap().id().is_err());
        let more = line("list -q extra words").unwrap().no_words().unwrap_err().to_string();
        assert!(more.starts_with("list: too many arguments: extra words"), "{more}");
        assert!(line("list -q").unwrap().no_words().is_ok());
    }

    #[test]
    fn the_owners_commands_keep_their_words_behind_global_options() {
        let call = line("--root /r --log-format json image inspect --pretty /i").unwrap();
        assert_eq!((call.command.as_str(), call.global.log_json), ("image", true));
        assert_eq!(call.words, ["inspect", "--pretty", "/i"]);
        assert_eq!(line("policy --help").unwrap().words, ["--help"]);
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
