use std::{fs, io::Write as _};

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;
use crate::devices::virtio::test_driver::{BUFFERS, Driver};

const SECTORS: u64 = 64;
const STATUS: u64 = BUFFERS + (8 << 20);
const ANSWER: u64 = BUFFERS + (4 << 20);

/// A disk whose sector `n` is filled with `n`.
fn backing() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8; SECTOR as usize]).unwrap();
    }
    file
}

struct Machine {
    file: NamedTempFile,
    device: Blk,
    driver: Option<Driver>,
}

impl Machine {
    fn new(read_only: bool) -> Self {
        let file = backing();
        let mut device = Blk::new(file.path(), read_only, "disk0").unwrap();
        let features = device.features();
        let driver = Some(Driver::new(&mut device, features));
        Self { file, device, driver }
    }

    /// Sends a request; its status, the bytes that the device says it wrote, and the answer's bytes.
    fn call(&mut self, kind: u32, sector: u64, data: &[u8], answer: u32) -> (u8, u32, Vec<u8>) {
        let driver = self.driver.as_mut().unwrap();
        let mut request = kind.to_le_bytes().to_vec();
        request.extend([0; 4]);
        request.extend(sector.to_le_bytes());
        request.extend(data);
        driver.write(BUFFERS, &request);
        driver.write(STATUS, &[0xee]);
        // The header is cut in two: a device must not care where buffers end.
        let readable = [(BUFFERS, 5), (BUFFERS + 5, request.len() as u32 - 5)];
        let writable = [(ANSWER, answer), (STATUS, 1)];
        driver.chain(0, 0, &readable, if answer == 0 { &writable[1..] } else { &writable });
        driver.offer(0, 0);
        let (_, written) = driver.wait_used(0);
        (driver.read(STATUS, 1)[0], written, driver.read(ANSWER, answer as usize))
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.file.path()).unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.driver.take().unwrap().stop(&mut self.device);
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_again() {
    let mut machine = Machine::new(false);
    assert_eq!(machine.call(IN, 5, &[], 1024), (0, 1025, [[5; 512], [6; 512]].concat()));
    assert_eq!(machine.call(OUT, 62, &[0xab; 1024], 0), (0, 1, vec![]));
    assert_eq!(machine.call(FLUSH, 0, &[], 0), (0, 1, vec![]));
    let bytes = machine.bytes();
    assert_eq!(bytes.len() as u64, SECTORS * SECTOR);
    assert_eq!((bytes[62 * 512 - 1], &bytes[62 * 512..]), (61, &[0xab; 1024][..]));
    assert_eq!(machine.call(IN, 63, &[], 512), (0, 513, vec![0xab; 512]));
    assert_eq!(machine.call(GET_ID, 0, &[], 20).2, b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn requests_longer_than_the_buffer_are_served_in_pieces() {
    let file = NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 512 + i) as u8).collect();
    fs::write(file.path(), &content).unwrap();
    let mut device = Blk::new(file.path(), true, "").unwrap();
    let features = device.features();
    let driver = Some(Driver::new(&mut device, features));
    let mut machine = Machine { file, device, driver };
    assert_eq!(machine.call(IN, 0, &[], 1 << 20), (0, (1 << 20) + 1, content));
}

#[test]
fn what_lies_outside_the_disk_or_is_no_whole_sector_fails_and_changes_nothing() {
    let mut machine = Machine::new(false);
    let before = machine.bytes();
    for (kind, sector, data, answer) in [
        (IN, SECTORS, vec![], 512),
        (IN, u64::MAX, vec![], 512),
        (IN, 1 << 55, vec![], 512),
        (IN, SECTORS - 1, vec![], 1024),
        (IN, 0, vec![], 100),
        (OUT, SECTORS, vec![1; 512], 0),
        (OUT, u64::MAX, vec![1; 1024], 0),
        (OUT, 0, vec![1; 511], 0),
        (GET_ID, 0, vec![], 19),
        (DISCARD, 0, range(SECTORS - 1, 2, 0), 0),
        (DISCARD, 0, [range(0, 1, 0), range(u64::MAX, 2, 0)].concat(), 0),
        (DISCARD, 0, vec![0; 15], 0),
        (DISCARD, 0, vec![], 0),
        (WRITE_ZEROES, 0, range(0, u32::MAX, 0), 0),
        (WRITE_ZEROES, 0, vec![0; 17 * 16], 0),
    ] {
        let (status, written, _) = machine.call(kind, sector, &data, answer);
        assert_eq!((status, written), (1, 0), "type {kind} sector {sector}");
    }
    for (kind, data) in [(99, vec![]), (DISCARD, range(0, 1, 1)), (WRITE_ZEROES, range(0, 1, 2))] {
        assert_eq!(machine.call(kind, 0, &data, 0).0, 2, "type {kind}");
    }
    assert!(machine.bytes() == before);
}

#[test]
fn discarded_and_zeroed_ranges_are_zero_and_their_neighbours_are_not() {
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let mut machine = Machine::new(false);
        let ranges = [range(8, 8, flags), range(40, 3, flags), range(9, 0, flags)].concat();
        let (status, ..) = machine.call(kind, 0, &ranges, 0);
        // A file system without holes says so; zeros are written then.
        assert!(status == 0 || kind == DISCARD && status == 2, "type {kind}: status {status}");
        for (sector, bytes) in machine.bytes().chunks_exact(512).enumerate() {
            let cleared = status == 0 && (matches!(sector, 8..16) || matches!(sector, 40..43));
            let wanted = if cleared { 0 } else { sector as u8 };
            assert!(bytes.iter().all(|b| *b == wanted), "type {kind} flags {flags}: sector {sector}");
        }
    }
}

