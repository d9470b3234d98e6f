//! What a guest does with all this: it checks initdata against its launch, and gets secrets.
//!
//! Owns: the order of checks, what initdata may ask for, one KBS session. It is the only place that decides whether initdata
//! is used. Used by init, and by the process that serves the workload (`api`). Does not own: requests of the host.

use std::net::IpAddr;

use serde_json::Value;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    config::{Config, ConfigError, Credential, Kbs},
    encoding::to_hex,
    evidence::{Attesters, BoundData, EvidenceError},
    initdata::{Initdata, InitdataError},
    kbs::{
        Client, ClientError, Credential as Proof, Outcome, ResourceUri, TlsError, Transport, TransportError,
        Url, trusting,
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
        "initdata: KBS {0}: plain HTTP, which does not tell a KBS from the host: use https with its certificate, or set allow_plain_http in coffer.toml"
    )]
    PlainHttp(String),
    #[error(
        "initdata: KBS {0}: https needs the KBS's certificate in initdata: cert in aa.toml or kbs_cert in cdh.toml"
    )]
    NoCertificate(String),
    #[error(
        "initdata: it names a KBS or turns attestation_api on, but neither images in coffer.toml, nor image_security_policy in cdh.toml, nor policy.rego say what may run: any program of the host's could ask for its secrets, or speak in its name"
    )]
    Unguarded,
    #[error("initdata: cdh.toml: both image_security_policy and image_security_policy_uri: write one")]
    TwoPolicies,
    #[error(
        "initdata: {0} says which images run, and a KBS behind plain HTTP does not tell itself from the host: use https with its certificate"
    )]
    PlainDocument(String),
    #[error("initdata: {0} is neither kbs:///… nor the name of an entry of initdata")]
    NoDocument(String),
    #[error("initdata: {0}")]
    Url(#[from] TransportError),
    #[error("initdata: {0}")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Kbs(#[from] ClientError),
    #[error("environment variable {name}: {source}")]
    Sealed { name: String, source: SealedError },
    #[error("credential {path}: {message}")]
    Credential { path: String, message: String },
    #[error("environment variable {0}: the secret is not text")]
    NotText(String),
}

/// A path in the guest, and what is to be there.
pub type File = (String, Zeroizing<Vec<u8>>);

