//! What the pod's owner decided on images: which run, and where their keys are.
//!
//! Owns: the keys' way from the KBS to the layers. Does not own: whether initdata is used at all, the formats and the
//! protocol (coffer-attestation's `Guest`).

use std::{
    cell::{OnceCell, RefCell},
    collections::HashMap,
    sync::{Arc, Mutex},
};

use coffer_attestation::{guest::Guest, kbs::ResourceUri};
use coffer_layers::{
    digest::{Digest, DigestError},
    ocicrypt::{KeySource, jwe::PrivateKey},
    policy::{Policy, PolicyError},
};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    confidential::hold,
    image::{Owner, SignaturePolicy},
};

/// What initdata says of images cannot be used.
#[derive(Debug, Error)]
pub enum OwnerError {
    /// An image of its list is not named by a digest.
    #[error("initdata: coffer.toml: images: {0}")]
    Digest(#[from] DigestError),
    /// Its signature policy.
    #[error("initdata: cdh.toml: image_security_policy: {0}")]
    Policy(#[from] PolicyError),
}

/// What a guest that checked its initdata lets run.
///
/// # Errors
/// [`OwnerError`].
pub fn of(guest: &Arc<Mutex<Guest>>) -> Result<Owner, OwnerError> {
    let (config, confidential) = {
        let guest = hold(guest);
        (guest.config().clone(), guest.is_tee())
    };
    let allowed =
        config.coffer.images.iter().map(|text| text.parse::<Digest>()).collect::<Result<Vec<_>, _>>()?;
    let keys = FromKbs {
        guest: guest.clone(),
        private: config.coffer.image_keys,
        had: RefCell::new(HashMap::new()),
    };
    let image = config.image;
    let text = image.image_security_policy.map(|text| Policy::parse(text.as_bytes())).transpose()?;
    let signatures = match (text, image.image_security_policy_uri) {
        (None, None) => None,
        (text, at) => {
            let policy = text.map(OnceCell::from).unwrap_or_default();
            let at = at.unwrap_or_default();
            Some(Box::new(Signatures { guest: guest.clone(), at, policy }) as Box<dyn SignaturePolicy + Send>)
        }
    };
    let allowed = (!allowed.is_empty()).then_some(allowed);
    Ok(Owner { allowed, confidential, keys: Box::new(keys), signatures })
}

/// The signature policy: it is asked for once, and holds for the pod's life.
struct Signatures {
    guest: Arc<Mutex<Guest>>,
    /// Where it is, unless it came with initdata.
    at: String,
    policy: OnceCell<Policy>,
}

impl SignaturePolicy for Signatures {
    fn policy(&self) -> Result<Policy, String> {
        if let Some(policy) = self.policy.get() {
            return Ok(policy.clone());
        }
        let text = hold(&self.guest).document(&self.at).map_err(|e| e.to_string())?;
        let policy = Policy::parse(&text).map_err(|e| format!("{}: {e}", self.at))?;
        Ok(self.policy.get_or_init(|| policy).clone())
    }

    fn key(&self, path: &str) -> Result<Vec<u8>, String> {
        let key = hold(&self.guest).document(path).map_err(|e| e.to_string())?;
        Ok(key.to_vec())
    }
}

/// Keys from a KBS: the guest attests when the first is needed.
struct FromKbs {
    guest: Arc<Mutex<Guest>>,
    /// Resources that hold private keys for JWE wraps.
    private: Vec<String>,
    /// One key opens many layers; it is asked for once.
    had: RefCell<HashMap<String, Zeroizing<Vec<u8>>>>,
}

impl KeySource for FromKbs {
    fn resource(&self, kid: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        if let Some(key) = self.had.borrow().get(kid) {
            return Ok(key.clone());
        }
        let uri: ResourceUri = kid.parse().map_err(|e| format!("{e}"))?;
        let key = hold(&self.guest).fetch(&uri).map_err(|e| e.to_string())?;
        self.had.borrow_mut().insert(kid.to_owned(), key.clone());
        Ok(key)
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
    use coffer_attestation::evidence::{Attesters, Sample};

    fn owner(entries: &str) -> Result<Owner, OwnerError> {
        let text = format!("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n{entries}");
        let guest = Guest::new(Some(text.as_bytes()), Attesters::of(Sample)).unwrap();
        of(&Arc::new(Mutex::new(guest)))
    }

    #[test]
    fn the_owner_names_images_and_kbs() {
        let digest = Digest::sha256(b"image");
        let owner = owner(&format!(
            "\"coffer.toml\" = '''\nimages = [\"{digest}\"]\nallow_plain_http = true\n'''\n\
             \"cdh.toml\" = '''\n[kbc]\nname = \"cc_kbc\"\nurl = \"http://127.0.0.1:1\"\n'''\n"
        ))
        .unwrap();
        assert_eq!(owner.allowed, Some(vec![digest]));
        let why = owner.keys.resource("kbs:///a/b/../c").unwrap_err();
        assert!(why.contains("resource URI"), "{why}");
    }

    #[test]
    fn the_owners_signature_policy_comes_with_initdata_or_later() {
        let reject = r#"{"default":[{"type":"reject"}]}"#;
        let cdh =
            |line: &str| format!("\"p\" = '{reject}'\n\"cdh.toml\" = \"\"\"\n[image]\n{line}\n\"\"\"\n");
        let signatures = |line: &str| owner(&cdh(line)).unwrap().signatures.unwrap();
        signatures(&format!("image_security_policy = '{reject}'")).policy().unwrap();
        let by_name = signatures("image_security_policy_uri = 'p'");
        by_name.policy().unwrap();
        assert_eq!(by_name.key("p"), Ok(reject.as_bytes().to_vec()));
        assert!(by_name.key("/etc/key").unwrap_err().contains("/etc/key is neither kbs:///"));
        let why = signatures("image_security_policy_uri = 'kbs:///a/b/c'").policy().unwrap_err();
        assert!(why.contains("no KBS"), "{why}");
        let why = owner(&cdh("image_security_policy = '{}'")).err().unwrap().to_string();
        assert!(why.starts_with("initdata: cdh.toml: image_security_policy: policy: "), "{why}");
    }

    #[test]
    fn without_a_list_and_without_a_kbs() {
        let nothing = owner("").unwrap();
        assert!(nothing.allowed.is_none() && !nothing.confidential);
        assert!(nothing.keys.resource("kbs:///a/b/c").unwrap_err().contains("no KBS"));
        assert!(owner("\"coffer.toml\" = \"images = ['latest']\"\n").is_err());
    }
}
