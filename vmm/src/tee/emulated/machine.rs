//! The emulated SNP machine's state that all its processors share, and what their exits do to it.
//!
//! Owns: page states, memory views, the guest's security processor, the sites. Does not own: the processors' registers
//! ([`super::processor`]), devices.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::SyncSender,
    },
};

use coffer_layout::{
    PAGE,
    boot::{HIGH_START, Refusal},
    mark,
    sites::{self, SiteKind},
    snp::{SHARED_BASE, SHARED_END, SITES, TERMINATION_SET, VMSA_GPA},
};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::{
    ghcb::{Answer, Hypervisor, exit_name},
    messages::SecurityProcessor,
    psp::Launching,
    rmp::{Pvalidate, Rmp, State, Violation},
    views::{View, Views},
};
use crate::{
    devices::board::Board,
    end::End,
    log::Level,
    tee::snp::{
        self,
        launch::{Launch, SnpError},
        plan::LaunchPlan,
        vmsa::Vmsa,
    },
};

/// Ports that a replaced instruction writes to; nothing else of this machine is there.
pub const PORT_PVALIDATE: u16 = 0xe8;
/// RMPADJUST.
pub const PORT_RMPADJUST: u16 = 0xe9;
/// VMGEXIT.
pub const PORT_VMGEXIT: u16 = 0xea;

/// Numbers for `--trace`.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "each is what it counts")]
pub struct Counts {
    pub pvalidate_4k: AtomicU64,
    pub pvalidate_2m: AtomicU64,
    pub pvalidate_mismatch: AtomicU64,
    pub rmpadjust: AtomicU64,
    pub vmgexit: AtomicU64,
    pub messages: AtomicU64,
    pub changes: AtomicU64,
    pub changed_pages: AtomicU64,
    pub changes_before_kernel: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// State that only one processor changes at a time.
struct Inner {
    rmp: Rmp,
    security_processor: SecurityProcessor,
    /// GHCB exits by code.
    exits: BTreeMap<&'static str, u64>,
    /// Pages below 1 MiB that both views show.
    lent: Vec<u64>,
    kernel_entered: bool,
}

/// The machine. Nothing in it protects anything.
pub struct Emulated {
    /// Memory.
    pub views: Views,
    /// Numbers.
    pub counts: Counts,
    inner: Mutex<Inner>,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// For each processor but the first: who starts it.
    starters: Vec<SyncSender<Vmsa>>,
    started: Vec<AtomicBool>,
}

/// What a launch needs beside the plan.
pub struct Start<'a> {
    /// Memory, image file, CPUID page.
    pub guest: snp::launch::Guest<'a>,
    /// What CPUID tells the first processor.
    pub cpuid: &'a CpuId,
    /// For each processor but the first.
    pub starters: Vec<SyncSender<Vmsa>>,
}

