//! The blocking driver: carries a client's requests over a stream, with a limit on time.
//!
//! Owns: URLs, one kept connection, the loop around the state machine. Does not own: how a stream is made (`Connect`), so
//! that a test can be one, or TLS's decisions (`tls`).

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use thiserror::Error;

use super::{
    Client, ClientError, HttpError, Request, Response, ResponseReader, Step, client::Outcome, resolve::lookup,
};
use crate::evidence::Attesters;

/// No single wait for the server is longer, and no answer takes longer from its request to its end, as upstream's client.
const PATIENCE: Duration = Duration::from_secs(60);
/// Steps of one run. The client ends by itself long before; a mistake in it must not hold PID 1 for ever.
const MOST_STEPS: u32 = 128;

/// Why nothing came back.
#[derive(Debug, Error)]
pub enum TransportError {
    /// Not a URL of a KBS.
    #[error("KBS URL {0:?}: not http://host[:port] or https://host[:port]")]
    Url(String),
    /// Not reached.
    #[error("{address}: {source}")]
    Connect {
        /// Host and port.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Broke off.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// Not HTTP.
    #[error(transparent)]
    Http(#[from] HttpError),
}

/// Where a KBS is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// `https`.
    pub tls: bool,
    /// Name or address.
    pub host: String,
    /// Given, or the scheme's.
    pub port: u16,
    /// Path before the protocol's own, without a `/` at its end.
    pub prefix: String,
    /// Who knows the name's addresses; nobody: the system does.
    pub name_servers: Vec<IpAddr>,
}

impl Url {
    /// Takes a base URL apart.
    ///
    /// # Errors
    /// [`TransportError::Url`].
    pub fn parse(url: &str) -> Result<Self, TransportError> {
        let wrong = || TransportError::Url(url.chars().take(200).collect());
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let tls = match scheme {
            "https" => true,
            "http" => false,
            _ => return Err(wrong()),
        };
        let (authority, prefix) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => {
                let (host, after) = v6.split_once(']').ok_or_else(wrong)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?;
                (host, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or_else(wrong)?)
            }
            None => authority.split_once(':').unwrap_or((authority, "")),
        };
        let port = match port {
            "" if tls => 443,
            "" => 80,
            text => text.parse().map_err(|_| wrong())?,
        };
        let named = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        let pathed = |c: char| c.is_ascii_alphanumeric() || "-._~/".contains(c);
        if host.is_empty() || !host.chars().all(named) || !prefix.chars().all(pathed) {
            return Err(wrong());
        }
        let prefix = prefix.trim_end_matches('/').into();
        Ok(Self { tls, host: host.into(), port, prefix, name_servers: Vec::new() })
    }

    /// As `Host:` has it.
    #[must_use]
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{host}:{}", self.port)
    }

    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let host = self.host.as_str();
        if self.name_servers.is_empty() || host.parse::<IpAddr>().is_ok() {
            return Ok((host, self.port).to_socket_addrs()?.collect());
        }
        let found = lookup(host, &self.name_servers)?;
        Ok(found.into_iter().map(|address| SocketAddr::new(address, self.port)).collect())
    }
}

/// A connection: plain or under TLS, a test's or a socket.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// Makes connections to the KBS.
pub trait Connect: Send {
    /// One more.
    ///
    /// # Errors
    /// The system's.
    fn connect(&mut self, url: &Url) -> io::Result<Box<dyn Stream>>;
}

/// TCP from here.
#[derive(Clone, Copy, Debug)]
pub struct Tcp;

impl Connect for Tcp {
    fn connect(&mut self, url: &Url) -> io::Result<Box<dyn Stream>> {
        tcp(url).map(|stream| Box::new(stream) as Box<dyn Stream>)
    }
}

/// A TCP connection with limits on every wait.
pub(super) fn tcp(url: &Url) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in url.addresses()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Carries requests.
pub struct Transport {
    url: Url,
    connect: Box<dyn Connect>,
    kept: Option<Box<dyn Stream>>,
}

impl Transport {
    /// To this KBS.
    #[must_use]
    pub fn new(url: Url, connect: Box<dyn Connect>) -> Self {
        Self { url, connect, kept: None }
    }

    /// Over plain TCP.
    #[must_use]
    pub fn plain(url: Url) -> Self {
        Self::new(url, Box::new(Tcp))
    }

    /// Asks these for addresses of the KBS's name.
    pub fn ask_for_names(&mut self, servers: &[IpAddr]) {
        self.url.name_servers = servers.to_vec();
    }

