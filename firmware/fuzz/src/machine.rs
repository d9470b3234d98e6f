//! A machine that does nothing but check: every access must be where the shim may access.

use coffer_layout::{
    PAGE,
    boot::{Handoff, LOW_END},
    snp::{MEMORY_TOP, SHARED_BASE, SHARED_END},
};
use coffer_shim::snp::{Hardware, PageSize, Validation};

use crate::seeds;

/// Bytes that stand for all private memory.
static NOTHING: [u8; PAGE as usize] = [0; PAGE as usize];
/// PVALIDATEs after which the machine fails one: a memory map may name terabytes.
const PATIENCE: u32 = 5000;

pub(crate) struct Checked<'a> {
    handoff: Handoff,
    /// Eight bytes for each exit; honest answers when there are none left.
    script: &'a [u8],
    validations: u32,
    /// End of what was validated; RAM is validated upwards.
    end: u64,
}

impl<'a> Checked<'a> {
    pub(crate) fn honest() -> Self {
        Self::answering(&[])
    }

    pub(crate) fn answering(script: &'a [u8]) -> Self {
        Self { handoff: seeds::handoff(), script, validations: 0, end: 0 }
    }

    pub(crate) fn answers_as(&mut self, handoff: &Handoff) {
        self.handoff = *handoff;
    }

    fn scripted(&mut self) -> Option<u64> {
        let (answer, rest) = self.script.split_first_chunk::<8>()?;
        self.script = rest;
        Some(u64::from_le_bytes(*answer))
    }

    fn check_private(gpa: u64, length: u64) {
        let end = gpa.checked_add(length).expect("an address wraps around");
        assert!(end <= LOW_END || (gpa >= 1 << 20 && end <= SHARED_BASE), "{gpa:#x} {length:#x} is written");
    }
}

impl Hardware for Checked<'_> {
    fn sev_status(&mut self) -> u64 {
        self.handoff.sev_status
    }

    fn exchange(&mut self, request: u64) -> u64 {
        let c_bit = u64::from(self.handoff.c_bit & 0xff);
        self.scripted().unwrap_or(match request & 0xfff {
            0x002 => 2 << 48 | 1 << 32 | c_bit << 24 | 0x001,
            0x080 => 3 << 12 | 0x081,
            0x012 => request + 1,
            other => panic!("request {other:#x}"),
        })
    }

    fn exit(&mut self, fields: &[(u16, u64)]) -> u64 {
        assert!(fields.iter().all(|(at, _)| at.is_multiple_of(8) && u64::from(*at) < PAGE));
        self.scripted().unwrap_or(0)
    }

    fn pvalidate(&mut self, gpa: u64, size: PageSize) -> Validation {
        let length = if size == PageSize::Large { 2 << 20 } else { PAGE };
        assert!(gpa.is_multiple_of(length) && gpa + length <= MEMORY_TOP);
        assert!(gpa >= self.end, "{gpa:#x} is validated twice");
        assert!(gpa + length <= SHARED_BASE || gpa >= 4 << 30, "{gpa:#x} lies in the shared gibibyte");
        let launched = gpa < self.handoff.launch_end && gpa + length > coffer_layout::snp::LAUNCH_START;
        assert!(!launched, "{gpa:#x} was launched");
        self.end = gpa + length;
        self.validations += 1;
        Validation { code: u32::from(self.validations > PATIENCE), unchanged: false }
    }

    fn touch(&mut self, gpa: u64) {
        assert!(gpa < self.end);
    }

    fn copy(&mut self, from: u64, to: u64, length: usize) {
        let length = length as u64;
        assert!(from >= SHARED_BASE && from + length <= SHARED_END && length <= PAGE);
        Self::check_private(to, length);
    }

    fn private(&self, gpa: u64, length: usize) -> &[u8] {
        Self::check_private(gpa, length as u64);
        &NOTHING[..length]
    }

    fn clear(&mut self, gpa: u64, length: u64) {
        Self::check_private(gpa, length);
    }
}
