//! `coffer-bench boot`: boots the same kernel and initramfs under every VMM, interleaved, and prints a table.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use coffer_perf::{
    boot::{self, Boot},
    peers::{Guest, Peer},
    stats::Samples,
};

const USAGE: &str = "usage: coffer-bench --image F.igvm --kernel vmlinux --initramfs F.cpio --command-line TEXT \
[--coffer-vmm PATH] [--qemu PATH] [--memory-mib N] [--runs N] [--raw FILE]";

struct Options {
    guest: Guest,
    peers: Vec<Peer>,
    runs: usize,
    raw: Option<PathBuf>,
}

fn options() -> Result<Options> {
    let mut guest = Guest {
        kernel: PathBuf::new(),
        initramfs: PathBuf::new(),
        image: PathBuf::new(),
        command_line: String::new(),
        memory_mib: 128,
    };
    let (mut peers, mut runs, mut raw) = (Vec::new(), 7, None);
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let mut value = || words.next().with_context(|| format!("{flag} wants a value; {USAGE}"));
        match flag.as_str() {
            "--image" => guest.image = value()?.into(),
            "--kernel" => guest.kernel = value()?.into(),
            "--initramfs" => guest.initramfs = value()?.into(),
            "--command-line" => guest.command_line = value()?,
            "--memory-mib" => guest.memory_mib = value()?.parse().context("--memory-mib wants a number")?,
            "--coffer-vmm" => peers.push(Peer::Coffer(value()?.into())),
            "--qemu" => peers.push(Peer::QemuMicrovm(value()?.into())),
            "--runs" => runs = value()?.parse().context("--runs wants a number")?,
            "--raw" => raw = Some(value()?.into()),
            _ => bail!("unknown flag `{flag}`; {USAGE}"),
        }
    }
    if peers.is_empty() || runs == 0 {
        bail!("nothing to run; {USAGE}");
    }
    Ok(Options { guest, peers, runs, raw })
}

fn main() -> Result<()> {
    let options = options()?;
    let scratch = std::env::temp_dir().join(format!("coffer-bench-{}", std::process::id()));
    std::fs::create_dir(&scratch).with_context(|| format!("make {}", scratch.display()))?;
    let result = run(&options, &scratch);
    std::fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    let boots = result?;
    if let Some(path) = &options.raw {
        let lines: Vec<String> = boots.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        std::fs::write(path, lines.join("\n") + "\n").with_context(|| format!("write {}", path.display()))?;
    }
    print!("{}", table(&options.peers, &boots));
    Ok(())
}

fn run(options: &Options, scratch: &std::path::Path) -> Result<Vec<Boot>> {
    let mut boots = Vec::new();
    // Round 0 warms the page cache and is thrown away; the VMMs take turns, so that drift hits all alike.
    for round in 0..=options.runs {
        for peer in &options.peers {
            let boot = boot::measure(peer, &options.guest, scratch, Duration::from_secs(60))?;
            if round > 0 {
                boots.push(boot);
            }
        }
    }
    Ok(boots)
}

fn table(peers: &[Peer], boots: &[Boot]) -> String {
    let column = |name: &str, of: fn(&Boot) -> f64| {
        Samples::new(boots.iter().filter(|b| b.vmm == name).map(of).collect())
    };
    let mut text = String::from("exec of the VMM -> PID 1, warm page cache, one vCPU\n\n");
    text += "| VMM | runs | ms p50 | min | max | ratio | CPU ms p50 | VMM KiB beyond guest RAM, max |\n|---|---|---|---|---|---|---|---|\n";
    // The ratio is to the last peer of the command line.
    let base = peers.last().and_then(|p| column(p.name(), |b| b.exec_to_pid1_ms)).map(|s| s.median());
    for peer in peers {
        let times = column(peer.name(), |b| b.exec_to_pid1_ms);
        let cpu = column(peer.name(), |b| b.cpu_ms);
        let memory = column(peer.name(), |b| b.vmm_kib as f64);
        let (Some(times), Some(cpu), Some(memory), Some(base)) = (times, cpu, memory, base) else { continue };
        text += &format!(
            "| {} | {} | {:.0} | {:.0} | {:.0} | {:.2} | {:.0} | {:.0} |\n",
            peer.name(),
            times.count(),
            times.median(),
            times.min(),
            times.max(),
            times.median() / base,
            cpu.median(),
            memory.max()
        );
    }
    text
}
