//! The Intel MultiProcessor table (specification 1.4): processors and interrupts for a guest without ACPI.
//!
//! Owns: its bytes. Not used under SNP, where Linux does not look for it.

use coffer_layout::boot::{MP_TABLE, MP_TABLE_MAX};

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const VERSION: u8 = 0x14;

/// The floating pointer, 16 bytes.
#[must_use]
pub fn pointer() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&(MP_TABLE as u32).to_le_bytes());
    bytes[8] = 1;
    bytes[9] = 4;
    bytes[10] = checksum(&bytes);
    bytes
}

/// Writes the table for `processors` (at most 64) and returns its length.
pub fn write(processors: u32, table: &mut [u8; MP_TABLE_MAX as usize]) -> usize {
    let mut at = 44;
    let mut entries: u16 = 0;
    let mut put = |bytes: &[u8]| {
        table[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
        entries += 1;
    };
    for id in 0..processors as u8 {
        let flags = if id == 0 { 3 } else { 1 };
        let mut cpu = [0; 20];
        cpu[..4].copy_from_slice(&[0, id, VERSION, flags]);
        // Family 6 with an FPU and a local APIC; Linux asks CPUID.
        cpu[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        cpu[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        put(&cpu);
    }
    put(&[1, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic = processors as u8;
    let mut io = [2, ioapic, 0x11, 1, 0, 0, 0, 0];
    io[4..].copy_from_slice(&IOAPIC.to_le_bytes());
    put(&io);
    for irq in 0..16u8 {
        // Conforming polarity and trigger: what ISA has, high and edge. Pin 0 is the timer's, which is not wired.
        if irq != 2 {
            put(&[3, 0, 0, 0, 0, irq, ioapic, irq]);
        }
    }
    put(&[4, 3, 0, 0, 0, 0, 0, 0]);
    put(&[4, 1, 0, 0, 0, 0, 0xff, 1]);
    let length = at;
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&(length as u16).to_le_bytes());
    table[6] = 4;
    table[8..28].copy_from_slice(b"COFFER  MICROVM     ");
    table[34..36].copy_from_slice(&entries.to_le_bytes());
    table[36..40].copy_from_slice(&LAPIC.to_le_bytes());
    table[7] = checksum(&table[..length]);
    length
}

/// The byte that makes the sum zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_for_1_to_64_processors_fit_and_sum_to_zero() {
        for processors in 1..=64 {
            let mut table = [0; MP_TABLE_MAX as usize];
            let length = write(processors, &mut table);
            assert_eq!(sum(&table[..length]), 0);
            assert_eq!(length, 44 + 20 * processors as usize + 8 * 19);
            assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, length);
            assert_eq!(u16::from_le_bytes([table[34], table[35]]) as u32, processors + 19);
        }
        assert_eq!(sum(&pointer()), 0);
    }
}
