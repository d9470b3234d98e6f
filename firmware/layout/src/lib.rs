//! The fixed machine: every address that more than one of image tool, shim and VMM must know.
//!
//! Owns: guest physical addresses, device slots, interrupts, the debug port. Does not own: what lies there; the
//! shim's tables have their types in [`boot`].
#![no_std]
#![forbid(unsafe_code)]

pub mod boot;
pub mod handoff;
pub mod refusal;
pub mod sites;
pub mod snp;
pub mod vmsa;

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// RAM below 4 GiB ends here at the latest; the rest of the guest's RAM begins at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole for devices.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// First of the virtio-mmio register windows.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Size of one window.
pub const MMIO_SIZE: u64 = 0x1000;

/// ISA interrupt of each virtio-mmio slot; the number of slots is its length.
pub const MMIO_IRQS: [u32; 10] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 3];

/// What sits in which slot. A slot without a device answers with device id 0, which Linux skips.
pub mod slot {
    /// vsock: the control channel.
    pub const VSOCK: usize = 0;
    /// virtio-fs: root file systems and bind mounts.
    pub const FS: usize = 1;
    /// Entropy.
    pub const RNG: usize = 2;
    /// First network device.
    pub const NET: usize = 3;
    /// Number of network devices.
    pub const NETS: usize = 3;
    /// First block device.
    pub const BLK: usize = 6;
    /// Number of block devices.
    pub const BLKS: usize = 4;
    /// Memory that comes while the guest runs. Where there is a fourth block device there is none.
    pub const MEMORY: usize = BLK + BLKS - 1;
}

/// Guest physical address of a slot's registers.
#[must_use]
pub const fn mmio_address(slot: usize) -> u64 {
    MMIO_BASE + slot as u64 * MMIO_SIZE
}

/// First port of the 16550 of the debug profile, interrupt [`SERIAL_IRQ`].
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Keyboard controller's command port: writing [`RESET_COMMAND`] asks for a reset (Linux `reboot=k`).
pub const RESET_PORT: u16 = 0x64;
/// Pulse the reset line.
pub const RESET_COMMAND: u8 = 0xfe;

/// Port on which the guest marks its boot stages, one byte each: see [`mark`].
pub const MARK_PORT: u16 = 0x80;

/// Boot stages, as written to [`MARK_PORT`].
pub mod mark {
    /// First instruction of the shim.
    pub const SHIM_ENTRY: u8 = 0xc0;
    /// The shim jumps to the kernel.
    pub const KERNEL_ENTRY: u8 = 0xc1;
    /// First instruction of init's `main`.
    pub const INIT_ENTRY: u8 = 0xc2;
    /// init listens on vsock.
    pub const INIT_READY: u8 = 0xc3;
    /// A container was made.
    pub const CONTAINER_CREATED: u8 = 0xc4;
    /// A container's process is let go: its next instruction is its own.
    pub const CONTAINER_STARTED: u8 = 0xc5;
    /// init ends the machine in good order; what follows is not a crash.
    pub const ORDERLY_END: u8 = 0xcf;
    /// The shim refuses to go on; the reason is the next byte written, see [`crate::boot::Refusal`].
    pub const SHIM_REFUSED: u8 = 0xce;
}
