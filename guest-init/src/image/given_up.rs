//! Blobs that end when nobody wants their image any more.
//!
//! Owns: that a thread which unpacks for nobody ends soon, so that the pod's other requests do not wait for it (`server::beside`).
//! Does not own: who decides that (`server`).

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use coffer_layers::{digest::Digest, layout::Blobs};

/// Another source's blobs, as long as the flag is not set.
pub(super) struct UnlessGivenUp<B> {
    blobs: B,
    given_up: Arc<AtomicBool>,
}

impl<B: Blobs> UnlessGivenUp<B> {
    pub(super) fn new(blobs: B, given_up: Arc<AtomicBool>) -> Self {
        Self { blobs, given_up }
    }
}

impl<B: Blobs> Blobs for UnlessGivenUp<B> {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + Send>> {
        look(&self.given_up)?;
        Ok(Box::new(Reader { blob: self.blobs.open(digest)?, given_up: self.given_up.clone() }))
    }
}

fn look(given_up: &AtomicBool) -> io::Result<()> {
    if given_up.load(Ordering::Relaxed) {
        // Of another kind than `Interrupted`, after which readers try again.
        return Err(io::Error::other("nobody waits for this image any more"));
    }
    Ok(())
}

struct Reader {
    blob: Box<dyn Read + Send>,
    given_up: Arc<AtomicBool>,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        look(&self.given_up)?;
        self.blob.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Endless;

    impl Blobs for Endless {
        fn open(&self, _: &Digest) -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::repeat(7)))
        }
    }

    #[test]
    fn an_open_blob_ends_and_no_other_opens() {
        let given_up = Arc::new(AtomicBool::new(false));
        let blobs = UnlessGivenUp::new(Endless, given_up.clone());
        let mut blob = blobs.open(&Digest::sha256(b"")).unwrap();
        let mut bytes = [0; 4];
        blob.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [7; 4]);
        given_up.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        assert!(blob.read_to_end(&mut all).unwrap_err().to_string().contains("nobody waits"));
        assert!(all.is_empty());
        assert!(blobs.open(&Digest::sha256(b"")).is_err());
    }
}
