//! QEMU's command line for the machine.
//!
//! Owns: words. Does not own: files and processes.

use std::path::{Path, PathBuf};

use crate::{
    args::{Iommu, Run},
    kernel::Stock,
    saved::{self, Way},
};

/// The host's TSC rate in kHz out of `/proc/cpuinfo`: bogomips are twice its MHz.
///
/// QEMU's software CPU shows guests the host's RDTSC. The machine's own first calibration of it is off by 0.1 %, KVM
/// takes that rate for its guests before the kernel has refined it, and then about one guest in seven loses timer
/// ticks and stalls for 10 s and more. So the kernel is told.
pub(crate) fn tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|l| l.starts_with("bogomips"))?;
    let bogomips: f64 = line.split_once(':')?.1.trim().parse().ok()?;
    // Positive and far below 2^53.
    (bogomips > 0.0).then_some((bogomips * 500.0).round() as u64)
}

/// The machine's kernel's command line.
fn kernel_words(run: &Run, tsc_khz: Option<u64>, turn: bool) -> String {
    // mitigations: for an emulated CPU they only cost. panic: at once, QEMU ends with -no-reboot. no_timer_check: on a
    // busy host the check's ten ticks come too late, and the kernel panics over a timer that works.
    let mut words =
        "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 mitigations=off nokaslr nowatchdog audit=0 \
                     cryptomgr.notests=1 random.trust_cpu=on no_timer_check"
            .to_owned();
    match tsc_khz {
        Some(khz) => words += &format!(" tsc=reliable tsc_early_khz={khz}"),
        None => words += " tsc=reliable",
    }
    if run.iommu == Iommu::Intel {
        words += " intel_iommu=on";
    }
    if turn {
        words += " ";
        words += saved::WORD;
    }
    if !run.append.is_empty() {
        words += " ";
        words += &run.append;
    }
    words
}

/// A share's name in the machine: the n-th writable one.
pub(crate) fn share_tag(n: usize) -> String {
    format!("rw{n}")
}

/// What a saved machine and one that goes on from it have in common: the program, and words without a run's own files.
pub(crate) fn common(run: &Run, stock: &Stock, tsc_khz: Option<u64>) -> Vec<String> {
    let nowhere = Path::new("");
    let writable = vec![PathBuf::new(); run.writable.len()];
    command(run, stock, nowhere, &writable, tsc_khz, &Way::Save(PathBuf::new()))
}

/// QEMU's program and words. `state` is a directory shared with the machine, `writable` the others.
pub(crate) fn command(
    run: &Run,
    stock: &Stock,
    state: &Path,
    writable: &[PathBuf],
    tsc_khz: Option<u64>,
    way: &Way,
) -> Vec<String> {
    let mut argv: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| argv.extend(words.iter().map(|w| (*w).to_owned()));
    add(&["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512"]);
    // EPYC is the CPU model that the software CPU implements best; newer ones cost time and bring nothing. Guest physical
    // addresses have 48 bits, the most that its nested paging takes: emulated TEEs have their C-bit or shared bit at 47.
    add(&["-cpu", "EPYC,+svm,+npt,phys-bits=48"]);
    add(&["-smp", &run.processors.to_string(), "-m", &run.memory_mib.to_string()]);
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    add(&["-serial", &format!("file:{}/console", state.display())]);
    add(&["-kernel", &stock.kernel.to_string_lossy(), "-initrd", &stock.initramfs.to_string_lossy()]);
    add(&["-append", &kernel_words(run, tsc_khz, *way != Way::Boot)]);
    if *way != Way::Boot {
        let pipes = state.join(saved::PIPES).to_string_lossy().replace(',', ",,");
        add(&["-chardev", &format!("pipe,id=turn,path={pipes}"), "-serial", "chardev:turn"]);
    }
    match way {
        Way::Boot => {}
        Way::Save(_) => {
            let monitor = state.join(saved::MONITOR).to_string_lossy().replace(',', ",,");
            add(&["-qmp", &format!("unix:{monitor},server=on,wait=off")]);
        }
        Way::Continue(from) => {
            let quoted = from.to_string_lossy().replace('\'', r"'\''");
            add(&["-incoming", &format!("exec:cat '{quoted}'")]);
        }
    }
    if run.iommu == Iommu::Intel {
        // Before every device that it shall translate for.
        add(&["-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"]);
    }
    let mut share = |tag: &str, path: &Path, readonly: &str| {
        let path = path.to_string_lossy().replace(',', ",,");
        let fsdev =
            format!("local,id={tag},path={path},security_model=none,multidevs=remap,readonly={readonly}");
        add(&["-fsdev", &fsdev, "-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
    };
    share("host", Path::new("/"), "on");
    share("rig", state, "off");
    for (n, directory) in writable.iter().enumerate() {
        share(&share_tag(n), directory, "off");
    }
    add(&["-device", "virtio-rng-pci"]);
    if *way != Way::Boot {
        // Its number is another in each process: the kernel of a machine that goes on sees that it is a copy.
        add(&["-device", "vmgenid"]);
    }
    argv.extend(run.qemu.iter().cloned());
    argv
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_rate_is_half_the_bogomips() {
        let cpuinfo = "processor\t: 0\nbogomips\t: 5199.99\nprocessor\t: 1\nbogomips\t: 1.00\n";
        assert_eq!(tsc_khz(cpuinfo), Some(2_599_995));
        assert_eq!(tsc_khz("BogoMIPS\t: 100\n"), None);
        assert_eq!(tsc_khz("bogomips\t: x\n"), None);
    }

    #[test]
    fn the_iommu_comes_before_the_devices_and_commas_are_kept() {
        let run = Run { iommu: Iommu::Intel, qemu: vec!["-device".into(), "nvme".into()], ..Run::default() };
        let stock = Stock { kernel: "/k".into(), initramfs: "/i".into(), modules: "/m".into() };
        let argv = command(&run, &stock, Path::new("/tmp/s"), &["/a,b".into()], Some(7), &Way::Boot);
        let place =
            |part: &str| argv.iter().position(|w| w.contains(part)).unwrap_or_else(|| panic!("{part}"));
        assert!(place("intel-iommu") < place("virtio-9p-pci"));
        assert!(argv[place("id=rw0")].contains("path=/a,,b,"));
        assert!(argv[place("-append") + 1].contains("tsc_early_khz=7 intel_iommu=on"));
        assert_eq!(argv.last().map(String::as_str), Some("nvme"));
    }

    #[test]
    fn a_machine_that_goes_on_is_the_one_that_was_saved() {
        let stock = Stock { kernel: "/k".into(), initramfs: "/i".into(), modules: "/m".into() };
        let words = |way: Way| {
            let argv = command(&Run::default(), &stock, Path::new("/tmp/s"), &[], Some(7), &way);
            let own = argv.iter().position(|w| w == "-qmp" || w == "-incoming").expect("a word of its own");
            [&argv[..own], &argv[own + 2..]].concat()
        };
        assert_eq!(words(Way::Save("/f".into())), words(Way::Continue("/f".into())));
        let boots = command(&Run::default(), &stock, Path::new("/tmp/s"), &[], Some(7), &Way::Boot);
        assert!(!boots.join(" ").contains(saved::WORD));
    }
}
