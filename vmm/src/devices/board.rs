//! The board: which address and which port is which device.
//!
//! Owns: the decoding of accesses, marks, the reset port. An address without a device reads as all ones, as on a PC.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use coffer_layout::{
    MARK_PORT, MMIO_BASE, MMIO_IRQS, MMIO_SIZE, RESET_COMMAND, RESET_PORT, SERIAL_PORT, mark,
};

use crate::{
    devices::{serial::Console, virtio::mmio::Window},
    end::End,
    log::{Level, Log},
    template::gate::Gate,
    trace::{self, Trace},
};

const SERIAL_PORTS: u16 = 8;

/// A place for a device. One may come while the guest runs; none goes.
pub type Slot = Arc<OnceLock<Mutex<Window>>>;
/// All places.
pub type Slots = [Slot; MMIO_IRQS.len()];

/// Everything behind exits. Shared by all processors' threads.
pub struct Board {
    windows: Slots,
    console: Option<Mutex<Console>>,
    /// Where stages go.
    pub trace: Trace,
    /// Where messages go.
    pub log: Log,
    orderly: AtomicBool,
    refused: AtomicBool,
    /// Accesses to nothing.
    pub unknown: AtomicU64,
    /// In a machine that is to be saved.
    pub gate: Option<Gate>,
}

impl Board {
    /// A board with these devices.
    #[must_use]
    pub fn new(windows: Slots, console: Option<Mutex<Console>>, trace: Trace, log: Log) -> Self {
        Self {
            windows,
            console,
            trace,
            log,
            orderly: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            unknown: AtomicU64::new(0),
            gate: None,
        }
    }

