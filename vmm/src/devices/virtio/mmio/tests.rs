//! A driver's way through the registers, right and wrong, and windows that were saved.

use super::*;
use crate::{devices::virtio::rng::Rng, memory::Ram};
use proptest::prelude::*;
use vm_memory::GuestAddress;

fn window() -> Window {
    let memory = Arc::new(Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    Window::new(Box::new(Rng::default()), memory, Arc::new(EventFd::new(0).unwrap())).unwrap()
}

fn get(window: &Window, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    window.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn put(window: &mut Window, offset: u64, value: u32) {
    window.write(offset, &value.to_le_bytes());
}

/// What a driver does (virtio 1.2, 3.1.1).
fn start(window: &mut Window) {
    for status in [1, 3] {
        put(window, 0x70, status);
    }
    put(window, 0x24, 1);
    put(window, 0x20, 1);
    put(window, 0x70, 11);
    put(window, 0x38, 8);
    for (register, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
        put(window, register, address);
    }
    put(window, 0x44, 1);
    put(window, 0x70, 15);
}

#[test]
fn a_driver_that_follows_the_order_gets_a_working_device_and_can_reset_it() {
    let mut window = window();
    assert_eq!((get(&window, 0), get(&window, 4), get(&window, 8)), (0x7472_6976, 2, 4));
    for _ in 0..3 {
        start(&mut window);
        assert_eq!(get(&window, 0x70), 15);
        put(&mut window, 0x70, 0);
        assert_eq!((get(&window, 0x70), get(&window, 0x44)), (0, 0));
    }
    assert!(window.take_failures().is_empty());
}

/// Asks the device for one byte in buffer `index`, and waits until it is there.
fn read_one(window: &Window, index: u16) {
    use vm_memory::Bytes;
    let memory = &*window.memory;
    let descriptor = 0x1000 + 16 * u64::from(index);
    let buffer = 0x4000 + u64::from(index);
    memory.write_obj(buffer, GuestAddress(descriptor)).unwrap();
    memory.write_obj(1u32, GuestAddress(descriptor + 8)).unwrap();
    memory.write_obj(2u32, GuestAddress(descriptor + 12)).unwrap();
    memory.write_obj(index, GuestAddress(0x2004 + 2 * u64::from(index))).unwrap();
    memory.write_obj(index + 1, GuestAddress(0x2002)).unwrap();
    window.kicks[0].write(1).unwrap();
    while memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap() != index + 1 {
        std::thread::yield_now();
    }
    assert_eq!(
        memory.read_obj::<u32>(GuestAddress(0x3004 + 8 * u64::from(index))).unwrap(),
        u32::from(index)
    );
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x3008 + 8 * u64::from(index))).unwrap(), 1);
}

#[test]
fn a_saved_window_goes_on_where_it_was_and_raises_what_was_pending() {
    let mut saved = window();
    start(&mut saved);
    read_one(&saved, 0);
    read_one(&saved, 1);
    // The interrupt is raised after the ring was written.
    while get(&saved, 0x60) == 0 {
        std::thread::yield_now();
    }
    let state = saved.save(3).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let state: WindowState = serde_json::from_str(&text).unwrap();
    assert_eq!((state.slot, state.queues[0].next), (3, 2));
    let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let mut window =
        Window::new(Box::new(Rng::default()), Arc::clone(&saved.memory), Arc::clone(&line)).unwrap();
    window.restore(&state).unwrap();
    assert_eq!((get(&window, 0x70), get(&window, 0x60), get(&window, 0x44)), (15, 1, 1));
    assert_eq!(line.read().unwrap(), 1);
    read_one(&window, 2);
}

