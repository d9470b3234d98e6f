//! The IGVM image tool
