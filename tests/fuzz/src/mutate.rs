//! Changes inputs: bits, bytes, numbers on edges, pieces of themselves and of others.
//!
//! Owns: the mutations and the random numbers that choose them; what comes is the same for the same seed.

/// Numbers that sit on edges: of types, of pages, of a PC's memory.
const EDGES: [u64; 18] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x1ff,
    0xfff,
    0x1000,
    0xffff,
    0x9_fc00,
    0x10_0000,
    0xc000_0000,
    0xffff_ffff,
    1 << 32,
    512 << 30,
    u64::MAX >> 12,
    u64::MAX,
];

/// xorshift64*.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).max(1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    /// A number below `limit`; 0 when there is none.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Makes one to six changes; `other` lends pieces. No more than `longest` bytes come out.
pub(crate) fn mutate(data: &mut Vec<u8>, other: &[u8], random: &mut Random, longest: usize) {
    for _ in 0..=random.below(6) {
        change(data, other, random);
        data.truncate(longest);
    }
}

fn change(data: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(data.len());
    match random.below(12) {
        0 | 1 => {
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        2 => {
            if let Some(byte) = data.get_mut(at) {
                *byte = [0, 1, 0x20, 0x30, 0x37, 0x7f, 0x80, 0xff, random.next() as u8][random.below(9)];
            }
        }
        // A number where numbers are.
        3 | 4 => {
            let size = [2, 4, 8][random.below(3)];
            let edge = EDGES[random.below(EDGES.len())].wrapping_add(random.below(3) as u64).wrapping_sub(1);
            overwrite(data, at & !(size - 1), &edge.to_le_bytes()[..size]);
        }
        5 => data.truncate(at),
        6 => {
            let bytes: Vec<u8> = (0..random.below(64)).map(|_| random.next() as u8).collect();
            overwrite(data, at, &bytes);
        }
        7 => data.insert(at, random.next() as u8),
        8 => {
            let end = (at + random.below(64)).min(data.len());
            data.drain(at..end);
        }
        // Entries that are there twice, in place of others or beside them.
        9 => {
            let bytes = piece(data, random, 8).to_vec();
            overwrite(data, at & !7, &bytes);
        }
        10 => {
            let bytes = piece(data, random, 1).to_vec();
            data.splice(at..at, bytes);
        }
        _ => {
            let bytes = piece(other, random, 1);
            if random.below(2) == 0 {
                overwrite(data, at, bytes);
            } else {
                data.splice(at..at, bytes.iter().copied());
            }
        }
    }
}

/// A piece of up to 600 bytes whose place and length are multiples of `unit`.
fn piece<'a>(of: &'a [u8], random: &mut Random, unit: usize) -> &'a [u8] {
    let from = random.below(of.len()) / unit * unit;
    let length = [16, 96, 600][random.below(3)];
    let length = random.below(length) / unit * unit;
    &of[from..(from + length).min(of.len())]
}

fn overwrite(data: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if data.len() < end {
        data.resize(end, 0);
    }
    data[at..end].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_inputs_and_another_seed_others() {
        let inputs = |seed| {
            let (mut random, mut all) = (Random::new(seed), Vec::new());
            for _ in 0..500 {
                let mut data = b"0123456789abcdef".to_vec();
                mutate(&mut data, b"ABCDEF", &mut random, 64);
                assert!(data.len() <= 64);
                all.push(data);
            }
            all
        };
        assert_eq!(inputs(1), inputs(1));
        assert_ne!(inputs(1), inputs(2));
    }

    #[test]
    fn nothing_comes_of_nothing_without_harm() {
        let mut random = Random::new(3);
        for _ in 0..2000 {
            let mut data = Vec::new();
            mutate(&mut data, &[], &mut random, 16);
            assert!(data.len() <= 16);
        }
    }
}
