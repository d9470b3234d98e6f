//! `coffer-rig`: runs a command where KVM works: on this host if its KVM can, else in an emulated machine.

mod args;
mod direct;
mod emulated;
mod kernel;
mod machine;
mod modules;
mod saved;
mod signals;

use std::process::ExitCode;

use anyhow::{Context, Result};

use args::{Command, Run};

/// The rig itself failed.
const RIG_FAILED: u8 = 125;
/// The command did not end in time.
const TIMED_OUT: u8 = 124;

fn main() -> ExitCode {
    match act() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("rig: {}", words(&error));
            ExitCode::from(RIG_FAILED)
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

fn act() -> Result<u8> {
    match args::parse(std::env::args().skip(1))? {
        Command::Help => {
            println!("{}", args::USAGE);
            Ok(0)
        }
        Command::Probe => Ok(match coffer_probe::stock_guest() {
            Ok(()) => {
                println!("/dev/kvm can run a stock guest");
                0
            }
            Err(error) => {
                println!("{error}");
                1
            }
        }),
        Command::Fetch => {
            let stock = kernel::ready()?;
            println!("{} {}", stock.kernel.display(), stock.initramfs.display());
            Ok(0)
        }
        Command::Run(run) => choose(&run),
    }
}

fn choose(run: &Run) -> Result<u8> {
    signals::catch().context("catch signals")?;
    let say = |what: &str| {
        if !run.quiet {
            eprintln!("rig: {what}");
        }
    };
    if !run.wants_emulation() {
        match coffer_probe::stock_guest() {
            Ok(()) => {
                say("/dev/kvm can run a stock guest: the command runs on this host");
                return Ok(direct::run(run)?);
            }
            Err(reason) => say(&format!("{reason}: the command runs in an emulated machine")),
        }
    } else {
        say("the command runs in an emulated machine, as asked");
    }
    Ok(emulated::run(run, &kernel::ready()?)?)
}
