//! Our client on its own, with `sample` evidence: for other people's KBSs (`tests/oracles/server.py`).
//!
//! `fetch URL kbs:///… KIND` writes a resource to standard output; KIND is a `tee_key_algorithm` of `aa.toml`.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use coffer_attestation::{evidence::Attesters, evidence::Sample, guest::Guest};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [url, uri, kind] = words.as_slice() else {
        eprintln!("fetch URL kbs:///REPOSITORY/TYPE/TAG KIND");
        return ExitCode::from(2);
    };
    let initdata = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"coffer.toml\" = \"allow_plain_http = true\"\n\
         \"aa.toml\" = '''\n[token_configs.kbs]\nurl = \"{url}\"\ntee_key_algorithm = \"{kind}\"\n'''\n"
    );
    let found = Guest::new(Some(initdata.as_bytes()), Attesters::of(Sample))
        .and_then(|mut guest| guest.fetch(&uri.parse().expect("kbs:///…")));
    match found.map(|secret| io::stdout().write_all(&secret)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => fail(&error),
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("fetch: {error}");
    ExitCode::FAILURE
}
