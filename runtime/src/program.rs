//! The program: from words to an exit code.
//!
//! Owns: exit codes, and where a failure is said. Does not own: what a command does.

use std::{fmt::Display, process::ExitCode};

use crate::{
    cli::{self, Call, Global},
    clock, commands, log,
};

/// Version of the OCI runtime specification, as `--version` and `features` say.
pub const SPECIFICATION: &str = "1.2.1";

/// Runs this process's command line.
#[must_use]
pub fn main() -> ExitCode {
    clock::began_ns();
    let call = match cli::parse(std::env::args().skip(1)) {
        Ok(call) => call,
        Err(error) => {
            // The caller's log may have been named before the word that is wrong.
            let global = cli::global(std::env::args().skip(1));
            return fail(&global, &error.line(), 1);
        }
    };
    match call.command.as_str() {
        "--help" => cli::show(cli::USAGE),
        "image" => return owners(&call, commands::image::run(&call.words)),
        "policy" => return owners(&call, commands::policy::run(&call.words)),
        "--version" => println!(
            "coffer version {}\ncommit: {}\nspec: {SPECIFICATION}",
            env!("CARGO_PKG_VERSION"),
            option_env!("COFFER_COMMIT").unwrap_or("unknown")
        ),
        _ => {
            let words: Vec<String> = std::env::args().skip(1).collect();
            log::remember(&call.global);
            log::say(&call.global, log::Level::Debug, &format!("called as {words:?}"));
            return match commands::run(&call) {
                Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
                // runc gives 255 when a process could not be set up.
                Err(error) => fail(&call.global, &error.line(), if call.command == "exec" { 255 } else { 1 }),
            };
        }
    }
    ExitCode::SUCCESS
}

/// The owner's commands; no caller of a runtime has them.
fn owners(call: &Call, done: Result<(), impl Display>) -> ExitCode {
    done.map_or_else(|error| fail(&call.global, &error.to_string(), 1), |()| ExitCode::SUCCESS)
}

fn fail(global: &Global, message: &str, code: u8) -> ExitCode {
    log::say(global, log::Level::Error, message);
    ExitCode::from(code)
}
