//! Key rings: transferable public keys (RFC 9580, 10.1), and which of their keys may sign.
//!
//! Owns: bindings, revocations, expiry, flags. Does not own: arithmetic (`key`).
//!
//! Where gpg weighs several self-signatures against each other, the strictest counts here: a key may sign if every user of it that is not
//! revoked lets it, until the first of their dates. A revocation counts whenever it was made. What cannot be checked of the owner's own
//! words refuses the ring; certifications by others say nothing here, and are passed over.

use super::{
    OpenPgpError, armor,
    key::Key,
    packet::{Packet, packets, tag},
    signature::{Signature, kind},
};

/// Largest ring in bytes.
pub const MOST_RING: usize = 1 << 20;
/// Most keys and subkeys of a ring.
const MOST_KEYS: usize = 256;
/// Key flag (RFC 9580, 5.2.3.29): it signs data.
const SIGNS: u8 = 0x02;
const WHAT: &str = "key ring";

/// Keys, of which some may sign.
#[derive(Clone, Debug)]
pub struct Ring(Vec<Signer>);

/// A key or subkey.
#[derive(Clone, Debug)]
pub(super) struct Signer {
    pub(super) key: Key,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// From and until when, in seconds since 1970.
    Signs { since: u64, until: Option<u64> },
    /// Why not.
    Not(String),
}

impl State {
    /// Both at once.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Not(why), _) | (_, Self::Not(why)) => Self::Not(why),
            (Self::Signs { since: a, until: b }, Self::Signs { since: c, until: d }) => {
                Self::Signs { since: a.max(c), until: b.into_iter().chain(d).min() }
            }
        }
    }
}

impl Signer {
    /// Whether a signature that says it was made at `made` holds at `now`.
    pub(super) fn may_sign(&self, made: u32, now: u64) -> Result<(), OpenPgpError> {
        let refused = |why: &str| Err(OpenPgpError::Key(self.key.fingerprint, why.into()));
        match &self.state {
            State::Not(why) => refused(why),
            State::Signs { since, .. } if *since > now => {
                refused("its own signatures were made in the future: is the clock right?")
            }
            State::Signs { until: Some(until), .. } if *until <= now => refused("it has expired"),
            State::Signs { .. } if made < self.key.created => {
                refused("the signature says that it was made before the key")
            }
            State::Signs { .. } => Ok(()),
        }
    }
}

/// What a signature of a ring is over.
enum Component {
    Primary,
    User(Vec<u8>),
    /// A picture. What is said of it says nothing of the key.
    Attribute,
    Subkey(Box<Key>),
}

impl Ring {
    /// Reads a ring as `gpg --export` writes it, armoured or not.
    ///
    /// # Errors
    /// [`OpenPgpError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, OpenPgpError> {
        if bytes.len() > MOST_RING {
            return Err(OpenPgpError::Form(WHAT, "more than 1 MiB"));
        }
        if armor::is_armoured(bytes) {
            return Self::of_packets(&packets(&armor::open(bytes)?, WHAT)?);
        }
        Self::of_packets(&packets(bytes, WHAT)?)
    }

    fn of_packets(packets: &[Packet<'_>]) -> Result<Self, OpenPgpError> {
        let mut signers = Vec::new();
        let mut rest = packets;
        while let Some((first, following)) = rest.split_first() {
            if first.tag != tag::PUBLIC_KEY {
                return Err(misplaced(first.tag));
            }
            let end = following.iter().position(|packet| packet.tag == tag::PUBLIC_KEY);
            let (of_key, next) = following.split_at(end.unwrap_or(following.len()));
            transferable(Key::parse(&first.body)?, of_key, &mut signers)?;
            if signers.len() > MOST_KEYS {
                return Err(OpenPgpError::Form(WHAT, "more than 256 keys"));
            }
            rest = next;
        }
        if signers.is_empty() {
            return Err(OpenPgpError::Form(WHAT, "no key in it"));
        }
        Ok(Self(signers))
    }

    /// The keys that a signature says it is by.
    pub(super) fn by(&self, signature: &Signature) -> impl Iterator<Item = &Signer> {
        self.0.iter().filter(|signer| signature.by(&signer.key.fingerprint) == Some(true))
    }
}

