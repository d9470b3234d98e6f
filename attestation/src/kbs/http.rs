//! HTTP/1.1, as little as a KBS needs: one request, one answer of a known length.
//!
//! Owns: writing requests, reading answers, limits. An answer whose end only the connection's end tells is refused,
//! because then a host that cuts it off would not be noticed. Does not own: sockets.

use thiserror::Error;

/// Longest head of an answer, in bytes.
const MOST_HEAD: usize = 16 * 1024;
/// Longest body, in bytes.
pub const MOST_BODY: usize = 4 * 1024 * 1024;
const MOST_HEADERS: usize = 64;
const USER_AGENT: &str = concat!("coffer/", env!("CARGO_PKG_VERSION"));

/// Bytes that are no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("HTTP: {0}")]
pub struct HttpError(pub String);

fn wrong(message: impl Into<String>) -> HttpError {
    HttpError(message.into())
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `POST`.
    pub method: &'static str,
    /// Absolute path with its query.
    pub path: String,
    /// Without those that [`Self::encode`] adds.
    pub headers: Vec<(&'static str, String)>,
    /// Empty for `GET`.
    pub body: Vec<u8>,
}

impl Request {
    /// A `GET`.
    #[must_use]
    pub fn get(path: String) -> Self {
        Self { method: "GET", path, headers: Vec::new(), body: Vec::new() }
    }

    /// A `POST` of JSON.
    #[must_use]
    pub fn post(path: String, body: Vec<u8>) -> Self {
        let headers = vec![("Content-Type", "application/json".into())];
        Self { method: "POST", path, headers, body }
    }

    /// With one more header. The value must be checked text.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: String) -> Self {
        debug_assert!(!value.contains(['\r', '\n']), "header values are checked where they come from");
        self.headers.push((name, value));
        self
    }

    /// The bytes to send. `prefix` is the path of the server's base URL.
    #[must_use]
    pub fn encode(&self, host: &str, prefix: &str) -> Vec<u8> {
        let mut head = format!(
            "{} {prefix}{} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\n",
            self.method, self.path
        );
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if self.method == "POST" {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        head += "\r\n";
        [head.as_bytes(), &self.body].concat()
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Such as 200.
    pub status: u16,
    /// In order.
    pub headers: Vec<(String, String)>,
    /// At most [`MOST_BODY`] bytes.
    pub body: Vec<u8>,
}

impl Response {
    /// Values of a header, whose name is given in lower case.
    pub fn headers<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// Makes an answer of bytes as they come.
#[derive(Debug, Default)]
pub struct ResponseReader {
    bytes: Vec<u8>,
}

impl ResponseReader {
    /// Adds bytes, and gives the answer when it is whole. Bytes after it are an error: nothing else was asked.
    ///
    /// # Errors
    /// [`HttpError`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Response>, HttpError> {
        self.bytes.extend_from_slice(bytes);
        let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut parsed = httparse::Response::new(&mut headers);
        let head = match parsed.parse(&self.bytes).map_err(|e| wrong(e.to_string()))? {
            httparse::Status::Complete(length) if length <= MOST_HEAD => length,
            httparse::Status::Partial if self.bytes.len() <= MOST_HEAD => return Ok(None),
            _ => return Err(wrong(format!("a head of more than {MOST_HEAD} bytes"))),
        };
        let mut list = Vec::with_capacity(parsed.headers.len());
        for header in parsed.headers.iter() {
            let value = std::str::from_utf8(header.value)
                .map_err(|_| wrong(format!("header {}: not text", header.name)))?;
            list.push((header.name.to_owned(), value.to_owned()));
        }
        let mut response =
            Response { status: parsed.code.unwrap_or_default(), headers: list, body: Vec::new() };
        let rest = &self.bytes[head..];
        let (body, used) = match framing(&response)? {
            Framing::Length(length) if rest.len() < length => return Ok(None),
            Framing::Length(length) => (rest[..length].to_vec(), length),
            Framing::Chunked => match chunks(rest)? {
                Some(whole) => whole,
                None => return Ok(None),
            },
        };
        if used < rest.len() {
            return Err(wrong("more came than was asked for"));
        }
        response.body = body;
        Ok(Some(response))
    }
}

enum Framing {
    Length(usize),
    Chunked,
}

fn framing(response: &Response) -> Result<Framing, HttpError> {
    let mut lengths = response.headers("content-length");
    let mut encodings = response.headers("transfer-encoding");
    match (lengths.next(), lengths.next(), encodings.next(), encodings.next()) {
        (Some(length), None, None, None) => {
            let digits = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
            let length = length.parse().ok().filter(|n| digits && *n <= MOST_BODY);
            length.map(Framing::Length).ok_or_else(|| wrong(format!("a body of more than {MOST_BODY} bytes")))
        }
        (None, None, Some(encoding), None) if encoding.eq_ignore_ascii_case("chunked") => {
            Ok(Framing::Chunked)
        }
        (None, None, None, None) if matches!(response.status, 204 | 304) => Ok(Framing::Length(0)),
        _ => Err(wrong("the answer does not say once how long it is")),
    }
}

/// The body, and how many bytes of the stream it took. `None`: more is to come.
fn chunks(mut bytes: &[u8]) -> Result<Option<(Vec<u8>, usize)>, HttpError> {
    let whole = bytes.len();
    let mut body = Vec::new();
    loop {
        let (head, length) = match httparse::parse_chunk_size(bytes) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) if bytes.len() <= MOST_HEAD => return Ok(None),
            _ => return Err(wrong("a chunk without a length")),
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MOST_BODY - body.len() {
            return Err(wrong(format!("a body of more than {MOST_BODY} bytes")));
        }
        if length == 0 {
            // Trailers are not used by anybody here.
            return match bytes.get(head..head + 2) {
                Some(b"\r\n") => Ok(Some((body, whole - bytes.len() + head + 2))),
                Some(_) => Err(wrong("trailers after the last chunk")),
                None => Ok(None),
            };
        }
        let end = head + length;
        let Some(after) = bytes.get(end..end + 2) else { return Ok(None) };
        if after != b"\r\n" {
            return Err(wrong("a chunk longer than it said"));
        }
        body.extend_from_slice(&bytes[head..end]);
        bytes = &bytes[end + 2..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Option<Response>, HttpError> {
        ResponseReader::default().push(bytes)
    }

    const PLAIN: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nSet-Cookie: a=b\r\n\r\nhello";
    const CHUNKED: &[u8] =
        b"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n";

    #[test]
    fn both_framings_give_the_body() {
        let plain = read(PLAIN).unwrap().unwrap();
        assert_eq!((plain.status, plain.body.as_slice()), (200, b"hello".as_slice()));
        assert_eq!(plain.headers("set-cookie").collect::<Vec<_>>(), ["a=b"]);
        let chunked = read(CHUNKED).unwrap().unwrap();
        assert_eq!((chunked.status, chunked.body.as_slice()), (401, b"hello".as_slice()));
    }

    #[test]
    fn an_answer_that_does_not_say_its_length_is_refused() {
        let refused = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        assert!(refused("HTTP/1.1 200 OK\r\n\r\nhello").contains("does not say once"));
        assert!(
            refused("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab").contains("once")
        );
        assert!(
            refused("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na")
                .contains("once")
        );
        assert!(refused("HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na").contains("more than"));
        assert!(refused("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n").contains("more than"));
        assert!(refused("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab").contains("more came"));
    }

    #[test]
    fn a_request_is_what_servers_read() {
        let bytes = Request::post("/kbs/v0/auth".into(), b"{}".to_vec()).encode("h:1", "");
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("POST /kbs/v0/auth HTTP/1.1\r\nHost: h:1\r\n"));
        assert!(text.ends_with("Content-Length: 2\r\n\r\n{}"));
    }

    proptest! {
        #[test]
        fn a_cut_anywhere_never_gives_an_answer(chunked in any::<bool>(), place in any::<prop::sample::Index>()) {
            let whole = if chunked { CHUNKED } else { PLAIN };
            let cut = place.index(whole.len());
            prop_assert_eq!(read(&whole[..cut]).unwrap_or(None), None);
            let mut reader = ResponseReader::default();
            prop_assert_eq!(reader.push(&whole[..cut]).unwrap(), None);
            prop_assert_eq!(reader.push(&whole[cut..]).unwrap().unwrap().body, b"hello");
        }

        #[test]
        fn any_bytes_are_an_answer_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
            let _ = read(&[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice(), &bytes].concat());
        }
    }
}
