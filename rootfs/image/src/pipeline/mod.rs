//! One layer from blob to tree, read once: digest of what came, decrypt, HMAC, decompress, unpack, diff_id.
//!
//! Owns: the three threads (fetch and decrypt; decompress; unpack), the bounded queues between them, and which
//! error is told. The first chunks of an encrypted layer come while its key is asked for, which may take an attestation.
//! The tree is worth something only after [`run`] returned `Ok` for every layer.

mod decompress;
mod queue;

use std::{
    collections::VecDeque,
    io::{self, BufRead, Read},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use thiserror::Error;

pub use self::{
    decompress::{MOST_WINDOW, decompress},
    queue::{CHUNK, Receiver, Sender, queue},
};
use crate::{
    digest::{Digest, Hasher},
    layout::Blobs,
    manifest::{Compression, Descriptor},
    ocicrypt::{
        KeyError, KeySource, LayerKey,
        cipher::{HmacError, Stream},
    },
    tar::Archive,
    unpack::{UnpackError, Unpacker},
};

/// Most chunks of a layer that are kept until its key is there: 512 KiB. Unpacking may take 16 MiB,
/// and 15.3 were measured with the largest window (zstd) and nothing kept.
const MOST_EARLY: usize = 4;

/// A layer was refused. Each message begins with the stage.
#[derive(Debug, Error)]
pub enum LayerError {
    /// Its key.
    #[error("layer {0}: {1}")]
    Key(Digest, KeyError),
    /// The blob did not come.
    #[error("fetch {0}: {1}")]
    Fetch(Digest, io::Error),
    /// It is longer or shorter than the manifest says.
    #[error("fetch {digest}: {got} bytes came, the manifest says {want}")]
    Size {
        /// The layer.
        digest: Digest,
        /// By the manifest.
        want: u64,
        /// That came; one more than wanted when there were too many.
        got: u64,
    },
    /// It is another blob.
    #[error("digest: what came for {want} is {got}: a wrong or changed blob")]
    Digest {
        /// By the manifest.
        want: Digest,
        /// Of what came.
        got: Digest,
    },
    /// It was encrypted under another key, or changed.
    #[error("decrypt {0}: {1}")]
    Decrypt(Digest, HmacError),
    /// Broken compression.
    #[error("decompress {0}: {1}")]
    Decompress(Digest, String),
    /// Far more than its files need.
    #[error("decompress {0}: more than {1} bytes come out: a decompression bomb")]
    Bomb(Digest, u64),
    /// Broken archive, or what it wants is refused.
    #[error("layer {0}: {1}")]
    Unpack(Digest, UnpackError),
    /// The content is not what the configuration says.
    #[error("diff_id of layer {layer}: unpacked it is {got}, the image's configuration says {want}")]
    DiffId {
        /// The layer.
        layer: Digest,
        /// By the configuration.
        want: Digest,
        /// Of what came out.
        got: Digest,
    },
    /// No thread could be started.
    #[error("layer {0}: thread: {1}")]
    Thread(Digest, io::Error),
}

/// One layer to be applied.
pub struct Layer<'a> {
    /// Blob, size and digest, from the manifest.
    pub descriptor: &'a Descriptor,
    /// From its media type.
    pub compression: Compression,
    /// From its media type, too.
    pub encrypted: bool,
    /// From the verified configuration.
    pub diff_id: &'a Digest,
}

