//! HTTP/1.1 for pulling: one `GET`, and an answer whose body is read as it comes.
//!
//! Owns: sockets, TLS by the machine's own certificates, framing, bounds on heads and waits. Does not own: who may be spoken to
//! without TLS, redirects, credentials.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

/// Longest head of an answer, in bytes.
const MOST_HEAD: usize = 32 * 1024;
const MOST_HEADERS: usize = 96;
/// Longest line that says how long a chunk is.
const MOST_LINE: u64 = 1024;
/// No single wait for the server is longer.
const PATIENCE: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("coffer/", env!("CARGO_PKG_VERSION"));
/// Where distributions keep the certificates of authorities: Debian, Fedora, Alpine.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
/// Certificates of single registries, as podman and Docker look for them.
const OF_REGISTRIES: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) tls: bool,
    pub(super) host: String,
    pub(super) port: u16,
    /// With its query, from the first `/`.
    pub(super) path: String,
}

impl Url {
    /// An absolute URL of http or https, without a user in it.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => {
                let (host, after) = v6.split_once(']')?;
                host.parse::<std::net::Ipv6Addr>().ok()?;
                (host, after.strip_prefix(':').or(after.is_empty().then_some(""))?)
            }
            None => authority.split_once(':').unwrap_or((authority, "")),
        };
        let port = match port {
            "" if tls => 443,
            "" => 80,
            digits => digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))?,
        };
        let named = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        let visible = path.bytes().all(|b| b.is_ascii_graphic());
        if host.is_empty() || !host.chars().all(named) || !visible {
            return None;
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Some(Self { tls, host: host.to_ascii_lowercase(), port, path })
    }

    /// Where a `Location` leads from here.
    pub(super) fn join(&self, location: &str) -> Option<Self> {
        let path = |path: &str| {
            Url::parse(&format!("http://h{path}")).map(|url| Self { path: url.path, ..self.clone() })
        };
        match location {
            _ if location.starts_with("//") => Self::parse(&format!("{}:{location}", self.scheme())),
            _ if location.starts_with('/') => path(location),
            _ => Self::parse(location),
        }
    }

    pub(super) fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == if self.tls { 443 } else { 80 } { host } else { format!("{host}:{}", self.port) }
    }

    /// The same server, which may get the same credentials.
    pub(super) fn is_same_server(&self, other: &Self) -> bool {
        (self.tls, &self.host, self.port) == (other.tls, &other.host, other.port)
    }
}

/// An answer, its body still to come.
pub(super) struct Answer {
    pub(super) status: u16,
    headers: Vec<(String, String)>,
    body: Body,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// All values of a header.
    pub(super) fn headers<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers
            .iter()
            .filter(move |(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// The body, if it has no more than so many bytes.
    pub(super) fn whole(self, most: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.body.take(most + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > most {
            return Err(io::Error::other(format!("more than {most} bytes came")));
        }
        Ok(bytes)
    }

    pub(super) fn body(self) -> Body {
        self.body
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

#[derive(Clone, Copy, Debug)]
enum Framing {
    /// So many bytes are to come.
    Length(u64),
    /// So many of this chunk; the next one's length stands behind it.
    Chunk(u64),
    End,
}

/// A body. Its end is an error where the answer promised more.
pub(super) struct Body {
    stream: BufReader<Box<dyn Stream>>,
    framing: Framing,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = match self.framing {
                Framing::End | Framing::Length(0) => return Ok(0),
                Framing::Chunk(0) => {
                    self.framing = self.next_chunk()?;
                    continue;
                }
                Framing::Length(left) | Framing::Chunk(left) => left,
            };
            let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let count = self.stream.read(&mut buffer[..most])?;
            if count == 0 && most > 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("the connection ended {left} bytes early"),
                ));
            }
            let left = left - count as u64;
            self.framing = match self.framing {
                Framing::Chunk(_) if left == 0 => {
                    if !self.line()?.is_empty() {
                        return Err(io::Error::other("a chunk longer than it said"));
                    }
                    Framing::Chunk(0)
                }
                Framing::Chunk(_) => Framing::Chunk(left),
                _ => Framing::Length(left),
            };
            return Ok(count);
        }
    }
}

impl Body {
    fn next_chunk(&mut self) -> io::Result<Framing> {
        let line = self.line()?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let length =
            u64::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        match length.ok_or_else(|| io::Error::other("a chunk without a length"))? {
            0 => Ok(Framing::End),
            length => Ok(Framing::Chunk(length)),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.stream.by_ref().take(MOST_LINE).read_until(b'\n', &mut line)?;
        let line =
            line.strip_suffix(b"\r\n").ok_or_else(|| io::Error::other("a chunk's line does not end"))?;
        Ok(String::from_utf8_lossy(line).into_owned())
    }
}

/// Speaks with servers.
#[derive(Debug, Default)]
pub(super) struct Http {
    /// Further authorities, PEM.
    pub(super) authorities: Vec<PathBuf>,
}

impl Http {
    /// One `GET`, and the answer's head.
    pub(super) fn get(&self, url: &Url, headers: &[(&str, &str)]) -> io::Result<Answer> {
        let mut stream = self.connect(url)?;
        let mut head = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: {USER_AGENT}\r\nConnection: close\r\n",
            url.path,
            url.authority()
        );
        for (name, value) in headers {
            if value.contains(['\r', '\n']) {
                return Err(io::Error::other(format!("a line break in {name}")));
            }
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        stream.write_all(head.as_bytes())?;
        stream.flush()?;
        answer(BufReader::with_capacity(64 * 1024, stream))
    }

