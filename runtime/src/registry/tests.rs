//! A client against servers that redirect, break off, want tokens, and lie. That it reads what skopeo pushed is `tests/steps/60-registry`'s.

use std::{
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::json;

use super::*;

/// A request: its path, and headers as they came.
#[derive(Clone, Debug)]
struct Asked {
    path: String,
    head: String,
}

type Answers = dyn Fn(&Asked) -> Vec<u8> + Send + Sync;

/// A server for as long as the test's process lives: its address, and what it was asked.
fn serve(answers: impl Fn(&Asked) -> Vec<u8> + Send + Sync + 'static) -> (String, Arc<Mutex<Vec<Asked>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let log = Arc::new(Mutex::new(Vec::new()));
    let (asked, answers): (_, Arc<Answers>) = (log.clone(), Arc::new(answers));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (asked, answers) = (asked.clone(), answers.clone());
            thread::spawn(move || one(stream, &asked, &*answers));
        }
    });
    (address, log)
}

fn one(mut stream: TcpStream, log: &Mutex<Vec<Asked>>, answers: &Answers) {
    let mut head = String::new();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let asked = Asked { path, head };
    log.lock().unwrap().push(asked.clone());
    let _ = stream.write_all(&answers(&asked));
}

fn with(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// An image of one layer of 100 000 bytes, and its manifest's digest.
struct Sample {
    manifest: Vec<u8>,
    config: Vec<u8>,
    layer: Vec<u8>,
    digest: Digest,
}

fn sample() -> Arc<Sample> {
    let layer: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(n) % 251) as u8).collect();
    let config = b"{}".to_vec();
    let describe = |kind: &str, bytes: &[u8]| json!({"mediaType": kind, "digest": Digest::sha256(bytes), "size": bytes.len()});
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": describe("application/vnd.oci.image.config.v1+json", &config),
        "layers": [describe("application/vnd.oci.image.layer.v1.tar", &layer)]});
    let manifest = manifest.to_string().into_bytes();
    let digest = Digest::sha256(&manifest);
    Arc::new(Sample { manifest, config, layer, digest })
}