    /// One request, one answer. A kept connection that the server has closed meanwhile is made anew, once.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn exchange(&mut self, request: &Request) -> Result<Response, TransportError> {
        let bytes = request.encode(&self.url.authority(), &self.url.prefix);
        if let Some(mut stream) = self.kept.take()
            && let Ok(response) = carry(stream.as_mut(), &bytes, PATIENCE)
        {
            self.keep(stream, &response);
            return Ok(response);
        }
        let mut stream = self
            .connect
            .connect(&self.url)
            .map_err(|source| TransportError::Connect { address: self.url.authority(), source })?;
        let response = carry(stream.as_mut(), &bytes, PATIENCE)?;
        self.keep(stream, &response);
        Ok(response)
    }

    fn keep(&mut self, stream: Box<dyn Stream>, response: &Response) {
        let closes = response.headers("connection").any(|v| v.eq_ignore_ascii_case("close"));
        self.kept = (!closes).then_some(stream);
    }

    /// Drives a client to its end.
    ///
    /// # Errors
    /// The client's.
    pub fn run(&mut self, client: &mut Client, attesters: &mut Attesters) -> Result<Outcome, ClientError> {
        self.run_pausing(client, attesters, std::thread::sleep)
    }

    /// The same, where `pause` is what is done between attempts: a test has no time to wait.
    ///
    /// # Errors
    /// The client's.
    pub fn run_pausing(
        &mut self,
        client: &mut Client,
        attesters: &mut Attesters,
        mut pause: impl FnMut(Duration),
    ) -> Result<Outcome, ClientError> {
        for _ in 0..MOST_STEPS {
            match client.step() {
                Step::Send(request) => match self.exchange(&request) {
                    Ok(response) => client.received(&response),
                    Err(error) => {
                        self.kept = None;
                        client.failed(&error.to_string());
                    }
                },
                Step::Measure(nonce, algorithm) => {
                    let evidence = attesters.collect(algorithm, &nonce, &client.key().public());
                    client.measured(evidence.map_err(|e| e.to_string()));
                }
                Step::Wait(time) => pause(time),
                Step::Finished(result) => return result,
            }
        }
        let message = format!("no end after {MOST_STEPS} steps");
        Err(ClientError::Transport { stage: "conversation", message })
    }
}

/// One exchange. A server that sends a byte now and then is not read for longer than `patience` either.
fn carry(stream: &mut dyn Stream, request: &[u8], patience: Duration) -> Result<Response, TransportError> {
    let began = Instant::now();
    stream.write_all(request)?;
    stream.flush()?;
    let mut reader = ResponseReader::default();
    let mut buffer = [0; 16 * 1024];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some(response) = reader.push(&buffer[..count])? {
            return Ok(response);
        }
        if began.elapsed() > patience {
            let message = format!("the answer was not whole after {} s", patience.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, message).into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_are_taken_apart() {
        let url = Url::parse("https://kbs.example:8443/base/").unwrap();
        assert_eq!(
            (url.tls, url.host.as_str(), url.port, url.prefix.as_str()),
            (true, "kbs.example", 8443, "/base")
        );
        assert_eq!(Url::parse("http://[fd00::1]:81").unwrap().authority(), "[fd00::1]:81");
        assert_eq!(Url::parse("http://10.0.0.1").unwrap().port, 80);
        for wrong in [
            "kbs",
            "ftp://a",
            "http://",
            "http://a b",
            "http://a:b",
            "http://u@h",
            "http://[a]",
            "http://a/\r\n",
        ] {
            assert!(Url::parse(wrong).is_err(), "{wrong}");
        }
    }

    /// A server that says this and then a byte every other millisecond, and never the last.
    struct Dribble(&'static [u8]);

    impl Read for Dribble {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let head = std::mem::take(&mut self.0);
            if head.is_empty() {
                std::thread::sleep(Duration::from_millis(2));
                buffer[0] = b'x';
                return Ok(1);
            }
            buffer[..head.len()].copy_from_slice(head);
            Ok(head.len())
        }
    }

    impl Write for Dribble {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_answer_that_never_ends_is_not_read_for_ever() {
        let began = Instant::now();
        let mut server = Dribble(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n");
        let error = carry(&mut server, b"GET", Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("was not whole"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    proptest! {
        #[test]
        fn any_text_is_a_url_or_an_error(text in "(https?://)?[ -~]{0,40}") {
            let _ = Url::parse(&text);
        }
    }
}
