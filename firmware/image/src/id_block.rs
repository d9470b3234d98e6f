//! The ID block: the launch digest signed, so that the firmware refuses to finish any other launch.
//!
//! Owns: the signed bytes (AMD 56860, tables "ID Block" and "ID Authentication Information") and their IGVM directive.
//! Signatures are deterministic (RFC 6979): the same key and image give the same bytes.

use coffer_layout::snp::POLICY;
use igvm::IgvmDirectiveHeader;
use igvm_defs::{IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE};
use p384::{
    SecretKey,
    ecdsa::{Signature, SigningKey, signature::Signer},
    elliptic_curve::sec1::ToSec1Point,
};

use crate::{build::Signing, platform::SNP_MASK};

/// Version of the structure.
const VERSION: u32 = 1;
/// ECDSA P-384 with SHA-384.
const ALGORITHM: u32 = 1;
/// Curve P-384.
const CURVE: u32 = 2;
/// Bytes of a public key in the firmware's form: curve, x and y of 72 bytes, zeros up to here.
const KEY_SIZE: usize = 0x404;

/// The signed structure, 96 bytes.
#[must_use]
pub fn id_block(digest: &[u8; 48]) -> [u8; 96] {
    let mut block = [0; 96];
    block[..48].copy_from_slice(digest);
    // Family and image id, 32 bytes, are zero: the digest says all.
    block[80..84].copy_from_slice(&VERSION.to_le_bytes());
    block[88..].copy_from_slice(&POLICY.to_le_bytes());
    block
}

/// The directive for a digest.
pub(crate) fn directive(digest: &[u8; 48], signing: &Signing) -> IgvmDirectiveHeader {
    let id_public_key = public_key(&signing.id_key);
    let (author_key_signature, author_public_key) = match &signing.author_key {
        Some(author) => (sign(author, &firmware_key(&id_public_key)), public_key(author)),
        None => (IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: [0; 72], s_comp: [0; 72] }, no_key()),
    };
    let has_author = signing.author_key.is_some();
    IgvmDirectiveHeader::SnpIdBlock {
        compatibility_mask: SNP_MASK,
        author_key_enabled: u8::from(has_author),
        reserved: [0; 3],
        ld: *digest,
        family_id: [0; 16],
        image_id: [0; 16],
        version: VERSION,
        guest_svn: 0,
        id_key_algorithm: ALGORITHM,
        author_key_algorithm: if has_author { ALGORITHM } else { 0 },
        id_key_signature: Box::new(sign(&signing.id_key, &id_block(digest))),
        id_public_key: Box::new(id_public_key),
        author_key_signature: Box::new(author_key_signature),
        author_public_key: Box::new(author_public_key),
    }
}

fn sign(key: &SecretKey, message: &[u8]) -> IGVM_VHS_SNP_ID_BLOCK_SIGNATURE {
    let signature: Signature = SigningKey::from(key).sign(message);
    let (r, s) = signature.split_bytes();
    IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: reversed(&r), s_comp: reversed(&s) }
}

fn public_key(key: &SecretKey) -> IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
    let point = key.public_key().to_sec1_point(false);
    // 0x04, then x and y of 48 bytes.
    let bytes = point.as_bytes();
    IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
        curve: CURVE,
        reserved: 0,
        qx: reversed(&bytes[1..49]),
        qy: reversed(&bytes[49..97]),
    }
}

fn no_key() -> IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
    IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY { curve: 0, reserved: 0, qx: [0; 72], qy: [0; 72] }
}

/// What the author key signs: the ID key as the firmware has it.
fn firmware_key(key: &IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY) -> [u8; KEY_SIZE] {
    let mut bytes = [0; KEY_SIZE];
    bytes[..4].copy_from_slice(&key.curve.to_le_bytes());
    bytes[4..76].copy_from_slice(&key.qx);
    bytes[76..148].copy_from_slice(&key.qy);
    bytes
}

/// Big-endian to the firmware's little-endian numbers of 72 bytes.
fn reversed(number: &[u8]) -> [u8; 72] {
    let mut bytes = [0; 72];
    for (to, from) in bytes.iter_mut().zip(number.iter().rev()) {
        *to = *from;
    }
    bytes
}
