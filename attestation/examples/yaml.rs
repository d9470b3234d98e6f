//! Reads YAML texts, each as a JSON string on a line of stdin, and writes for each `{"documents": […]}` or `{"refused": "…"}`: for
//! comparison with other readers (`tests/steps/37-yaml`).

use std::io::{self, BufRead, Write};

use coffer_attestation::yaml::read;
use serde_json::json;

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        let answer = match read(&text) {
            Ok(documents) => json!({ "documents": documents }),
            Err(error) => json!({ "refused": error.to_string() }),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