/// A guest whose initdata is the one that it was launched with.
pub struct Guest {
    initdata: Option<Initdata>,
    config: Config,
    attesters: Attesters,
    /// Where initdata names a KBS.
    transport: Option<Transport>,
    /// From the first request on, which makes the TEE key.
    client: Option<Client>,
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
        let image = &config.image;
        let signatures = match (&image.image_security_policy, &image.image_security_policy_uri) {
            (Some(_), Some(_)) => return Err(GuestError::TwoPolicies),
            (text, uri) => text.is_some() || uri.is_some(),
        };
        let transport =
            config.kbs.as_ref().map(|kbs| transport(kbs, config.coffer.allow_plain_http)).transpose()?;
        let guest = Self { initdata, config, attesters, transport, client: None };
        let guarded =
            guest.entry("policy.rego").is_some() || !guest.config.coffer.images.is_empty() || signatures;
        let speaks = guest.transport.is_some() || guest.config.coffer.attestation_api;
        if speaks && guest.is_tee() && !guarded {
            return Err(GuestError::Unguarded);
        }
        Ok(guest)
    }

    fn entry(&self, name: &str) -> Option<&str> {
        self.initdata.as_ref().and_then(|initdata| initdata.entry(name))
    }

    /// True under a TEE.
    #[must_use]
    pub fn is_tee(&self) -> bool {
        self.attesters.primary.tee() != "sample"
    }

    /// Whether anybody but the host has a say here: under a TEE, or where initdata has a policy.
    #[must_use]
    pub fn has_owner(&self) -> bool {
        self.is_tee() || self.entry("policy.rego").is_some()
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
        match self.entry("policy.rego") {
            Some(text) => Ok(Policy::parse(text)?),
            None => Ok(Policy::default_for(self.is_tee())),
        }
    }

    fn session(&mut self) -> Result<(&mut Client, &mut Transport, &mut Attesters), GuestError> {
        let (Some(kbs), Some(transport)) = (&self.config.kbs, &mut self.transport) else {
            return Err(GuestError::NoKbs);
        };
        let client = match self.client.take() {
            Some(client) => client,
            None => {
                let raw = self.initdata.as_ref().map(|i| i.raw().to_owned());
                Client::new(self.attesters.primary.tee(), kbs.key, raw, Proof::Cookie)?
            }
        };
        Ok((self.client.insert(client), transport, &mut self.attesters))
    }

    /// Tells who knows addresses of names. They are the host's: what they say is not believed beyond that.
    pub fn ask_for_names(&mut self, servers: &[IpAddr]) {
        if let Some(transport) = &mut self.transport {
            transport.ask_for_names(servers);
        }
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

    /// What decides on images (a signature policy, its keys): a resource of the KBS, or an entry of initdata by its name. The
    /// host must not be able to put another in its place, so a KBS has to be authenticated here.
    ///
    /// # Errors
    /// [`GuestError`].
    pub fn document(&mut self, at: &str) -> Result<Zeroizing<Vec<u8>>, GuestError> {
        if at.starts_with("kbs://") {
            let uri: ResourceUri = at.parse().map_err(|_| GuestError::NoDocument(at.to_owned()))?;
            let authenticated = |kbs: &Kbs| Url::parse(&kbs.url).is_ok_and(|url| url.tls);
            if self.config.kbs.as_ref().is_some_and(|kbs| !authenticated(kbs)) {
                return Err(GuestError::PlainDocument(at.to_owned()));
            }
            return self.fetch(&uri);
        }
        let entry = self.entry(at).ok_or_else(|| GuestError::NoDocument(at.to_owned()))?;
        Ok(Zeroizing::new(entry.as_bytes().to_vec()))
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

    /// The files that initdata's credentials are, fetched.
    ///
    /// # Errors
    /// [`GuestError::Credential`], naming the file.
    pub fn credentials(&mut self) -> Result<Vec<File>, GuestError> {
        let mut files = Vec::new();
        for Credential { path, resource_uri } in self.config.credentials.clone() {
            let fetched = match resource_uri.parse() {
                Ok(uri) => self.fetch(&uri).map_err(|e| e.to_string()),
                Err(error) => Err(format!("{error}")),
            };
            let secret = fetched.map_err(|message| GuestError::Credential { path: path.clone(), message })?;
            files.push((path, secret));
        }
        Ok(files)
    }

    /// Opens a sealed text.
    ///
    /// # Errors
    /// [`SealedError`].
    pub fn unseal(&mut self, text: &str) -> Result<Zeroizing<Vec<u8>>, SealedError> {
        let credentials = self.config.credentials.clone();
        let files = |path: &str| credentials.iter().find(|c| c.path == path).map(|c| c.resource_uri.clone());
        sealed::unseal(text, &files, &mut |uri| self.fetch(uri).map_err(|e| e.to_string()))
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
            let secret =
                self.unseal(value).map_err(|source| GuestError::Sealed { name: name.clone(), source })?;
            match std::str::from_utf8(&secret) {
                Ok(text) if !text.contains('\0') => *pair = format!("{name}={text}"),
                _ => return Err(GuestError::NotText(name)),
            }
        }
        Ok(())
    }
}

