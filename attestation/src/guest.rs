//! What a guest does with all this: it checks initdata against its launch, and gets secrets.
//!
//! Owns: the order of checks, one KBS session. Used by init, and by the process that serves the workload (`api`). Does not
//! own: requests of the host.

use serde_json::Value;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    config::{Config, ConfigError},
    encoding::to_hex,
    evidence::{Attesters, BoundData, EvidenceError},
    initdata::{Initdata, InitdataError},
    kbs::{
        Client, ClientError, Credential, Outcome, ResourceUri, TlsError, Transport, TransportError, Url,
        trusting,
    },
    policy::{Policy, PolicyError},
    sealed::{self, SealedError},
};

/// Why a pod is not set up, or a secret does not come.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each is its message")]
pub enum GuestError {
    #[error(transparent)]
    Initdata(#[from] InitdataError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("initdata: {0}")]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    #[error("initdata: the launch is bound to one with digest {0}, but the host gave none")]
    Withheld(String),
    #[error("no KBS: initdata names none in aa.toml or cdh.toml")]
    NoKbs,
    #[error(
        "KBS {0}: plain HTTP, which does not tell a KBS from the host: use https with its certificate, or set allow_plain_http in coffer.toml"
    )]
    PlainHttp(String),
    #[error(
        "KBS {0}: https needs the KBS's certificate in initdata: cert in aa.toml or kbs_cert in cdh.toml"
    )]
    NoCertificate(String),
    #[error(transparent)]
    Url(#[from] TransportError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Kbs(#[from] ClientError),
    #[error("environment variable {name}: {source}")]
    Sealed { name: String, source: SealedError },
    #[error("environment variable {0}: the secret is not text")]
    NotText(String),
}

/// A guest whose initdata is the one that it was launched with.
pub struct Guest {
    initdata: Option<Initdata>,
    config: Config,
    attesters: Attesters,
    session: Option<(Client, Transport)>,
}

impl Guest {
    /// Compares initdata with the launch before anything of it is read further.
    ///
    /// # Errors
    /// [`GuestError`]: then nothing of it may be used.
    pub fn new(initdata: Option<&[u8]>, mut attesters: Attesters) -> Result<Self, GuestError> {
        let initdata = initdata.map(Initdata::parse).transpose()?;
        let bound = attesters.primary.bound_data()?;
        match (&bound, &initdata) {
            (Some(BoundData::HostData(field)), Some(found)) => found.check_bound(field, "HOST_DATA")?,
            (Some(BoundData::MrConfigId(field)), Some(found)) => found.check_bound(field, "MRCONFIGID")?,
            (Some(BoundData::HostData(field)), None) => withheld(field)?,
            (Some(BoundData::MrConfigId(field)), None) => withheld(field)?,
            (None, _) => {}
        }
        let config = initdata.as_ref().map(Config::from_initdata).transpose()?.unwrap_or_default();
        Ok(Self { initdata, config, attesters, session: None })
    }

    /// True under a TEE.
    #[must_use]
    pub fn is_tee(&self) -> bool {
        self.attesters.primary.tee() != "sample"
    }

    /// Name of the TEE in the protocol.
    #[must_use]
    pub fn tee(&self) -> &'static str {
        self.attesters.primary.tee()
    }

    /// What initdata configures.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The owner's policy, or the default.
    ///
    /// # Errors
    /// [`GuestError::Policy`].
    pub fn policy(&self) -> Result<Policy, GuestError> {
        match self.initdata.as_ref().and_then(|i| i.entry("policy.rego")) {
            Some(text) => Ok(Policy::parse(text)?),
            None => Ok(Policy::default_for(self.is_tee())),
        }
    }

    fn session(&mut self) -> Result<(&mut Client, &mut Transport, &mut Attesters), GuestError> {
        if self.session.is_none() {
            let kbs = self.config.kbs.as_ref().ok_or(GuestError::NoKbs)?;
            let url = Url::parse(&kbs.url)?;
            let transport = match (&kbs.certificate, url.tls) {
                (Some(pem), true) => trusting(url, pem)?,
                (None, true) => return Err(GuestError::NoCertificate(kbs.url.clone())),
                // Without a TEE there is nothing that the host could not change anyway.
                (_, false) if self.config.coffer.allow_plain_http || !self.is_tee() => Transport::plain(url),
                (_, false) => return Err(GuestError::PlainHttp(kbs.url.clone())),
            };
            let raw = self.initdata.as_ref().map(|i| i.raw().to_owned());
            let client = Client::new(self.tee(), kbs.key, raw, Credential::Cookie)?;
            self.session = Some((client, transport));
        }
        let (client, transport) = self.session.as_mut().ok_or(GuestError::NoKbs)?;
        Ok((client, transport, &mut self.attesters))
    }

    /// A resource of the KBS. Attests if need be.
    ///
    /// # Errors
    /// [`GuestError`].
    pub fn fetch(&mut self, uri: &ResourceUri) -> Result<Zeroizing<Vec<u8>>, GuestError> {
        let (client, transport, attesters) = self.session()?;
        client.fetch(uri.clone());
        match transport.run(client, attesters)? {
            Outcome::Resource(secret) => Ok(secret),
            Outcome::Token(_) => Err(GuestError::NoKbs),
        }
    }

    /// A token of a new attestation, and the TEE key that it speaks of, in PEM.
    ///
    /// # Errors
    /// [`GuestError`].
    pub fn token(&mut self) -> Result<(String, Zeroizing<String>), GuestError> {
        let (client, transport, attesters) = self.session()?;
        client.attest();
        match transport.run(client, attesters)? {
            Outcome::Token(token) => {
                let pem = client.key().to_pem().map_err(|e| ClientError::Key(e.to_string()))?;
                Ok((token, pem))
            }
            Outcome::Resource(_) => Err(GuestError::NoKbs),
        }
    }

    /// Evidence over at most 64 bytes.
    ///
    /// # Errors
    /// [`GuestError::Evidence`].
    pub fn evidence(&mut self, data: &[u8]) -> Result<Value, GuestError> {
        Ok(self.attesters.primary.evidence(data)?)
    }

    /// Opens the sealed values among `NAME=value` pairs.
    ///
    /// # Errors
    /// [`GuestError`], naming the variable.
    pub fn unseal_environment(&mut self, environment: &mut [String]) -> Result<(), GuestError> {
        for pair in environment {
            let Some((name, value)) = pair.split_once('=') else { continue };
            if !sealed::is_sealed(value) {
                continue;
            }
            let name = name.to_owned();
            let secret = sealed::unseal(value, &mut |uri| self.fetch(uri).map_err(|e| e.to_string()))
                .map_err(|source| GuestError::Sealed { name: name.clone(), source })?;
            match std::str::from_utf8(&secret) {
                Ok(text) if !text.contains('\0') => *pair = format!("{name}={text}"),
                _ => return Err(GuestError::NotText(name)),
            }
        }
        Ok(())
    }
}

