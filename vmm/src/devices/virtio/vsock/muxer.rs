//! All connections: packets of the guest in, packets for the guest out, streams of the host between.
//!
//! Owns: which packet is for which connection, the answers to packets that are wrong. Does not own: virtqueues.
//!
//! A guest may send anything: a packet for no connection, or in a state that it does not fit, is answered by a reset.

use std::{
    collections::{BTreeMap, VecDeque},
    os::unix::net::UnixStream,
};

use coffer_protocol::vm::{Line, NetAnswer, SizeAnswer};

use super::{
    Ask, Control,
    connection::{Connection, Input, State, WINDOW},
    packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM},
};

/// Most connections at once; further ones are closed at once.
pub(super) const MOST: usize = 1023;
/// Most answers that wait for room in the guest. A guest that gives none loses the rest.
const MOST_ANSWERS: usize = 4096;
/// Why nothing of a VM without [`Control`] changes.
const NOBODY: &str = "this VM has nobody who could change it";
/// First of the host's ports.
const FIRST_PORT: u32 = 1 << 20;

/// Ports of the host and of the guest. The guest's is unknown until the host's line was read.
type Key = u32;

pub(super) struct Muxer {
    guest_cid: u64,
    ready_port: u32,
    ready: bool,
    connections: BTreeMap<Key, (u32, Connection)>,
    answers: VecDeque<Header>,
    next_port: u32,
    /// Who was read last, so that a busy connection does not starve the others.
    turn: Key,
    /// Who answers a host that asks about the VM itself.
    control: Option<Control>,
}

impl Muxer {
    /// `ready` for a guest that listened when it was saved.
    pub(super) fn new(guest_cid: u64, ready_port: u32, ready: bool) -> Self {
        Self {
            guest_cid,
            ready_port,
            ready,
            connections: BTreeMap::new(),
            answers: VecDeque::new(),
            next_port: FIRST_PORT,
            turn: 0,
            control: None,
        }
    }

    /// Lets hosts ask about the VM itself.
    pub(super) fn with_control(self, control: Option<Control>) -> Self {
        Self { control, ..self }
    }

    /// The guest listens: hosts may be let in.
    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn count(&self) -> usize {
        self.connections.len()
    }

    /// Lets a host in. Over the limit, or when the stream cannot be used, it is closed.
    pub(super) fn accept(&mut self, stream: UnixStream) {
        if self.connections.len() >= MOST {
            return;
        }
        let Ok(connection) = Connection::new(stream) else { return };
        while self.connections.contains_key(&self.next_port) {
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
        }
        self.connections.insert(self.next_port, (0, connection));
        self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
    }

    /// Descriptors and events to wait for, in the order of [`Self::handle`]'s keys.
    pub(super) fn interests(&self, room: bool) -> Vec<(Key, i32, i16)> {
        self.connections
            .iter()
            .map(|(key, (_, connection))| {
                let (fd, events) = connection.interest(room);
                (*key, fd, events)
            })
            .collect()
    }

    fn header(&self, op: Op, host_port: u32, guest_port: u32) -> Header {
        Header {
            source_cid: HOST_CID,
            target_cid: self.guest_cid,
            source_port: host_port,
            target_port: guest_port,
            length: 0,
            kind: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buffer: WINDOW,
            forwarded: 0,
        }
    }

    fn answer(&mut self, header: Header) {
        if self.answers.len() < MOST_ANSWERS {
            self.answers.push_back(header);
        }
    }

    /// Says something about a connection to the guest, with its counters.
    fn tell(&mut self, key: Key, op: Op, flags: u32) {
        let Some((guest_port, connection)) = self.connections.get_mut(&key) else { return };
        let (guest_port, forwarded) = (*guest_port, connection.tell());
        let header = self.header(op, key, guest_port);
        self.answer(Header { flags, forwarded, ..header });
    }

    fn reset(&mut self, key: Key) {
        self.tell(key, Op::Reset, 0);
        self.connections.remove(&key);
    }

    /// A stream of the host can be read or written, or hung up.
    pub(super) fn handle(&mut self, key: Key, events: i16) {
        let Some((guest_port, connection)) = self.connections.get_mut(&key) else { return };
        if connection.state == State::Line {
            match connection.read_line() {
                Ok(None) => {}
                Ok(Some(Line::Connect(port))) => {
                    *guest_port = port;
                    connection.state = State::Requested;
                    self.tell(key, Op::Request, 0);
                }
                Ok(Some(Line::Memory(wanted))) => {
                    let refused = SizeAnswer::Refused(NOBODY.into());
                    self.ask(key, Ask::Memory(wanted), || refused.to_line());
                }
                Ok(Some(Line::Net(mac))) => {
                    let refused = NetAnswer::Refused(NOBODY.into());
                    let ask = Ask::Net(mac, connection.take_descriptor());
                    self.ask(key, ask, || refused.to_line());
                }
                Err(_) => {
                    self.connections.remove(&key);
                }
            }
            return;
        }
        if events & libc::POLLOUT != 0 && connection.write_waiting().is_err() {
            self.close(key);
            return;
        }
        let Some((_, connection)) = self.connections.get(&key) else { return };
        if connection.is_over() {
            self.reset(key);
        } else if connection.owes_credit() {
            self.tell(key, Op::CreditUpdate, 0);
        } else if events & (libc::POLLHUP | libc::POLLERR) != 0 && events & libc::POLLIN == 0 {
            self.close(key);
        }
    }