/// Applies a layer; `keys` are asked by this thread. `progress` counts bytes of the blob as they come.
///
/// # Errors
/// [`LayerError`]: the earliest stage's, because a changed blob breaks whatever follows.
pub fn run(
    blobs: &dyn Blobs,
    layer: &Layer<'_>,
    keys: &dyn KeySource,
    unpacker: &mut Unpacker,
    progress: &AtomicU64,
) -> Result<(), LayerError> {
    let digest = &layer.descriptor.digest;
    let most = unpacker.left().saturating_mul(2).saturating_add(16 << 20);
    let thread = |name: &str| thread::Builder::new().name(name.into());
    let no_thread = |e| LayerError::Thread(digest.clone(), e);
    thread::scope(|scope| {
        let (plain_in, plain_out) = queue();
        let (tar_in, tar_out) = queue();
        let (found, key) = mpsc::channel();
        let key = layer.encrypted.then_some(key);
        let fetcher = thread("layer-fetch")
            .spawn_scoped(scope, move || fetch(blobs, layer, key, plain_in, progress))
            .map_err(no_thread)?;
        if layer.encrypted {
            let key = LayerKey::unwrap(&layer.descriptor.annotations, keys);
            // A fetcher that has ended says why below; one that gets no key ends.
            let _ = found.send(key.map_err(|e| LayerError::Key(digest.clone(), e))?);
        }
        // A layer that is not compressed needs no thread between.
        let (source, decompressor) = match layer.compression {
            Compression::None => (plain_out, None),
            compression => {
                let work = move || decompress(compression, plain_out, &tar_in, most);
                let work = thread("layer-unpack").spawn_scoped(scope, work).map_err(no_thread)?;
                (tar_out, Some(work))
            }
        };
        let unpacked = unpack(layer, source, unpacker, most);
        let decompressed = decompressor.map_or(Ok(()), |work| {
            work.join().unwrap_or_else(|_| Err(decompress::Failure::Broken("the thread panicked".into())))
        });
        fetcher.join().unwrap_or_else(|_| {
            Err(LayerError::Fetch(digest.clone(), io::Error::other("the thread panicked")))
        })?;
        match decompressed {
            // The unpacker stopped first, and says why.
            Ok(()) | Err(decompress::Failure::Stopped) => unpacked,
            Err(decompress::Failure::Broken(why)) => Err(LayerError::Decompress(digest.clone(), why)),
            Err(decompress::Failure::Bomb(most)) => Err(LayerError::Bomb(digest.clone(), most)),
        }
    })
}

/// A blob on its way: counted and hashed as it comes.
struct Incoming<'a> {
    descriptor: &'a Descriptor,
    source: Box<dyn Read + Send>,
    hasher: Hasher,
    got: u64,
    ended: bool,
    progress: &'a AtomicU64,
}

impl<'a> Incoming<'a> {
    fn open(
        blobs: &dyn Blobs,
        descriptor: &'a Descriptor,
        progress: &'a AtomicU64,
    ) -> Result<Self, LayerError> {
        let digest = &descriptor.digest;
        let source = blobs.open(digest).map_err(|e| LayerError::Fetch(digest.clone(), e))?;
        Ok(Self { descriptor, source, hasher: Hasher::like(digest), got: 0, ended: false, progress })
    }

    /// The next bytes, in this chunk; `None` at the end.
    fn next(&mut self, mut chunk: Vec<u8>) -> Result<Option<Vec<u8>>, LayerError> {
        if self.ended {
            return Ok(None);
        }
        let Descriptor { digest, size, .. } = self.descriptor;
        // One byte more than the manifest says is enough to know.
        let most = usize::try_from(size - self.got + 1).unwrap_or(usize::MAX).min(chunk.len());
        let n =
            fill(&mut self.source, &mut chunk[..most]).map_err(|e| LayerError::Fetch(digest.clone(), e))?;
        self.got += n as u64;
        if self.got > *size || (n < most && self.got < *size) {
            return Err(LayerError::Size { digest: digest.clone(), want: *size, got: self.got });
        }
        self.ended = n < most;
        if n == 0 {
            return Ok(None);
        }
        chunk.truncate(n);
        self.hasher.update(&chunk);
        self.progress.fetch_add(n as u64, Ordering::Relaxed);
        Ok(Some(chunk))
    }

    /// Whether it was the blob that was wanted.
    fn finish(self) -> Result<(), LayerError> {
        let (want, got) = (self.descriptor.digest.clone(), self.hasher.end());
        if got == want { Ok(()) } else { Err(LayerError::Digest { want, got }) }
    }
}

