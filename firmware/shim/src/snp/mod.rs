//! The SEV-SNP path: from a launch that measured ten pages to a kernel in private memory.
//!
//! Owns: the order of checks. Every one fails with a refusal of its own; the kernel runs only after all. The steps'
//! logic is in the modules; what touches the machine is behind [`Hardware`]. Whole images are attacked on a model of it in
//! the image tool's tests.

pub mod cpuid;
pub mod ghcb;
pub mod regions;
pub mod validate;

use coffer_layout::{
    MARK_PORT, PAGE,
    boot::{Handoff, LOW_END, Refusal},
    mark,
    snp::{LAUNCH_START, MEMORY_TOP, SHARED_BASE},
};

use crate::plan::{Plan, Ram, plan};

/// Sizes that PVALIDATE takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB.
    Small = 0,
    /// 2 MiB.
    Large = 1,
}

/// What PVALIDATE leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validation {
    /// EAX: 0 on success.
    pub code: u32,
    /// The carry flag: the RMP entry was as asked for already.
    pub unchanged: bool,
}

/// The machine. Private memory is the guest's own: nobody else reads or writes it once it is validated.
pub trait Hardware {
    /// Reads MSR SEV_STATUS.
    fn sev_status(&mut self) -> u64;
    /// Writes a message of the MSR protocol, exits, and reads the answer.
    fn exchange(&mut self, request: u64) -> u64;
    /// Writes fields (offset, value) into the shared GHCB page, exits, and reads `sw_exit_info_1`.
    fn exit(&mut self, fields: &[(u16, u64)]) -> u64;
    /// PVALIDATE of a page, making it valid.
    fn pvalidate(&mut self, gpa: u64, size: PageSize) -> Validation;
    /// Reads the first and the last byte of a private page.
    fn touch(&mut self, gpa: u64);
    /// Copies from shared to private memory, reading each shared byte once.
    fn copy(&mut self, from: u64, to: u64, length: usize);
    /// Private memory.
    fn private(&self, gpa: u64, length: usize) -> &[u8];
    /// Clears private memory.
    fn clear(&mut self, gpa: u64, length: u64);
}

/// Does everything up to boot_params: what is left is to write it, and [`tell`] that the kernel comes next.
///
/// # Errors
/// The [`Refusal`] with which to terminate.
pub fn prepare<'a>(
    hardware: &mut impl Hardware,
    handoff: &'a Handoff,
    parameters: &'a [u8; PAGE as usize],
    cpuid_page: &[u8; PAGE as usize],
) -> Result<Plan<'a>, Refusal> {
    if hardware.sev_status() != handoff.sev_status {
        return Err(Refusal::SevStatus);
    }
    ghcb::check_protocol(hardware.exchange(ghcb::INFORMATION_REQUEST), handoff.c_bit)?;
    let features = cpuid::check(cpuid_page, handoff.c_bit)?;
    let plan = plan(handoff, parameters)?;
    ghcb::check_features(hardware.exchange(ghcb::FEATURES_REQUEST), plan.processors)?;
    ghcb::check_registration(hardware.exchange(ghcb::REGISTRATION_REQUEST))?;
    tell(hardware, mark::SHIM_ENTRY)?;
    check_memory(&plan)?;
    regions::check(handoff)?;
    let launched = Ram { start: LAUNCH_START, end: handoff.launch_end };
    validate::all(hardware, plan.ram(), launched, features.coherent)?;
    for region in handoff.used_regions() {
        regions::load(hardware, region)?;
    }
    Ok(plan)
}

/// Writes a boot stage to the mark port.
///
/// # Errors
/// [`Refusal::GhcbExit`].
pub fn tell(hardware: &mut impl Hardware, stage: u8) -> Result<(), Refusal> {
    ghcb::check_exit(hardware.exit(&ghcb::port_write(MARK_PORT, stage)))
}

/// What the page tables and the launch ask of the memory map, beyond what [`plan`] asks.
fn check_memory(plan: &Plan<'_>) -> Result<(), Refusal> {
    // The gibibyte that holds the shared window is mapped without the C-bit: RAM there would not be private.
    let shared = Ram { start: SHARED_BASE, end: SHARED_BASE + (1 << 30) };
    if plan.ram().any(|ram| ram.end > MEMORY_TOP || ram.start < shared.end && shared.start < ram.end) {
        return Err(Refusal::MemoryMap);
    }
    let low = Ram { start: 0, end: LOW_END };
    let launch_end = plan.handoff.launch_end;
    if !(LAUNCH_START..LOW_END).contains(&launch_end) || !launch_end.is_multiple_of(PAGE) {
        return Err(Refusal::Handoff);
    }
    if !plan.ram().any(|ram| ram.start <= low.start && low.end <= ram.end) {
        return Err(Refusal::LaunchPages);
    }
    Ok(())
}
