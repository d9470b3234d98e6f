//! Attestation reports, version 3 (AMD 56860, table 23), signed by the development key.
//!
//! Owns: the report's bytes. Nothing here proves anything: the key lies in a file.

use super::{chain::Chain, psp::Guest};

/// Bytes of a report.
pub const REPORT: usize = 0x4a0;
/// Bytes that are signed; the signature follows.
pub const SIGNED: usize = 0x2a0;

/// Version of the firmware that is played, and security versions: boot loader, TEE, SNP, microcode.
pub const TCB: u64 = 0xd7_16_00_00_00_00_00_04;
const FIRMWARE: (u8, u8, u8) = (21, 55, 1);

/// A signed report.
#[must_use]
pub fn signed(guest: &Guest, data: &[u8; 64], vmpl: u32, signature: u32, chain: &Chain) -> Box<[u8; REPORT]> {
    let mut report = Box::new([0; REPORT]);
    let mut put = |at: usize, bytes: &[u8]| report[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &3u32.to_le_bytes());
    put(0x04, &guest.identity.guest_svn.to_le_bytes());
    put(0x08, &guest.policy.to_le_bytes());
    put(0x10, &guest.identity.family_id);
    put(0x20, &guest.identity.image_id);
    put(0x30, &vmpl.to_le_bytes());
    // ECDSA P-384 with SHA-384.
    put(0x34, &1u32.to_le_bytes());
    put(0x38, &TCB.to_le_bytes());
    // SMT is enabled, nothing else.
    put(0x40, &1u64.to_le_bytes());
    // Author's key; the VCEK signs.
    put(0x48, &u32::from(guest.identity.author_key_digest.is_some()).to_le_bytes());
    put(0x50, data);
    put(0x90, &guest.digest);
    put(0xc0, &guest.host_data);
    put(0xe0, &guest.identity.id_key_digest.unwrap_or([0; 48]));
    put(0x110, &guest.identity.author_key_digest.unwrap_or([0; 48]));
    put(0x140, &guest.report_id);
    // No migration agent.
    put(0x160, &[0xff; 32]);
    put(0x180, &TCB.to_le_bytes());
    let (family, model, stepping) = family_model_stepping(signature);
    put(0x188, &[family, model, stepping]);
    put(0x1a0, &chain.chip_id());
    put(0x1e0, &TCB.to_le_bytes());
    let (build, minor, major) = FIRMWARE;
    put(0x1e8, &[build, minor, major, 0, build, minor, major, 0]);
    put(0x1f0, &TCB.to_le_bytes());
    let (r, s) = chain.sign(&report[..SIGNED]);
    report[SIGNED..SIGNED + 72].copy_from_slice(&r);
    report[SIGNED + 72..SIGNED + 144].copy_from_slice(&s);
    report
}

/// Extended family and model from CPUID 1's EAX, when they are Milan's or Genoa's, whose TCB has the form of [`TCB`]. Any
/// other host plays a Milan: verifiers know no report of a processor without SEV-SNP.
fn family_model_stepping(signature: u32) -> (u8, u8, u8) {
    let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
    let model = signature >> 4 & 0xf | signature >> 12 & 0xf0;
    match (family, model) {
        (0x19, 0..=0x1f | 0xa0..=0xaf) => (family as u8, model as u8, (signature & 0xf) as u8),
        _ => (0x19, 1, 1),
    }
}
