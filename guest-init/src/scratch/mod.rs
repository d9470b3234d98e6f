//! The scratch disk: room for unpacked images beyond this machine's memory, on a file of the host that tells it nothing.
//!
//! Owns: what is stacked on the host's disk, and in which order. Does not own: the kernel's interfaces (`mapper`, `abi`), the
//! file system's layout (`ext4`), what lies on it.
//!
//! The host's disk is encrypted by AES-256-GCM (dm-crypt), with a key that is made here and never leaves. Nonces and
//! tags, 28 bytes for each 4 KiB, lie in this machine's memory (dm-integrity's `meta_device`): a block that the host changes, moves
//! or sets back to what it was before cannot be read (EIO, EILSEQ). What the host learns is which blocks are read and written, and when.

mod abi;
pub mod ext4;
mod mapper;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statvfs::statvfs,
};
use thiserror::Error;
use zeroize::Zeroizing;

use self::mapper::Target;

/// The only disk of a pod.
const DISK: &str = "vda";
const SECTOR: u64 = 512;
const BLOCK: u64 = ext4::BLOCK as u64;
/// Bytes of nonce and tag.
const TAG: u64 = 12 + 16;
/// Beside tags: dm-integrity's superblock, a journal that this mode does not use, rounding.
const TAG_EXTRA: u64 = 1 << 20;

/// There is no scratch disk, or none that can be used.
#[derive(Debug, Error)]
pub enum ScratchError {
    /// The host promised one and gave none.
    #[error("scratch: the host gave no disk: {0}")]
    Absent(io::Error),
    /// Too small or too large.
    #[error("scratch: {0}")]
    Size(#[from] ext4::SizeError),
    /// A step failed.
    #[error("scratch: {stage}: {source}")]
    Step {
        /// What was to be done.
        stage: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn at<E: Into<io::Error>>(stage: &'static str) -> impl FnOnce(E) -> ScratchError {
    move |e| ScratchError::Step { stage, source: e.into() }
}

/// Encrypts the host's disk under a new key, makes an empty file system there and mounts it.
///
/// # Errors
/// [`ScratchError`], naming the step.
pub fn mount_on(place: &str) -> Result<(), ScratchError> {
    // The disk's whole blocks; the host says how many, so the file system's layout is the bound.
    let sectors = fs::read_to_string(format!("/sys/class/block/{DISK}/size"))
        .and_then(|text| text.trim().parse::<u64>().map_err(|_| io::ErrorKind::InvalidData.into()))
        .map_err(ScratchError::Absent)?;
    let blocks = sectors / (BLOCK / SECTOR);
    let layout = ext4::empty(blocks, random()?, random()?)?;
    let device = encrypted(blocks)?;
    let disk = File::options().write(true).open(&device).map_err(at("open the encrypted disk"))?;
    for block in layout {
        disk.write_all_at(&*block.bytes, block.number * BLOCK).map_err(at("make a file system"))?;
    }
    disk.sync_all().map_err(at("make a file system"))?;
    // Tables of inodes are written when they are first used, not all of them in the background.
    let data = Some("noinit_itable");
    mount(Some(&device), place, Some("ext4"), MsFlags::MS_NODEV | MsFlags::MS_NOATIME, data)
        .map_err(at("mount"))
}

/// Bytes that can still be written below a place.
///
/// # Errors
/// [`ScratchError`].
pub fn free(place: &Path) -> Result<u64, ScratchError> {
    let system = statvfs(place).map_err(at("ask for free space"))?;
    Ok(system.blocks_available().saturating_mul(system.fragment_size()))
}

/// dm-integrity carries the tags that dm-crypt makes and checks.
fn encrypted(blocks: u64) -> Result<PathBuf, ScratchError> {
    let tags = mapper::memory("scratch tags", blocks * TAG + TAG_EXTRA).map_err(at("keep tags in memory"))?;
    let sectors = blocks * (BLOCK / SECTOR);
    let tagged = Target {
        name: "scratch-tagged",
        kind: "integrity",
        sectors,
        words: Zeroizing::new(format!(
            "/dev/{DISK} 0 {TAG} D 3 meta_device:{} block_size:{BLOCK} journal_sectors:1",
            tags.display()
        )),
    };
    let tagged = tagged.make().map_err(at("set up dm-integrity"))?;
    let key = Zeroizing::new(random::<32>()?);
    let mut words = Zeroizing::new(String::with_capacity(256));
    words.push_str("capi:gcm(aes)-random ");
    for byte in *key {
        for digit in [byte >> 4, byte & 15] {
            words.push(char::from_digit(u32::from(digit), 16).unwrap_or_default());
        }
    }
    words.push_str(&format!(" 0 {} 0 2 integrity:{TAG}:aead sector_size:{BLOCK}", tagged.display()));
    Target { name: "scratch", kind: "crypt", sectors, words }.make().map_err(at("set up dm-crypt"))
}

fn random<const N: usize>() -> Result<[u8; N], ScratchError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other).map_err(at("get random bytes"))?;
    Ok(bytes)
}
