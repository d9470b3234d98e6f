use std::{
    collections::BTreeSet,
    io,
    ops::Range,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::{
    super::{
        VirtioDevice,
        test_driver::{BUFFERS, Driver},
    },
    Backing, Blocks, Handle, Mem, Sizes,
    abi::*,
};
use crate::memory::{BLOCK, Plugged, Ram};

const START: u64 = 4 << 30;
const REGION: u64 = 16;
/// Where the driver puts its request, and where it wants the answer.
const REQUEST_AT: u64 = BUFFERS;
const ANSWER_AT: u64 = BUFFERS + 0x100;

/// Keeps account of what it was told, and fails when it is to.
#[derive(Default)]
struct Account {
    blocks: BTreeSet<u64>,
    fails: bool,
}

#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<Account>>);

impl Ledger {
    fn blocks(&self) -> Vec<u64> {
        self.0.lock().unwrap().blocks.iter().copied().collect()
    }

    fn fail(&self, fails: bool) {
        self.0.lock().unwrap().fails = fails;
    }
}

impl Backing for Ledger {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut account = self.0.lock().unwrap();
        if account.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        blocks.for_each(|block| assert!(account.blocks.insert(block), "block {block} was there"));
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let mut account = self.0.lock().unwrap();
        if account.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        blocks.for_each(|block| assert!(account.blocks.remove(&block), "block {block} was not there"));
        Ok(())
    }
}

fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

fn region() -> Arc<Ram> {
    let ram = Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    ram.add(START, REGION * BLOCK).unwrap();
    Arc::new(ram)
}

fn plugged(ram: &Ram) -> &Plugged {
    ram.added().unwrap().plugged().unwrap()
}

/// A device with a driver that knows what it is doing.
struct Bench {
    ram: Arc<Ram>,
    device: Mem,
    handle: Handle,
    driver: Driver,
    ledger: Ledger,
}

impl Bench {
    fn new() -> Self {
        let (ram, ledger) = (region(), Ledger::default());
        let (mut device, handle) = Mem::new(&ram, Box::new(ledger.clone())).unwrap();
        let driver = Driver::new(&mut device, 1 << F_UNPLUGGED_INACCESSIBLE);
        Self { ram, device, handle, driver, ledger }
    }

    /// Asks with buffers of these lengths; the bytes that the device says it wrote, type and state of the answer.
    fn ask_in(&mut self, bytes: &[u8], room: u32) -> (u32, u16, u16) {
        self.driver.write(REQUEST_AT, bytes);
        self.driver.write(ANSWER_AT, &[0xff; 16]);
        self.driver.chain(0, 0, &[(REQUEST_AT, bytes.len() as u32)], &[(ANSWER_AT, room)]);
        self.driver.offer(0, 0);
        let (head, written) = self.driver.wait_used(0);
        assert_eq!(head, 0);
        let answer = self.driver.read(ANSWER_AT, RESPONSE);
        let number = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (written, number(0), number(8))
    }

    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        let (written, answer, state) = self.ask_in(&request(kind, START + block * BLOCK, count), 10);
        assert_eq!(written, 10);
        (answer, state)
    }

    fn config(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn stop(mut self) {
        self.driver.stop(&mut self.device);
    }
}

#[test]
fn the_configuration_says_what_is_wanted_and_what_is() {
    let mut bench = Bench::new();
    assert_eq!((bench.device.device_type(), bench.config(0), bench.config(8)), (24, BLOCK, 0));
    assert_eq!((bench.config(16), bench.config(24)), (START, REGION * BLOCK));
    assert_eq!([32, 40, 48].map(|at| bench.config(at)), [0; 3]);
    let _ = bench.driver.line.read();
    bench.handle.request(5 * BLOCK + 1, 8 * BLOCK);
    assert_eq!([32, 40, 48].map(|at| bench.config(at)), [8 * BLOCK, 0, 5 * BLOCK]);
    assert!(bench.driver.line.read().is_ok(), "the driver is told");
    assert_eq!(bench.ask(REQUEST_PLUG, 2, 3), (RESPONSE_ACK, 0));
    assert_eq!(bench.config(40), 3 * BLOCK);
    // More than there is.
    bench.handle.request(u64::MAX, u64::MAX);
    assert_eq!([32, 48].map(|at| bench.config(at)), [REGION * BLOCK; 2]);
    bench.handle.request(0, 0);
    let sizes = bench.handle.sizes();
    assert_eq!((sizes.requested, sizes.usable, sizes.plugged), (0, REGION * BLOCK, 3 * BLOCK));
    bench.stop();
}

