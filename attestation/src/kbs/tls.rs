//! TLS to a KBS whose certificate is in initdata, and to no other.
//!
//! Owns: what makes a server the right one. The protocol itself does not authenticate it, and anybody can encrypt to a
//! TEE key: without this, a host between could make the guest use a secret of the host's.

use std::{io, sync::Arc};

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use thiserror::Error;

use super::{
    Connect, Deadline, Stream, Url,
    deadline::Timed,
    transport::{Transport, tcp},
};

/// The certificates of initdata cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// Not PEM, or no certificate in it.
    #[error("the KBS's certificate in initdata: {0}")]
    Certificate(String),
    /// The library refuses.
    #[error("TLS: {0}")]
    Library(#[from] rustls::Error),
}

/// A transport that speaks with a server only if its certificate is one of these (PEM), or is issued by one of them for
/// the URL's name.
///
/// # Errors
/// [`TlsError`].
pub fn trusting(url: Url, certificates: &str) -> Result<Transport, TlsError> {
    let pinned: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(certificates.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| TlsError::Certificate(e.to_string()))?;
    if pinned.is_empty() {
        return Err(TlsError::Certificate("no certificate in it".into()));
    }
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(pinned.iter().cloned());
    // Without a usable root only the pinned certificate itself is left.
    let chain = if roots.is_empty() {
        None
    } else {
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().ok()
    };
    let verifier = Arc::new(Pinned { pinned, chain, provider: provider.clone() });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Transport::new(url, Box::new(Tls(Arc::new(config)))))
}

struct Tls(Arc<ClientConfig>);

impl Connect for Tls {
    fn connect(&mut self, url: &Url, limit: Deadline) -> io::Result<Box<dyn Stream>> {
        let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
        let connection = ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)?;
        Ok(Box::new(StreamOwned::new(connection, tcp(url, limit)?)))
    }
}

/// The limit is below TLS, which reads and writes until a handshake or a record is whole.
impl Stream for StreamOwned<ClientConnection, Timed> {
    fn until(&mut self, limit: Deadline) {
        self.sock.until(limit);
    }
}

/// Self-signed certificates are what KBSs have: the very certificate counts by its bytes, whatever its extensions say.
/// Its dates do not count then, as the guest's clock is the host's.
#[derive(Debug)]
struct Pinned {
    pinned: Vec<CertificateDer<'static>>,
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.pinned.iter().any(|p| p == certificate) {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.chain {
            Some(chain) => chain.verify_server_cert(certificate, intermediates, name, ocsp, now),
            None => Err(rustls::Error::General("the server's certificate is not the one in initdata".into())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kbs::Request;
    use std::{
        io::{Read, Write},
        net::TcpListener,
        thread,
        time::{Duration, Instant},
    };

    /// Whoever is between promises a whole record and sends it byte by byte: for TLS that is one read.
    #[test]
    fn a_handshake_that_dribbles_is_over_when_the_time_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = Url::parse(&format!("https://{}", listener.local_addr().unwrap())).unwrap();
        thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let _ = peer.read(&mut [0; 4096]);
            // A handshake's record of 16 KiB, in it one message.
            let _ = peer.write_all(&[22, 3, 3, 0x40, 0, 2, 0, 0x3f, 0xfc]);
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(5) && peer.write_all(&[3]).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let mut transport = trusting(url, pem).unwrap().within(Duration::from_millis(300));
        let began = Instant::now();
        let error = transport.exchange(&Request::get("/".into())).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}: {error}", began.elapsed());
        assert!(error.to_string().contains("it took longer than 0.3 s"), "{error}");
    }
}
