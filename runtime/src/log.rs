//! The log that callers read: podman and containerd take the last line of level error for the reason.
//!
//! Owns: the formats of `--log-format`. Does not own: what is worth saying.

use std::{fs::File, io::Write, sync::OnceLock};

use crate::{cli::Global, clock};

/// Weight of a line, in logrus's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Only with `--debug`.
    Debug,
    /// Something was done otherwise than asked.
    Warning,
    /// The command failed.
    Error,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Where [`warn`] says it.
static CALLERS: OnceLock<Global> = OnceLock::new();

/// Remembers the options of this process's command line.
pub fn remember(global: &Global) {
    let _ = CALLERS.set(global.clone());
}

/// Says in the log that something was done otherwise than asked.
pub fn warn(message: &str) {
    say(CALLERS.get_or_init(Global::default), Level::Warning, message);
}

/// One line without its end, as `--log-format` wants it.
fn line(json: bool, level: Level, message: &str, time: &str) -> String {
    if json {
        serde_json::json!({ "level": level.word(), "msg": message, "time": time }).to_string()
    } else {
        format!("time={time:?} level={} msg={message:?}", level.word())
    }
}

/// Says something in the log. An error is on stderr too: conmon shows that when the log has nothing.
pub fn say(global: &Global, level: Level, message: &str) {
    if level == Level::Debug && !global.debug {
        return;
    }
    let text = line(global.log_json, level, message, &clock::now());
    let file = global.log.as_ref().map(|path| File::options().create(true).append(true).open(path));
    let wrote = match file {
        // One write: other processes append to the same file.
        Some(Ok(mut file)) => file.write_all(format!("{text}\n").as_bytes()).is_ok(),
        _ => false,
    };
    match level {
        Level::Error if global.log.is_none() && global.log_json => eprintln!("{text}"),
        // With the word: some callers, youki's contest among them, look for it and not at the exit code.
        Level::Error => eprintln!("coffer: error: {message}"),
        _ if !wrote => eprintln!("coffer: {}: {message}", level.word()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_what_callers_parse() {
        let json: serde_json::Value =
            serde_json::from_str(&line(true, Level::Error, "a \"b\"\nc", "2026-01-02T03:04:05Z")).unwrap();
        assert_eq!(
            json,
            serde_json::json!({ "level": "error", "msg": "a \"b\"\nc", "time": "2026-01-02T03:04:05Z" })
        );
        assert_eq!(line(false, Level::Error, "a \"b\"\nc", "T"), r#"time="T" level=error msg="a \"b\"\nc""#);
    }
}
