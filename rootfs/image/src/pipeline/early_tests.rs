//! A layer and its key at once, told by who did what first and not by a clock.

use std::{
    fs,
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use zeroize::Zeroizing;

use super::*;
use crate::{
    image::{Image, Trust},
    layout::Layout,
    testing::{Fixed, Tar, assemble, encrypted},
    unpack::Options,
};

/// Bytes of the layer that its reader got so far.
type Came = Arc<(Mutex<u64>, Condvar)>;

/// A host and a KBS that see each other: the KBS answers when the host was asked for so many bytes of the layer.
struct Both<'a> {
    layout: &'a Layout,
    layer: Digest,
    came: Came,
    wanted: u64,
    answer: Result<[u8; 32], String>,
    /// Bytes of the layer that came before the KBS's answer.
    early: Mutex<u64>,
}

struct Counted(Box<dyn Read + Send>, Came);

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(buffer)?;
        *self.1.0.lock().unwrap() += n as u64;
        self.1.1.notify_all();
        Ok(n)
    }
}

impl Blobs for Both<'_> {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + Send>> {
        let blob = self.layout.open(digest)?;
        Ok(if *digest == self.layer { Box::new(Counted(blob, self.came.clone())) } else { blob })
    }
}

impl KeySource for Both<'_> {
    fn resource(&self, _: &str) -> Result<Zeroizing<Vec<u8>>, String> {
        let (count, came) = &*self.came;
        let patience = Duration::from_secs(60);
        let wait = came.wait_timeout_while(count.lock().unwrap(), patience, |n| *n < self.wanted);
        if wait.unwrap().1.timed_out() {
            return Err("the layer does not come before its key".into());
        }
        // More than the bound would come now.
        thread::sleep(Duration::from_millis(30));
        *self.early.lock().unwrap() = *count.lock().unwrap();
        self.answer.clone().map(|key| Zeroizing::new(key.to_vec()))
    }
}

const KEY: Fixed = Fixed([7; 32]);
const BOUND: u64 = (MOST_EARLY * CHUNK) as u64;

/// Unpacks a layer with a file of this length beside `at`; how much came early, and the refusal.
fn unpack(at: &Path, length: usize, wanted: u64, answer: Result<[u8; 32], String>) -> (u64, Option<String>) {
    let layout = Layout::create(at.join("layout")).unwrap();
    // No two chunks are alike.
    let bytes: Vec<u8> = (0..length / 4).flat_map(|n| (n as u32).to_le_bytes()).collect();
    let tar = Tar::default().file("file", &bytes).end();
    let layer = encrypted(&layout, "tar", &tar, &KEY);
    let manifest = assemble(&layout, vec![layer.clone()], &[Digest::sha256(&tar)]);
    let wanted = wanted.min(layer.size);
    let (came, early) = (Came::default(), Mutex::default());
    let both = Both { layout: &layout, layer: layer.digest, came, wanted, answer, early };
    let image = Image::load(&both, &manifest.digest, Trust::Pinned).unwrap();
    let options = Options { privileged: false, budget: 16 << 20 };
    let done = image.unpack(&both, &both, &at.join("root"), options, &AtomicU64::new(0));
    if done.is_ok() {
        assert!(fs::read(at.join("root/file")).unwrap() == bytes);
    }
    // All of the fetching thread's, which has ended.
    let all = *both.came.0.lock().unwrap();
    assert_eq!(all, if done.is_ok() { layer.size } else { *both.early.lock().unwrap() });
    (*both.early.lock().unwrap(), done.err().map(|e| e.to_string()))
}

#[test]
fn the_first_of_a_layer_comes_before_its_key_and_no_more_than_a_bound() {
    for length in [400, 300_000, 5 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let (early, refused) = unpack(dir.path(), length, BOUND, Ok(KEY.0));
        assert_eq!(refused, None);
        let most = (length.next_multiple_of(512) + 512 + 1024) as u64;
        assert_eq!(early, BOUND.min(most), "{length}");
    }
}

#[test]
fn what_came_early_ends_with_the_refusal_of_a_key() {
    let dir = tempfile::tempdir().unwrap();
    let (early, refused) = unpack(dir.path(), 5 << 20, BOUND, Err("not for you".into()));
    assert_eq!(early, BOUND);
    let refused = refused.unwrap();
    assert!(refused.starts_with("layer sha256:") && refused.contains("not for you"), "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "more than the layout is left");
    // A wrong key is told from a wrong blob as ever.
    let dir = tempfile::tempdir().unwrap();
    let (_, refused) = unpack(dir.path(), 400, BOUND, Ok([8; 32]));
    assert!(refused.unwrap().contains("layer key: no wrap could be opened"));
}
