//! A machine for the shim's SEV-SNP logic: memory in two views, an RMP, a hypervisor that can lie.

use std::collections::{BTreeMap, BTreeSet};

use coffer_image::{inspect::parse, platform::SNP_MASK};
use coffer_layout::{
    PAGE,
    boot::{Handoff, Refusal},
    snp::{GHCB, LAUNCH_START, SHARED_BASE, SHARED_END},
};
use coffer_shim::{
    honest::{MILAN, cpuid_page, parameter_page},
    snp::{Hardware, PageSize, Validation, prepare},
};
use igvm::IgvmDirectiveHeader;

/// Bytes of RAM.
pub(crate) const RAM: u64 = 24 << 20;

/// What the host makes of an image. Tests change it, then [`Machine::boot`].
pub(crate) struct Machine {
    pub(crate) private: Vec<u8>,
    pub(crate) shared: BTreeMap<u64, [u8; PAGE as usize]>,
    pub(crate) cpuid: [u8; PAGE as usize],
    pub(crate) parameters: [u8; PAGE as usize],
    pub(crate) handoff: [u8; PAGE as usize],
    pub(crate) sev_status: u64,
    /// Bits 31:24 of the answer to the SEV information request.
    pub(crate) c_bit: u64,
    pub(crate) versions: (u64, u64),
    pub(crate) features: u64,
    pub(crate) registers: bool,
    pub(crate) exit_error: u64,
    /// The RMP has RAM in pages of 2 MiB where it can.
    pub(crate) large_pages: bool,
    /// A page that the host has validated before, by whatever trick.
    pub(crate) valid_before: Option<u64>,
    /// Shared bytes change once they have been read.
    pub(crate) swaps_after_reading: bool,
    valid: BTreeSet<u64>,
    read: BTreeSet<u64>,
    pub(crate) touched: BTreeSet<u64>,
    pub(crate) validations: (u64, u64),
    pub(crate) marks: Vec<u8>,
}

impl Machine {
    /// An honest host that launched `file`.
    pub(crate) fn launch(file: &[u8]) -> Self {
        let mut machine = Self {
            // Whatever the host left in memory that it gives to the guest.
            private: vec![0xa5; RAM as usize],
            shared: BTreeMap::new(),
            cpuid: cpuid_page(&MILAN),
            parameters: parameter_page(2, &[(0, RAM / PAGE, 0)]),
            handoff: [0; PAGE as usize],
            sev_status: 7,
            c_bit: 51,
            versions: (1, 2),
            features: 3,
            registers: true,
            exit_error: 0,
            large_pages: true,
            valid_before: None,
            swaps_after_reading: false,
            valid: BTreeSet::new(),
            read: BTreeSet::new(),
            touched: BTreeSet::new(),
            validations: (0, 0),
            marks: Vec::new(),
        };
        for directive in parse(file).unwrap().directives() {
            match directive {
                IgvmDirectiveHeader::PageData { gpa, compatibility_mask, flags, data, .. }
                    if compatibility_mask & SNP_MASK != 0 =>
                {
                    let mut page = [0; PAGE as usize];
                    page[..data.len()].copy_from_slice(data);
                    if flags.shared() {
                        machine.shared.insert(*gpa, page);
                        continue;
                    }
                    machine.valid.insert(*gpa);
                    if *gpa == coffer_layout::boot::HANDOFF {
                        machine.handoff = page;
                    }
                }
                IgvmDirectiveHeader::ParameterInsert(insert) => {
                    machine.valid.insert(insert.gpa);
                }
                _ => {}
            }
        }
        machine
    }

    /// Runs the shim's logic. On success all RAM is valid, and each page was validated once.
    pub(crate) fn boot(&mut self) -> Result<Handoff, Refusal> {
        let (handoff, parameters, cpuid) = (self.handoff, self.parameters, self.cpuid);
        let handoff = Handoff::from_page(&handoff).ok_or(Refusal::Handoff)?;
        prepare(self, &handoff, &parameters, &cpuid)?;
        for page in 0..RAM / PAGE {
            assert!(self.valid.contains(&(page * PAGE)), "page {page:#x} is not valid");
        }
        Ok(handoff)
    }

    /// The private bytes of a region, and what follows them.
    pub(crate) fn bytes(&self, at: u64, length: u64) -> &[u8] {
        &self.private[at as usize..(at + length) as usize]
    }
}

impl Hardware for Machine {
    fn sev_status(&mut self) -> u64 {
        self.sev_status
    }

    fn exchange(&mut self, request: u64) -> u64 {
        match request & 0xfff {
            0x002 => self.versions.1 << 48 | self.versions.0 << 32 | self.c_bit << 24 | 0x001,
            0x080 => self.features << 12 | 0x081,
            0x012 if self.registers => request & !0xfff | 0x013,
            0x012 => !0xfff | 0x013,
            other => panic!("request {other:#x}"),
        }
    }

    fn exit(&mut self, fields: &[(u16, u64)]) -> u64 {
        let field = |wanted: u16| fields.iter().find(|(at, _)| *at == wanted).unwrap().1;
        assert_eq!((field(0x390), field(0x398) >> 16), (0x7b, 0x80));
        assert!(self.shared.contains_key(&GHCB));
        self.marks.push(field(0x1f8) as u8);
        self.exit_error
    }

    fn pvalidate(&mut self, gpa: u64, size: PageSize) -> Validation {
        let length = if size == PageSize::Large { 2 << 20 } else { PAGE };
        assert!(gpa.is_multiple_of(length), "{gpa:#x}");
        if gpa + length > RAM {
            return Validation { code: 1, unchanged: false };
        }
        let launched = (LAUNCH_START..0x18000).contains(&gpa) && self.valid.contains(&gpa);
        assert!(!launched, "a launched page is validated again: {gpa:#x}");
        if size == PageSize::Large && !self.large_pages {
            return Validation { code: 6, unchanged: false };
        }
        match size {
            PageSize::Large => self.validations.0 += 1,
            PageSize::Small => self.validations.1 += 1,
        }
        let before = self.valid_before.is_some_and(|page| (gpa..gpa + length).contains(&page));
        let mut changed = false;
        for page in (gpa..gpa + length).step_by(PAGE as usize) {
            changed |= self.valid.insert(page);
        }
        Validation { code: 0, unchanged: before || !changed }
    }

    fn touch(&mut self, gpa: u64) {
        assert!(self.valid.contains(&gpa));
        self.touched.insert(gpa);
    }

    fn copy(&mut self, from: u64, to: u64, length: usize) {
        for i in 0..length as u64 {
            let (from, to) = (from + i, to + i);
            assert!((SHARED_BASE..SHARED_END).contains(&from));
            assert!(self.valid.contains(&(to & !0xfff)), "{to:#x} is not valid");
            assert!(self.read.insert(from), "{from:#x} is read twice");
            let page = self.shared.get_mut(&(from & !0xfff)).unwrap();
            let byte = &mut page[from as usize % PAGE as usize];
            self.private[to as usize] = *byte;
            if self.swaps_after_reading {
                *byte ^= 0xff;
            }
        }
    }

    fn private(&self, gpa: u64, length: usize) -> &[u8] {
        &self.private[gpa as usize..gpa as usize + length]
    }

    fn clear(&mut self, gpa: u64, length: u64) {
        self.private[gpa as usize..(gpa + length) as usize].fill(0);
    }
}