#[test]
fn blocks_come_and_go_as_asked() {
    let mut bench = Bench::new();
    bench.handle.request(4 * BLOCK, 8 * BLOCK);
    assert_eq!(bench.ask(REQUEST_PLUG, 1, 3), (RESPONSE_ACK, 0));
    assert_eq!(bench.ledger.blocks(), [1, 2, 3]);
    assert!(!plugged(&bench.ram).has(0) && plugged(&bench.ram).has(3));
    assert_eq!(bench.ask(REQUEST_STATE, 1, 3), (RESPONSE_ACK, STATE_PLUGGED));
    assert_eq!(bench.ask(REQUEST_STATE, 4, 3), (RESPONSE_ACK, STATE_UNPLUGGED));
    assert_eq!(bench.ask(REQUEST_STATE, 0, 2), (RESPONSE_ACK, STATE_MIXED));
    assert_eq!(bench.ask(REQUEST_UNPLUG, 2, 1), (RESPONSE_ACK, 0));
    assert_eq!(bench.ledger.blocks(), [1, 3]);
    assert_eq!(bench.handle.sizes().plugged, 2 * BLOCK);
    assert_eq!(bench.ask(REQUEST_UNPLUG_ALL, 0, 0), (RESPONSE_ACK, 0));
    assert!(bench.ledger.blocks().is_empty());
    assert_eq!(bench.handle.sizes().plugged, 0);
    bench.stop();
}

#[test]
fn a_driver_gets_no_more_than_was_asked_for() {
    let mut bench = Bench::new();
    assert_eq!(bench.ask(REQUEST_PLUG, 0, 1), (RESPONSE_ERROR, 0), "nothing is usable");
    bench.handle.request(2 * BLOCK, 8 * BLOCK);
    assert_eq!(bench.ask(REQUEST_PLUG, 0, 3), (RESPONSE_NACK, 0));
    assert_eq!(bench.ask(REQUEST_PLUG, 0, 2), (RESPONSE_ACK, 0));
    assert_eq!(bench.ask(REQUEST_PLUG, 5, 1), (RESPONSE_NACK, 0));
    for (block, count) in [(8, 1), (7, 2), (0, 0), (0, u16::MAX), (u64::MAX / BLOCK - START / BLOCK, 2)] {
        assert_eq!(bench.ask(REQUEST_PLUG, block, count), (RESPONSE_ERROR, 0), "{block} {count}");
    }
    for address in [0, START - BLOCK, START + 1, START + 4096, u64::MAX] {
        let (_, answer, _) = bench.ask_in(&request(REQUEST_PLUG, address, 1), 10);
        assert_eq!(answer, RESPONSE_ERROR, "{address:#x}");
    }
    assert_eq!(bench.ask(REQUEST_PLUG, 1, 2), (RESPONSE_ERROR, 0), "block 1 is plugged");
    assert_eq!(bench.ask(REQUEST_UNPLUG, 1, 2), (RESPONSE_ERROR, 0), "block 2 is not");
    assert_eq!(bench.ask(4, 0, 1), (RESPONSE_ERROR, 0), "no such request");
    assert_eq!(bench.ledger.blocks(), [0, 1]);
    bench.stop();
}

#[test]
fn what_the_host_cannot_do_now_changes_nothing() {
    let mut bench = Bench::new();
    bench.handle.request(4 * BLOCK, 4 * BLOCK);
    bench.ledger.fail(true);
    assert_eq!(bench.ask(REQUEST_PLUG, 0, 1), (RESPONSE_BUSY, 0));
    assert!(!plugged(&bench.ram).has(0));
    bench.ledger.fail(false);
    assert_eq!(bench.ask(REQUEST_PLUG, 0, 1), (RESPONSE_ACK, 0));
    bench.ledger.fail(true);
    for kind in [REQUEST_UNPLUG, REQUEST_UNPLUG_ALL] {
        assert_eq!(bench.ask(kind, 0, 1), (RESPONSE_BUSY, 0));
    }
    assert!(plugged(&bench.ram).has(0));
    assert_eq!(bench.handle.sizes().plugged, BLOCK);
    bench.stop();
}

#[test]
fn a_request_without_room_or_end_changes_nothing() {
    let mut bench = Bench::new();
    bench.handle.request(4 * BLOCK, 4 * BLOCK);
    let whole = request(REQUEST_PLUG, START, 1);
    assert_eq!(bench.ask_in(&whole[..REQUEST - 1], 10).0, 0);
    assert_eq!(bench.ask_in(&whole, 9).0, 0);
    assert!(bench.ledger.blocks().is_empty());
    assert_eq!(bench.ask_in(&whole, 16), (10, RESPONSE_ACK, 0));
    bench.stop();
}

