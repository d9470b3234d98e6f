use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    sync::{Arc, Mutex},
};

use coffer_protocol::vm::NetAnswer;
use proptest::prelude::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{
    Ask,
    connection::WINDOW,
    muxer::Muxer,
    packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM},
};

const CID: u64 = 3;
const PORT: u32 = 1024;

/// The guest's side, by hand.
struct Guest {
    muxer: Muxer,
    host_port: u32,
    taken: u32,
}

fn packet(op: Op, host_port: u32, guest_port: u32) -> Header {
    Header {
        source_cid: CID,
        target_cid: HOST_CID,
        source_port: guest_port,
        target_port: host_port,
        length: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buffer: 1 << 20,
        forwarded: 0,
    }
}

impl Guest {
    /// A guest that is ready, with one open connection of a host.
    fn connected() -> (Self, UnixStream) {
        let mut muxer = Muxer::new(CID, 1, false);
        assert!(!muxer.is_ready());
        muxer.receive(&packet(Op::Request, 1, 77), &[]);
        assert!(muxer.is_ready());
        assert_eq!(muxer.next_packet(&mut [0; 64]).unwrap().op, Some(Op::Response));
        let (mut host, ours) = UnixStream::pair().unwrap();
        muxer.accept(ours);
        host.write_all(b"CONNECT 1024\n").unwrap();
        let mut guest = Self { muxer, host_port: 0, taken: 0 };
        guest.serve();
        let request = guest.muxer.next_packet(&mut [0; 64]).unwrap();
        assert_eq!((request.op, request.target_port), (Some(Op::Request), PORT));
        guest.host_port = request.source_port;
        guest.send(Op::Response, 0, &[]);
        let mut line = [0; 11];
        host.read_exact(&mut line).unwrap();
        assert_eq!(&line, format!("OK {}\n", guest.host_port).as_bytes());
        (guest, host)
    }

    /// What the worker's poll loop does once.
    fn serve(&mut self) {
        for (key, fd, events) in self.muxer.interests(true) {
            let mut wait = libc::pollfd { fd, events, revents: 0 };
            // SAFETY: one valid entry.
            unsafe { libc::poll(&raw mut wait, 1, 0) };
            if wait.revents != 0 {
                self.muxer.handle(key, wait.revents);
            }
        }
    }

    fn send(&mut self, op: Op, flags: u32, data: &[u8]) {
        let header = packet(op, self.host_port, PORT);
        self.muxer
            .receive(&Header { flags, length: data.len() as u32, forwarded: self.taken, ..header }, data);
    }

    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.serve();
        let mut buffer = vec![0; 3000];
        let header = self.muxer.next_packet(&mut buffer)?;
        buffer.truncate(header.length as usize);
        self.taken = self.taken.wrapping_add(header.length);
        Some((header, buffer))
    }
}

#[test]
fn hosts_wait_until_the_guest_is_ready_and_other_ports_are_refused() {
    let mut muxer = Muxer::new(CID, 1, false);
    muxer.receive(&packet(Op::Request, 9, 77), &[]);
    assert!(!muxer.is_ready());
    assert_eq!(muxer.next_packet(&mut [0; 64]).unwrap().op, Some(Op::Reset));
}

#[test]
fn a_host_that_ends_its_half_still_receives() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.next().unwrap().1, b"question");
    let (header, _) = guest.next().unwrap();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    guest.send(Op::Data, 0, b"answer");
    guest.send(Op::Shutdown, SHUTDOWN_RECEIVE | SHUTDOWN_SEND, &[]);
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(guest.next().unwrap().0.op, Some(Op::Reset));
    assert_eq!(guest.muxer.count(), 0);
}

#[test]
fn a_host_that_dies_is_told_to_the_guest_behind_its_last_bytes() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"last words").unwrap();
    drop(host);
    assert_eq!(guest.next().unwrap().1, b"last words");
    let (header, _) = guest.next().unwrap();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), 3));
    guest.send(Op::Reset, 0, &[]);
    assert_eq!(guest.muxer.count(), 0);
}

#[test]
fn a_host_without_a_proper_line_is_dropped() {
    for line in [
        "",
        "CONNECT x\n",
        "CONNECT 99999999999\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT 00000000000000000000000000\n",
    ] {
        let (mut guest, _host) = Guest::connected();
        let (mut other, ours) = UnixStream::pair().unwrap();
        guest.muxer.accept(ours);
        other.write_all(line.as_bytes()).unwrap();
        drop(other);
        guest.serve();
        assert_eq!(guest.muxer.count(), 1, "{line:?}");
    }
}

/// Sends a line with these descriptors at its first byte.
fn send_line(host: &UnixStream, line: &str, descriptors: &[i32]) {
    assert_eq!(host.send_with_fds(&[line.as_bytes()], descriptors).unwrap(), line.len());
}

