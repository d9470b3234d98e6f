//! What each stage of a layer's way costs by itself. `stages BLOB DIRECTORY`: BLOB is a layer of gzip or zstd, as it lies in a layout; its
//! tree goes to the directory, which is there and empty.
//!
//! Owns: the stages of `pipeline::run` one at a time, over bytes that are in memory already, in a thread's CPU time. What they cost together
//! is `perf/layers`' to say.

use std::{
    error::Error,
    fs::{self, File},
    io::Read,
    thread,
};

use coffer_layers::{
    digest::{Digest, Hasher},
    manifest::Compression,
    ocicrypt::{LayerKey, cipher::Stream},
    pipeline::{CHUNK, decompress, queue},
    tar::Archive,
    unpack::{Options, Unpacker},
};

/// Seconds that this thread has run (proc(5), schedstat).
fn spent() -> f64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    nanoseconds.expect("a kernel that counts threads' time") / 1e9
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let before = spent();
    let done = work();
    (done, spent() - before)
}

fn hash(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::like(&Digest::sha256(b""));
    bytes.chunks(CHUNK).for_each(|chunk| hasher.update(chunk));
    hasher.end()
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [blob, place] = words.as_slice() else { return Err("usage: stages BLOB DIRECTORY".into()) };
    let packed = fs::read(blob)?;
    let compression = if packed.starts_with(&[0x1f, 0x8b]) { Compression::Gzip } else { Compression::Zstd };

    let (_, digest) = timed(|| hash(&packed));
    let mut bytes = packed.clone();
    let mut stream = Stream::new(&LayerKey::generate()?);
    let ((), decrypt) = timed(|| bytes.chunks_mut(CHUNK).for_each(|chunk| stream.decrypt(chunk)));
    drop(bytes);

    let (give, take) = queue();
    let (out, mut result) = queue();
    let mut tar = Vec::new();
    let inflate = thread::scope(|scope| -> Result<f64, Box<dyn Error>> {
        let packed = &packed;
        scope.spawn(move || {
            if packed.chunks(CHUNK).all(|chunk| give.send(chunk.to_vec()).is_ok()) {
                give.finish();
            }
        });
        let work = scope.spawn(move || timed(|| decompress(compression, take, &out, u64::MAX)));
        result.read_to_end(&mut tar)?;
        let (done, seconds) = work.join().map_err(|_| "the decompressor panicked")?;
        done.map_err(|e| format!("decompress: {e:?}"))?;
        Ok(seconds)
    })?;
    let (_, diff_id) = timed(|| hash(&tar));
    let mut unpacker =
        Unpacker::new(File::open(place)?.into(), Options { privileged: true, budget: u64::MAX });
    let (unpacked, unpack) = timed(|| unpacker.layer(&mut Archive::new(tar.as_slice())));
    unpacked?;

    for (stage, seconds) in [
        ("digest of the blob", digest),
        ("decryption and HMAC", decrypt),
        ("decompression", inflate),
        ("diff_id", diff_id),
        ("unpacking", unpack),
    ] {
        println!("{stage:<34} {seconds:6.2} s {:7.0} MB/s", tar.len() as f64 / 1e6 / seconds);
    }
    Ok(())
}
