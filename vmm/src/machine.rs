//! The machine: made from checked arguments and a checked image, run until it ends.
//!
//! Owns: the order of making things. No VM is made before the whole image was checked, or a template in its place (`saved`).
//! What no pod decides may have been made ahead (`prepared`).

mod arrival;
mod growth;
mod prepared;
mod saved;

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{Arc, Mutex, atomic::Ordering, mpsc},
    thread,
};

use coffer_layout::{MMIO_IRQS, SERIAL_IRQ, mmio_address, slot};
use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

pub use self::prepared::Prepared;
use self::{
    arrival::Arrivals,
    growth::Growth,
    prepared::{EmptyVm, Host, ImageFile},
};
use crate::{
    args::{Args, Tee},
    confine, cpuid,
    devices::{
        board::{Board, Slots},
        serial,
        virtio::{
            DeviceError, VirtioDevice,
            blk::{Blk, BlkError},
            fs::{Fs, FsError},
            mmio::{QUEUE_NOTIFY, Window},
            net::{Net, NetError},
            rng::Rng,
            vsock::{Ask, Vsock, VsockError},
        },
    },
    end::End,
    igvm::{Image, ImageError, Platform},
    launch::{self, LaunchError},
    log::{Level, Log},
    memory::{self, MemoryError, Ram},
    tee::{
        emulated::{self, machine::SharedMachine, processor::Processor, start::StartError},
        snp::{
            self,
            guest::{GuestError, Running},
            plan::{LaunchPlan, PlanError},
        },
    },
    template::{Template, TemplateError, gate::Gate},
    trace::Trace,
    vcpu::{self, Exits, VcpuError},
};