fn misplaced(tag: u8) -> OpenPgpError {
    match tag {
        tag::SECRET_KEY | tag::SECRET_SUBKEY => {
            OpenPgpError::Form(WHAT, "it holds a private key: gpg --export writes the public one")
        }
        tag => OpenPgpError::Unsupported {
            object: WHAT,
            what: format!("a packet of type {tag} at this place"),
            remedy: "write it with gpg --export --export-options export-minimal",
        },
    }
}

/// One key with what belongs to it.
fn transferable(primary: Key, packets: &[Packet<'_>], signers: &mut Vec<Signer>) -> Result<(), OpenPgpError> {
    let mut groups = vec![(Component::Primary, Vec::new())];
    for packet in packets {
        let component = match packet.tag {
            tag::SIGNATURE => {
                if let Some((_, signatures)) = groups.last_mut() {
                    signatures.push(Signature::parse(&packet.body)?);
                }
                continue;
            }
            tag::USER_ID => Component::User(packet.body.to_vec()),
            tag::USER_ATTRIBUTE => Component::Attribute,
            tag::PUBLIC_SUBKEY => Component::Subkey(Box::new(Key::parse(&packet.body)?)),
            other => return Err(misplaced(other)),
        };
        groups.push((component, Vec::new()));
    }
    let mut users = Vec::new();
    // A subkey lives as long as its primary, which itself need not be for signing data.
    let mut alive = State::Signs { since: primary.created.into(), until: None };
    let mut signs = State::Signs { since: 0, until: None };
    let mut subkeys = Vec::new();
    for (component, signatures) in groups {
        match component {
            Component::Primary => {
                for signature in &signatures {
                    alive = alive.and(of_primary(&primary, signature)?);
                    signs = signs.and(allowed(signature));
                }
            }
            Component::User(name) => users.extend(of_user(&primary, &name, &signatures)?),
            Component::Attribute => of_attribute(&signatures)?,
            Component::Subkey(key) => {
                let of_subkey = of_subkey(&primary, &key, &signatures)?;
                subkeys.push((*key, of_subkey));
            }
        }
    }
    if users.is_empty() {
        alive = alive.and(State::Not("it has no user who is not revoked".into()));
    }
    for user in &users {
        alive = alive.and(lifetime(&primary, user));
        signs = signs.and(allowed(user));
    }
    signers.push(Signer { key: primary, state: alive.clone().and(signs) });
    signers.extend(subkeys.into_iter().map(|(key, state)| Signer { key, state: alive.clone().and(state) }));
    Ok(())
}

/// How long a key lives by a signature over it.
fn lifetime(key: &Key, signature: &Signature) -> State {
    let expires = signature.key_expires.map(|after| u64::from(key.created) + u64::from(after));
    let until = expires.into_iter().chain(signature.until()).min();
    State::Signs { since: key.created.max(signature.created).into(), until }
}

/// Whether a signature over a key lets it sign. Without flags it may do what its algorithm can.
fn allowed(signature: &Signature) -> State {
    match signature.flags {
        Some(flags) if flags & SIGNS == 0 => State::Not("it is not for signing data".into()),
        _ => State::Signs { since: 0, until: None },
    }
}

/// Whether a signature is by the key itself.
fn own(primary: &Key, signature: &Signature) -> Result<bool, OpenPgpError> {
    signature.by(&primary.fingerprint).ok_or(OpenPgpError::Form(WHAT, "a signature does not say by whom"))
}

/// Another's word on what only the key itself decides here.
fn foreign(signature: &Signature) -> OpenPgpError {
    OpenPgpError::Unsupported {
        object: WHAT,
        what: format!("a signature of type {:#04x} by {}", signature.kind, signature.issuer()),
        remedy: "write it with gpg --export --export-options export-minimal",
    }
}

/// What is said of the key as such.
fn of_primary(primary: &Key, signature: &Signature) -> Result<State, OpenPgpError> {
    let says = match signature.kind {
        kind::KEY_REVOCATION => State::Not("it is revoked".into()),
        kind::DIRECT => lifetime(primary, signature),
        _ => return Err(foreign(signature)),
    };
    if !own(primary, signature)? {
        return Err(foreign(signature));
    }
    signature.check(primary, &[&primary.hashed])?;
    Ok(says)
}

/// The newest word of the key on a user of it; none if he is revoked.
fn of_user(primary: &Key, name: &[u8], signatures: &[Signature]) -> Result<Option<Signature>, OpenPgpError> {
    // The packet's framing in hashes (RFC 9580, 5.2.4).
    let length = u32::try_from(name.len()).map_err(|_| OpenPgpError::Form("user", "too long"))?.to_be_bytes();
    let over: [&[u8]; 4] = [&primary.hashed, &[0xb4], &length, name];
    let (mut newest, mut revoked) = (None::<Signature>, None);
    for signature in signatures {
        let certifies = kind::CERTIFICATION.contains(&signature.kind);
        if !certifies && signature.kind != kind::CERTIFICATION_REVOCATION {
            return Err(foreign(signature));
        }
        if !own(primary, signature)? {
            continue;
        }
        signature.check(primary, &over)?;
        if !certifies {
            revoked = revoked.max(Some(signature.created));
        } else if newest.as_ref().is_none_or(|have| have.created <= signature.created) {
            newest = Some(signature.clone());
        }
    }
    // One without the key's own word is a name that somebody added.
    Ok(newest.filter(|signature| revoked.is_none_or(|at| at < signature.created)))
}

fn of_attribute(signatures: &[Signature]) -> Result<(), OpenPgpError> {
    let about_it = |signature: &&Signature| {
        kind::CERTIFICATION.contains(&signature.kind) || signature.kind == kind::CERTIFICATION_REVOCATION
    };
    match signatures.iter().find(|signature| !about_it(signature)) {
        Some(other) => Err(foreign(other)),
        None => Ok(()),
    }
}

/// What the primary says of a subkey, and the subkey of the primary.
fn of_subkey(primary: &Key, key: &Key, signatures: &[Signature]) -> Result<State, OpenPgpError> {
    let over: [&[u8]; 2] = [&primary.hashed, &key.hashed];
    let mut newest = None::<&Signature>;
    let mut revoked = false;
    for signature in signatures {
        if !own(primary, signature)? {
            return Err(foreign(signature));
        }
        signature.check(primary, &over)?;
        match signature.kind {
            kind::SUBKEY_REVOCATION => revoked = true,
            kind::SUBKEY_BINDING if newest.is_none_or(|have| have.created <= signature.created) => {
                newest = Some(signature);
            }
            kind::SUBKEY_BINDING => {}
            _ => return Err(foreign(signature)),
        }
    }
    let Some(binding) = newest else {
        return Ok(State::Not("it is a subkey that its key does not bind".into()));
    };
    if revoked {
        return Ok(State::Not("it is a revoked subkey".into()));
    }
    if binding.flags.is_none_or(|flags| flags & SIGNS == 0) {
        return Ok(State::Not("it is not for signing data".into()));
    }
    // Else somebody could bind another's key to his own, and pass for the signer of what that one signed.
    let back = match &binding.embedded {
        Some(body) => Signature::parse(body).and_then(|back| match back.kind {
            kind::PRIMARY_BINDING => back.check(key, &over).map(|()| back),
            _ => Err(OpenPgpError::Form("back signature", "it is of another type")),
        }),
        None => Err(OpenPgpError::Form("back signature", "there is none")),
    };
    Ok(match back {
        Ok(back) => {
            let until = back.until();
            lifetime(key, binding).and(State::Signs { since: back.created.into(), until })
        }
        Err(why) => State::Not(format!("it is a subkey that does not say so itself: {why}")),
    })
}
