//! What a host says first on a VMM's socket: which guest port it wants, or something about the VM itself.
//!
//! Owns: these lines, and the VMM's answer about its memory. Does not own: sockets, what follows on a connection to the guest.
//!
//! `CONNECT 1024` reaches a port of the guest. `MEMORY` asks how large the VM is, `MEMORY 256` wants it to have 256 MiB more than it
//! booted with; the answer is one line of JSON, then the connection ends. What was wanted is not there yet: the guest takes it
//! ([`crate::Request::TakeMemory`]), and gives back what it can spare. Asking again says how far it is.

use serde::{Deserialize, Serialize};

/// Longest line in bytes, without its end.
pub const LONGEST_LINE: usize = 19;
/// Longest answer in bytes, with its end.
pub const LONGEST_ANSWER: usize = 1024;

/// A first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// To this port of the guest.
    Connect(u32),
    /// About memory: how many MiB the VM shall have more than at boot, or just how many it has.
    Memory(Option<u32>),
}

impl Line {
    /// A line without its end. `None` when it is none of these.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let number = |digits: &str| {
            digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u32>().ok())?
        };
        let line = std::str::from_utf8(line).ok()?;
        match line.split_once(' ') {
            Some(("CONNECT", port)) => number(port).map(Self::Connect),
            Some(("MEMORY", mib)) => number(mib).map(|mib| Self::Memory(Some(mib))),
            None if line == "MEMORY" => Some(Self::Memory(None)),
            _ => None,
        }
    }
}

impl std::fmt::Display for Line {
    /// With its end.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(port) => writeln!(f, "CONNECT {port}"),
            Self::Memory(Some(mib)) => writeln!(f, "MEMORY {mib}"),
            Self::Memory(None) => writeln!(f, "MEMORY"),
        }
    }
}

/// A VM's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// MiB that it booted with.
    pub boot_mib: u64,
    /// MiB that it shall have beside those.
    pub wanted_mib: u64,
    /// MiB that its guest has plugged of them.
    pub plugged_mib: u64,
    /// MiB that it can have beside those it booted with.
    pub most_mib: u64,
    /// Its processors, those among them that wait.
    pub vcpus: u32,
    /// Those that its guest booted with. It takes others when it is told ([`crate::Request::Processors`]).
    pub boot_vcpus: u32,
}

/// The VMM's answer to [`Line::Memory`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizeAnswer {
    /// As it is now.
    Size(VmSize),
    /// It stays as it is, for this reason.
    Refused(String),
}

impl SizeAnswer {
    /// One line, with its end.
    #[must_use]
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("plain data always serialises");
        line.push('\n');
        line
    }

    /// Reads a line. `None` when it is no such answer.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_lines_fit() {
        for line in [Line::Connect(u32::MAX), Line::Memory(Some(u32::MAX)), Line::Memory(None)] {
            let text = line.to_string();
            assert!(text.len() - 1 <= LONGEST_LINE, "{text}");
            assert_eq!(Line::parse(text.trim_end().as_bytes()), Some(line));
        }
        let all = u64::MAX;
        let size = VmSize {
            boot_mib: all,
            wanted_mib: all,
            plugged_mib: all,
            most_mib: all,
            vcpus: u32::MAX,
            boot_vcpus: u32::MAX,
        };
        assert!(SizeAnswer::Size(size).to_line().len() <= LONGEST_ANSWER);
    }

    #[test]
    fn what_is_no_line_is_none() {
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT +1",
            "CONNECT 1 ",
            "MEMORY ",
            "MEMORY -1",
            "MEMORY 4294967296",
            "memory",
        ] {
            assert_eq!(Line::parse(line.as_bytes()), None, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_line_or_none(bytes in prop::collection::vec(any::<u8>(), 0..40), text in ".{0,60}") {
            let _ = Line::parse(&bytes);
            let _ = SizeAnswer::parse(&text);
        }

        #[test]
        fn an_answer_reads_back_as_itself(words in ".{0,60}", boot_mib: u64, wanted_mib: u64, plugged_mib: u64, most_mib: u64, vcpus: u32, boot_vcpus: u32) {
            let size = VmSize { boot_mib, wanted_mib, plugged_mib, most_mib, vcpus, boot_vcpus };
            for answer in [SizeAnswer::Size(size), SizeAnswer::Refused(words)] {
                let line = answer.to_line();
                prop_assert_eq!(line.matches('\n').count(), 1);
                prop_assert_eq!(SizeAnswer::parse(&line), Some(answer));
            }
        }
    }
}
