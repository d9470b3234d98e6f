//! Messages from the guest to its security processor (AMD 56860, chapter 7): AES-256-GCM with the keys of the secrets page.
//!
//! Owns: the envelope, sequence numbers, and which request gets which answer. Does not own: the report's bytes
//! ([`super::report`]), the keys that sign it ([`super::chain`]).

use std::path::PathBuf;

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Payload},
};
use coffer_layout::PAGE;

use super::{chain::Chain, psp::Guest, report};
use crate::tee::snp::digest;

/// Statuses that a message can get.
#[expect(missing_docs, reason = "the names are the ABI's")]
pub mod status {
    pub const INVALID_PARAM: u32 = 0x16;
    pub const AEAD_OFLOW: u32 = 0x1d;
    pub const BAD_SIGNATURE: u32 = 0x0a;
}

const HEADER: usize = 96;
const TAG: usize = 16;
const SEQUENCE: std::ops::Range<usize> = 32..40;
const ADDITIONAL_DATA: usize = 48;
const ALGORITHM: usize = 48;
const HEADER_VERSION: usize = 49;
const HEADER_SIZE: usize = 50;
const TYPE: usize = 52;
const MESSAGE_VERSION: usize = 53;
const MESSAGE_SIZE: usize = 54;
const MESSAGE_KEY: usize = 60;
const AES_256_GCM: u8 = 1;

const KEY_REQUEST: u8 = 3;
const REPORT_REQUEST: u8 = 5;

/// A guest's security processor.
pub struct SecurityProcessor {
    /// The guest.
    pub guest: Guest,
    /// Family, model and stepping of the processor, as reports give them: CPUID 1's EAX.
    pub signature: u32,
    keys: PathBuf,
    chain: Option<Chain>,
    certificates: Option<Vec<u8>>,
}

impl SecurityProcessor {
    /// `keys` is the directory of the development root, made on first use; `certificates` is what extended requests get in
    /// place of that root's.
    ///
    /// # Errors
    /// The host has no randomness.
    pub fn new(keys: PathBuf, certificates: Option<Vec<u8>>, signature: u32) -> std::io::Result<Self> {
        Ok(Self { guest: Guest::new()?, signature, keys, chain: None, certificates })
    }

    fn chain(&mut self) -> Result<&Chain, String> {
        if self.chain.is_none() {
            self.chain = Some(Chain::open(&self.keys).map_err(|e| e.to_string())?);
        }
        self.chain.as_ref().ok_or_else(|| "no development root".to_owned())
    }

    /// The certificate table for extended requests.
    ///
    /// # Errors
    /// In words.
    pub fn certificates(&mut self) -> Result<Vec<u8>, String> {
        match &self.certificates {
            Some(table) => Ok(table.clone()),
            None => Ok(self.chain()?.table()),
        }
    }

    /// Answers a message page.
    ///
    /// # Errors
    /// The firmware's status.
    pub fn answer(&mut self, page: &[u8; PAGE as usize]) -> Result<Box<[u8; PAGE as usize]>, u32> {
        let number = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        let size = usize::from(number(MESSAGE_SIZE));
        let key = usize::from(page[MESSAGE_KEY]);
        let well_formed = page[ALGORITHM] == AES_256_GCM
            && page[HEADER_VERSION] == 1
            && usize::from(number(HEADER_SIZE)) == HEADER
            && size <= PAGE as usize - HEADER
            && key < self.guest.message_keys.len();
        if !well_formed {
            return Err(status::INVALID_PARAM);
        }
        let sequence = u64::from_le_bytes(std::array::from_fn(|i| page[SEQUENCE.start + i]));
        let expected = self.guest.message_counts[key].checked_add(1);
        if Some(sequence) != expected {
            return Err(status::AEAD_OFLOW);
        }
        let request =
            open(&self.guest.message_keys[key], page, sequence, size).ok_or(status::BAD_SIGNATURE)?;
        let reply = match page[TYPE] {
            REPORT_REQUEST => self.report(&request, key as u32)?,
            KEY_REQUEST => self.derive(&request, key as u32)?,
            _ => return Err(status::INVALID_PARAM),
        };
        self.guest.message_counts[key] = sequence + 1;
        let mut answer = Box::new([0; PAGE as usize]);
        answer[ADDITIONAL_DATA..HEADER].copy_from_slice(&page[ADDITIONAL_DATA..HEADER]);
        answer[SEQUENCE].copy_from_slice(&(sequence + 1).to_le_bytes());
        answer[TYPE] = page[TYPE] + 1;
        answer[MESSAGE_VERSION] = page[MESSAGE_VERSION];
        answer[MESSAGE_SIZE..MESSAGE_SIZE + 2].copy_from_slice(&(reply.len() as u16).to_le_bytes());
        seal(&self.guest.message_keys[key], &mut answer, sequence + 1, &reply)
            .ok_or(status::INVALID_PARAM)?;
        Ok(answer)
    }

