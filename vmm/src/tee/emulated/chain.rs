//! The development root: an ARK, an ASK and a VCEK of our own, made on first use and named as what they are.
//!
//! Owns: keys and certificates, and the directory that holds them. A production verifier refuses what they sign, because its
//! root is AMD's. Whoever reads the directory can sign any report: it is for tests.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    str::FromStr,
    time::{Duration, SystemTime},
};

use getrandom::{SysRng, rand_core::UnwrapErr};
use p384::{
    ecdsa::{Signature, SigningKey, signature::Signer},
    elliptic_curve::Generate,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey},
};
use rsa::{PrivateKey, pss};
use sha2::Sha384;
use thiserror::Error;
use x509_cert::{
    Certificate,
    builder::{Builder, CertificateBuilder, profile::BuilderProfile},
    certificate::TbsCertificate,
    der::{
        Decode, Encode,
        asn1::{Ia5String, OctetString},
    },
    ext::{Extension, pkix::BasicConstraints},
    name::Name,
    serial_number::SerialNumber,
    spki::{SubjectPublicKeyInfo, SubjectPublicKeyInfoRef},
    time::{Time, Validity},
};

use super::report::TCB;
use crate::tee::snp::digest::sha384;

/// Bits of the RSA keys: AMD's have 4096; these protect nothing and shall be made fast.
const RSA_BITS: usize = 2048;
const YEARS: u64 = 20;

/// Why there is no chain.
#[derive(Debug, Error)]
pub enum ChainError {
    /// The directory.
    #[error("development root in {path}: {source}; give another directory with --development-keys")]
    Directory {
        /// Where.
        path: String,
        /// The system's words.
        source: io::Error,
    },
    /// A key or certificate.
    #[error("development root: {what}: {reason}; remove the directory to have it made again")]
    Crypto {
        /// Which.
        what: &'static str,
        /// The library's words.
        reason: String,
    },
}

fn crypto<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> ChainError {
    move |error| ChainError::Crypto { what, reason: error.to_string() }
}

/// The chain.
pub struct Chain {
    vcek: SigningKey,
    ark: Vec<u8>,
    ask: Vec<u8>,
    vcek_certificate: Vec<u8>,
}

impl Chain {
    /// Opens the directory, or makes chain and directory.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn open(directory: &Path) -> Result<Self, ChainError> {
        let io = |source| ChainError::Directory { path: directory.display().to_string(), source };
        let read = |name| fs::read(directory.join(name));
        match read("vcek.key") {
            Ok(key) => Ok(Self {
                vcek: SigningKey::from_pkcs8_der(&key).map_err(crypto("read the VCEK's key"))?,
                ark: read("ark.der").map_err(io)?,
                ask: read("ask.der").map_err(io)?,
                vcek_certificate: read("vcek.der").map_err(io)?,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let chain = Self::make()?;
                chain.store(directory).map_err(io)?;
                Ok(chain)
            }
            Err(error) => Err(io(error)),
        }
    }

    fn make() -> Result<Self, ChainError> {
        let mut random = UnwrapErr(SysRng);
        let rsa = |random: &mut UnwrapErr<SysRng>| {
            PrivateKey::new(random, RSA_BITS).map(pss::SigningKey::<Sha384>::new)
        };
        let ark = rsa(&mut random).map_err(crypto("make the ARK"))?;
        let ask = rsa(&mut random).map_err(crypto("make the ASK"))?;
        let vcek = SigningKey::generate_from_rng(&mut random);
        let chip_id = chip_id(&vcek);
        let certificate = |what, profile: Profile, key: SubjectPublicKeyInfo<_, _>, signer: &_| {
            sign(profile, key, signer).map_err(crypto(what))
        };
        let info = |key: &pss::SigningKey<Sha384>| -> Result<_, ChainError> {
            use rsa::signature::Keypair;
            let document = key.verifying_key().to_public_key_der().map_err(crypto("encode a key"))?;
            SubjectPublicKeyInfo::from_der(document.as_bytes()).map_err(crypto("encode a key"))
        };
        let root = "CN=ARK-COFFER-DEVELOPMENT,OU=Emulated SEV-SNP protects nothing,O=Coffer";
        let middle = "CN=SEV-COFFER-DEVELOPMENT,OU=Emulated SEV-SNP protects nothing,O=Coffer";
        let leaf = "CN=SEV-VCEK,OU=Emulated SEV-SNP protects nothing,O=Coffer";
        let public = vcek.verifying_key().to_public_key_der().map_err(crypto("encode the VCEK"))?;
        let public = SubjectPublicKeyInfo::from_der(public.as_bytes()).map_err(crypto("encode the VCEK"))?;
        Ok(Self {
            ark: certificate("sign the ARK", Profile::new(root, root, None)?, info(&ark)?, &ark)?,
            ask: certificate("sign the ASK", Profile::new(root, middle, None)?, info(&ask)?, &ark)?,
            vcek_certificate: certificate(
                "sign the VCEK",
                Profile::new(middle, leaf, Some(chip_id))?,
                public,
                &ask,
            )?,
            vcek,
        })
    }

    fn store(&self, directory: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let key = self.vcek.to_pkcs8_der().map_err(|e| io::Error::other(e.to_string()))?;
        let files =
            [("ark.der", &self.ark[..]), ("ask.der", &self.ask), ("vcek.der", &self.vcek_certificate)];
        // The key last: it says that the others are there.
        for (name, bytes) in files.into_iter().chain([("vcek.key", key.as_bytes())]) {
            let fresh = directory.join(format!(".{name}.{}", std::process::id()));
            let mut file =
                fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
            file.write_all(bytes)?;
            fs::rename(fresh, directory.join(name))?;
        }
        Ok(())
    }

