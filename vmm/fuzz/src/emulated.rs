//! The emulated SNP machine: GHCB protocol, page states, messages to the security processor.

use std::sync::{Mutex, OnceLock};

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Payload},
};
use coffer_layout::PAGE;
use coffer_vmm::tee::emulated::{
    C_BIT,
    ghcb::{self, Answer, Ghcb, Hypervisor},
    messages::SecurityProcessor,
    rmp::{Rmp, State},
};

use crate::input::Input;

const RAM: [(u64, u64); 2] = [(0, 4 << 20), (4 << 30, 2 << 20)];
const PAGES: u64 = 1536;
/// The GHCB's address.
const AT: u64 = 0x5000;
/// Fields of the page that requests use: rax, rcx, rdx, rbx, exit code, information 1 and 2, scratch.
const FIELDS: [usize; 8] = [0x1f8, 0x308, 0x310, 0x318, 0x390, 0x398, 0x3a0, 0x3a8];

/// Page states behind the protocol.
struct Machine(Rmp);

/// An independent word on which changes a page may make: `(before, after)`.
fn check(before: Option<State>, after: Option<State>) {
    use State::{Assigned, Launched, Shared, Validated, Vmsa};
    let legal = match (before, after) {
        (None, None) => true,
        (Some(before), Some(after)) => {
            before == after
                || matches!(
                    (before, after),
                    (Shared, Assigned)
                        | (Assigned, Shared | Validated | Launched)
                        | (Validated | Launched, Assigned)
                        | (Validated, Vmsa)
                        | (Vmsa, Validated)
                )
        }
        _ => false,
    };
    assert!(legal, "{before:?} became {after:?}");
}

impl Machine {
    fn step(&mut self, page: u64, what: impl FnOnce(&mut Rmp) -> bool) {
        let around = [page.saturating_sub(1), page, page.saturating_add(1), page.saturating_add(511)];
        let before = around.map(|page| self.0.state(page));
        let done = what(&mut self.0);
        for (page, before) in around.into_iter().zip(before) {
            let after = self.0.state(page);
            check(before, after);
            assert!(done || before == after, "a refused change was made");
        }
    }
}

impl Hypervisor for Machine {
    type End = ();

    fn cpuid(&mut self, leaf: u32, index: u32) -> [u32; 4] {
        [leaf, index, !leaf, !index]
    }

    fn change(&mut self, page: u64, pages: u64, private: bool) -> Result<(), ()> {
        assert!(pages == 1 || pages == 512 && page.is_multiple_of(512));
        for page in page..page + pages {
            let mut done = false;
            self.step(page, |rmp| {
                done = rmp.change(page, private).is_ok();
                done
            });
            if !done {
                return Err(());
            }
        }
        Ok(())
    }

    fn port_write(&mut self, _: u16, bytes: &[u8]) -> Result<(), ()> {
        assert!(matches!(bytes.len(), 1 | 2 | 4));
        Ok(())
    }

    fn port_read(&mut self, port: u16, bytes: &mut [u8]) {
        assert!(matches!(bytes.len(), 1 | 2 | 4));
        bytes.fill(port as u8);
    }

    fn mmio_write(&mut self, _: u64, bytes: &[u8]) {
        assert!(matches!(bytes.len(), 1 | 2 | 4 | 8));
    }

    fn mmio_read(&mut self, address: u64, bytes: &mut [u8]) {
        assert!(matches!(bytes.len(), 1 | 2 | 4 | 8));
        bytes.fill(address as u8);
    }

    fn create_processor(&mut self, apic_id: u32, vmsa: u64) -> Result<bool, ()> {
        Ok(apic_id == 1 && self.0.state(vmsa / PAGE) == Some(State::Vmsa))
    }

    fn guest_request(&mut self, _: u64, _: u64, certificates: Option<(u64, u64)>) -> Result<Answer, ()> {
        match certificates {
            Some((_, room)) if room < 3 => Ok(Answer::Room(3)),
            Some((_, 7)) => Ok(Answer::Failed),
            _ => Ok(Answer::Status(0)),
        }
    }

    fn terminated(&mut self, _: u8, _: u8) {}

    fn broken(&mut self, words: String) {
        assert!(!words.is_empty());
    }
}