    /// All slots that have a device.
    pub fn devices(&self) -> impl Iterator<Item = (usize, MutexGuard<'_, Window>)> {
        let some = self.windows.iter().enumerate().filter_map(|(slot, w)| Some((slot, w.get()?)));
        some.map(|(slot, window)| (slot, window.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn slot(&self, address: u64) -> Option<(usize, u64)> {
        let from_base = address.checked_sub(MMIO_BASE)?;
        let slot = usize::try_from(from_base / MMIO_SIZE).ok().filter(|s| *s < self.windows.len())?;
        Some((slot, from_base % MMIO_SIZE))
    }

    /// A read of device memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => match self.windows[slot].get() {
                Some(window) => window.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
                None => empty_slot(offset, data),
            },
            None => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// A write to device memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.slot(address).map(|(slot, offset)| (self.windows[slot].get(), offset)) {
            Some((Some(window), offset)) => {
                let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
                window.write(offset, data);
                for failure in window.take_failures() {
                    self.log.write(Level::Warning, &format!("device {failure}"));
                }
            }
            Some((None, _)) => {}
            None => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A read of a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(console), Some(offset), [byte]) = (&self.console, serial_offset(port), &mut *data) {
            *byte = console.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        } else if port == RESET_PORT {
            // An idle keyboard controller: its input buffer is empty, so Linux need not wait before the reset.
            data.fill(0);
        } else {
            self.unknown.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A write to a port. `Some` when it ends the VM.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<End> {
        match (port, data) {
            (MARK_PORT, [byte]) => return self.mark(*byte),
            (RESET_PORT, [RESET_COMMAND]) => {
                return Some(if self.orderly.load(Ordering::SeqCst) { End::Orderly } else { End::Panic });
            }
            (_, [byte]) => {
                if let (Some(console), Some(offset)) = (&self.console, serial_offset(port)) {
                    // The guest's output is lost when nobody can take it; it must not stop.
                    let _ = console.lock().unwrap_or_else(PoisonError::into_inner).write(offset, *byte);
                    return None;
                }
            }
            _ => {}
        }
        self.unknown.fetch_add(1, Ordering::Relaxed);
        None
    }

    fn mark(&self, byte: u8) -> Option<End> {
        if self.refused.load(Ordering::SeqCst) {
            return Some(End::ShimRefused(byte));
        }
        match byte {
            mark::SHIM_REFUSED => self.refused.store(true, Ordering::SeqCst),
            mark::ORDERLY_END => self.orderly.store(true, Ordering::SeqCst),
            _ => {}
        }
        if let Some(name) = trace::mark_name(byte) {
            self.trace.stage(name);
        }
        None
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(SERIAL_PORT).filter(|o| *o < SERIAL_PORTS).map(|o| o as u8)
}

/// A slot without a device: magic and version of virtio-mmio, device id 0, which a driver skips.
fn empty_slot(offset: u64, data: &mut [u8]) {
    data.fill(0);
    let value: &[u8] = match offset {
        0x00 => b"virt",
        0x04 => &[2, 0, 0, 0],
        _ => return,
    };
    if data.len() == value.len() {
        data.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::devices::serial;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    fn board() -> Board {
        Board::new(Slots::default(), None, Trace::default(), Log::open(None, false).unwrap())
    }

    /// With a console that writes into the file.
    fn board_with_console(file: &Path) -> Board {
        let console = serial::open(file, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        Board::new(
            Slots::default(),
            Some(Mutex::new(console)),
            Trace::default(),
            Log::open(None, false).unwrap(),
        )
    }

    #[test]
    fn a_reset_is_orderly_only_after_inits_word() {
        let board = board();
        assert_eq!(board.port_write(RESET_PORT, &[RESET_COMMAND]), Some(End::Panic));
        assert_eq!(board.port_write(MARK_PORT, &[mark::ORDERLY_END]), None);
        assert_eq!(board.port_write(RESET_PORT, &[RESET_COMMAND]), Some(End::Orderly));
    }

    #[test]
    fn the_shims_refusal_comes_with_its_code() {
        let board = board();
        assert_eq!(board.port_write(MARK_PORT, &[mark::SHIM_REFUSED]), None);
        assert_eq!(board.port_write(MARK_PORT, &[4]), Some(End::ShimRefused(4)));
    }

    #[test]
    fn an_empty_slot_has_device_id_zero() {
        let mut word = [9; 4];
        board().mmio_read(MMIO_BASE, &mut word);
        assert_eq!(&word, b"virt");
        board().mmio_read(MMIO_BASE + 8, &mut word);
        assert_eq!(word, [0; 4]);
    }

    proptest! {
        #[test]
        fn any_access_of_any_width_is_answered(address in any::<u64>(), port in any::<u16>(), value in any::<u64>(), length in 0usize..9) {
            let board = board();
            let bytes = value.to_le_bytes();
            board.mmio_read(address, &mut [0; 8][..length]);
            board.mmio_write(address, &bytes[..length]);
            board.mmio_read(MMIO_BASE + address % 0xb000, &mut [0; 8][..length]);
            board.mmio_write(MMIO_BASE + address % 0xb000, &bytes[..length]);
            board.port_read(port, &mut [0; 8][..length]);
            let _ = board.port_write(port, &bytes[..length]);
        }

        #[test]
        fn whatever_is_written_to_the_console_s_registers_text_still_comes_out(
            accesses in prop::collection::vec((0u16..SERIAL_PORTS, any::<u64>(), 0usize..9, any::<bool>()), 0..60),
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            let board = board_with_console(file.path());
            for (register, value, length, reads) in accesses {
                let bytes = &mut value.to_le_bytes()[..length];
                if reads {
                    board.port_read(SERIAL_PORT + register, bytes);
                } else {
                    prop_assert_eq!(board.port_write(SERIAL_PORT + register, bytes), None);
                }
            }
            // As a driver sets a port up (16550, 8.1 and 8.6.4): no divisor latch, no loop.
            for (register, value) in [(3, 0x03), (4, 0x00)] {
                board.port_write(SERIAL_PORT + register, &[value]);
            }
            for byte in b"still here" {
                board.port_write(SERIAL_PORT, &[*byte]);
            }
            let text = std::fs::read(file.path()).unwrap();
            prop_assert!(text.ends_with(b"still here"), "{text:?}");
        }
    }
}
