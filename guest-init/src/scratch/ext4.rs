//! An empty ext4 file system as the blocks that have to be written: what mke2fs would leave, without a program for it.
//!
//! Owns: the layout. Does not own: writing it, or what is done with it. No journal, because it does not outlive its pod, and
//! no copy of the superblock. All but the first group and the last one's bitmap are left to the kernel (GDT_CSUM), so that a
//! disk of any size costs a dozen writes.
//!
//! Source: the kernel's Documentation/filesystems/ext4, fs/ext4/ext4.h. Checked by e2fsck.

use thiserror::Error;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// As many as one block's bits can say.
const BLOCKS_PER_GROUP: u64 = 8 * BLOCK as u64;
/// One for each 16 KiB, as mke2fs has it.
const INODES_PER_GROUP: u64 = 8192;
const INODE: usize = 256;
const TABLE: u64 = INODES_PER_GROUP * INODE as u64 / BLOCK as u64;
const DESCRIPTOR: usize = 32;
/// Where a descriptor's checksum is; it covers what comes before.
const CHECKSUM: usize = 0x1e;
/// Blocks that a group has at least beside its own tables.
const LEAST_FREE: u64 = 64;
/// 1 TiB.
const MOST: u64 = 1 << 28;

const ROOT: u64 = 2;
const LOST_FOUND: u64 = 11;
/// Directories have a block each.
const DIRECTORIES: u64 = 2;

const EXT_ATTR: u32 = 0x8;
const DIR_INDEX: u32 = 0x20;
const SPARSE_SUPER2: u32 = 0x200;
const FILETYPE: u32 = 0x2;
const EXTENTS: u32 = 0x40;
const LARGE_FILE: u32 = 0x2;
const HUGE_FILE: u32 = 0x8;
const GDT_CSUM: u32 = 0x10;
const DIR_NLINK: u32 = 0x20;
const EXTRA_ISIZE: u32 = 0x40;
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;

/// No file system can be made.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0} blocks of 4 KiB are too few or too many for a file system: give it 16 MiB to 1 TiB")]
pub struct SizeError(u64);

/// One block, to be written at its number.
pub struct Block {
    /// Which.
    pub number: u64,
    /// All of it.
    pub bytes: Box<[u8; BLOCK]>,
}

impl Block {
    fn new(number: u64) -> Self {
        Self { number, bytes: Box::new([0; BLOCK]) }
    }

    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&bytes);
    }

    /// Sets bits `from..to`.
    fn mark(&mut self, from: u64, to: u64) {
        for bit in from..to {
            self.bytes[bit as usize / 8] |= 1 << (bit % 8);
        }
    }
}

/// Where things are.
struct Layout {
    blocks: u64,
    groups: u64,
    descriptor_blocks: u64,
}

impl Layout {
    fn of(blocks: u64) -> Result<Self, SizeError> {
        let wrong = SizeError(blocks);
        if blocks > MOST {
            return Err(wrong);
        }
        let mut groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let mut used = blocks;
        // A last group without room for its own tables is left out.
        let last = blocks % BLOCKS_PER_GROUP;
        if last != 0 && last < 2 + TABLE + LEAST_FREE {
            groups -= 1;
            used -= last;
        }
        let descriptor_blocks = (groups * DESCRIPTOR as u64).div_ceil(BLOCK as u64);
        let layout = Self { blocks: used, groups, descriptor_blocks };
        if groups == 0 || layout.length(0) < layout.taken(0) + LEAST_FREE { Err(wrong) } else { Ok(layout) }
    }

    fn length(&self, group: u64) -> u64 {
        (self.blocks - group * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP)
    }

    /// The block bitmap; the inode bitmap and the inode table follow it.
    fn bitmap(&self, group: u64) -> u64 {
        group * BLOCKS_PER_GROUP + if group == 0 { 1 + self.descriptor_blocks } else { 0 }
    }

    /// Blocks at a group's begin that are not free.
    fn taken(&self, group: u64) -> u64 {
        if group == 0 { 1 + self.descriptor_blocks + 2 + TABLE + DIRECTORIES } else { 2 + TABLE }
    }

    fn first_directory(&self) -> u64 {
        self.bitmap(0) + 2 + TABLE
    }

