//! What the current layer made: a whiteout only removes what lower layers made.
//!
//! Owns: the record, whose size is bounded whatever a layer has. Does not own: removing.
//!
//! The tree itself is most of the record. A name of an inode that this layer made cannot be a lower layer's, and file systems give numbers in
//! a row, so that a bit for each is enough. Only a name that this layer gave to a lower layer's file (a hard link) is kept by itself.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{BuildHasher, RandomState},
};

use rustix::fs::Stat;

/// Most names that a layer may give to files of lower layers. Archives of layers have the file again in their place.
pub(super) const MOST_LINKS: usize = 128 << 10;

/// Inodes and names of one layer.
#[derive(Default)]
pub(super) struct Record {
    /// By device and the number's upper bits: the 64 that follow.
    inodes: BTreeMap<(u64, u64), u64>,
    /// Hashes of directory and name.
    links: HashSet<u64>,
    keys: RandomState,
}

impl Record {
    /// For the next layer.
    pub(super) fn clear(&mut self) {
        self.inodes.clear();
        self.links = HashSet::new();
    }

    /// An inode was made, or a directory that is there was named.
    pub(super) fn add(&mut self, stat: &Stat) {
        *self.inodes.entry((stat.st_dev, stat.st_ino >> 6)).or_default() |= 1 << (stat.st_ino & 63);
    }

    /// A name was given to an inode. False: there are too many such.
    pub(super) fn link(&mut self, stat: &Stat, parent: u64, name: &[u8]) -> bool {
        if self.has_inode(stat) {
            return true;
        }
        let key = self.keys.hash_one((parent, name));
        self.links.contains(&key) || self.links.len() < MOST_LINKS && self.links.insert(key)
    }

    /// A name is gone.
    pub(super) fn forget(&mut self, parent: u64, name: &[u8]) {
        if !self.links.is_empty() {
            self.links.remove(&self.keys.hash_one((parent, name)));
        }
    }

    /// The layer made this name of the inode.
    pub(super) fn has(&self, stat: &Stat, parent: u64, name: &[u8]) -> bool {
        self.has_inode(stat)
            || !self.links.is_empty() && self.links.contains(&self.keys.hash_one((parent, name)))
    }

    fn has_inode(&self, stat: &Stat) -> bool {
        let bits = self.inodes.get(&(stat.st_dev, stat.st_ino >> 6));
        bits.is_some_and(|bits| bits >> (stat.st_ino & 63) & 1 == 1)
    }
}
