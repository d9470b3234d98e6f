//! Annotations of a confidential pod: what protects it, and the owner's initdata.
//!
//! Owns: `io.coffer.tee`, `io.coffer.initdata` and upstream's annotation with initdata in itself, that the launch is bound to the initdata's digest, and that the emulated
//! machine, which protects nothing, runs only where the host's operator wants it. Does not own: what initdata says; the
//! guest reads it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use coffer_attestation::{
    encoding::from_base64,
    initdata::{Initdata, LONGEST},
};
use flate2::read::MultiGzDecoder;
use oci_spec::runtime::Spec;

use crate::error::{Error, host};

const EMULATED: &str = "snp-emulated";

/// Longest initdata in bytes that is read from its file; the guest's own bound is smaller.
const MOST_INITDATA: u64 = 1 << 20;

/// The annotation that names a file with initdata.
const OF_FILE: &str = "io.coffer.initdata";
/// Initdata in the annotation itself, as Kata's users write it: Base64 of gzip of the text.
const INLINE: &str = "io.katacontainers.config.hypervisor.cc_init_data";
/// Longest such value. What is in it may be no longer than a guest takes, whatever it is packed to.
const MOST_INLINE: usize = 1 << 20;

/// The operator's leave to run `snp-emulated`, which no annotation can give: a file whose only line is the directory of the
/// development root, that signs the reports of such machines.
pub const EMULATION: &str = "/etc/coffer/snp-emulated";

/// What the annotations say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confidential {
    /// `none`, `snp`, `snp-emulated`: the VMM's words.
    pub tee: Option<String>,
    /// Where the initdata is.
    pub initdata: Option<Source>,
}

/// Where an annotation has initdata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a file of this host.
    File(PathBuf),
    /// In itself, packed.
    Inline(String),
}

impl Source {
    fn annotation(&self) -> &'static str {
        match self {
            Self::File(_) => OF_FILE,
            Self::Inline(_) => INLINE,
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(file) => write!(f, "{}", file.display()),
            Self::Inline(text) => write!(f, "{}…", text.chars().take(16).collect::<String>()),
        }
    }
}

/// Whether a container with these annotations, the first of its pod, brings initdata.
#[must_use]
pub fn has_initdata(annotations: &HashMap<String, String>) -> bool {
    [OF_FILE, INLINE].iter().any(|name| annotations.contains_key(*name))
}

impl Confidential {
    /// Reads a configuration's annotations.
    ///
    /// # Errors
    /// [`Error::Bundle`], naming the annotation.
    pub fn of(spec: &Spec) -> Result<Self, Error> {
        spec.annotations().as_ref().map_or_else(|| Ok(Self::default()), Self::read)
    }

    fn read(annotations: &HashMap<String, String>) -> Result<Self, Error> {
        let tee = annotations.get("io.coffer.tee").cloned();
        if let Some(tee) = &tee
            && !["none", "snp", EMULATED].contains(&tee.as_str())
        {
            let wrong = format!("annotation io.coffer.tee={tee} is none of none, snp, {EMULATED}");
            return Err(Error::Bundle(wrong));
        }
        let file = annotations.get(OF_FILE).map(PathBuf::from);
        if let Some(file) = file.as_ref().filter(|file| !file.is_absolute()) {
            let wrong = format!("annotation io.coffer.initdata={} is not an absolute path", file.display());
            return Err(Error::Bundle(wrong));
        }
        let inline = annotations.get(INLINE).cloned();
        let initdata = match (file, inline) {
            (Some(_), Some(_)) => {
                let wrong = format!("annotations io.coffer.initdata and {INLINE}: write one");
                return Err(Error::Bundle(wrong));
            }
            (file, inline) => file.map(Source::File).or(inline.map(Source::Inline)),
        };
        Ok(Self { tee, initdata })
    }

    /// Whether this can be had, before anything is made: in a VM of its own, or in a pod's that runs, whose first
    /// container had these annotations.
    ///
    /// # Errors
    /// [`Error::Bundle`], naming the annotation.
    pub fn check(&self, pod: Option<&HashMap<String, String>>) -> Result<(), Error> {
        let Some(pod) = pod.map(Self::read).transpose()? else { return self.flags().map(|_| ()) };
        let has = |annotation: &str, wanted: &str, had: &str| {
            let words = format!(
                "annotation {annotation}={wanted}: the pod's VM runs already, with {had}: annotate the pod's first container, podman's infra container by podman --runtime-flag annotation={annotation}={wanted}"
            );
            Err(Error::Bundle(words))
        };
        let tee = |of: &Self| of.tee.clone().unwrap_or_else(|| "none".into());
        if self.tee.is_some() && tee(self) != tee(&pod) {
            return has("io.coffer.tee", &tee(self), &tee(&pod));
        }
        match &self.initdata {
            Some(source) if pod.initdata.as_ref() != Some(source) => {
                let had = pod.initdata.map_or_else(|| "none".into(), |had| had.to_string());
                has(source.annotation(), &source.to_string(), &had)
            }
            _ => Ok(()),
        }
    }

