//! The OCI command line and the stub
