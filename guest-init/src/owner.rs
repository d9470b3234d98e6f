//! What the pod's owner decided, from initdata: which images run, and where their keys are.
//!
//! Owns: that initdata is what the launch is bound to before any of it is used, and the keys' way from the KBS to the
//! layers. Does not own: the formats and the protocol (coffer-attestation).

use std::{cell::RefCell, collections::HashMap};

use coffer_attestation::{
    config::{Config, ConfigError, Kbs},
    evidence::{Attesters, BoundData, EvidenceError},
    initdata::{Initdata, InitdataError},
    kbs::{Client, ClientError, Credential, Outcome, ResourceUri, Transport, TransportError, Url, trusting},
};
use coffer_layers::{
    digest::{Digest, DigestError},
    ocicrypt::{KeySource, NoKeys, jwe::PrivateKey},
};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::image::Owner;

/// Initdata was refused: the pod does not run.
#[derive(Debug, Error)]
pub enum OwnerError {
    /// It is not what was launched, or not initdata.
    #[error(transparent)]
    Initdata(#[from] InitdataError),
    /// One of its entries.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The processor does not say what the launch is bound to.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// The host keeps it back.
    #[error("initdata: the launch is bound to initdata ({0}), and the host gave none")]
    Withheld(&'static str),
    /// An image's digest.
    #[error("initdata: coffer.toml: images: {0}")]
    Image(#[from] DigestError),
    /// The KBS's URL.
    #[error("initdata: {0}")]
    Url(#[from] TransportError),
    /// The KBS's certificate.
    #[error("initdata: KBS {0}: {1}")]
    Tls(String, String),
    /// The client.
    #[error("initdata: {0}")]
    Client(#[from] ClientError),
}

/// Checks initdata against the launch and reads it. Without any, the launch must not be bound to some.
///
/// # Errors
/// [`OwnerError`].
pub fn read(raw: Option<&str>) -> Result<Owner, OwnerError> {
    let mut attesters = Attesters::probe();
    let bound = attesters.primary.bound_data()?;
    let Some(raw) = raw else {
        return match bound {
            Some(BoundData::HostData(data)) if data != [0; 32] => Err(OwnerError::Withheld("HOST_DATA")),
            Some(BoundData::MrConfigId(data)) if data != [0; 48] => Err(OwnerError::Withheld("MRCONFIGID")),
            _ => Ok(Owner { allowed: None, keys: Box::new(NoKeys) }),
        };
    };
    let initdata = Initdata::parse(raw.as_bytes())?;
    match &bound {
        Some(BoundData::HostData(data)) => initdata.check_bound(data, "HOST_DATA")?,
        Some(BoundData::MrConfigId(data)) => initdata.check_bound(data, "MRCONFIGID")?,
        None => {}
    }
    let config = Config::from_initdata(&initdata)?;
    let allowed =
        config.coffer.images.iter().map(|text| text.parse::<Digest>()).collect::<Result<Vec<_>, _>>()?;
    let keys: Box<dyn KeySource> = match &config.kbs {
        None => Box::new(NoKeys),
        Some(kbs) => {
            let transport = transport(kbs, config.coffer.allow_plain_http)?;
            let tee = attesters.primary.tee();
            let client = Client::new(tee, kbs.key, Some(raw.to_owned()), Credential::Cookie)?;
            Box::new(FromKbs {
                session: RefCell::new(Session { client, transport, attesters, had: HashMap::new() }),
                private: config.coffer.image_keys,
            })
        }
    };
    Ok(Owner { allowed: (!allowed.is_empty()).then_some(allowed), keys })
}

fn transport(kbs: &Kbs, plain: bool) -> Result<Transport, OwnerError> {
    let url = Url::parse(&kbs.url)?;
    let refused = |why: &str| Err(OwnerError::Tls(kbs.url.clone(), why.to_owned()));
    match (&kbs.certificate, url.tls) {
        (Some(certificate), true) => {
            trusting(url, certificate).map_err(|e| OwnerError::Tls(kbs.url.clone(), e.to_string()))
        }
        (None, true) => refused("its certificate is not in initdata: give it as kbs_cert or cert"),
        (_, false) if plain => Ok(Transport::plain(url)),
        (_, false) => refused("plain HTTP: use https and a certificate, or allow_plain_http in coffer.toml"),
    }
}

struct Session {
    client: Client,
    transport: Transport,
    attesters: Attesters,
    /// One key opens many layers; it is asked for once.
    had: HashMap<String, Zeroizing<Vec<u8>>>,
}

/// Keys from a KBS: attests when the first is needed.
struct FromKbs {
    session: RefCell<Session>,
    /// Resources that hold private keys for JWE wraps.
    private: Vec<String>,
}

impl KeySource for FromKbs {
    fn resource(&self, kid: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        let mut session = self.session.borrow_mut();
        if let Some(key) = session.had.get(kid) {
            return Ok(key.clone());
        }
        let uri: ResourceUri = kid.parse().map_err(|e| format!("{e}"))?;
        let Session { client, transport, attesters, had } = &mut *session;
        client.fetch(uri);
        match transport.run(client, attesters).map_err(|e| e.to_string())? {
            Outcome::Resource(key) => {
                had.insert(kid.to_owned(), key.clone());
                Ok(key)
            }
            Outcome::Token(_) => Err("the KBS gave a token in place of a key".into()),
        }
    }

    fn private_keys(&self) -> Result<Vec<PrivateKey>, String> {
        let read = |kid: &String| {
            let pem = self.resource(kid)?;
            let text = std::str::from_utf8(&pem).map_err(|_| format!("{kid}: not PEM"))?;
            PrivateKey::from_pem(text).map_err(|e| format!("{kid}: {e}"))
        };
        self.private.iter().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initdata(entries: &str) -> String {
        format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n{entries}")
    }

    #[test]
    fn the_owner_names_images_and_kbs() {
        let digest = Digest::sha256(b"image");
        let text = initdata(&format!(
            "\"coffer.toml\" = '''\nimages = [\"{digest}\"]\nallow_plain_http = true\n'''\n\
             \"cdh.toml\" = '''\n[kbc]\nname = \"cc_kbc\"\nurl = \"http://127.0.0.1:1\"\n'''\n"
        ));
        let owner = read(Some(&text)).unwrap();
        assert_eq!(owner.allowed, Some(vec![digest]));
        // Nobody listens there: the failure is the KBS's, by stage.
        let why = owner.keys.resource("kbs:///a/b/../c").unwrap_err();
        assert!(why.contains("resource URI"), "{why}");
    }

    #[test]
    fn a_kbs_that_nobody_vouches_for_is_refused() {
        for (url, words) in [("https://kbs", "certificate is not in initdata"), ("http://kbs", "plain HTTP")]
        {
            let text =
                initdata(&format!("\"cdh.toml\" = '''\n[kbc]\nname = \"cc_kbc\"\nurl = \"{url}\"\n'''\n"));
            let why = read(Some(&text)).err().unwrap().to_string();
            assert!(why.contains(words), "{why}");
        }
        assert!(read(Some("[data]")).is_err());
        assert!(read(None).unwrap().allowed.is_none());
    }
}
