//! Packets through the device's queues: over a tap in a network namespace of the test's own, and over a socket.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proptest::prelude::*;

use super::{Net, open_tap};
use crate::devices::virtio::{
    VirtioDevice,
    test_driver::{BUFFERS, Descriptor, Driver, INDIRECT, MEMORY, WRITE},
};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;
const MERGEABLE: u64 = 1 << 15;
/// An EtherType for experiments: the host's own chatter on a fresh interface has others.
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// Tests run one at a time, so that a thread named `net` is this test's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The two ends of a link that keeps packets apart.
fn link() -> (UnixDatagram, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors, which are then owned by exactly one object each.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, ends.as_mut_ptr()), 0);
        let outside = UnixDatagram::from_raw_fd(ends[0]);
        outside.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (outside, OwnedFd::from_raw_fd(ends[1]))
    }
}

fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[12..14].copy_from_slice(&ETHER_TYPE);
    frame
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame].concat()
}

fn start(features: u64) -> (UnixDatagram, Net, Driver) {
    let (outside, inside) = link();
    let mut net = Net::on_socket(inside, MAC);
    let features = net.features() & !MERGEABLE | features;
    let driver = Driver::new(&mut net, features);
    (outside, net, driver)
}

/// Offers `count` receive buffers of `length` bytes; buffer `n` is chain `n`.
fn offer_buffers(driver: &mut Driver, first: u16, count: u16, length: u32) {
    for n in first..first + count {
        driver.chain(RX, n, &[], &[(buffer(n), length)]);
        driver.put_available(RX, n);
    }
    driver.publish(RX);
}

fn buffer(n: u16) -> u64 {
    BUFFERS + u64::from(n) * 0x8000
}

#[test]
fn the_configuration_space_has_the_address_and_nothing_beyond_its_end() {
    let _alone = alone();
    let net = Net::on_socket(link().1, MAC);
    let mut config = [0xff; 6];
    net.read_config(0, &mut config);
    assert_eq!(config, MAC);
    let mut beyond = [0xaa; 4];
    net.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0xaa; 4]);
}

#[test]
fn what_is_no_tap_is_refused() {
    let file = OwnedFd::from(fs::File::open("/dev/null").unwrap());
    assert!(Net::new(file, MAC).err().unwrap().to_string().contains("IFF_VNET_HDR"));
    assert!(open_tap("a-name-that-is-too-long").is_err());
}

#[test]
fn a_queued_frame_leaves_with_its_header() {
    let _alone = alone();
    let (outside, mut net, mut driver) = start(0);
    let packet = with_header(&frame(100));
    driver.write(BUFFERS, &packet);
    driver.chain(TX, 0, &[(BUFFERS, 12), (BUFFERS + 12, 50), (BUFFERS + 62, 50)], &[]);
    driver.offer(TX, 0);
    assert_eq!(driver.wait_used(TX), (0, 0));
    let mut received = [0; 2000];
    let length = outside.recv(&mut received).unwrap();
    assert_eq!(received[..length], packet);
    driver.stop(&mut net);
}

#[test]
fn frames_too_short_or_too_long_or_out_of_memory_are_dropped_and_the_next_one_leaves() {
    let _alone = alone();
    let (outside, mut net, mut driver) = start(0);
    driver.write(BUFFERS, &with_header(&frame(60)));
    driver.chain(TX, 0, &[(BUFFERS, 20)], &[]);
    driver.chain(TX, 1, &[(BUFFERS, 65563)], &[]);
    driver.chain(TX, 2, &[(MEMORY - 10, 100)], &[]);
    driver.chain(TX, 3, &[], &[(BUFFERS, 100)]);
    driver.chain(TX, 4, &[(BUFFERS, 72)], &[]);
    for head in 0..5 {
        driver.offer(TX, head);
        assert_eq!(driver.wait_used(TX), (head, 0));
    }
    let mut received = [0; 2000];
    assert_eq!(outside.recv(&mut received).unwrap(), 72);
    driver.stop(&mut net);
}

