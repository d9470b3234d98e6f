//! Numbers of virtio-mem, as linux/virtio_mem.h and virtio 1.2, 5.15 have them.
//!
//! Owns: constants and the layouts' sizes and offsets.

/// Feature bit: the driver leaves unplugged memory alone.
pub(super) const F_UNPLUGGED_INACCESSIBLE: u32 = 1;

/// Bytes of `struct virtio_mem_config`.
pub(super) const CONFIG: usize = 56;
/// Offset in it of `addr`, which `region_size`, `usable_region_size`, `plugged_size` and `requested_size` follow, 8 bytes each.
pub(super) const CONFIG_ADDRESS: usize = 16;

/// Bytes of `struct virtio_mem_req`.
pub(super) const REQUEST: usize = 24;
/// Offsets in it of the first address and of the number of blocks; its type comes first.
pub(super) const REQUEST_ADDRESS: usize = 8;
pub(super) const REQUEST_BLOCKS: usize = 16;
pub(super) const REQUEST_PLUG: u16 = 0;
pub(super) const REQUEST_UNPLUG: u16 = 1;
pub(super) const REQUEST_UNPLUG_ALL: u16 = 2;
pub(super) const REQUEST_STATE: u16 = 3;

/// Bytes of `struct virtio_mem_resp`.
pub(super) const RESPONSE: usize = 10;
/// Offset in it of the state; its type comes first.
pub(super) const RESPONSE_STATE: usize = 8;
pub(super) const RESPONSE_ACK: u16 = 0;
pub(super) const RESPONSE_NACK: u16 = 1;
pub(super) const RESPONSE_BUSY: u16 = 2;
pub(super) const RESPONSE_ERROR: u16 = 3;

pub(super) const STATE_PLUGGED: u16 = 0;
pub(super) const STATE_UNPLUGGED: u16 = 1;
pub(super) const STATE_MIXED: u16 = 2;

/// The header's structures, to hold the numbers above against.
mod layout {
    use std::mem::offset_of;

    #[repr(C)]
    struct Config {
        block_size: u64,
        node_id: u16,
        padding: [u8; 6],
        addr: u64,
        region_size: u64,
        usable_region_size: u64,
        plugged_size: u64,
        requested_size: u64,
    }

    #[repr(C)]
    struct Range {
        addr: u64,
        nb_blocks: u16,
        padding: [u16; 3],
    }

    #[repr(C)]
    struct Request {
        kind: u16,
        padding: [u16; 3],
        range: Range,
    }

    #[repr(C)]
    struct Response {
        kind: u16,
        padding: [u16; 3],
        state: u16,
    }

    const _: () = {
        assert!(size_of::<Config>() == super::CONFIG && offset_of!(Config, addr) == super::CONFIG_ADDRESS);
        assert!(offset_of!(Config, requested_size) == super::CONFIG_ADDRESS + 4 * 8);
        assert!(size_of::<Request>() == super::REQUEST);
        assert!(offset_of!(Request, range) + offset_of!(Range, addr) == super::REQUEST_ADDRESS);
        assert!(offset_of!(Request, range) + offset_of!(Range, nb_blocks) == super::REQUEST_BLOCKS);
        assert!(size_of::<Response>() == super::RESPONSE);
        assert!(offset_of!(Response, state) == super::RESPONSE_STATE);
    };
}
