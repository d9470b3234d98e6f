//! Plots of boot times as SVG text: distributions, stacked stages, times against a number, one boot's timeline.
//! Also the stages' names, so that every plot has the same.
//!
//! Owns: how they look. Does not own: what is measured, and files. Every string given is escaped; numbers that are not
//! finite are left out.

#![forbid(unsafe_code)]

mod axis;
mod bars;
mod curves;
mod stage;
mod svg;
mod timeline;

pub use bars::{Bar, bars};
pub use curves::{Curve, cdf, lines};
pub use stage::{work_before, work_between};
pub use timeline::{Span, timeline};