    fn free(&self) -> u64 {
        (0..self.groups).map(|group| self.length(group) - self.taken(group)).sum()
    }
}

/// The blocks of an empty file system that is so many blocks long. `uuid` and `hash_seed` are random bytes.
///
/// # Errors
/// [`SizeError`].
pub fn empty(blocks: u64, uuid: [u8; 16], hash_seed: [u8; 16]) -> Result<Vec<Block>, SizeError> {
    let layout = Layout::of(blocks)?;
    let mut all = vec![superblock(&layout, uuid, hash_seed)];
    all.extend((0..layout.descriptor_blocks).map(|index| Block::new(1 + index)));
    for group in 0..layout.groups {
        let place = group as usize * DESCRIPTOR;
        let bytes = descriptor(&layout, group, uuid);
        all[1 + place / BLOCK].put(place % BLOCK, bytes);
    }
    let last = layout.groups - 1;
    for group in if last == 0 { vec![0] } else { vec![0, last] } {
        let mut bitmap = Block::new(layout.bitmap(group));
        bitmap.mark(0, layout.taken(group));
        bitmap.mark(layout.length(group), BLOCKS_PER_GROUP);
        all.push(bitmap);
    }
    let mut inodes = Block::new(layout.bitmap(0) + 1);
    inodes.mark(0, LOST_FOUND);
    inodes.mark(INODES_PER_GROUP, BLOCKS_PER_GROUP);
    let mut table = Block::new(layout.bitmap(0) + 2);
    let first = layout.first_directory();
    inode(&mut table, ROOT, 0o40755, 3, first);
    inode(&mut table, LOST_FOUND, 0o40700, 2, first + 1);
    let root = directory(first, &[(ROOT, b"."), (ROOT, b".."), (LOST_FOUND, b"lost+found")]);
    let lost = directory(first + 1, &[(LOST_FOUND, b"."), (ROOT, b"..")]);
    all.extend([inodes, table, root, lost]);
    Ok(all)
}

fn superblock(layout: &Layout, uuid: [u8; 16], hash_seed: [u8; 16]) -> Block {
    let inodes = layout.groups * INODES_PER_GROUP;
    let mut block = Block::new(0);
    let mut word = |at: usize, value: u32| block.put(1024 + at, value.to_le_bytes());
    word(0x00, inodes as u32);
    word(0x04, layout.blocks as u32);
    word(0x0c, layout.free() as u32);
    word(0x10, (inodes - LOST_FOUND) as u32);
    // Blocks and clusters are 1024 << 2 bytes.
    word(0x18, 2);
    word(0x1c, 2);
    word(0x20, BLOCKS_PER_GROUP as u32);
    word(0x24, BLOCKS_PER_GROUP as u32);
    word(0x28, INODES_PER_GROUP as u32);
    // No check after any number of mounts; magic.
    word(0x34, 0xffff << 16);
    word(0x38, 0xef53 | 1 << 16);
    // On an error: read-only. Revision 1.
    word(0x3c, 2);
    word(0x4c, 1);
    word(0x54, LOST_FOUND as u32);
    word(0x58, INODE as u32);
    word(0x5c, EXT_ATTR | DIR_INDEX | SPARSE_SUPER2);
    word(0x60, FILETYPE | EXTENTS);
    word(0x64, LARGE_FILE | HUGE_FILE | GDT_CSUM | DIR_NLINK | EXTRA_ISIZE);
    // Names are hashed by half MD4.
    word(0xfc, 1);
    // Room for what inodes of 256 bytes have beyond 128: 32 bytes, wanted and least.
    word(0x15c, 32 | 32 << 16);
    // The hash takes characters as signed.
    word(0x160, 1);
    block.put(1024 + 0x68, uuid);
    block.put(1024 + 0xec, hash_seed);
    block
}

