//! `coffer-init`: PID 1.

use std::{fs, io::Write};

use coffer_init::{boot, network, server::Server};
use coffer_layout::mark;

fn main() {
    if std::process::id() != 1 {
        eprintln!("coffer-init: this is PID 1 of a Coffer guest and nothing else");
        std::process::exit(1);
    }
    boot::allow_marks();
    boot::tell(mark::INIT_ENTRY);
    match run() {
        Ok(()) => boot::end(),
        Err(error) => {
            complain(&format!("coffer-init: {error}"));
            boot::reset();
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    boot::mount_all()?;
    if let Err(error) = boot::mount_share() {
        // A guest without a share has no root file systems from the host; create says so.
        complain(&format!("coffer-init: {error}"));
    }
    network::loopback_up()?;
    let mut server = Server::new(boot::listen_to_host()?)?;
    boot::tell(mark::INIT_READY);
    server.run()?;
    Ok(())
}

/// To the kernel's log: a console shows it where there is one.
fn complain(message: &str) {
    if let Ok(mut log) = fs::File::options().write(true).open("/dev/kmsg") {
        let _ = log.write_all(message.as_bytes());
    }
}
