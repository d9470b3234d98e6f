//! A guest that sends what no Linux sends.

use std::{fs, os::unix::fs::symlink, time::Duration};

use fuse_backend_rs::abi::fuse_abi::{GetattrIn, Opcode, ReadIn};
use proptest::prelude::*;
use vm_memory::ByteValued;

use super::client::{Client, ROOT, c, write_host};
use crate::devices::virtio::test_driver::{BUFFERS, Descriptor, Driver, INDIRECT, MEMORY, WRITE};

#[test]
fn names_lead_nowhere_but_to_the_directorys_own_entries() {
    let mut client = Client::new();
    fs::create_dir_all(client.host("d/e")).unwrap();
    let d = client.lookup(ROOT, "d").unwrap().nodeid;
    let e = client.lookup(d, "e").unwrap().nodeid;
    for node in [ROOT, d, e] {
        for name in ["..", ".", "../..", "d/e", "/etc/passwd", "/", "e/../../.."] {
            let answer = client.lookup(node, name).err();
            assert_eq!(answer, Some(libc::EINVAL), "lookup {name} in {node}");
            assert_eq!(
                client.create(node, name, libc::O_RDWR, 0o600).err(),
                Some(libc::EINVAL),
                "create {name}"
            );
            for opcode in [Opcode::Unlink, Opcode::Rmdir] {
                assert_eq!(client.call(opcode, node, &c(name)), Err(libc::EINVAL), "{name}");
            }
        }
        assert!(client.lookup(node, "").is_err());
    }
}

#[test]
fn no_open_flag_makes_the_host_follow_a_link_or_hand_out_a_path_descriptor() {
    let mut client = Client::new();
    symlink("/etc/passwd", client.host("link")).unwrap();
    fs::create_dir(client.host("d")).unwrap();
    let o_tmpfile = 0o20_000_000;
    for flags in [libc::O_PATH, libc::O_PATH | libc::O_CREAT, o_tmpfile | libc::O_RDWR, libc::O_ASYNC] {
        if let Ok((entry, fh)) = client.create(ROOT, "link", flags, 0o600) {
            let read = GetattrIn { flags: 1, dummy: 0, fh };
            assert!(client.call(Opcode::Getattr, entry.nodeid, read.as_slice()).is_err(), "flags {flags:o}");
        }
    }
    write_host(&client.host("f"), "x");
    let node = client.lookup(ROOT, "f").unwrap().nodeid;
    assert_eq!(client.open(node, libc::O_ACCMODE), Err(libc::EINVAL));
    let fh = client.open(node, libc::O_PATH | libc::O_DIRECT | libc::O_CREAT | libc::O_EXCL).unwrap();
    // O_DIRECT would refuse a read of one byte into an unaligned buffer.
    let read = ReadIn { fh, offset: 0, size: 1, flags: libc::O_DIRECT as u32, ..ReadIn::default() };
    assert_eq!(client.call(Opcode::Read, node, read.as_slice()).unwrap(), b"x");
}

#[test]
fn a_message_that_cannot_be_parsed_is_answered() {
    let mut client = Client::new();
    // No NUL after the name.
    assert_eq!(client.call(Opcode::Lookup, ROOT, b"abc"), Err(libc::EINVAL));
    // Shorter than its fixed part.
    assert_eq!(client.call(Opcode::Write, ROOT, &[0; 3]), Err(libc::EINVAL));
    // The length in the header says more than there is.
    let mut request = client.request(Opcode::Mkdir as u32, ROOT, &[0; 8]);
    request[..4].copy_from_slice(&0xffff_u32.to_le_bytes());
    assert_eq!(client.send(1, &request, 64).len(), 16);
    // An operation that does not exist.
    let request = client.request(4000, ROOT, &[]);
    assert_eq!(client.send(1, &request, 64).len(), 16);
}

#[test]
fn messages_beyond_what_init_granted_are_refused_before_memory_is_taken() {
    let mut client = Client::new();
    let request = client.request(
        Opcode::Readdir as u32,
        ROOT,
        ReadIn { size: u32::MAX, ..ReadIn::default() }.as_slice(),
    );
    let driver = client.driver();
    driver.write(BUFFERS, &request);
    // One gigabyte of answer: the same descriptor's memory many times.
    let writable: Vec<_> = (0..128).map(|_| (BUFFERS + 4096, 8 << 20)).collect();
    driver.chain(1, 0, &[(BUFFERS, request.len() as u32)], &writable);
    driver.offer(1, 0);
    assert_eq!(driver.wait_used(1).1, 16);
}

