//! OCI images to files: what init runs in the guest, and what the owner's `coffer image` runs at home.
//!
//! Owns: digests, manifests, ocicrypt's layer format, decompression, unpacking, signature policy. Does not own:
//! where blobs come from ([`layout::Blobs`]), where keys come from ([`ocicrypt::KeySource`]), running anything.
//!
//! Every byte of a blob is hostile until its digest held, and every byte of an archive is hostile for ever: it
//! was the owner's tool that wrote it, not this one.
#![forbid(unsafe_code)]

pub mod config;
pub mod digest;
pub mod encrypt;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod ocicrypt;
pub mod openpgp;
pub mod pipeline;
pub mod policy;
pub mod reference;
pub mod removal;
pub mod tar;
pub mod unpack;

#[cfg(test)]
mod testing;