#[test]
fn blocks_outlive_a_reset_of_the_device() {
    let mut bench = Bench::new();
    bench.handle.request(4 * BLOCK, 4 * BLOCK);
    assert_eq!(bench.ask(REQUEST_PLUG, 0, 2), (RESPONSE_ACK, 0));
    bench.driver.stop(&mut bench.device);
    // Nobody is there to be told.
    bench.handle.request(BLOCK, 0);
    assert_eq!(bench.handle.sizes().plugged, 2 * BLOCK);
    bench.driver = Driver::new(&mut bench.device, 1 << F_UNPLUGGED_INACCESSIBLE);
    assert_eq!(bench.config(40), 2 * BLOCK);
    assert_eq!(bench.ask(REQUEST_UNPLUG_ALL, 0, 0), (RESPONSE_ACK, 0));
    bench.driver.stop(&mut bench.device);
}

#[test]
fn a_driver_that_would_read_unplugged_memory_is_refused() {
    let ram = region();
    let (mut device, _handle) = Mem::new(&ram, Box::new(Ledger::default())).unwrap();
    let event = || vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let line = Arc::new(event());
    let error = device
        .activate(super::super::Activation {
            memory: Arc::clone(&ram),
            queues: Vec::new(),
            kicks: Vec::new(),
            interrupt: super::super::Interrupt::new(Arc::default(), line),
            features: 0,
            stop: event(),
        })
        .unwrap_err();
    assert!(error.to_string().contains("leave unplugged memory alone"), "{error}");
    assert!(
        Mem::new(
            &Arc::new(Ram::from_ranges(&[(GuestAddress(0), 4096)]).unwrap()),
            Box::new(Ledger::default())
        )
        .is_none()
    );
}

/// The rules of the standard, written down a second time: a set of blocks.
#[derive(Default)]
struct Model {
    blocks: BTreeSet<u64>,
    usable: u64,
    requested: u64,
}

impl Model {
    fn answer(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        if kind == 2 {
            self.blocks.clear();
            return (0, 0);
        }
        let inside = address >= START && (address - START).is_multiple_of(BLOCK) && count > 0;
        let first = address.wrapping_sub(START) / BLOCK;
        if !inside || kind > 3 || first + u64::from(count) > self.usable {
            return (3, 0);
        }
        let range: Vec<u64> = (first..first + u64::from(count)).collect();
        let there = range.iter().filter(|block| self.blocks.contains(block)).count();
        match kind {
            0 if there > 0 => (3, 0),
            0 if (self.blocks.len() + range.len()) as u64 > self.requested => (1, 0),
            0 => {
                self.blocks.extend(range);
                (0, 0)
            }
            1 if there < range.len() => (3, 0),
            1 => {
                self.blocks.retain(|block| !range.contains(block));
                (0, 0)
            }
            _ if there == range.len() => (0, 0),
            _ if there == 0 => (0, 1),
            _ => (0, 2),
        }
    }
}

proptest! {
    #[test]
    fn whatever_a_driver_asks_is_answered_by_the_rules(
        steps in prop::collection::vec(
            prop_oneof![
                (0u16..5, 0u64..REGION + 2, prop_oneof![0u16..6, Just(u16::MAX)], 0u64..4).prop_map(|(kind, block, count, off)| {
                    // One in four addresses is no block's.
                    Ok((kind, START.wrapping_add(block * BLOCK).wrapping_sub(if off == 0 { 4096 } else { 0 }), count))
                }),
                (any::<u16>(), any::<u64>(), any::<u16>()).prop_map(Ok),
                (0u64..REGION + 2, 0u64..REGION + 2).prop_map(Err),
            ],
            0..40,
        )
    ) {
        let (ram, ledger) = (region(), Ledger::default());
        let mut blocks = Blocks::new(Arc::clone(&ram), Box::new(ledger.clone())).unwrap();
        let mut model = Model::default();
        for step in steps {
            match step {
                Ok((kind, address, count)) => {
                    let answer = blocks.answer(&request(kind, address, count));
                    let number = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
                    prop_assert_eq!((number(0), number(8)), model.answer(kind, address, count));
                }
                Err((requested, usable)) => {
                    blocks.request(requested * BLOCK, usable * BLOCK);
                    model.requested = requested.min(REGION);
                    model.usable = model.usable.max(usable.min(REGION)).max(model.requested);
                }
            }
            let Sizes { plugged: bytes, .. } = blocks.sizes();
            prop_assert_eq!(bytes, model.blocks.len() as u64 * BLOCK);
            prop_assert_eq!(ledger.blocks(), model.blocks.iter().copied().collect::<Vec<_>>());
            for block in 0..REGION {
                let at = GuestAddress(START + block * BLOCK);
                prop_assert_eq!(ram.read_obj::<u8>(at).is_ok(), model.blocks.contains(&block));
            }
        }
    }
}
