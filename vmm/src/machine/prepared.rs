//! What no pod decides: the image, KVM, a VM without memory, processors and devices. A machine is made from it, at once or,
//! in a shell, when a pod is there for it.
//!
//! Owns: these steps and their order. Does not own: whether and for whom a shell waits (`shell`).

use std::{fs, fs::File, path::Path, sync::Arc};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{MachineError, TSS_ADDRESS, kvm_error};
use crate::{
    args::{Args, Tee},
    cpuid,
    igvm::{self, Platform},
    tee::snp,
    template::identity::Identity,
};

/// KVM, and what its processors can do.
pub(super) struct Host {
    pub(super) kvm: Kvm,
    pub(super) cpuid: CpuId,
}

impl Host {
    pub(super) fn open() -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(|e| {
            MachineError::Kvm(format!(
                "open /dev/kvm: {e}; load kvm_amd or kvm_intel, or use the rig (tests/rig)"
            ))
        })?;
        if kvm.get_api_version() != KVM_API_VERSION as i32 {
            return Err(MachineError::Kvm(format!(
                "/dev/kvm is not KVM's: API version {} where {KVM_API_VERSION} is wanted",
                kvm.get_api_version()
            )));
        }
        let cpuid = cpuid::supported(&kvm).map_err(kvm_error("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { kvm, cpuid })
    }
}

/// An image's file, open and mapped.
pub(super) struct ImageFile {
    pub(super) path: String,
    pub(super) file: File,
    pub(super) bytes: memmap2::Mmap,
    identity: Identity,
}

impl ImageFile {
    pub(super) fn open(path: &Path) -> Result<Self, MachineError> {
        let name = path.display().to_string();
        let failed = |source| MachineError::Open { path: name.clone(), source };
        let file = File::open(path).map_err(failed)?;
        let identity = Identity::of(&file.metadata().map_err(failed)?);
        // SAFETY: the file is the host's own and not written while it is an image; if it shrinks, this process ends.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        Ok(Self { path: name, file, bytes, identity })
    }

    /// Checks all of it.
    pub(super) fn read(&self, platform: Platform) -> Result<igvm::Image, MachineError> {
        let failed = |source| MachineError::Image { path: self.path.clone(), source };
        igvm::read(&self.bytes, platform).map_err(failed)
    }
}

/// A VM that has interrupt controllers at most.
///
/// Memory comes before the controllers, where both are made in one go: each controller is put on KVM's buses, and who tells KVM of memory then
/// waits until no reader of the buses as they were can be left (`synchronize_srcu` behind Linux 6.18's `call_srcu`): 4 to 11 ms, on a VM that has
/// no reader yet. The other way around nothing waits.
pub(super) struct EmptyVm {
    pub(super) vm: Arc<VmFd>,
    has_controllers: bool,
    /// Processor 0, where it was made ahead.
    pub(super) first: Option<VcpuFd>,
}

impl EmptyVm {
    pub(super) fn new(kvm: &Kvm, tee: Tee) -> Result<Self, MachineError> {
        let kind = if tee == Tee::Snp { u64::from(snp::abi::KVM_X86_SNP_VM) } else { 0 };
        let vm = Arc::new(kvm.create_vm_with_type(kind).map_err(kvm_error("KVM_CREATE_VM"))?);
        vm.set_tss_address(TSS_ADDRESS).map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
        Ok(Self { vm, has_controllers: false, first: None })
    }

    /// Makes the interrupt controllers, unless they are there. No processor can be made before.
    pub(super) fn make_controllers(&mut self, tee: Tee) -> Result<(), MachineError> {
        if self.has_controllers {
            return Ok(());
        }
        self.vm.create_irq_chip().map_err(kvm_error("KVM_CREATE_IRQCHIP"))?;
        if tee != Tee::None {
            // The security processor lets no guest have the TSC deadline timer; Linux measures the local APIC's by this one.
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            self.vm.create_pit2(pit).map_err(kvm_error("KVM_CREATE_PIT2"))?;
        }
        self.has_controllers = true;
        Ok(())
    }

    /// Processor `id`, unless it is there already.
    pub(super) fn processor(&mut self, id: u32) -> Result<VcpuFd, MachineError> {
        match self.first.take() {
            Some(first) if id == 0 => Ok(first),
            _ => self.vm.create_vcpu(u64::from(id)).map_err(kvm_error("KVM_CREATE_VCPU")),
        }
    }
}

/// All of it, for a pod without a TEE.
pub struct Prepared {
    pub(super) file: ImageFile,
    pub(super) image: Box<igvm::Image>,
    pub(super) host: Host,
    pub(super) vm: EmptyVm,
}

impl Prepared {
    /// Checks the image, then makes the VM and its first processor.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn new(image: &Path) -> Result<Self, MachineError> {
        let file = ImageFile::open(image)?;
        let image = Box::new(file.read(Platform::Native)?);
        let host = Host::open()?;
        let mut vm = EmptyVm::new(&host.kvm, Tee::None)?;
        vm.make_controllers(Tee::None)?;
        vm.first = Some(vm.processor(0)?);
        Ok(Self { file, image, host, vm })
    }

    /// Whether a machine as these arguments describe it can be made from this.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn fits(&self, args: &Args) -> Result<(), String> {
        if args.tee != Tee::None {
            return Err("its VM was made for a pod without a TEE".into());
        }
        if args.make_template.is_some() {
            return Err("a template is made from a start of its own".into());
        }
        let now = fs::metadata(&args.image).map_err(|e| format!("{}: {e}", args.image.display()))?;
        if Identity::of(&now) != self.file.identity {
            return Err(format!("{} is another file than when it was filled", args.image.display()));
        }
        Ok(())
    }
}
