use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use super::*;
use crate::testing::Tar;

fn unpack(layers: &[Tar], check: impl Fn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let root = fs::File::open(dir.path()).unwrap();
    let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget: 1 << 30 });
    for layer in layers {
        unpacker.layer(&mut Archive::new(layer.clone().end().as_slice())).unwrap();
    }
    check(dir.path());
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn whiteouts_spare_their_own_layer() {
    let lower = Tar::default().dir("d").file("d/a", b"1").file("d/b", b"1").dir("d/e").file("d/e/f", b"1");
    // Opaque after and before what the layer itself puts there.
    for upper in [
        Tar::default().file("d/a", b"2").file("d/.wh..wh..opq", b""),
        Tar::default().file("d/.wh..wh..opq", b"").file("d/a", b"2"),
        Tar::default().file("d/.wh.b", b"").file("d/a", b"2").file("d/.wh.e", b""),
    ] {
        unpack(&[lower.clone(), upper], |root| {
            assert_eq!(names(&root.join("d")), ["a"]);
            assert_eq!(fs::read(root.join("d/a")).unwrap(), b"2");
        });
    }
    // A whiteout of a directory that this layer fills again without naming it.
    let upper = Tar::default().file("d/e/new", b"2").file("d/.wh.e", b"").file(".wh.missing", b"");
    unpack(&[lower.clone(), upper], |root| assert_eq!(names(&root.join("d/e")), ["new"]));
    // A name moved by hard link: the old name is the lower layer's, though the file is the same.
    let upper = Tar::default().hardlink("d/moved", "d/a").file("d/.wh.a", b"");
    unpack(&[lower, upper], |root| {
        assert_eq!(names(&root.join("d")), ["b", "e", "moved"]);
        assert_eq!(fs::metadata(root.join("d/moved")).unwrap().nlink(), 1);
    });
}

#[test]
fn a_directory_that_a_layer_names_stays_and_so_do_more_names_than_are_read_at_once() {
    let many = |tar: Tar, from: usize| {
        (0..600).fold(tar, |tar, i| tar.file(&format!("d/a-long-name-of-a-file-{}", from + i), b"1"))
    };
    let lower = many(Tar::default().dir("d").dir("d/kept").dir("d/gone"), 0);
    let upper = many(Tar::default().dir("d/kept"), 300).file("d/.wh..wh..opq", b"");
    unpack(&[lower.clone(), upper], |root| {
        let names = names(&root.join("d"));
        assert_eq!(names.len(), 601);
        assert!(
            names.contains(&"kept".to_owned()) && names.contains(&"a-long-name-of-a-file-899".to_owned())
        );
    });
    // What the first layer made is a lower layer's for the second, also where its number was a lower one's before.
    let upper = Tar::default().file("d/.wh..wh..opq", b"");
    unpack(&[lower, upper], |root| assert_eq!(names(&root.join("d")).len(), 0));
}

/// What of a processor this thread has used.
fn used() -> std::time::Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    std::time::Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn a_whiteout_again_does_not_look_at_all_files_again() {
    let files = (0..1000).fold(Tar::default().dir("d"), |tar, i| tar.file(&format!("d/{i}"), b""));
    for name in ["d/.wh..wh..opq", ".wh.d", ".wh..wh..opq"] {
        let tar = (0..6000).fold(files.clone(), |tar, _| tar.file(name, b""));
        let before = used();
        unpack(&[tar], |root| assert_eq!(names(&root.join("d")).len(), 1000));
        // Looking at each file each time takes six million calls.
        let took = used() - before;
        assert!(took.as_secs() < 6, "{name}: {took:?}");
    }
}

