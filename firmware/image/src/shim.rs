//! The shim: an ELF file of one segment, linked at its place.
//!
//! Owns: what a usable shim is.

use coffer_layout::boot::{SHIM_BASE, SHIM_MAX};
use object::{
    LittleEndian,
    elf::{FileHeader64, PT_LOAD},
    read::elf::{FileHeader, ProgramHeader},
};
use thiserror::Error;

/// Why a file is not a shim.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("shim: {0}: pass the coffer-shim that `./build` made")]
pub struct ShimError(&'static str);

/// A checked shim.
#[derive(Clone, Debug)]
pub(crate) struct Shim {
    /// What lies at [`SHIM_BASE`], its zeros at the end included: those pages are measured too.
    pub(crate) bytes: Vec<u8>,
}

impl Shim {
    /// Reads and checks an ELF file.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, ShimError> {
        let elf = |_| ShimError("not an x86-64 ELF file");
        let header = FileHeader64::<LittleEndian>::parse(file).map_err(elf)?;
        let endian = header.endian().map_err(elf)?;
        let programs = header.program_headers(endian, file).map_err(elf)?;
        let mut loads = programs.iter().filter(|p| p.p_type(endian) == PT_LOAD);
        let (Some(segment), None) = (loads.next(), loads.next()) else {
            return Err(ShimError("it does not have exactly one segment"));
        };
        if segment.p_vaddr(endian) != SHIM_BASE || header.e_entry(endian) != SHIM_BASE {
            return Err(ShimError("it is linked at another address"));
        }
        let size = segment.p_memsz(endian);
        if size > SHIM_MAX {
            return Err(ShimError("it is longer than 32 KiB"));
        }
        let data = segment.data(endian, file).map_err(|()| ShimError("its bytes lie outside the file"))?;
        if data.len() as u64 > size {
            return Err(ShimError("it is longer in the file than in memory"));
        }
        let mut bytes = data.to_vec();
        bytes.resize(size as usize, 0);
        Ok(Self { bytes })
    }
}
