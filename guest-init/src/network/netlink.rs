//! Talking to the kernel about interfaces: rtnetlink messages (rtnetlink(7)), as far as they are needed here.
//!
//! Owns: their form, sending them, reading what the kernel lists. Does not own: what they are to say.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::NetworkError;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Where an error's number stands: the first field behind the header.
const CODE_END: usize = HEADER + 4;
/// What the kernel fills at most at once when it lists something.
const ROOM: usize = 32 << 10;

/// A message being built: header, fixed part, attributes.
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&((flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// One entry of what the kernel lists: what stands behind the header.
pub(super) struct Entry(Vec<u8>);

impl Entry {
    /// Some bytes of the fixed part, zero beyond its end.
    pub(super) fn fixed<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    pub(super) fn byte(&self, at: usize) -> u8 {
        self.fixed::<1>(at)[0]
    }

    pub(super) fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.fixed(at))
    }

    /// An attribute of an entry whose fixed part has so many bytes.
    pub(super) fn attribute(&self, fixed: usize, kind: u16) -> Option<&[u8]> {
        parts(self.0.get(fixed.next_multiple_of(4)..)?, 2)
            .find(|(found, _)| *found == kind)
            .map(|(_, value)| value)
    }

    /// An attribute that is a number.
    pub(super) fn number(&self, fixed: usize, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.attribute(fixed, kind)?.first_chunk()?))
    }
}

/// Splits what begins with a length, of `size` bytes, and a kind: `(kind, what follows)`. Ends at what is not whole.
fn parts(bytes: &[u8], size: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let header = if size == 2 { 4 } else { HEADER };
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let mut length = [0; 4];
        length[..size].copy_from_slice(rest.get(..size)?);
        let length = u32::from_le_bytes(length) as usize;
        let kind = u16::from_ne_bytes(*rest.get(size..)?.first_chunk()?);
        let value = rest.get(header..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A socket for these messages.
pub(super) struct Netlink(OwnedFd);

fn failed(what: &str, source: impl Into<io::Error>) -> NetworkError {
    NetworkError::Kernel { what: what.into(), source: source.into() }
}

impl Netlink {
    pub(super) fn open() -> Result<Self, NetworkError> {
        let fd =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        fd.map(Self).map_err(|e| failed("open netlink", e))
    }

    /// Sends a message that adds something and waits for its acknowledgement. What exists counts as done: the host may say
    /// things twice.
    pub(super) fn add(&self, message: Message, what: String) -> Result<(), NetworkError> {
        match self.ask(message, what) {
            Err(NetworkError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Sends a message and waits for its acknowledgement.
    pub(super) fn ask(&self, message: Message, what: String) -> Result<(), NetworkError> {
        let mut answer = [0; 8192];
        let count =
            self.send(message).and_then(|()| self.receive(&mut answer)).map_err(|e| failed(&what, e))?;
        match code(&answer[..count]) {
            0 => Ok(()),
            errno => Err(failed(&what, io::Error::from_raw_os_error(errno))),
        }
    }

    /// What the kernel lists of a kind (`RTM_GET…`); `fixed` begins with the address family.
    pub(super) fn list(&self, kind: u16, fixed: &[u8], what: &str) -> Result<Vec<Entry>, NetworkError> {
        self.send(Message::new(kind, libc::NLM_F_DUMP, fixed)).map_err(|e| failed(what, e))?;
        let (mut entries, mut buffer) = (Vec::new(), vec![0; ROOM]);
        loop {
            let count = self.receive(&mut buffer).map_err(|e| failed(what, e))?;
            for (kind, value) in parts(&buffer[..count], 4) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(entries),
                    libc::NLMSG_ERROR => {
                        return Err(failed(what, io::Error::from_raw_os_error(code(&buffer[..count]))));
                    }
                    _ => entries.push(Entry(value.to_vec())),
                }
            }
            if count == 0 {
                return Ok(entries);
            }
        }
    }

    /// Changes a device: these attributes, and that it is up.
    pub(super) fn link(
        &self,
        index: u32,
        up: bool,
        attributes: &[(u16, &[u8])],
        what: String,
    ) -> Result<(), NetworkError> {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        if up {
            fixed[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
            fixed[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        }
        let message = attributes
            .iter()
            .fold(Message::new(libc::RTM_NEWLINK, 0, &fixed), |m, (k, v)| m.attribute(*k, v));
        self.ask(message, what)
    }

    fn send(&self, message: Message) -> nix::Result<()> {
        send(self.0.as_raw_fd(), &message.finish(), MsgFlags::empty()).map(drop)
    }

    fn receive(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        recv(self.0.as_raw_fd(), buffer, MsgFlags::empty())
    }
}

/// The error's number in an acknowledgement; zero where there is none.
fn code(answer: &[u8]) -> i32 {
    let bytes = answer.get(HEADER..CODE_END).and_then(|bytes| bytes.first_chunk());
    bytes.map_or(0, |bytes| i32::from_ne_bytes(*bytes).wrapping_neg())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernel_lists_the_loopback() {
        let links = Netlink::open().unwrap().list(libc::RTM_GETLINK, &[0; 16], "list devices").unwrap();
        let loopback = links.iter().find(|link| link.word(4) == 1).expect("the loopback has index 1");
        assert_eq!(loopback.attribute(16, libc::IFLA_IFNAME), Some(&b"lo\0"[..]));
        assert_eq!(loopback.attribute(16, libc::IFLA_ADDRESS), Some(&[0; 6][..]));
    }

    proptest! {
        #[test]
        fn messages_are_padded_and_say_their_length(values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let message = values.iter().fold(Message::new(16, 0, &[0; 16]), |m, v| m.attribute(3, v)).finish();
            prop_assert_eq!(message.len() % 4, 0);
            prop_assert_eq!(u32::from_ne_bytes(message[..4].try_into().unwrap()) as usize, message.len());
            // Read as the kernel's own are, it has what it was given.
            let read: Vec<_> = parts(&message[HEADER + 16..], 2).map(|(_, value)| value.to_vec()).collect();
            prop_assert_eq!(read, values);
        }

        #[test]
        fn any_bytes_have_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200), size in prop::sample::select(vec![2usize, 4])) {
            prop_assert!(parts(&bytes, size).count() <= bytes.len());
            let entry = Entry(bytes);
            let _ = (entry.byte(3), entry.word(500), entry.attribute(16, 1), entry.number(12, 6));
        }
    }
}
