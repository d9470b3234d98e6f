//! One processor's state, out of KVM and back into it.
//!
//! Owns: which commands, in which order (KVM's api.rst: the local APIC before the MSR of its deadline timer). Does not own: CPUID,
//! which is made as for a boot.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::TemplateError;
use crate::memory::Ram;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// Of an interface that this machine's CPUID does not offer; writing them turns it on in KVM.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;
/// Without these no processor goes on where it was: TSC, SYSENTER's stack, STAR, LSTAR, kernel GS base, KVM's clock. (EFER and the
/// APIC's base are in the special registers.)
const NEEDED: [u32; 6] = [TSC, 0x175, 0xc000_0081, 0xc000_0082, 0xc000_0102, 0x4b56_4d01];
/// Further than the second within which KVM takes a TSC that is written for an attempt to synchronise it with what it was.
const FAR: u64 = 1 << 40;
/// MSRs of one KVM command.
const AT_ONCE: usize = 256;

/// A processor.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each is KVM's structure of that name")]
pub struct ProcessorState {
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xsave: kvm_xsave,
    pub xcrs: kvm_xcrs,
    pub debug: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    /// In the order in which they are written.
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
    pub tsc_khz: u32,
}

fn kvm(command: &'static str, id: u32) -> impl FnOnce(kvm_ioctls::Error) -> TemplateError {
    move |reason| TemplateError::Kvm { command, processor: Some(id), reason }
}

/// Reads a processor that does not run.
///
/// # Errors
/// [`TemplateError`].
pub fn save(host: &Kvm, vcpu: &VcpuFd, id: u32) -> Result<ProcessorState, TemplateError> {
    // First: it may take an event that waits into the registers.
    let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE", id))?;
    Ok(ProcessorState {
        mp_state,
        regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS", id))?,
        sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS", id))?,
        xsave: vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE", id))?,
        xcrs: vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS", id))?,
        debug: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS", id))?,
        lapic: vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC", id))?,
        events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS", id))?,
        // Where the host's clock cannot be asked for there is nothing to compare.
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        // Last: whether KVM takes one back is tried.
        msrs: msrs(host, vcpu, id)?,
    })
}

/// Every MSR that KVM names, gives and takes. Of some it gives what it does not take: those are the host's, not the guest's.
fn msrs(host: &Kvm, vcpu: &VcpuFd, id: u32) -> Result<Vec<kvm_msr_entry>, TemplateError> {
    let list = host.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST", id))?;
    let mut found = Vec::new();
    for index in list.as_slice().iter().filter(|index| !HYPER_V.contains(index)) {
        let Ok(mut one) = Msrs::from_entries(&[kvm_msr_entry { index: *index, ..Default::default() }]) else {
            continue;
        };
        if vcpu.get_msrs(&mut one).is_ok_and(|count| count == 1) {
            found.extend_from_slice(one.as_slice());
        }
    }
    let takes = |entry: &kvm_msr_entry| {
        Msrs::from_entries(&[*entry]).is_ok_and(|one| vcpu.set_msrs(&one).is_ok_and(|count| count == 1))
    };
    found.retain(takes);
    if let Some(missing) = NEEDED.iter().find(|index| !found.iter().any(|e| e.index == **index)) {
        return Err(TemplateError::Msr(*missing));
    }
    Ok(in_order(found))
}

