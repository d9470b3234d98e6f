//! A processor of the emulated machine: the three instructions and two MSRs that only SEV-SNP has.
//!
//! Owns: registers in and out of a replaced instruction, the GHCB MSR, the start from a VMSA. Does not own: what a request
//! does ([`super::machine`]).

use std::sync::mpsc::Receiver;

use coffer_layout::snp::{MSR_GHCB, MSR_SEV_STATUS, SEV_STATUS_SNP};
use kvm_bindings::kvm_sregs;
use kvm_ioctls::VcpuFd;

use super::{
    machine::{Door, PORT_PVALIDATE, PORT_RMPADJUST, PORT_VMGEXIT, SharedMachine},
    rmp::Pvalidate,
};
use crate::{devices::board::Board, end::End, tee::snp::vmsa::Vmsa};

const CARRY: u64 = 1;
/// Carry, parity, adjust, zero, sign, overflow.
const ARITHMETIC: u64 = 0x8d5;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
const BUSY_TASK_64: u8 = 11;

/// One processor.
pub struct Processor {
    machine: SharedMachine,
    msr: u64,
    registered: Option<u64>,
    /// Brings the state to start from; the first processor has it already.
    start: Option<Receiver<Vmsa>>,
}

impl Processor {
    /// A processor of a machine.
    #[must_use]
    pub fn new(machine: SharedMachine, start: Option<Receiver<Vmsa>>) -> Self {
        Self { machine, msr: 0, registered: None, start }
    }

    /// Waits until another processor starts this one. False when the machine ends first.
    ///
    /// # Errors
    /// KVM does not take the state.
    pub fn wait(&mut self, vcpu: &VcpuFd) -> Result<bool, End> {
        let Some(start) = self.start.take() else { return Ok(true) };
        let Ok(vmsa) = start.recv() else { return Ok(false) };
        enter(vcpu, &vmsa).map_err(|e| End::Kvm(format!("start a processor from its VMSA: {e}")))?;
        Ok(true)
    }

    /// Whether a port stands for an instruction.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        matches!(port, PORT_PVALIDATE | PORT_RMPADJUST | PORT_VMGEXIT)
    }

    /// Executes the instruction that a port stands for.
    ///
    /// # Errors
    /// The machine ends.
    pub fn instruction(&mut self, vcpu: &mut VcpuFd, port: u16, board: &Board) -> Result<(), End> {
        let kvm = |what| move |e: kvm_ioctls::Error| End::Kvm(format!("{what}: {e}"));
        // KVM completes the `out` at the next KVM_RUN; only then are the registers those behind it.
        vcpu.set_kvm_immediate_exit(1);
        let completed = vcpu.run().map(|exit| format!("{exit:?}"));
        vcpu.set_kvm_immediate_exit(0);
        match completed {
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(kvm("complete an instruction")(error)),
            Ok(exit) => return Err(End::Kvm(format!("complete an instruction: exit {exit}"))),
        }
        if port == PORT_VMGEXIT {
            let machine = SharedMachine::clone(&self.machine);
            return Door { machine: &machine, board }.vmgexit(&mut self.msr, &mut self.registered);
        }
        let mut registers = vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?;
        let at = vcpu.translate_gva(registers.rax).map_err(kvm("KVM_TRANSLATE"))?;
        if at.valid == 0 {
            let words = format!(
                "instruction at {:#x} names {:#x}, which is not mapped",
                registers.rip, registers.rax
            );
            return Err(End::Emulation(words));
        }
        let alias = 1 << self.machine.views.c_bit();
        if at.physical_address & alias == 0 {
            let words = format!(
                "instruction at {:#x} names {:#x}, which is mapped without the C-bit",
                registers.rip, registers.rax
            );
            return Err(End::Emulation(words));
        }
        let (gpa, large) = (at.physical_address & !alias, registers.rcx & 1 != 0);
        registers.rflags &= !ARITHMETIC;
        if port == PORT_RMPADJUST {
            self.machine.rmpadjust(gpa, registers.rdx)?;
            registers.rax = 0;
        } else {
            registers.rax = match self.machine.pvalidate(gpa, large, registers.rdx & 1 != 0)? {
                Pvalidate::Done => 0,
                Pvalidate::FailInput => 1,
                Pvalidate::SizeMismatch => 6,
            };
            if registers.rax != 0 {
                registers.rflags |= CARRY;
            }
        }
        vcpu.set_regs(&registers).map_err(kvm("KVM_SET_REGS"))
    }

    /// Reads an MSR that KVM leaves to this process.
    #[must_use]
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        match index {
            MSR_SEV_STATUS => Some(SEV_STATUS_SNP),
            MSR_GHCB => Some(self.msr),
            _ => None,
        }
    }

    /// Writes one. False makes the guest fault.
    pub fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let ours = index == MSR_GHCB;
        if ours {
            self.msr = value;
        }
        ours
    }
}

/// Puts a processor into the state of a VMSA.
///
/// # Errors
/// KVM's.
pub fn enter(vcpu: &VcpuFd, vmsa: &Vmsa) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    set_sregs(vmsa, &mut sregs);
    vmsa.enter(vcpu, &sregs)
}

/// Not for a guest on hardware, where KVM measures the task register that it is given.
fn set_sregs(vmsa: &Vmsa, sregs: &mut kvm_sregs) {
    vmsa.set_sregs(sregs);
    if sregs.efer & EFER_LONG_ACTIVE != 0 {
        // SVM takes any task register; VMX wants a busy one of 64 bits.
        sregs.tr.type_ = BUSY_TASK_64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tee::snp::vmsa::tests::startable;

    #[test]
    fn the_emulated_machine_enters_with_a_task_register_that_vmx_takes() {
        let vmsa = Vmsa::new(startable());
        let (mut launched, mut entered) = (kvm_sregs::default(), kvm_sregs::default());
        vmsa.set_sregs(&mut launched);
        set_sregs(&vmsa, &mut entered);
        assert_eq!((launched.tr.type_, entered.tr.type_), (3, BUSY_TASK_64));
        launched.tr = entered.tr;
        assert_eq!(launched, entered);
    }
}
