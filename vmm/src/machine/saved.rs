//! A machine from a template in place of an image, and a machine that becomes one.
//!
//! Owns: the order in which a saved machine is put together, and in which one is stopped. Does not own: what is saved
//! (`template`, the devices' windows).

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{EmptyVm, Host, MachineError, Made, give_memory, make_processors};
use crate::{
    args::Args,
    devices::{board::Board, virtio::mmio::WindowState},
    end::End,
    log::{Level, Log},
    memory::{self as ram, Ram},
    template::{self, Stopped, Template, TemplateError, gate, memory, processor},
    trace::Trace,
    vcpu,
};

/// How long processors may take to stop. Each stops at its next kick.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Between two kicks.
const KICKS: Duration = Duration::from_millis(1);

/// Processors that have stopped, by id.
type Stops = Arc<Mutex<Vec<(usize, VcpuFd)>>>;

/// Puts a processor that has stopped where it is looked for.
pub(super) fn put(stops: &Stops, id: usize, vcpu: VcpuFd) {
    stops.lock().unwrap_or_else(PoisonError::into_inner).push((id, vcpu));
}

fn failed(args: &Args, of: Option<&PathBuf>) -> impl FnOnce(TemplateError) -> MachineError {
    let path = of.or(args.template.as_ref()).map(|p| p.display().to_string()).unwrap_or_default();
    move |source| MachineError::Template { path, source }
}

/// The template that the arguments name, when it fits. When it does not the log says why, and the machine is to boot. KVM is
/// opened for that, unless it is open.
pub(super) fn find(
    args: &Args,
    host: Option<Host>,
    log: &Log,
) -> Result<(Option<Template>, Option<Host>), MachineError> {
    let Some(directory) = &args.template else { return Ok((None, host)) };
    let host = host.map_or_else(Host::open, Ok)?;
    let found = template::find(directory, args, &host.cpuid).map_err(|error| {
        let words = format!("template {} is not used, the image is booted: {error}", directory.display());
        log.write(Level::Warning, &words);
    });
    Ok((found.ok(), Some(host)))
}

/// Memory and processors as they were.
pub(super) fn make(
    args: &Args,
    empty: &mut EmptyVm,
    base: &CpuId,
    template: &Template,
    trace: &Trace,
) -> Result<Made, MachineError> {
    let Template { state, memory: file } = template;
    let memory = ram::reserve(args.memory_mib)?;
    memory::map(&memory, &state.extents, args.memory_mib, file)
        .map_err(|source| MachineError::Host { what: "map the template's memory", source })?;
    give_memory(&empty.vm, &memory)?;
    empty.make_controllers(args.tee)?;
    trace.stage("memory-loaded");
    let vcpus = make_processors(args, empty, base, |vcpu, id, cpuid| {
        // Memory types are not among the MSRs that KVM names.
        vcpu::prepare(vcpu, id, cpuid)?;
        processor::restore(vcpu, id, &state.processors[id as usize]).map_err(failed(args, None))
    })?;
    template::restore_machine(&empty.vm, state).map_err(failed(args, None))?;
    Ok(Made { vcpus, memory: Arc::new(memory), emulated: None, snp: None })
}

/// What a machine needs when it was saved, or is to be.
pub(super) struct Saving {
    args: Args,
    kvm: Kvm,
    cpuid: CpuId,
    restored: Vec<WindowState>,
    stops: Stops,
}

impl Saving {
    pub(super) fn new(args: &Args, kvm: Kvm, cpuid: CpuId, restored: Vec<WindowState>) -> Self {
        if args.make_template.is_some() {
            gate::allow_kicks();
        }
        Self { args: args.clone(), kvm, cpuid, restored, stops: Arc::default() }
    }

    pub(super) fn stopped(&self) -> Stops {
        Arc::clone(&self.stops)
    }

    /// Lets the devices of a saved machine work. Their threads are this one's, and may do as little.
    pub(super) fn start_devices(&self, board: &Board) -> Result<(), MachineError> {
        for state in &self.restored {
            let mut windows = board.devices().filter(|(slot, _)| *slot == state.slot);
            let (_, mut window) = windows
                .next()
                .ok_or(TemplateError::DoesNotFit { what: "a device's place" })
                .map_err(failed(&self.args, None))?;
            window.restore(state).map_err(TemplateError::from).map_err(failed(&self.args, None))?;
        }
        Ok(())
    }

    /// One processor has stopped: stops the others, then the devices, and saves all of it.
    pub(super) fn finish(
        &self,
        threads: &[JoinHandle<()>],
        ends: &mpsc::Receiver<End>,
        board: &Board,
        vm: &VmFd,
        memory: &Ram,
    ) -> Result<End, MachineError> {
        let Some(directory) = &self.args.make_template else { return Ok(End::Stopped) };
        let failed = || failed(&self.args, Some(directory));
        let (mut stopped, began) = (1, Instant::now());
        while stopped < threads.len() {
            threads.iter().for_each(gate::kick);
            match ends.recv_timeout(KICKS) {
                Ok(End::Stopped) => stopped += 1,
                Ok(end) => return Ok(end),
                Err(_) if began.elapsed() < STOP_LIMIT => {}
                Err(_) => return Err(failed()(TemplateError::Running(STOP_LIMIT.as_secs()))),
            }
        }
        let mut vcpus = std::mem::take(&mut *self.stops.lock().unwrap_or_else(PoisonError::into_inner));
        vcpus.sort_by_key(|(id, _)| *id);
        let vcpus: Vec<VcpuFd> = vcpus.into_iter().map(|(_, vcpu)| vcpu).collect();
        let marked = board.gate.as_ref().and_then(gate::Gate::closed_by);
        if let Some((id, vcpu)) = marked.and_then(|id| Some((id, vcpus.get(id as usize)?))) {
            processor::say_again(vcpu, id, memory).map_err(failed())?;
        }
        let windows = board.devices().map(|(slot, mut window)| window.save(slot));
        let windows = windows.collect::<Result<_, _>>().map_err(TemplateError::from).map_err(failed())?;
        let (kvm, cpuid) = (&self.kvm, &self.cpuid);
        let whole = Stopped { kvm, vm, vcpus: &vcpus, memory, windows, cpuid };
        template::make(directory, &self.args, whole).map_err(failed())?;
        Ok(End::Stopped)
    }
}
