//! Honest inputs, from which mutations start.

use coffer_fuzz::Seed;
use coffer_layout::{
    PAGE,
    snp::{SHARED_BASE, VMSA_GPA},
};
use coffer_vmm::tee::snp::vmsa::Vmsa;

use crate::devices::step;

/// Where the pages of a file of [`crate::image::whole`] begin.
pub const PAGES: u32 = 0x1000;

/// All of them.
#[must_use]
pub fn all() -> Vec<Seed> {
    vec![
        ("igvm", "native", native()),
        ("igvm", "snp", snp()),
        ("parameter-page", "small", vec![64, 0, 0, 1, 0, 0, 0x40, 0]),
        ("parameter-page", "large", vec![0, 0x20, 0, 64, 1, 0, 0x40, 0]),
        ("ghcb", "boot", ghcb()),
        ("ghcb", "exits", exits()),
        ("messages", "report", message(5, 96)),
        ("messages", "key", message(3, 32)),
        ("rng", "read", [start(), chain(0, &[], &[64, 5000]), vec![step::KICK, 0]].concat()),
        ("vsock", "connection", vsock()),
        ("blk", "requests", blk()),
        ("fs", "files", fs()),
        ("net", "packets", net()),
        ("mem", "blocks", mem()),
        ("template", "state", crate::template::body()),
    ]
}

fn number(value: u64, bytes: usize) -> Vec<u8> {
    let mut all = value.to_le_bytes().to_vec();
    all.resize(bytes, 0);
    all
}

/// A header of an IGVM file: numbers and their sizes in bytes.
fn header(kind: u32, fields: &[(u64, usize)]) -> Vec<u8> {
    let mut body: Vec<u8> = fields.iter().flat_map(|(value, bytes)| number(*value, *bytes)).collect();
    let mut bytes = [number(kind.into(), 4), number(body.len() as u64, 4)].concat();
    body.resize(body.len().next_multiple_of(8), 0);
    bytes.append(&mut body);
    bytes
}

fn platform(mask: u64, kind: u64) -> Vec<u8> {
    header(0x1, &[(mask, 4), (0, 1), (kind, 1), (1, 2), (0, 8)])
}

fn page(gpa: u64, mask: u64, index: Option<u32>, flags: u64, kind: u64) -> Vec<u8> {
    let offset = index.map_or(0, |index| PAGES + index * PAGE as u32);
    header(0x302, &[(gpa, 8), (mask, 4), (offset.into(), 4), (flags, 4), (kind, 2), (0, 2)])
}

fn parameters(mask: u64) -> Vec<u8> {
    [
        header(0x301, &[(PAGE, 8), (0, 4), (0, 4)]),
        header(0x307, &[(0, 4), (0, 4)]),
        header(0x30c, &[(0, 4), (64, 4)]),
        header(0x303, &[(0xa000, 8), (mask, 4), (0, 4)]),
    ]
    .concat()
}

/// Headers of an image for a plain VM.
#[must_use]
pub fn native() -> Vec<u8> {
    [
        platform(1, 0),
        parameters(1),
        page(0x1_0000, 1, Some(1), 0, 0),
        page(0x1_1000, 1, Some(2), 0, 0),
        page(0x10_0000, 1, None, 0, 0),
        header(0x305, &[(0x20_0000, 8), (1, 4), (0x1000, 4), (0, 8)]),
        header(0x304, &[(0, 8), (1, 4), (PAGES.into(), 4), (0, 2), (0, 2)]),
    ]
    .concat()
}

/// Headers of an image for SEV-SNP.
#[must_use]
pub fn snp() -> Vec<u8> {
    [
        platform(2, 2),
        header(0x101, &[(0x30000, 8), (2, 4), (0, 4)]),
        parameters(2),
        page(0x8000, 2, None, 0, 1),
        page(0x9000, 2, None, 0, 2),
        page(0xb000, 2, Some(1), 0, 0),
        page(0xc000, 2, Some(2), 0, 0),
        page(0xd000, 2, Some(3), 2, 0),
        page(SHARED_BASE + PAGE, 2, Some(4), 4, 0),
        header(0x304, &[(VMSA_GPA, 8), (2, 4), (PAGES.into(), 4), (0, 2), (0, 2)]),
    ]
    .concat()
}