/// A launch that is bound to initdata has it.
fn withheld(field: &[u8]) -> Result<(), GuestError> {
    if field.iter().all(|b| *b == 0) { Ok(()) } else { Err(GuestError::Withheld(to_hex(field))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Attester, Sample};
    use serde_json::json;

    /// A TEE launched with this HOST_DATA.
    struct Launched([u8; 32]);

    impl Attester for Launched {
        fn tee(&self) -> &'static str {
            "snp"
        }

        fn evidence(&mut self, _: &[u8]) -> Result<Value, EvidenceError> {
            Ok(json!({}))
        }

        fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
            Ok(Some(BoundData::HostData(self.0)))
        }
    }

    fn text(extra: &str) -> String {
        format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n{extra}")
    }

    #[test]
    fn a_launch_takes_the_initdata_that_it_is_bound_to_and_no_other() {
        let raw = text("\"policy.rego\" = \"package agent_policy\"\n");
        let bound = Initdata::parse(raw.as_bytes()).unwrap().bound::<32>();
        let guest = |raw: Option<&str>, bound| {
            Guest::new(raw.map(str::as_bytes), Attesters::of(Launched(bound))).map(|_| ())
        };
        guest(Some(&raw), bound).unwrap();
        guest(None, [0; 32]).unwrap();
        let message = guest(Some(&text("")), bound).unwrap_err().to_string();
        assert!(message.contains("is not the one bound to this launch"), "{message}");
        let message = guest(None, bound).unwrap_err().to_string();
        assert!(message.contains("the host gave none"), "{message}");
        // Bound to nothing, but given something: the host's own initdata must not configure a measured guest.
        assert!(guest(Some(&raw), [0; 32]).is_err());
    }

    #[test]
    fn plain_http_under_a_tee_must_be_asked_for() {
        let kbs = "\"aa.toml\" = \"[token_configs.kbs]\\nurl = 'http://127.0.0.1:1'\"\n";
        let raw = text(kbs);
        let bound = Initdata::parse(raw.as_bytes()).unwrap().bound::<32>();
        let mut guest = Guest::new(Some(raw.as_bytes()), Attesters::of(Launched(bound))).unwrap();
        let uri: ResourceUri = "kbs:///a/b/c".parse().unwrap();
        assert!(matches!(guest.fetch(&uri), Err(GuestError::PlainHttp(_))));
        let mut guest = Guest::new(None, Attesters::of(Sample)).unwrap();
        assert!(matches!(guest.fetch(&uri), Err(GuestError::NoKbs)));
    }

    #[test]
    fn a_value_that_is_not_sealed_stays_and_a_broken_one_is_named() {
        let mut guest = Guest::new(None, Attesters::of(Sample)).unwrap();
        let mut environment = vec!["A=1".to_owned(), "B".to_owned()];
        guest.unseal_environment(&mut environment).unwrap();
        assert_eq!(environment, ["A=1", "B"]);
        let mut environment = vec!["KEY=sealed.x".to_owned()];
        let message = guest.unseal_environment(&mut environment).unwrap_err().to_string();
        assert!(message.starts_with("environment variable KEY: sealed secret:"), "{message}");
    }
}
