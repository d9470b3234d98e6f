//! D-Bus messages, as far as asking systemd for a scope needs them (D-Bus specification, "Marshaling" and "Message Protocol").
//!
//! Owns: bytes, little endian. Does not own: the socket. What comes from the bus is the host's, but bounded and checked all the
//! same.

use thiserror::Error;

/// Longest message that is read, in bytes: what systemd says here is a few hundred.
pub(super) const LONGEST: usize = 64 * 1024;
/// The fixed part of a header: everything before its fields, and their length.
pub(super) const FIXED: usize = 16;

/// Why bytes are no message.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a message of the bus is {0}")]
pub(super) struct MessageError(&'static str);

/// Values by their alignment.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    /// `u`.
    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// `s` and `o`.
    pub(super) fn string(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
    }

    /// `g`.
    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
    }

    /// An array whose elements begin at a multiple of `align`.
    pub(super) fn array(&mut self, align: usize, fill: impl FnOnce(&mut Self)) {
        self.u32(0);
        let at = self.0.len() - 4;
        self.align(align);
        let from = self.0.len();
        fill(self);
        let length = (self.0.len() - from) as u32;
        self.0[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// `v`.
    fn variant(&mut self, value: &Value) {
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.string(text);
            }
            Value::Switch(on) => {
                self.signature("b");
                self.u32(u32::from(*on));
            }
            Value::Number(number) => {
                self.signature("t");
                self.align(8);
                self.0.extend_from_slice(&number.to_le_bytes());
            }
            Value::Signed(number) => {
                self.signature("i");
                self.u32(number.cast_unsigned());
            }
            Value::Numbers(list) => {
                self.signature("au");
                self.array(4, |w| list.iter().for_each(|n| w.u32(*n)));
            }
        }
    }

    /// `a(sv)`: a unit's properties.
    pub(super) fn properties(&mut self, list: &[(&str, Value)]) {
        self.array(8, |w| {
            for (name, value) in list {
                w.align(8);
                w.string(name);
                w.variant(value);
            }
        });
    }
}

/// Values of properties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// `s`.
    Text(String),
    /// `b`.
    Switch(bool),
    /// `t`.
    Number(u64),
    /// `i`.
    Signed(i32),
    /// `au`.
    Numbers(Vec<u32>),
}

/// Of whom something is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method {
    /// Bus name.
    pub(super) destination: &'static str,
    /// Object.
    pub(super) path: &'static str,
    /// Interface.
    pub(super) interface: &'static str,
    /// Method.
    pub(super) member: &'static str,
    /// Types of the arguments.
    pub(super) signature: &'static str,
}

/// A method call's bytes.
#[must_use]
pub(super) fn call(method: &Method, serial: u32, body: Writer) -> Vec<u8> {
    let mut w = Writer(vec![b'l', 1, 0, 1]);
    w.u32(body.0.len() as u32);
    w.u32(serial);
    w.array(8, |w| {
        for (code, kind, text) in
            [(1, "o", method.path), (2, "s", method.interface), (6, "s", method.destination)]
        {
            w.align(8);
            w.0.push(code);
            w.signature(kind);
            w.string(text);
        }
        if !method.signature.is_empty() {
            w.align(8);
            w.0.push(8);
            w.signature("g");
            w.signature(method.signature);
        }
        w.align(8);
        w.0.push(3);
        w.signature("s");
        w.string(method.member);
    });
    w.align(8);
    w.0.extend_from_slice(&body.0);
    w.0
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Somebody asks; nobody is expected to.
    Call,
    /// An answer.
    Return,
    /// A refusal.
    Error,
    /// News.
    Signal,
    /// Of a later specification.
    Other,
}

/// A received message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// What it is.
    pub(super) kind: Kind,
    /// The serial of the call that it answers.
    pub(super) answers: Option<u32>,
    /// Of an error.
    pub(super) error: Option<String>,
    /// Of a signal.
    pub(super) member: Option<String>,
    /// The arguments' types.
    pub(super) signature: String,
    /// The arguments.
    pub(super) body: Vec<u8>,
}

/// Reads values back.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Of a body.
    #[must_use]
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], MessageError> {
        let end = self.at.checked_add(count).ok_or(MessageError("too long"))?;
        let bytes = self.bytes.get(self.at..end).ok_or(MessageError("cut off"))?;
        self.at = end;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, MessageError> {
        self.take(1).map(|b| b[0])
    }

    /// `u`.
    ///
    /// # Errors
    /// [`MessageError`].
    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        self.align(4);
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// `s` and `o`.
    ///
    /// # Errors
    /// [`MessageError`].
    pub(super) fn string(&mut self) -> Result<&'a str, MessageError> {
        let length = self.u32()? as usize;
        let text = self.take(length)?;
        self.take(1)?;
        std::str::from_utf8(text).map_err(|_| MessageError("no text where text should be"))
    }

    fn signature(&mut self) -> Result<&'a str, MessageError> {
        let length = usize::from(self.u8()?);
        let text = self.take(length)?;
        self.take(1)?;
        std::str::from_utf8(text).map_err(|_| MessageError("no text where text should be"))
    }
}

