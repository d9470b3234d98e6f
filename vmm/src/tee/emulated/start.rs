//! From a launch plan to processors that can run, on a VM that KVM takes for a plain one.
//!
//! Owns: the order of making things. Does not own: what happens at run time ([`super::machine`]).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
};

use coffer_layout::PAGE;
use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;

use super::{
    C_BIT,
    machine::{Emulated, SharedMachine, Start},
    messages::SecurityProcessor,
    processor::{self, Processor},
    views::Views,
};
use crate::{
    cpuid,
    memory::Ram,
    tee::snp::{
        self,
        launch::{Counts, Guest, Launch, SnpError},
        plan::LaunchPlan,
    },
    vcpu::{self, VcpuError},
};

/// Where the development root lies when nobody says.
const KEYS: &str = "/var/lib/coffer/development-root";

/// Why there is no emulated machine.
#[derive(Debug, Error)]
pub enum StartError {
    /// KVM.
    #[error("{command}: {reason}")]
    Kvm {
        /// Its command.
        command: &'static str,
        /// Its words.
        reason: kvm_ioctls::Error,
    },
    /// A processor.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The launch.
    #[error(transparent)]
    Launch(#[from] SnpError),
    /// CPUID.
    #[error(transparent)]
    Cpuid(#[from] snp::cpuid::TooMany),
    /// The system.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
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
    /// Directory of the development root.
    pub keys: Option<&'a Path>,
    /// Certificate table for extended requests.
    pub certificates: Option<&'a Path>,
}

/// An emulated machine before it runs.
pub struct Started {
    /// Processors, each with its emulated part.
    pub vcpus: Vec<(VcpuFd, Processor)>,
    /// What devices see.
    pub memory: Arc<Ram>,
    /// The machine.
    pub machine: SharedMachine,
    /// What the launch cost.
    pub counts: Counts,
}

/// Makes memory, processors and the launch.
///
/// # Errors
/// [`StartError`].
pub fn start(
    vm: &VmFd,
    base: &CpuId,
    plan: &LaunchPlan,
    wanted: &Wanted<'_>,
    log: &mut dyn FnMut(&str),
) -> Result<Started, StartError> {
    let kvm = |command| move |reason| StartError::Kvm { command, reason };
    let host = |what| move |source| StartError::Host { what, source };
    super::filter_msrs(vm).map_err(kvm("KVM_X86_SET_MSR_FILTER"))?;
    let views = Views::new(wanted.ram, plan.window, C_BIT).map_err(host("reserve guest memory"))?;
    for (slot, range) in views.slots().iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: range.gpa,
            memory_size: range.size,
            userspace_addr: range.address,
            flags: 0,
        };
        // SAFETY: the range is a mapping that lives as long as the process, and no two overlap in the guest.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    let full = |e: vmm_sys_util::fam::Error| io::Error::other(format!("{e:?}"));
    let base = super::cpuid(base).map_err(|e| host("make the CPUID table")(full(e)))?;
    let mut vcpus = Vec::new();
    let (mut starters, mut starts) = (Vec::new(), Vec::new());
    for id in 0..wanted.vcpus {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(kvm("KVM_CREATE_VCPU"))?;
        vcpu::prepare(&vcpu, id, &cpuid::for_vcpu(&base, id, wanted.vcpus))?;
        vcpus.push(vcpu);
        let (starter, start) = mpsc::sync_channel(1);
        if id > 0 {
            starters.push(starter);
        }
        starts.push((id > 0).then_some(start));
    }
    let first = cpuid::for_vcpu(&base, 0, wanted.vcpus);
    let page: [u8; PAGE as usize] = snp::cpuid::page(first.as_slice())?;
    let signature = first.as_slice().iter().find(|e| e.function == 1).map_or(0, |e| e.eax);
    let certificates = wanted.certificates.map(fs::read).transpose().map_err(host("read --certificates"))?;
    let keys = wanted.keys.map_or_else(|| PathBuf::from(KEYS), Path::to_path_buf);
    let security_processor =
        SecurityProcessor::new(keys, certificates, signature).map_err(host("make the guest's keys"))?;
    let mut launch = Launch::default();
    let guest = Guest { ram: wanted.ram, file: wanted.file, cpuid: &page };
    let start = Start { guest, cpuid: &first, starters };
    let machine = Emulated::launch(plan, views, security_processor, start, &mut launch, log)?;
    processor::enter(&vcpus[0], &plan.vmsa).map_err(kvm("set the first processor's state"))?;
    super::catch_faults();
    let machine = Arc::new(machine);
    let memory = machine.views.devices();
    let vcpus = vcpus.into_iter().zip(starts);
    let vcpus = vcpus.map(|(vcpu, start)| (vcpu, Processor::new(Arc::clone(&machine), start))).collect();
    Ok(Started { vcpus, memory, machine, counts: launch.counts })
}