    /// Answers a host about the VM itself, and ends its connection. `nobody` is the answer of a VM that nobody can change.
    fn ask(&mut self, key: Key, ask: Ask, nobody: impl FnOnce() -> String) {
        let answer = self.control.as_ref().map_or_else(nobody, |control| control(ask));
        if let Some((_, mut connection)) = self.connections.remove(&key) {
            // A host that has left does not hear it.
            let _ = connection.say(&answer);
        }
    }

    /// The host is gone: the guest hears it behind all data, and answers with a reset.
    fn close(&mut self, key: Key) {
        let Some((_, connection)) = self.connections.get_mut(&key) else { return };
        match connection.state {
            State::Open => {
                connection.state = State::Closing;
                self.tell(key, Op::Shutdown, SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
            }
            State::Requested => self.reset(key),
            State::Line | State::Closing => {}
        }
    }

    /// A packet of the guest.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        if header.source_cid != self.guest_cid || header.target_cid != HOST_CID {
            return;
        }
        let (key, guest_port) = (header.target_port, header.source_port);
        let known =
            self.connections.get(&key).is_some_and(|(port, c)| *port == guest_port && c.state != State::Line);
        if header.kind != TYPE_STREAM || header.op.is_none() || !known {
            self.stranger(header);
            return;
        }
        let Some((_, connection)) = self.connections.get_mut(&key) else { return };
        connection.hear(header.buffer, header.forwarded);
        match (header.op, connection.state) {
            (Some(Op::Reset), _) => {
                self.connections.remove(&key);
            }
            (Some(Op::Response), State::Requested) => {
                connection.state = State::Open;
                if connection.say(&format!("OK {key}\n")).is_err() {
                    self.close(key);
                }
            }
            (Some(Op::Data), State::Open) => {
                if connection.overflows(data.len()) {
                    self.reset(key);
                } else if connection.push(data).is_err() {
                    self.close(key);
                } else if connection.owes_credit() {
                    self.tell(key, Op::CreditUpdate, 0);
                }
            }
            (Some(Op::Shutdown), State::Open) => {
                if connection.shut_down(header.flags) {
                    self.reset(key);
                }
            }
            (Some(Op::CreditUpdate), _) => {}
            (Some(Op::CreditRequest), State::Open) => self.tell(key, Op::CreditUpdate, 0),
            // What was on its way when the host left.
            (Some(Op::Data | Op::CreditRequest), State::Closing) => {}
            (Some(Op::Shutdown), State::Closing) => self.reset(key),
            _ => self.reset(key),
        }
    }

    /// A packet for no connection: the guest's own, which is welcome at the ready port only, or a mistake.
    fn stranger(&mut self, header: &Header) {
        let mut op = Op::Reset;
        if header.op == Some(Op::Request)
            && header.kind == TYPE_STREAM
            && header.target_port == self.ready_port
        {
            self.ready = true;
            op = Op::Response;
        }
        if header.op != Some(Op::Reset) {
            let answer = self.header(op, header.target_port, header.source_port);
            self.answer(Header { kind: header.kind, ..answer });
        }
    }

    /// The next packet for the guest; its data goes to `buffer`. `None` when there is nothing to say.
    pub(super) fn next_packet(&mut self, buffer: &mut [u8]) -> Option<Header> {
        if let Some(header) = self.answers.pop_front() {
            return Some(header);
        }
        let after = self.connections.range(self.turn.saturating_add(1)..).map(|(k, _)| *k);
        let keys: Vec<Key> = after.chain(self.connections.range(..=self.turn).map(|(k, _)| *k)).collect();
        for key in keys {
            let Some((guest_port, connection)) = self.connections.get_mut(&key) else { continue };
            if connection.state != State::Open {
                continue;
            }
            match connection.read(buffer) {
                Input::Nothing => {}
                Input::Bytes(count) => {
                    self.turn = key;
                    let (guest_port, forwarded) = (*guest_port, connection.tell());
                    let header = self.header(Op::Data, key, guest_port);
                    return Some(Header { length: count as u32, forwarded, ..header });
                }
                Input::End => {
                    if connection.host_is_gone() {
                        self.close(key);
                    } else {
                        self.tell(key, Op::Shutdown, SHUTDOWN_SEND);
                    }
                    return self.answers.pop_front();
                }
            }
        }
        None
    }
}
