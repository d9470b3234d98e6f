//! Addresses of a KBS that is known by name: questions to the pod's own name servers.
//!
//! Owns: one question and its answer (RFC 1035, 3596) over UDP. Does not own: which servers; whether the answer is true.
//! The servers are the host's, and so is the way to them. TLS with the owner's certificate makes a KBS the right one,
//! not its address: a lie costs the pod its start and gains nothing. So there is no DNSSEC here, no cache, no search list.
//!
//! The C library's resolver is not used, because a static program would need its plug-ins at run time.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use thiserror::Error;

use super::Deadline;

const PORT: u16 = 53;
/// As resolv.conf(5).
pub const MOST_SERVERS: usize = 3;
/// For each question to each server.
const PATIENCE: Duration = Duration::from_secs(10);
const ROUNDS: usize = 3;
/// Most bytes of an answer over UDP without extensions.
const MOST_ANSWER: usize = 512;
const MOST_ADDRESSES: usize = 16;
const HEADER: usize = 12;
const INTERNET: u16 = 1;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// IPv4.
    A = 1,
    /// IPv6.
    Aaaa = 28,
}

/// Why a name has no address.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DnsError {
    /// Not a name of the DNS.
    #[error("not a host name")]
    Name,
    /// The answer is to something else, or none at all.
    #[error("the name server's answer is not one to the question")]
    Form,
    /// The server says so.
    #[error("the name server says there is no such name")]
    NoName,
    /// By RFC 1035's number.
    #[error("the name server failed with code {0}")]
    Failed(u8),
}

/// A question's packet.
///
/// # Errors
/// [`DnsError::Name`].
pub fn question(id: u16, name: &str, kind: Kind) -> Result<Vec<u8>, DnsError> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut packet = Vec::with_capacity(HEADER + name.len() + 6);
    packet.extend(id.to_be_bytes());
    // Recursion desired; one question.
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        let plain = label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        let length = u8::try_from(label.len()).ok().filter(|n| (1..=63).contains(n) && plain);
        packet.push(length.ok_or(DnsError::Name)?);
        packet.extend(label.bytes());
    }
    packet.push(0);
    if packet.len() - HEADER > 255 {
        return Err(DnsError::Name);
    }
    packet.extend((kind as u16).to_be_bytes());
    packet.extend(INTERNET.to_be_bytes());
    Ok(packet)
}

/// Reads numbers and names in order; nothing is followed, so that no pointer can lead in a circle.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], DnsError> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(DnsError::Form)?;
        self.0 = tail;
        Ok(head)
    }

    fn word(&mut self) -> Result<u16, DnsError> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// Passes over a name: labels up to an empty one or a pointer.
    fn name(&mut self) -> Result<(), DnsError> {
        loop {
            match usize::from(self.take(1)?[0]) {
                0 => return Ok(()),
                length @ 1..=63 => self.take(length).map(|_| ())?,
                192..=255 => return self.take(1).map(|_| ()),
                _ => return Err(DnsError::Form),
            }
        }
    }
}

/// The addresses in an answer to `asked`, a packet of [`question`]. Aliases (CNAME) are passed over: the server that was
/// asked to follow them put what it found beside them.
///
/// # Errors
/// [`DnsError`].
pub fn addresses(asked: &[u8], packet: &[u8]) -> Result<Vec<IpAddr>, DnsError> {
    let mut reader = Reader(packet);
    let header = reader.take(HEADER)?;
    let question = asked.get(HEADER..).ok_or(DnsError::Form)?;
    let response = header[2] & 0x80 != 0;
    let one_question = header[4..6] == [0, 1];
    if !response || header[..2] != asked[..2] || !one_question {
        return Err(DnsError::Form);
    }
    // Servers may answer in the case that they please.
    if !reader.take(question.len())?.eq_ignore_ascii_case(question) {
        return Err(DnsError::Form);
    }
    match header[3] & 15 {
        0 => {}
        3 => return Err(DnsError::NoName),
        code => return Err(DnsError::Failed(code)),
    }
    let mut found = Vec::new();
    let count = u16::from_be_bytes([header[6], header[7]]);
    // What is cut off at the end (TC) costs addresses; those before it are as good as any.
    for _ in 0..count {
        let Ok((kind, class, data)) = record(&mut reader) else { break };
        match (class, kind, <[u8; 4]>::try_from(data), <[u8; 16]>::try_from(data)) {
            (INTERNET, 1, Ok(v4), _) => found.push(IpAddr::V4(Ipv4Addr::from(v4))),
            (INTERNET, 28, _, Ok(v6)) => found.push(IpAddr::V6(Ipv6Addr::from(v6))),
            _ => {}
        }
        if found.len() == MOST_ADDRESSES {
            break;
        }
    }
    Ok(found)
}

/// Type, class and data of the next one.
fn record<'a>(reader: &mut Reader<'a>) -> Result<(u16, u16, &'a [u8]), DnsError> {
    reader.name()?;
    let (kind, class) = (reader.word()?, reader.word()?);
    // For how long it holds: nobody keeps it.
    reader.take(4)?;
    let length = reader.word()?;
    Ok((kind, class, reader.take(usize::from(length))?))
}

