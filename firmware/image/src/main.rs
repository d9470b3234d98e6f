//! `coffer-image`: build and inspect IGVM images.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use coffer_image::{
    build::{Inputs, Profile, build},
    inspect::inspect,
};

const USAGE: &str = "\
coffer-image: packs and shows the images that coffer-vmm boots

  coffer-image build --shim ELF --kernel VMLINUX (--init ELF | --initramfs CPIO) -o FILE
                     [--profile up|smp|up-debug|smp-debug] [--cmdline-extra TEXT]
  coffer-image inspect [--json] FILE
  coffer-image initramfs --init ELF -o FILE      the initramfs alone, as build packs it
  coffer-image command-line [--profile P]        the kernel's command line of a profile";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coffer-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Flags {
    shim: Option<PathBuf>,
    kernel: Option<PathBuf>,
    init: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    output: Option<PathBuf>,
    profile: Option<Profile>,
    extra: String,
    json: bool,
    files: Vec<PathBuf>,
}

fn run() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_else(|| "--help".to_owned());
    let mut flags = Flags::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} wants a value"));
        match word.as_str() {
            "--shim" => flags.shim = Some(value()?.into()),
            "--kernel" => flags.kernel = Some(value()?.into()),
            "--init" => flags.init = Some(value()?.into()),
            "--initramfs" => flags.initramfs = Some(value()?.into()),
            "-o" | "--output" => flags.output = Some(value()?.into()),
            "--profile" => {
                let name = value()?;
                flags.profile = Some(Profile::from_name(&name).with_context(|| {
                    format!("unknown profile `{name}`: name one of up, smp, up-debug, smp-debug")
                })?);
            }
            "--cmdline-extra" => flags.extra = value()?,
            "--json" => flags.json = true,
            _ if word.starts_with('-') => bail!("unknown flag `{word}`: see coffer-image --help"),
            _ => flags.files.push(word.into()),
        }
    }
    match command.as_str() {
        "build" => build_image(&flags),
        "inspect" => show(&flags),
        "initramfs" => write(&flags, &packed_init(&flags)?),
        "command-line" => {
            println!(
                "{}",
                coffer_image::command_line::command_line(flags.profile.unwrap_or(Profile::Up), &flags.extra)
            );
            Ok(())
        }
        "--help" | "-h" | "help" => {
            println!("{USAGE}");
            Ok(())
        }
        other => bail!("unknown command `{other}`: see coffer-image --help"),
    }
}

fn read(path: Option<&PathBuf>, flag: &str) -> Result<Vec<u8>> {
    let path = path.with_context(|| format!("{flag} is missing: see coffer-image --help"))?;
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn packed_init(flags: &Flags) -> Result<Vec<u8>> {
    coffer_rootfs::initramfs::with_init(&read(flags.init.as_ref(), "--init")?).context("pack the initramfs")
}

fn write(flags: &Flags, bytes: &[u8]) -> Result<()> {
    let path = flags.output.as_ref().context("-o is missing: see coffer-image --help")?;
    // Never half a file under the right name.
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes)
        .and_then(|()| fs::rename(&fresh, path))
        .with_context(|| format!("write {}", path.display()))
}

fn build_image(flags: &Flags) -> Result<()> {
    let shim = read(flags.shim.as_ref(), "--shim")?;
    let kernel = read(flags.kernel.as_ref(), "--kernel")?;
    let initramfs = match (&flags.init, &flags.initramfs) {
        (None, Some(_)) => read(flags.initramfs.as_ref(), "--initramfs")?,
        (Some(_), None) => packed_init(flags)?,
        _ => bail!("give one of --init and --initramfs"),
    };
    let image = build(&Inputs {
        shim: &shim,
        kernel: &kernel,
        initramfs: &initramfs,
        profile: flags.profile.unwrap_or(Profile::Up),
        extra_command_line: &flags.extra,
    })?;
    write(flags, &image)
}

fn show(flags: &Flags) -> Result<()> {
    let [path] = flags.files.as_slice() else { bail!("inspect wants one file") };
    let contents = inspect(&read(Some(path), "FILE")?).with_context(|| path.display().to_string())?;
    if flags.json {
        println!("{}", serde_json::to_string_pretty(&contents)?);
    } else {
        print!("{}", contents.table());
    }
    Ok(())
}
