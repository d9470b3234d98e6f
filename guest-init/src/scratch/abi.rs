//! Numbers and structures of the kernel's device mapper and loop devices.
//!
//! Source: include/uapi/linux/dm-ioctl.h and loop.h of Linux 6.12.

/// struct dm_ioctl.
#[repr(C)]
pub(super) struct DmIoctl {
    pub(super) version: [u32; 3],
    /// Of all: this, and what follows.
    pub(super) data_size: u32,
    /// From this structure's begin to the first target.
    pub(super) data_start: u32,
    pub(super) target_count: u32,
    pub(super) open_count: i32,
    pub(super) flags: u32,
    pub(super) event_nr: u32,
    pub(super) padding: u32,
    pub(super) dev: u64,
    pub(super) name: [u8; 128],
    pub(super) uuid: [u8; 129],
    pub(super) data: [u8; 7],
}

/// struct dm_target_spec; its words follow it.
#[repr(C)]
pub(super) struct DmTargetSpec {
    pub(super) sector_start: u64,
    pub(super) length: u64,
    pub(super) status: i32,
    pub(super) next: u32,
    pub(super) target_type: [u8; 16],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<DmIoctl>() == 312 && size_of::<DmTargetSpec>() == 40);
    assert!(offset_of!(DmIoctl, flags) == 28 && offset_of!(DmIoctl, dev) == 40);
    assert!(offset_of!(DmIoctl, name) == 48 && offset_of!(DmIoctl, uuid) == 176);
    assert!(offset_of!(DmTargetSpec, next) == 20 && offset_of!(DmTargetSpec, target_type) == 24);
};

pub(super) const DM_VERSION: [u32; 3] = [4, 0, 0];
/// The kernel wipes its copy of the request.
pub(super) const DM_SECURE_DATA: u32 = 1 << 15;

/// _IOWR(0xfd, number, struct dm_ioctl).
const fn dm(number: u64) -> u64 {
    3 << 30 | (size_of::<DmIoctl>() as u64) << 16 | 0xfd << 8 | number
}

pub(super) const DM_DEV_CREATE: u64 = dm(3);
/// Resumes where the flag for suspending is not set.
pub(super) const DM_DEV_SUSPEND: u64 = dm(6);
pub(super) const DM_TABLE_LOAD: u64 = dm(9);

const _: () = assert!(DM_TABLE_LOAD == 0xc138_fd09);

pub(super) const LOOP_SET_FD: u64 = 0x4c00;
pub(super) const LOOP_CTL_GET_FREE: u64 = 0x4c82;
