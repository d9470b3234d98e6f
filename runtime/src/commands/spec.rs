//! `spec`: a configuration to start from.
//!
//! Owns: what is in it, which is what `runc spec` of 1.1.5 writes, but for the version and the host's name. A VM can have all of it.

use std::path::Path;

use crate::{cli::Call, error::Error, program::SPECIFICATION, state};

/// In the order and with the blanks of runc's.
const SPEC: &str = include_str!("spec.json");
/// Where the version goes.
const VERSION: &str = "@version@";

/// Writes `config.json`.
pub(super) fn spec(call: &Call) -> Result<(), Error> {
    if call.has("rootless") {
        // runc's has no network's namespace, which would be the host's.
        return Err(Error::Usage(
            "spec: --rootless is not supported: on the host coffer runs as root, and the network of such a configuration is the host's"
                .into(),
        ));
    }
    let path = Path::new(call.value("bundle").unwrap_or(".")).join("config.json");
    if path.exists() {
        return Err(Error::State(format!("{} exists: remove it first", path.display())));
    }
    state::write_whole(&path, SPEC.replace(VERSION, SPECIFICATION).as_bytes())
}