/// Reads the blob to its end whatever happens behind, so that a wrong blob is always told from a broken layer. Where `key` is to
/// come, the first chunks are read while it does; without it nothing goes on.
fn fetch(
    blobs: &dyn Blobs,
    layer: &Layer<'_>,
    key: Option<mpsc::Receiver<LayerKey>>,
    to: Sender,
    progress: &AtomicU64,
) -> Result<(), LayerError> {
    let mut incoming = Incoming::open(blobs, layer.descriptor, progress)?;
    let mut early = VecDeque::new();
    let mut cipher = None;
    if let Some(key) = key {
        let mut found = key.try_recv();
        while matches!(found, Err(mpsc::TryRecvError::Empty)) && early.len() < MOST_EARLY {
            let Some(chunk) = incoming.next(vec![0; CHUNK])? else { break };
            early.push_back(chunk);
            found = key.try_recv();
        }
        // Whoever asks for the key says why there is none.
        let Some(found) = found.ok().or_else(|| key.recv().ok()) else { return Ok(()) };
        cipher = Some(Stream::new(&found));
    }
    let mut to = Some(to);
    loop {
        let chunk = match early.pop_front() {
            Some(chunk) => Some(chunk),
            None => incoming.next(to.as_ref().map_or_else(|| vec![0; CHUNK], Sender::buffer))?,
        };
        let Some(mut chunk) = chunk else { break };
        if let Some(cipher) = &mut cipher {
            cipher.decrypt(&mut chunk);
        }
        if to.as_ref().is_some_and(|to| to.send(chunk).is_err()) {
            to = None;
        }
    }
    incoming.finish()?;
    if let Some(cipher) = cipher {
        cipher.finish().map_err(|e| LayerError::Decrypt(layer.descriptor.digest.clone(), e))?;
    }
    // Only now does the reader behind see the end: until then it waits with the last entries.
    if let Some(to) = to {
        to.finish();
    }
    Ok(())
}

fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match source.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

/// Hashes what is read through it.
struct Hashing<R> {
    source: R,
    hasher: Hasher,
    /// Bytes of the piece at hand that are hashed already.
    ahead: usize,
    total: u64,
}

impl<R: BufRead> Hashing<R> {
    fn new(source: R, like: &Digest) -> Self {
        Self { source, hasher: Hasher::like(like), ahead: 0, total: 0 }
    }
}

impl<R: BufRead> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill_buf()?;
        let n = piece.len().min(buffer.len());
        buffer[..n].copy_from_slice(&piece[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Hashing<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let piece = self.source.fill_buf()?;
        if self.ahead == 0 {
            self.hasher.update(piece);
            self.ahead = piece.len();
            self.total += piece.len() as u64;
        }
        Ok(piece)
    }

    fn consume(&mut self, n: usize) {
        self.ahead -= n.min(self.ahead);
        self.source.consume(n);
    }
}

fn unpack(layer: &Layer<'_>, source: Receiver, unpacker: &mut Unpacker, most: u64) -> Result<(), LayerError> {
    let digest = &layer.descriptor.digest;
    let refused = |e| LayerError::Unpack(digest.clone(), e);
    let mut archive = Archive::new(Hashing::new(source, layer.diff_id));
    unpacker.layer(&mut archive).map_err(refused)?;
    // What follows the archive's end (padding to a record) is part of the diff_id.
    let mut rest = archive.into_source();
    loop {
        let n = rest.fill_buf().map_err(|e| refused(crate::tar::TarError::Read(e).into()))?.len();
        if n == 0 {
            break;
        }
        rest.consume(n);
        if rest.total > most {
            return Err(LayerError::Bomb(digest.clone(), most));
        }
    }
    let is = rest.hasher.end();
    if is != *layer.diff_id {
        return Err(LayerError::DiffId { layer: digest.clone(), want: layer.diff_id.clone(), got: is });
    }
    Ok(())
}

#[cfg(test)]
mod early_tests;
#[cfg(test)]
mod tests;
