//! The entries of initdata that configure: `aa.toml`, `cdh.toml`, and Coffer's own `coffer.toml`.
//!
//! Owns: the fields that a guest of ours obeys, under upstream's names. Unknown fields are upstream's daemons' business
//! and are passed over; in `coffer.toml` they are refused.

use serde::Deserialize;
use thiserror::Error;

use crate::{initdata::Initdata, kbs::ResourceUri, key::KeyAlgorithm};

/// An entry that cannot be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not of the form.
    #[error("initdata: {entry}: {message}")]
    Form {
        /// Entry of initdata.
        entry: &'static str,
        /// What is wrong.
        message: String,
    },
    /// Two entries contradict each other.
    #[error("initdata: aa.toml says the KBS is {aa}, cdh.toml says {cdh}: name one")]
    TwoKbs {
        /// From `aa.toml`.
        aa: String,
        /// From `cdh.toml`.
        cdh: String,
    },
}

/// Where the KBS is and how it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kbs {
    /// Base URL.
    pub url: String,
    /// PEM certificates to trust, and no others. Without them the system's would be trusted, and a guest has none.
    pub certificate: Option<String>,
    /// Kind of TEE key.
    pub key: KeyAlgorithm,
}

/// Below it are credentials, where upstream has them.
pub const CREDENTIALS: &str = "/run/confidential-containers/cdh";
/// Most credentials.
const MOST_CREDENTIALS: usize = 64;

/// A resource to fetch into a file before a container starts.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Credential {
    /// Absolute path below `/run/confidential-containers/cdh/`.
    pub path: String,
    /// `kbs:///…`.
    pub resource_uri: String,
}

/// `[image]` of `cdh.toml`, for the layer pipeline.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Image {
    /// Where containers-policy.json(5) is: `kbs:///…`, or an entry of initdata.
    pub image_security_policy_uri: Option<String>,
    /// That file's text itself.
    pub image_security_policy: Option<String>,
    /// Where the registry credentials are. Not used: see [`Image::unused`].
    pub authenticated_registry_credentials_uri: Option<String>,
    /// PEM certificates that registries may use. Not used: see [`Image::unused`].
    pub extra_root_certificates: Vec<String>,
}

impl Image {
    /// Fields that upstream obeys when it pulls in the guest. Here the host brings the blobs, so they change nothing, and their
    /// writer is told.
    #[must_use]
    pub fn unused(&self) -> Vec<&'static str> {
        let credentials = self.authenticated_registry_credentials_uri.is_some();
        let certificates = !self.extra_root_certificates.is_empty();
        [("authenticated_registry_credentials_uri", credentials), ("extra_root_certificates", certificates)]
            .into_iter()
            .filter_map(|(name, given)| given.then_some(name))
            .collect()
    }
}

