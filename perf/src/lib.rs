//! The boot-latency harness
