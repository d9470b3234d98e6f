//! The blocking driver: carries a client's requests over a stream, with a limit on time.
//!
//! Owns: URLs, one kept connection, the loop around the state machine. Does not own: how a stream is made (`Connect`), so
//! that a test can be one, or TLS's decisions (`tls`).

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs},
    time::Duration,
};

use thiserror::Error;

use super::{
    Client, ClientError, Deadline, HttpError, Request, Response, ResponseReader, Step, client::Outcome,
    deadline::Timed, resolve::lookup,
};
use crate::evidence::Attesters;

/// No exchange takes longer, from looking up the server's name to the end of its answer, as upstream's client.
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

    fn addresses(&self, limit: Deadline) -> io::Result<Vec<SocketAddr>> {
        let host = self.host.as_str();
        if self.name_servers.is_empty() || host.parse::<IpAddr>().is_ok() {
            return Ok((host, self.port).to_socket_addrs()?.collect());
        }
        let found = lookup(host, &self.name_servers, limit)?;
        Ok(found.into_iter().map(|address| SocketAddr::new(address, self.port)).collect())
    }
}

/// A connection: plain or under TLS, a test's or a socket.
pub trait Stream: Read + Write + Send {
    /// Nothing is read or written after that.
    fn until(&mut self, limit: Deadline);
}

impl Stream for Timed {
    fn until(&mut self, limit: Deadline) {
        self.limit = limit;
    }
}

/// Makes connections to the KBS.
pub trait Connect: Send {
    /// One more, which is there and is used until then.
    ///
    /// # Errors
    /// The system's.
    fn connect(&mut self, url: &Url, limit: Deadline) -> io::Result<Box<dyn Stream>>;
}

/// TCP from here.
#[derive(Clone, Copy, Debug)]
pub struct Tcp;

impl Connect for Tcp {
    fn connect(&mut self, url: &Url, limit: Deadline) -> io::Result<Box<dyn Stream>> {
        tcp(url, limit).map(|stream| Box::new(stream) as Box<dyn Stream>)
    }
}

/// A TCP connection.
pub(super) fn tcp(url: &Url, limit: Deadline) -> io::Result<Timed> {
    reach(&url.addresses(limit)?, limit)
}

/// Connects to the first that answers. Each gets its share of what is left: one that is silent leaves time for the next.
fn reach(addresses: &[SocketAddr], limit: Deadline) -> io::Result<Timed> {
    let mut last = io::Error::other("the name has no address");
    for (address, others) in addresses.iter().zip((1..=addresses.len() as u32).rev()) {
        let share = limit.left()? / others;
        // Zero is not taken.
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(Timed::new(stream, limit));
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
    patience: Duration,
}

impl Transport {
    /// To this KBS.
    #[must_use]
    pub fn new(url: Url, connect: Box<dyn Connect>) -> Self {
        Self { url, connect, kept: None, patience: PATIENCE }
    }

    /// Over plain TCP.
    #[must_use]
    pub fn plain(url: Url) -> Self {
        Self::new(url, Box::new(Tcp))
    }

    /// The same with another limit on an exchange: a test has no minute.
    #[must_use]
    pub fn within(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Asks these for addresses of the KBS's name.
    pub fn ask_for_names(&mut self, servers: &[IpAddr]) {
        self.url.name_servers = servers.to_vec();
    }

    /// One request, one answer. A kept connection that the server has closed meanwhile is made anew, once. All of it has one limit.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn exchange(&mut self, request: &Request) -> Result<Response, TransportError> {
        let bytes = request.encode(&self.url.authority(), &self.url.prefix);
        let limit = Deadline::after(self.patience);
        if let Some(mut stream) = self.kept.take()
            && let Ok(response) = carry(stream.as_mut(), &bytes, limit)
        {
            self.keep(stream, &response);
            return Ok(response);
        }
        let mut stream = self
            .connect
            .connect(&self.url, limit)
            .map_err(|source| TransportError::Connect { address: self.url.authority(), source })?;
        let response = carry(stream.as_mut(), &bytes, limit)?;
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

/// One exchange on a connection. A server that sends a byte now and then is not read for longer either.
fn carry(stream: &mut dyn Stream, request: &[u8], limit: Deadline) -> Result<Response, TransportError> {
    stream.until(limit);
    stream.write_all(request)?;
    stream.flush()?;
    let mut reader = ResponseReader::default();
    let mut buffer = [0; 16 * 1024];
    loop {
        limit.left()?;
        let count = match stream.read(&mut buffer) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some(response) = reader.push(&buffer[..count])? {
            return Ok(response);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{net::TcpListener, os::fd::AsRawFd, thread, time::Instant};

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

    impl Stream for Dribble {
        fn until(&mut self, _: Deadline) {}
    }

    #[test]
    fn an_answer_that_never_ends_is_not_read_for_ever() {
        let began = Instant::now();
        let mut server = Dribble(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n");
        let limit = Deadline::after(Duration::from_millis(50));
        let error = carry(&mut server, b"GET", limit).unwrap_err();
        assert!(error.to_string().contains("longer than 0.05 s"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    /// A server whose connections go to `serves`.
    fn server(serves: impl Fn(TcpStream) + Send + 'static) -> Url {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = Url::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        thread::spawn(move || listener.incoming().flatten().for_each(serves));
        url
    }

    /// How long an exchange took that came to nothing within `patience`.
    fn fails(url: Url, request: &Request, patience: Duration) -> Duration {
        let began = Instant::now();
        let error = Transport::plain(url).within(patience).exchange(request).unwrap_err();
        assert!(error.to_string().contains("it took longer than "), "{error}");
        began.elapsed()
    }

    /// The last wait is not another whole limit.
    #[test]
    fn a_server_that_falls_silent_late_gets_no_second_limit() {
        let patience = Duration::from_secs(2);
        let url = server(move |mut stream| {
            thread::sleep(patience * 4 / 5);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            thread::sleep(patience * 4);
        });
        let took = fails(url, &Request::get("/".into()), patience);
        assert!(took < patience * 3 / 2, "{took:?}");
    }

    /// Each write is over soon, all of them are not.
    #[test]
    fn a_server_that_reads_slowly_gets_no_more_time() {
        let url = server(|mut stream| {
            let mut buffer = vec![0; 256 * 1024];
            while stream.read(&mut buffer).is_ok_and(|count| count > 0) {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let took = fails(url, &Request::post("/".into(), vec![0; 64 << 20]), Duration::from_millis(500));
        assert!(took < Duration::from_secs(2), "{took:?}");
    }

    #[test]
    fn an_address_that_is_silent_leaves_time_for_the_next() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = [silent.local_addr().unwrap(), good.local_addr().unwrap()];
        // Of connections that nobody accepts it keeps one; what comes after them is not answered.
        // SAFETY: has no memory.
        assert_eq!(unsafe { libc::listen(silent.as_raw_fd(), 0) }, 0);
        let short = Duration::from_millis(100);
        let _kept: Vec<_> =
            std::iter::from_fn(|| TcpStream::connect_timeout(&addresses[0], short).ok()).take(10).collect();
        let patience = Duration::from_secs(2);
        let began = Instant::now();
        let found = reach(&addresses, Deadline::after(patience)).unwrap();
        drop(found);
        assert!(began.elapsed() < patience, "{:?}", began.elapsed());
        let error = reach(&addresses[..1], Deadline::after(short)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    proptest! {
        #[test]
        fn any_text_is_a_url_or_an_error(text in "(https?://)?[ -~]{0,40}") {
            let _ = Url::parse(&text);
        }
    }
}
