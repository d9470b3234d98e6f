//! Templates (`--tee none` alone): a machine saved when its init was ready, from which others start by mapping its memory.
//!
//! Owns: the directory's files and who may have written them, whether a template fits, the errors. Its parts: the state file
//! (`format`), which files it was made from (`identity`), guest memory (`memory`), processors (`processor`), stopping the machine
//! (`gate`). Does not own: devices' states, which are their windows' (`devices::virtio::mmio`).
//!
//! A directory holds `memory`, guest RAM as it was, and `state`, everything else; `state` is written last and names `memory` by
//! inode and times. The digest of `state` is checked at each start. That of `memory` is not: reading all of it would cost more
//! than the start. It is enough that directory and files belong to this process's user and nobody else may enter or write
//! them: whoever can change them can as well change this program, which runs with the same rights.
//!
//! A template is of one run of its host: KVM, processors' clocks and CPUID are then what they were.

pub mod format;
pub mod gate;
pub mod identity;
pub mod memory;
pub mod processor;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use sha2::{Digest, Sha256};
use thiserror::Error;

use self::{
    format::{Shape, State},
    identity::{Content, Identity},
};
use crate::{args::Args, devices::virtio::mmio::WindowState, memory::Ram};

/// Why a template is not made, not used, or not a machine.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// The system refused something.
    #[error("{what} {path}: {source}")]
    File {
        /// What was to be done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// Somebody else could have written it.
    #[error(
        "{0} must belong to this user, and nobody else may have any right to it: chmod go= it, or make it anew"
    )]
    Rights(PathBuf),
    /// The state file is none.
    #[error("state: {0}; make it anew")]
    Format(#[from] format::FormatError),
    /// It was made for something else.
    #[error("{what} is not as when it was made; make it anew")]
    DoesNotFit {
        /// What differs.
        what: &'static str,
    },
    /// Its memory file is not the one that its state was written for.
    #[error("its memory file is another one, or was written to, since its state was saved; make it anew")]
    Memory,
    /// KVM did not give or take a state.
    #[error("{command}{}: {reason}", .processor.map(|id| format!(" of processor {id}")).unwrap_or_default())]
    Kvm {
        /// KVM's command.
        command: &'static str,
        /// Of which processor.
        processor: Option<u32>,
        /// KVM's words.
        reason: kvm_ioctls::Error,
    },
    /// A register without which no processor goes on.
    #[error(
        "KVM does not give and take MSR {0:#x}, which a saved processor needs: this host makes no templates"
    )]
    Msr(u32),
    /// A device cannot be saved or put back.
    #[error("device {0}")]
    Device(#[from] crate::devices::virtio::DeviceError),
    /// The processors did not stop.
    #[error("a processor did not stop within {0} s")]
    Running(u64),
}

fn kvm(command: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> TemplateError {
    move |reason| TemplateError::Kvm { command, processor: None, reason }
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    move |source| TemplateError::File { what, path: path.to_owned(), source }
}

/// A saved machine that fits.
pub struct Template {
    /// Everything but memory.
    pub state: State,
    /// Guest RAM, to be mapped.
    pub memory: File,
}

fn memory_of(directory: &Path) -> PathBuf {
    directory.join("memory")
}

fn state_of(directory: &Path) -> PathBuf {
    directory.join("state")
}

/// Which machine an argument list describes.
fn shape(args: &Args) -> Shape {
    Shape {
        memory_mib: args.memory_mib,
        vcpus: args.vcpus,
        vsock: args.vsock.is_some(),
        fs: args.fs.is_some(),
        nets: args.nets.len(),
    }
}

/// Of the host's CPUID as this machine shows it. What differs from processor to processor follows from their number.
fn digest_of(cpuid: &CpuId) -> String {
    let mut digest = Sha256::new();
    for entry in cpuid.as_slice() {
        let words = [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx];
        words.iter().for_each(|word| digest.update(word.to_le_bytes()));
    }
    identity::hex(&digest.finalize())
}

/// Changes at each start of the host.
fn host_run() -> Result<String, TemplateError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(file("read", path))
}

/// This process's own program.
const PROGRAM: &str = "/proc/self/exe";

/// Opens a file of a template, if nobody but this user can have written it.
fn open(path: &Path) -> Result<File, TemplateError> {
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(path);
    let opened = opened.map_err(file("open", path))?;
    check_rights(path, &opened.metadata().map_err(file("look at", path))?)?;
    Ok(opened)
}

fn check_rights(path: &Path, metadata: &fs::Metadata) -> Result<(), TemplateError> {
    // SAFETY: has no arguments and cannot fail.
    let user = unsafe { libc::geteuid() };
    if metadata.uid() == user && metadata.mode() & 0o077 == 0 {
        Ok(())
    } else {
        Err(TemplateError::Rights(path.to_owned()))
    }
}

