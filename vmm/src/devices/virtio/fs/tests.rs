//! Real FUSE requests through the device's queues, against a temporary directory.

mod client;
mod hostile;
mod posix;