#[test]
fn a_hosts_questions_about_the_vm_are_answered_with_the_descriptor_that_came_along() {
    let (mut guest, _host) = Guest::connected();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let control = move |ask| {
        hears.lock().unwrap().push(ask);
        "answer\n".to_owned()
    };
    guest.muxer = guest.muxer.with_control(Some(Arc::new(control)));
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"a tap").unwrap();
    let mut ask = |line: &str, descriptors: &[i32]| {
        let (mut other, ours) = UnixStream::pair().unwrap();
        guest.muxer.accept(ours);
        send_line(&other, line, descriptors);
        guest.serve();
        assert_eq!(guest.muxer.count(), 1, "{line:?}");
        let mut answer = String::new();
        other.read_to_string(&mut answer).unwrap();
        (answer, heard.lock().unwrap().pop())
    };
    let (answer, asked) = ask("NET 02:00:00:00:00:0A\n", &[file.as_raw_fd()]);
    assert_eq!(answer, "answer\n");
    let Some(Ask::Net([2, 0, 0, 0, 0, 10], Some(descriptor))) = asked else { panic!("{asked:?}") };
    // The same open file.
    let mut same = File::from(descriptor);
    same.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    same.read_to_string(&mut text).unwrap();
    assert_eq!(text, "a tap");
    assert!(matches!(ask("NET 02:00:00:00:00:0a\n", &[]).1, Some(Ask::Net(_, None))));
    assert!(matches!(ask("MEMORY 7\n", &[]).1, Some(Ask::Memory(Some(7)))));
    // No line, and nothing of it stays open here.
    assert!(ask("NET 02:00:00:00:00\n", &[file.as_raw_fd()]).1.is_none());
    drop(same);
    let link = |path: &Path| fs::read_link(path).ok();
    let own = link(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    assert_eq!(open.filter(|entry| link(&entry.path()) == own).count(), 1);
}

#[test]
fn a_vm_that_nobody_can_change_says_so() {
    let (mut guest, _host) = Guest::connected();
    let (mut other, ours) = UnixStream::pair().unwrap();
    guest.muxer.accept(ours);
    send_line(&other, "NET 02:00:00:00:00:0a\n", &[]);
    guest.serve();
    let mut answer = String::new();
    other.read_to_string(&mut answer).unwrap();
    let Some(NetAnswer::Refused(words)) = NetAnswer::parse(&answer) else { panic!("{answer}") };
    assert!(words.contains("nobody"), "{words}");
}

#[test]
fn a_guest_that_sends_more_than_its_credit_is_reset() {
    let (mut guest, _host) = Guest::connected();
    let chunk = vec![7; 64 * 1024];
    let mut resets = 0;
    // The host's socket buffer takes some; behind it the window fills.
    for _ in 0..64 {
        guest.send(Op::Data, 0, &chunk);
        while let Some(header) = guest.muxer.next_packet(&mut [0; 64]) {
            resets += u32::from(header.op == Some(Op::Reset));
        }
    }
    assert!(resets > 0);
    assert_eq!(guest.muxer.count(), 0);
}

#[test]
fn connections_over_the_limit_are_closed() {
    let (mut guest, _host) = Guest::connected();
    let mut hosts = Vec::new();
    for _ in 0..400 {
        let (host, ours) = UnixStream::pair().unwrap();
        guest.muxer.accept(ours);
        hosts.push(host);
    }
    assert!(guest.muxer.count() <= super::muxer::MOST);
    hosts.clear();
    guest.serve();
    assert_eq!(guest.muxer.count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn bytes_to_the_guest_arrive_whole_and_in_order(chunks in prop::collection::vec(1usize..9000, 1..12)) {
        let (mut guest, mut host) = Guest::connected();
        let mut expected = Vec::new();
        let mut seen = Vec::new();
        for (i, length) in chunks.into_iter().enumerate() {
            let chunk: Vec<u8> = (0..length).map(|n| (n + i) as u8).collect();
            host.write_all(&chunk).unwrap();
            expected.extend(chunk);
            while let Some((header, data)) = guest.next() {
                prop_assert_eq!(header.op, Some(Op::Data));
                seen.extend(data);
                guest.send(Op::CreditUpdate, 0, &[]);
            }
        }
        prop_assert_eq!(seen, expected);
    }

    #[test]
    fn bytes_to_a_slow_host_arrive_whole_within_the_credit(chunks in prop::collection::vec(1usize..60_000, 1..20)) {
        let (mut guest, mut host) = Guest::connected();
        host.set_nonblocking(true).unwrap();
        let (mut sent, mut forwarded) = (0u32, 0u32);
        let (mut expected, mut seen) = (Vec::new(), Vec::new());
        let mut buffer = vec![0; 10_000];
        for (i, length) in chunks.into_iter().enumerate() {
            let chunk: Vec<u8> = (0..length).map(|n| (n * 7 + i) as u8).collect();
            while WINDOW - sent.wrapping_sub(forwarded) < length as u32 {
                let count = host.read(&mut buffer).unwrap();
                seen.extend_from_slice(&buffer[..count]);
                guest.send(Op::CreditRequest, 0, &[]);
                while let Some((header, _)) = guest.next() {
                    forwarded = header.forwarded;
                }
            }
            guest.send(Op::Data, 0, &chunk);
            sent += length as u32;
            expected.extend(chunk);
        }
        while seen.len() < expected.len() {
            guest.serve();
            if let Ok(count) = host.read(&mut buffer) {
                seen.extend_from_slice(&buffer[..count]);
            }
        }
        prop_assert!(seen == expected);
    }

    #[test]
    fn no_packet_makes_it_panic_or_keeps_an_entry_for_ever(
        packets in prop::collection::vec((any::<[u8; 44]>(), 0u8..4, 0u16..9), 0..60),
    ) {
        let (mut guest, host) = Guest::connected();
        for (bytes, aim, op) in packets {
            let mut bytes = bytes;
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            if aim > 0 {
                bytes[..30].copy_from_slice(&packet(Op::Data, guest.host_port, PORT).to_bytes()[..30]);
            }
            let header = Header::from_bytes(&bytes);
            guest.muxer.receive(&header, &bytes);
            let _ = guest.next();
        }
        drop(host);
        for _ in 0..8 {
            let _ = guest.next();
        }
        guest.send(Op::Reset, 0, &[]);
        prop_assert_eq!(guest.muxer.count(), 0);
    }
}
