use std::{thread, time::Duration};

use super::*;
use crate::testing::{gzip, zstd};

fn all(compression: Compression, bytes: &[u8], most: u64) -> Result<Vec<u8>, decompress::Failure> {
    let (give, take) = queue();
    let (out, mut result) = queue();
    thread::scope(|scope| {
        scope.spawn(move || {
            for piece in bytes.chunks(1000) {
                if give.send(piece.to_vec()).is_err() {
                    return;
                }
            }
            give.finish();
        });
        let work = scope.spawn(move || decompress(compression, take, &out, most));
        let mut all = Vec::new();
        let read = result.read_to_end(&mut all);
        work.join().unwrap()?;
        read.unwrap();
        Ok(all)
    })
}

#[test]
fn members_and_frames_follow_each_other() {
    let data: Vec<u8> = (0..400_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let (a, b) = data.split_at(123_456);
    let skippable = [&b"\x50\x2a\x4d\x18\x03\0\0\0abc"[..]].concat();
    assert!(all(Compression::Gzip, &[gzip(a), gzip(b)].concat(), 1 << 30).unwrap() == data);
    assert!(
        all(Compression::Zstd, &[skippable.clone(), zstd(a), zstd(b), skippable].concat(), 1 << 30).unwrap()
            == data
    );
    assert!(all(Compression::None, &data, 1 << 30).unwrap() == data);
}

#[test]
fn cut_or_foreign_streams_are_refused() {
    let data = vec![7; 100_000];
    for (compression, packed) in [(Compression::Gzip, gzip(&data)), (Compression::Zstd, zstd(&data))] {
        for cut in [1, 3, packed.len() / 2, packed.len() - 1] {
            let failure = all(compression, &packed[..cut], 1 << 30).unwrap_err();
            assert!(matches!(failure, decompress::Failure::Broken(_)), "{compression:?} {cut}");
        }
        assert!(all(compression, b"not packed at all", 1 << 30).is_err());
        assert_eq!(all(compression, &packed, 50_000), Err(decompress::Failure::Bomb(50_000)));
    }
    // A zstd frame that asks for a window of 128 MiB (RFC 8878, 3.1.1.1.2).
    let greedy = b"\x28\xb5\x2f\xfd\x00\x88\x01\x00\x00";
    let decompress::Failure::Broken(why) = all(Compression::Zstd, greedy, 1 << 30).unwrap_err() else {
        panic!()
    };
    assert!(why.to_lowercase().contains("window"), "{why}");
}

#[test]
fn a_reader_that_stops_does_not_hang_the_rest() {
    let (give, take) = queue();
    let (out, result) = queue();
    let data = gzip(&vec![0; 8 << 20]);
    thread::scope(|scope| {
        let feeder = scope.spawn(move || data.chunks(CHUNK).all(|piece| give.send(piece.to_vec()).is_ok()));
        let work = scope.spawn(move || decompress(Compression::Gzip, take, &out, u64::MAX));
        thread::sleep(Duration::from_millis(20));
        drop(result);
        assert_eq!(work.join().unwrap(), Err(decompress::Failure::Stopped));
        feeder.join().unwrap();
    });
}
