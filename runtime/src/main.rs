//! `coffer`: the OCI runtime's command line.

fn main() -> std::process::ExitCode {
    coffer::program::main()
}
