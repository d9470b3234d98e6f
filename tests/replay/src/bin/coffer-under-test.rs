//! `coffer`, built here so that the tests of this crate always have the one of these sources.

fn main() -> std::process::ExitCode {
    coffer::program::main()
}