/// Addresses of a name, IPv4 first.
///
/// # Errors
/// Naming the name, and the last server's fault.
pub(super) fn lookup(name: &str, servers: &[IpAddr], limit: Deadline) -> io::Result<Vec<IpAddr>> {
    let servers: Vec<_> = servers.iter().map(|server| SocketAddr::new(*server, PORT)).collect();
    lookup_at(name, &servers, limit)
}

fn lookup_at(name: &str, servers: &[SocketAddr], limit: Deadline) -> io::Result<Vec<IpAddr>> {
    let mut last = io::Error::other("it has no address");
    for server in (0..ROUNDS).flat_map(|_| servers.iter().take(MOST_SERVERS)) {
        if limit.left().is_err() {
            break;
        }
        let found = [Kind::A, Kind::Aaaa].map(|kind| ask(name, kind, *server, limit));
        let all: Vec<IpAddr> = found.iter().flatten().flatten().copied().collect();
        if !all.is_empty() {
            return Ok(all);
        }
        if let Some(error) = found.into_iter().find_map(Result::err) {
            last = error;
        }
    }
    Err(io::Error::new(last.kind(), format!("look up {name}: {last}")))
}

fn ask(name: &str, kind: Kind, server: SocketAddr, limit: Deadline) -> io::Result<Vec<IpAddr>> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    let packet = question(u16::from_ne_bytes(id), name, kind).map_err(io::Error::other)?;
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    socket.send(&packet)?;
    let end = Instant::now() + limit.left()?.min(PATIENCE);
    let mut buffer = [0; MOST_ANSWER];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {}", server.ip())));
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut buffer) {
            // An answer to an earlier question may come late.
            Ok(count) => match addresses(&packet, &buffer[..count]) {
                Err(DnsError::Form) => {}
                answer => return answer.map_err(io::Error::other),
            },
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1035's question for example.com, by hand.
    const ASKED: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\x03com\0\0\x01\0\x01";

    #[test]
    fn a_question_is_as_the_standard_has_it() {
        assert_eq!(question(0x1234, "example.com", Kind::A).unwrap(), ASKED);
        assert_eq!(question(0x1234, "example.com.", Kind::A).unwrap(), ASKED);
        let long = "a".repeat(64);
        let deep = ["abcdefgh"; 29].join(".");
        for name in ["", ".", "a..b", "a b", "ä", long.as_str(), deep.as_str()] {
            assert_eq!(question(1, name, Kind::A), Err(DnsError::Name), "{name}");
        }
    }

    /// An answer as name servers write it: an alias first, names by pointer.
    fn answer() -> Vec<u8> {
        let mut packet = b"\x12\x34\x81\x80\0\x01\0\x03\0\0\0\0".to_vec();
        packet.extend(&ASKED[12..]);
        packet.extend(b"\xc0\x0c\0\x05\0\x01\0\0\0\x3c\0\x06\x03www\xc0\x0c");
        packet.extend(b"\xc0\x29\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x07");
        packet.extend(b"\xc0\x29\0\x1c\0\x01\0\0\0\x3c\0\x10\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07");
        packet
    }

    #[test]
    fn an_answer_gives_its_addresses() {
        let found = addresses(ASKED, &answer()).unwrap();
        assert_eq!(found, ["192.0.2.7".parse::<IpAddr>().unwrap(), "2001:db8::7".parse().unwrap()]);
        // Cut off within the last record.
        let packet = answer();
        assert_eq!(addresses(ASKED, &packet[..packet.len() - 1]).unwrap().len(), 1);
    }

    #[test]
    fn what_is_not_the_answer_is_not_taken() {
        let changed = |at: usize, byte: u8| {
            let mut packet = answer();
            packet[at] = byte;
            addresses(ASKED, &packet)
        };
        // Another id, a question, two questions, another name.
        for (at, byte) in [(0, 0), (2, 1), (5, 2), (13, b'f')] {
            assert_eq!(changed(at, byte), Err(DnsError::Form), "byte {at}");
        }
        assert_eq!(changed(13, b'E').unwrap().len(), 2);
        assert_eq!(changed(3, 0x83), Err(DnsError::NoName));
        assert_eq!(changed(3, 0x82), Err(DnsError::Failed(2)));
        // Of another class.
        assert_eq!(changed(answer().len() - 23, 3).unwrap().len(), 1);
    }

    /// Three servers, three times, two questions: ten seconds for each would be minutes.
    #[test]
    fn servers_that_say_nothing_do_not_take_longer_than_there_is_time() {
        let silent: Vec<_> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let servers: Vec<_> = silent.iter().map(|s| s.local_addr().unwrap()).collect();
        let began = Instant::now();
        let limit = Deadline::after(Duration::from_millis(200));
        let error = lookup_at("kbs.example", &servers, limit).unwrap_err().to_string();
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(error, "look up kbs.example: no answer from 127.0.0.1");
    }

    proptest! {
        #[test]
        fn any_packet_is_read_or_refused(tail in proptest::collection::vec(any::<u8>(), 0..600), cut in 0usize..80) {
            let mut packet = answer();
            packet.truncate(cut);
            packet.extend(tail);
            if let Ok(found) = addresses(ASKED, &packet) {
                prop_assert!(found.len() <= MOST_ADDRESSES);
            }
        }

        #[test]
        fn any_name_is_asked_for_or_refused(name in "\\PC{0,300}") {
            if let Ok(packet) = question(7, &name, Kind::Aaaa) {
                prop_assert!(packet.len() <= HEADER + 255 + 4);
            }
        }
    }
}