/// `coffer.toml`: what upstream has no name for.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Coffer {
    /// Serve `/aa/token` and `/aa/evidence` to the workload. Upstream has this as a word of the kernel's command line.
    pub attestation_api: bool,
    /// Speak plain HTTP with the KBS: whoever is between can then make the guest use a wrong secret, not read one.
    pub allow_plain_http: bool,
    /// The only images that run: digests of manifests or indexes. Empty: the signature policy alone decides.
    pub images: Vec<String>,
    /// Resources (`kbs:///…`) with PEM private keys, for layers that are encrypted by JWE.
    pub image_keys: Vec<String>,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The KBS, when one is named.
    pub kbs: Option<Kbs>,
    /// Files to fetch for the first container: every one sees them.
    pub credentials: Vec<Credential>,
    /// For the layer pipeline.
    pub image: Image,
    /// Our own.
    pub coffer: Coffer,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AaToml {
    token_configs: TokenConfigs,
    tee_key_algorithm: Option<KeyAlgorithm>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenConfigs {
    kbs: Option<TokenKbs>,
}

#[derive(Deserialize)]
struct TokenKbs {
    url: String,
    #[serde(default)]
    cert: Option<String>,
    #[serde(default)]
    tee_key_algorithm: Option<KeyAlgorithm>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CdhToml {
    kbc: Option<Kbc>,
    credentials: Vec<Credential>,
    image: Image,
}

#[derive(Deserialize)]
struct Kbc {
    name: String,
    #[serde(default)]
    url: String,
    #[serde(default)]
    kbs_cert: Option<String>,
}

fn read<T: Default + serde::de::DeserializeOwned>(
    initdata: &Initdata,
    entry: &'static str,
) -> Result<T, ConfigError> {
    let Some(text) = initdata.entry(entry) else { return Ok(T::default()) };
    toml::from_str(text).map_err(|e| ConfigError::Form { entry, message: e.message().to_owned() })
}

impl Config {
    /// Reads the three entries.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_initdata(initdata: &Initdata) -> Result<Self, ConfigError> {
        let aa: AaToml = read(initdata, "aa.toml")?;
        let cdh: CdhToml = read(initdata, "cdh.toml")?;
        let coffer = read(initdata, "coffer.toml")?;
        let algorithm = aa.tee_key_algorithm;
        let from_aa = aa.token_configs.kbs.map(|kbs| Kbs {
            url: base(&kbs.url),
            certificate: kbs.cert,
            key: kbs.tee_key_algorithm.or(algorithm).unwrap_or_default(),
        });
        let from_cdh = match cdh.kbc {
            Some(kbc) if kbc.name == "cc_kbc" => Some(Kbs {
                url: base(&kbc.url),
                certificate: kbc.kbs_cert,
                key: algorithm.unwrap_or_default(),
            }),
            Some(kbc) => {
                let message = format!("kbc.name {:?} is not supported: use cc_kbc", kbc.name);
                return Err(ConfigError::Form { entry: "cdh.toml", message });
            }
            None => None,
        };
        let kbs = match (from_aa, from_cdh) {
            (Some(aa), Some(cdh)) if aa.url != cdh.url => {
                return Err(ConfigError::TwoKbs { aa: aa.url, cdh: cdh.url });
            }
            (Some(aa), Some(cdh)) => Some(Kbs { certificate: aa.certificate.or(cdh.certificate), ..aa }),
            (aa, cdh) => aa.or(cdh),
        };
        let wrong = |message: String| ConfigError::Form { entry: "cdh.toml", message };
        if cdh.credentials.len() > MOST_CREDENTIALS {
            return Err(wrong(format!("more than {MOST_CREDENTIALS} credentials")));
        }
        cdh.credentials.iter().try_for_each(|credential| credential.check().map_err(wrong))?;
        Ok(Self { kbs, credentials: cdh.credentials, image: cdh.image, coffer })
    }
}

impl Credential {
    /// Its path is below the place and its resource is one.
    fn check(&self) -> Result<(), String> {
        let below = self.path.strip_prefix(CREDENTIALS).and_then(|rest| rest.strip_prefix('/'));
        let clean =
            |rest: &str| rest.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains('\0'));
        if !below.is_some_and(clean) {
            return Err(format!("credentials: path {:?} is not a file below {CREDENTIALS}/", self.path));
        }
        match self.resource_uri.parse::<ResourceUri>() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("credentials: resource_uri: {error}")),
        }
    }
}

