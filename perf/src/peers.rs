//! The VMMs that are compared, each with its own documented settings for a fast start.
//!
//! Owns: command lines, and the file that a VMM takes in place of flags. Does not own: running them.

use std::path::{Path, PathBuf};

use coffer_layout::MARK_PORT;

use crate::plan::{Kind, Marks, Runtime, Until};

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

/// Files of one start.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// The VMM writes what the guest marks, and we our VMM's stages.
    pub marks: PathBuf,
    /// A free path for a socket.
    pub vsock: PathBuf,
    /// Where [`Peer::configuration`] lies, for a VMM that has one.
    pub configuration: PathBuf,
}

impl Scratch {
    /// In a directory of the start alone.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        let file = |name| directory.join(name);
        Self { marks: file("marks"), vsock: file("vsock"), configuration: file("configuration") }
    }
}

/// One VMM.
#[derive(Clone, Debug)]
pub struct Peer {
    kind: Kind,
    program: PathBuf,
    marks: Marks,
    arguments: Vec<String>,
}

impl Peer {
    /// `None` for what is no VMM.
    #[must_use]
    pub fn new(runtime: &Runtime) -> Option<Self> {
        let (kind, program, marks) = (runtime.kind, runtime.program.clone(), runtime.marks());
        let arguments = runtime.arguments.clone();
        (!kind.is_container_runtime()).then_some(Self { kind, program, marks, arguments })
    }

    /// Who tells of the guest's marks.
    #[must_use]
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// The file that some VMMs take instead of flags.
    #[must_use]
    pub fn configuration(&self, guest: &Guest) -> Option<String> {
        if self.kind != Kind::Firecracker {
            return None;
        }
        let mut boot = serde_json::json!({ "kernel_image_path": guest.kernel });
        if !guest.tiny {
            boot["initrd_path"] = text(&guest.initramfs).into();
            boot["boot_args"] = guest.command_line.as_str().into();
        }
        let machine = serde_json::json!({ "vcpu_count": guest.vcpus, "mem_size_mib": guest.memory_mib });
        Some(serde_json::json!({ "boot-source": boot, "drives": [], "machine-config": machine }).to_string())
    }

    /// Which one.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// It starts with nothing but a terminal as its standard input: the guest's serial port is there.
    #[must_use]
    pub fn wants_terminal(&self) -> bool {
        self.kind == Kind::Alioth
    }

    /// Program and arguments.
    #[must_use]
    pub fn command(&self, guest: &Guest, scratch: &Scratch) -> Vec<String> {
        let (marks, vsock) = (text(&scratch.marks), text(&scratch.vsock));
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
                add(&["--log-file", &marks]);
            }
            // docs/getting-started.md and docs/api_requests of 1.10: without an API nothing has to wait for a client.
            Kind::Firecracker => add(&["--no-api", "--config-file", &text(&scratch.configuration)]),
            // README of 0.12; `--help` names anonymous memory as the default. The same words from 0.8 on.
            Kind::Alioth => {
                add(&["boot", "--pvh", &kernel]);
                if !guest.tiny {
                    add(&["--initramfs", &initramfs, "-c", &guest.command_line]);
                }
                add(&["--memory", &format!("size={memory}M"), "--num-cpu", &vcpus]);
            }
            _ => {
                add(&["--image", &text(&guest.image), "--memory-mib", &memory, "--vcpus", &vcpus]);
                add(&["--vsock", &vsock, "--trace", &marks]);
                if let Some(template) = &guest.template {
                    add(&["--template", &text(template)]);
                }
            }
        }
        argv.extend(self.arguments.iter().cloned());
        argv
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(kind: &str) -> Option<Peer> {
        Peer::new(&toml::from_str(&format!("kind = \"{kind}\"\nprogram = \"vmm\"")).unwrap())
    }

    #[test]
    fn a_plan_may_add_words() {
        let plan = "kind = \"qemu-microvm\"\nprogram = \"vmm\"\narguments = [\"-cpu\", \"max\"]";
        let peer = Peer::new(&toml::from_str(plan).unwrap()).unwrap();
        let argv = peer.command(&Guest::default(), &Scratch::new(Path::new("D")));
        assert_eq!(argv[argv.len() - 2..], ["-cpu", "max"]);
    }

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
        let scratch = Scratch { marks: "M".into(), vsock: "V".into(), configuration: "F".into() };
        for kind in ["qemu-microvm", "cloud-hypervisor", "alioth"] {
            let line = peer(kind).unwrap().command(&guest, &scratch).join(" ");
            for word in ["K", "R", "C", "77", "3"] {
                assert!(line.split([' ', '=']).any(|w| w.trim_end_matches('M') == word), "{word}: {line}");
            }
            assert_eq!(peer(kind).unwrap().configuration(&guest), None);
        }
        let machine = |acpi| {
            let guest = Guest { acpi, ..Guest::default() };
            peer("qemu-microvm").unwrap().command(&guest, &scratch)[2].clone()
        };
        assert!(machine(true).ends_with(",acpi=on") && machine(false).ends_with(",acpi=off"));
        let ours = peer("coffer-vmm").unwrap().command(&guest, &scratch).join(" ");
        assert_eq!(ours, "vmm --image I --memory-mib 77 --vcpus 3 --vsock V --trace M");
        let firecracker = peer("firecracker").unwrap();
        assert_eq!(firecracker.command(&guest, &scratch).join(" "), "vmm --no-api --config-file F");
        let configuration = firecracker.configuration(&guest).unwrap();
        let wanted = r#"{"boot-source":{"boot_args":"C","initrd_path":"R","kernel_image_path":"K"},"drives":[],
            "machine-config":{"mem_size_mib":77,"vcpu_count":3}}"#;
        assert_eq!(
            configuration.parse::<serde_json::Value>().unwrap(),
            wanted.parse::<serde_json::Value>().unwrap()
        );
        let alioth = peer("alioth").unwrap();
        assert_eq!(
            alioth.command(&guest, &scratch).join(" "),
            "vmm boot --pvh K --initramfs R -c C --memory size=77M --num-cpu 3"
        );
        assert!(alioth.wants_terminal() && !firecracker.wants_terminal());
        let tiny = Guest { tiny: true, ..guest };
        assert_eq!(
            alioth.command(&tiny, &scratch).join(" "),
            "vmm boot --pvh K --memory size=77M --num-cpu 3"
        );
        assert!(peer("crun").is_none());
    }

    #[test]
    fn who_passes_no_mark_on_is_watched_by_the_tracepoint() {
        assert_eq!(peer("firecracker").unwrap().marks(), Marks::Tracepoint);
        assert_eq!(peer("alioth").unwrap().marks(), Marks::Tracepoint);
        assert_eq!(peer("qemu-microvm").unwrap().marks(), Marks::Vmm);
        let text = "kind = \"qemu-microvm\"\nprogram = \"q\"\nmarks = \"tracepoint\"";
        assert_eq!(Peer::new(&toml::from_str(text).unwrap()).unwrap().marks(), Marks::Tracepoint);
    }
}
