//! `coffer`: the OCI runtime's command line.

use std::{fs::File, io::Write, process::ExitCode};

use coffer::{
    cli::{self, Call, Global},
    commands,
    error::Error,
};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((first, rest)) = words.split_first()
        && first == "image"
    {
        return match commands::image::run(rest) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("coffer: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let call = match cli::parse(words) {
        Ok(call) => call,
        Err(error) => return fail(&Global::default(), &error, 1),
    };
    match call.command.as_str() {
        "--help" => println!("{}", cli::USAGE),
        "--version" => println!(
            "coffer version {}\ncommit: {}\nspec: 1.2.1",
            env!("CARGO_PKG_VERSION"),
            option_env!("COFFER_COMMIT").unwrap_or("unknown")
        ),
        _ => return run(&call),
    }
    ExitCode::SUCCESS
}

fn run(call: &Call) -> ExitCode {
    match commands::run(call) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        // runc gives 255 when a process could not be set up.
        Err(error) => fail(&call.global, &error, if call.command == "exec" { 255 } else { 1 }),
    }
}

fn fail(global: &Global, error: &Error, code: u8) -> ExitCode {
    let message = error.to_string();
    let line = if global.log_json {
        serde_json::json!({ "level": "error", "msg": message, "time": "" }).to_string()
    } else {
        format!("level=error msg={message:?}")
    };
    if let Some(path) = &global.log
        && let Ok(mut file) = File::options().create(true).append(true).open(path)
    {
        let _ = writeln!(file, "{line}");
    }
    eprintln!("coffer: {message}");
    ExitCode::from(code)
}
