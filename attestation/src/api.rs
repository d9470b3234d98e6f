//! The workload's view: upstream's REST calls on `127.0.0.1:8006` in the pod.
//!
//! Owns: paths, status codes, how many callers at once. Does not own: the process that it runs in.
//!
//! Source: guest-components `api-server-rest`.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{encoding::from_base64url, guest::Guest, kbs::ResourceUri};

/// Where it is.
pub const ADDRESS: &str = "127.0.0.1:8006";
/// Longest request, in bytes.
const MOST: usize = 16 * 1024;
/// A caller that has not said what it wants is not waited for longer: it has the place of another.
const PATIENCE: Duration = Duration::from_secs(10);

/// Status and body.
type Answer = (u16, Vec<u8>);

fn says(status: u16, text: impl Into<String>) -> Answer {
    (status, text.into().into_bytes())
}

/// Callers that are listened to at once. One more is served before the next is accepted.
const MOST_CALLERS: usize = 16;

/// Serves until the listener fails. A caller that says nothing, or waits for a KBS, keeps no other from `/info`; what needs the KBS
/// goes one after the other.
pub fn serve(listener: &TcpListener, guest: &Mutex<Guest>) {
    let tee = hold(guest).tee();
    let call = |mut stream: TcpStream, peer: SocketAddr| {
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let _ = stream.set_write_timeout(Some(PATIENCE));
        let answers = |method: &str, target: &str| match (method, target.split('?').next()) {
            ("GET", Some("/info")) => info(tee),
            _ => answer(method, target, &mut hold(guest)),
        };
        // A caller that breaks off hurts itself only.
        let _ = respond(&mut stream, peer, answers);
    };
    let callers = AtomicUsize::new(0);
    thread::scope(|scope| {
        while let Ok((stream, peer)) = listener.accept() {
            if callers.load(Ordering::Relaxed) >= MOST_CALLERS {
                call(stream, peer);
                continue;
            }
            callers.fetch_add(1, Ordering::Relaxed);
            let (call, callers) = (&call, &callers);
            scope.spawn(move || {
                call(stream, peer);
                callers.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
}

/// A call that panicked has ended its process, or a test.
fn hold(guest: &Mutex<Guest>) -> MutexGuard<'_, Guest> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers the one call that a connection is for.
///
/// # Errors
/// The connection's.
pub fn one(stream: &mut (impl Read + Write), peer: SocketAddr, guest: &mut Guest) -> io::Result<()> {
    respond(stream, peer, |method, target| answer(method, target, guest))
}

fn respond(
    stream: &mut (impl Read + Write),
    peer: SocketAddr,
    answers: impl FnOnce(&str, &str) -> Answer,
) -> io::Result<()> {
    let (mut bytes, began) = (Vec::new(), Instant::now());
    let mut buffer = [0; 4096];
    let (method, target) = loop {
        match request(&bytes) {
            Ok(Some(found)) => break found,
            Ok(None) if bytes.len() < MOST && began.elapsed() < PATIENCE => match stream.read(&mut buffer)? {
                0 => return Ok(()),
                count => bytes.extend_from_slice(&buffer[..count]),
            },
            _ => return write(stream, &says(400, "not a request")),
        }
    };
    let answer = if peer.ip().is_loopback() {
        answers(&method, &target)
    } else {
        says(403, "only from the pod itself")
    };
    write(stream, &answer)
}

/// Method and target, once the head is whole. Bodies are not looked at: no call here has one.
fn request(bytes: &[u8]) -> Result<Option<(String, String)>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    Ok(match request.parse(bytes)? {
        httparse::Status::Partial => None,
        httparse::Status::Complete(_) => {
            Some((request.method.unwrap_or_default().into(), request.path.unwrap_or_default().into()))
        }
    })
}

fn write(stream: &mut impl Write, (status, body): &Answer) -> io::Result<()> {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Internal Server Error",
    };
    let head =
        format!("HTTP/1.1 {status} {reason}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), body].concat())
}

fn info(tee: &str) -> Answer {
    let info = json!({ "version": env!("CARGO_PKG_VERSION"), "tee": tee, "additional_tees": [] });
    says(200, info.to_string())
}

/// Answers one call.
pub fn answer(method: &str, target: &str, guest: &mut Guest) -> Answer {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let attestation = guest.config().coffer.attestation_api;
    let known = path == "/info"
        || path.starts_with("/cdh/resource/")
        || attestation && matches!(path, "/aa/token" | "/aa/evidence");
    if !known {
        return says(404, "no such call");
    }
    if method != "GET" {
        return says(405, "only GET");
    }
    if let Some(resource) = path.strip_prefix("/cdh/resource/") {
        return match ResourceUri::from_path(resource).map(|uri| guest.fetch(&uri)) {
            Ok(Ok(secret)) => (200, secret.to_vec()),
            Ok(Err(error)) => says(500, error.to_string()),
            Err(error) => says(400, error.to_string()),
        };
    }
    match path {
        "/info" => info(guest.tee()),
        "/aa/token" if parameter(query, "token_type").as_deref() == Some("kbs") => match guest.token() {
            Ok((token, pem)) => says(200, json!({ "token": token, "tee_keypair": pem.as_str() }).to_string()),
            Err(error) => says(500, error.to_string()),
        },
        "/aa/evidence" => match runtime_data(query) {
            Some(data) => match guest.evidence(&data) {
                Ok(evidence) => says(200, evidence.to_string()),
                Err(error) => says(500, error.to_string()),
            },
            None => says(
                400,
                "runtime_data: at most 64 bytes of text, or with encoding=base64 of URL-safe Base64",
            ),
        },
        _ => says(400, "token_type must be kbs"),
    }
}

/// The last parameter of a name, as upstream's map of them has it.
fn parameter(query: &str, name: &str) -> Option<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.rfind(|(n, _)| decoded(n) == name).map(|(_, value)| decoded(value))
}

/// A name or value of a form (`application/x-www-form-urlencoded`): a `%` that no two digits follow stands for itself, and bytes
/// that are no text become U+FFFD.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let escape = match (first, after) {
            (b'%', [a, b, ..]) => char::from(*a).to_digit(16).zip(char::from(*b).to_digit(16)),
            _ => None,
        };
        let (byte, left) = match escape {
            Some((a, b)) => ((a << 4 | b) as u8, &after[2..]),
            None if *first == b'+' => (b' ', after),
            None => (*first, after),
        };
        bytes.push(byte);
        rest = left;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn runtime_data(query: &str) -> Option<Vec<u8>> {
    let text = parameter(query, "runtime_data")?;
    let data = match parameter(query, "encoding").as_deref() {
        None => text.into_bytes(),
        Some("base64") => from_base64url(&text).ok()?,
        Some(_) => return None,
    };
    (data.len() <= 64).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Attesters, Sample};
    use proptest::prelude::*;

    fn guest(attestation: bool) -> Guest {
        let raw = format!(
            "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"coffer.toml\" = \"attestation_api = {attestation}\"\n"
        );
        Guest::new(Some(raw.as_bytes()), Attesters::of(Sample)).unwrap()
    }

    #[test]
    fn status_codes_are_upstreams() {
        let status = |method: &str, target: &str, on: bool| answer(method, target, &mut guest(on)).0;
        assert_eq!(status("GET", "/info", false), 200);
        assert_eq!(status("POST", "/info", false), 405);
        assert_eq!(status("GET", "/nothing", false), 404);
        assert_eq!(
            status("GET", "/aa/evidence?runtime_data=a", false),
            404,
            "off unless initdata turns it on"
        );
        assert_eq!(status("GET", "/aa/token?token_type=kbs", false), 404);
        assert_eq!(status("GET", "/aa/evidence?runtime_data=a", true), 200);
        assert_eq!(status("GET", "/aa/evidence", true), 400);
        assert_eq!(status("GET", "/aa/token?token_type=other", true), 400);
        assert_eq!(status("GET", "/cdh/resource/a/b", false), 400);
        assert_eq!(status("GET", "/cdh/resource/a/b/c", false), 500, "no KBS");
    }

    #[test]
    fn evidence_carries_the_workloads_data() {
        let (_, body) = answer("GET", "/aa/evidence?encoding=base64&runtime_data=AAEC", &mut guest(true));
        let evidence: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(evidence["report_data"], crate::encoding::to_base64(&[0, 1, 2]));
    }

    /// What curl's `--data-urlencode` and a browser's form send; what is not of the form stays as it is, and the last of a name counts, as upstream.
    #[test]
    fn queries_are_decoded_as_forms_are() {
        let carried = |query: &str| {
            let (status, body) = answer("GET", &format!("/aa/evidence?{query}"), &mut guest(true));
            assert_eq!(status, 200, "{query}");
            let evidence: serde_json::Value = serde_json::from_slice(&body).unwrap();
            crate::encoding::from_base64(evidence["report_data"].as_str().unwrap()).unwrap()
        };
        for (query, wanted) in [
            ("runtime_data=a%2Fb%3D", "a/b="),
            ("runtime_data=a+b%2B%20c", "a b+ c"),
            ("runtime%5Fdata=%c3%A9", "é"),
            ("runtime_data=100%", "100%"),
            ("runtime_data=%zz%4%41%4", "%zz%4A%4"),
            ("runtime_data=%ff", "\u{fffd}"),
            ("runtime_data=a=b", "a=b"),
            ("runtime_data", ""),
            ("&runtime_data=first&&runtime_data=last&", "last"),
            ("encoding=base6%34&runtime_data=YS%39i", "a/b"),
        ] {
            assert_eq!(carried(query), wanted.as_bytes(), "{query}");
        }
        let token = answer("GET", "/aa/token?token%5ftype=k%62s", &mut guest(true));
        assert_eq!(token.0, 500, "no KBS, and the parameter is understood");
    }

    #[test]
    fn only_the_pod_itself_is_answered() {
        struct Both(io::Cursor<Vec<u8>>, Vec<u8>);
        impl Read for Both {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0.read(buffer)
            }
        }
        impl Write for Both {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.1.write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for (peer, status) in [("127.0.0.1:9", "200"), ("10.0.0.1:9", "403")] {
            let mut stream = Both(io::Cursor::new(b"GET /info HTTP/1.1\r\n\r\n".to_vec()), Vec::new());
            one(&mut stream, peer.parse().unwrap(), &mut guest(false)).unwrap();
            assert!(String::from_utf8(stream.1).unwrap().contains(status));
        }
    }

    /// Callers that say nothing, as many as are listened to and while somebody waits for the KBS: `/info` comes at once.
    #[test]
    fn an_idle_caller_and_a_slow_kbs_hold_nobody_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let guest: &'static Mutex<Guest> = Box::leak(Box::new(Mutex::new(guest(false))));
        thread::spawn(move || serve(&listener, guest));
        let get = |target: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            write!(stream, "GET {target} HTTP/1.1\r\n\r\n").unwrap();
            stream
        };
        let read = |mut stream: TcpStream| {
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        };
        assert!(read(get("/info")).unwrap().contains("\"tee\":\"sample\""));
        // As a request does that is with the KBS.
        let busy = hold(guest);
        let idle = TcpStream::connect(address).unwrap();
        let waiting = get("/cdh/resource/a/b/c");
        assert!(read(get("/info")).unwrap().starts_with("HTTP/1.1 200 "));
        drop(busy);
        assert!(read(waiting).unwrap().contains("no KBS"));
        drop(idle);
    }

    proptest! {
        #[test]
        fn any_target_is_answered(target in "/[ -~]{0,60}") {
            let (status, _) = answer("GET", &target, &mut guest(true));
            prop_assert!([200, 400, 404, 500].contains(&status));
        }
    }
}
