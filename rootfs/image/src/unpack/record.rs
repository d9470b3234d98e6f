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

/// A set of inodes, by device and the number's upper bits: the 64 that follow.
#[derive(Default)]
struct Inodes(BTreeMap<(u64, u64), u64>);

impl Inodes {
    fn add(&mut self, stat: &Stat) {
        *self.0.entry((stat.st_dev, stat.st_ino >> 6)).or_default() |= 1 << (stat.st_ino & 63);
    }

    fn has(&self, stat: &Stat) -> bool {
        let bits = self.0.get(&(stat.st_dev, stat.st_ino >> 6));
        bits.is_some_and(|bits| bits >> (stat.st_ino & 63) & 1 == 1)
    }
}

/// Inodes and names of one layer.
#[derive(Default)]
pub(super) struct Record {
    inodes: Inodes,
    /// Directories in which nothing of a lower layer is left. What they hold is this layer's, and what comes to them too.
    settled: Inodes,
    /// Hashes of directory and name.
    links: HashSet<u64>,
    keys: RandomState,
}

impl Record {
    /// For the next layer.
    pub(super) fn clear(&mut self) {
        self.inodes.0.clear();
        self.settled.0.clear();
        self.links = HashSet::new();
    }

    /// An inode was made, or a directory that is there was named.
    pub(super) fn add(&mut self, stat: &Stat) {
        self.inodes.add(stat);
    }

    /// A whiteout went through a directory, and left what this layer made.
    pub(super) fn settle(&mut self, stat: &Stat) {
        self.settled.add(stat);
    }

    /// Another whiteout finds nothing there to remove.
    pub(super) fn is_settled(&self, stat: &Stat) -> bool {
        self.settled.has(stat)
    }

    /// A name was given to an inode. False: there are too many such.
    pub(super) fn link(&mut self, stat: &Stat, parent: u64, name: &[u8]) -> bool {
        if self.inodes.has(stat) {
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
        self.inodes.has(stat)
            || !self.links.is_empty() && self.links.contains(&self.keys.hash_one((parent, name)))
    }
}
