//! `coffer-init`: PID 1.

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
            boot::complain(&format!("coffer-init: {error}"));
            boot::reset();
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    boot::mount_all()?;
    boot::raise_limits();
    network::loopback_up()?;
    let mut server = Server::new(boot::listen_to_host()?)?;
    boot::tell(mark::INIT_READY);
    server.run()?;
    Ok(())
}
