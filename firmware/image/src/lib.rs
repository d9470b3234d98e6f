//! The IGVM image tool: packs shim, kernel, initramfs and command line into one file, and shows what is in one.
//!
//! Owns: the layout of an image and its readable form. Does not own: launching it, the shim's code.
#![forbid(unsafe_code)]

pub mod build;
pub mod command_line;
pub mod inspect;
pub mod kernel;
mod page_tables;