#[test]
fn impossible_rings_silence_the_queue_and_nothing_else() {
    let mut client = Client::new();
    client.driver().set_available_index(1, 0x7fff);
    client.driver().kicks[1].write(1).unwrap();
    assert!(client.driver().wait_used_for(1, Duration::from_millis(100)).is_none());
    client.forget(ROOT, 1);
    client.restart();
    client.init();
    assert!(client.lookup(ROOT, "nothing").is_err());
}

fn opcode() -> impl Strategy<Value = u32> {
    prop_oneof![20 => 1u32..55, 1 => Just(4096u32), 1 => any::<u32>()]
}

/// Numbers that a server may trip over, and those that mean something to it.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..6,
        1 => Just(u64::MAX),
        1 => Just(u64::from(u32::MAX)),
        1 => Just(1 << 63),
        1 => any::<u64>(),
        1 => (0u64..64).prop_map(|bit| 1 << bit),
    ]
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::collection::vec(word(), 0..12)
        .prop_map(|words| words.iter().flat_map(|w| w.to_le_bytes()).collect());
    let names =
        prop::sample::select(vec!["f\0", "d\0", "..\0", "f\0g\0", "\0", "d/f\0", "user.x\0y", "link\0", "f"]);
    (words, prop::option::of(names), prop::collection::vec(any::<u8>(), 0..40)).prop_map(
        |(words, name, noise): (Vec<u8>, _, _)| {
            [words, name.unwrap_or("").as_bytes().to_vec(), noise].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// A panic in the FUSE library fails this test: the request stays without an answer, and joining the thread tells.
    #[test]
    fn random_requests_get_an_answer_that_fits(
        requests in prop::collection::vec((opcode(), 0u64..6, body(), prop::option::of(any::<u32>()), 16u32..9000), 1..20),
    ) {
        let mut client = Client::new();
        write_host(&client.host("f"), "content");
        fs::create_dir(client.host("d")).unwrap();
        symlink("/etc/passwd", client.host("link")).unwrap();
        for name in ["f", "d", "link"] {
            client.lookup(ROOT, name).unwrap();
        }
        for (opcode, node, body, length, answer) in requests {
            let mut request = client.request(opcode, node, &body);
            if let Some(length) = length {
                request[..4].copy_from_slice(&length.to_le_bytes());
            }
            let bytes = client.send((opcode == 2) as usize ^ 1, &request, answer);
            if !bytes.is_empty() {
                prop_assert_eq!(u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize, bytes.len());
            }
        }
        // Still alive and well.
        prop_assert!(!client.init().as_slice().is_empty());
        prop_assert!(client.call(Opcode::Statfs, ROOT, &[]).is_ok());
    }

    /// Bytes outside the writable buffers stay as they are, wherever descriptors point.
    #[test]
    fn random_chains_write_nothing_but_their_writable_buffers(
        table in prop::collection::vec(
            (prop_oneof![0..MEMORY, Just(u64::MAX), Just(MEMORY - 8)], prop_oneof![0u32..5000, any::<u32>()], 0u16..8, 0u16..16),
            16,
        ),
        heads in prop::collection::vec(prop_oneof![0u16..16, any::<u16>()], 1..16),
        request in body(),
        code in opcode(),
    ) {
        let mut client = Client::new();
        let message = client.request(code, ROOT, &request);
        let driver = client.driver();
        // A canary that no descriptor may name as writable: what points there becomes readable.
        let canary = MEMORY - 0x10000;
        driver.write(canary, &[0x5a; 0x10000]);
        driver.write(BUFFERS, &message);
        for (index, &(address, length, flags, next)) in table.iter().enumerate() {
            let inside = address >= BUFFERS && address.saturating_add(u64::from(length)) <= canary;
            let flags = if inside { flags } else { flags & !(WRITE | INDIRECT) };
            let address = if index % 4 == 0 { BUFFERS } else { address };
            let flags = if index % 4 == 0 { flags & !(WRITE | INDIRECT) } else { flags };
            driver.write_descriptor(Driver::table(1), index as u16, Descriptor { address, length, flags, next });
        }
        let count = heads.len();
        for head in heads {
            driver.put_available(1, head);
        }
        driver.publish(1);
        for _ in 0..count {
            // A head beyond the table ends the queue.
            if driver.wait_used_for(1, Duration::from_millis(30)).is_none() {
                break;
            }
        }
        prop_assert_eq!(client.driver().read(canary, 0x10000), vec![0x5a; 0x10000]);
    }
}
