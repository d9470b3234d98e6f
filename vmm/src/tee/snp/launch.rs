//! A launch plan's execution: the commands to the security processor, in order, each with its errors.
//!
//! Owns: the order of commands and what is tried again. Does not own: who takes the commands. On hardware that is KVM; the
//! emulation has a software security processor behind the same interface, so that both are driven by the same code.

use coffer_layout::PAGE;
use thiserror::Error;

use super::{
    abi::{
        self, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes, kvm_sev_init, kvm_sev_snp_launch_finish,
        kvm_sev_snp_launch_start, kvm_sev_snp_launch_update,
    },
    cpuid,
    digest::PageType,
    plan::{LaunchPlan, Source, Update},
    status,
};

/// How often a command is given again when KVM says EAGAIN.
const TRIES: u32 = 64;

/// A command and its structure, which the kernel may change.
#[derive(Debug)]
pub enum Command<'a> {
    /// KVM_SEV_INIT2.
    Init(&'a mut kvm_sev_init),
    /// LAUNCH_START.
    Start(&'a mut kvm_sev_snp_launch_start),
    /// LAUNCH_UPDATE.
    Update(&'a mut kvm_sev_snp_launch_update),
    /// LAUNCH_FINISH.
    Finish(&'a mut kvm_sev_snp_launch_finish),
}

impl Command<'_> {
    /// Its number in the uapi.
    #[must_use]
    pub fn id(&self) -> u32 {
        match self {
            Self::Init(_) => abi::SEV_INIT2,
            Self::Start(_) => abi::SNP_LAUNCH_START,
            Self::Update(_) => abi::SNP_LAUNCH_UPDATE,
            Self::Finish(_) => abi::SNP_LAUNCH_FINISH,
        }
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Init(_) => "SEV_INIT2",
            Self::Start(_) => "SNP_LAUNCH_START",
            Self::Update(_) => "SNP_LAUNCH_UPDATE",
            Self::Finish(_) => "SNP_LAUNCH_FINISH",
        }
    }
}

/// How a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The system call's error.
    pub errno: i32,
    /// The firmware's status; 0 when it was not reached.
    pub status: u32,
}

/// Who takes the commands.
pub trait Host {
    /// KVM_MEMORY_ENCRYPT_OP.
    ///
    /// # Errors
    /// The system call's error and the firmware's status.
    fn encrypt(&mut self, command: &mut Command<'_>) -> Result<(), Failure>;
    /// KVM_SET_MEMORY_ATTRIBUTES.
    ///
    /// # Errors
    /// errno.
    fn set_attributes(&mut self, attributes: &kvm_memory_attributes) -> Result<(), i32>;
    /// Host address of guest memory's shared view; `None` when it is not all there.
    fn address(&self, gpa: u64, size: u64) -> Option<u64>;
    /// Writes the shared view. False when it is not all there.
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> bool;
    /// Reads a page of the shared view; `None` when it is not there.
    fn page(&self, gpa: u64) -> Option<[u8; PAGE as usize]>;
    /// Gives back the shared view's memory of launched pages.
    fn discard(&mut self, gpa: u64, size: u64);
}

/// Why a launch ended.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SnpError {
    /// A command failed.
    #[error("{command}{place}: {errno}, firmware status {status:#x} {name}: {remedy}", errno = std::io::Error::from_raw_os_error(*errno), name = status::name(*status), remedy = status::remedy(*status, *errno))]
    Command {
        /// Which.
        command: &'static str,
        /// At which address, for which page type; empty where there is none.
        place: String,
        /// The system call's error.
        errno: i32,
        /// The firmware's.
        status: u32,
    },
    /// KVM took pages, but left as many as before.
    #[error(
        "SNP_LAUNCH_UPDATE at {gpa:#x}: KVM makes no progress, {left} bytes are left: this kernel is broken"
    )]
    NoProgress {
        /// Where it stands.
        gpa: u64,
        /// Bytes left.
        left: u64,
    },
    /// KVM_SET_MEMORY_ATTRIBUTES.
    #[error("KVM_SET_MEMORY_ATTRIBUTES at {gpa:#x}, {size:#x} bytes: {errno}: Linux 6.8 or newer is needed", errno = std::io::Error::from_raw_os_error(*errno))]
    Attributes {
        /// First address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// errno.
        errno: i32,
    },
    /// Guest memory is not where the plan has it.
    #[error("guest memory at {0:#x} is not there: this is a fault of the VMM, report it")]
    Memory(u64),
    /// The order of calls is wrong.
    #[error("launch is {0:?}: this is a fault of the VMM, report it")]
    Order(State),
}