fn base(url: &str) -> String {
    url.trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn initdata(entries: &[(&str, &str)]) -> Initdata {
        let mut text = String::from("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n");
        for (name, entry) in entries {
            text += &format!("\"{name}\" = '''\n{entry}'''\n");
        }
        Initdata::parse(text.as_bytes()).unwrap()
    }

    fn config(entries: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_initdata(&initdata(entries))
    }

    #[test]
    fn what_only_a_guest_that_pulls_would_use_is_known_as_unused() {
        assert!(Image::default().unused().is_empty());
        let image = Image {
            authenticated_registry_credentials_uri: Some("kbs:///a/b/c".into()),
            extra_root_certificates: vec!["PEM".into()],
            image_security_policy: Some("{}".into()),
            ..Image::default()
        };
        assert_eq!(image.unused(), ["authenticated_registry_credentials_uri", "extra_root_certificates"]);
    }

    #[test]
    fn upstreams_files_are_read() {
        let config = config(&[
            (
                "aa.toml",
                "[token_configs]\n[token_configs.coco_as]\nurl = 'http://as'\n[token_configs.kbs]\nurl = 'https://kbs:8080/'\ncert = 'PEM'\n[eventlog_config]\ninit_pcr = 17\n",
            ),
            (
                "cdh.toml",
                "socket = 'unix:///x'\n[kbc]\nname = 'cc_kbc'\nurl = 'https://kbs:8080'\n[[credentials]]\npath = '/run/confidential-containers/cdh/a'\nresource_uri = 'kbs:///a/b/c'\n[image]\nimage_security_policy_uri = 'kbs:///default/security-policy/test'\n",
            ),
        ])
        .unwrap();
        let kbs = config.kbs.unwrap();
        assert_eq!((kbs.url.as_str(), kbs.certificate.as_deref()), ("https://kbs:8080", Some("PEM")));
        assert_eq!(kbs.key, KeyAlgorithm::P256);
        assert_eq!(config.credentials[0].resource_uri, "kbs:///a/b/c");
        assert!(config.image.image_security_policy_uri.is_some());
        assert!(!config.coffer.attestation_api && !config.coffer.allow_plain_http);
    }

    #[test]
    fn without_entries_there_is_no_kbs() {
        assert_eq!(config(&[]).unwrap(), Config::default());
    }

    #[test]
    fn contradictions_and_unknown_words_of_ours_are_named() {
        let two = config(&[
            ("aa.toml", "[token_configs.kbs]\nurl = 'http://a'\n"),
            ("cdh.toml", "[kbc]\nname = 'cc_kbc'\nurl = 'http://b'\n"),
        ]);
        assert!(matches!(two, Err(ConfigError::TwoKbs { .. })));
        let message = config(&[("coffer.toml", "atestation_api = true\n")]).unwrap_err().to_string();
        assert!(message.contains("coffer.toml") && message.contains("atestation_api"), "{message}");
        let offline = config(&[("cdh.toml", "[kbc]\nname = 'offline_fs_kbc'\n")]).unwrap_err().to_string();
        assert!(offline.contains("offline_fs_kbc"));
    }

    #[test]
    fn a_credential_is_a_resource_and_a_file_at_its_place() {
        let with = |path: &str, uri: &str| {
            config(&[("cdh.toml", &format!("[[credentials]]\npath = \"{path}\"\nresource_uri = '{uri}'\n"))])
        };
        assert_eq!(
            with("/run/confidential-containers/cdh/kms/key", "kbs:///a/b/c").unwrap().credentials.len(),
            1
        );
        for path in [
            "/etc/passwd",
            "/run/confidential-containers/cdh",
            "/run/confidential-containers/cdh/",
            "/run/confidential-containers/cdh/../x",
            "/run/confidential-containers/cdhx/y",
            "/run/confidential-containers/cdh/a//b",
            "/run/confidential-containers/cdh/a\\u0000",
        ] {
            let message = with(path, "kbs:///a/b/c").unwrap_err().to_string();
            assert!(message.contains("is not a file below"), "{path}: {message}");
        }
        assert!(with("/run/confidential-containers/cdh/a", "http://a").is_err());
        let many =
            "[[credentials]]\npath = '/run/confidential-containers/cdh/a'\nresource_uri = 'kbs:///a/b/c'\n"
                .repeat(65);
        assert!(config(&[("cdh.toml", &many)]).unwrap_err().to_string().contains("more than 64"));
    }

    #[test]
    fn a_key_of_another_kind_is_asked_for_by_its_name() {
        let text = "[token_configs.kbs]\nurl = 'http://a'\ntee_key_algorithm = 'ECDH-ES+A256KW-P521'\n";
        assert_eq!(config(&[("aa.toml", text)]).unwrap().kbs.unwrap().key, KeyAlgorithm::P521);
    }

    proptest! {
        #[test]
        fn any_entry_is_read_or_refused(text in "[a-z_=\\[\\]\"\n .]{0,120}") {
            let _ = config(&[("aa.toml", &text), ("cdh.toml", &text), ("coffer.toml", &text)]);
        }
    }
}
