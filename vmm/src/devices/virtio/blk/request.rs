//! One request of a driver: header, data, status (virtio 1.2, 5.2.6).
//!
//! Owns: what may be asked, and doing it. Does not own: queues. Data goes through a buffer of ours, a piece at a time: the guest
//! may change its memory at any moment, and a request may be as long as the disk.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{super::ring::Chain, SECTOR};
use crate::memory::Ram;

/// Bytes that are moved at once.
pub(super) const BUFFER: usize = 128 << 10;
/// Most sectors of one range to discard or to zero: 16 MiB.
pub(super) const RANGE_SECTORS: u32 = 1 << 15;
/// Most ranges of one such request.
pub(super) const RANGES: u32 = 16;
const HEADER: usize = 16;
/// A range: first sector, sectors, flags.
const RANGE: usize = 16;
const ID: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The backing.
pub(super) struct Disk {
    pub(super) file: File,
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) serial: [u8; ID],
}

/// A disk's id: at most 20 bytes, zeros behind.
pub(super) fn serial(text: &str) -> [u8; ID] {
    let mut serial = [0; ID];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

/// Why a request gets another status than OK.
enum Refused {
    Unsupported,
    Failed,
}

impl From<io::Error> for Refused {
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

impl Disk {
    /// Serves one request and returns the bytes that the driver may rely on at the front of its writable buffers.
    pub(super) fn serve(
        &self,
        memory: &Ram,
        chain: Chain<'_>,
        buffer: &mut [u8],
        write_through: bool,
    ) -> u32 {
        let (Ok(mut input), Ok(mut output)) =
            (chain.clone().reader::<()>(memory), chain.writer::<()>(memory))
        else {
            return 0;
        };
        // The status is the last byte that the driver can read. Without room for it nobody would hear of anything.
        let Some(room) = output.available_bytes().checked_sub(1) else { return 0 };
        let Ok(mut status) = output.split_at(room) else { return 0 };
        let mut header = [0; HEADER];
        let result = match input.read_exact(&mut header) {
            Ok(()) => {
                let kind = u32::from_le_bytes(std::array::from_fn(|i| header[i]));
                let sector = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
                self.act(kind, sector, &mut input, &mut output, buffer, write_through)
            }
            Err(_) => Err(Refused::Failed),
        };
        let byte = match result {
            Ok(_) => VIRTIO_BLK_S_OK,
            Err(Refused::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Refused::Failed) => VIRTIO_BLK_S_IOERR,
        };
        let told = status.write_all(&[byte as u8]).is_ok();
        match result {
            // Everything up to the status was written; a failed request promises nothing.
            Ok(written) if told && written == room => u32::try_from(written + 1).unwrap_or(0),
            _ => 0,
        }
    }

    /// Does what is asked. Returns the bytes written to `output`.
    fn act(
        &self,
        kind: u32,
        sector: u64,
        input: &mut (impl Read + Rest),
        output: &mut (impl Write + Rest),
        buffer: &mut [u8],
        write_through: bool,
    ) -> Result<usize, Refused> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let (mut at, mut left) = self.range(sector, output.rest())?;
                let length = left;
                while left > 0 {
                    let piece = &mut buffer[..left.min(BUFFER)];
                    self.file.read_exact_at(piece, at)?;
                    output.write_all(piece)?;
                    at += piece.len() as u64;
                    left -= piece.len();
                }
                return Ok(length);
            }
            VIRTIO_BLK_T_OUT => {
                self.writable()?;
                let (mut at, mut left) = self.range(sector, input.rest())?;
                while left > 0 {
                    let piece = &mut buffer[..left.min(BUFFER)];
                    input.read_exact(piece)?;
                    self.file.write_all_at(piece, at)?;
                    at += piece.len() as u64;
                    left -= piece.len();
                }
            }
            VIRTIO_BLK_T_FLUSH => self.file.sync_data()?,
            VIRTIO_BLK_T_GET_ID => {
                if output.rest() < ID {
                    return Err(Refused::Failed);
                }
                output.write_all(&self.serial)?;
                return Ok(ID);
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.writable()?;
                self.clear(kind == VIRTIO_BLK_T_DISCARD, input, buffer)?;
            }
            _ => return Err(Refused::Unsupported),
        }
        if write_through && kind != VIRTIO_BLK_T_FLUSH {
            self.file.sync_data()?;
        }
        Ok(0)
    }

    fn writable(&self) -> Result<(), Refused> {
        if self.read_only { Err(Refused::Failed) } else { Ok(()) }
    }

    /// First byte and length of a range that lies on the disk.
    fn range(&self, sector: u64, bytes: usize) -> Result<(u64, usize), Refused> {
        let whole = (bytes as u64).is_multiple_of(SECTOR);
        let end = sector.checked_add(bytes as u64 / SECTOR).filter(|end| whole && *end <= self.sectors);
        // The end is at most the disk's, whose size in bytes is a number of 63 bits.
        end.map(|_| (sector * SECTOR, bytes)).ok_or(Refused::Failed)
    }

    /// Discards or zeroes ranges. All are checked before the first is touched.
    fn clear(&self, discard: bool, input: &mut (impl Read + Rest), buffer: &mut [u8]) -> Result<(), Refused> {
        let length = input.rest();
        if length == 0 || !length.is_multiple_of(RANGE) || length > RANGE * RANGES as usize {
            return Err(Refused::Failed);
        }
        let mut ranges = [0; RANGE * RANGES as usize];
        input.read_exact(&mut ranges[..length])?;
        let mut checked = Vec::with_capacity(RANGES as usize);
        for range in ranges[..length].chunks_exact(RANGE) {
            let sector = u64::from_le_bytes(std::array::from_fn(|i| range[i]));
            let sectors = u32::from_le_bytes(std::array::from_fn(|i| range[8 + i]));
            let flags = u32::from_le_bytes(std::array::from_fn(|i| range[12 + i]));
            let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            if flags & !known != 0 {
                return Err(Refused::Unsupported);
            }
            if sectors > RANGE_SECTORS {
                return Err(Refused::Failed);
            }
            let (at, bytes) = self.range(sector, sectors as usize * SECTOR as usize)?;
            checked.push((at, bytes, discard || flags != 0));
        }
        for (at, bytes, unmap) in checked.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
            let mode = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
            // SAFETY: the descriptor is open; no memory of this process is passed.
            let done = unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    mode | libc::FALLOC_FL_KEEP_SIZE,
                    at as libc::off_t,
                    bytes as libc::off_t,
                )
            };
            match (done, discard) {
                (0, _) => {}
                _ if io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP) => {
                    return Err(Refused::Failed);
                }
                // A hint that this file system does not take.
                (_, true) => return Err(Refused::Unsupported),
                (_, false) => self.write_zeros(at, bytes, buffer)?,
            }
        }
        Ok(())
    }

    fn write_zeros(&self, mut at: u64, mut left: usize, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        while left > 0 {
            let piece = &buffer[..left.min(BUFFER)];
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
            left -= piece.len();
        }
        Ok(())
    }
}

/// Bytes left in a chain's half.
trait Rest {
    fn rest(&self) -> usize;
}

impl<B: vm_memory::bitmap::BitmapSlice> Rest for virtio_queue::Reader<'_, B> {
    fn rest(&self) -> usize {
        self.available_bytes()
    }
}

impl<B: vm_memory::bitmap::BitmapSlice> Rest for virtio_queue::Writer<'_, B> {
    fn rest(&self) -> usize {
        self.available_bytes()
    }
}
