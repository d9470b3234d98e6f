//! What a command says when it fails.
//!
//! Owns: the words that callers look for: podman takes its exit code from them, containerd what to do next.

use std::io;

use coffer_protocol::ErrorKind;
use thiserror::Error;

/// A command failed. One line.
#[derive(Debug, Error)]
pub enum Error {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// The bundle or its configuration is wrong.
    #[error("bundle: {0}")]
    Bundle(String),
    /// Words as runc has them.
    #[error("container does not exist")]
    NoContainer,
    /// As runc has it.
    #[error("container with given ID already exists")]
    Exists,
    /// As runc has it.
    #[error("container not running")]
    NotRunning,
    /// The state does not allow it.
    #[error("{0}")]
    State(String),
    /// The id is not one.
    #[error("invalid container ID format {0:?}: {why}", why = crate::state::why_no_id(.0))]
    Id(String),
    /// Something of the host failed.
    #[error("{stage}: {source}")]
    Host {
        /// What was being done.
        stage: String,
        /// The system's words.
        source: io::Error,
    },
    /// The VM ended or did not start.
    #[error("VM failed: {0}")]
    Vm(String),
    /// The VM's connection closed: why is in the VMM's report.
    #[error("VM failed: it ended before it answered")]
    VmGone,
    /// The guest refused.
    #[error("{message}")]
    Guest {
        /// What kind.
        kind: ErrorKind,
        /// In words.
        message: String,
    },
}

/// Names the stage of a system call's failure.
pub fn host<E: Into<io::Error>>(stage: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |e| Error::Host { stage: stage.into(), source: e.into() }
}

impl Error {
    /// The line for callers. podman takes "no such file or directory" for a command or a working directory that is
    /// not there, so these words stay for those alone.
    #[must_use]
    pub fn line(&self) -> String {
        const TAKEN: &str = "no such file or directory";
        // Some of it is a guest's, and may be shown on a terminal.
        let mut text: String =
            self.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if matches!(self, Self::Guest { kind: ErrorKind::NotFound | ErrorKind::NotExecutable, .. }) {
            return text;
        }
        while let Some(at) = text.to_ascii_lowercase().find(TAKEN) {
            text.replace_range(at..at + TAKEN.len(), "it is not there");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_command_has_podmans_words_for_one() {
        let missing = io::Error::from_raw_os_error(libc::ENOENT);
        let error = host::<io::Error>("open /dev/kvm")(missing);
        assert_eq!(error.line(), "open /dev/kvm: it is not there (os error 2)");
        let message = "exec: \"x\": stat x: no such file or directory".to_owned();
        assert_eq!(Error::Guest { kind: ErrorKind::NotFound, message: message.clone() }.line(), message);
        assert!(!Error::Guest { kind: ErrorKind::Guest, message }.line().contains("no such file"));
    }
}