    fn connect(&self, url: &Url) -> io::Result<Box<dyn Stream>> {
        let mut last = io::Error::other("the name has no address");
        for address in (url.host.as_str(), url.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    if !url.tls {
                        return Ok(Box::new(stream));
                    }
                    let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
                    let config = Arc::new(self.trust(url)?);
                    let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
                    return Ok(Box::new(StreamOwned::new(connection, stream)));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn trust(&self, url: &Url) -> io::Result<ClientConfig> {
        let mut files: Vec<PathBuf> =
            AUTHORITIES.iter().map(PathBuf::from).find(|path| path.exists()).into_iter().collect();
        for folder in OF_REGISTRIES {
            files.extend(certificates(&Path::new(folder).join(url.authority())));
        }
        files.extend(self.authorities.iter().cloned());
        let mut roots = RootCertStore::empty();
        for file in &files {
            let text =
                fs::read(file).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", file.display())))?;
            // An authority that the library does not take only makes fewer servers acceptable.
            roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&text).flatten());
        }
        if roots.is_empty() {
            return Err(io::Error::other(format!(
                "no certificates of authorities in {}",
                AUTHORITIES.join(", ")
            )));
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?;
        Ok(config.with_root_certificates(roots).with_no_client_auth())
    }
}

fn certificates(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let files = entries.flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "crt")).collect()
}

fn answer(mut stream: BufReader<Box<dyn Stream>>) -> io::Result<Answer> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let before = bytes.len();
        stream.by_ref().take((MOST_HEAD - before) as u64).read_until(b'\n', &mut bytes)?;
        if bytes.len() == before {
            return Err(wrong(format!("no whole head of an answer in {before} bytes")));
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    match parsed.parse(&bytes) {
        Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
        Ok(_) => return Err(wrong("no head of an answer".into())),
        Err(error) => return Err(wrong(format!("no answer of HTTP: {error}"))),
    }
    let headers = parsed
        .headers
        .iter()
        .map(|h| (h.name.to_owned(), String::from_utf8_lossy(h.value).into_owned()))
        .collect();
    let body = Body { stream, framing: Framing::End };
    let mut answer = Answer { status: parsed.code.unwrap_or_default(), headers, body };
    answer.body.framing = framing(&answer).map_err(wrong)?;
    Ok(answer)
}

/// How the body ends; the connection's end alone is none, because a cut would not be seen.
fn framing(answer: &Answer) -> Result<Framing, String> {
    let lengths: Vec<&str> = answer.headers("content-length").collect();
    let encodings: Vec<&str> = answer.headers("transfer-encoding").collect();
    match (lengths.as_slice(), encodings.as_slice()) {
        ([length], []) if length.bytes().all(|b| b.is_ascii_digit()) => {
            length.parse().map(Framing::Length).map_err(|_| format!("a length of {length:?}"))
        }
        ([], [encoding]) if encoding.eq_ignore_ascii_case("chunked") => Ok(Framing::Chunk(0)),
        ([], []) if matches!(answer.status, 204 | 300..=399) => Ok(Framing::End),
        _ => Err("the answer does not say once how long it is".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_are_taken_apart_and_put_together() {
        let url = Url::parse("https://R.example:8443/v2/a?b=c#d").unwrap();
        assert_eq!(
            (url.tls, url.authority().as_str(), url.path.as_str()),
            (true, "r.example:8443", "/v2/a?b=c")
        );
        assert_eq!(url.join("/x?y").unwrap().path, "/x?y");
        assert_eq!(url.join("//other/x").unwrap().authority(), "other");
        assert!(!url.is_same_server(&url.join("https://r.example/x").unwrap()));
        assert!(url.is_same_server(&url.join("/x").unwrap()));
        assert_eq!(Url::parse("http://[::1]:5000?x").unwrap().path, "/?x");
        for bad in [
            "a",
            "ftp://a/",
            "http:///x",
            "http://u@h/",
            "http://h:x/",
            "http://h/a b",
            "http://h/\r\n",
            "http://[a]/",
        ] {
            assert!(Url::parse(bad).is_none(), "{bad}");
        }
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let stream: Box<dyn Stream> = Box::new(io::Cursor::new(bytes.to_vec()));
        answer(BufReader::new(stream))?.whole(100)
    }

    const PLAIN: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    const CHUNKED: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x\r\nlo\r\n0\r\n\r\n";

    #[test]
    fn bodies_end_where_they_said() {
        assert_eq!((read(PLAIN).unwrap(), read(CHUNKED).unwrap()), (b"hello".to_vec(), b"hello".to_vec()));
        for (bytes, words) in [
            ("HTTP/1.1 200 OK\r\n\r\nhello", "does not say once"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nhello", "does not say once"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n", "101 bytes early"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", "without a length"),
            ("SSH-2.0\r\n\r\n", "no answer of HTTP"),
        ] {
            let said = read(bytes.as_bytes()).unwrap_err().to_string();
            assert!(said.contains(words), "{bytes}: {said}");
        }
        let long = format!("HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n{}", "a".repeat(101));
        assert!(read(long.as_bytes()).unwrap_err().to_string().contains("more than 100"));
    }

    proptest! {
        #[test]
        fn a_cut_anywhere_is_an_error(chunked: bool, place: prop::sample::Index) {
            let whole = if chunked { CHUNKED } else { PLAIN };
            let cut = place.index(whole.len());
            // What comes behind the last chunk's length is nobody's.
            let done = chunked && cut >= whole.len() - 2;
            prop_assert_eq!(read(&whole[..cut]).is_ok(), done);
        }

        #[test]
        fn any_bytes_are_an_answer_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
            let _ = read(&[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice(), &bytes].concat());
        }
    }
}