#[test]
fn a_whiteout_again_removes_and_spares_as_the_first() {
    let lower = Tar::default().dir("d").dir("d/e").dir("d/e/f").file("d/e/f/low", b"1").file("d/e/low", b"1");
    // The directory e is a lower layer's and stays for what it holds; f goes.
    let upper = Tar::default()
        .file("d/e/up", b"2")
        .file("d/e/.wh..wh..opq", b"")
        .hardlink("d/e/linked", "keep")
        .file("d/.wh.e", b"")
        .file("d/.wh..wh..opq", b"")
        .file("d/.wh..wh..opq", b"")
        .dir("d/e/f")
        .file("d/.wh.e", b"")
        .file(".wh.d", b"");
    unpack(&[lower.clone().file("keep", b"1"), upper], |root| {
        assert_eq!(names(&root.join("d")), ["e"]);
        assert_eq!(names(&root.join("d/e")), ["f", "linked", "up"]);
        assert_eq!(names(&root.join("d/e/f")).len(), 0);
    });
    // The next layer begins anew.
    let again = Tar::default().file("d/e/up", b"2").file("d/.wh..wh..opq", b"");
    let last = Tar::default().file("d/.wh..wh..opq", b"");
    unpack(&[lower, again, last], |root| assert_eq!(names(&root.join("d")).len(), 0));
}

#[test]
fn names_for_files_of_lower_layers_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut record = Record::default();
    let stat = rustix::fs::stat(dir.path()).unwrap();
    assert!((0..MOST_LINKS).all(|i| record.link(&stat, 1, &i.to_le_bytes())));
    assert!(!record.link(&stat, 1, b"one more") && record.link(&stat, 1, &7usize.to_le_bytes()));
    record.forget(1, &7usize.to_le_bytes());
    assert!(!record.has(&stat, 1, &7usize.to_le_bytes()) && record.link(&stat, 1, b"one more"));
}

#[test]
fn entries_replace_what_is_there() {
    let lower = Tar::default().dir("d").file("d/x", b"1").symlink("l", "d").file("f", b"1");
    let upper =
        Tar::default().file("d", b"now a file").dir("l").file("l/y", b"2").dir("f").hardlink("h", "d");
    unpack(&[lower.clone(), upper], |root| {
        assert_eq!(fs::read(root.join("d")).unwrap(), b"now a file");
        assert!(fs::symlink_metadata(root.join("l")).unwrap().is_dir());
        assert_eq!(names(&root.join("f")).len(), 0);
    });
    // Through a link of a lower layer, absolute or relative, inside the tree.
    let upper = Tar::default()
        .file("l/z", b"2")
        .symlink("m", "/d")
        .file("m/w", b"2")
        .hardlink("self", "f")
        .hardlink("f", "self");
    unpack(&[lower, upper], |root| assert_eq!(names(&root.join("d")), ["w", "x", "z"]));
}

#[test]
fn directories_keep_their_times() {
    let tar = Tar::default().dir("d").file("d/x", b"1").dir("d/e").file("d/e/y", b"1").file("top", b"");
    let later = Tar::default().file("d/later", b"").file("d/e/.wh.y", b"");
    unpack(&[tar, later], |root| {
        for path in ["d", "d/e"] {
            assert_eq!(fs::metadata(root.join(path)).unwrap().mtime(), 1_700_000_000, "{path}");
        }
        assert_eq!(fs::metadata(root.join("d")).unwrap().permissions().mode() & 0o7777, 0o755);
    });
}

#[test]
fn budget_counts_inodes_and_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let root = fs::File::open(dir.path()).unwrap();
    let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget: 10 << 10 });
    let tar = (0..4).fold(Tar::default(), |tar, i| tar.file(&i.to_string(), b"x")).end();
    assert!(matches!(unpacker.layer(&mut Archive::new(tar.as_slice())), Err(UnpackError::Budget(10240))));
}

#[test]
fn a_layers_cost_is_what_unpacking_it_takes_of_the_budget() {
    let attribute = ("SCHILY.xattr.user.a", &b"value"[..]);
    let tar = Tar::default()
        .dir("d")
        .file("d/a", &[b'x'; 5000])
        .pax(&[attribute])
        .file("b", b"1")
        .symlink("l", "b");
    let tar = tar.hardlink("h", "b").file("d/.wh.c", b"").end();
    let cost = cost(&mut Archive::new(tar.as_slice())).unwrap();
    // Five inodes, three blocks, one attribute.
    assert_eq!(cost, 5 * 1024 + 3 * 4096 + 6 + 5 + 64);
    for (budget, fits) in [(cost, true), (cost - 1, false)] {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::File::open(dir.path()).unwrap();
        let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget });
        assert_eq!(unpacker.layer(&mut Archive::new(tar.as_slice())).is_ok(), fits);
    }
}