/// Where a launch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing was done.
    NotStarted,
    /// INIT2 is done; processors may be made.
    Initialised,
    /// The guest may run.
    Finished,
    /// Never again.
    Failed,
}

/// Numbers of a launch, for `--trace`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its command or page type")]
pub struct Counts {
    pub init: u64,
    pub start: u64,
    pub update: u64,
    pub finish: u64,
    pub again: u64,
    /// Pages by [`PageType`]'s number.
    pub pages: [u64; 7],
}

impl Counts {
    /// Names and numbers.
    #[must_use]
    pub fn trace(&self) -> Vec<(String, u64)> {
        let commands = [
            ("launch-init", self.init),
            ("launch-start", self.start),
            ("launch-update", self.update),
            ("launch-finish", self.finish),
            ("launch-again", self.again),
        ];
        let commands = commands.into_iter().map(|(name, count)| (name.to_owned(), count));
        let page = |(number, count): (usize, &u64)| {
            let kind = PageType::from_number(u8::try_from(number).ok()?)?;
            Some((format!("launch-pages-{}", kind.name()), *count))
        };
        commands.chain(self.pages.iter().enumerate().filter_map(page)).collect()
    }
}

/// What a launch needs beside its plan.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// RAM, `(first address, bytes)`.
    pub ram: &'a [(u64, u64)],
    /// The image file.
    pub file: &'a [u8],
    /// The CPUID page.
    pub cpuid: &'a [u8; PAGE as usize],
}

/// One guest's launch.
#[derive(Debug)]
pub struct Launch {
    state: State,
    /// What was done so far.
    pub counts: Counts,
}

impl Default for Launch {
    fn default() -> Self {
        Self { state: State::NotStarted, counts: Counts::default() }
    }
}

impl Launch {
    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Makes the VM an SNP guest. Before any processor is made.
    ///
    /// # Errors
    /// [`SnpError`].
    pub fn init(&mut self, features: u64, host: &mut impl Host) -> Result<(), SnpError> {
        if self.state != State::NotStarted {
            return Err(SnpError::Order(self.state));
        }
        // SNP_ACTIVE is KVM's to set.
        let mut init = kvm_sev_init {
            vmsa_features: features & !1,
            ghcb_version: abi::GHCB_VERSION,
            ..Default::default()
        };
        self.counts.init += 1;
        let result = give(host, &mut self.counts.again, String::new(), Command::Init(&mut init));
        self.end(result, State::Initialised)
    }

    /// Launches everything. After all processors were made.
    ///
    /// # Errors
    /// [`SnpError`]; the VM cannot be launched again.
    pub fn run(
        &mut self,
        plan: &LaunchPlan,
        guest: &Guest<'_>,
        host: &mut impl Host,
        log: &mut dyn FnMut(&str),
    ) -> Result<(), SnpError> {
        if self.state != State::Initialised {
            return Err(SnpError::Order(self.state));
        }
        let result = self.launch(plan, guest, host, log);
        self.end(result, State::Finished)
    }

    fn end(&mut self, result: Result<(), SnpError>, good: State) -> Result<(), SnpError> {
        self.state = if result.is_ok() { good } else { State::Failed };
        result
    }