    /// The initdata's text.
    ///
    /// # Errors
    /// The file's, or that it is not text, or not packed text.
    pub fn initdata(&self) -> Result<Option<String>, Error> {
        let path = match &self.initdata {
            Some(Source::File(path)) => path,
            Some(Source::Inline(text)) => return unpack(text).map(Some),
            None => return Ok(None),
        };
        let mut text = String::new();
        let read = File::open(path).and_then(|file| file.take(MOST_INITDATA).read_to_string(&mut text));
        read.map_err(host(format!("read initdata {}", path.display())))?;
        Ok(Some(text))
    }

    /// Flags of the VMM: the TEE, and the digest that its launch is bound to.
    ///
    /// # Errors
    /// As [`Confidential::initdata`], or that it is not initdata, or that the operator wants no emulated machine.
    pub fn flags(&self) -> Result<Vec<String>, Error> {
        self.flags_allowed_by(Path::new(EMULATION))
    }

    fn flags_allowed_by(&self, permission: &Path) -> Result<Vec<String>, Error> {
        let Some(tee) = self.tee.as_deref().filter(|tee| *tee != "none") else { return Ok(Vec::new()) };
        let mut flags = vec!["--tee".to_owned(), tee.to_owned()];
        if tee == EMULATED {
            flags.extend(["--development-keys".to_owned(), development_root(permission)?]);
        }
        if let Some(text) = self.initdata()? {
            let initdata = Initdata::parse(text.as_bytes()).map_err(|e| Error::Bundle(e.to_string()))?;
            let digest =
                initdata.bound::<32>().iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
            flags.extend(["--host-data".to_owned(), digest]);
        }
        Ok(flags)
    }
}

/// The text of [`INLINE`].
fn unpack(packed: &str) -> Result<String, Error> {
    let wrong = |why: String| Error::Bundle(format!("annotation {INLINE}: {why}"));
    if packed.len() > MOST_INLINE {
        return Err(wrong(format!("{} characters, at most {MOST_INLINE} are read", packed.len())));
    }
    let bytes = from_base64(packed.trim()).map_err(|_| wrong("not Base64 of gzip".into()))?;
    let mut text = Vec::new();
    let read = MultiGzDecoder::new(bytes.as_slice()).take(LONGEST as u64 + 1).read_to_end(&mut text);
    read.map_err(|e| wrong(format!("not gzip in Base64: {e}")))?;
    if text.len() > LONGEST {
        return Err(wrong(format!("it unpacks to more than {LONGEST} bytes")));
    }
    String::from_utf8(text).map_err(|_| wrong("what is packed is not text".into()))
}

