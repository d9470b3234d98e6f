//! The security processor in software: takes the launch commands, keeps the digest, makes the secrets page.
//!
//! Owns: what the firmware would do at a launch (AMD 56860, chapter 8). Does not own: page states ([`super::rmp`]), messages
//! from the guest ([`super::messages`]).

use coffer_layout::{PAGE, snp::VMSA_GPA};

use super::{
    rmp::Rmp,
    views::{View, Views},
};
use crate::tee::snp::{
    abi::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes, policy},
    digest::{self, PageType, Sha},
    launch::{Command, Failure, Host},
    plan::Identity,
    vmsa::Vmsa,
};

const INVALID_GUEST_STATE: u32 = 0x02;
const POLICY_FAILURE: u32 = 0x07;
const BAD_SIGNATURE: u32 = 0x0a;
const BAD_MEASUREMENT: u32 = 0x0b;
const INVALID_PARAM: u32 = 0x16;
const INVALID_PAGE_STATE: u32 = 0x1a;

/// Version of the secrets page.
const SECRETS_VERSION: u32 = 3;

/// Bytes of a key for messages.
pub const KEY: usize = 32;

/// What the security processor knows of its guest.
#[derive(Debug)]
pub struct Guest {
    /// LAUNCH_START was given.
    started: bool,
    /// LAUNCH_FINISH was given.
    pub finished: bool,
    /// Guest policy.
    pub policy: u64,
    /// Launch digest so far.
    pub digest: Sha,
    /// HOST_DATA.
    pub host_data: [u8; 32],
    /// Family and image id, security version, and digests of the keys that signed the image's identity.
    pub identity: GuestIdentity,
    /// Keys of the four privilege levels' messages.
    pub message_keys: [[u8; KEY]; 4],
    /// Numbers of the messages with each key.
    pub message_counts: [u64; 4],
    /// The same for the life of this guest.
    pub report_id: [u8; 32],
}

/// What reports say of a signed image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the report's")]
pub struct GuestIdentity {
    pub family_id: [u8; 16],
    pub image_id: [u8; 16],
    pub guest_svn: u32,
    pub id_key_digest: Option<Sha>,
    pub author_key_digest: Option<Sha>,
}

impl Guest {
    /// A guest that is to be launched, with new keys.
    ///
    /// # Errors
    /// The host has no randomness.
    pub fn new() -> std::io::Result<Self> {
        let mut random = [0; 4 * KEY + 32];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        Ok(Self {
            started: false,
            finished: false,
            policy: 0,
            digest: [0; 48],
            host_data: [0; 32],
            identity: GuestIdentity::default(),
            message_keys: std::array::from_fn(|key| std::array::from_fn(|i| random[key * KEY + i])),
            message_counts: [0; 4],
            report_id: std::array::from_fn(|i| random[4 * KEY + i]),
        })
    }

    /// SNP secrets page: version, keys at 0x20, the rest is the guest's.
    fn secrets(&self) -> [u8; PAGE as usize] {
        let mut page = [0; PAGE as usize];
        page[..4].copy_from_slice(&SECRETS_VERSION.to_le_bytes());
        for (to, key) in page[0x20..].chunks_exact_mut(KEY).zip(self.message_keys) {
            to.copy_from_slice(&key);
        }
        page
    }
}

/// The security processor while it launches a guest, behind the interface that KVM has on hardware.
pub struct Launching<'a> {
    /// The guest.
    pub guest: &'a mut Guest,
    /// Its pages.
    pub rmp: &'a mut Rmp,
    /// Its memory.
    pub views: &'a Views,
    /// State of the first processor.
    pub vmsa: &'a Vmsa,
    /// Processors.
    pub vcpus: u32,
    /// The image's identity; the command has only its address.
    pub identity: Option<&'a Identity>,
}

fn refused(status: u32) -> Failure {
    Failure { errno: libc::EIO, status }
}

impl Launching<'_> {
    fn start(&mut self, wanted: u64) -> Result<(), Failure> {
        if self.guest.started {
            return Err(Failure { errno: libc::EINVAL, status: 0 });
        }
        if wanted & policy::ONE == 0 || wanted & policy::SMT == 0 || wanted & !policy::KNOWN != 0 {
            return Err(refused(POLICY_FAILURE));
        }
        (self.guest.started, self.guest.policy) = (true, wanted);
        Ok(())
    }

    /// One page; like KVM, which gives the firmware one command for each.
    fn launch_page(&mut self, gpa: u64, kind: PageType) -> Result<(), Failure> {
        if !self.guest.started || self.guest.finished {
            return Err(refused(INVALID_GUEST_STATE));
        }
        let Some(mut page) = self.page(gpa) else {
            return Err(Failure { errno: libc::EFAULT, status: 0 });
        };
        self.rmp
            .launch(gpa / PAGE)
            .map_err(|_| Failure { errno: libc::EEXIST, status: INVALID_PAGE_STATE })?;
        match kind {
            PageType::Secrets => page = self.guest.secrets(),
            PageType::Zero => page.fill(0),
            PageType::Vmsa => return Err(refused(INVALID_PARAM)),
            PageType::Normal | PageType::Unmeasured | PageType::Cpuid => {}
        }
        self.guest.digest = digest::extend(&self.guest.digest, kind, gpa, &page);
        let opened = self.views.open(View::Private, gpa, PAGE, true).is_ok();
        match opened && self.views.write(View::Private, gpa, &page) {
            true => Ok(()),
            false => Err(Failure { errno: libc::EFAULT, status: 0 }),
        }
    }

    fn finish(&mut self, host_data: [u8; 32], identified: bool) -> Result<(), Failure> {
        if !self.guest.started || self.guest.finished {
            return Err(refused(INVALID_GUEST_STATE));
        }
        let mut digest = digest::extend(&self.guest.digest, PageType::Vmsa, VMSA_GPA, self.vmsa.bytes());
        let other = Vmsa::of_reset();
        for _ in 1..self.vcpus {
            digest = digest::extend(&digest, PageType::Vmsa, VMSA_GPA, other.bytes());
        }
        self.guest.digest = digest;
        if let Some(identity) = self.identity.filter(|_| identified) {
            self.guest.identity = check_identity(identity, &digest, self.guest.policy).map_err(refused)?;
        }
        (self.guest.finished, self.guest.host_data) = (true, host_data);
        Ok(())
    }
}

