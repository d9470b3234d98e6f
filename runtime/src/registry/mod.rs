//! Images from a registry (OCI distribution specification 1.1), into a layout.
//!
//! Owns: names to addresses, tokens, redirects, digests on arrival. A blob is asked for again from where it broke off. Does not own: who
//! may run an image, which is the guest's to decide: it checks every digest again.

mod auth;
mod http;

use std::{
    io::{self, Read, Write},
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use coffer_layers::{
    digest::Digest,
    layout::{BlobError, Layout, MOST_DOCUMENT},
    manifest::{Descriptor, Document, INDEX, MANIFEST, ManifestError},
    policy::Name,
};
use serde_json::Value;
use thiserror::Error;
use zeroize::Zeroizing;

use self::{
    auth::{Basic, Challenge, encoded, find, usual_file},
    http::{Answer, Body, Http, Url},
};

const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
const MOST_REDIRECTS: usize = 5;
/// Times that a blob is gone on with.
const MOST_ATTEMPTS: usize = 5;
/// Longest answer of a token server, in bytes.
const MOST_TOKEN: u64 = 64 * 1024;
/// Longest layer that is fetched, in bytes.
const MOST_BLOB: u64 = 1 << 40;

/// An image was not pulled. One line.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// A request came to nothing.
    #[error("registry: {url}: {why}")]
    Request {
        /// Where it went.
        url: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The connection failed.
    #[error("registry: {url}: {source}")]
    Connection {
        /// Where it went.
        url: String,
        /// How.
        source: io::Error,
    },
    /// A blob is not what its reference says.
    #[error("registry: {want}: what came is {got}: the registry or somebody before it changed it")]
    Digest {
        /// By its reference.
        want: Digest,
        /// Digest or length that came.
        got: String,
    },
    /// The file of credentials.
    #[error("registry: {0}: {1}")]
    Credentials(PathBuf, io::Error),
    /// A manifest.
    #[error("registry: {0}")]
    Manifest(#[from] ManifestError),
    /// The layout.
    #[error(transparent)]
    Layout(#[from] BlobError),
}

/// How registries are spoken with.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Without TLS, wherever they are. Those of this machine are without it anyway.
    pub plain_http: bool,
    /// In place of podman's own file.
    pub credentials: Option<PathBuf>,
    /// Further authorities (PEM) that certificates may come from.
    pub authorities: Vec<PathBuf>,
}

/// Fetches an image: what its name says, the manifest for this machine, and all blobs that the layout does not have. Counts
/// bytes as they come.
///
/// # Errors
/// [`RegistryError`].
pub fn pull(
    name: &Name,
    layout: &Layout,
    options: &Options,
    bytes: &AtomicU64,
) -> Result<Descriptor, RegistryError> {
    let mut client = Client::new(name, options)?;
    let top = client.document(name.digest(), name.tag(), None, layout)?;
    let manifest = match &top.1 {
        Document::Manifest(manifest) => manifest.clone(),
        Document::Index(index) => {
            let chosen = index.choose()?;
            match client.document(Some(&chosen.digest), None, Some(chosen), layout)?.1 {
                Document::Manifest(manifest) => manifest,
                Document::Index(_) => {
                    return Err(ManifestError::MediaType("an index within an index".into()).into());
                }
            }
        }
    };
    for blob in std::iter::once(&manifest.config).chain(&manifest.layers) {
        if layout.has_sized(&blob.digest, blob.size) {
            bytes.fetch_add(blob.size, Ordering::Relaxed);
        } else {
            client.blob(blob, layout, bytes)?;
        }
    }
    Ok(top.0)
}

/// One repository.
struct Client {
    http: Http,
    base: Url,
    repository: String,
    plain_http: bool,
    basic: Option<Basic>,
    /// What the registry asked for, once it has.
    authorization: Option<Zeroizing<String>>,
}

impl Client {
    fn new(name: &Name, options: &Options) -> Result<Self, RegistryError> {
        let (registry, repository) = name.repository().split_once('/').unwrap_or((name.repository(), ""));
        // Docker's registry is not where its name says.
        let address = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let local = is_local(host);
        let scheme = if options.plain_http || local { "http" } else { "https" };
        let text = format!("{scheme}://{address}/");
        let base = Url::parse(&text).ok_or_else(|| request(&text, "no address of a registry"))?;
        let file = options.credentials.clone().or_else(usual_file);
        let basic = match file {
            Some(file) => find(&file, name.repository()).map_err(|e| RegistryError::Credentials(file, e))?,
            None => None,
        };
        let http = Http { authorities: options.authorities.clone() };
        Ok(Self {
            http,
            base,
            repository: repository.to_owned(),
            plain_http: options.plain_http,
            basic,
            authorization: None,
        })
    }

    /// A manifest or an index, into the layout.
    fn document(
        &mut self,
        digest: Option<&Digest>,
        tag: Option<&str>,
        expected: Option<&Descriptor>,
        layout: &Layout,
    ) -> Result<(Descriptor, Document), RegistryError> {
        let reference = digest.map_or_else(|| tag.unwrap_or("latest").to_owned(), ToString::to_string);
        let url = self.url(&format!("manifests/{reference}"))?;
        let answer = self.ask(&url, &[("Accept", ACCEPT)])?;
        if answer.status != 200 {
            return Err(self.refused(&url, answer));
        }
        let kind = answer
            .header("content-type")
            .and_then(|value| value.split(';').next())
            .map(|kind| kind.trim().to_owned());
        let bytes = answer.whole(MOST_DOCUMENT).map_err(|e| broken(&url, e))?;
        if let Some(digest) = digest {
            let got = digest.again(&bytes);
            if got != *digest {
                return Err(RegistryError::Digest { want: digest.clone(), got: got.to_string() });
            }
        }
        if let Some(want) = expected.filter(|want| want.size != bytes.len() as u64) {
            return Err(RegistryError::Digest {
                want: want.digest.clone(),
                got: format!("{} bytes long", bytes.len()),
            });
        }
        let kind = expected.map(|want| want.media_type.clone()).or(kind);
        let document = Document::parse(&bytes, kind.as_deref())?;
        let usual = if matches!(document, Document::Index(_)) { INDEX } else { MANIFEST };
        let stored = layout.put(kind.as_deref().unwrap_or(usual), &bytes)?;
        if let Some(digest) = digest.filter(|digest| **digest != stored.digest) {
            return Err(request(
                &url.path,
                format!("{}: only sha256 is kept in a layout here", digest.algorithm()),
            ));
        }
        Ok((stored, document))
    }

    /// A blob, into the layout. Where the connection breaks off, the rest is asked for.
    fn blob(&mut self, blob: &Descriptor, layout: &Layout, bytes: &AtomicU64) -> Result<(), RegistryError> {
        let url = self.url(&format!("blobs/{}", blob.digest))?;
        if blob.size > MOST_BLOB {
            return Err(request(&url.path, format!("{} bytes are more than any layer has", blob.size)));
        }
        let mut writer = layout.writer()?;
        let (mut done, mut attempts) = (0, 0);
        while done < blob.size || attempts == 0 {
            attempts += 1;
            let failed = match self.part(&url, done) {
                Ok((body, from)) => {
                    if from != done {
                        // It knows no ranges: all of it again. The old file goes first, the new one has its name.
                        drop(writer);
                        writer = layout.writer()?;
                        bytes.fetch_sub(done, Ordering::Relaxed);
                        done = from;
                    }
                    // One byte more than wanted, to see that there is one.
                    let mut body = body.take(blob.size + 1 - done);
                    match copy(&mut body, &mut writer, &mut done, bytes).map_err(|e| broken(&url, e))? {
                        None if done < blob.size => io::Error::from(io::ErrorKind::UnexpectedEof),
                        None => break,
                        Some(error) => error,
                    }
                }
                Err(RegistryError::Connection { source, .. }) => source,
                Err(error) => return Err(error),
            };
            // Without a byte there is nothing to go on from.
            if done == 0 || attempts >= MOST_ATTEMPTS {
                return Err(broken(&url, failed));
            }
        }
        if done != blob.size {
            return Err(RegistryError::Digest {
                want: blob.digest.clone(),
                got: format!("not {} bytes long", blob.size),
            });
        }
        match writer.finish_as(&blob.digest) {
            Ok(()) => Ok(()),
            Err(BlobError::Digest { want, got }) => Err(RegistryError::Digest { want, got: got.to_string() }),
            Err(error) => Err(error.into()),
        }
    }

    /// A blob from this byte on, or from the first: which of them is said.
    fn part(&mut self, url: &Url, from: u64) -> Result<(Body, u64), RegistryError> {
        let range = format!("bytes={from}-");
        let headers = [("Range", range.as_str())];
        let answer = self.ask(url, if from == 0 { &[] } else { &headers })?;
        let starts = format!("bytes {from}-");
        match answer.status {
            200 => Ok((answer.body(), 0)),
            206 if answer.header("content-range").is_some_and(|value| value.starts_with(&starts)) => {
                Ok((answer.body(), from))
            }
            _ => Err(self.refused(url, answer)),
        }
    }

    fn url(&self, rest: &str) -> Result<Url, RegistryError> {
        let path = format!("/v2/{}/{rest}", self.repository);
        self.base.join(&path).ok_or_else(|| request(&path, "no path of a registry"))
    }

    /// A request with what the registry wants to see; it says that once.
    fn ask(&mut self, url: &Url, headers: &[(&str, &str)]) -> Result<Answer, RegistryError> {
        let answer = self.follow(url, headers)?;
        if answer.status != 401 {
            return Ok(answer);
        }
        let challenges: Vec<_> = answer.headers("www-authenticate").filter_map(Challenge::parse).collect();
        let challenge =
            challenges.iter().find(|c| matches!(c, Challenge::Bearer { .. })).or(challenges.first());
        self.authorization = Some(match challenge {
            Some(Challenge::Bearer { realm, service, scope }) => {
                self.token(realm, service.as_deref(), scope.as_deref())?
            }
            Some(Challenge::Basic) if self.basic.is_some() => self.basic_header(),
            Some(Challenge::Basic) => return Err(request(&shown(url), "it wants a password: podman login")),
            None => return Err(request(&shown(url), "401, and it does not say what it wants to see")),
        });
        self.follow(url, headers)
    }

    fn basic_header(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("Basic {}", self.basic.as_ref().map_or("", |basic| basic.as_str())))
    }

    /// A token of the server that the registry names.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<Zeroizing<String>, RegistryError> {
        let mut url = Url::parse(realm).ok_or_else(|| request(realm, "the realm of its tokens is no URL"))?;
        self.may_be_plain(&url)?;
        let pull = format!("repository:{}:pull", self.repository);
        for (name, value) in [("service", service), ("scope", scope.or(Some(&pull)))] {
            if let Some(value) = value {
                url.path +=
                    &format!("{}{name}={}", if url.path.contains('?') { '&' } else { '?' }, encoded(value));
            }
        }
        let basic = self.basic.as_ref().map(|_| self.basic_header());
        let headers: Vec<_> = basic.iter().map(|basic| ("Authorization", basic.as_str())).collect();
        // Not followed further: the password would go along.
        let answer = self.http.get(&url, &headers).map_err(|e| broken(&url, e))?;
        if answer.status != 200 {
            let hint = if self.basic.is_some() {
                "the password is not the right one: podman login"
            } else {
                "podman login"
            };
            return Err(request(&shown(&url), format!("{}: no token: {hint}", answer.status)));
        }
        let bytes = Zeroizing::new(answer.whole(MOST_TOKEN).map_err(|e| broken(&url, e))?);
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let token = value["token"].as_str().or(value["access_token"].as_str()).unwrap_or_default();
        let good = !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
        if good {
            Ok(Zeroizing::new(format!("Bearer {token}")))
        } else {
            Err(request(&shown(&url), "no token in its answer"))
        }
    }

    /// Follows redirects. Credentials go to the registry itself, and to nobody it sends us to.
    fn follow(&self, url: &Url, headers: &[(&str, &str)]) -> Result<Answer, RegistryError> {
        let mut url = url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let mut headers = headers.to_vec();
            if let Some(authorization) =
                self.authorization.as_ref().filter(|_| url.is_same_server(&self.base))
            {
                headers.push(("Authorization", authorization));
            }
            let answer = self.http.get(&url, &headers).map_err(|e| broken(&url, e))?;
            if !matches!(answer.status, 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let location = answer.header("location").unwrap_or_default();
            let next = url.join(location).ok_or_else(|| request(&shown(&url), "it redirects to no URL"))?;
            self.may_be_plain(&next)?;
            url = next;
        }
        Err(request(&shown(&url), format!("more than {MOST_REDIRECTS} redirects")))
    }

    fn may_be_plain(&self, url: &Url) -> Result<(), RegistryError> {
        // From a registry of this machine, or asked for: nobody is surprised.
        if url.tls || self.plain_http || is_local(&url.host) && !self.base.tls {
            return Ok(());
        }
        Err(request(&shown(url), "it leads to a server without TLS: --plain-http allows it"))
    }

    fn refused(&self, url: &Url, answer: Answer) -> RegistryError {
        let status = answer.status;
        let body = answer.whole(MOST_TOKEN).unwrap_or_default();
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = value["errors"][0]["code"].as_str().unwrap_or_default();
        let said: String = said.chars().filter(char::is_ascii_graphic).take(64).collect();
        let hint = match status {
            401 | 403 => ": podman login, or ask for the right to pull",
            404 => ": there is no such image",
            _ => "",
        };
        request(&shown(url), format!("{status} {said}{hint}"))
    }
}

/// Copies until the body ends or fails; the body's failure is the answer, the writer's the error.
fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    done: &mut u64,
    bytes: &AtomicU64,
) -> io::Result<Option<io::Error>> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                *done += count as u64;
                bytes.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Ok(Some(error)),
        }
    }
}

fn is_local(host: &str) -> bool {
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn shown(url: &Url) -> String {
    let path = url.path.split('?').next().unwrap_or_default();
    format!("{}://{}{path}", url.scheme(), url.authority())
}

fn request(url: &str, why: impl Into<String>) -> RegistryError {
    RegistryError::Request { url: url.to_owned(), why: why.into() }
}

fn broken(url: &Url, source: io::Error) -> RegistryError {
    RegistryError::Connection { url: shown(url), source }
}

#[cfg(test)]
mod tests;