/// Context id of every guest; the socket's path tells pods apart.
const GUEST_CID: u64 = 3;
/// Three pages below 4 GiB that Intel's KVM needs for itself.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why no VM runs. Each kind has an exit code of its own.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each says what it is")]
pub enum MachineError {
    #[error("open image {path}: {source}")]
    Open { path: String, source: io::Error },
    #[error("{path}: {source}")]
    Image { path: String, source: ImageError },
    #[error("{path}: {source}")]
    Launch { path: String, source: LaunchError },
    #[error("{path}: {source}")]
    Plan { path: String, source: PlanError },
    #[error("emulated SEV-SNP: {0}")]
    Emulated(#[from] StartError),
    #[error("no usable KVM: {0}")]
    Kvm(String),
    #[error("this host cannot start SEV-SNP guests:\n  {}", .0.join("\n  "))]
    NoSnp(Vec<String>),
    #[error("SEV-SNP: {0}")]
    Snp(#[from] GuestError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("device {0}")]
    Device(#[from] DeviceError),
    #[error("device vsock: {0}")]
    Vsock(#[from] VsockError),
    #[error("device fs: {0}")]
    Fs(#[from] FsError),
    #[error("device blk: {0}")]
    Blk(#[from] BlkError),
    #[error("device net: {0}")]
    Net(#[from] NetError),
    #[error("template {path}: {source}")]
    Template { path: String, source: TemplateError },
    #[error("{what}: {source}")]
    Host { what: &'static str, source: io::Error },
}

impl MachineError {
    /// Exit code of the process.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Open { .. } | Self::Image { .. } | Self::Launch { .. } | Self::Plan { .. } => 65,
            Self::Kvm(_) | Self::Vcpu(_) | Self::Snp(_) | Self::Emulated(_) => 69,
            Self::NoSnp(_) => 78,
            Self::Memory(_) => 73,
            Self::Device(_)
            | Self::Vsock(_)
            | Self::Fs(_)
            | Self::Blk(_)
            | Self::Net(_)
            | Self::Template { .. }
            | Self::Host { .. } => 74,
        }
    }
}

fn kvm_error(command: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |e| MachineError::Kvm(format!("{command}: {e}"))
}

/// What a launch does, by the kind of machine.
enum Planned {
    Plain(launch::Plan),
    Saved(Box<Template>),
    Snp(LaunchPlan),
    Emulated(LaunchPlan),
}

/// Processors and memory.
struct Made {
    vcpus: Vec<(VcpuFd, Option<Processor>)>,
    memory: Arc<Ram>,
    emulated: Option<SharedMachine>,
    snp: Option<Arc<Running>>,
}

/// A machine whose processors have not run yet.
pub struct Machine {
    vcpus: Vec<(VcpuFd, Option<Processor>)>,
    emulated: Option<SharedMachine>,
    snp: Option<Arc<Running>>,
    board: Arc<Board>,
    lifeline: Option<OwnedFd>,
    saving: saved::Saving,
    // Dropped last: the processors refer to it.
    _vm: Arc<VmFd>,
    _memory: Arc<Ram>,
}

impl Machine {
    /// Checks the image and makes the VM, unless that was done ahead; then makes all that a pod decides.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn new(
        args: &Args,
        prepared: Option<Box<Prepared>>,
        trace: Trace,
        log: Log,
    ) -> Result<Self, MachineError> {
        let (file, image, host, vm) = match prepared {
            Some(prepared) => {
                let Prepared { file, image, host, vm } = *prepared;
                (file, Some(image), Some(host), Some(vm))
            }
            None => (ImageFile::open(&args.image)?, None, None, None),
        };
        let (template, host) = saved::find(args, host, &log)?;
        let planned = match template {
            Some(template) => Planned::Saved(Box::new(template)),
            None => plan(args, &file, image)?,
        };
        trace.stage(if vm.is_some() { "image-planned" } else { "image-checked" });

        let Host { kvm, cpuid: base } = host.map_or_else(Host::open, Ok)?;
        let mut empty = match vm {
            Some(vm) => vm,
            None => {
                let vm = EmptyVm::new(&kvm, args.tee)?;
                trace.stage("vm-created");
                vm
            }
        };
        let (image, vm) = (&file.bytes, Arc::clone(&empty.vm));
        let mut restored = Vec::new();
        let Made { vcpus, memory, emulated, snp } = match planned {
            Planned::Plain(plan) => make_plain(args, &mut empty, &base, &plan, &file, &trace)?,
            Planned::Saved(template) => {
                let made = saved::make(args, &mut empty, &base, &template, &trace)?;
                restored = template.state.windows;
                made
            }
            Planned::Snp(plan) => {
                empty.make_controllers(args.tee)?;
                make_snp(args, &vm, &base, &plan, image, &trace, &log)?
            }
            Planned::Emulated(plan) => {
                empty.make_controllers(args.tee)?;
                make_emulated(args, &vm, &base, &plan, image, &trace, &log)?
            }
        };
        trace.stage("vcpus-set");

        let slots = make_devices(args, &vm, &memory, &base)?;
        let console = args.console.as_deref().map(|path| -> Result<_, MachineError> {
            let line = irq_line(&vm, SERIAL_IRQ)?;
            let failed = |source| MachineError::Host { what: "open the console", source };
            Ok(Mutex::new(serial::open(path, line).map_err(failed)?))
        });
        let console = console.transpose()?;
        trace.stage("devices-made");
        let mut board = Board::new(slots, console, trace, log);
        board.gate = args.make_template.as_ref().map(|_| Gate::default());
        // SAFETY: the caller inherited this descriptor for this purpose and nobody else here uses it.
        let lifeline = args.lifeline.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let saving = saved::Saving::new(args, kvm, base, restored);
        Ok(Self { vcpus, emulated, snp, board: Arc::new(board), lifeline, saving, _vm: vm, _memory: memory })
    }

    /// Runs until the VM ends, for whatever reason.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn run(self) -> Result<End, MachineError> {
        let failed = |source| MachineError::Host { what: "start a processor's thread", source };
        confine::install()
            .map_err(|source| MachineError::Host { what: "refuse system calls (seccomp)", source })?;
        let (sender, ends) = mpsc::channel();
        let exits = Arc::new(Exits::default());
        if let Some(lifeline) = self.lifeline {
            let sender = sender.clone();
            let watch = move || {
                wait_for_hangup(&lifeline);
                let _ = sender.send(End::Abandoned);
            };
            thread::Builder::new().name("lifeline".into()).spawn(watch).map_err(failed)?;
        }
        self.saving.start_devices(&self.board)?;
        self.board.trace.stage("first-run");
        let mut threads = Vec::new();
        for (id, (mut vcpu, processor)) in self.vcpus.into_iter().enumerate() {
            let (sender, board, exits) = (sender.clone(), Arc::clone(&self.board), Arc::clone(&exits));
            let snp = self.snp.clone();
            let stopped = self.saving.stopped();
            let body = move || {
                let end = vcpu::run(&mut vcpu, id as u32, &board, &exits, processor, snp.as_deref());
                if end == End::Stopped {
                    saved::put(&stopped, id, vcpu);
                }
                // When nobody listens any more another processor ended the VM.
                let _ = sender.send(end);
            };
            threads.push(thread::Builder::new().name(format!("vcpu{id}")).spawn(body).map_err(failed)?);
        }
        drop(sender);
        let end = match ends.recv().unwrap_or(End::Abandoned) {
            End::Stopped => self.saving.finish(&threads, &ends, &self.board, &self._vm, &self._memory)?,
            end => end,
        };
        self.board.trace.stage("ended");
        self.board.trace.counts(&[
            ("port-exits", exits.port.load(Ordering::Relaxed)),
            ("mmio-exits", exits.mmio.load(Ordering::Relaxed)),
            ("msr-exits", exits.msr.load(Ordering::Relaxed)),
            ("instruction-exits", exits.instruction.load(Ordering::Relaxed)),
            ("hypercall-exits", exits.hypercall.load(Ordering::Relaxed)),
            ("memory-fault-exits", exits.memory_fault.load(Ordering::Relaxed)),
            ("interrupted", exits.interrupted.load(Ordering::Relaxed)),
            ("unknown-accesses", self.board.unknown.load(Ordering::Relaxed)),
        ]);
        if let Some(emulated) = &self.emulated {
            self.board.trace.counts(&emulated.trace());
        }
        Ok(end)
    }
}

/// Checks the image, unless it is `checked`, and plans its launch.
fn plan(args: &Args, file: &ImageFile, checked: Option<Box<Image>>) -> Result<Planned, MachineError> {
    let ram = memory::layout(args.memory_mib << 20);
    match args.tee {
        Tee::None => {
            let image = checked.map_or_else(|| file.read(Platform::Native).map(Box::new), Ok)?;
            let plan = launch::plan(&image, &ram, args.vcpus, &file.bytes);
            plan.map(Planned::Plain)
                .map_err(|source| MachineError::Launch { path: file.path.clone(), source })
        }
        Tee::Snp | Tee::SnpEmulated => {
            let emulated = args.tee == Tee::SnpEmulated;
            if !emulated {
                let missing = snp::preflight::judge(&snp::preflight::facts());
                if !missing.is_empty() {
                    return Err(MachineError::NoSnp(missing));
                }
            }
            let options = snp::plan::Options {
                ram: &ram,
                vcpus: args.vcpus,
                policy: args.policy,
                host_data: args.host_data.unwrap_or_default(),
                c_bit: if emulated { emulated::C_BIT } else { snp::guest::c_bit() },
            };
            let plan = snp::plan::plan(&file.read(Platform::Snp)?, &file.bytes, &options);
            let plan = plan.map_err(|source| MachineError::Plan { path: file.path.clone(), source })?;
            Ok(if emulated { Planned::Emulated(plan) } else { Planned::Snp(plan) })
        }
    }
}

fn make_plain(
    args: &Args,
    empty: &mut EmptyVm,
    base: &CpuId,
    plan: &launch::Plan,
    file: &ImageFile,
    trace: &Trace,
) -> Result<Made, MachineError> {
    let ram = memory::reserve(args.memory_mib)?;
    give_memory(&empty.vm, &ram)?;
    empty.make_controllers(Tee::None)?;
    launch::load(plan, &file.file, &ram)
        .and_then(|()| args.boot_vcpus.map_or(Ok(()), |count| launch::start_fewer(count, &ram)))
        .map_err(|source| MachineError::Launch { path: file.path.clone(), source })?;
    trace.stage("memory-loaded");
    let vcpus = make_processors(args, empty, base, |vcpu, id, cpuid| Ok(vcpu::prepare(vcpu, id, cpuid)?))?;
    vcpu::enter(&vcpus[0].0, &plan.registers)?;
    Ok(Made { vcpus, memory: Arc::new(ram), emulated: None, snp: None })
}

/// Processors of a machine without a TEE, each with the CPUID of its number.
fn make_processors(
    args: &Args,
    empty: &mut EmptyVm,
    base: &CpuId,
    prepare: impl Fn(&VcpuFd, u32, &CpuId) -> Result<(), MachineError>,
) -> Result<Vec<(VcpuFd, Option<Processor>)>, MachineError> {
    let base = &cpuid::without_memory_type_ranges(base);
    let mut vcpus = Vec::new();
    for id in 0..args.vcpus {
        let vcpu = empty.processor(id)?;
        prepare(&vcpu, id, &cpuid::for_vcpu(base, id, args.vcpus))?;
        vcpus.push((vcpu, None));
    }
    Ok(vcpus)
}

/// Tells KVM where RAM is.
fn give_memory(vm: &VmFd, ram: &Ram) -> Result<(), MachineError> {
    for (slot, region) in ram.iter().enumerate() {
        let address = region.get_host_address(vm_memory::MemoryRegionAddress(0));
        let address = address.map_err(|e| MachineError::Kvm(e.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: address as u64,
            flags: 0,
        };
        // SAFETY: the range is a mapping that lives as long as the machine, and no two overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

fn make_emulated(
    args: &Args,
    vm: &VmFd,
    base: &CpuId,
    plan: &LaunchPlan,
    image: &[u8],
    trace: &Trace,
    log: &Log,
) -> Result<Made, MachineError> {
    log.write(Level::Warning, emulated::WARNING);
    let ram = memory::layout(args.memory_mib << 20);
    let wanted = emulated::start::Wanted {
        ram: &ram,
        vcpus: args.vcpus,
        file: image,
        keys: args.development_keys.as_deref(),
        certificates: args.certificates.as_deref(),
    };
    let mut tell = |words: &str| log.write(Level::Warning, words);
    let started = emulated::start::start(vm, base, plan, &wanted, &mut tell)?;
    trace.stage("memory-loaded");
    trace.counts(&started.counts.trace());
    let digest: String = started.machine.digest().iter().map(|byte| format!("{byte:02x}")).collect();
    log.write(Level::Warning, &format!("launch digest {digest}"));
    let vcpus = started.vcpus.into_iter().map(|(vcpu, processor)| (vcpu, Some(processor))).collect();
    Ok(Made { vcpus, memory: started.memory, emulated: Some(started.machine), snp: None })
}

fn make_snp(
    args: &Args,
    vm: &Arc<VmFd>,
    base: &CpuId,
    plan: &LaunchPlan,
    image: &[u8],
    trace: &Trace,
    log: &Log,
) -> Result<Made, MachineError> {
    let ram = memory::layout(args.memory_mib << 20);
    let certificates = args.certificates.as_deref();
    let wanted = snp::guest::Wanted { ram: &ram, vcpus: args.vcpus, file: image, certificates };
    let mut tell = |words: &str| log.write(Level::Warning, words);
    let started = snp::guest::start(vm, base, plan, &wanted, &mut tell)?;
    trace.stage("memory-loaded");
    trace.counts(&started.counts.trace());
    let vcpus = started.vcpus.into_iter().map(|vcpu| (vcpu, None)).collect();
    let memory = Arc::clone(&started.running.converter.memory.shared);
    Ok(Made { vcpus, memory, emulated: None, snp: Some(Arc::new(started.running)) })
}

/// Returns when the other end of the pipe is closed. Nothing is ever written to it.
fn wait_for_hangup(pipe: &OwnedFd) {
    let mut wait = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: one valid entry.
        let ready = unsafe { libc::poll(&raw mut wait, 1, -1) };
        if ready > 0 || ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

fn irq_line(vm: &VmFd, irq: u32) -> Result<EventFd, MachineError> {
    let line = EventFd::new(libc::EFD_NONBLOCK)
        .map_err(|source| MachineError::Host { what: "make an eventfd", source })?;
    vm.register_irqfd(&line, irq).map_err(kvm_error("KVM_IRQFD"))?;
    Ok(line)
}

/// All slots with their devices.
fn make_devices(args: &Args, vm: &Arc<VmFd>, memory: &Arc<Ram>, base: &CpuId) -> Result<Slots, MachineError> {
    let slots = Slots::default();
    let mut devices: Vec<(usize, Box<dyn VirtioDevice>)> = Vec::new();
    // Its probe alone is some 60 exits.
    if !cpuid::has_random_numbers(base) {
        devices.push((slot::RNG, Box::new(Rng::default())));
    }
    if let Some(path) = &args.vsock {
        let growth = Growth::new(args, vm, memory, base, &slots[slot::MEMORY]);
        let arrivals = Arrivals::new(args, vm, memory, &slots);
        let control = move |ask| match ask {
            Ask::Memory(wanted) => growth.answer(wanted).to_line(),
            Ask::Net(mac, tap) => arrivals.answer(mac, tap).to_line(),
        };
        let device = Vsock::new(path, GUEST_CID)?.with_control(Arc::new(control));
        devices.push((slot::VSOCK, Box::new(device)));
    }
    if let Some(dir) = &args.fs {
        devices.push((slot::FS, Box::new(Fs::new("coffer", dir)?)));
    }
    for (index, net) in args.nets.iter().enumerate() {
        // SAFETY: the caller inherited this descriptor for this purpose and nobody else here uses it.
        let tap = unsafe { OwnedFd::from_raw_fd(net.fd) };
        let mut device = Net::new(tap, net.mac)?;
        // What a saved driver learned would bound the MTU of every pod that starts from it.
        if args.template.is_none() && args.make_template.is_none() {
            device = device.with_mtu_of_tap();
        }
        devices.push((slot::NET + index, Box::new(device)));
    }
    for (index, disk) in args.disks.iter().enumerate() {
        let device = Blk::new(&disk.path, disk.read_only, &format!("coffer-disk{index}"))?;
        devices.push((slot::BLK + index, Box::new(device)));
    }
    for (slot, device) in devices {
        let window = attach(slot, device, vm, memory, args.tee)?;
        // Each has a slot of its own.
        let _ = slots[slot].set(Mutex::new(window));
    }
    Ok(slots)
}

/// Gives a device its registers, its interrupt and its kicks.
fn attach(
    slot: usize,
    device: Box<dyn VirtioDevice>,
    vm: &VmFd,
    memory: &Arc<Ram>,
    tee: Tee,
) -> Result<Window, MachineError> {
    let line = Arc::new(irq_line(vm, MMIO_IRQS[slot])?);
    let mut window = Window::new(device, Arc::clone(memory), line)?;
    if tee != Tee::None {
        window = window.with_shared_memory_only();
    }
    let notify = IoEventAddress::Mmio(mmio_address(slot) + QUEUE_NOTIFY);
    for (queue, kick) in window.kicks().iter().enumerate() {
        vm.register_ioevent(kick, &notify, queue as u32).map_err(kvm_error("KVM_IOEVENTFD"))?;
    }
    Ok(window)
}
