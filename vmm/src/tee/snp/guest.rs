//! An SNP guest on hardware: from a launch plan to processors that can run, and the exits that only such a guest has.
//!
//! Owns: the order of making things, certificates for extended requests, how a guest's last words are read. Does not own:
//! system calls ([`super::kvm`]). **No SEV-SNP hardware has run this yet.**

use std::{
    arch::x86_64::__cpuid,
    fs::{self, File},
    io,
    path::Path,
    sync::Arc,
};

use coffer_layout::{
    PAGE,
    snp::{CPUID_COHERENT, TERMINATION_SET},
};
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_run, kvm_sregs, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::{
    abi::CPUID_SEV,
    conversion::Conversions,
    cpuid::{self as table, TooMany},
    kvm::{self, Converter, Kvm, Memory, MemoryError},
    launch::{Counts, Failure, Guest, Launch, SnpError},
    plan::LaunchPlan,
    vmsa::Vmsa,
};
use crate::{
    cpuid,
    end::End,
    vcpu::{self, VcpuError},
};

const MSR_PAT: u32 = 0x277;
/// Most bytes of a certificate table: the guest's driver takes no more (SEV_FW_BLOB_MAX_SIZE).
const MOST_CERTIFICATES: usize = 0x4000;

/// Why there is no guest.
#[derive(Debug, Error)]
pub enum GuestError {
    /// KVM.
    #[error("{command}: {reason}")]
    Kvm {
        /// Its command.
        command: &'static str,
        /// Its words.
        reason: kvm_ioctls::Error,
    },
    /// The firmware's device.
    #[error("open /dev/sev: {0}")]
    Sev(io::Error),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A processor.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The launch.
    #[error(transparent)]
    Launch(#[from] SnpError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] TooMany),
    /// KVM's table has no room for one more leaf.
    #[error("KVM's CPUID table is full")]
    Full,
    /// The file with certificates.
    #[error("--certificates {0}")]
    Certificates(String),
}

/// What the caller decides.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// RAM, `(first address, bytes)`.
    pub ram: &'a [(u64, u64)],
    /// Processors.
    pub vcpus: u32,
    /// The image file.
    pub file: &'a [u8],
    /// Certificate table for extended requests.
    pub certificates: Option<&'a Path>,
}

/// A guest before it runs.
pub struct Started {
    /// Processors.
    pub vcpus: Vec<VcpuFd>,
    /// What its exits need.
    pub running: Running,
    /// What the launch cost.
    pub counts: Counts,
}

/// A guest that runs.
pub struct Running {
    conversions: Conversions,
    /// Its memory.
    pub converter: Converter,
    certificates: Vec<u8>,
}

/// Position of this processor's C-bit.
#[must_use]
pub fn c_bit() -> u32 {
    __cpuid(CPUID_SEV).ebx & 0x3f
}

/// KVM's table as the firmware takes it, with the leaf that KVM leaves to the VMM.
fn cpuid_table(base: &CpuId, ebx: u32) -> Result<CpuId, GuestError> {
    // SEV, SEV-ES, SEV-SNP.
    const FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 4;
    const ONE_BIT_LESS: u32 = 1 << 6;
    let mut entries: Vec<_> = base.as_slice().iter().filter(|e| e.function != CPUID_SEV).copied().collect();
    for entry in entries.iter_mut().filter(|e| e.function == 0x8000_0000) {
        entry.eax = entry.eax.max(CPUID_SEV);
    }
    table::make_acceptable(&mut entries);
    entries.push(kvm_cpuid_entry2 {
        function: CPUID_SEV,
        eax: FEATURES,
        ebx: ebx & (0x3f | CPUID_COHERENT) | ONE_BIT_LESS,
        ..Default::default()
    });
    CpuId::from_entries(&entries).map_err(|_| GuestError::Full)
}

/// Makes memory, processors and the launch, on a VM of type SNP.
///
/// # Errors
/// [`GuestError`]; the VM is of no use afterwards.
pub fn start(
    vm: &Arc<VmFd>,
    base: &CpuId,
    plan: &LaunchPlan,
    wanted: &Wanted<'_>,
    log: &mut dyn FnMut(&str),
) -> Result<Started, GuestError> {
    let failed = |command| move |reason| GuestError::Kvm { command, reason };
    let certificates = wanted.certificates.map(certificate_file).transpose()?.unwrap_or_default();
    let sev: File = kvm::open_sev().map_err(GuestError::Sev)?;
    kvm::enable_conversions(vm).map_err(failed("KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)"))?;
    let mut launch = Launch::default();
    let mut host = Kvm { vm, sev: &sev, memory: None };
    launch.init(plan.vmsa.features(), &mut host)?;
    if !certificates.is_empty() {
        host.enable_certificates().map_err(no_certificates)?;
    }
    let memory = Memory::new(vm, wanted.ram, plan.window)?;
    let base = cpuid_table(base, __cpuid(CPUID_SEV).ebx)?;
    let mut vcpus = Vec::new();
    for id in 0..wanted.vcpus {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
        vcpu::prepare(&vcpu, id, &cpuid::for_vcpu(&base, id, wanted.vcpus))?;
        vcpus.push(vcpu);
    }
    let page = table::page(cpuid::for_vcpu(&base, 0, wanted.vcpus).as_slice())?;
    enter(&vcpus[0], &plan.vmsa).map_err(failed("set the first processor's state"))?;
    let guest = Guest { ram: wanted.ram, file: wanted.file, cpuid: &page };
    launch.run(plan, &guest, &mut Kvm { vm, sev: &sev, memory: Some(&memory) }, log)?;
    let converter = Converter { vm: Arc::clone(vm), memory };
    let running = Running { conversions: Conversions::new(wanted.ram), converter, certificates };
    Ok(Started { vcpus, running, counts: launch.counts })
}

