//! A signature packet (RFC 9580, 5.2), version 4, and its subpackets.
//!
//! Owns: what it says, where from: words that are not under the signature count only if they prove themselves. Does not own: what it is
//! over, which the caller gives, and the arithmetic (`key`).
//!
//! Reading one does not fail on what is not understood, checking it does: a ring holds signatures by strangers, which nobody checks.

use super::{
    Fingerprint, OpenPgpError,
    key::{Hash, Key},
    packet::Cursor,
};

/// Signature types (RFC 9580, 5.2.1).
pub(super) mod kind {
    pub(crate) const BINARY: u8 = 0x00;
    pub(crate) const CERTIFICATION: std::ops::RangeInclusive<u8> = 0x10..=0x13;
    pub(crate) const SUBKEY_BINDING: u8 = 0x18;
    pub(crate) const PRIMARY_BINDING: u8 = 0x19;
    pub(crate) const DIRECT: u8 = 0x1f;
    pub(crate) const KEY_REVOCATION: u8 = 0x20;
    pub(crate) const SUBKEY_REVOCATION: u8 = 0x28;
    pub(crate) const CERTIFICATION_REVOCATION: u8 = 0x30;
}

/// Subpacket types (RFC 9580, 5.2.3.7).
mod sub {
    pub(super) const CREATED: u8 = 2;
    pub(super) const EXPIRES: u8 = 3;
    pub(super) const KEY_EXPIRES: u8 = 9;
    pub(super) const REVOKER: u8 = 12;
    pub(super) const ISSUER: u8 = 16;
    pub(super) const FLAGS: u8 = 27;
    pub(super) const EMBEDDED: u8 = 32;
    pub(super) const FINGERPRINT: u8 = 33;
    /// Known to say nothing of whether a signature holds: exportable, revocable, preferences, key servers, primary user, policy
    /// page, signer's user, reason, features.
    pub(super) const HARMLESS: [u8; 13] = [4, 7, 11, 21, 22, 23, 24, 25, 26, 28, 29, 30, 34];
}

/// A signature.
#[derive(Clone, Debug)]
pub(super) struct Signature {
    pub(super) kind: u8,
    pub(super) algorithm: u8,
    pub(super) hash: u8,
    /// From the version to the last subpacket that is signed, and what hashes end with.
    hashed: Vec<u8>,
    /// The digest's first bytes.
    left: [u8; 2],
    /// Integers.
    values: Vec<u8>,
    /// Says that it was made, in seconds since 1970.
    pub(super) created: u32,
    /// Seconds from then; never, if none.
    expires: Option<u32>,
    /// Seconds from the key's creation; never, if none.
    pub(super) key_expires: Option<u32>,
    /// What the key is for; anything that its algorithm can do, if none.
    pub(super) flags: Option<u8>,
    issuer: Option<[u8; 8]>,
    fingerprint: Option<[u8; 20]>,
    /// A signature by the subkey that this one binds.
    pub(super) embedded: Option<Vec<u8>>,
    /// What was not understood.
    fault: Option<OpenPgpError>,
}