    /// MSG_REPORT_REQ: 64 bytes of data, VMPL, which key signs. Answer: status, size, 24 bytes, the report.
    fn report(&mut self, request: &[u8], key_level: u32) -> Result<Vec<u8>, u32> {
        const LENGTH: usize = 96;
        let request: &[u8; LENGTH] = request.try_into().map_err(|_| status::INVALID_PARAM)?;
        let level = u32::from_le_bytes([request[64], request[65], request[66], request[67]]);
        if level < key_level || level > 3 {
            return Err(status::INVALID_PARAM);
        }
        let signature = self.signature;
        let data: [u8; 64] = std::array::from_fn(|i| request[i]);
        self.chain().map_err(|_| status::INVALID_PARAM)?;
        let Some(chain) = &self.chain else { return Err(status::INVALID_PARAM) };
        let report = report::signed(&self.guest, &data, level, signature, chain);
        let mut reply = vec![0; 32];
        reply[4..8].copy_from_slice(&(report.len() as u32).to_le_bytes());
        reply.extend_from_slice(&report[..]);
        Ok(reply)
    }

    /// MSG_KEY_REQ: which root, which fields go in, VMPL, security version, TCB. Answer: status, 28 bytes, the key. The
    /// firmware's derivation is not published; this one binds to the same fields, and to this development root.
    fn derive(&mut self, request: &[u8], key_level: u32) -> Result<Vec<u8>, u32> {
        const LENGTH: usize = 32;
        const ROOT: u32 = 7;
        let request: &[u8; LENGTH] = request.try_into().map_err(|_| status::INVALID_PARAM)?;
        let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| request[at + i]));
        let (root, fields, level, version) = (number(0), number(8), number(16), number(20));
        let identity = self.guest.identity.clone();
        if root & !ROOT != 0 || level < key_level || level > 3 || version > identity.guest_svn {
            return Err(status::INVALID_PARAM);
        }
        let secret = self.chain().map_err(|_| status::INVALID_PARAM)?.secret();
        let mut material = b"coffer emulated SNP derived key\0".to_vec();
        material.extend_from_slice(&secret);
        material.extend_from_slice(request);
        let parts: [&[u8]; 4] =
            [&self.guest.policy.to_le_bytes(), &identity.image_id, &identity.family_id, &self.guest.digest];
        for (bit, part) in parts.iter().enumerate().filter(|(bit, _)| fields >> bit & 1 != 0) {
            material.push(bit as u8);
            material.extend_from_slice(part);
        }
        let mut reply = vec![0; 32];
        reply.extend_from_slice(&digest::sha384(&material)[..32]);
        Ok(reply)
    }
}

fn nonce(sequence: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&sequence.to_le_bytes());
    nonce
}

/// The text of a message; the tag lies in the header.
fn open(key: &[u8; 32], page: &[u8; PAGE as usize], sequence: u64, size: usize) -> Option<Vec<u8>> {
    let mut text = page.get(HEADER..HEADER + size)?.to_vec();
    text.extend_from_slice(&page[..TAG]);
    let payload = Payload { msg: &text, aad: &page[ADDITIONAL_DATA..HEADER] };
    Aes256Gcm::new(key.into()).decrypt(&nonce(sequence).into(), payload).ok()
}

