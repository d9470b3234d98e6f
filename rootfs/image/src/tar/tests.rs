use std::{io::Read, process::Command};

use proptest::prelude::*;

use super::*;
use crate::testing::Tar;

fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut archive = Archive::new(bytes);
    let mut all = Vec::new();
    while let Some(entry) = archive.entry()? {
        let mut data = Vec::new();
        loop {
            let piece = archive.data()?;
            if piece.is_empty() {
                break;
            }
            data.extend(piece);
            let n = piece.len();
            archive.consume(n);
        }
        all.push((entry, data));
    }
    Ok(all)
}

#[test]
fn names_and_links_of_every_length() {
    let long = format!("d/{}", "x".repeat(240));
    let tar = Tar::default()
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"-1.5"),
            ("uid", b"3000000"),
            ("SCHILY.xattr.user.a", b"\0=\n"),
        ])
        .file("short", b"data")
        .raw("././@LongLink", b'L', "", format!("{long}g\0").as_bytes(), |_| ())
        .raw("././@LongLink", b'K', "", format!("{long}t\0").as_bytes(), |_| ())
        .symlink("short", "short")
        .raw("name", b'0', "", b"", |block| block[345..351].copy_from_slice(b"prefix"))
        .end();
    let all = read(&tar).unwrap();
    assert_eq!((all[0].0.path.as_slice(), all[0].1.as_slice()), (long.as_bytes(), &b"data"[..]));
    assert_eq!((all[0].0.mtime, all[0].0.uid), ((-2, 500_000_000), 3_000_000));
    assert_eq!(all[0].0.xattrs, [(b"user.a".to_vec(), b"\0=\n".to_vec())]);
    assert_eq!(all[1].0.path, format!("{long}g").as_bytes());
    assert_eq!(all[1].0.kind, Kind::SymLink(format!("{long}t").into_bytes()));
    assert_eq!(all[2].0.path, b"prefix/name");
    assert_eq!(all.len(), 3);
}

#[test]
fn an_extended_header_replaces_what_an_earlier_one_said_but_not_gnus_names() {
    let attribute = |name: &'static str| [(name, &b"value"[..])];
    let tar = Tar::default()
        .pax(&[("SCHILY.xattr.user.a", b"value"), ("uid", b"7"), ("linkpath", b"to")])
        .pax(&attribute("SCHILY.xattr.user.b"))
        .symlink("l", "d")
        .raw("././@LongLink", b'L', "", b"long\0", |_| ())
        .pax(&attribute("SCHILY.xattr.user.c"))
        .file("short", b"")
        .end();
    let all = read(&tar).unwrap();
    assert_eq!(all[0].0.xattrs, [(b"user.b".to_vec(), b"value".to_vec())]);
    assert_eq!((all[0].0.uid, &all[0].0.kind), (0, &Kind::SymLink(b"d".to_vec())));
    assert_eq!(all[1].0.path, b"long");
    assert_eq!(all[1].0.xattrs.len(), 1);
}

#[test]
fn an_attribute_that_linux_cannot_have_is_refused_before_it_is_kept() {
    let of = |size: usize| {
        read(&Tar::default().pax(&[("SCHILY.xattr.user.a", &vec![1; size])]).file("a", b"").end())
    };
    assert_eq!(of(64 << 10).unwrap()[0].0.xattrs[0].1.len(), 64 << 10);
    assert!(matches!(of((64 << 10) + 1), Err(TarError::Field { .. })));
}

/// GNU tar is the oracle: files with holes in every form that it writes.
#[test]
fn gnu_tars_sparse_forms() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("holes");
    let file = std::fs::File::create(&path).unwrap();
    let mut want = vec![0u8; 3 << 20];
    for piece in 0..40usize {
        let at = piece * 70_000 / 4096 * 4096;
        std::os::unix::fs::FileExt::write_all_at(&file, &[piece as u8 + 1; 4096], at as u64).unwrap();
        want[at..at + 4096].fill(piece as u8 + 1);
    }
    file.set_len(want.len() as u64).unwrap();
    for form in [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ] {
        let made = Command::new("tar")
            .args(["--sparse", "-C"])
            .arg(dir.path())
            .args(form.split(' '))
            .args(["-cf", "-", "holes"])
            .output()
            .unwrap();
        assert!(made.status.success());
        let all = read(&made.stdout).unwrap();
        let (entry, data) = &all[0];
        assert_eq!(entry.path, b"holes", "{form}");
        let sparse = entry.sparse.as_ref().expect(form);
        let (mut got, mut at) = (vec![0; sparse.real as usize], 0);
        for &(offset, length) in &sparse.pieces {
            let (offset, length) = (offset as usize, length as usize);
            got[offset..offset + length].copy_from_slice(&data[at..at + length]);
            at += length;
        }
        assert!(got == want && data.len() < 300_000, "{form}");
    }
}