impl Emulated {
    /// Launches a plan and replaces the shim's sites.
    ///
    /// # Errors
    /// [`SnpError`] of the launch.
    pub fn launch(
        plan: &LaunchPlan,
        views: Views,
        mut security_processor: SecurityProcessor,
        start: Start<'_>,
        launch: &mut Launch,
        log: &mut dyn FnMut(&str),
    ) -> Result<Self, SnpError> {
        let mut rmp = Rmp::new(start.guest.ram);
        let cpuid = start.cpuid.as_slice().to_vec();
        let mut host = Launching {
            guest: &mut security_processor.guest,
            rmp: &mut rmp,
            views: &views,
            vmsa: &plan.vmsa,
            vcpus: start.starters.len() as u32 + 1,
            identity: plan.identity.as_ref(),
        };
        launch.init(plan.vmsa.features(), &mut host)?;
        launch.run(plan, &start.guest, &mut host, log)?;
        let inner = Inner {
            rmp,
            security_processor,
            exits: BTreeMap::new(),
            lent: Vec::new(),
            kernel_entered: false,
        };
        let started = start.starters.iter().map(|_| AtomicBool::new(false)).collect();
        let machine = Self {
            views,
            counts: Counts::default(),
            inner: Mutex::new(inner),
            cpuid,
            starters: start.starters,
            started,
        };
        machine.replace(|gpa| gpa < HIGH_START).map_err(|_| SnpError::Memory(SITES))?;
        Ok(machine)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The launch digest.
    #[must_use]
    pub fn digest(&self) -> [u8; 48] {
        self.inner().security_processor.guest.digest
    }

    /// Writes `out` with two no-operations over the sites that `which` picks.
    fn replace(&self, which: impl Fn(u64) -> bool) -> Result<u64, String> {
        let mut page = [0; PAGE as usize];
        if !self.views.read(View::Shared, SITES, &mut page) {
            return Err("the image has no table of sites".to_owned());
        }
        let table = sites::from_page(&page)
            .ok_or("the image's table of sites is not of this version: build the image again")?;
        let mut replaced = 0;
        for site in table.filter(|site| which(u64::from(site.gpa))) {
            let gpa = u64::from(site.gpa);
            // Both pages of a site that crosses must be the guest's, or reading it would be a fault of this process.
            let rmp = &self.inner().rmp;
            let ours = |page| matches!(rmp.state(page), Some(State::Validated | State::Launched));
            let mut bytes = [0; 4];
            if !ours(gpa / PAGE)
                || !ours((gpa + 3) / PAGE)
                || !self.views.read(View::Private, gpa, &mut bytes)
            {
                return Err(format!(
                    "the table of sites names {gpa:#x}, which is no private memory of the guest"
                ));
            }
            if bytes != site.kind.bytes() {
                return Err(format!(
                    "the table of sites names {:?} at {gpa:#x}, where there is {bytes:02x?}: it is not this image's",
                    site.kind
                ));
            }
            let port = match site.kind {
                SiteKind::Pvalidate => PORT_PVALIDATE,
                SiteKind::Rmpadjust => PORT_RMPADJUST,
                SiteKind::Vmgexit => PORT_VMGEXIT,
            };
            // out imm8, al; nop; nop
            if !self.views.write(View::Private, gpa, &[0xe6, port as u8, 0x90, 0x90]) {
                return Err(format!("{gpa:#x} cannot be written"));
            }
            replaced += 1;
        }
        Ok(replaced)
    }

    /// PVALIDATE of a guest physical address.
    ///
    /// # Errors
    /// The machine ends.
    pub fn pvalidate(&self, gpa: u64, large: bool, validate: bool) -> Result<Pvalidate, End> {
        let mut inner = self.inner();
        let answer = inner.rmp.pvalidate(gpa / PAGE, large, validate).map_err(violated)?;
        match (answer, large) {
            (Pvalidate::Done, true) => count(&self.counts.pvalidate_2m, 1),
            (Pvalidate::Done, false) => count(&self.counts.pvalidate_4k, 1),
            _ => count(&self.counts.pvalidate_mismatch, 1),
        }
        if answer == Pvalidate::Done {
            let size = if large { 512 * PAGE } else { PAGE };
            if !validate {
                take_back(&self.views, &mut inner.lent, gpa / PAGE)?;
            }
            self.views.open(View::Private, gpa & !(size - 1), size, validate).map_err(memory)?;
        }
        Ok(answer)
    }

    /// RMPADJUST of a guest physical address; `rights` is RDX.
    ///
    /// # Errors
    /// The machine ends.
    pub fn rmpadjust(&self, gpa: u64, rights: u64) -> Result<(), End> {
        count(&self.counts.rmpadjust, 1);
        self.inner().rmp.rmpadjust(gpa / PAGE, rights & 1 << 16 != 0).map_err(violated)
    }

    /// Checks what must hold when the shim has verified the kernel, and replaces the kernel's sites.
    fn enter_kernel(&self, board: &Board) -> Result<(), End> {
        let mut inner = self.inner();
        if std::mem::replace(&mut inner.kernel_entered, true) {
            return Ok(());
        }
        if let Some(gpa) = inner.rmp.first_unvalidated() {
            return Err(End::Emulation(format!(
                "the shim leaves {gpa:#x} unvalidated: Linux takes all RAM for accepted"
            )));
        }
        drop(inner);
        let changes = self.counts.changes.load(Ordering::Relaxed);
        self.counts.changes_before_kernel.store(changes, Ordering::Relaxed);
        let replaced = self.replace(|gpa| gpa >= HIGH_START).map_err(End::Emulation)?;
        if replaced == 0 {
            let words = "the image's table of sites has none in the kernel: build it from a kernel with AMD_MEM_ENCRYPT";
            return Err(End::Emulation(words.to_owned()));
        }
        // Kernel and initramfs are private now; the shim's GHCB stays.
        if let Err(error) = self.views.drop_window(PAGE) {
            board.log.write(Level::Warning, &format!("give back the shared window: {error}"));
        }
        Ok(())
    }

    /// Numbers for the trace.
    #[must_use]
    pub fn trace(&self) -> Vec<(String, u64)> {
        let c = &self.counts;
        let inner = self.inner();
        let (shared, private) = inner.rmp.totals();
        let fixed = [
            ("pvalidate-4k", &c.pvalidate_4k),
            ("pvalidate-2m", &c.pvalidate_2m),
            ("pvalidate-mismatch", &c.pvalidate_mismatch),
            ("rmpadjust", &c.rmpadjust),
            ("vmgexit", &c.vmgexit),
            ("ghcb-msr-messages", &c.messages),
            ("page-state-changes", &c.changes),
            ("page-state-changed-pages", &c.changed_pages),
            ("page-state-changes-before-kernel", &c.changes_before_kernel),
        ];
        let fixed = fixed.into_iter().map(|(name, n)| (name.to_owned(), n.load(Ordering::Relaxed)));
        let exits = inner.exits.iter().map(|(name, n)| (format!("ghcb-{name}"), *n));
        let pages = [("pages-shared".to_owned(), shared), ("pages-private".to_owned(), private)];
        fixed.chain(exits).chain(pages).collect()
    }

    /// The GHCB's bytes, when it lies in memory that the guest shares.
    fn shared_page(&self, gpa: u64) -> Option<[u8; PAGE as usize]> {
        let mut page = [0; PAGE as usize];
        let good = self.is_shared(gpa, PAGE) && self.views.read(View::Shared, gpa, &mut page);
        good.then_some(page)
    }

    fn is_shared(&self, gpa: u64, size: u64) -> bool {
        if size == 0 || gpa.checked_add(size).is_none() || self.views.address(gpa, size).is_none() {
            return false;
        }
        let inner = self.inner();
        (gpa / PAGE..=(gpa + size - 1) / PAGE).all(|page| {
            (SHARED_BASE..SHARED_END).contains(&(page * PAGE)) || inner.rmp.state(page) == Some(State::Shared)
        })
    }
}

/// A page that both views show is the guest's own again.
fn take_back(views: &Views, lent: &mut Vec<u64>, page: u64) -> Result<(), End> {
    if let Some(at) = lent.iter().position(|p| *p == page) {
        lent.swap_remove(at);
        views.lend(page, false).map_err(memory)?;
    }
    Ok(())
}

fn violated(violation: Violation) -> End {
    End::Emulation(violation.to_string())
}

fn memory(error: std::io::Error) -> End {
    End::Emulation(format!("show a page in its view: {error}; raise vm.max_map_count if it is ENOMEM"))
}

/// One processor's way to the machine: what the GHCB protocol asks for.
pub struct Door<'a> {
    /// The machine.
    pub machine: &'a Emulated,
    /// Its devices.
    pub board: &'a Board,
}

