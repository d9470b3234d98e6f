//! ACPI tables for a guest that does not look for an MP table (ACPI 6.5, sections 5.2.5 to 5.2.12).
//!
//! Owns: RSDP, XSDT, FADT, an empty DSDT and the MADT, made from the number of processors alone. They are the shim's, so
//! that no table of the host's reaches the kernel's interpreter.

use coffer_layout::boot::{ACPI, ACPI_MAX};

const HEADER: usize = 36;
const RSDP_LENGTH: usize = 36;
const XSDT: usize = 0x40;
const XSDT_LENGTH: usize = HEADER + 16;
const DSDT: usize = 0x80;
const FADT: usize = 0xc0;
const FADT_LENGTH: usize = 276;
const MADT: usize = 0x200;

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
/// An ISA interrupt that no device has; the system control interrupt, which never fires.
const SCI: u16 = 13;
/// Ports that nothing answers on: all ones, "in ACPI mode", and writes go nowhere.
const PM1_EVENT: u32 = 0x600;
const PM1_CONTROL: u32 = 0x604;

/// Writes all tables for `processors` (at most 64) into zeroed memory at [`ACPI`]; the RSDP comes first.
pub fn write(processors: u32, memory: &mut [u8; ACPI_MAX as usize]) {
    let address = |offset: usize| ACPI + offset as u64;

    memory[..8].copy_from_slice(b"RSD PTR ");
    memory[9..15].copy_from_slice(b"COFFER");
    memory[15] = 2;
    memory[20..24].copy_from_slice(&(RSDP_LENGTH as u32).to_le_bytes());
    memory[24..32].copy_from_slice(&address(XSDT).to_le_bytes());
    memory[8] = checksum(&memory[..20]);
    memory[32] = checksum(&memory[..RSDP_LENGTH]);

    let xsdt = &mut memory[XSDT..XSDT + XSDT_LENGTH];
    xsdt[HEADER..HEADER + 8].copy_from_slice(&address(FADT).to_le_bytes());
    xsdt[HEADER + 8..].copy_from_slice(&address(MADT).to_le_bytes());
    seal(xsdt, b"XSDT", 1);

    seal(&mut memory[DSDT..DSDT + HEADER], b"DSDT", 2);

    let fadt = &mut memory[FADT..FADT + FADT_LENGTH];
    fadt[40..44].copy_from_slice(&(address(DSDT) as u32).to_le_bytes());
    fadt[46..48].copy_from_slice(&SCI.to_le_bytes());
    fadt[56..60].copy_from_slice(&PM1_EVENT.to_le_bytes());
    fadt[64..68].copy_from_slice(&PM1_CONTROL.to_le_bytes());
    fadt[88] = 4;
    fadt[89] = 2;
    // IA-PC boot architecture: no VGA, no CMOS clock.
    fadt[109..111].copy_from_slice(&(1u16 << 2 | 1 << 5).to_le_bytes());
    // WBINVD works; no power button, no sleep button.
    fadt[112..116].copy_from_slice(&(1u32 | 1 << 4 | 1 << 5).to_le_bytes());
    fadt[140..148].copy_from_slice(&address(DSDT).to_le_bytes());
    seal(fadt, b"FACP", 6);

    let mut at = MADT + HEADER + 8;
    let mut put = |bytes: &[u8]| {
        memory[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    for id in 0..processors as u8 {
        // A local APIC, enabled.
        put(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    let mut io = [1, 12, processors as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    io[4..8].copy_from_slice(&IOAPIC.to_le_bytes());
    put(&io);
    // NMI on LINT1 of every processor.
    put(&[4, 6, 0xff, 0, 0, 1]);
    let madt = &mut memory[MADT..at];
    madt[HEADER..HEADER + 4].copy_from_slice(&LAPIC.to_le_bytes());
    // There are two 8259s as well.
    madt[HEADER + 4] = 1;
    seal(madt, b"APIC", 4);
}

/// Writes a table's header and checksum.
fn seal(table: &mut [u8], signature: &[u8; 4], revision: u8) {
    let length = table.len() as u32;
    table[..4].copy_from_slice(signature);
    table[4..8].copy_from_slice(&length.to_le_bytes());
    table[8] = revision;
    table[10..16].copy_from_slice(b"COFFER");
    table[16..24].copy_from_slice(b"MICROVM ");
    table[24] = 1;
    table[28..32].copy_from_slice(b"CFFR");
    table[32] = 1;
    table[9] = 0;
    table[9] = checksum(table);
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

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// A table with its checksum checked.
    fn table(memory: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI) as usize;
        let length = u32::from_le_bytes(memory[at + 4..at + 8].try_into().unwrap()) as usize;
        let table = &memory[at..at + length];
        assert_eq!(sum(table), 0);
        table
    }

    #[test]
    fn tables_for_1_to_64_processors_are_found_from_the_rsdp() {
        for processors in 1..=64 {
            let mut memory = [0; ACPI_MAX as usize];
            write(processors, &mut memory);
            assert_eq!((&memory[..8], sum(&memory[..20]), sum(&memory[..36])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&memory, u64_at(&memory, 24));
            assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 52));
            let fadt = table(&memory, u64_at(xsdt, 36));
            assert_eq!((&fadt[..4], fadt.len(), fadt[8]), (&b"FACP"[..], 276, 6));
            assert_eq!(&table(&memory, u64_at(fadt, 140))[..4], b"DSDT");
            let madt = table(&memory, u64_at(xsdt, 44));
            assert_eq!(&madt[..4], b"APIC");
            // Walked as the specification says: type and length of each structure.
            let (mut at, mut ids, mut ioapics) = (44, Vec::new(), 0);
            while at < madt.len() {
                match madt[at] {
                    0 => {
                        assert_eq!(madt[at + 4], 1);
                        ids.push(madt[at + 3]);
                    }
                    1 => ioapics += 1,
                    _ => {}
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!((at, ioapics), (madt.len(), 1));
            assert_eq!(ids, (0..processors as u8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn no_device_has_the_system_control_interrupt() {
        assert!(!coffer_layout::MMIO_IRQS.contains(&u32::from(SCI)));
        assert_ne!(u32::from(SCI), coffer_layout::SERIAL_IRQ);
    }
}
