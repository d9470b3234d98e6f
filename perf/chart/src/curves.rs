//! Distributions and times against a number.

use crate::{
    axis::{Axis, draw_x, draw_y},
    svg::{Anchor, Svg, colour, text_width},
};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = WIDTH - 24.0;
const TOP: f64 = 80.0;
const BOTTOM: f64 = HEIGHT - 52.0;

/// One line of a plot.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// Its points: for [`lines`] (x, y); for [`cdf`] samples are the x, and y is not looked at.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// From samples, for [`cdf`].
    #[must_use]
    pub fn of_samples(name: impl Into<String>, samples: &[f64]) -> Self {
        Self { name: name.into(), points: samples.iter().map(|s| (*s, 0.0)).collect() }
    }
}

/// The part of the samples (in per cent) that is at most x, as steps. `x_name` names window and unit.
#[must_use]
pub fn cdf(title: &str, x_name: &str, curves: &[Curve]) -> String {
    let stepped: Vec<Curve> = curves
        .iter()
        .map(|curve| {
            let mut samples: Vec<f64> = curve.points.iter().map(|p| p.0).filter(|x| x.is_finite()).collect();
            samples.sort_by(f64::total_cmp);
            let part = |i: usize| i as f64 * 100.0 / samples.len() as f64;
            let points =
                samples.iter().enumerate().flat_map(|(i, x)| [(*x, part(i)), (*x, part(i + 1))]).collect();
            Curve { name: curve.name.clone(), points }
        })
        .collect();
    plot(title, x_name, "% of starts", &stepped, Some(100.0), false)
}

/// Points joined by lines.
#[must_use]
pub fn lines(title: &str, x_name: &str, y_name: &str, curves: &[Curve]) -> String {
    plot(title, x_name, y_name, curves, None, true)
}

fn plot(
    title: &str,
    x_name: &str,
    y_name: &str,
    curves: &[Curve],
    y_most: Option<f64>,
    dots: bool,
) -> String {
    let finite = |curve: &Curve| -> Vec<(f64, f64)> {
        curve.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let all: Vec<(f64, f64)> = curves.iter().flat_map(finite).collect();
    let most = |of: fn(&(f64, f64)) -> f64| all.iter().map(of).fold(0.0, f64::max);
    let x = Axis::new(most(|p| p.0), 8, LEFT, RIGHT);
    let y = Axis::new(y_most.unwrap_or_else(|| most(|p| p.1)), 5, BOTTOM, TOP);
    let mut svg = Svg::new(WIDTH, HEIGHT, title);
    draw_x(&mut svg, &x, TOP, BOTTOM, x_name);
    draw_y(&mut svg, &y, LEFT, RIGHT, y_name);
    for (index, curve) in curves.iter().enumerate() {
        let points: Vec<(f64, f64)> = finite(curve).iter().map(|p| (x.at(p.0), y.at(p.1))).collect();
        svg.polyline(&points, colour(index));
        if dots {
            points.iter().for_each(|p| svg.dot(p.0, p.1, colour(index)));
        }
    }
    legend(&mut svg, curves.iter().map(|c| c.name.as_str()), RIGHT, 44.0);
    svg.finish()
}

/// Names with their colours in one row that ends at `right`.
pub(crate) fn legend<'a>(svg: &mut Svg, names: impl Iterator<Item = &'a str>, right: f64, y: f64) {
    let names: Vec<&str> = names.collect();
    let mut x = right - names.iter().map(|n| text_width(n) + 26.0).sum::<f64>();
    for (index, name) in names.into_iter().enumerate() {
        svg.rect(x, y - 9.0, 10.0, 10.0, colour(index), name);
        svg.text(x + 14.0, y, name, Anchor::Start);
        x += text_width(name) + 26.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_at_a_hundred_per_cent_whatever_the_order() {
        let one = cdf("t", "ms", &[Curve::of_samples("a", &[3.0, 1.0, 2.0])]);
        let other = cdf("t", "ms", &[Curve::of_samples("a", &[1.0, f64::NAN, 2.0, 3.0])]);
        assert_eq!(one, other);
        let last = one.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert!(last.ends_with(&format!("{RIGHT:.2},{TOP:.2}")), "{last}");
    }

    #[test]
    fn nothing_is_a_plot_too() {
        assert!(lines("t", "x", "y", &[]).ends_with("</svg>\n"));
        assert!(
            !lines("t", "x", "y", &[Curve { name: "a".into(), points: vec![(f64::INFINITY, 1.0)] }])
                .contains("inf")
        );
    }
}
