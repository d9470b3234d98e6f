//! The VMM
