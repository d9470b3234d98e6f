//! Axes: from a range of values to round ticks and pixels.

use crate::svg::{Anchor, Svg};

/// Values from 0 to `most`, laid over pixels.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) most: f64,
    pub(crate) step: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Ends at a round number that is at least `most`.
    pub(crate) fn new(most: f64, ticks: u32, from: f64, to: f64) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let step = round_step(most / f64::from(ticks.max(1)));
        Self { most: (most / step - 1e-9).ceil().max(1.0) * step, step, from, to }
    }

    /// The pixel of a value.
    pub(crate) fn at(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * (value / self.most).clamp(0.0, 1.0)
    }

    /// All ticks with their labels.
    pub(crate) fn ticks(&self) -> impl Iterator<Item = (f64, String)> + '_ {
        let digits = if self.step >= 1.0 { 0 } else { (-self.step.log10()).ceil() as usize };
        let count = (self.most / self.step).round() as u32;
        (0..=count).map(move |i| {
            let value = f64::from(i) * self.step;
            (value, format!("{value:.digits$}"))
        })
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|s| *s >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

/// Vertical grid lines with labels below `bottom`, and the axis' name below them.
pub(crate) fn draw_x(svg: &mut Svg, axis: &Axis, top: f64, bottom: f64, name: &str) {
    for (value, label) in axis.ticks() {
        let x = axis.at(value);
        svg.line((x, top), (x, bottom), "#e4e4e4");
        svg.text(x, bottom + 16.0, &label, Anchor::Middle);
    }
    svg.text((axis.from + axis.to) / 2.0, bottom + 34.0, name, Anchor::Middle);
}

/// Horizontal grid lines with labels left of `left`, and the axis' name above the upper one.
pub(crate) fn draw_y(svg: &mut Svg, axis: &Axis, left: f64, right: f64, name: &str) {
    for (value, label) in axis.ticks() {
        let y = axis.at(value);
        svg.line((left, y), (right, y), "#e4e4e4");
        svg.text(left - 6.0, y + 4.0, &label, Anchor::End);
    }
    svg.text(16.0, axis.to - 12.0, name, Anchor::Start);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ticks_are_round() {
        let axis = Axis::new(1435.0, 5, 0.0, 100.0);
        let labels: Vec<String> = axis.ticks().map(|(_, l)| l).collect();
        assert_eq!(labels, ["0", "500", "1000", "1500"]);
        let small: Vec<String> = Axis::new(0.07, 5, 0.0, 1.0).ticks().map(|(_, l)| l).collect();
        assert_eq!(small, ["0.00", "0.02", "0.04", "0.06", "0.08"]);
    }

    proptest! {
        #[test]
        fn every_value_is_on_the_axis_and_ticks_are_few(most in 1e-9f64..1e15, part in 0.0f64..=1.0) {
            let axis = Axis::new(most, 6, 10.0, 500.0);
            prop_assert!(axis.most >= most * 0.999_999);
            prop_assert!((10.0..=500.0).contains(&axis.at(most * part)));
            prop_assert!(axis.ticks().count() <= 8);
        }
    }
}
