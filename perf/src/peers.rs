//! The VMMs that are compared, each with its own documented settings for a fast start.
//!
//! Owns: command lines. Does not own: running them.

use std::path::PathBuf;

use coffer_layout::MARK_PORT;

/// The files of one comparison: every VMM boots the same kernel with the same initramfs.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs that lies in the image, as a file of its own.
    pub initramfs: PathBuf,
    /// The IGVM image made of both.
    pub image: PathBuf,
    /// The command line in the image, without the devices of our machine.
    pub command_line: String,
    /// MiB of RAM.
    pub memory_mib: u64,
}

/// One VMM.
#[derive(Clone, Debug)]
pub enum Peer {
    /// Ours: the path of `coffer-vmm`.
    Coffer(PathBuf),
    /// QEMU's microvm machine, with the settings of its manual's page on microvm for the shortest start.
    QemuMicrovm(PathBuf),
}

impl Peer {
    /// Name in tables.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Coffer(_) => "coffer-vmm",
            Self::QemuMicrovm(_) => "QEMU microvm",
        }
    }

    /// Program and arguments. `marks` is a fifo to which the VMM writes what the guest marks, `vsock` a free path.
    #[must_use]
    pub fn command(&self, guest: &Guest, marks: &str, vsock: &str) -> Vec<String> {
        let mut argv = Vec::new();
        let mut add = |words: &[&str]| argv.extend(words.iter().map(|w| (*w).to_owned()));
        match self {
            Self::Coffer(program) => {
                add(&[&program.to_string_lossy(), "--image", &guest.image.to_string_lossy()]);
                add(&["--memory-mib", &guest.memory_mib.to_string(), "--vcpus", "1"]);
                add(&["--vsock", vsock, "--trace", marks]);
            }
            Self::QemuMicrovm(program) => {
                add(&[&program.to_string_lossy(), "-M"]);
                add(&["microvm,x-option-roms=off,pit=off,pic=off,isa-serial=off,rtc=off,acpi=off"]);
                add(&["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &guest.memory_mib.to_string()]);
                add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
                add(&[
                    "-kernel",
                    &guest.kernel.to_string_lossy(),
                    "-initrd",
                    &guest.initramfs.to_string_lossy(),
                ]);
                add(&["-append", &guest.command_line]);
                add(&["-chardev", &format!("file,id=marks,path={marks}")]);
                add(&["-device", &format!("isa-debugcon,iobase={MARK_PORT:#x},chardev=marks")]);
            }
        }
        argv
    }
}