/// The way to a KBS. The protocol does not authenticate it, so its certificate is pinned, under a TEE or not, unless the
/// owner says otherwise in as many words.
fn transport(kbs: &Kbs, plain: bool) -> Result<Transport, GuestError> {
    let url = Url::parse(&kbs.url)?;
    match (&kbs.certificate, url.tls) {
        (Some(pem), true) => Ok(trusting(url, pem)?),
        (None, true) => Err(GuestError::NoCertificate(kbs.url.clone())),
        (_, false) if plain => Ok(Transport::plain(url)),
        (_, false) => Err(GuestError::PlainHttp(kbs.url.clone())),
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

    fn kbs(url: &str, extra: &str) -> String {
        text(&format!("\"aa.toml\" = \"[token_configs.kbs]\\nurl = '{url}'\"\n{extra}"))
    }

    const PLAIN: &str = "\"coffer.toml\" = \"allow_plain_http = true\"\n";

    #[test]
    fn a_kbs_that_nobody_vouches_for_is_refused_under_a_tee_or_not() {
        for (url, extra, words) in [
            ("http://127.0.0.1:1", "", "plain HTTP"),
            ("https://127.0.0.1:1", "", "needs the KBS's certificate"),
            // Leave for plain HTTP is none for TLS without a certificate.
            ("https://127.0.0.1:1", PLAIN, "needs the KBS's certificate"),
            ("ftp://127.0.0.1:1", PLAIN, "not http"),
        ] {
            let raw = kbs(url, extra);
            let bound = Initdata::parse(raw.as_bytes()).unwrap().bound::<32>();
            for attesters in [Attesters::of(Sample), Attesters::of(Launched(bound))] {
                let refused = Guest::new(Some(raw.as_bytes()), attesters).err().unwrap().to_string();
                assert!(refused.starts_with("initdata: ") && refused.contains(words), "{refused}");
            }
        }
        let mut guest = Guest::new(None, Attesters::of(Sample)).unwrap();
        assert!(matches!(guest.fetch(&"kbs:///a/b/c".parse().unwrap()), Err(GuestError::NoKbs)));
    }

    #[test]
    fn what_decides_on_images_comes_from_initdata_or_an_authenticated_kbs() {
        let mut guest = Guest::new(Some(text("\"p\" = \"{}\"\n").as_bytes()), Attesters::of(Sample)).unwrap();
        assert_eq!(&**guest.document("p").unwrap(), b"{}");
        for at in ["/etc/passwd", "", "kbs:/x", "kbs:///a/../c"] {
            assert!(matches!(guest.document(at), Err(GuestError::NoDocument(_))), "{at}");
        }
        assert!(matches!(guest.document("kbs:///a/b/c"), Err(GuestError::NoKbs)));
        let raw = kbs("http://127.0.0.1:1", PLAIN);
        let mut guest = Guest::new(Some(raw.as_bytes()), Attesters::of(Sample)).unwrap();
        assert!(matches!(guest.document("kbs:///a/b/c"), Err(GuestError::PlainDocument(_))));
        let two = text(
            "\"cdh.toml\" = \"[image]\\nimage_security_policy_uri = 'p'\\nimage_security_policy = '{}'\"\n",
        );
        let two = Guest::new(Some(two.as_bytes()), Attesters::of(Sample));
        assert!(matches!(two, Err(GuestError::TwoPolicies)));
    }

    #[test]
    fn secrets_under_a_tee_need_a_word_on_what_may_run() {
        let new = |raw: &str| {
            let bound = Initdata::parse(raw.as_bytes()).unwrap().bound::<32>();
            Guest::new(Some(raw.as_bytes()), Attesters::of(Launched(bound))).map(|_| ())
        };
        let url = "http://127.0.0.1:1";
        assert!(matches!(new(&kbs(url, PLAIN)), Err(GuestError::Unguarded)));
        // Evidence of what the host runs would pass for the owner's.
        let api = text("\"coffer.toml\" = \"attestation_api = true\"\n");
        assert!(matches!(new(&api), Err(GuestError::Unguarded)));
        new(&kbs(url, &format!("{PLAIN}\"policy.rego\" = \"package agent_policy\"\n"))).unwrap();
        let image = "\"coffer.toml\" = \"allow_plain_http = true\\nimages = ['sha256:00']\"\n";
        new(&kbs(url, image)).unwrap();
        let signed = format!("{PLAIN}\"cdh.toml\" = \"[image]\\nimage_security_policy = '{{}}'\"\n");
        new(&kbs(url, &signed)).unwrap();
        Guest::new(Some(kbs(url, PLAIN).as_bytes()), Attesters::of(Sample)).unwrap();
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

    #[test]
    fn a_sealed_secrets_signer_may_be_a_credential() {
        use crate::encoding::to_base64url;
        let kid = |kid: &str| {
            let header = json!({"alg": "ES256", "kid": kid}).to_string();
            format!("sealed.{}.e30.{}", to_base64url(header.as_bytes()), to_base64url(&[1; 64]))
        };
        let raw = text(&format!(
            "\"cdh.toml\" = \"[[credentials]]\\npath = '{}/a'\\nresource_uri = 'kbs:///a/b/c'\"\n",
            sealed::SIGNERS
        ));
        let mut guest = Guest::new(Some(raw.as_bytes()), Attesters::of(Sample)).unwrap();
        let mut why = |name: &str| guest.unseal(&kid(name)).unwrap_err().to_string();
        assert!(why("a").starts_with("sealed secret: key kbs:///a/b/c: "), "{}", why("a"));
        assert!(why("b").contains("kid \"b\" is a file: say what it is by [[credentials]]"), "{}", why("b"));
    }
}