fn certificate_file(path: &Path) -> Result<Vec<u8>, GuestError> {
    let wrong = |why: String| GuestError::Certificates(format!("{}: {why}", path.display()));
    let table = fs::read(path).map_err(|e| wrong(e.to_string()))?;
    match table.len() {
        1..=MOST_CERTIFICATES => Ok(table),
        bytes => Err(wrong(format!("{bytes} bytes: a certificate table has 1 to {MOST_CERTIFICATES}"))),
    }
}

fn no_certificates(Failure { errno, .. }: Failure) -> GuestError {
    let words = io::Error::from_raw_os_error(errno);
    GuestError::Certificates(format!(
        "SNP_ENABLE_REQ_CERTS: {words}: Linux 7.0 or newer is needed; run without"
    ))
}

/// What of the VMSA KVM takes by its own commands: it makes the same page of it, which is measured.
fn enter(vcpu: &VcpuFd, vmsa: &Vmsa) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    set_sregs(vmsa, &mut sregs);
    vmsa.enter(vcpu, &sregs)?;
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: vmsa.xcr0(), ..Default::default() };
    vcpu.set_xcrs(&xcrs)?;
    let entry = kvm_msr_entry { index: MSR_PAT, data: vmsa.pat(), ..Default::default() };
    match Msrs::from_entries(&[entry]) {
        Ok(msrs) => vcpu.set_msrs(&msrs).map(|_| ()),
        Err(_) => Err(kvm_ioctls::Error::new(libc::ENOMEM)),
    }
}

/// As the image has them, to the last bit: KVM measures what it is given. The task register that VMX wants would be measured too.
fn set_sregs(vmsa: &Vmsa, sregs: &mut kvm_sregs) {
    vmsa.set_sregs(sregs);
}

impl Running {
    /// Answers KVM_EXIT_HYPERCALL.
    #[must_use]
    pub fn hypercall(&self, number: u64, args: [u64; 6]) -> u64 {
        self.conversions.hypercall(number, args, &self.converter)
    }

    /// Answers KVM_EXIT_MEMORY_FAULT.
    ///
    /// # Errors
    /// In words why the guest cannot go on.
    pub fn fault(&self, flags: u64, gpa: u64, size: u64) -> Result<(), String> {
        self.conversions.fault(flags, gpa, size, &self.converter)
    }

    /// Answers KVM_EXIT_SNP_REQ_CERTS in the processor's run page.
    pub fn give_certificates(&self, run: &mut kvm_run) {
        // SAFETY: for this exit the kernel has put three numbers of 64 bits there; any bytes are such numbers.
        let words = unsafe { &mut run.__bindgen_anon_1.padding };
        let number = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| words[at + i] as u8));
        let memory = &self.converter.memory.shared;
        let write = |gpa, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(gpa)).is_ok();
        let (pages, ret) = answer_certificates(&self.certificates, number(0), number(8), write);
        for (at, value) in [(8, pages), (16, ret)] {
            for (place, byte) in words[at..at + 8].iter_mut().zip(value.to_ne_bytes()) {
                *place = byte as _;
            }
        }
    }
}

/// Pages and errno for a guest that asks for certificates, with room for so many pages at an address.
fn answer_certificates(table: &[u8], gpa: u64, pages: u64, write: impl Fn(u64, &[u8]) -> bool) -> (u64, u64) {
    let needed = (table.len() as u64).div_ceil(PAGE);
    if pages < needed {
        return (needed, libc::ENOSPC as u64);
    }
    if write(gpa, table) { (pages, 0) } else { (pages, libc::EIO as u64) }
}