impl Sample {
    /// What an honest registry answers; a range of a blob too.
    fn answer(&self, asked: &Asked) -> Vec<u8> {
        let kind = format!("Content-Type: {MANIFEST}; charset=utf-8\r\n");
        if asked.path.starts_with("/v2/team/app/manifests/") {
            return with("200 OK", &kind, &self.manifest);
        }
        for bytes in [&self.config, &self.layer] {
            if asked.path.ends_with(&Digest::sha256(bytes).to_string()) {
                let from =
                    asked.head.lines().find_map(|line| line.strip_prefix("Range: bytes=")?.strip_suffix('-'));
                return match from {
                    None => with("200 OK", "", bytes),
                    Some(from) => {
                        let at: usize = from.parse().unwrap();
                        let range =
                            format!("Content-Range: bytes {at}-{}/{}\r\n", bytes.len() - 1, bytes.len());
                        with("206 Partial Content", &range, &bytes[at..])
                    }
                };
            }
        }
        with("404 Not Found", "", br#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#)
    }

    fn is_layer(&self, asked: &Asked) -> bool {
        asked.path.ends_with(&Digest::sha256(&self.layer).to_string())
    }
}

fn fetch(
    address: &str,
    reference: &str,
    options: &Options,
) -> Result<(tempfile::TempDir, Descriptor), RegistryError> {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::create(dir.path()).unwrap();
    let name: Name = format!("{address}/team/app{reference}").parse().unwrap();
    // None of this machine's own.
    let nobody = dir.path().join("auth.json");
    std::fs::write(&nobody, "{}").unwrap();
    let credentials = options.credentials.clone().or(Some(nobody));
    let found = pull(&name, &layout, &Options { credentials, ..options.clone() }, &AtomicU64::new(0))?;
    Ok((dir, found))
}

fn refused(address: &str, reference: &str) -> String {
    let error = fetch(address, reference, &Options::default()).expect_err(reference).to_string();
    assert!(!error.contains('\n'));
    error
}

#[test]
fn an_image_arrives_whole() {
    let image = sample();
    let served = image.clone();
    let (address, log) = serve(move |asked| served.answer(asked));
    for reference in [":1".to_owned(), format!("@{}", image.digest)] {
        let (dir, found) = fetch(&address, &reference, &Options::default()).unwrap();
        assert_eq!((found.digest, found.media_type.as_str()), (image.digest.clone(), MANIFEST));
        let layer = dir.path().join("blobs/sha256").join(Digest::sha256(&image.layer).hex());
        assert_eq!(std::fs::read(layer).unwrap(), image.layer);
        // Nothing half done is left, and what is there is not asked for again.
        assert_eq!(std::fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count(), 3);
        let before = log.lock().unwrap().len();
        let name: Name = format!("{address}/team/app{reference}").parse().unwrap();
        let options = Options { credentials: Some(dir.path().join("auth.json")), ..Options::default() };
        pull(&name, &Layout::open(dir.path()).unwrap(), &options, &AtomicU64::new(0)).unwrap();
        assert_eq!(log.lock().unwrap().len(), before + 1);
    }
    let said = refused(&address, &format!("@{}", Digest::sha256(b"other")));
    assert!(said.contains("the registry or somebody before it changed it"), "{said}");
}

#[test]
fn what_breaks_off_is_gone_on_with() {
    for ranges in [true, false] {
        let image = sample();
        let served = image.clone();
        let (address, log) = serve(move |asked| {
            let mut asked = asked.clone();
            if !ranges {
                asked.head = asked.head.replace("Range: ", "X: ");
            }
            let mut answer = served.answer(&asked);
            if served.is_layer(&asked)
                && !asked.head.contains("ange: bytes")
                && !asked.head.contains("X: bytes")
            {
                answer.truncate(60_000);
            }
            answer
        });
        fetch(&address, ":1", &Options::default()).unwrap();
        let parts = log.lock().unwrap().iter().filter(|asked| image.is_layer(asked)).count();
        assert_eq!(parts, 2);
    }
    let image = sample();
    let served = image.clone();
    let (address, log) = serve(move |asked| {
        let mut answer = served.answer(asked);
        if served.is_layer(asked) {
            let head = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
            answer.truncate(head + 10);
        }
        answer
    });
    let said = refused(&address, ":1");
    assert!(said.contains("bytes early"), "{said}");
    assert_eq!(log.lock().unwrap().iter().filter(|asked| image.is_layer(asked)).count(), MOST_ATTEMPTS);
}

#[test]
fn a_blob_that_is_another_is_refused() {
    for (change, words) in [(1u8, "what came is sha256:"), (2, "not 100000 bytes long"), (3, "bytes early")] {
        let image = sample();
        let (address, _) = serve(move |asked| {
            if !image.is_layer(asked) {
                return image.answer(asked);
            }
            let mut layer = image.layer.clone();
            match change {
                1 => layer[70_000] ^= 1,
                2 => layer.push(0),
                _ => return b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n".to_vec(),
            }
            with("200 OK", "", &layer)
        });
        let said = refused(&address, ":1");
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_token_is_fetched_with_the_password_and_goes_to_nobody_else() {
    let image = sample();
    let stored = image.clone();
    let (store, elsewhere) = serve(move |asked| stored.answer(asked));
    let (tokens, issued) = serve(|asked| {
        let good = asked.head.contains("Authorization: Basic dXNlcjpwYXNz\r\n");
        if good { with("200 OK", "", br#"{"token":"t0k"}"#) } else { with("401 Unauthorized", "", b"") }
    });
    let served = image.clone();
    let (address, log) = serve(move |asked| {
        if !asked.head.contains("Authorization: Bearer t0k\r\n") {
            let challenge = format!(
                "WWW-Authenticate: Bearer realm=\"http://{tokens}/token\",service=\"a b\",scope=\"repository:team/app:pull\"\r\n"
            );
            return with("401 Unauthorized", &challenge, b"");
        }
        if served.is_layer(asked) {
            return with(
                "307 Temporary Redirect",
                &format!("Location: http://{store}{}\r\n", asked.path),
                b"",
            );
        }
        served.answer(asked)
    });
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auth.json");
    let mut auths = serde_json::Map::new();
    auths.insert(address.clone(), json!({"auth": "dXNlcjpwYXNz"}));
    std::fs::write(&file, json!({ "auths": auths }).to_string()).unwrap();
    fetch(&address, ":1", &Options { credentials: Some(file), ..Options::default() }).unwrap();
    assert!(
        issued.lock().unwrap()[0]
            .path
            .starts_with("/token?service=a%20b&scope=repository%3Ateam%2Fapp%3Apull")
    );
    assert_eq!(issued.lock().unwrap().len(), 1);
    let elsewhere = elsewhere.lock().unwrap();
    assert!(elsewhere.len() == 1 && !elsewhere[0].head.contains("Authorization"), "{elsewhere:?}");
    // The password itself is not for the registry where tokens are.
    assert!(log.lock().unwrap().iter().all(|asked| !asked.head.contains("Basic")));
    let said = refused(&address, ":1");
    assert!(said.contains("401: no token: podman login"), "{said}");
}

#[test]
fn where_it_may_not_lead_it_is_not_followed() {
    for (location, words) in [
        ("http://192.0.2.1/blob", "without TLS: --plain-http allows it"),
        ("file:///etc/passwd", "it redirects to no URL"),
        ("/v2/team/app/manifests/1", "more than 5 redirects"),
    ] {
        let (address, _) = serve(move |_| with("302 Found", &format!("Location: {location}\r\n"), b""));
        let said = refused(&address, ":1");
        assert!(said.contains(words), "{said}");
    }
    let (address, _) = serve(|_| with("404 Not Found", "", br#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#));
    assert!(refused(&address, ":1").contains("404 MANIFEST_UNKNOWN: there is no such image"));
    let long = vec![b' '; MOST_DOCUMENT as usize + 1];
    let (address, _) = serve(move |_| with("200 OK", "", &long));
    assert!(refused(&address, ":1").contains("more than 4194304 bytes"));
}

#[test]
fn a_server_has_to_have_a_certificate_of_a_known_authority_for_its_name() {
    use rustls::{
        ServerConfig, ServerConnection, StreamOwned,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    };

    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let certificate = CertificateDer::from(made.cert.der().to_vec());
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut tls = StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream);
            let mut head = [0; 4096];
            if tls.read(&mut head).is_ok() {
                let _ = tls.write_all(&with("200 OK", "", b"hello"));
                let _ = tls.flush();
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let authority = dir.path().join("authority.pem");
    std::fs::write(&authority, made.cert.pem()).unwrap();
    let get = |host: &str, authorities: Vec<PathBuf>| {
        let url = Url::parse(&format!("https://{host}:{port}/")).unwrap();
        Http { authorities }.get(&url, &[]).and_then(|answer| answer.whole(10))
    };
    assert_eq!(get("localhost", vec![authority.clone()]).unwrap(), b"hello");
    for (host, authorities) in [("localhost", vec![]), ("127.0.0.1", vec![authority.clone()])] {
        let said = get(host, authorities).unwrap_err().to_string();
        assert!(said.contains("certificate"), "{host}: {said}");
    }
}
