//! `coffer-image`: build, measure and inspect IGVM images.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use coffer_image::{
    build::{C_BIT, Inputs, Profile, Signing, build},
    inspect::inspect,
    measure::{hex, measure},
    reference::{self, Cpu},
};
use p384::{SecretKey, pkcs8::DecodePrivateKey as _};

const USAGE: &str = "\
coffer-image: packs and shows the images that coffer-vmm boots

  coffer-image build --shim ELF --kernel VMLINUX (--init ELF | --initramfs CPIO) -o FILE
                     [--profile up|smp|up-debug|smp-debug] [--cmdline-extra TEXT] [--c-bit N]
                     [--id-key PEM [--author-key PEM] [--vcpus N]]
      --c-bit: 51 (the default) on Milan, Genoa and Turin; 47 for --tee snp-emulated. smp images boot under SEV-SNP too.
      --id-key: ECDSA P-384 private key; signs the launch digest, which then holds for N processors only (1)
  coffer-image measure FILE --platform snp [--vcpus N] [--cpu milan|genoa|turin] [--json | --reference-values]
      the launch digest that hardware reports; the same on all three generations, because KVM resets the processors
      behind the first before it knows their model. --reference-values: bodies for Trustee, and a policy for --cpu
  coffer-image inspect [--json] FILE
  coffer-image initramfs --init ELF -o FILE      the initramfs alone, as build packs it
  coffer-image command-line [--profile P] [--platform snp]     the kernel's command line of a profile";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coffer-image: {}", words(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with what caused it, where its own words do not already end with that.
fn words(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.as_str() {
        "" => cause,
        text if text.ends_with(&cause) => said,
        _ => format!("{said}: {cause}"),
    })
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
    c_bit: Option<u32>,
    id_key: Option<PathBuf>,
    author_key: Option<PathBuf>,
    vcpus: Option<u32>,
    cpu: Option<Cpu>,
    platform: Option<String>,
    reference_values: bool,
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
            "--c-bit" => flags.c_bit = Some(number(&word, &value()?)?),
            "--id-key" => flags.id_key = Some(value()?.into()),
            "--author-key" => flags.author_key = Some(value()?.into()),
            "--vcpus" => flags.vcpus = Some(number(&word, &value()?)?),
            "--platform" => flags.platform = Some(value()?),
            "--reference-values" => flags.reference_values = true,
            "--cpu" => {
                let name = value()?;
                flags.cpu = Some(
                    Cpu::from_name(&name)
                        .with_context(|| format!("unknown CPU `{name}`: name one of milan, genoa, turin"))?,
                );
            }
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            _ if word.starts_with('-') => bail!("unknown flag `{word}`: see coffer-image --help"),
            _ => flags.files.push(word.into()),
        }
    }
    match command.as_str() {
        "build" => build_image(&flags),
        "inspect" => show(&flags),
        "measure" => print_measurement(&flags),
        "initramfs" => write(&flags, &packed_init(&flags)?),
        "command-line" => {
            println!(
                "{}",
                coffer_image::command_line::command_line(
                    flags.profile.unwrap_or(Profile::Up),
                    flags.platform.as_deref() == Some("snp"),
                    &flags.extra
                )
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

fn number(flag: &str, value: &str) -> Result<u32> {
    value.parse().with_context(|| format!("{flag} {value}: not a number"))
}

/// A P-384 private key, PKCS #8 or SEC 1, in PEM.
fn key(path: &PathBuf, flag: &str) -> Result<SecretKey> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    // openssl ecparam writes the curve's name in a block before the key's.
    let sec1 =
        text.find("-----BEGIN EC PRIVATE KEY").and_then(|at| SecretKey::from_sec1_pem(&text[at..]).ok());
    SecretKey::from_pkcs8_pem(&text).ok().or(sec1).with_context(|| {
        format!(
            "{flag} {}: not a P-384 private key in PEM: openssl ecparam -name secp384r1 -genkey",
            path.display()
        )
    })
}

fn signing(flags: &Flags) -> Result<Option<Signing>> {
    let Some(path) = &flags.id_key else {
        anyhow::ensure!(flags.author_key.is_none(), "--author-key signs an ID key: give --id-key too");
        return Ok(None);
    };
    let author_key = flags.author_key.as_ref().map(|path| key(path, "--author-key")).transpose()?;
    Ok(Some(Signing { id_key: key(path, "--id-key")?, author_key, vcpus: flags.vcpus.unwrap_or(1) }))
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
        c_bit: flags.c_bit.unwrap_or(C_BIT),
        signing: signing(flags)?,
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

fn print_measurement(flags: &Flags) -> Result<()> {
    let [path] = flags.files.as_slice() else { bail!("measure wants one file") };
    match flags.platform.as_deref() {
        Some("snp") => {}
        Some(other) => bail!("--platform {other}: only snp is measured"),
        None => bail!("--platform is missing: give snp"),
    }
    let bytes = read(Some(path), "FILE")?;
    let file = coffer_image::inspect::parse(&bytes).with_context(|| path.display().to_string())?;
    let vcpus = flags.vcpus.unwrap_or(1);
    let measurement = measure(&file, vcpus).with_context(|| path.display().to_string())?;
    if flags.reference_values {
        let cpu = flags.cpu.context("--reference-values needs --cpu: the policy names the processor")?;
        println!("{}", serde_json::to_string_pretty(&reference::requests(&measurement.digest, cpu))?);
    } else if flags.json {
        let report = serde_json::json!({
            "platform": "snp",
            "vcpus": vcpus,
            "digest": hex(&measurement.digest),
            "launch_pages": measurement.launch_pages(),
            "launch_commands": measurement.launch_commands(),
            "pages": measurement.pages,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", hex(&measurement.digest));
    }
    Ok(())
}
