//! The measured shim: what runs first in every guest
