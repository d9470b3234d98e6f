//! The VMMs that are compared, each with its own documented settings for a fast start.
//!
//! Owns: command lines. Does not own: running them.

use std::path::{Path, PathBuf};

use coffer_layout::MARK_PORT;

use crate::plan::{Kind, Until};

/// The files of one comparison: every VMM boots the same kernel with the same initramfs.
#[derive(Clone, Debug, Default)]
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
    /// Processors.
    pub vcpus: u32,
    /// QEMU describes its machine by ACPI tables, as Firecracker does, instead of an MP table.
    pub acpi: bool,
    /// The kernel is one that marks its entry and halts: no PID 1 is waited for.
    pub tiny: bool,
    /// How far it is watched.
    pub until: Until,
    /// The directory of a machine that was saved with the same flags.
    pub template: Option<PathBuf>,
}

/// One VMM.
#[derive(Clone, Debug)]
pub struct Peer {
    kind: Kind,
    program: PathBuf,
}

impl Peer {
    /// `None` for what is no VMM.
    #[must_use]
    pub fn new(kind: Kind, program: PathBuf) -> Option<Self> {
        let vmm = matches!(kind, Kind::CofferVmm | Kind::QemuMicrovm | Kind::CloudHypervisor);
        vmm.then_some(Self { kind, program })
    }

    /// Which one.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Program and arguments. `marks` is a fifo to which the VMM writes what the guest marks, `vsock` a free path.
    #[must_use]
    pub fn command(&self, guest: &Guest, marks: &str, vsock: &str) -> Vec<String> {
        let mut argv = vec![text(&self.program)];
        let mut add = |words: &[&str]| argv.extend(words.iter().map(|w| (*w).to_owned()));
        let (memory, vcpus) = (guest.memory_mib.to_string(), guest.vcpus.to_string());
        let (kernel, initramfs) = (text(&guest.kernel), text(&guest.initramfs));
        match self.kind {
            // QEMU's manual, "microvm": the shortest start is without legacy devices and option ROMs.
            Kind::QemuMicrovm => {
                let acpi = if guest.acpi { "on" } else { "off" };
                let legacy = "x-option-roms=off,pit=off,pic=off,isa-serial=off,rtc=off";
                add(&["-M", &format!("microvm,{legacy},acpi={acpi}")]);
                add(&["-accel", "kvm", "-cpu", "host", "-smp", &vcpus, "-m", &memory]);
                add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
                add(&["-kernel", &kernel]);
                if !guest.tiny {
                    add(&["-initrd", &initramfs, "-append", &guest.command_line]);
                }
                add(&["-chardev", &format!("file,id=marks,path={marks}")]);
                add(&["-device", &format!("isa-debugcon,iobase={MARK_PORT:#x},chardev=marks")]);
            }
            // Its log names writes to port 0x80 at level warn.
            Kind::CloudHypervisor => {
                add(&["--kernel", &kernel, "--cpus", &format!("boot={vcpus}")]);
                if !guest.tiny {
                    add(&["--initramfs", &initramfs, "--cmdline", &guest.command_line]);
                }
                add(&["--memory", &format!("size={memory}M"), "--console", "off", "--serial", "off"]);
                add(&["--log-file", marks]);
            }
            _ => {
                add(&["--image", &text(&guest.image), "--memory-mib", &memory, "--vcpus", &vcpus]);
                add(&["--vsock", vsock, "--trace", marks]);
                if let Some(template) = &guest.template {
                    add(&["--template", &text(template)]);
                }
            }
        }
        argv
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vmm_gets_the_same_guest() {
        let guest = Guest {
            kernel: "K".into(),
            initramfs: "R".into(),
            image: "I".into(),
            command_line: "C".into(),
            memory_mib: 77,
            vcpus: 3,
            ..Guest::default()
        };
        for kind in [Kind::QemuMicrovm, Kind::CloudHypervisor] {
            let line = Peer::new(kind, "vmm".into()).unwrap().command(&guest, "M", "V").join(" ");
            for word in ["K", "R", "C", "77", "3"] {
                assert!(line.split([' ', '=']).any(|w| w.trim_end_matches('M') == word), "{word}: {line}");
            }
        }
        let machine = |acpi| {
            let guest = Guest { acpi, ..Guest::default() };
            Peer::new(Kind::QemuMicrovm, "vmm".into()).unwrap().command(&guest, "M", "V")[2].clone()
        };
        assert!(machine(true).ends_with(",acpi=on") && machine(false).ends_with(",acpi=off"));
        let ours = Peer::new(Kind::CofferVmm, "vmm".into()).unwrap().command(&guest, "M", "V").join(" ");
        assert_eq!(ours, "vmm --image I --memory-mib 77 --vcpus 3 --vsock V --trace M");
        assert!(Peer::new(Kind::Crun, "crun".into()).is_none());
    }
}