fn seal(key: &[u8; 32], page: &mut [u8; PAGE as usize], sequence: u64, text: &[u8]) -> Option<()> {
    let payload = Payload { msg: text, aad: &page[ADDITIONAL_DATA..HEADER] };
    let sealed = Aes256Gcm::new(key.into()).encrypt(&nonce(sequence).into(), payload).ok()?;
    let (text, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG)?)?;
    page.get_mut(HEADER..HEADER + text.len())?.copy_from_slice(text);
    page[..TAG].copy_from_slice(tag);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sev::{
        certs::snp::{Chain as SevChain, Verifiable},
        firmware::guest::AttestationReport,
        parser::ByteParser,
    };

    fn processor() -> (tempfile::TempDir, SecurityProcessor) {
        let directory = tempfile::tempdir().unwrap();
        let mut processor = SecurityProcessor::new(directory.path().join("root"), None, 0x00a0_0f11).unwrap();
        processor.guest.digest = [0xd1; 48];
        processor.guest.host_data = [0x4d; 32];
        processor.guest.policy = 0x30000;
        (directory, processor)
    }

    /// A request as Linux's sev-guest driver makes it (`struct snp_guest_msg_hdr`).
    fn request(key: &[u8; 32], number: u8, sequence: u64, kind: u8, text: &[u8]) -> Box<[u8; PAGE as usize]> {
        let mut page = Box::new([0; PAGE as usize]);
        page[32..40].copy_from_slice(&sequence.to_le_bytes());
        (page[48], page[49], page[50], page[52], page[53], page[60]) = (1, 1, 96, kind, 1, number);
        page[54..56].copy_from_slice(&(text.len() as u16).to_le_bytes());
        seal(key, &mut page, sequence, text).unwrap();
        page
    }

    fn read(key: &[u8; 32], page: &[u8; PAGE as usize], sequence: u64) -> Vec<u8> {
        let size = usize::from(u16::from_le_bytes([page[54], page[55]]));
        assert_eq!(page[32..40], sequence.to_le_bytes());
        open(key, page, sequence, size).unwrap()
    }

    fn certificates(table: &[u8]) -> Vec<&[u8]> {
        let number = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap()) as usize;
        let entries = (0..).map(|i| i * 24).take_while(|at| number(at + 20) != 0);
        entries.map(|at| &table[number(at + 16)..][..number(at + 20)]).collect()
    }

    /// The `sev` crate is the judge: chain, signature, and each field where it looks for it.
    #[test]
    fn the_sev_crate_verifies_a_report_and_its_chain() {
        let (_directory, mut processor) = processor();
        let key = processor.guest.message_keys[0];
        let mut text = [0; 96];
        text[..64].copy_from_slice(&[0x5a; 64]);
        let reply = processor.answer(&request(&key, 0, 1, 5, &text)).unwrap();
        assert_eq!((reply[52], reply[53]), (6, 1));
        let reply = read(&key, &reply, 2);
        assert_eq!(reply[..8], [0, 0, 0, 0, 0xa0, 4, 0, 0]);
        let bytes: [u8; report::REPORT] = reply[32..].try_into().unwrap();
        let report = AttestationReport::from_bytes(&bytes).unwrap();
        assert_eq!((report.version, report.policy.0, report.vmpl), (3, 0x30000, 0));
        assert_eq!(report.measurement[..], [0xd1; 48]);
        assert_eq!(report.host_data[..], [0x4d; 32]);
        assert_eq!(report.report_data[..], [0x5a; 64]);
        let table = processor.certificates().unwrap();
        let [vcek, ask, ark] = certificates(&table)[..] else { panic!("not three certificates") };
        let chain = SevChain::from_der(ark, ask, vcek).unwrap();
        (&chain, &report).verify().unwrap();
        // A changed report is none.
        let mut changed = bytes;
        changed[0x90] ^= 1;
        assert!((&chain, &AttestationReport::from_bytes(&changed).unwrap()).verify().is_err());
    }

    /// A verifier that trusts AMD: its roots from the `sev` crate, each generation's.
    #[test]
    fn no_root_of_amds_vouches_for_a_report() {
        use sev::certs::snp::{Certificate, builtin, ca};
        let (_directory, mut processor) = processor();
        let key = processor.guest.message_keys[0];
        let reply = processor.answer(&request(&key, 0, 1, 5, &[0; 96])).unwrap();
        let report = AttestationReport::from_bytes(&read(&key, &reply, 2)[32..]).unwrap();
        let table = processor.certificates().unwrap();
        let [vcek, ask, ark] = certificates(&table)[..] else { panic!("not three certificates") };
        let ours = SevChain::from_der(ark, ask, vcek).unwrap();
        (&ours, &report).verify().unwrap();
        let amds = [
            (builtin::milan::ark(), builtin::milan::ask()),
            (builtin::genoa::ark(), builtin::genoa::ask()),
            (builtin::turin::ark(), builtin::turin::ask()),
        ];
        for (ark, ask) in amds {
            let (ark, ask) = (ark.unwrap(), ask.unwrap());
            let vek = || Certificate::from_der(vcek).unwrap();
            // AMD's own two are sound; ours hangs from neither of them, nor its ASK from AMD's root.
            (&ark, &ask).verify().unwrap();
            let under_ask = SevChain { ca: ca::Chain { ark: ark.clone(), ask }, vek: vek() };
            assert!((&under_ask, &report).verify().is_err());
            let under_root = SevChain { ca: ca::Chain { ark, ask: ours.ca.ask.clone() }, vek: vek() };
            assert!((&under_root, &report).verify().is_err());
        }
    }

    #[test]
    fn a_report_of_any_host_is_one_that_verifiers_know() {
        let (_directory, mut processor) = processor();
        let key = processor.guest.message_keys[0];
        // Milan, Genoa, Turin, Naples as QEMU has it, an Intel.
        let hosts = [0x00a0_0f11, 0x00a1_0f11, 0x00b0_0f21, 0x0080_0f12, 0x0009_06ea];
        for (turn, host) in hosts.into_iter().enumerate() {
            processor.signature = host;
            let sequence = 1 + 2 * turn as u64;
            let reply = processor.answer(&request(&key, 0, sequence, 5, &[0; 96])).unwrap();
            let reply = read(&key, &reply, sequence + 1);
            let report = AttestationReport::from_bytes(&reply[32..]);
            let report = report.unwrap_or_else(|e| panic!("{host:#x}: {e}"));
            let table = processor.certificates().unwrap();
            let [vcek, ask, ark] = certificates(&table)[..] else { panic!("not three certificates") };
            (&SevChain::from_der(ark, ask, vcek).unwrap(), &report).verify().unwrap();
        }
    }

    #[test]
    fn the_root_is_made_once_and_names_itself_a_development_one() {
        let (directory, mut processor) = processor();
        let table = processor.certificates().unwrap();
        let again = Chain::open(&directory.path().join("root")).unwrap();
        assert_eq!(again.table(), table);
        let ark = certificates(&table)[2];
        let name = b"ARK-COFFER-DEVELOPMENT";
        assert!(ark.windows(name.len()).any(|w| w == name));
    }

    #[test]
    fn messages_that_are_repeated_forged_or_malformed_get_a_status() {
        let (_directory, mut processor) = processor();
        let key = processor.guest.message_keys[1];
        let good = request(&key, 1, 1, 3, &{
            let mut text = [0; 32];
            text[16] = 1;
            text
        });
        let mut forged = good.clone();
        forged[100] ^= 1;
        assert_eq!(processor.answer(&forged).unwrap_err(), status::BAD_SIGNATURE);
        assert!(processor.answer(&good).is_ok());
        assert_eq!(processor.answer(&good).unwrap_err(), status::AEAD_OFLOW);
        for (at, value) in [(48, 2), (49, 0), (50, 95), (55, 0xff), (60, 4)] {
            let mut page = request(&key, 1, 3, 3, &[0; 32]);
            page[at] = value;
            assert_eq!(processor.answer(&page).unwrap_err(), status::INVALID_PARAM, "{at}");
        }
        // VMPL 0 is out of reach for the key of VMPL 1, and kinds that there are not.
        assert_eq!(processor.answer(&request(&key, 1, 3, 3, &[0; 32])).unwrap_err(), status::INVALID_PARAM);
        assert_eq!(processor.answer(&request(&key, 1, 3, 9, &[0; 32])).unwrap_err(), status::INVALID_PARAM);
    }

    #[test]
    fn derived_keys_depend_on_what_was_asked_for() {
        let (_directory, mut processor) = processor();
        let key = processor.guest.message_keys[0];
        let mut sequence = 1;
        let mut derive = |processor: &mut SecurityProcessor, fields: u8| {
            let mut text = [0; 32];
            text[8] = fields;
            let reply = processor.answer(&request(&key, 0, sequence, 3, &text)).unwrap();
            sequence += 2;
            read(&key, &reply, sequence - 1)[32..].to_vec()
        };
        let plain = derive(&mut processor, 0);
        let measured = derive(&mut processor, 8);
        assert_eq!(derive(&mut processor, 0), plain);
        assert_ne!(plain, measured);
        processor.guest.digest[0] ^= 1;
        assert_eq!(derive(&mut processor, 0), plain);
        assert_ne!(derive(&mut processor, 8), measured);
    }
}