/// How many bytes a message has, from its first [`FIXED`] ones.
///
/// # Errors
/// [`MessageError`] when they are no header, or it is longer than [`LONGEST`].
pub(super) fn length(fixed: &[u8; FIXED]) -> Result<usize, MessageError> {
    if fixed[0] != b'l' || fixed[3] != 1 {
        return Err(MessageError("of another byte order or version"));
    }
    let word =
        |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize;
    let (body, fields) = (word(4), word(12));
    if body > LONGEST || fields > LONGEST {
        return Err(MessageError("too long"));
    }
    Ok((FIXED + fields).next_multiple_of(8) + body)
}

/// Reads a whole message.
///
/// # Errors
/// [`MessageError`].
pub(super) fn read(bytes: &[u8]) -> Result<Message, MessageError> {
    let fixed = bytes.first_chunk::<FIXED>().ok_or(MessageError("cut off"))?;
    if bytes.len() != length(fixed)? {
        return Err(MessageError("of another length than it says"));
    }
    let kind = match fixed[1] {
        1 => Kind::Call,
        2 => Kind::Return,
        3 => Kind::Error,
        4 => Kind::Signal,
        _ => Kind::Other,
    };
    let body = u32::from_le_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]) as usize;
    let mut message = Message {
        kind,
        answers: None,
        error: None,
        member: None,
        signature: String::new(),
        body: bytes[bytes.len() - body..].to_vec(),
    };
    let mut fields = Reader { bytes: &bytes[..bytes.len() - body], at: 12 };
    let end = FIXED + fields.u32()? as usize;
    while fields.at < end {
        fields.align(8);
        let code = fields.u8()?;
        match (code, fields.signature()?) {
            (5, "u") => message.answers = Some(fields.u32()?),
            (4, "s") => message.error = Some(fields.string()?.to_owned()),
            (3, "s") => message.member = Some(fields.string()?.to_owned()),
            (_, "s" | "o") => drop(fields.string()?),
            (8, "g") => message.signature = fields.signature()?.to_owned(),
            (_, "u") => drop(fields.u32()?),
            _ => return Err(MessageError("one with an unknown field")),
        }
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: Method = Method {
        destination: "org.freedesktop.systemd1",
        path: "/org/freedesktop/systemd1",
        interface: "org.freedesktop.systemd1.Manager",
        member: "StartTransientUnit",
        signature: "ssa(sv)a(sa(sv))",
    };

    /// By GLib 2.74: `Gio.DBusMessage.new_method_call(...).to_blob(...)`, with serial 3.
    const GLIB: &str = concat!(
        "6c010001f800000003000000b300000001016f00190000002f6f72672f667265656465736b746f702f73797374656d64310000000000000002017300200000006f7267",
        "2e667265656465736b746f702e73797374656d64312e4d616e61676572000000000000000006017300180000006f72672e667265656465736b746f702e73797374656d",
        "64310000000000000000080167001073736128737629612873612873762929000000030173001200000053746172745472616e7369656e74556e697400000000000011",
        "0000006c6962706f642d303132332e73636f7065000000070000007265706c61636500c80000000b0000004465736372697074696f6e000173000015000000636f6666",
        "657220636f6e7461696e6572203031323300000005000000536c696365000173000000000d0000006d616368696e652e736c6963650000000000000004000000504944",
        "73000261750000000004000000671200000800000044656c65676174650001620001000000000000001300000044656661756c74446570656e64656e63696573000162",
        "000000000000090000004d656d6f72794d6178000174000000000000000000000010000000000000000000000000",
    );

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn a_call_is_glibs_to_the_byte() {
        let mut body = Writer::default();
        body.string("libpod-0123.scope");
        body.string("replace");
        body.properties(&[
            ("Description", Value::Text("coffer container 0123".into())),
            ("Slice", Value::Text("machine.slice".into())),
            ("PIDs", Value::Numbers(vec![4711])),
            ("Delegate", Value::Switch(true)),
            ("DefaultDependencies", Value::Switch(false)),
            ("MemoryMax", Value::Number(268_435_456)),
        ]);
        body.array(8, |_| {});
        assert_eq!(call(&START, 3, body), hex(GLIB));
    }

    #[test]
    fn what_glib_writes_is_read() {
        let message = read(&hex(GLIB)).unwrap();
        assert_eq!((message.kind, message.member.as_deref()), (Kind::Call, Some("StartTransientUnit")));
        assert_eq!(message.signature, START.signature);
        let mut body = Reader::new(&message.body);
        assert_eq!((body.string(), body.string()), (Ok("libpod-0123.scope"), Ok("replace")));
        let bytes = hex(GLIB);
        assert_eq!(read(&bytes[..bytes.len() - 1]), Err(MessageError("of another length than it says")));
        let mut large = *bytes.first_chunk::<FIXED>().unwrap();
        large[7] = 1;
        assert_eq!(length(&large), Err(MessageError("too long")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            flips in prop::collection::vec((0usize..448, any::<u8>()), 0..6),
        ) {
            let _ = read(&bytes);
            let mut near = hex(GLIB);
            for (at, byte) in flips {
                near[at] = byte;
            }
            if let Ok(message) = read(&near) {
                let mut body = Reader::new(&message.body);
                while body.string().is_ok() {}
            }
        }
    }
}
