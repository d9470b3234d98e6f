//! Making the initramfs
