//! Whether this host's KVM can run a stock guest: a guest of a few bytes goes to ring 3 and makes a system call.
//!
//! Owns: that guest and the verdict. Does not own: what anybody does about it.
//!
//! `/dev/kvm` alone says little. Some KVMs (PVM, for one) interpret ring 0 and run ring 3 natively, and there SYSCALL
//! never arrives in the guest's kernel: Linux boots for half a minute and dies with its init.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Why a stock guest cannot run here.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// There is no KVM for this user.
    #[error("/dev/kvm does not open: {0}; load kvm_amd or kvm_intel, or run as root")]
    NoKvm(kvm_ioctls::Error),
    /// KVM refused a step that every VMM takes.
    #[error("/dev/kvm: {command}: {reason}")]
    Refused {
        /// KVM's command.
        command: &'static str,
        /// The system's words.
        reason: String,
    },
    /// The guest stopped before its system call was answered.
    #[error("/dev/kvm: a guest's system call from ring 3 does not reach its ring 0 ({0})")]
    Stopped(String),
    /// The guest never came back.
    #[error("/dev/kvm: a guest of five instructions did not end in {0:?}")]
    Hung(Duration),
}

/// Addresses in the guest, one page each; [`SIZE`] bytes of RAM at 0.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const KERNEL: u64 = 0x5000;
const SYSTEM_CALL: u64 = 0x5800;
const USER: u64 = 0x6000;
const SIZE: usize = 0x1_0000;

/// Present, writable, for ring 3.
const TABLE: u64 = 0b111;
/// The same, 2 MiB.
const LARGE_PAGE: u64 = TABLE | 1 << 7;

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
/// SYSRET adds 16 for the code and 8 for the stack (AMD APM 2, 6.1.1).
const SYSRET_BASE: u16 = 0x18;
const USER_CODE: u16 = 0x28 | 3;

/// Null, ring 0 code and data, (32-bit code, not used,) ring 3 data and code: 64-bit descriptors.
const DESCRIPTORS: [u64; 6] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];

const PORT: u16 = 0xf0;

/// Ring 0 starts with rcx = [`USER`], r11 = flags: `sysretq`.
const KERNEL_CODE_BYTES: [u8; 3] = [0x48, 0x0f, 0x07];
/// Ring 3: `mov ebx, cs; syscall; ud2`.
const USER_BYTES: [u8; 6] = [0x8c, 0xcb, 0x0f, 0x05, 0x0f, 0x0b];
/// The system call's entry: `mov eax, cs; out PORT, al; mov eax, ebx; out PORT, al; hlt`. `out` needs ring 0.
const SYSTEM_CALL_BYTES: [u8; 9] = [0x8c, 0xc8, 0xe6, PORT as u8, 0x89, 0xd8, 0xe6, PORT as u8, 0xf4];

const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const EFER_SCE: u64 = 1;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
const CR0_PE_ET_NE_WP_PG: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;

/// Generous: an emulated machine on a busy host needs part of a second.
const PATIENCE: Duration = Duration::from_secs(20);

fn refused<E: std::fmt::Display>(command: &'static str) -> impl Fn(E) -> ProbeError {
    move |reason| ProbeError::Refused { command, reason: reason.to_string() }
}

/// Runs the guest.
///
/// # Errors
/// [`ProbeError`]: why no stock guest runs here.
pub fn stock_guest() -> Result<(), ProbeError> {
    let kvm = Kvm::new().map_err(ProbeError::NoKvm)?;
    let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
    let memory = memory(&vm)?;
    let vcpu = processor(&kvm, &vm)?;
    let signal = SIGRTMIN();
    register_signal_handler(signal, wake).map_err(refused("sigaction"))?;
    let (sender, receiver) = mpsc::channel();
    let runner = thread::spawn(move || {
        // Whoever waits has gone only when the process ends.
        let _ = sender.send(run(vcpu));
    });
    let verdict = match receiver.recv_timeout(PATIENCE) {
        Ok(verdict) => verdict,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            // KVM_RUN comes back from a signal; one that arrives just before it would be lost, so more follow.
            while !runner.is_finished() && runner.kill(signal).is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
            Err(ProbeError::Hung(PATIENCE))
        }
    };
    let _ = runner.join();
    drop((vm, memory));
    verdict
}

extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn memory(vm: &VmFd) -> Result<GuestMemoryMmap, ProbeError> {
    let failed = "guest memory";
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(refused(failed))?;
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).map_err(refused(failed));
    put(PML4, &(PDPT | TABLE).to_le_bytes())?;
    put(PDPT, &(PAGE_DIRECTORY | TABLE).to_le_bytes())?;
    put(PAGE_DIRECTORY, &LARGE_PAGE.to_le_bytes())?;
    put(GDT, &DESCRIPTORS.map(u64::to_le_bytes).concat())?;
    put(KERNEL, &KERNEL_CODE_BYTES)?;
    put(USER, &USER_BYTES)?;
    put(SYSTEM_CALL, &SYSTEM_CALL_BYTES)?;
    let host: &MmapRegion = memory_region(&memory)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: SIZE as u64,
        userspace_addr: host.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the mapping outlives the VM: the caller drops it after the VM's only processor has ended.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(memory)
}

fn memory_region(memory: &GuestMemoryMmap) -> Result<&MmapRegion, ProbeError> {
    use vm_memory::GuestMemory;
    memory
        .find_region(GuestAddress(0))
        .map(|region| &**region)
        .ok_or_else(|| refused("guest memory")("no region at 0"))
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    }
}

fn processor(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, ProbeError> {
    let vcpu = vm.create_vcpu(0).map_err(refused("KVM_CREATE_VCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(refused("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    sregs.cs = segment(KERNEL_CODE, 0xb, true);
    let data = segment(KERNEL_DATA, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, (DESCRIPTORS.len() * 8 - 1) as u16);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE_ET_NE_WP_PG, PML4, CR4_PAE);
    sregs.efer = EFER_SCE | EFER_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;
    let star = u64::from(SYSRET_BASE) << 48 | u64::from(KERNEL_CODE) << 32;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [msr(EFER, EFER_SCE | EFER_LME_LMA), msr(STAR, star), msr(LSTAR, SYSTEM_CALL)];
    let msrs = Msrs::from_entries(&entries).map_err(|e| refused("KVM_SET_MSRS")(format!("{e:?}")))?;
    if vcpu.set_msrs(&msrs).map_err(refused("KVM_SET_MSRS"))? != entries.len() {
        return Err(refused("KVM_SET_MSRS")("EFER, STAR or LSTAR cannot be set"));
    }
    let regs = kvm_regs { rip: KERNEL, rflags: 2, rcx: USER, r11: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(refused("KVM_SET_REGS"))?;
    Ok(vcpu)
}

/// The guest answers with its two code segments: ring 0's in the system call, ring 3's from before it.
fn run(mut vcpu: VcpuFd) -> Result<(), ProbeError> {
    let mut said = Vec::new();
    while said.len() < 2 {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [byte])) => said.push(*byte),
            Ok(exit) => return Err(ProbeError::Stopped(format!("it ended with {exit:?}"))),
            Err(error) => return Err(ProbeError::Stopped(error.to_string())),
        }
    }
    if said == [KERNEL_CODE as u8, USER_CODE as u8] {
        Ok(())
    } else {
        Err(ProbeError::Stopped(format!("its code segments were {said:x?}")))
    }
}