/// The TSC first and the deadline that is counted by it last. A deadline of zero is a timer that is off or has just gone off: the
/// interrupt of the latter could be on its way, so it goes off once more at once, which the guest takes for an early tick.
fn in_order(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    let tsc = msrs.iter().find(|e| e.index == TSC).map_or(0, |e| e.data);
    for entry in &mut msrs {
        if entry.index == TSC_DEADLINE && entry.data == 0 {
            entry.data = tsc.max(1);
        }
    }
    msrs.sort_by_key(|e| match e.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    msrs
}

/// Puts a new processor, which has its CPUID, into a state.
///
/// # Errors
/// [`TemplateError`]; the machine is then not to be used.
pub fn restore(vcpu: &VcpuFd, id: u32, state: &ProcessorState) -> Result<(), TemplateError> {
    let khz = vcpu.get_tsc_khz().unwrap_or(0);
    if khz != state.tsc_khz {
        vcpu.set_tsc_khz(state.tsc_khz).map_err(kvm("KVM_SET_TSC_KHZ", id))?;
    }
    vcpu.set_mp_state(state.mp_state).map_err(kvm("KVM_SET_MP_STATE", id))?;
    vcpu.set_regs(&state.regs).map_err(kvm("KVM_SET_REGS", id))?;
    let sregs = kvm_sregs { tr: task_register(state.sregs.tr, is_software()), ..state.sregs };
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS", id))?;
    // SAFETY: no feature with a larger state was enabled for this process (arch_prctl), so KVM reads this structure alone.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(kvm("KVM_SET_XSAVE", id))?;
    vcpu.set_xcrs(&state.xcrs).map_err(kvm("KVM_SET_XCRS", id))?;
    vcpu.set_debug_regs(&state.debug).map_err(kvm("KVM_SET_DEBUGREGS", id))?;
    vcpu.set_lapic(&state.lapic).map_err(kvm("KVM_SET_LAPIC", id))?;
    if id == 0 {
        // A machine that was saved in its first second would else get the TSC of a new one, which is earlier than its own. The
        // other processors are to be synchronised with this one.
        let far = state.msrs.iter().find(|e| e.index == TSC).map_or(0, |e| e.data).wrapping_add(FAR);
        if let Ok(msrs) = Msrs::from_entries(&[kvm_msr_entry { index: TSC, data: far, ..Default::default() }])
        {
            vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS", id))?;
        }
    }
    for chunk in state.msrs.chunks(AT_ONCE) {
        let Ok(msrs) = Msrs::from_entries(chunk) else { return Err(TemplateError::Msr(chunk[0].index)) };
        let count = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS", id))?;
        if let Some(refused) = chunk.get(count) {
            return Err(TemplateError::Msr(refused.index));
        }
    }
    vcpu.set_vcpu_events(&state.events).map_err(kvm("KVM_SET_VCPU_EVENTS", id))
}

/// `out dx, al`, by which a guest writes a mark.
const OUT: u8 = 0xee;
/// RFLAGS.AC.
const ALIGNMENT_CHECK: u64 = 1 << 18;

/// Puts a processor that has just said that its init is ready before that instruction, so that every machine that starts from it
/// says so itself. A guest that says it by another instruction says it only once.
///
/// # Errors
/// [`TemplateError`].
pub fn say_again(vcpu: &VcpuFd, id: u32, memory: &Ram) -> Result<(), TemplateError> {
    let regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS", id))?;
    let set = |regs| vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS", id));
    let before = regs.rip.wrapping_sub(1);
    // KVM translates as the guest's kernel would, which may not look at a user's page (SMAP) unless this flag says that it means to.
    set(kvm_regs { rflags: regs.rflags | ALIGNMENT_CHECK, ..regs })?;
    let place = vcpu.translate_gva(before).map_err(kvm("KVM_TRANSLATE", id))?;
    let byte = memory.read_obj::<u8>(GuestAddress(place.physical_address));
    let is_out = place.valid == 1 && byte.is_ok_and(|byte| byte == OUT);
    set(if is_out { kvm_regs { rip: before, ..regs } } else { regs })
}

/// Types of a task state segment.
const AVAILABLE: u8 = 9;
const BUSY: u8 = 11;

/// The task register as this host's processor wants it. KVM says of an AMD processor's that it is busy, as it is in every machine.
/// QEMU's software processor, on which tests run, grants I/O ports only to one that is not (`helper_check_io`), and keeps it so
/// when a guest loads it.
fn task_register(saved: kvm_segment, software: bool) -> kvm_segment {
    match (saved.type_, software) {
        (BUSY, true) => kvm_segment { type_: AVAILABLE, ..saved },
        _ => saved,
    }
}

/// Whether this host's processor is QEMU's software.
fn is_software() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    [leaf.ebx, leaf.ecx, leaf.edx] == [*b"TCGT", *b"CGTC", *b"GTCG"].map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_register_changes_on_a_software_processor_alone() {
        let busy = kvm_segment { type_: BUSY, base: 5, ..Default::default() };
        assert_eq!(task_register(busy, false), busy);
        assert_eq!(task_register(busy, true), kvm_segment { type_: AVAILABLE, ..busy });
    }

    #[test]
    fn the_clock_is_set_first_and_a_deadline_that_may_have_passed_is_now() {
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let sorted = in_order(vec![msr(TSC_DEADLINE, 0), msr(0x175, 5), msr(TSC, 9)]);
        assert_eq!(sorted, [msr(TSC, 9), msr(0x175, 5), msr(TSC_DEADLINE, 9)]);
        assert_eq!(in_order(vec![msr(TSC_DEADLINE, 4), msr(TSC, 9)]), [msr(TSC, 9), msr(TSC_DEADLINE, 4)]);
    }
}
