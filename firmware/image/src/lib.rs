//! The IGVM image tool: packs shim, kernel, initramfs and command line into one file, shows what is in one, and computes
//! what hardware will measure.
//!
//! Owns: the layout of an image, its readable form, its launch digest. Does not own: launching it, the shim's code.
#![forbid(unsafe_code)]

pub mod build;
pub mod command_line;
pub mod id_block;
pub mod inspect;
pub mod kernel;
pub mod measure;
mod page_tables;
pub mod platform;
pub mod reference;
pub mod shim;
pub mod sites;