    fn launch(
        &mut self,
        plan: &LaunchPlan,
        guest: &Guest<'_>,
        host: &mut impl Host,
        log: &mut dyn FnMut(&str),
    ) -> Result<(), SnpError> {
        for write in plan.shared.iter().chain(&plan.writes) {
            let bytes = match &write.source {
                Source::Bytes(bytes) => bytes.as_slice(),
                Source::File(offset, size) => {
                    let range = *offset as usize..(*offset + *size) as usize;
                    guest.file.get(range).ok_or(SnpError::Memory(write.gpa))?
                }
            };
            if !host.write(write.gpa, bytes) {
                return Err(SnpError::Memory(write.gpa));
            }
        }
        if !host.write(plan.cpuid, guest.cpuid) {
            return Err(SnpError::Memory(plan.cpuid));
        }
        for &(address, size) in guest.ram {
            let attributes = u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
            let attributes = kvm_memory_attributes { address, size, attributes, flags: 0 };
            host.set_attributes(&attributes).map_err(|errno| SnpError::Attributes {
                gpa: address,
                size,
                errno,
            })?;
        }
        let mut start = kvm_sev_snp_launch_start { policy: plan.policy, ..Default::default() };
        self.counts.start += 1;
        let place = format!(" policy {:#x}", plan.policy);
        give(host, &mut self.counts.again, place, Command::Start(&mut start))?;
        for update in &plan.updates {
            self.update(*update, host, log)?;
        }
        let mut finish = kvm_sev_snp_launch_finish { host_data: plan.host_data, ..Default::default() };
        if let Some(identity) = &plan.identity {
            finish.id_block_en = 1;
            finish.auth_key_en = u8::from(identity.author);
            finish.id_block_uaddr = identity.block.as_ptr() as u64;
            finish.id_auth_uaddr = identity.auth.as_ptr() as u64;
        }
        self.counts.finish += 1;
        give(host, &mut self.counts.again, String::new(), Command::Finish(&mut finish))?;
        // The launch copied them; kept, they would be held twice.
        for update in &plan.updates {
            host.discard(update.gpa, update.size);
        }
        Ok(())
    }

    fn update(
        &mut self,
        update: Update,
        host: &mut impl Host,
        log: &mut dyn FnMut(&str),
    ) -> Result<(), SnpError> {
        let uaddr = host.address(update.gpa, update.size).ok_or(SnpError::Memory(update.gpa))?;
        let mut asked = kvm_sev_snp_launch_update {
            gfn_start: update.gpa / PAGE,
            uaddr,
            len: update.size,
            type_: update.kind as u8,
            ..Default::default()
        };
        self.counts.pages[update.kind as usize] += update.size / PAGE;
        let mut corrected = false;
        while asked.len != 0 {
            let (before, gpa) = (asked.len, asked.gfn_start * PAGE);
            let ours = (update.kind == PageType::Cpuid).then(|| host.page(gpa)).flatten();
            let place = format!(" at {gpa:#x}, {} page", update.kind.name());
            self.counts.update += 1;
            match give(host, &mut self.counts.again, place, Command::Update(&mut asked)) {
                Ok(()) if asked.len >= before => return Err(SnpError::NoProgress { gpa, left: asked.len }),
                Ok(()) => {}
                // The firmware wrote the table that it would take over ours.
                Err(SnpError::Command { status: status::INVALID_PARAM, .. })
                    if ours.is_some() && !corrected =>
                {
                    corrected = true;
                    if let (Some(ours), Some(theirs)) = (ours, host.page(gpa)) {
                        for line in cpuid::difference(&ours, &theirs) {
                            log(&format!("the firmware corrected the CPUID page: {line}"));
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Gives a command, again while KVM says EAGAIN.
fn give(
    host: &mut impl Host,
    again: &mut u64,
    place: String,
    mut command: Command<'_>,
) -> Result<(), SnpError> {
    let mut tries = 0;
    loop {
        match host.encrypt(&mut command) {
            Ok(()) => return Ok(()),
            Err(failure) if failure.errno == libc::EAGAIN && tries < TRIES => {
                tries += 1;
                *again += 1;
                std::thread::yield_now();
            }
            Err(Failure { errno, status }) => {
                return Err(SnpError::Command { command: command.name(), place, errno, status });
            }
        }
    }
}

#[cfg(test)]
mod tests;