impl Door<'_> {
    /// Answers a VMGEXIT. `msr` is the GHCB MSR, `registered` the address that the guest registered.
    ///
    /// # Errors
    /// The machine ends.
    pub fn vmgexit(&mut self, msr: &mut u64, registered: &mut Option<u64>) -> Result<(), End> {
        let c_bit = self.machine.views.c_bit();
        count(&self.machine.counts.vmgexit, 1);
        if *msr & 0xfff != 0 {
            count(&self.machine.counts.messages, 1);
            *msr = super::ghcb::message(*msr, registered, self, c_bit)?;
            return Ok(());
        }
        if *registered != Some(*msr) {
            let words = format!("the guest uses the GHCB at {msr:#x} without registering it");
            return Err(self.broken(words));
        }
        let Some(page) = self.machine.shared_page(*msr) else {
            return Err(self.broken(format!("the GHCB at {msr:#x} is not shared memory")));
        };
        let mut ghcb = super::ghcb::Ghcb::new(page, c_bit);
        *self.machine.inner().exits.entry(exit_name(ghcb.exit_code())).or_default() += 1;
        ghcb.answer(*msr, self)?;
        // Only what answers: the guest may have made the page its own meanwhile, which is then its loss.
        if self.machine.is_shared(*msr, PAGE) {
            let _ = self.machine.views.write(View::Shared, *msr, ghcb.bytes());
        }
        Ok(())
    }
}