/// Digest, policy and signatures of an identity, as LAUNCH_FINISH checks them.
fn check_identity(identity: &Identity, digest: &Sha, policy: u64) -> Result<GuestIdentity, u32> {
    let (block, auth) = (&identity.block, &identity.auth);
    if block[..48] != digest[..] {
        return Err(BAD_MEASUREMENT);
    }
    if block[88..] != policy.to_le_bytes() {
        return Err(POLICY_FAILURE);
    }
    const KEY_SIZE: usize = 1028;
    let (id_key, author_key) = (&auth[0x240..0x240 + KEY_SIZE], &auth[0x880..0x880 + KEY_SIZE]);
    verify(&block[..], &auth[0x40..0x40 + 144], id_key)?;
    if identity.author {
        verify(id_key, &auth[0x680..0x680 + 144], author_key)?;
    }
    Ok(GuestIdentity {
        family_id: std::array::from_fn(|i| block[48 + i]),
        image_id: std::array::from_fn(|i| block[64 + i]),
        guest_svn: u32::from_le_bytes(std::array::from_fn(|i| block[84 + i])),
        id_key_digest: Some(digest::sha384(id_key)),
        author_key_digest: identity.author.then(|| digest::sha384(author_key)),
    })
}

/// ECDSA with P-384 and SHA-384; numbers are little-endian in 72 bytes.
fn verify(message: &[u8], signature: &[u8], key: &[u8]) -> Result<(), u32> {
    use p384::ecdsa::{Signature, VerifyingKey, signature::Verifier};
    const CURVE_P384: [u8; 4] = [2, 0, 0, 0];
    let number = |bytes: &[u8]| -> [u8; 48] { std::array::from_fn(|i| bytes[47 - i]) };
    let mut point = [4; 97];
    point[1..49].copy_from_slice(&number(&key[4..]));
    point[49..].copy_from_slice(&number(&key[76..]));
    let key = VerifyingKey::from_sec1_bytes(&point).ok().filter(|_| key[..4] == CURVE_P384);
    let signature = Signature::from_scalars(number(signature), number(&signature[72..])).ok();
    match (key, signature) {
        (Some(key), Some(signature)) if key.verify(message, &signature).is_ok() => Ok(()),
        _ => Err(BAD_SIGNATURE),
    }
}

impl Host for Launching<'_> {
    fn encrypt(&mut self, command: &mut Command<'_>) -> Result<(), Failure> {
        match command {
            Command::Init(init) if init.vmsa_features == 0 => Ok(()),
            Command::Init(_) => Err(Failure { errno: libc::EINVAL, status: 0 }),
            Command::Start(start) => self.start(start.policy),
            Command::Update(update) => {
                let kind = PageType::from_number(update.type_);
                let kind = kind.ok_or(Failure { errno: libc::EINVAL, status: 0 })?;
                while update.len >= PAGE {
                    self.launch_page(update.gfn_start.wrapping_mul(PAGE), kind)?;
                    update.gfn_start += 1;
                    update.uaddr += PAGE;
                    update.len -= PAGE;
                }
                Ok(())
            }
            Command::Finish(finish) => self.finish(finish.host_data, finish.id_block_en != 0),
        }
    }

    fn set_attributes(&mut self, attributes: &kvm_memory_attributes) -> Result<(), i32> {
        // All of RAM is assigned to the guest from the beginning; nothing else is asked for at a launch.
        if attributes.attributes == u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }

    fn address(&self, gpa: u64, size: u64) -> Option<u64> {
        self.views.address(gpa, size)
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) -> bool {
        // RAM's shared view is closed, because all of it is the guest's; the window's is open.
        let size = (bytes.len() as u64).next_multiple_of(PAGE);
        let _ = self.views.open(View::Shared, gpa, size, true);
        self.views.write(View::Shared, gpa, bytes)
    }

    fn page(&self, gpa: u64) -> Option<[u8; PAGE as usize]> {
        let mut page = [0; PAGE as usize];
        self.views.open(View::Shared, gpa, PAGE, true).ok()?;
        self.views.read(View::Shared, gpa, &mut page).then_some(page)
    }

    fn discard(&mut self, gpa: u64, size: u64) {
        // Closed again even if the memory cannot be given back.
        let _ = self.views.discard(View::Shared, gpa, size);
        let _ = self.views.open(View::Shared, gpa, size, false);
    }
}

#[cfg(test)]
mod tests;
