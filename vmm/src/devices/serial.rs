//! The 16550 of the debug profiles (vm-superio), output only.
//!
//! Owns: tying it to an interrupt and a file. Does not own: the registers.

use std::{io, path::Path};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::output;

/// The interrupt line.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port.
pub type Console = Serial<Line, NoEvents, Box<dyn io::Write + Send>>;

/// Opens the console: a file, a fifo, or `-` for standard error.
///
/// # Errors
/// As [`output::open`].
pub fn open(path: &Path, line: EventFd) -> io::Result<Console> {
    let out: Box<dyn io::Write + Send> =
        if path.as_os_str() == "-" { Box::new(io::stderr()) } else { Box::new(output::open(path)?) };
    Ok(Serial::new(Line(line), out))
}
