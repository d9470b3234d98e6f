//! What programs in a container expect of a file system, and what the host sees of it.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
};

use fuse_backend_rs::abi::fuse_abi::{
    EntryOut, FallocateIn, FsyncIn, Kstatfs, LseekIn, LseekOut, MknodIn, Opcode, OpenIn, OpenOut, OutHeader,
    ReadIn, ReleaseIn, Rename2In, SetattrIn, WriteIn,
};
use vm_memory::ByteValued;

use super::client::{Client, ROOT, c, host_attribute, object, write_host};

const RDWR: i32 = libc::O_RDWR;

#[test]
fn init_agrees_on_large_transfers_and_host_visible_caching() {
    let out = Client::unmounted().init();
    assert_eq!((out.major, out.max_write, out.max_pages), (7, 1 << 20, 256));
    let posix_locks_and_flock = 1 << 1 | 1 << 10;
    let writeback = 1 << 16;
    let submounts = 1 << 27;
    let auto_invalidate = 1 << 12;
    let direct_in_parallel = 1 << 15;
    assert_eq!(out.flags & (posix_locks_and_flock | writeback | direct_in_parallel), 0);
    assert_ne!(out.flags & submounts, 0);
    assert_ne!(out.flags & auto_invalidate, 0);
}

#[test]
fn what_the_guest_writes_is_on_the_host_and_the_other_way_round() {
    let mut client = Client::new();
    let (entry, fh) = client.create(ROOT, "a", RDWR, 0o640).unwrap();
    assert_eq!(client.write(entry.nodeid, fh, 0, b"hello", RDWR), Ok(5));
    assert_eq!(fs::read(client.host("a")).unwrap(), b"hello");
    assert_eq!(fs::metadata(client.host("a")).unwrap().permissions().mode() & 0o7777, 0o640);
    write_host(&client.host("a"), "HELLO, guest");
    assert_eq!(client.read(entry.nodeid, fh, 0, 4096).unwrap(), b"HELLO, guest");
    assert_eq!(client.attributes(entry.nodeid).size, 12);
    assert_eq!(entry.entry_valid, 1);
}

#[test]
fn a_mebibyte_goes_through_in_one_request() {
    let mut client = Client::new();
    let (entry, fh) = client.create(ROOT, "big", RDWR, 0o600).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 7) as u8).collect();
    assert_eq!(client.write(entry.nodeid, fh, 0, &data, RDWR), Ok(1 << 20));
    assert_eq!(client.read(entry.nodeid, fh, 0, 1 << 20).unwrap(), data);
}

#[test]
fn files_belong_to_the_user_who_made_them_whatever_the_directory_says() {
    let mut client = Client::new();
    fs::create_dir(client.host("closed")).unwrap();
    fs::set_permissions(client.host("closed"), fs::Permissions::from_mode(0o770)).unwrap();
    let directory = client.lookup(ROOT, "closed").unwrap().nodeid;
    // The guest let this user in by a supplementary group, of which the request says nothing.
    client.user = (1000, 1001);
    client.create(directory, "mine", RDWR, 0o600).unwrap();
    client.call(Opcode::Mkdir, directory, &[&0o755u64.to_le_bytes()[..], &c("sub")].concat()).unwrap();
    for name in ["closed/mine", "closed/sub"] {
        let meta = fs::metadata(client.host(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1000, 1001), "{name}");
    }
    client.user = (0, 0);
    client.create(directory, "roots", RDWR, 0o600).unwrap();
    assert_eq!(fs::metadata(client.host("closed/roots")).unwrap().uid(), 0);
}

#[test]
fn readdirplus_lists_every_entry_once_with_its_node() {
    let mut client = Client::new();
    for i in 0..300 {
        write_host(&client.host(&format!("file-{i}")), "");
    }
    let open = OpenIn { flags: libc::O_DIRECTORY as u32, fuse_flags: 0 };
    let fh = object::<OpenOut>(&client.call(Opcode::Opendir, ROOT, open.as_slice()).unwrap()).fh;
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let read = ReadIn { fh, offset, size: 4096, ..ReadIn::default() };
        let body = client.call(Opcode::Readdirplus, ROOT, read.as_slice()).unwrap();
        let mut rest = &body[..];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let entry: EntryOut = object(rest);
            let dirent = &rest[size_of::<EntryOut>()..];
            offset = u64::from_le_bytes(dirent[8..16].try_into().unwrap());
            let length = u32::from_le_bytes(dirent[16..20].try_into().unwrap()) as usize;
            let name = std::str::from_utf8(&dirent[24..24 + length]).unwrap().to_owned();
            assert_ne!(entry.nodeid, 0);
            client.forget(entry.nodeid, 1);
            names.push(name);
            rest = &rest[size_of::<EntryOut>() + (24 + length).next_multiple_of(8)..];
        }
    }
    names.sort();
    let mut expected: Vec<_> = (0..300).map(|i| format!("file-{i}")).collect();
    expected.sort();
    assert_eq!(names, expected);
}