#[test]
fn a_state_of_another_device_or_with_rings_out_of_memory_is_refused() {
    let mut saved = window();
    start(&mut saved);
    let state = saved.save(0).unwrap();
    for change in [
        (|state: &mut WindowState| state.device_type = 5) as fn(&mut WindowState),
        |state| state.queues.clear(),
        |state| state.queues[0].size = 3,
        |state| state.queues[0].used = 1 << 40,
        |state| state.driver_features |= 1,
        |state| state.device = serde_json::Value::Bool(true),
    ] {
        let mut wrong = state.clone();
        change(&mut wrong);
        assert!(window().restore(&wrong).is_err(), "{wrong:?}");
    }
    window().restore(&state).unwrap();
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut window = window();
    put(&mut window, 0x70, 1);
    put(&mut window, 0x70, 3);
    put(&mut window, 0x20, 1 << 20);
    put(&mut window, 0x24, 1);
    put(&mut window, 0x20, 1);
    put(&mut window, 0x70, 11);
    assert_eq!(get(&window, 0x70), 3);
}

#[test]
fn under_a_tee_a_driver_must_accept_access_platform() {
    let mut window = window().with_shared_memory_only();
    put(&mut window, 0x14, 1);
    assert_eq!(get(&window, 0x10), 0b11, "VIRTIO_F_VERSION_1 is bit 32, VIRTIO_F_ACCESS_PLATFORM bit 33");
    for (accepted, status) in [(0b01, 3), (0b10, 3), (0b11, 11)] {
        for status in [0, 1, 3] {
            put(&mut window, 0x70, status);
        }
        put(&mut window, 0x24, 1);
        put(&mut window, 0x20, accepted);
        put(&mut window, 0x70, 11);
        assert_eq!(get(&window, 0x70), status, "accepted {accepted:#b}");
    }
}

/// A driver whose queue does not lie in RAM.
fn start_outside_ram(window: &mut Window) {
    for status in [1, 3] {
        put(window, 0x70, status);
    }
    put(window, 0x24, 1);
    put(window, 0x20, 1);
    put(window, 0x70, 11);
    put(window, 0x84, 1);
    put(window, 0x44, 1);
    put(window, 0x70, 15);
}

#[test]
fn a_queue_outside_ram_makes_the_device_ask_for_a_reset() {
    let mut window = window();
    start_outside_ram(&mut window);
    assert_eq!(get(&window, 0x70), 11 | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(window.take_failures().len(), 1);
}

#[test]
fn a_device_that_needs_a_reset_does_not_start_without_one() {
    let mut window = window();
    start_outside_ram(&mut window);
    for _ in 0..3 {
        put(&mut window, 0x70, 15);
    }
    assert_eq!(get(&window, 0x70), 11 | VIRTIO_CONFIG_S_NEEDS_RESET);
    assert_eq!(window.take_failures().len(), 1);
    // The queue is a good one now, but the driver has not reset the device.
    put(&mut window, 0x84, 0);
    put(&mut window, 0x70, 15);
    assert_eq!(get(&window, 0x70), 11 | VIRTIO_CONFIG_S_NEEDS_RESET);
    put(&mut window, 0x70, 0);
    start(&mut window);
    assert_eq!(get(&window, 0x70), 15);
}

#[test]
fn a_guest_that_fails_for_ever_fills_no_log() {
    let mut window = window();
    let mut told = 0;
    for _ in 0..100 {
        start_outside_ram(&mut window);
        assert_eq!(get(&window, 0x70), 11 | VIRTIO_CONFIG_S_NEEDS_RESET);
        told += window.take_failures().len();
        put(&mut window, 0x70, 0);
    }
    assert_eq!(told, 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_accesses_leave_the_status_in_its_order(
        accesses in prop::collection::vec((0u64..0x120, any::<u32>(), 1usize..9, any::<bool>()), 0..200),
        starts in any::<bool>(),
    ) {
        let mut window = window();
        if starts {
            start(&mut window);
        }
        for (offset, value, length, write) in accesses {
            if write {
                let bytes = u64::from(value).to_le_bytes();
                window.write(offset, &bytes[..length]);
            } else {
                window.read(offset, &mut [0; 8][..length]);
            }
            prop_assert!([0, 1, 3, 11, 15].contains(&(window.status & 15)));
        }
        put(&mut window, 0x70, 0);
    }
}