impl Hypervisor for Door<'_> {
    type End = End;

    fn cpuid(&mut self, leaf: u32, index: u32) -> [u32; 4] {
        let fits = |e: &&kvm_cpuid_entry2| e.function == leaf && (e.index == index || e.flags & 1 == 0);
        self.machine.cpuid.iter().find(fits).map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    fn change(&mut self, page: u64, pages: u64, private: bool) -> Result<(), End> {
        let machine = self.machine;
        count(&machine.counts.changes, 1);
        count(&machine.counts.changed_pages, pages);
        let mut inner = machine.inner();
        for page in page..page.saturating_add(pages) {
            inner.rmp.change(page, private).map_err(violated)?;
        }
        let (gpa, size) = (page * PAGE, pages * PAGE);
        // A page that becomes private is closed in both views until the guest accepts it. Contents do not survive.
        let gone = if private { View::Shared } else { View::Private };
        machine.views.discard(gone, gpa, size).map_err(memory)?;
        machine.views.open(View::Private, gpa, size, false).map_err(memory)?;
        machine.views.open(View::Shared, gpa, size, !private).map_err(memory)
    }

    fn port_write(&mut self, port: u16, bytes: &[u8]) -> Result<(), End> {
        if port == coffer_layout::MARK_PORT && bytes == [mark::KERNEL_ENTRY] {
            self.machine.enter_kernel(self.board)?;
        }
        match self.board.port_write(port, bytes) {
            Some(end) => Err(end),
            None => Ok(()),
        }
    }

    fn port_read(&mut self, port: u16, bytes: &mut [u8]) {
        self.board.port_read(port, bytes);
    }

    fn mmio_write(&mut self, address: u64, bytes: &[u8]) {
        self.board.mmio_write(address, bytes);
    }

    fn mmio_read(&mut self, address: u64, bytes: &mut [u8]) {
        self.board.mmio_read(address, bytes);
    }

    fn create_processor(&mut self, apic_id: u32, vmsa: u64) -> Result<bool, End> {
        let machine = self.machine;
        let Some(index) = (apic_id as usize).checked_sub(1).filter(|i| *i < machine.starters.len()) else {
            return Ok(false);
        };
        let mut page = [0; PAGE as usize];
        {
            let mut inner = machine.inner();
            let state = inner.rmp.state(vmsa / PAGE);
            if vmsa == VMSA_GPA || !vmsa.is_multiple_of(PAGE) || state != Some(State::Vmsa) {
                let words = format!(
                    "AP creation with a VMSA at {vmsa:#x}, which RMPADJUST has not made one ({state:?})"
                );
                return Err(End::Emulation(words));
            }
            // The trampoline of a processor that starts without paging lies below 1 MiB.
            for low in 0..HIGH_START / PAGE {
                let validated = matches!(inner.rmp.state(low), Some(State::Validated | State::Launched));
                if validated && !inner.lent.contains(&low) {
                    machine.views.lend(low, true).map_err(memory)?;
                    inner.lent.push(low);
                }
            }
        }
        if !machine.views.read(View::Private, vmsa, &mut page) {
            return Ok(false);
        }
        if machine.started[index].swap(true, Ordering::SeqCst) {
            return Ok(false);
        }
        Ok(machine.starters[index].send(Vmsa::new(page)).is_ok())
    }

    fn guest_request(
        &mut self,
        request: u64,
        response: u64,
        certificates: Option<(u64, u64)>,
    ) -> Result<Answer, End> {
        let machine = self.machine;
        let Some(message) = machine.shared_page(request).filter(|_| machine.is_shared(response, PAGE)) else {
            return Err(
                self.broken(format!("messages at {request:#x} and {response:#x} are not in shared memory"))
            );
        };
        let mut inner = machine.inner();
        if let Some((address, room)) = certificates {
            let table = match inner.security_processor.certificates() {
                Ok(table) => table,
                Err(words) => {
                    self.board.log.write(Level::Warning, &words);
                    return Ok(Answer::Failed);
                }
            };
            let needed = (table.len() as u64).div_ceil(PAGE);
            if room < needed {
                return Ok(Answer::Room(needed));
            }
            drop(inner);
            if !machine.is_shared(address, needed * PAGE)
                || !machine.views.write(View::Shared, address, &table)
            {
                return Err(self.broken(format!("certificates for {address:#x}, which is not shared memory")));
            }
            inner = machine.inner();
        }
        Ok(match inner.security_processor.answer(&message) {
            Ok(reply) => {
                drop(inner);
                if machine.views.write(View::Shared, response, &reply[..]) {
                    Answer::Status(0)
                } else {
                    Answer::Failed
                }
            }
            Err(status) => Answer::Status(status),
        })
    }

    fn terminated(&mut self, set: u8, code: u8) -> End {
        if set == TERMINATION_SET { End::ShimRefused(code) } else { End::GuestTerminated { set, code } }
    }

    fn broken(&mut self, words: String) -> End {
        End::Emulation(words)
    }
}

/// What a guest that gives up says, for codes that Linux and the specification define.
#[must_use]
pub fn termination_words(set: u8, code: u8) -> &'static str {
    match (set, code) {
        (TERMINATION_SET, code) => Refusal::words(code),
        (0, 0) => "no reason given",
        (0, 1) => "GHCB protocol version not supported",
        (0, 2) => "SEV-SNP features not supported",
        (1, 0) => "Linux: the GHCB could not be registered",
        (1, 1) => "Linux: a page could not be made shared or private",
        (1, 2) => "Linux: PVALIDATE failed",
        (1, 3) => "Linux: it does not run at VMPL 0",
        (1, 4) => "Linux: the CPUID page is not usable",
        (1, 5) => "Linux: the hypervisor did not answer for CPUID",
        (1, 6) => "Linux: the secrets page is not usable",
        (1, 7..=9) => "Linux: it expects an SVSM",
        _ => "unknown reason",
    }
}

/// Shared by the threads of all processors.
pub type SharedMachine = Arc<Emulated>;