/// Directory of the development root, from the file with which the operator allows the emulated machine.
fn development_root(permission: &Path) -> Result<String, Error> {
    let refused = |why: String| {
        let file = permission.display();
        let what = format!("annotation io.coffer.tee={EMULATED}: this machine protects nothing");
        Error::Bundle(format!("{what}, and {why}: to develop, write a directory for its keys into {file}"))
    };
    let text = fs::read_to_string(permission)
        .map_err(|_| refused("the operator of this host has not allowed it".into()))?;
    match text.trim() {
        line if line.starts_with('/') && line.lines().count() == 1 => Ok(line.to_owned()),
        _ => Err(refused(format!("{} is not one absolute path", permission.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_machine_is_the_operators_to_allow() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("allowed");
        let pod = Confidential { tee: Some(EMULATED.into()), initdata: None };
        let message = pod.flags_allowed_by(&allowed).unwrap_err().to_string();
        assert!(message.contains("the operator of this host has not allowed it"), "{message}");
        for text in ["", "keys\n", "/keys\n/others\n"] {
            fs::write(&allowed, text).unwrap();
            let message = pod.flags_allowed_by(&allowed).unwrap_err().to_string();
            assert!(message.contains("is not one absolute path"), "{text:?}: {message}");
        }
        fs::write(&allowed, "/keys\n").unwrap();
        let flags = pod.flags_allowed_by(&allowed).unwrap();
        assert_eq!(flags, ["--tee", EMULATED, "--development-keys", "/keys"]);
        // No other kind asks for it, or gets the keys.
        let snp = Confidential { tee: Some("snp".into()), initdata: None };
        assert_eq!(snp.flags_allowed_by(&dir.path().join("none")).unwrap(), ["--tee", "snp"]);
    }

    #[test]
    fn a_container_gets_no_other_protection_than_its_pods_vm_has() {
        let with = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, v)| (format!("io.coffer.{k}"), (*v).to_owned())).collect()
        };
        let of = |pairs: &[(&str, &str)]| Confidential::read(&with(pairs)).unwrap();
        let message = of(&[("tee", "snp")]).check(Some(&with(&[]))).unwrap_err().to_string();
        assert!(message.contains("io.coffer.tee=snp: the pod's VM runs already, with none"), "{message}");
        let pod = with(&[("tee", "snp"), ("initdata", "/a")]);
        assert!(of(&[("tee", "none")]).check(Some(&pod)).is_err());
        assert!(of(&[("initdata", "/b")]).check(Some(&pod)).is_err());
        for good in [&[][..], &[("tee", "snp")], &[("tee", "snp"), ("initdata", "/a")]] {
            of(good).check(Some(&pod)).unwrap();
        }
        of(&[("tee", "none")]).check(Some(&with(&[]))).unwrap();
    }

    /// Upstream's worked vector, packed by `gzip -9n | base64 -w0`.
    const PACKED: &str = "H4sIAAAAAAACA0vMSc8vyizJyFWwVVAqzkg0tjBR4ipLLSrOzM8DCRnoGeoZKHFxRackliTGcillp1YaKoEkyhJzSlMNlbgApsk+p0EAAAA=";

    #[test]
    fn initdata_in_the_annotation_itself_is_the_same() {
        let with = |text: &str| HashMap::from([(INLINE.to_owned(), text.to_owned())]);
        let of = |text: &str| Confidential::read(&with(text)).unwrap();
        let text = "algorithm = \"sha384\"\nversion = \"0.1.0\"\n\n[data]\n\"key1\" = \"value1\"\n";
        assert_eq!(of(PACKED).initdata().unwrap().as_deref(), Some(text));
        let bound = Confidential { tee: Some("snp".into()), ..of(PACKED) }.flags().unwrap();
        assert_eq!(bound[3], "ad344b89d2a0c99aad897d9b86bb5d3e47a81d10a68ff85d050dfac2463a5420");
        of(PACKED).check(Some(&with(PACKED))).unwrap();
        let message = of(PACKED).check(Some(&HashMap::new())).unwrap_err().to_string();
        assert!(message.contains("cc_init_data=H4sI") && message.len() < 500, "{message}");
        let mut both = with(PACKED);
        both.insert("io.coffer.initdata".into(), "/a".into());
        assert!(Confidential::read(&both).unwrap_err().to_string().contains("write one"));
        // A megabyte of zeros and one more, packed to a kilobyte; and what is no such value.
        let pack = |bytes: &[u8]| {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            std::io::Write::write_all(&mut packer, bytes).unwrap();
            coffer_attestation::encoding::to_base64(&packer.finish().unwrap())
        };
        assert!(of(&pack(&vec![b' '; LONGEST])).initdata().is_ok());
        for (value, words) in [
            (pack(&vec![b' '; LONGEST + 1]), "unpacks to more than 1048576 bytes"),
            (pack(&[0xff; 8]), "not text"),
            ("?".into(), "not Base64"),
            ("aGVsbG8=".into(), "not gzip"),
            (PACKED[..PACKED.len() - 12].into(), "not gzip"),
            ("A".repeat(MOST_INLINE + 1), "at most 1048576 are read"),
        ] {
            let message = of(&value).initdata().unwrap_err().to_string();
            assert!(message.contains(INLINE) && message.contains(words), "{message}");
        }
    }

    #[test]
    fn the_launch_is_bound_to_the_files_digest() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("initdata.toml");
        // The worked vector of upstream's format; HOST_DATA is the first 32 bytes of its SHA-384.
        let text = "algorithm = \"sha384\"\nversion = \"0.1.0\"\n\n[data]\n\"key1\" = \"value1\"\n";
        std::fs::write(&file, text).unwrap();
        let mut confidential = Confidential { tee: Some("snp".into()), initdata: Some(Source::File(file)) };
        assert_eq!(
            confidential.flags().unwrap(),
            [
                "--tee",
                "snp",
                "--host-data",
                "ad344b89d2a0c99aad897d9b86bb5d3e47a81d10a68ff85d050dfac2463a5420"
            ]
        );
        assert_eq!(confidential.initdata().unwrap().as_deref(), Some(text));
        confidential.tee = None;
        assert!(confidential.flags().unwrap().is_empty());
    }
}
