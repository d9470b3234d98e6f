//! Processors: their first state, and the loop that runs each.
//!
//! Owns: registers from the launch plan, exits. Does not own: what an access means (`devices::board`).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use coffer_layout::{MARK_PORT, mark};
use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use crate::{
    devices::board::Board,
    end::End,
    igvm::{Registers, Segment},
    tee::{
        emulated::processor::Processor,
        snp::{
            abi::{EXIT_SNP_REQ_CERTS, SYSTEM_EVENT_SEV_TERM},
            guest::{self, Running},
        },
    },
    template::gate::Gate,
};

/// A processor could not be set up.
#[derive(Debug, Error)]
#[error("processor {id}: {command}: {reason}; this host's KVM lacks what the guest needs")]
pub struct VcpuError {
    /// Its APIC id.
    pub id: u32,
    /// KVM's command.
    pub command: &'static str,
    /// KVM's words.
    pub reason: kvm_ioctls::Error,
}

/// Exits to this process, by reason.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "each is its reason")]
pub struct Exits {
    pub port: AtomicU64,
    pub mmio: AtomicU64,
    pub msr: AtomicU64,
    pub instruction: AtomicU64,
    pub interrupted: AtomicU64,
    pub hypercall: AtomicU64,
    pub memory_fault: AtomicU64,
    pub other: AtomicU64,
}

/// Memory type range default: enabled, write-back, as firmware leaves it. Linux keeps PAT off without it.
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 0x806;
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const EXTERNAL_INTERRUPT: u32 = 7;
const NMI: u32 = 4;

/// Gives every processor what firmware would: CPUID, memory types, FPU, local interrupt pins.
///
/// # Errors
/// [`VcpuError`], naming KVM's command.
pub fn prepare(vcpu: &VcpuFd, id: u32, cpuid: &CpuId) -> Result<(), VcpuError> {
    let failed = |command| move |reason| VcpuError { id, command, reason };
    vcpu.set_cpuid2(cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let entry = kvm_msr_entry { index: MTRR_DEFAULT_TYPE, data: MTRR_WRITE_BACK, ..Default::default() };
    if let Ok(msrs) = Msrs::from_entries(&[entry]) {
        vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    }
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })
        .map_err(failed("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    set_delivery(&mut lapic, LINT0, EXTERNAL_INTERRUPT);
    set_delivery(&mut lapic, LINT1, NMI);
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
}

/// Sets the delivery mode (bits 8 to 10) and clears the mask (bit 16) of a local vector table entry.
fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes: [u8; 4] = std::array::from_fn(|i| lapic.regs[register + i] as u8);
    let value = u32::from_le_bytes(bytes) & !0x1_0700 | mode << 8;
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[register + i] = byte as _;
    }
}