#[test]
fn a_large_packet_is_spread_over_buffers_that_appear_together() {
    let _alone = alone();
    let (outside, mut net, mut driver) = start(MERGEABLE);
    let packet = with_header(&frame(60_000));
    outside.send(&packet).unwrap();
    // Too few buffers: nothing is used.
    offer_buffers(&mut driver, 0, 20, 1526);
    assert!(driver.wait_used_for(RX, Duration::from_millis(100)).is_none());
    offer_buffers(&mut driver, 20, 30, 1526);
    let mut received = Vec::new();
    let count = packet.len().div_ceil(1526);
    for n in 0..count {
        let (head, written) = driver.wait_used(RX);
        assert_eq!(usize::from(head), n);
        if n == 0 {
            assert_eq!(usize::from(driver.used_index(RX)), count, "all or none");
        }
        received.extend(driver.read(buffer(head), written as usize));
    }
    assert_eq!(u16::from_le_bytes([received[10], received[11]]), count as u16);
    assert_eq!(received[HEADER..], packet[HEADER..]);
    driver.stop(&mut net);
}

#[test]
fn without_merging_a_packet_that_does_not_fit_is_lost_and_the_buffer_is_not() {
    let _alone = alone();
    let (outside, mut net, mut driver) = start(0);
    offer_buffers(&mut driver, 0, 1, 1526);
    outside.send(&with_header(&frame(3000))).unwrap();
    outside.send(&with_header(&frame(300))).unwrap();
    assert_eq!(driver.wait_used(RX), (0, 312));
    assert_eq!(driver.read(buffer(0) + HEADER as u64, 300), frame(300));
    driver.stop(&mut net);
}

#[test]
fn without_buffers_packets_wait_and_the_thread_sleeps() {
    let _alone = alone();
    let (outside, mut net, mut driver) = start(MERGEABLE);
    for n in 0..50 {
        outside.send(&with_header(&frame(100 + n))).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    let before = ticks_of_thread("net");
    std::thread::sleep(Duration::from_millis(300));
    assert!(ticks_of_thread("net") - before <= 1, "the thread spins");
    offer_buffers(&mut driver, 0, 50, 1526);
    for n in 0..50 {
        let (head, written) = driver.wait_used(RX);
        assert_eq!(driver.read(buffer(head) + HEADER as u64, written as usize - HEADER), frame(100 + n));
    }
    driver.stop(&mut net);
}

#[test]
fn a_link_that_is_gone_stops_receiving_and_does_not_spin() {
    let _alone = alone();
    let (outside, mut net, mut driver) = start(MERGEABLE);
    drop(outside);
    std::thread::sleep(Duration::from_millis(50));
    let before = ticks_of_thread("net");
    std::thread::sleep(Duration::from_millis(300));
    assert!(ticks_of_thread("net") - before <= 1, "the thread spins");
    offer_buffers(&mut driver, 0, 1, 1526);
    driver.stop(&mut net);
}

/// Clock ticks that this process's thread `name` has used.
fn ticks_of_thread(name: &str) -> u64 {
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
            let stat = fs::read_to_string(path.join("stat")).unwrap();
            let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
            return fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    panic!("no thread {name}")
}

/// Brings the interface up and returns a raw socket on it.
fn raw_socket(interface: &str) -> fs::File {
    let mut request = [0_u8; 40];
    request[..interface.len()].copy_from_slice(interface.as_bytes());
    // SAFETY: `request` is an ifreq in size, `address` a sockaddr_ll, and the descriptor gets exactly one owner.
    unsafe {
        let protocol = u16::from_be_bytes(ETHER_TYPE).to_be();
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol));
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let socket = fs::File::from_raw_fd(fd);
        request[16..18].copy_from_slice(&(libc::IFF_UP as u16).to_ne_bytes());
        assert_eq!(libc::ioctl(fd, libc::SIOCSIFFLAGS, request.as_mut_ptr()), 0);
        assert_eq!(libc::ioctl(fd, libc::SIOCGIFINDEX, request.as_mut_ptr()), 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::from_ne_bytes(request[16..20].try_into().unwrap());
        let size = size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), size), 0);
        let limit = libc::timeval { tv_sec: 10, tv_usec: 0 };
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of_val(&limit) as u32,
        );
        socket
    }
}