#[test]
fn a_read_only_disk_is_offered_as_one_and_never_written() {
    let mut machine = Machine::new(true);
    let bit = |bit: u32| machine.device.features() >> bit & 1;
    assert_eq!((bit(VIRTIO_BLK_F_RO), bit(VIRTIO_BLK_F_DISCARD), bit(VIRTIO_BLK_F_WRITE_ZEROES)), (1, 0, 0));
    let before = machine.bytes();
    for (kind, data) in [(OUT, vec![1; 512]), (DISCARD, range(0, 8, 0)), (WRITE_ZEROES, range(0, 8, 0))] {
        assert_eq!(machine.call(kind, 0, &data, 0).0, 1);
    }
    assert!(machine.bytes() == before);
    assert_eq!(machine.call(IN, 1, &[], 512).0, 0);
}

#[test]
fn the_configuration_space_has_capacity_and_limits_where_linux_reads_them() {
    let file = backing();
    let device = Blk::new(file.path(), false, "").unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 4];
        device.read_config(at, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!((number(0), number(4)), (64, 0));
    assert_eq!((number(12), number(20)), (126, 512));
    assert_eq!((number(36), number(40), number(44), number(48), number(52)), (32768, 16, 8, 32768, 16));
    let mut beyond = [0xaa; 2];
    device.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0xaa; 2]);
}

#[test]
fn one_writer_or_many_readers() {
    let file = backing();
    let open = |read_only| Blk::new(file.path(), read_only, "");
    let readers = (open(true).unwrap(), open(true).unwrap());
    assert!(matches!(open(false), Err(BlkError::Locked(_))));
    drop(readers);
    let _writer = open(false).unwrap();
    assert!(matches!(open(true), Err(BlkError::Locked(_))));
}

#[test]
fn what_is_no_disk_is_refused_with_its_path() {
    let words = |path: &Path| Blk::new(path, true, "").err().unwrap().to_string();
    assert!(words(Path::new("/nonexistent/disk")).contains("/nonexistent/disk"));
    assert!(words(Path::new("/dev/null")).contains("neither a file nor a block device"));
    let file = NamedTempFile::new().unwrap();
    assert!(words(file.path()).contains("empty"));
    fs::write(file.path(), [0; 700]).unwrap();
    assert!(words(file.path()).contains("multiple of 512"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn whatever_a_driver_asks_the_device_lives_and_the_file_keeps_its_size(
        requests in prop::collection::vec(
            (
                prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 2, u32::MAX]),
                prop_oneof![0u64..70, any::<u64>()],
                prop::collection::vec(any::<u8>(), 0..80),
                prop::sample::select(vec![0u32, 1, 19, 20, 512, 1000, 1024, 70000]),
                any::<bool>(),
            ),
            1..12,
        ),
    ) {
        let mut machine = Machine::new(false);
        for (kind, sector, mut data, answer, whole) in requests {
            if whole {
                data.resize(data.len().next_multiple_of(512), 7);
            }
            let (status, written, _) = machine.call(kind, sector, &data, answer);
            prop_assert!(status <= 2 && written <= answer + 1);
        }
        prop_assert_eq!(machine.bytes().len() as u64, SECTORS * SECTOR);
    }

    #[test]
    fn chains_of_any_shape_are_given_back(
        readable in prop::collection::vec((any::<u64>(), any::<u32>()), 0..4),
        writable in prop::collection::vec((any::<u64>(), any::<u32>()), 0..4),
        near in any::<bool>(),
    ) {
        prop_assume!(!readable.is_empty() || !writable.is_empty());
        let mut machine = Machine::new(false);
        let driver = machine.driver.as_mut().unwrap();
        let place = |(address, length): &(u64, u32)| {
            if near { (BUFFERS + address % (2 << 20), length % 5000) } else { (*address, *length) }
        };
        let (readable, writable): (Vec<_>, Vec<_>) = (readable.iter().map(place).collect(), writable.iter().map(place).collect());
        driver.chain(0, 0, &readable, &writable);
        driver.offer(0, 0);
        driver.wait_used(0);
    }
}