/// How a guest ended that wrote this to the GHCB MSR as its last word.
#[must_use]
pub fn terminated(msr: u64) -> End {
    let (set, code) = ((msr >> 12 & 0xf) as u8, (msr >> 16) as u8);
    if set == TERMINATION_SET { End::ShimRefused(code) } else { End::GuestTerminated { set, code } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use igvm::snp_defs::SevSelector;
    use kvm_bindings::kvm_segment;
    use std::cell::Cell;
    use zerocopy::IntoBytes;

    /// As svm_set_segment of Linux (arch/x86/kvm/svm/svm.c), whose result sev_es_sync_vmsa copies into the VMSA.
    fn as_kvm_writes_it(segment: &kvm_segment) -> SevSelector {
        let bit = |value: u8, at: u16| u16::from(value & 1) << at;
        let attrib = u16::from(segment.type_ & 15)
            | bit(segment.s, 4)
            | u16::from(segment.dpl & 3) << 5
            | bit(segment.present & !segment.unusable, 7)
            | bit(segment.avl, 8)
            | bit(segment.l, 9)
            | bit(segment.db, 10)
            | bit(segment.g, 11);
        SevSelector { selector: segment.selector, attrib, limit: segment.limit, base: segment.base }
    }

    #[test]
    fn kvm_makes_the_images_vmsa_of_the_registers_that_it_is_given() {
        let image = coffer_image::platform::snp::entry_state(51);
        let vmsa = Vmsa::new(image.as_bytes()[..PAGE as usize].try_into().unwrap());
        let mut sregs = kvm_sregs::default();
        set_sregs(&vmsa, &mut sregs);
        for (name, given, wanted) in [
            ("ES", &sregs.es, &image.es),
            ("CS", &sregs.cs, &image.cs),
            ("SS", &sregs.ss, &image.ss),
            ("DS", &sregs.ds, &image.ds),
            ("FS", &sregs.fs, &image.fs),
            ("GS", &sregs.gs, &image.gs),
            ("LDTR", &sregs.ldt, &image.ldtr),
            ("TR", &sregs.tr, &image.tr),
        ] {
            let made = as_kvm_writes_it(given);
            assert_eq!(made.as_bytes(), wanted.as_bytes(), "{name}: attributes {:#x}", made.attrib);
        }
        // KVM adds EFER.SVME and CR4.MCE by itself.
        assert_eq!((sregs.efer | 1 << 12, sregs.cr4 | 1 << 6), (image.efer, image.cr4));
        assert_eq!((sregs.cr0, sregs.cr3), (image.cr0, image.cr3));
        assert_eq!((u32::from(sregs.gdt.limit), sregs.gdt.base), (image.gdtr.limit, image.gdtr.base));
        assert_eq!((u32::from(sregs.idt.limit), sregs.idt.base), (image.idtr.limit, image.idtr.base));
    }

    #[test]
    fn certificates_go_where_there_is_room() {
        let table = vec![7; 5000];
        let at = Cell::new(None);
        let write = |gpa, bytes: &[u8]| {
            at.set(Some((gpa, bytes.len())));
            gpa != 0xbad000
        };
        assert_eq!(answer_certificates(&table, 0x4000, 1, write), (2, libc::ENOSPC as u64));
        assert_eq!(at.get(), None);
        assert_eq!(answer_certificates(&table, 0x4000, 4, write), (4, 0));
        assert_eq!(at.get(), Some((0x4000, 5000)));
        assert_eq!(answer_certificates(&table, 0xbad000, 4, write), (4, libc::EIO as u64));
    }

    #[test]
    fn a_certificate_file_has_a_size() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("table");
        for (size, good) in [(0, false), (1, true), (MOST_CERTIFICATES, true), (MOST_CERTIFICATES + 1, false)]
        {
            fs::write(&file, vec![0; size]).unwrap();
            assert_eq!(certificate_file(&file).is_ok(), good, "{size}");
        }
    }

    #[test]
    fn last_words_are_the_shims_or_linuxs() {
        // GHCB specification, 2.3.1: 0x100 in the low 12 bits, set in 15:12, code in 23:16.
        assert_eq!(terminated(0x0002_1100), End::GuestTerminated { set: 1, code: 2 });
        assert_eq!(terminated(0x0005_0100 | u64::from(TERMINATION_SET) << 12), End::ShimRefused(5));
    }

    #[test]
    fn the_leaf_that_kvm_leaves_out_says_where_the_c_bit_is() {
        let base = CpuId::from_entries(&[
            kvm_cpuid_entry2 { function: 0x8000_0000, eax: 0x8000_0008, ..Default::default() },
            kvm_cpuid_entry2 { function: CPUID_SEV, eax: 0xff, ..Default::default() },
        ])
        .unwrap();
        let made = cpuid_table(&base, 51 | 5 << 6 | 1 << 31).unwrap();
        let leaves: Vec<_> = made.as_slice().iter().filter(|e| e.function == CPUID_SEV).collect();
        assert_eq!(leaves.len(), 1);
        assert_eq!((leaves[0].eax, leaves[0].ebx), (0x1a, 51 | 1 << 6 | 1 << 31));
        assert_eq!(made.as_slice()[0].eax, CPUID_SEV);
    }
}
