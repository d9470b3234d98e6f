//! The state file: a header, and the state as JSON.
//!
//! Owns: the header, its check, bounds of what is read. Header: 8 bytes of magic, version (u32), zero (u32), length of the body
//! (u64), SHA-256 of the body; numbers are little-endian. Any change of a byte, and any other length, is refused.

use kvm_bindings::kvm_irqchip;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::{
    identity::{Content, Identity},
    memory::Extent,
    processor::ProcessorState,
};
use crate::devices::virtio::mmio::WindowState;

const MAGIC: [u8; 8] = *b"COFFERTS";
/// Goes up with every change of [`State`].
const VERSION: u32 = 1;
const HEADER: usize = 8 + 4 + 4 + 8 + 32;
/// Longest state file in bytes: 64 processors take about 2 MiB.
pub const MOST_BYTES: usize = 16 << 20;

/// Why a file is no state.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FormatError {
    /// Not one of ours.
    #[error("this is no template's state")]
    Magic,
    /// Another version's.
    #[error("it has format {0}, this VMM reads format {VERSION}")]
    Version(u32),
    /// Too short or too long.
    #[error("it has {has} bytes where {wanted} are said to be")]
    Length {
        /// Bytes there.
        has: u64,
        /// Bytes announced, with the header.
        wanted: u64,
    },
    /// Changed.
    #[error("its digest is not that of its content: it is damaged")]
    Digest,
    /// Whole, and yet not a state.
    #[error("{0}")]
    Content(String),
}

/// Which machine: a template is for one of these alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each is its flag")]
pub struct Shape {
    pub memory_mib: u64,
    pub vcpus: u32,
    pub vsock: bool,
    pub fs: bool,
    pub nets: usize,
}

/// A saved machine without its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Which machine.
    pub shape: Shape,
    /// Which run of which host.
    pub host_run: String,
    /// SHA-256 of CPUID in hexadecimal.
    pub cpuid: String,
    /// IGVM file; the kernel's command line is in it.
    pub image: Content,
    /// VMM.
    pub program: Content,
    /// Memory file.
    pub memory: Identity,
    /// Where RAM is not zero.
    pub extents: Vec<Extent>,
    /// KVM's clock in nanoseconds.
    pub clock_ns: u64,
    /// Both PICs and the I/O APIC.
    pub chips: Vec<kvm_irqchip>,
    /// By id.
    pub processors: Vec<ProcessorState>,
    /// Devices.
    pub windows: Vec<WindowState>,
}

/// The whole file.
#[must_use]
pub fn write(state: &State) -> Vec<u8> {
    wrap(&serde_json::to_vec(state).expect("plain data always serialises"))
}

/// Puts a header before a body.
#[must_use]
pub fn wrap(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&Sha256::digest(body));
    bytes.extend_from_slice(body);
    bytes
}

/// Reads a whole file.
///
/// # Errors
/// [`FormatError`].
pub fn read(bytes: &[u8]) -> Result<State, FormatError> {
    let mut rest = bytes;
    let mut take = |count: usize| {
        let (first, others) = rest.split_at_checked(count)?;
        rest = others;
        Some(first)
    };
    if take(8) != Some(&MAGIC[..]) {
        return Err(FormatError::Magic);
    }
    let short = || FormatError::Length { has: bytes.len() as u64, wanted: HEADER as u64 };
    let version = take(4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).ok_or_else(short)?;
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    if take(4).ok_or_else(short)? != [0; 4] {
        return Err(FormatError::Magic);
    }
    let length = take(8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes).ok_or_else(short)?;
    let digest = take(32).ok_or_else(short)?;
    let body = rest;
    if body.len() as u64 != length || bytes.len() > MOST_BYTES {
        let wanted = length.saturating_add(HEADER as u64);
        return Err(FormatError::Length { has: bytes.len() as u64, wanted });
    }
    if Sha256::digest(body)[..] != *digest {
        return Err(FormatError::Digest);
    }
    let state: State = serde_json::from_slice(body).map_err(|e| FormatError::Content(e.to_string()))?;
    check(&state)?;
    Ok(state)
}

/// What must hold before any of it is used.
fn check(state: &State) -> Result<(), FormatError> {
    let wrong = |words: &str| Err(FormatError::Content(words.to_owned()));
    if state.processors.len() != state.shape.vcpus as usize {
        return wrong("it has not as many processors as its machine");
    }
    if state.chips.len() != super::CHIPS.len()
        || state.chips.iter().zip(super::CHIPS).any(|(chip, id)| chip.chip_id != id)
    {
        return wrong("it has not the interrupt controllers of a machine");
    }
    super::memory::check(&state.extents, state.shape.memory_mib)
        .map_err(|words| FormatError::Content(words.to_owned()))
}