    /// CHIP_ID: a digest of the public key, so that the certificate can name it.
    #[must_use]
    pub fn chip_id(&self) -> [u8; 64] {
        chip_id(&self.vcek)
    }

    /// What derived keys come from.
    #[must_use]
    pub fn secret(&self) -> [u8; 48] {
        sha384(&self.vcek.to_bytes())
    }

    /// r and s, little-endian.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> ([u8; 72], [u8; 72]) {
        let signature: Signature = self.vcek.sign(message);
        let bytes = signature.to_bytes();
        let number = |at: usize| std::array::from_fn(|i| if i < 48 { bytes[at + 47 - i] } else { 0 });
        (number(0), number(48))
    }

    /// The certificate table of GHCB extended guest requests: GUID, offset and length of each, then the certificates.
    #[must_use]
    pub fn table(&self) -> Vec<u8> {
        const VCEK: u128 = 0x63da758d_e664_4564_adc5_f4b93be8accd;
        const ASK: u128 = 0x4ab7b379_bbac_4fe4_a02f_05aef327c782;
        const ARK: u128 = 0xc0b406a4_a803_4952_9743_3fb6014cd0ae;
        let entries = [(VCEK, &self.vcek_certificate), (ASK, &self.ask), (ARK, &self.ark)];
        const ENTRY: usize = 24;
        let mut table = vec![0; ENTRY * (entries.len() + 1)];
        for (index, (guid, bytes)) in entries.into_iter().enumerate() {
            let (at, offset) = (index * ENTRY, table.len() as u32);
            table[at..at + 16].copy_from_slice(&guid.to_be_bytes());
            table[at + 16..at + 20].copy_from_slice(&offset.to_le_bytes());
            table[at + 20..at + 24].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            table.extend_from_slice(bytes);
        }
        table
    }
}

fn chip_id(vcek: &SigningKey) -> [u8; 64] {
    let digest = sha384(vcek.verifying_key().to_sec1_point(false).as_bytes());
    std::array::from_fn(|i| digest[i % 48])
}

fn sign(
    profile: Profile,
    key: x509_cert::spki::SubjectPublicKeyInfoOwned,
    signer: &pss::SigningKey<Sha384>,
) -> Result<Vec<u8>, x509_cert::builder::Error> {
    let time = |at: SystemTime| Time::try_from(at);
    let now = SystemTime::now();
    // A day back, for clocks that differ.
    let validity = Validity::new(
        time(now - Duration::from_secs(86_400))?,
        time(now + Duration::from_secs(YEARS * 365 * 86_400))?,
    );
    let builder = CertificateBuilder::new(profile, SerialNumber::from(1u32), validity, key)?;
    let mut random = UnwrapErr(SysRng);
    let certificate: Certificate = builder.build_with_rng::<_, pss::Signature, _>(signer, &mut random)?;
    Ok(certificate.to_der()?)
}

/// What is in a certificate: names, and for the VCEK AMD's extensions.
struct Profile {
    issuer: Name,
    subject: Name,
    chip_id: Option<[u8; 64]>,
}

impl Profile {
    fn new(issuer: &str, subject: &str, chip_id: Option<[u8; 64]>) -> Result<Self, ChainError> {
        let name = |text| Name::from_str(text).map_err(crypto("name a certificate"));
        Ok(Self { issuer: name(issuer)?, subject: name(subject)?, chip_id })
    }
}

impl BuilderProfile for Profile {
    fn get_issuer(&self, _subject: &Name) -> Name {
        self.issuer.clone()
    }

    fn get_subject(&self) -> Name {
        self.subject.clone()
    }

    fn build_extensions(
        &self,
        _key: SubjectPublicKeyInfoRef<'_>,
        _issuer: SubjectPublicKeyInfoRef<'_>,
        _tbs: &TbsCertificate,
    ) -> x509_cert::builder::Result<Vec<Extension>> {
        let extension = |oid: &str, value: Vec<u8>, critical| -> x509_cert::builder::Result<Extension> {
            let extn_id = oid.parse().map_err(x509_cert::der::Error::from)?;
            Ok(Extension { extn_id, critical, extn_value: OctetString::new(value)? })
        };
        let Some(chip_id) = self.chip_id else {
            let basic = BasicConstraints { ca: true, path_len_constraint: None };
            return Ok(vec![extension("2.5.29.19", basic.to_der()?, true)?]);
        };
        // AMD 57230: structure version, product name, security versions, hardware id.
        let part = |shift: u32| -> x509_cert::der::Result<Vec<u8>> { (TCB >> shift & 0xff).to_der() };
        let arc = |last: &str| format!("1.3.6.1.4.1.3704.1.{last}");
        Ok(vec![
            extension(&arc("1"), 1u8.to_der()?, false)?,
            extension(&arc("2"), Ia5String::new("Coffer-development")?.to_der()?, false)?,
            extension(&arc("3.1"), part(0)?, false)?,
            extension(&arc("3.2"), part(8)?, false)?,
            extension(&arc("3.3"), part(48)?, false)?,
            extension(&arc("3.8"), part(56)?, false)?,
            extension(&arc("4"), chip_id.to_vec(), false)?,
        ])
    }
}