#[test]
fn broken_archives_are_refused() {
    let good = Tar::default().file("a", &[1; 700]).end();
    let mut sum = good.clone();
    sum[0] ^= 1;
    assert!(matches!(read(&sum), Err(TarError::Checksum(0))));
    for cut in [100, 511, 600, 1100] {
        assert!(matches!(read(&good[..cut]), Err(TarError::Short(_))), "{cut}");
    }
    let field = |at: usize, text: &'static [u8]| {
        read(
            &Tar::default()
                .raw("a", b'0', "", b"", move |b| b[at..at + text.len()].copy_from_slice(text))
                .end(),
        )
    };
    assert!(matches!(field(124, b"9999"), Err(TarError::Field { field: "size", .. })));
    assert!(matches!(
        field(124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        Err(TarError::Field { .. })
    ));
    assert!(matches!(field(156, b"Z"), Err(TarError::Kind { kind: 'Z', .. })));
    // An extended header that would fill the memory, and one for nothing.
    let big = Tar::default().raw("x", b'x', "", b"", |b| b[124..135].copy_from_slice(b"77777777777")).end();
    assert!(matches!(read(&big), Err(TarError::Extended(_))));
    let alone = Tar::default().pax(&[("path", b"a")]).0;
    assert!(matches!(read(&alone), Err(TarError::Short(_))));
    for records in
        [&b"5 a=b\n"[..], b"99 a=b\n", b"6 ab\n ", b"x a=b\n", b"0 ", b"18446744073709551616 a=b\n"]
    {
        assert!(read(&Tar::default().raw("x", b'x', "", records, |_| ()).file("a", b"").end()).is_err());
    }
    let nul = Tar::default().pax(&[("path", b"a\0b")]).file("a", b"").end();
    assert!(matches!(read(&nul), Err(TarError::Field { field: "name", .. })));
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for map in ["0,10,5,10", "0,4", "8,18446744073709551615", "0,700,1,", "4,8"] {
        let tar = Tar::default()
            .pax(&[("GNU.sparse.map", map.as_bytes()), ("GNU.sparse.size", b"700")])
            .file("a", &[1; 5])
            .end();
        assert!(read(&tar).is_err(), "{map}");
    }
    let endless = Tar::default()
        .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"700")])
        .file("a", b"99999999999999999999999\n")
        .end();
    assert!(read(&endless).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = read(&bytes);
    }

    #[test]
    fn no_changed_header_makes_it_panic(
        kind in prop::sample::select(b"01234567xgLKS\0".to_vec()), at in 0usize..512, bytes in any::<[u8; 13]>(),
        data in prop::collection::vec(any::<u8>(), 0..1600),
    ) {
        let tar = Tar::default().raw("a/b", kind, "l", &data, |block| {
            let end = (at + 13).min(512);
            block[at..end].copy_from_slice(&bytes[..end - at]);
        }).file("z", b"").end();
        let _ = read(&tar);
    }

    #[test]
    fn data_come_back(data in prop::collection::vec(any::<u8>(), 0..3000), name in "[a-z]{1,90}") {
        let tar = Tar::default().file(&name, &data).file("z", b"").end();
        let mut whole = Vec::new();
        (&tar[..]).read_to_end(&mut whole).unwrap();
        let all = read(&whole).unwrap();
        prop_assert_eq!((&all[0].0.path, &all[0].1), (&name.into_bytes(), &data));
        prop_assert_eq!(all.len(), 2);
    }
}
