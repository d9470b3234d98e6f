//! A tap device: opening one, and telling it what the guest can take.
//!
//! Owns: the ioctls. Does not own: addresses, routes and which network namespace the caller is in.

use std::{
    ffi::c_int,
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixDatagram},
    },
};

/// Size of virtio's packet header, with the count of buffers, in bytes.
pub(super) const HEADER_SIZE: usize = 12;
/// Layout of `struct ifreq`: the name and the start of the union.
const NAME_SIZE: usize = 16;
const IFREQ_SIZE: usize = 40;

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The interface's name does not fit.
    #[error("tap: interface name `{0}` must have 1 to 15 bytes; choose a shorter one")]
    Name(String),
    /// The tun driver cannot be opened.
    #[error("tap: open /dev/net/tun: {0}; load the `tun` module or give the caller the device")]
    Open(#[source] io::Error),
    /// The interface cannot be made.
    #[error(
        "tap: create interface `{name}`: {source}; this needs CAP_NET_ADMIN in the network namespace and a free name"
    )]
    Create {
        /// The interface.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Makes the tap `name` in the caller's network namespace, with virtio headers and without packet information. It exists as
/// long as the descriptor (or a copy) is open; it is closed on exec and never blocks. The interface is down.
///
/// # Errors
/// [`TapError`] for a name that does not fit, a missing driver or a missing right.
pub fn open_tap(name: &str) -> Result<OwnedFd, TapError> {
    if name.is_empty() || name.len() >= NAME_SIZE || name.contains('\0') {
        return Err(TapError::Name(name.to_owned()));
    }
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(TapError::Open)?;
    let mut request = [0_u8; IFREQ_SIZE];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[NAME_SIZE..NAME_SIZE + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is an `ifreq` in size and layout, which the driver reads and fills.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    if result < 0 {
        return Err(TapError::Create { name: name.to_owned(), source: io::Error::last_os_error() });
    }
    Ok(tap.into())
}

/// Sets the header's size and byte order, and makes the descriptor non-blocking.
pub(super) fn prepare(tap: BorrowedFd<'_>) -> io::Result<()> {
    set(tap, libc::TUNSETVNETHDRSZ, HEADER_SIZE as c_int)?;
    set(tap, libc::TUNSETVNETLE, 1)?;
    non_blocking(tap)
}

/// Makes reads and writes return at once.
pub(super) fn non_blocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: these calls read and set flags of a descriptor that is open.
    let result = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set(tap: BorrowedFd<'_>, request: libc::Ioctl, value: c_int) -> io::Result<()> {
    // SAFETY: these requests read one int.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), request, &raw const value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the guest takes: `TUN_F_*`. Without any the host sums and cuts every packet before it comes out of the tap.
pub(super) fn set_offload(tap: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    // SAFETY: the request's argument is a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The interface's MTU in bytes; `None` if it cannot be asked, as from another network namespace.
pub(super) fn mtu(tap: BorrowedFd<'_>) -> Option<u16> {
    let mut request = [0_u8; IFREQ_SIZE];
    // SAFETY: the request is an `ifreq` in size; the driver fills it with the interface's name.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, request.as_mut_ptr()) } < 0 {
        return None;
    }
    // Any socket asks about interfaces.
    let socket = UnixDatagram::unbound().ok()?;
    // SAFETY: as above; the call reads the name and fills the union.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, request.as_mut_ptr()) } < 0 {
        return None;
    }
    let mtu = i32::from_ne_bytes(request[NAME_SIZE..NAME_SIZE + 4].try_into().ok()?);
    u16::try_from(mtu).ok()
}
