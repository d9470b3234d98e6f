//! Messages: to standard error, and to a file as text or JSON lines.
//!
//! Owns: the format, which is runc's. Does not own: what is said.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::Mutex,
};

/// Where messages go.
#[derive(Debug)]
pub struct Log {
    file: Option<Mutex<File>>,
    json: bool,
}

/// How bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The VM ends or did not start.
    Error,
    /// It goes on.
    Warning,
}

impl Log {
    /// Opens the file for appending.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: Option<&Path>, json: bool) -> io::Result<Self> {
        let file = path.map(|p| File::options().create(true).append(true).open(p)).transpose()?;
        Ok(Self { file: file.map(Mutex::new), json })
    }

    /// Writes one line.
    pub fn write(&self, level: Level, message: &str) {
        let word = match level {
            Level::Error => "error",
            Level::Warning => "warning",
        };
        // A message that cannot be written must not stop a guest.
        let _ = writeln!(io::stderr(), "coffer-vmm: {message}");
        if let Some(file) = &self.file {
            let line = if self.json {
                serde_json::json!({ "level": word, "msg": message }).to_string()
            } else {
                format!("level={word} msg={message:?}")
            };
            let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let _ = file.write_all((line + "\n").as_bytes());
        }
    }
}