#[test]
fn rename_replaces_refuses_and_exchanges_as_asked() {
    let mut client = Client::new();
    write_host(&client.host("a"), "a");
    write_host(&client.host("b"), "b");
    let mut rename = |flags| {
        let header = Rename2In { newdir: ROOT, flags, padding: 0 };
        client.call(Opcode::Rename2, ROOT, &[header.as_slice(), &c("a"), &c("b")].concat())
    };
    assert_eq!(rename(libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    assert!(rename(libc::RENAME_EXCHANGE).is_ok());
    assert!(rename(0).is_ok());
    assert_eq!(fs::read(client.host("b")).unwrap(), b"b");
    assert!(!client.host("a").exists());
}

#[test]
fn an_unlinked_open_file_can_be_written_truncated_synced_and_read() {
    let mut client = Client::new();
    let (entry, fh) = client.create(ROOT, "gone", RDWR, 0o600).unwrap();
    client.call(Opcode::Unlink, ROOT, &c("gone")).unwrap();
    assert!(!client.host("gone").exists());
    assert_eq!(client.write(entry.nodeid, fh, 0, b"still here", RDWR), Ok(10));
    let truncate = SetattrIn { valid: 1 << 3 | 1 << 6, fh, size: 5, ..SetattrIn::default() };
    client.set_attributes(entry.nodeid, truncate).unwrap();
    let sync = FsyncIn { fh, fsync_flags: 1, padding: 0 };
    client.call(Opcode::Fsync, entry.nodeid, sync.as_slice()).unwrap();
    assert_eq!(client.read(entry.nodeid, fh, 0, 100).unwrap(), b"still");
    let release = ReleaseIn { fh, ..ReleaseIn::default() };
    client.call(Opcode::Release, entry.nodeid, release.as_slice()).unwrap();
    assert_eq!(client.read(entry.nodeid, fh, 0, 100), Err(libc::EBADF));
}

#[test]
fn space_is_allocated_and_holes_are_found() {
    let mut client = Client::new();
    let (entry, fh) = client.create(ROOT, "sparse", RDWR, 0o600).unwrap();
    let allocate = FallocateIn { fh, offset: 0, length: 8192, mode: 0, padding: 0 };
    client.call(Opcode::Fallocate, entry.nodeid, allocate.as_slice()).unwrap();
    assert_eq!(client.attributes(entry.nodeid).size, 8192);
    let truncate = |size| SetattrIn { valid: 1 << 3, size, ..SetattrIn::default() };
    client.set_attributes(entry.nodeid, truncate(0)).unwrap();
    client.set_attributes(entry.nodeid, truncate(1 << 20)).unwrap();
    client.write(entry.nodeid, fh, 512 << 10, b"x", RDWR).unwrap();
    let seek = LseekIn { fh, offset: 0, whence: libc::SEEK_DATA as u32, padding: 0 };
    let found: LseekOut = object(&client.call(Opcode::Lseek, entry.nodeid, seek.as_slice()).unwrap());
    assert_eq!(found.offset, 512 << 10);
    let statfs: Kstatfs = object(&client.call(Opcode::Statfs, ROOT, &[]).unwrap());
    assert!(statfs.blocks > 0 && statfs.namelen == 255);
}

#[test]
fn fifos_and_sockets_can_be_made_but_no_devices() {
    let mut client = Client::new();
    let mut make = |name: &str, mode: u32, rdev: u32| {
        let header = MknodIn { mode: mode | 0o600, rdev, umask: 0, padding: 0 };
        client.call(Opcode::Mknod, ROOT, &[header.as_slice(), &c(name)].concat()).map(drop)
    };
    assert_eq!(make("fifo", libc::S_IFIFO, 0), Ok(()));
    assert_eq!(make("socket", libc::S_IFSOCK, 0), Ok(()));
    assert_eq!(make("null", libc::S_IFCHR, 0x103), Err(libc::EPERM));
    assert_eq!(make("disk", libc::S_IFBLK, 0x800), Err(libc::EPERM));
    assert_eq!(make("disk0", libc::S_IFBLK, 0), Err(libc::EPERM));
    assert!(fs::metadata(client.host("fifo")).unwrap().file_type().is_fifo());
    assert!(fs::metadata(client.host("socket")).unwrap().file_type().is_socket());
    // The host never opens a fifo: it would block a thread for ever.
    let fifo = client.lookup(ROOT, "fifo").unwrap().nodeid;
    assert_eq!(client.open(fifo, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn appends_go_to_the_end_that_the_host_sees_and_written_back_pages_to_their_place() {
    let mut client = Client::new();
    let append = libc::O_WRONLY | libc::O_APPEND;
    let (entry, fh) = client.create(ROOT, "log", append, 0o600).unwrap();
    client.write(entry.nodeid, fh, 0, b"one ", append).unwrap();
    write_host(&client.host("log"), "one HOST ");
    client.write(entry.nodeid, fh, 4, b"two", append).unwrap();
    assert_eq!(fs::read(client.host("log")).unwrap(), b"one HOST two");
    // WRITE_CACHE: pages of a shared mapping, for which Linux sends no file flags.
    let pages = WriteIn { fh, offset: 0, fuse_flags: 1, ..WriteIn::default() };
    client.write_with(entry.nodeid, pages, b"ONE").unwrap();
    client.write_with(entry.nodeid, WriteIn { flags: append as u32, ..pages }, b"Uno").unwrap();
    assert_eq!(fs::read(client.host("log")).unwrap(), b"Uno HOST two");
}

#[test]
fn an_append_after_the_host_emptied_the_file_leaves_no_hole() {
    let mut client = Client::new();
    let append = libc::O_RDWR | libc::O_APPEND;
    let (entry, fh) = client.create(ROOT, "log", append, 0o600).unwrap();
    client.write(entry.nodeid, fh, 0, b"before rotation", append).unwrap();
    write_host(&client.host("log"), "");
    // The guest still takes the file for as long as it was, and sends that as the offset.
    client.write(entry.nodeid, fh, 15, b"after", append).unwrap();
    assert_eq!(fs::read(client.host("log")).unwrap(), b"after");
    // A read over the same handle in between takes nothing from the next append.
    assert_eq!(client.read(entry.nodeid, fh, 0, 100).unwrap(), b"after");
    client.write(entry.nodeid, fh, 20, b" all", append).unwrap();
    assert_eq!(fs::read(client.host("log")).unwrap(), b"after all");
}

#[test]
fn two_pods_that_append_to_one_file_lose_nothing() {
    const EACH: usize = 2000;
    let append = libc::O_WRONLY | libc::O_APPEND;
    let mut one = Client::new();
    let mut other = one.beside();
    let (entry, fh) = one.create(ROOT, "log", append, 0o600).unwrap();
    let node = other.lookup(ROOT, "log").unwrap().nodeid;
    let theirs = other.open(node, append).unwrap();
    // In turns: neither knows what the other has written.
    for (text, offset) in [("a1\n", 0), ("a2\n", 3)] {
        one.write(entry.nodeid, fh, offset, text.as_bytes(), append).unwrap();
        other.write(node, theirs, offset, text.replace('a', "b").as_bytes(), append).unwrap();
    }
    assert_eq!(fs::read(one.host("log")).unwrap(), b"a1\nb1\na2\nb2\n");
    // And at once.
    std::thread::scope(|threads| {
        threads.spawn(|| {
            (0..EACH).for_each(|_| assert_eq!(other.write(node, theirs, 6, b"theirs\n", append), Ok(7)))
        });
        (0..EACH).for_each(|_| assert_eq!(one.write(entry.nodeid, fh, 6, b"ours..\n", append), Ok(7)));
    });
    let text = fs::read_to_string(one.host("log")).unwrap();
    let count = |line| text.lines().filter(|l| *l == line).count();
    assert_eq!((count("ours.."), count("theirs")), (EACH, EACH));
}

#[test]
fn appends_reads_and_written_back_pages_over_one_handle_do_not_mix() {
    const ROUNDS: usize = 500;
    const AT_ONCE: usize = 16;
    let mut client = Client::new();
    let append = libc::O_RDWR | libc::O_APPEND;
    let (entry, fh) = client.create(ROOT, "log", append, 0o600).unwrap();
    client.write(entry.nodeid, fh, 0, b"begin\n", append).unwrap();
    let flags = append as u32;
    let mut request = |opcode: Opcode, header: &[u8], data: &[u8]| {
        client.request(opcode as u32, entry.nodeid, &[header, data].concat())
    };
    let line = WriteIn { fh, offset: 6, size: 6, flags, ..WriteIn::default() };
    // WRITE_CACHE.
    let page = WriteIn { fh, offset: 0, size: 6, fuse_flags: 1, ..WriteIn::default() };
    let together = [
        request(Opcode::Write, line.as_slice(), b"added\n"),
        request(Opcode::Write, page.as_slice(), b"BEGIN\n"),
        request(Opcode::Read, ReadIn { fh, size: 64, flags, ..ReadIn::default() }.as_slice(), &[]),
    ];
    let together = vec![together; AT_ONCE].concat();
    for _ in 0..ROUNDS {
        client.send_together(&together);
    }
    let text = fs::read_to_string(client.host("log")).unwrap();
    let wanted = format!("BEGIN\n{}", "added\n".repeat(ROUNDS * AT_ONCE));
    assert!(text == wanted, "{} bytes in place of {}", text.len(), wanted.len());
}

#[test]
fn sync_reaches_the_hosts_disk_and_says_so() {
    const SYNCFS: u32 = 50;
    let mut client = Client::new();
    fs::create_dir(client.host("d")).unwrap();
    write_host(&client.host("f"), "x");
    let nodes = ["d", "f"].map(|name| client.lookup(ROOT, name).unwrap().nodeid);
    let mut sync = |node: u64| {
        let request = client.request(SYNCFS, node, &[0; 8]);
        let answer = client.send(1, &request, 16);
        let header: OutHeader = object(&answer);
        assert_eq!((header.len, header.unique), (16, u64::from_le_bytes(request[8..16].try_into().unwrap())));
        -header.error
    };
    assert_eq!(sync(ROOT), 0);
    assert_eq!(sync(nodes[0]), 0);
    // A file system's root is a directory, and only of such a one is this asked.
    assert_eq!(sync(nodes[1]), libc::ENOTDIR);
    assert_eq!(sync(12345), libc::EBADF);
}

#[test]
fn user_attributes_pass_and_those_of_the_hosts_kernel_do_not() {
    let mut client = Client::new();
    write_host(&client.host("f"), "");
    let node = client.lookup(ROOT, "f").unwrap().nodeid;
    let mut set = |name: &str, value: &[u8]| {
        let header = [(value.len() as u32).to_le_bytes(), 0u32.to_le_bytes()].concat();
        client.call(Opcode::Setxattr, node, &[&header[..], &c(name), value].concat()).map(drop)
    };
    assert_eq!(set("user.colour", b"blue"), Ok(()));
    assert_eq!(set("trusted.overlay.redirect", b"/etc"), Err(libc::EOPNOTSUPP));
    assert_eq!(set("security.selinux", b"x"), Err(libc::EOPNOTSUPP));
    assert_eq!(host_attribute(&client.host("f"), "user.colour").unwrap(), b"blue");
    let get = |size: u32| [&size.to_le_bytes()[..], &[0; 4], &c("user.colour")].concat();
    // A size beyond all sense is as good as the largest sensible one.
    assert_eq!(client.call(Opcode::Getxattr, node, &get(u32::MAX)).unwrap(), b"blue");
    assert_eq!(client.call(Opcode::Getxattr, node, &get(2)), Err(libc::ERANGE));
    assert_eq!(client.call(Opcode::Getxattr, node, &get(0)).unwrap()[..4], 4u32.to_le_bytes());
}

#[test]
fn set_id_bits_go_when_the_guest_says_that_a_write_must_drop_them() {
    let mut client = Client::new();
    let (entry, fh) = client.create(ROOT, "tool", RDWR, 0o755).unwrap();
    fs::set_permissions(client.host("tool"), fs::Permissions::from_mode(0o6755)).unwrap();
    let kill_privileges = 1 << 2;
    let header = WriteIn { fh, flags: RDWR as u32, fuse_flags: kill_privileges, ..WriteIn::default() };
    client.write_with(entry.nodeid, header, b"#!").unwrap();
    assert_eq!(fs::metadata(client.host("tool")).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[test]
fn a_symbolic_link_is_the_guests_to_follow() {
    let mut client = Client::new();
    let outside = tempfile::NamedTempFile::new().unwrap();
    write_host(outside.path(), "secret");
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o600)).unwrap();
    symlink(outside.path(), client.host("link")).unwrap();
    let node = client.lookup(ROOT, "link").unwrap().nodeid;
    assert_eq!(
        client.call(Opcode::Readlink, node, &[]).unwrap(),
        outside.path().to_str().unwrap().as_bytes()
    );
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::EBADF));
    assert_eq!(client.lookup(node, "x").err(), Some(libc::ENOTDIR));
    let chmod = SetattrIn { valid: 1, mode: 0o777, ..SetattrIn::default() };
    let _ = client.set_attributes(node, chmod);
    let chown = SetattrIn { valid: 1 << 1 | 1 << 2, uid: 1000, gid: 1000, ..SetattrIn::default() };
    let _ = client.set_attributes(node, chown);
    let touch = SetattrIn { valid: 1 << 5, mtime: 1, ..SetattrIn::default() };
    let _ = client.set_attributes(node, touch);
    let truncate = SetattrIn { valid: 1 << 3, size: 0, ..SetattrIn::default() };
    assert!(client.set_attributes(node, truncate).is_err());
    let meta = fs::metadata(outside.path()).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, meta.uid(), meta.len()), (0o600, 0, 6));
    assert_ne!(meta.mtime(), 1);
    // Creating through it fails like on the host.
    assert_eq!(client.create(ROOT, "link", RDWR | libc::O_CREAT, 0o600).err(), Some(libc::EBADF));
}

#[test]
fn a_forgotten_node_is_gone_and_the_root_is_not() {
    let mut client = Client::new();
    write_host(&client.host("f"), "x");
    let node = client.lookup(ROOT, "f").unwrap().nodeid;
    client.forget(node, 1);
    client.forget(ROOT, u64::MAX);
    client.forget(12345, 1);
    assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::EBADF));
    assert_eq!(client.lookup(ROOT, "f").map(|entry| entry.attr.size), Ok(1));
}

