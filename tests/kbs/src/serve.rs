//! HTTP/1.1 around the answers: one thread for each connection, with TLS or without.
//!
//! Owns: sockets, limits. Does not own: what is answered.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use coffer_attestation::kbs::COOKIE;
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

use crate::{
    answer::{Answer, Query},
    session::Kbs,
};

/// Trustee's limit on a body is 2 MB.
const MOST: usize = 2 * 1024 * 1024 + 16 * 1024;
const PATIENCE: Duration = Duration::from_secs(120);

/// Certificate and key of a server.
pub struct Identity {
    /// To put into initdata.
    pub certificate_pem: String,
    config: Arc<ServerConfig>,
}

impl Identity {
    /// A new self-signed certificate for these names and addresses.
    ///
    /// # Errors
    /// The library's.
    pub fn self_signed(names: Vec<String>) -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed(names)?;
        let certificate = CertificateDer::from(made.cert.der().to_vec());
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        Ok(Self { certificate_pem: made.cert.pem(), config: Arc::new(config) })
    }
}

/// A server at work; it ends when this is dropped.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Waits for ever.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts to serve.
///
/// # Errors
/// The system's.
pub fn serve(kbs: Arc<Kbs>, listener: TcpListener, identity: Option<&Identity>) -> io::Result<Running> {
    serve_by(move |query| kbs.answer(query), listener, identity)
}

/// The same with any answers: a KBS with a host before it, say.
///
/// # Errors
/// The system's.
pub fn serve_by(
    answers: impl Fn(&Query) -> Answer + Send + Sync + 'static,
    listener: TcpListener,
    identity: Option<&Identity>,
) -> io::Result<Running> {
    let answers = Arc::new(answers);
    let address = listener.local_addr()?;
    let end = Arc::new(AtomicBool::new(false));
    let (config, ended) = (identity.map(|i| i.config.clone()), end.clone());
    let thread = thread::spawn(move || {
        for stream in listener.incoming() {
            if ended.load(Ordering::Relaxed) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let (answers, config) = (answers.clone(), config.clone());
            thread::spawn(move || {
                let _ = stream.set_read_timeout(Some(PATIENCE));
                let _ = match config {
                    None => connection(&*answers, stream),
                    Some(config) => match ServerConnection::new(config) {
                        Ok(tls) => connection(&*answers, StreamOwned::new(tls, stream)),
                        Err(_) => Ok(()),
                    },
                };
            });
        }
    });
    Ok(Running { address, end, thread: Some(thread) })
}

/// Requests one after the other, until the client closes.
fn connection(answers: &impl Fn(&Query) -> Answer, mut stream: impl Read + Write) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        let query = loop {
            match parse(&bytes)? {
                Some((query, used)) => {
                    bytes.drain(..used);
                    break query;
                }
                None => {
                    let count = stream.read(&mut buffer)?;
                    if count == 0 || bytes.len() > MOST {
                        return Ok(());
                    }
                    bytes.extend_from_slice(&buffer[..count]);
                }
            }
        };
        stream.write_all(&write(&answers(&query)))?;
        stream.flush()?;
    }
}

fn parse(bytes: &[u8]) -> io::Result<Option<(Query, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(bytes).map_err(io::Error::other)? {
        httparse::Status::Complete(head) => head,
        httparse::Status::Partial => return Ok(None),
    };
    let mut query = Query {
        method: request.method.unwrap_or_default().into(),
        path: request.path.unwrap_or_default().split('?').next().unwrap_or_default().into(),
        ..Query::default()
    };
    let mut length = 0usize;
    for header in request.headers.iter() {
        let value = String::from_utf8_lossy(header.value);
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().map_err(io::Error::other)?,
            "cookie" => {
                let pair = value.split(';').filter_map(|c| c.trim().split_once('='));
                query.cookie = pair.into_iter().find(|(n, _)| *n == COOKIE).map(|(_, v)| v.to_owned());
            }
            "authorization" => query.bearer = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    let Some(body) = head.checked_add(length).and_then(|end| bytes.get(head..end)) else { return Ok(None) };
    query.body = body.to_vec();
    Ok(Some((query, head + length)))
}

fn write(answer: &Answer) -> Vec<u8> {
    let reason = match answer.status {
        200 => "OK",
        404 => "Not Found",
        _ => "Unauthorized",
    };
    let mut head =
        format!("HTTP/1.1 {} {reason}\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
    if answer.status == 200 {
        head += "Content-Type: application/json\r\n";
    }
    if let Some(cookie) = &answer.cookie {
        head += &format!("Set-Cookie: {COOKIE}={cookie}\r\n");
    }
    head += "\r\n";
    [head.as_bytes(), &answer.body].concat()
}