/// A processor's state to start from, in 64-bit mode.
#[must_use]
pub fn vmsa() -> [u8; PAGE as usize] {
    let mut page = *Vmsa::of_reset().bytes();
    for (at, value) in [(0x158, 0x8001_0031), (0x150, 0xc000 | 1 << 47), (0xd0, 0x1500), (0x310, 0u64)] {
        page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// What the shim and a kernel ask for first.
fn ghcb() -> Vec<u8> {
    let message = |value: u64| [vec![0], number(value, 8)].concat();
    let pvalidate = |page: u64, how: u8| [vec![3], number(page, 3), vec![how]].concat();
    let change = |page: u64, operation: u64| message(operation << 52 | page << 12 | 0x014);
    [
        vec![6, 1, 0, 0],
        message(0x002),
        message(0x080),
        message(0x5000 | 0x012),
        message(1 << 32 | 2 << 30 | 0x004),
        pvalidate(512, 3),
        pvalidate(2, 2),
        pvalidate(2, 0),
        change(2, 2),
        change(2, 1),
        pvalidate(2, 2),
        vec![5, 2, 0, 0, 1],
        message(1 << 12 | 0x100),
    ]
    .concat()
}

/// Exits with a page.
fn exits() -> Vec<u8> {
    // Exit code, information 1 and 2, scratch; rax, rcx, rdx, rbx before them.
    let exit = |mask: u8, low: &[u64], code: u64, rest: [u64; 3], buffer: &[u8]| {
        let mut bytes = vec![1, 0xf0 | mask];
        low.iter().for_each(|value| bytes.extend(number(*value, 4)));
        [code, rest[0], rest[1], rest[2]].iter().for_each(|value| bytes.extend(number(*value, 8)));
        bytes.push(buffer.len() as u8);
        bytes.extend(buffer);
        bytes
    };
    let changes = [
        number(2 << 16, 8),
        number(2 << 52 | 3 << 12, 8),
        number(2 << 52 | 4 << 12, 8),
        number(1 << 52 | 4 << 12, 8),
    ];
    [
        exit(3, &[1, 0], 0x72, [0; 3], &[]),
        exit(1, &[0xc1], 0x7b, [0x80 << 16 | 0x10, 0, 0], &[]),
        exit(0, &[], 0x7b, [0x3f8 << 16 | 0x14, 3, 0x5800], b"abc"),
        exit(0, &[], 0x8000_0001, [0xd000_0000, 4, 0x5800], &[]),
        exit(0, &[], 0x8000_0002, [0xd000_0000, 4, 0x5800], &[1, 2, 3, 4]),
        exit(0, &[], 0x8000_0010, [0, 0, 0x5800], &changes.concat()),
        exit(9, &[0x9000, 4], 0x8000_0012, [0x6000, 0x7000, 0], &[]),
        exit(1, &[1], 0x8000_0013, [1 << 32 | 1, 0x2000, 0], &[]),
        exit(0, &[], 0x8000_fffe, [1, 2, 0], &[]),
    ]
    .concat()
}

/// A message of a type with so many bytes of text.
fn message(kind: u8, size: u16) -> Vec<u8> {
    let mut bytes = vec![0; 1 + 96 + usize::from(size)];
    for (at, value) in [(32, 1), (48, 1), (49, 1), (50, 96), (52, kind), (53, 1), (54, size as u8)] {
        bytes[1 + at] = value;
    }
    bytes
}

fn start() -> Vec<u8> {
    vec![step::START, 0, 0, 0, 0]
}

fn chain(queue: u8, readable: &[&[u8]], writable: &[u16]) -> Vec<u8> {
    let count = (readable.len() + writable.len()) as u8;
    let mut bytes = vec![step::CHAIN, queue, readable.len() as u8 | count << 2];
    for buffer in readable {
        bytes.extend(number(buffer.len() as u64, 2));
        bytes.extend(*buffer);
    }
    writable.iter().for_each(|length| bytes.extend(number((*length).into(), 2)));
    bytes
}

fn host(what: u8, bytes: &[u8]) -> Vec<u8> {
    [vec![step::HOST, what, bytes.len() as u8], bytes.to_vec()].concat()
}

/// The guest says that it listens, a host connects, both send, both end.
fn vsock() -> Vec<u8> {
    let packet = |guest: u64, port: u64, op: u64, flags: u64, data: &[u8]| {
        let fields = [
            (3, 8),
            (2, 8),
            (guest, 4),
            (port, 4),
            (data.len() as u64, 4),
            (1, 2),
            (op, 2),
            (flags, 4),
            (0x4_0000, 4),
            (0, 4),
        ];
        let header: Vec<u8> = fields.iter().flat_map(|(value, bytes)| number(*value, *bytes)).collect();
        chain(1, &[&header, data][..if data.is_empty() { 1 } else { 2 }], &[])
    };
    let room = || chain(0, &[], &[44, 512]);
    let port = 1 << 20;
    [
        start(),
        room(),
        room(),
        packet(1000, 1, 1, 0, &[]),
        host(0, b"CONNECT 5\n"),
        packet(5, port, 2, 0, &[]),
        host(1, b"to the guest"),
        room(),
        packet(5, port, 5, 0, b"to the host"),
        host(2, b""),
        packet(5, port, 7, 0, &[]),
        packet(5, port, 6, 0, &[]),
        packet(5, port, 4, 2, &[]),
        host(3, b""),
        room(),
        packet(5, port, 3, 0, &[]),
    ]
    .concat()
}

/// Read, write, flush, id, discard, write zeroes, something outside.
fn blk() -> Vec<u8> {
    let request = |kind: u64, sector: u64| [number(kind, 8), number(sector, 8)].concat();
    let range = |sector: u64, sectors: u64, flags: u64| {
        [number(sector, 8), number(sectors, 4), number(flags, 4)].concat()
    };
    [
        start(),
        chain(0, &[&request(0, 3)], &[1024, 1]),
        chain(0, &[&request(1, 5), &[0xab; 512]], &[1]),
        chain(0, &[&request(4, 0)], &[1]),
        chain(0, &[&request(8, 0)], &[20, 1]),
        chain(0, &[&request(11, 0), &range(8, 8, 0)], &[1]),
        chain(0, &[&request(13, 0), &range(16, 8, 1), &range(24, 8, 0)], &[1]),
        chain(0, &[&request(0, 127)], &[1024, 1]),
        vec![step::KICK, 0],
    ]
    .concat()
}

/// The host asks for blocks; PLUG, STATE, UNPLUG, too much, UNPLUG_ALL.
fn mem() -> Vec<u8> {
    let request = |kind: u64, block: u64, count: u64| {
        [number(kind, 8), number((4 << 30) + block * (2 << 20), 8), number(count, 8)].concat()
    };
    let requests = [(0, 0, 3), (3, 1, 4), (1, 1, 1), (0, 8, 1), (2, 0, 0)];
    let asks = requests.map(|(kind, block, count)| chain(0, &[&request(kind, block, count)], &[10]));
    [vec![start(), host(0, &[4, 8])], asks.to_vec(), vec![host(0, &[0, 0])]].concat().concat()
}

/// INIT, LOOKUP, OPEN, READ, WRITE, GETATTR, CREATE, READDIRPLUS, RELEASE, FORGET.
fn fs() -> Vec<u8> {
    let request = |opcode: u64, node: u64, body: &[u8]| {
        let fields = [
            (40 + body.len() as u64, 4),
            (opcode, 4),
            (opcode, 8),
            (node, 8),
            (0, 4),
            (0, 4),
            (7, 4),
            (0, 4),
        ];
        let header: Vec<u8> = fields.iter().flat_map(|(value, bytes)| number(*value, *bytes)).collect();
        (header, body.to_vec())
    };
    let call = |opcode, node, body: &[u8]| {
        let (header, body) = request(opcode, node, body);
        chain(1, &[&header, &body], &[16, 512])
    };
    let words = |fields: &[(u64, usize)]| -> Vec<u8> {
        fields.iter().flat_map(|(value, bytes)| number(*value, *bytes)).collect()
    };
    let transfer = words(&[(0, 8), (0, 8), (7, 4), (0, 4), (0, 8), (0, 4), (0, 4)]);
    let (forget, count) = request(2, 2, &number(1, 8));
    [
        start(),
        call(26, 0, &words(&[(7, 4), (41, 4), (0x2_0000, 4), (0xffff_ffff, 4), (0, 48)])),
        call(1, 1, b"f\0"),
        call(3, 2, &[0; 16]),
        call(14, 2, &words(&[(2, 4), (0, 4)])),
        call(15, 2, &transfer),
        call(16, 2, &[transfer.clone(), b"written".to_vec()].concat()),
        call(35, 1, &[words(&[(0x42, 4), (0o100_644, 4), (0, 4), (0, 4)]), b"new\0".to_vec()].concat()),
        call(9, 1, &[words(&[(0o755, 4), (0, 4)]), b"e\0".to_vec()].concat()),
        call(45, 1, &[words(&[(1, 8), (0, 8)]), b"f\0g\0".to_vec()].concat()),
        call(27, 1, &[0; 8]),
        call(44, 1, &words(&[(2, 8), (0, 8), (400, 4), (0, 4), (0, 8), (0, 4), (0, 4)])),
        call(18, 2, &[0; 24]),
        chain(0, &[&forget, &count], &[]),
        host(0, b"of the host"),
    ]
    .concat()
}

/// Buffers, a packet in, a packet out.
fn net() -> Vec<u8> {
    let mut packet = vec![0; 12 + 60];
    packet[12..24].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1]);
    [
        start(),
        chain(0, &[], &[12, 1500]),
        chain(0, &[], &[1512]),
        host(0, &packet),
        chain(1, &[&packet[..12], &packet[12..]], &[]),
        host(1, &packet),
    ]
    .concat()
}
