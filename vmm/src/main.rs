//! `coffer-vmm`: one process, one VM.

use std::{fs, process::ExitCode};

use coffer_vmm::{
    args::{self, Args, Command, ShellArgs},
    log::{Level, Log},
    machine::{Machine, MachineError, Prepared},
    shell::{Door, Taken},
    tee::snp::preflight,
    trace::{self, Trace},
};

const USAGE_ERROR: u8 = 64;

fn main() -> ExitCode {
    let began = trace::now_ns();
    match args::parse(std::env::args().skip(1)) {
        Ok(Command::Help) => {
            println!("{}", args::USAGE);
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("coffer-vmm version {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Command::Probe) => match coffer_probe::stock_guest() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("coffer-vmm: {error}");
                ExitCode::FAILURE
            }
        },
        Ok(Command::ProbeSnp) => {
            let missing = preflight::judge(&preflight::facts());
            missing.iter().for_each(|line| eprintln!("{line}"));
            if missing.is_empty() { ExitCode::SUCCESS } else { MachineError::NoSnp(missing).code().into() }
        }
        Ok(Command::Run(args)) => run(&args, None, began),
        Ok(Command::Shell(args)) => shell(&args),
        Err(error) => {
            eprintln!("coffer-vmm: {error}");
            ExitCode::from(USAGE_ERROR)
        }
    }
}

/// Does what no pod decides, and goes on as [`run`] when a pod has come. Apart from `main`, whose stack would hold all of this in each VMM.
#[cold]
#[inline(never)]
fn shell(args: &ShellArgs) -> ExitCode {
    let fail = |words: &str, code: u8| {
        if let Ok(log) = Log::open(args.log.as_deref(), args.log_json) {
            log.write(Level::Error, words);
        }
        ExitCode::from(code)
    };
    let prepared = match Prepared::new(&args.image) {
        Ok(prepared) => Box::new(prepared),
        Err(error) => return fail(&error.to_string(), error.code()),
    };
    let door = match Door::open(&args.directory) {
        Ok(door) => door,
        Err(error) => return fail(&error.to_string(), USAGE_ERROR),
    };
    match door.wait(|args| prepared.fits(args)) {
        Ok(Some(Taken { args, began_ns })) => run(&args, Some(prepared), began_ns),
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string(), USAGE_ERROR),
    }
}

fn run(args: &Args, prepared: Option<Box<Prepared>>, began: u64) -> ExitCode {
    let log = Log::open(args.log.as_deref(), args.log_json);
    let (log, second) = match (log, Log::open(args.log.as_deref(), args.log_json)) {
        (Ok(log), Ok(second)) => (log, second),
        (Err(e), _) | (_, Err(e)) => {
            eprintln!("coffer-vmm: open --log: {e}");
            return ExitCode::from(USAGE_ERROR);
        }
    };
    let (code, report) = match start(args, prepared, began, second) {
        Ok(end) => {
            if end.code() != 0 {
                log.write(Level::Error, &end.message());
            }
            (end.code(), end.report())
        }
        Err(error) => {
            log.write(Level::Error, &error.to_string());
            let report = serde_json::json!({ "reason": "not-started", "code": error.code(), "message": error.to_string() });
            (error.code(), report.to_string() + "\n")
        }
    };
    if let Some(path) = &args.exit_report
        && let Err(error) = fs::write(path, report)
    {
        log.write(Level::Error, &format!("write --exit-report {}: {error}", path.display()));
    }
    // The kernel takes VM, memory and threads back faster than this process could let go of them one by one.
    // SAFETY: nothing is buffered, and no other thread's work matters any more.
    unsafe { libc::_exit(i32::from(code)) }
}

fn start(
    args: &Args,
    prepared: Option<Box<Prepared>>,
    began: u64,
    log: Log,
) -> Result<coffer_vmm::end::End, MachineError> {
    let failed = |source| MachineError::Host { what: "open --trace", source };
    let trace = Trace::open(args.trace.as_deref()).map_err(failed)?;
    if let Some(from) = args.trace_from {
        trace.stage_at("create-entry", from);
    }
    trace.stage_at(if prepared.is_some() { "shell-taken" } else { "process-entry" }, began);
    Machine::new(args, prepared, trace, log)?.run()
}