/// Opens the template in `directory` and checks that it is whole and that it is of this machine: `args`, `cpuid` (before it is
/// made a processor's), program, image and host.
///
/// # Errors
/// [`TemplateError`]; nothing was changed, and the machine can boot.
pub fn find(directory: &Path, args: &Args, cpuid: &CpuId) -> Result<Template, TemplateError> {
    let metadata = fs::symlink_metadata(directory).map_err(file("look at", directory))?;
    check_rights(directory, &metadata)?;
    let path = state_of(directory);
    let mut bytes = Vec::new();
    let read = open(&path)?.take(format::MOST_BYTES as u64 + 1).read_to_end(&mut bytes);
    read.map_err(file("read", &path))?;
    let state = format::read(&bytes)?;
    fits(&state, args, cpuid, &host_run()?)?;
    let path = memory_of(directory);
    let memory = open(&path)?;
    if Identity::of(&memory.metadata().map_err(file("look at", &path))?) != state.memory {
        return Err(TemplateError::Memory);
    }
    Ok(Template { state, memory })
}

fn fits(state: &State, args: &Args, cpuid: &CpuId, run: &str) -> Result<(), TemplateError> {
    let differs = |what| Err(TemplateError::DoesNotFit { what });
    if state.shape != shape(args) {
        return differs("the machine (memory, processors, devices)");
    }
    if state.host_run != run {
        return differs("the host, which has been started anew,");
    }
    if state.cpuid != digest_of(cpuid) {
        return differs("what KVM's CPUID says");
    }
    for (content, path, what) in
        [(&state.image, args.image.as_path(), "the image"), (&state.program, Path::new(PROGRAM), "the VMM")]
    {
        if !content.is(path).map_err(file("read", path))? {
            return differs(what);
        }
    }
    Ok(())
}

/// A stopped machine.
pub struct Stopped<'a> {
    /// KVM.
    pub kvm: &'a Kvm,
    /// The machine.
    pub vm: &'a VmFd,
    /// Its processors, by id.
    pub vcpus: &'a [VcpuFd],
    /// Its RAM.
    pub memory: &'a Ram,
    /// The devices' registers and states.
    pub windows: Vec<WindowState>,
    /// Its CPUID, before it is made a processor's.
    pub cpuid: &'a CpuId,
}

/// Writes a template into `directory`, which exists. One that was there is replaced: who has mapped it keeps it.
///
/// # Errors
/// [`TemplateError`]; then there is no template in `directory`.
pub fn make(directory: &Path, args: &Args, stopped: Stopped<'_>) -> Result<(), TemplateError> {
    let metadata = fs::symlink_metadata(directory).map_err(file("look at", directory))?;
    check_rights(directory, &metadata)?;
    for path in [state_of(directory), memory_of(directory)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file("remove", &path)(error));
            }
            _ => {}
        }
    }
    // At once: what follows takes longer than a guest should notice.
    let clock_ns = stopped.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock;
    let processors = stopped.vcpus.iter().zip(0..).map(|(vcpu, id)| processor::save(stopped.kvm, vcpu, id));
    let processors = processors.collect::<Result<_, _>>()?;
    let chips = chips(stopped.vm)?;
    let create = |path: &Path| {
        let options = &mut File::options();
        options.write(true).create_new(true).mode(0o600).open(path).map_err(file("make", path))
    };
    let path = memory_of(directory);
    let memory = create(&path)?;
    let extents = memory::write(stopped.memory, &memory).map_err(file("write", &path))?;
    let content = |path: &Path| Content::of(path).map_err(file("read", path));
    let state = State {
        shape: shape(args),
        host_run: host_run()?,
        cpuid: digest_of(stopped.cpuid),
        image: content(&args.image)?,
        program: content(Path::new(PROGRAM))?,
        memory: Identity::of(&memory.metadata().map_err(file("look at", &path))?),
        extents,
        clock_ns,
        chips,
        processors,
        windows: stopped.windows,
    };
    let (path, new) = (state_of(directory), directory.join("state.new"));
    let _ = fs::remove_file(&new);
    let written = io::Write::write_all(&mut create(&new)?, &format::write(&state));
    written.map_err(file("write", &new))?;
    fs::rename(&new, &path).map_err(file("name", &path))
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

fn chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, TemplateError> {
    let get = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
        Ok(chip)
    };
    CHIPS.into_iter().map(get).collect()
}

/// Puts interrupt controllers and clock back, after the processors. The guest's monotonic clock goes on from where it was.
///
/// # Errors
/// [`TemplateError`].
pub fn restore_machine(vm: &VmFd, state: &State) -> Result<(), TemplateError> {
    for chip in &state.chips {
        vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
    }
    let clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
    vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))
}

#[cfg(test)]
mod tests;