#[test]
fn a_rebooted_guest_starts_with_nothing_open() {
    let mut client = Client::new();
    let (entry, fh) = client.create(ROOT, "f", RDWR, 0o600).unwrap();
    client.restart();
    assert_eq!(client.lookup(ROOT, "f").err(), Some(libc::EBADF), "nothing before INIT");
    client.init();
    assert_eq!(client.read(entry.nodeid, fh, 0, 1), Err(libc::EBADF));
    assert!(client.lookup(ROOT, "f").is_ok());
}

#[test]
fn a_mount_that_appears_later_is_seen_and_marked_as_a_file_system_of_its_own() {
    use std::os::unix::ffi::OsStrExt;
    let mut client = Client::new();
    fs::create_dir_all(client.host("c1/rootfs")).unwrap();
    let plain = client.walk("c1/rootfs").unwrap();
    assert_eq!(plain.attr.flags & 1, 0);
    let target = std::ffi::CString::new(client.host("c1/rootfs").as_os_str().as_bytes()).unwrap();
    let mounted =
        // SAFETY: all arguments are strings that end in NUL, or null.
        unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    assert_eq!(mounted, 0, "this test needs the right to mount: {}", std::io::Error::last_os_error());
    write_host(&client.host("c1/rootfs/inside"), "x");
    let mount = client.walk("c1/rootfs");
    let inside = client.walk("c1/rootfs/inside");
    // SAFETY: as above.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    let mount = mount.unwrap();
    assert_eq!(mount.attr.flags & 1, 1);
    assert_ne!(mount.nodeid, plain.nodeid);
    assert!(inside.is_ok());
}

#[test]
fn pages_are_kept_over_an_open_only_if_nobody_changed_the_file() {
    let mut client = Client::new();
    write_host(&client.host("f"), "x");
    let node = client.lookup(ROOT, "f").unwrap().nodeid;
    let path = client.host("f");
    let mut keeps = || {
        let open = OpenIn { flags: RDWR as u32, fuse_flags: 0 };
        let out: OpenOut = object(&client.call(Opcode::Open, node, open.as_slice()).unwrap());
        out.open_flags & 2 != 0
    };
    assert!(!keeps());
    assert!(!keeps(), "it changed this very second");
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert!(!keeps());
    assert!(keeps());
    write_host(&path, "y");
    assert!(!keeps());
}