/// Layer of one file with these pieces, and what it costs besides its inode.
fn sparse_cost(pieces: &[(u64, u64)]) -> u64 {
    let map: Vec<String> = pieces.iter().map(|(at, length)| format!("{at},{length}")).collect();
    let data = vec![1; pieces.iter().map(|(_, length)| *length as usize).sum()];
    let records = [("GNU.sparse.map", map.join(",")), ("GNU.sparse.size", (1u64 << 30).to_string())];
    let records: Vec<_> = records.iter().map(|(key, value)| (*key, value.as_bytes())).collect();
    let tar = Tar::default().pax(&records).file("a", &data).end();
    let cost = cost(&mut Archive::new(tar.as_slice())).unwrap();
    for (budget, fits) in [(cost, true), (cost - 1, false)] {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::File::open(dir.path()).unwrap();
        let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget });
        assert_eq!(unpacker.layer(&mut Archive::new(tar.as_slice())).is_ok(), fits, "{pieces:?}");
    }
    cost - 1024
}

#[test]
fn pieces_of_a_sparse_file_cost_the_blocks_that_they_lie_in() {
    // A byte in each block, as a layer that would take 4096 times what it brings.
    let scattered: Vec<_> = (0..1000).map(|i| (i * 4096, 1)).collect();
    assert_eq!(sparse_cost(&scattered), 1000 * 4096);
    // Two blocks for two bytes; several pieces in one block; none.
    assert_eq!(sparse_cost(&[(4095, 2)]), 2 * 4096);
    assert_eq!(sparse_cost(&[(0, 1), (10, 1), (4000, 200), (8191, 1), (8192, 1)]), 3 * 4096);
    assert_eq!(sparse_cost(&[(5000, 0), (1 << 30, 0)]), 0);
    assert_eq!(sparse_cost(&[(4096, 8192), (1 << 20, 4096)]), 3 * 4096);
}

#[test]
fn a_long_target_of_a_link_costs_a_block() {
    let of = |length: usize| {
        let target = "x".repeat(length);
        let tar = Tar::default().pax(&[("linkpath", target.as_bytes())]).symlink("l", "t").end();
        cost(&mut Archive::new(tar.as_slice())).unwrap()
    };
    // tmpfs keeps up to 128 bytes, the last of them NUL, beside the inode.
    assert_eq!((of(127), of(128)), (1024, 1024 + 4096));
}

#[test]
fn attributes_are_counted_as_what_they_take() {
    let dir = tempfile::tempdir().unwrap();
    let root = fs::File::open(dir.path()).unwrap();
    let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget: 6 << 10 });
    let large = ("SCHILY.xattr.user.a", &[b'x'; 3 << 10][..]);
    let tar = Tar::default().pax(&[large]).file("a", b"").pax(&[large]).file("b", b"").end();
    assert!(matches!(unpacker.layer(&mut Archive::new(tar.as_slice())), Err(UnpackError::Budget(_))));
}

#[test]
fn a_whiteouts_size_beyond_all_numbers_is_short() {
    let dir = tempfile::tempdir().unwrap();
    let root = fs::File::open(dir.path()).unwrap();
    let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget: 1 << 20 });
    let size = ("size", &b"18446744073709551615"[..]);
    let tar = Tar::default().pax(&[size]).file(".wh.a", b"").file("b", b"x").end();
    let refused = unpacker.layer(&mut Archive::new(tar.as_slice()));
    assert!(matches!(refused, Err(UnpackError::Tar(TarError::Short(_)))), "{refused:?}");
}

#[test]
fn deep_trees_are_refused_not_recursed_into() {
    let deep = "d/".repeat(600);
    let dir = tempfile::tempdir().unwrap();
    let root = fs::File::open(dir.path()).unwrap();
    let mut unpacker = Unpacker::new(root.into(), Options { privileged: false, budget: 1 << 30 });
    let tar = Tar::default().pax(&[("path", deep.as_bytes())]).dir("x").end();
    assert!(matches!(unpacker.layer(&mut Archive::new(tar.as_slice())), Err(UnpackError::Path(..))));
}