impl Signature {
    /// From a packet's body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, OpenPgpError> {
        let mut cursor = Cursor::new(body, "signature");
        let version = cursor.u8()?;
        if version != 4 {
            return Err(OpenPgpError::Unsupported {
                object: "signature",
                what: format!("version {version}"),
                remedy: "sign as gpg 2.2 does, and export keys with --export-options export-minimal",
            });
        }
        let (kind, algorithm, hash) = (cursor.u8()?, cursor.u8()?, cursor.u8()?);
        let length = cursor.u16()?;
        let signed = cursor.take(usize::from(length))?;
        let length = usize::from(cursor.u16()?);
        let unsigned = cursor.take(length)?;
        let left = cursor.array()?;
        let values = cursor.rest().to_vec();
        let mut hashed = body.get(..6 + signed.len()).unwrap_or_default().to_vec();
        // Both lengths above have 16 bits.
        let trailer = u32::try_from(hashed.len()).unwrap_or(u32::MAX).to_be_bytes();
        hashed.extend_from_slice(&[4, 0xff]);
        hashed.extend_from_slice(&trailer);
        let mut this = Self {
            kind,
            algorithm,
            hash,
            hashed,
            left,
            values,
            created: 0,
            expires: None,
            key_expires: None,
            flags: None,
            issuer: None,
            fingerprint: None,
            embedded: None,
            fault: None,
        };
        let read = this.read(signed, true).and_then(|()| this.read(unsigned, false));
        this.fault = match read {
            Ok(()) if this.created == 0 => {
                Some(OpenPgpError::Form("signature", "it does not say when it was made"))
            }
            read => read.err(),
        };
        Ok(this)
    }

    /// Subpackets. What is not signed only helps to find what is.
    fn read(&mut self, area: &[u8], signed: bool) -> Result<(), OpenPgpError> {
        let mut cursor = Cursor::new(area, "signature");
        let mut had = [false; 128];
        while !cursor.is_empty() {
            let first = cursor.u8()?;
            let length = match first {
                0..=191 => usize::from(first),
                192..=254 => (usize::from(first) - 192) * 256 + usize::from(cursor.u8()?) + 192,
                255 => cursor.length()?,
            };
            let mut body = Cursor::new(cursor.take(length)?, "signature");
            let (critical, kind) = {
                let byte = body.u8()?;
                (byte & 0x80 != 0, byte & 0x7f)
            };
            let unsupported = |remedy| OpenPgpError::Unsupported {
                object: "signature",
                what: format!("{}subpacket {kind}", if signed { "" } else { "unsigned " }),
                remedy,
            };
            match (kind, signed) {
                (sub::CREATED | sub::EXPIRES | sub::KEY_EXPIRES | sub::FLAGS, true)
                    if std::mem::replace(&mut had[usize::from(kind)], true) =>
                {
                    return Err(OpenPgpError::Form("signature", "it says something twice"));
                }
                (sub::CREATED, true) => self.created = body.u32()?,
                (sub::EXPIRES, true) => self.expires = Some(body.u32()?).filter(|time| *time != 0),
                (sub::KEY_EXPIRES, true) => self.key_expires = Some(body.u32()?).filter(|time| *time != 0),
                (sub::FLAGS, true) => self.flags = Some(body.rest().first().copied().unwrap_or(0)),
                (sub::REVOKER, true) => {
                    return Err(unsupported("use a key that nobody else may revoke"));
                }
                (sub::ISSUER, _) if signed || !critical => set(&mut self.issuer, body.array()?)?,
                (sub::FINGERPRINT, _) if signed || !critical => {
                    if body.u8()? != 4 {
                        return Err(unsupported("sign with a version 4 key, as gpg 2.2 does"));
                    }
                    set(&mut self.fingerprint, body.array()?)?;
                }
                (sub::EMBEDDED, _) if signed || !critical => set(&mut self.embedded, body.rest().to_vec())?,
                (_, true) if !critical || sub::HARMLESS.contains(&kind) => {
                    let _ = body.rest();
                }
                _ => return Err(unsupported("sign as gpg 2.2 does unless it is told otherwise")),
            }
            body.end()?;
        }
        Ok(())
    }

    /// Whether it says that it is by this key; `None` if it does not say by whom.
    pub(super) fn by(&self, key: &Fingerprint) -> Option<bool> {
        let whole = self.fingerprint.map(|is| is == key.0);
        let short = self.issuer.map(|is| is == key.id());
        match (whole, short) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(true) && b.unwrap_or(true)),
        }
    }

    /// By whom it says that it is.
    pub(super) fn issuer(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02X}")).collect();
        match (self.fingerprint, self.issuer) {
            (Some(whole), _) => hex(&whole),
            (None, Some(short)) => hex(&short),
            (None, None) => "that it does not name".into(),
        }
    }

    /// The key's short name, when it says that.
    pub(super) fn issuer_id(&self) -> Option<[u8; 8]> {
        self.issuer.or(self.fingerprint.map(|whole| Fingerprint(whole).id()))
    }

    /// Whether it is by this key over these parts.
    ///
    /// # Errors
    /// [`OpenPgpError`].
    pub(super) fn check(&self, key: &Key, parts: &[&[u8]]) -> Result<(), OpenPgpError> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        if self.by(&key.fingerprint) != Some(true) {
            return Err(OpenPgpError::Stranger(self.issuer()));
        }
        let hash = Hash::numbered(self.hash)?;
        let digest = hash.over(parts.iter().copied().chain([self.hashed.as_slice()]));
        if !digest.starts_with(&self.left) {
            return Err(OpenPgpError::Forged(key.fingerprint));
        }
        key.check(self.algorithm, &digest, hash, &self.values)
    }

    /// The second since 1970 from which it says nothing more.
    pub(super) fn until(&self) -> Option<u64> {
        self.expires.map(|after| u64::from(self.created) + u64::from(after))
    }
}

/// What is said twice has to be the same.
fn set<T: PartialEq>(slot: &mut Option<T>, value: T) -> Result<(), OpenPgpError> {
    if slot.as_ref().is_some_and(|have| *have != value) {
        return Err(OpenPgpError::Form("signature", "it says two things of the same"));
    }
    *slot = Some(value);
    Ok(())
}
