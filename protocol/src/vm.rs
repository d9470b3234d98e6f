//! What a host says first on a VMM's socket: which guest port it wants, or something about the VM itself.
//!
//! Owns: these lines, and the VMM's answers. Does not own: sockets, what follows on a connection to the guest.
//!
//! `CONNECT 1024` reaches a port of the guest. `MEMORY` asks how large the VM is, `MEMORY 256` wants it to have 256 MiB more than it
//! booted with; the answer is one line of JSON, then the connection ends. What was wanted is not there yet: the guest takes it
//! ([`crate::Request::TakeMemory`]), and gives back what it can spare. Asking again says how far it is.
//!
//! `NET 02:11:22:33:44:55` makes a network device with this address, on the tap whose descriptor comes with the line's first byte; the
//! answer is as above. The guest looks for the device when it is told of an interface that it does not know
//! ([`crate::Request::Network`]).

use serde::{Deserialize, Serialize};

/// Longest line in bytes, without its end.
pub const LONGEST_LINE: usize = 21;
/// Longest answer in bytes, with its end.
pub const LONGEST_ANSWER: usize = 1024;

/// A first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// To this port of the guest.
    Connect(u32),
    /// About memory: how many MiB the VM shall have more than at boot, or just how many it has.
    Memory(Option<u32>),
    /// A further network device, with this address.
    Net([u8; 6]),
}

/// An Ethernet address, as six pairs of hexadecimal digits.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let pair = |part: &str| {
        let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(part, 16).ok())?
    };
    text.split(':').map(pair).collect::<Option<Vec<u8>>>()?.try_into().ok()
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
            Some(("NET", mac)) => parse_mac(mac).map(Self::Net),
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
            Self::Net([a, b, c, d, e, g]) => {
                writeln!(f, "NET {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
            }
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

/// The VMM's answer to [`Line::Net`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetAnswer {
    /// The device is there.
    Added,
    /// There is none, for this reason.
    Refused(String),
}

macro_rules! answer_line {
    ($($type:ty),*) => {$(
        impl $type {
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
    )*};
}

answer_line!(SizeAnswer, NetAnswer);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_lines_fit() {
        let net = Line::Net([0xff, 0, 0x10, 1, 0xab, 0xff]);
        assert_eq!(net.to_string(), "NET ff:00:10:01:ab:ff\n");
        for line in [Line::Connect(u32::MAX), Line::Memory(Some(u32::MAX)), Line::Memory(None), net] {
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
            "NET",
            "NET ",
            "NET 02:11:22:33:44",
            "NET 02:11:22:33:44:55:66",
            "NET 2:11:22:33:44:555",
            "NET +2:11:22:33:44:55",
            "NET 02-11-22-33-44-55",
        ] {
            assert_eq!(Line::parse(line.as_bytes()), None, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn any_address_reads_back_as_itself(mac: [u8; 6]) {
            let text = Line::Net(mac).to_string();
            prop_assert_eq!(Line::parse(text.trim_end().as_bytes()), Some(Line::Net(mac)));
            prop_assert_eq!(parse_mac(text.trim_end().strip_prefix("NET ").unwrap()), Some(mac));
        }

        #[test]
        fn any_bytes_are_a_line_or_none(bytes in prop::collection::vec(any::<u8>(), 0..40), text in ".{0,60}") {
            let _ = Line::parse(&bytes);
            let _ = SizeAnswer::parse(&text);
            let _ = NetAnswer::parse(&text);
            let _ = parse_mac(&text);
        }

        #[test]
        fn an_answer_reads_back_as_itself(words in ".{0,60}", boot_mib: u64, wanted_mib: u64, plugged_mib: u64, most_mib: u64, vcpus: u32, boot_vcpus: u32) {
            let size = VmSize { boot_mib, wanted_mib, plugged_mib, most_mib, vcpus, boot_vcpus };
            for answer in [SizeAnswer::Size(size), SizeAnswer::Refused(words.clone())] {
                let line = answer.to_line();
                prop_assert_eq!(line.matches('\n').count(), 1);
                prop_assert_eq!(SizeAnswer::parse(&line), Some(answer));
            }
            for answer in [NetAnswer::Added, NetAnswer::Refused(words)] {
                let line = answer.to_line();
                prop_assert_eq!(line.matches('\n').count(), 1);
                prop_assert_eq!(NetAnswer::parse(&line), Some(answer));
            }
        }
    }
}
