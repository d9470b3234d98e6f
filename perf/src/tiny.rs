//! A guest that reports at once: an ELF kernel whose first instructions write a mark and halt.
//!
//! Owns: its bytes. It starts by the PVH note (Xen's ELF note 18), which QEMU, Cloud Hypervisor and others take.

use coffer_layout::{MARK_PORT, mark};

const LOADED_AT: u64 = 0x10_0000;
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit entry point.
const PVH_NOTE: u32 = 18;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The whole file.
#[must_use]
pub fn kernel() -> Vec<u8> {
    // 32-bit: mov dx, MARK_PORT; mov al, KERNEL_ENTRY; out dx, al; hlt; jmp to the hlt
    let [low, high] = MARK_PORT.to_le_bytes();
    let code = [0x66, 0xba, low, high, 0xb0, mark::KERNEL_ENTRY, 0xee, 0xf4, 0xeb, 0xfd];
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let note_size = 12 + 4 + 8;
    let code_at = note_at + note_size;
    let entry = LOADED_AT + code_at;
    let end = code_at + code.len() as u64;

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let word = |file: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let long = |file: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    half(&mut file, &[2, 62]); // executable, x86-64
    word(&mut file, &[1]);
    long(&mut file, &[entry, HEADER, 0]);
    word(&mut file, &[0]);
    half(&mut file, &[HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0]);
    word(&mut file, &[PT_LOAD, 7]);
    long(&mut file, &[0, LOADED_AT, LOADED_AT, end, end, 0x1000]);
    word(&mut file, &[PT_NOTE, 4]);
    long(&mut file, &[note_at, LOADED_AT + note_at, LOADED_AT + note_at, note_size, note_size, 4]);
    word(&mut file, &[4, 8, PVH_NOTE]);
    file.extend(b"Xen\0");
    long(&mut file, &[entry]);
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// binutils reads it as what it is meant to be.
    #[test]
    fn readelf_sees_a_kernel_with_a_pvh_note() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), kernel()).unwrap();
        let output = Command::new("readelf").args(["-hln"]).arg(file.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(warnings.is_empty(), "{warnings}");
        assert!(text.contains("Entry point address:               0x1000c8"), "{text}");
        assert!(text.contains("Xen") && text.contains("0x00000012"), "{text}");
    }
}