/// Exits of a guest, one after the other: messages, GHCB pages, PVALIDATE, RMPADJUST.
pub fn ghcb(data: &[u8]) {
    let mut input = Input(data);
    let mut machine = Machine(Rmp::new(&RAM));
    let mut registered = None;
    while let Some(step) = input.byte() {
        match step % 7 {
            0 => {
                if ghcb::message(input.number(8), &mut registered, &mut machine, C_BIT).is_err() {
                    return;
                }
                assert!(registered.is_none_or(|gpa| gpa % PAGE == 0));
            }
            1 => {
                let mut page = [0; PAGE as usize];
                page[0xffa] = 2;
                let fields = input.byte().unwrap_or(0);
                for (bit, at) in FIELDS.into_iter().enumerate().filter(|(bit, _)| fields >> bit & 1 != 0) {
                    // Most numbers are small, and the scratch address is near the page.
                    let value = input.number(if bit >= 4 { 8 } else { 4 });
                    page[at..at + 8].copy_from_slice(&value.to_le_bytes());
                    page[0x3f0 + at / 64] |= 1 << (at / 8 % 8);
                }
                let length = usize::from(input.byte().unwrap_or(0));
                let buffer = input.piece(length);
                page[0x800..0x800 + buffer.len()].copy_from_slice(buffer);
                if exit(page, &mut machine).is_err() {
                    return;
                }
            }
            2 => {
                let mut page = [0; PAGE as usize];
                let at = input.number(2) as usize % PAGE as usize;
                let bytes = input.piece((PAGE as usize - at).min(512));
                page[at..at + bytes.len()].copy_from_slice(bytes);
                if exit(page, &mut machine).is_err() {
                    return;
                }
            }
            3 | 4 => {
                let (page, how) = (input.number(3), input.byte().unwrap_or(0));
                machine.step(page, |rmp| {
                    matches!(
                        rmp.pvalidate(page, how & 1 != 0, how & 2 != 0),
                        Ok(coffer_vmm::tee::emulated::rmp::Pvalidate::Done)
                    )
                });
            }
            5 => {
                let (page, vmsa) = (input.number(3), input.byte().unwrap_or(0) & 1 != 0);
                machine.step(page, |rmp| rmp.rmpadjust(page, vmsa).is_ok());
            }
            _ => {
                let page = input.number(3);
                machine.step(page, |rmp| rmp.launch(page).is_ok());
            }
        }
    }
    let (shared, private) = machine.0.totals();
    assert_eq!(shared + private, PAGES);
}

fn exit(page: [u8; PAGE as usize], machine: &mut Machine) -> Result<(), ()> {
    let mut ghcb = Ghcb::new(page, C_BIT);
    ghcb.answer(AT, machine)?;
    // What the hypervisor does not answer in stays as it was: the guest's version and everything behind the buffer.
    assert_eq!(ghcb.bytes()[0xff0..], page[0xff0..]);
    Ok(())
}

/// Messages to the security processor: sealed with the guest's key, so that what is inside is read, and as they are.
pub fn messages(data: &[u8]) {
    static PROCESSOR: OnceLock<(tempfile::TempDir, Mutex<SecurityProcessor>)> = OnceLock::new();
    let (_, processor) = PROCESSOR.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory for development keys");
        let mut processor = SecurityProcessor::new(directory.path().to_owned(), None, 0x00a0_0f11)
            .expect("a security processor");
        processor.guest.message_keys = [[7; 32]; 4];
        (directory, Mutex::new(processor))
    });
    let mut processor = processor.lock().expect("nothing panicked before");
    processor.guest.message_counts = [0; 4];
    let mut page = [0; PAGE as usize];
    let mut input = Input(data);
    let raw = input.byte().unwrap_or(0) & 1 != 0;
    let bytes = input.piece(PAGE as usize);
    page[..bytes.len()].copy_from_slice(bytes);
    if raw {
        let _ = processor.answer(&page);
        return;
    }
    let size = usize::from(u16::from_le_bytes([page[54], page[55]]));
    let Some(text) = page.get(96..96 + size) else { return };
    let nonce: [u8; 12] = std::array::from_fn(|i| if i < 8 { page[32 + i] } else { 0 });
    let sealed = Aes256Gcm::new(&[7; 32].into())
        .encrypt(&nonce.into(), Payload { msg: text, aad: &page[48..96] })
        .expect("a page is not too long");
    let (text, tag) = sealed.split_at(size);
    page[96..96 + size].copy_from_slice(text);
    page[..16].copy_from_slice(tag);
    if let Ok(answer) = processor.answer(&page) {
        assert_eq!((answer[32], answer[52]), (2, page[52] + 1), "sequence number and type");
    }
}