fn descriptor(layout: &Layout, group: u64, uuid: [u8; 16]) -> [u8; DESCRIPTOR] {
    let mut bytes = [0; DESCRIPTOR];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let (bitmap, used) = (layout.bitmap(group), if group == 0 { LOST_FOUND } else { 0 });
    put(0x00, &(bitmap as u32).to_le_bytes());
    put(0x04, &(bitmap as u32 + 1).to_le_bytes());
    put(0x08, &(bitmap as u32 + 2).to_le_bytes());
    put(0x0c, &((layout.length(group) - layout.taken(group)) as u16).to_le_bytes());
    put(0x0e, &((INODES_PER_GROUP - used) as u16).to_le_bytes());
    put(0x10, &(if group == 0 { DIRECTORIES as u16 } else { 0 }).to_le_bytes());
    let flags = match group {
        0 => 0,
        group if group == layout.groups - 1 => INODE_UNINIT,
        _ => INODE_UNINIT | BLOCK_UNINIT,
    };
    put(0x12, &flags.to_le_bytes());
    put(0x1c, &((INODES_PER_GROUP - used) as u16).to_le_bytes());
    let sum = crc16(crc16(crc16(!0, &uuid), &(group as u32).to_le_bytes()), &bytes[..CHECKSUM]);
    bytes[CHECKSUM..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// A directory of one block.
fn inode(table: &mut Block, number: u64, mode: u16, links: u16, block: u64) {
    let at = (number as usize - 1) * INODE;
    table.put(at, mode.to_le_bytes());
    table.put(at + 0x04, (BLOCK as u32).to_le_bytes());
    table.put(at + 0x1a, links.to_le_bytes());
    table.put(at + 0x1c, (BLOCK as u32 / 512).to_le_bytes());
    // EXTENTS_FL; one extent of at most four, then its length and place.
    table.put(at + 0x20, 0x80000u32.to_le_bytes());
    table.put(at + 0x28, [0x0a, 0xf3, 1, 0, 4, 0, 0, 0]);
    table.put(at + 0x38, 1u16.to_le_bytes());
    table.put(at + 0x3c, (block as u32).to_le_bytes());
    table.put(at + 0x80, 32u16.to_le_bytes());
}

fn directory(number: u64, entries: &[(u64, &[u8])]) -> Block {
    let mut block = Block::new(number);
    let mut at = 0;
    for (index, (inode, name)) in entries.iter().enumerate() {
        let size = if index + 1 == entries.len() { BLOCK - at } else { (8 + name.len()).next_multiple_of(4) };
        block.put(at, (*inode as u32).to_le_bytes());
        block.put(at + 4, (size as u16).to_le_bytes());
        // Its type: a directory.
        block.put(at + 6, [name.len() as u8, 2]);
        block.bytes[at + 8..at + 8 + name.len()].copy_from_slice(name);
        at += size;
    }
    block
}

/// CRC-16 with the polynomial 0x8005, reflected.
fn crc16(start: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(start, |sum, byte| {
        (0..8).fold(sum ^ u16::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xa001 } else { sum >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::unix::fs::FileExt, process::Command};

    #[test]
    fn the_checksum_is_the_catalogues() {
        // CRC-16/ARC, of the catalogue of parametrised CRC algorithms.
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }

    /// Makes one in a file full of what a disk may have had before, and asks e2fsck.
    fn checked(blocks: u64) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(blocks * BLOCK as u64).unwrap();
        for group in 0..blocks.div_ceil(BLOCKS_PER_GROUP) {
            file.write_all_at(&[0xaa; BLOCK], group * BLOCKS_PER_GROUP * BLOCK as u64).unwrap();
        }
        for block in empty(blocks, [7; 16], [9; 16]).unwrap() {
            file.write_all_at(&*block.bytes, block.number * BLOCK as u64).unwrap();
        }
        let said = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        let words = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.status.success(), "{blocks} blocks: {words}");
        assert!(words.contains(": 11/"), "{blocks} blocks: {words}");
    }

    #[test]
    fn e2fsck_finds_nothing_wrong() {
        // One group, full and not; a last group without room; several; more descriptors than a block holds.
        for blocks in [4096, 32768, 32768 + 100, 2 * 32768 + 600, 5 * 32768 - 1, 130 * 32768] {
            checked(blocks);
        }
    }

    #[test]
    fn sizes_without_a_file_system_are_refused() {
        for blocks in [0, 1, 500, MOST + 1, u64::MAX] {
            assert_eq!(empty(blocks, [0; 16], [0; 16]).err(), Some(SizeError(blocks)));
        }
    }
}
