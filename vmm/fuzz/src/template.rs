//! The state file of a template.

use coffer_vmm::template::format::{read, wrap, write};
use serde_json::{Value, json};

/// The input as a file, and as the body of one whose header is right.
pub fn state(data: &[u8]) {
    let _ = read(data);
    let Ok(state) = read(&wrap(data)) else { return };
    assert_eq!(state.processors.len(), state.shape.vcpus as usize);
    let end = u64::MAX >> 1;
    assert!(
        state
            .extents
            .iter()
            .all(|e| e.size > 0 && e.gpa.checked_add(e.size).is_some_and(|after| after < end))
    );
    // What was understood is understood again, and says the same.
    let again = write(&state);
    let state = read(&again).expect("what was written is read");
    assert_eq!(write(&state), again);
}

/// A small one. KVM's structures read as zero where bytes are missing.
#[must_use]
pub fn body() -> Vec<u8> {
    let none: [u8; 0] = [];
    let identity = json!({ "device": 1, "inode": 2, "size": 3, "modified": [4, 5], "changed": [6, 7] });
    let content = json!({ "identity": identity, "sha256": "00" });
    let chip = |id: u8| json!([id]);
    let processor = json!({
        "mp_state": none, "regs": none, "sregs": none, "xsave": none, "xcrs": none, "debug": none, "lapic": none,
        "msrs": [[16, 0, 0, 0, 0, 0, 0, 0, 9]], "events": none, "tsc_khz": 1
    });
    let queue = json!({ "size": 16, "ready": true, "descriptors": 4096, "available": 8192, "used": 12288, "next": 1 });
    let window = json!({
        "slot": 1, "device_type": 19, "status": 15, "interrupt_status": 0, "driver_features": 1u64 << 32,
        "device_features_select": 1, "driver_features_select": 1, "queue_select": 0, "queues": [queue], "device": true
    });
    let state: Value = json!({
        "shape": { "memory_mib": 64, "vcpus": 1, "vsock": true, "fs": true, "nets": 0 },
        "host_run": "x", "cpuid": "00", "image": content, "program": content, "memory": identity,
        "extents": [{ "gpa": 4096, "size": 4096 }], "clock_ns": 5, "chips": [chip(0), chip(1), chip(2)],
        "processors": [processor], "windows": [window]
    });
    state.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_is_a_state() {
        assert!(read(&wrap(&body())).is_ok(), "{:?}", read(&wrap(&body())).err());
    }
}