#[test]
fn frames_pass_both_ways_over_a_tap_with_offloads() {
    let _alone = alone();
    // SAFETY: unshare changes this thread's network namespace only.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        unshared,
        0,
        "this test needs the right to make a network namespace: {}",
        io::Error::last_os_error()
    );
    let mut net = Net::new(open_tap("guest0").unwrap(), MAC).unwrap().with_mtu_of_tap();
    let mut mtu = [0; 2];
    net.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 1500);
    assert_ne!(net.features() & 1 << 3, 0);
    let mut socket = raw_socket("guest0");
    let features = net.features();
    let mut driver = Driver::new(&mut net, features);

    let out = frame(200);
    driver.write(BUFFERS, &with_header(&out));
    driver.chain(TX, 0, &[(BUFFERS, 212)], &[]);
    driver.offer(TX, 0);
    let mut received = [0; 2000];
    let length = socket.read(&mut received).unwrap();
    assert_eq!(received[..length], out);

    offer_buffers(&mut driver, 0, 64, 1526);
    let back = frame(300);
    socket.write_all(&back).unwrap();
    loop {
        let (head, written) = driver.wait_used(RX);
        let packet = driver.read(buffer(head), written as usize);
        if packet[HEADER + 12..HEADER + 14] == ETHER_TYPE {
            assert_eq!(packet[HEADER..], back);
            assert_eq!(packet[10..12], [1, 0]);
            break;
        }
    }
    driver.stop(&mut net);
    // After a reset the same tap serves a driver with fewer features.
    let driver = Driver::new(&mut net, 1 << 32);
    driver.stop(&mut net);
}

fn random_table() -> impl Strategy<Value = Vec<(u64, u32, u16, u16)>> {
    let address = prop_oneof![4 => BUFFERS..BUFFERS + 0x40000, 1 => 0..MEMORY, 1 => Just(u64::MAX), 1 => Just(MEMORY - 8)];
    let length = prop_oneof![4 => 0u32..3000, 1 => any::<u32>()];
    prop::collection::vec((address, length, 0u16..8, 0u16..16), 16)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random descriptors, heads and indices on both queues, with packets coming in: no panic, and nothing is written outside
    /// of the buffers that the driver named writable.
    #[test]
    fn random_rings_do_no_harm(
        tables in [random_table(), random_table()],
        heads in prop::collection::vec(prop_oneof![8 => 0u16..16, 1 => any::<u16>()], 1..16),
        index in prop::option::of(any::<u16>()),
        mergeable: bool,
        packets in prop::collection::vec(26usize..9000, 0..8),
    ) {
        let _alone = alone();
        let (outside, mut net, mut driver) = start(if mergeable { MERGEABLE } else { 0 });
        let canary = MEMORY - 0x10000;
        driver.write(canary, &[0x5a; 0x10000]);
        for (queue, table) in tables.iter().enumerate() {
            for (n, &(address, length, flags, next)) in table.iter().enumerate() {
                let inside = address >= BUFFERS && address.saturating_add(u64::from(length)) <= canary;
                let flags = if inside { flags } else { flags & !(WRITE | INDIRECT) };
                driver.write_descriptor(Driver::table(queue), n as u16, Descriptor { address, length, flags, next });
            }
        }
        for length in packets {
            outside.send(&with_header(&frame(length))).unwrap();
        }
        for queue in [RX, TX] {
            for &head in &heads {
                driver.put_available(queue, head);
            }
            driver.publish(queue);
        }
        if let Some(index) = index {
            driver.set_available_index(RX, index);
            driver.set_available_index(TX, index);
            driver.kicks[RX].write(1).unwrap();
            driver.kicks[TX].write(1).unwrap();
        }
        driver.wait_used_for(TX, Duration::from_millis(20));
        driver.wait_used_for(RX, Duration::from_millis(5));
        let memory = driver.memory.clone();
        driver.stop(&mut net);
        let mut bytes = vec![0; 0x10000];
        vm_memory::Bytes::read_slice(&*memory, &mut bytes, vm_memory::GuestAddress(canary)).unwrap();
        prop_assert!(bytes.iter().all(|byte| *byte == 0x5a));
    }
}
