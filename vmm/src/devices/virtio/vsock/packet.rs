//! The vsock packet header (virtio 1.2, 5.10.6): 44 bytes, little endian.
//!
//! Owns: its fields and numbers. Does not own: what a packet does to a connection.

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
pub(super) const TYPE_STREAM: u16 = 1;
/// SHUTDOWN flag: the sender will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) target_cid: u64,
    pub(super) source_port: u32,
    pub(super) target_port: u32,
    pub(super) length: u32,
    pub(super) kind: u16,
    /// `None` for a number that means nothing.
    pub(super) op: Option<Op>,
    pub(super) flags: u32,
    pub(super) buffer: u32,
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            source_cid: u64_at(0),
            target_cid: u64_at(8),
            source_port: u32_at(16),
            target_port: u32_at(20),
            length: u32_at(24),
            kind: u16_at(28),
            op: Op::from_raw(u16_at(30)),
            flags: u32_at(32),
            buffer: u32_at(36),
            forwarded: u32_at(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.target_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.target_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_with_a_known_op_reads_back_as_itself(bytes in prop::array::uniform32(any::<u8>()), op in 1u16..8) {
            let mut header = [0; HEADER];
            header[..32].copy_from_slice(&bytes);
            header[30..32].copy_from_slice(&op.to_le_bytes());
            prop_assert_eq!(Header::from_bytes(&header).to_bytes(), header);
        }
    }
}