/// Puts the first processor into the image's state.
///
/// # Errors
/// [`VcpuError`].
pub fn enter(vcpu: &VcpuFd, state: &Registers) -> Result<(), VcpuError> {
    let failed = |command| move |reason| VcpuError { id: 0, command, reason };
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    sregs.cs = segment(&state.code);
    let data = segment(&state.data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gs.base = state.gs_base;
    (sregs.gdt.base, sregs.gdt.limit) = state.gdtr;
    (sregs.idt.base, sregs.idt.limit) = state.idtr;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (state.cr0, state.cr3, state.cr4, state.efer);
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.general;
    let (rip, rflags) = (state.rip, state.rflags);
    let regs = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

fn segment(from: &Segment) -> kvm_segment {
    let bit = |n: u16| (from.attributes >> n & 1) as u8;
    kvm_segment {
        base: u64::from(from.base),
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & 15) as u8,
        s: bit(4),
        dpl: (from.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        ..Default::default()
    }
}

/// Runs a processor until the VM ends, or until the board's gate is closed, as it is when the guest's init is ready. `emulated` is there for a machine with an emulated TEE, `snp` for an SNP guest.
pub fn run(
    vcpu: &mut VcpuFd,
    id: u32,
    board: &Board,
    exits: &Exits,
    mut emulated: Option<Processor>,
    snp: Option<&Running>,
) -> End {
    let count = |counter: &AtomicU64| {
        counter.fetch_add(1, Ordering::Relaxed);
    };
    if let Some(processor) = &mut emulated {
        match processor.wait(vcpu) {
            Ok(true) => {}
            Ok(false) => return End::Abandoned,
            Err(end) => return end,
        }
    }
    loop {
        if board.gate.as_ref().is_some_and(Gate::is_closed) {
            // What the last exit was for is done, and no instruction more: KVM then says that it was interrupted.
            vcpu.set_kvm_immediate_exit(1);
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Some(processor) = emulated.as_mut().filter(|_| Processor::owns(port)) {
                    count(&exits.instruction);
                    if let Err(end) = processor.instruction(vcpu, port, board) {
                        return match end {
                            End::Emulation(what) => End::Emulation(words(vcpu, id, &what)),
                            end => end,
                        };
                    }
                    continue;
                }
                count(&exits.port);
                if let Some(gate) =
                    board.gate.as_ref().filter(|_| (port, data) == (MARK_PORT, &[mark::INIT_READY]))
                {
                    gate.close(id);
                }
                if let Some(end) = board.port_write(port, data) {
                    return end;
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&exits.port);
                board.port_read(port, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&exits.mmio);
                board.mmio_read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&exits.mmio);
                board.mmio_write(address, data);
            }
            Ok(VcpuExit::X86Rdmsr(msr)) => {
                count(&exits.msr);
                match emulated.as_ref().and_then(|p| p.read_msr(msr.index)) {
                    Some(value) => *msr.data = value,
                    None => *msr.error = 1,
                }
            }
            Ok(VcpuExit::X86Wrmsr(msr)) => {
                count(&exits.msr);
                if !emulated.as_mut().is_some_and(|p| p.write_msr(msr.index, msr.data)) {
                    *msr.error = 1;
                }
            }
            Ok(VcpuExit::Hypercall(call)) if let Some(snp) = snp => {
                count(&exits.hypercall);
                *call.ret = snp.hypercall(call.nr, call.args);
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) if let Some(snp) = snp => {
                count(&exits.memory_fault);
                if let Err(what) = snp.fault(flags, gpa, size) {
                    return End::Kvm(format!("{what}, on processor {id}"));
                }
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SEV_TERM, data)) => {
                return guest::terminated(data.first().copied().unwrap_or_default());
            }
            Ok(VcpuExit::Unsupported(EXIT_SNP_REQ_CERTS)) if let Some(snp) = snp => {
                snp.give_certificates(vcpu.get_kvm_run());
            }
            Ok(VcpuExit::Shutdown) => return End::TripleFault,
            Ok(VcpuExit::InternalError) => return End::Kvm(words(vcpu, id, "internal error")),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return End::Kvm(words(vcpu, id, &format!("entry failed, hardware reason {reason:#x}")));
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return End::Kvm(words(vcpu, id, &format!("system event {kind}")));
            }
            Err(error)
                if matches!(error.errno(), libc::EINTR | libc::EAGAIN)
                    && board.gate.as_ref().is_some_and(Gate::is_closed) =>
            {
                // Closed before this entry, or while the processor was in the guest: the next one is cut short.
                if vcpu.get_kvm_run().immediate_exit == 1 {
                    return End::Stopped;
                }
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => count(&exits.interrupted),
            Ok(exit) => {
                let name = format!("exit {exit:?}");
                count(&exits.other);
                return End::Kvm(words(vcpu, id, &name));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => count(&exits.interrupted),
            Err(error) if error.errno() == libc::EFAULT && emulated.is_some() => {
                let what = "the guest touched a page in the wrong view, or one that it has not accepted,";
                return End::Emulation(words(vcpu, id, what));
            }
            Err(error) => return End::Kvm(words(vcpu, id, &format!("KVM_RUN: {error}"))),
        }
    }
}

/// What is needed to find the instruction.
fn words(vcpu: &VcpuFd, id: u32, what: &str) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(r), Ok(s)) => format!(
            "{what} on processor {id}: rip {:#x} rsp {:#x} rax {:#x} rdi {:#x} rsi {:#x} rflags {:#x} cs {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            r.rip, r.rsp, r.rax, r.rdi, r.rsi, r.rflags, s.cs.selector, s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        ),
        _ => format!("{what} on processor {id}"),
    }
}

/// Shared by the threads of all processors.
pub type SharedExits = Arc<Exits>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_rights_are_a_vmcss() {
        let code = segment(&Segment { selector: 0x10, attributes: 0xa09b, base: 0, limit: u32::MAX });
        assert_eq!(
            (code.type_, code.s, code.dpl, code.present, code.l, code.db, code.g),
            (11, 1, 0, 1, 1, 0, 1)
        );
        let data = segment(&Segment { selector: 0x18, attributes: 0xc093, base: 0, limit: u32::MAX });
        assert_eq!((data.type_, data.l, data.db, data.g), (3, 0, 1, 1));
    }
}
