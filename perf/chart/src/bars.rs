//! Stacked bars: where the time of each thing went.

use crate::{
    axis::{Axis, draw_x},
    curves::legend,
    svg::{Anchor, Svg, colour, text_width},
};

const WIDTH: f64 = 860.0;
const ROW: f64 = 34.0;
const TOP: f64 = 66.0;

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Its name, at its left.
    pub name: String,
    /// Its parts in order: name and length.
    pub parts: Vec<(String, f64)>,
}

/// Bars one below the other; parts of the same name have the same colour. `x_name` names window and unit.
#[must_use]
pub fn bars(title: &str, x_name: &str, rows: &[Bar]) -> String {
    let sum = |bar: &Bar| bar.parts.iter().map(|p| p.1).filter(|l| l.is_finite()).sum::<f64>();
    let left = 28.0 + rows.iter().map(|r| text_width(&r.name)).fold(40.0, f64::max);
    let right = WIDTH - 70.0;
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in rows.iter().flat_map(|r| &r.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    // A legend that is too long for one row gets several.
    let mut legends: Vec<Vec<usize>> = vec![Vec::new()];
    let mut used = 0.0;
    for (index, name) in names.iter().enumerate() {
        let width = text_width(name) + 26.0;
        if used + width > WIDTH - 40.0 {
            legends.push(Vec::new());
            used = 0.0;
        }
        used += width;
        if let Some(row) = legends.last_mut() {
            row.push(index);
        }
    }
    let top = TOP + 18.0 * (legends.len() - 1) as f64;
    let bottom = top + ROW * rows.len() as f64;
    let axis = Axis::new(rows.iter().map(sum).fold(0.0, f64::max), 8, left, right);
    let mut svg = Svg::new(WIDTH, bottom + 48.0, title);
    draw_x(&mut svg, &axis, top, bottom, x_name);
    for (index, bar) in rows.iter().enumerate() {
        let y = top + ROW * index as f64 + 5.0;
        svg.text(left - 8.0, y + 16.0, &bar.name, Anchor::End);
        let mut at = 0.0;
        for (name, length) in bar.parts.iter().filter(|p| p.1.is_finite() && p.1 > 0.0) {
            let (from, to) = (axis.at(at), axis.at(at + length));
            let which = names.iter().position(|n| n == name).unwrap_or(0);
            svg.rect(from, y, to - from, ROW - 10.0, colour(which), &format!("{name}: {length:.1}"));
            let label = format!("{length:.0}");
            if to - from > text_width(&label) + 6.0 {
                svg.white((from + to) / 2.0, y + 16.0, &label);
            }
            at += length;
        }
        svg.text(axis.at(at) + 6.0, y + 16.0, &format!("{at:.0}"), Anchor::Start);
    }
    if names.len() > 1 {
        let mut y = 44.0;
        for row in &legends {
            let mut x = 16.0;
            for index in row {
                svg.rect(x, y - 9.0, 10.0, 10.0, colour(*index), names[*index]);
                svg.text(x + 14.0, y, names[*index], Anchor::Start);
                x += text_width(names[*index]) + 26.0;
            }
            y += 18.0;
        }
    } else {
        legend(&mut svg, names.into_iter(), WIDTH - 24.0, 44.0);
    }
    svg.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_says_its_sum_and_leaves_out_what_is_no_number() {
        let parts = vec![("kernel".to_owned(), 40.0), ("init".to_owned(), 2.0), ("x".to_owned(), f64::NAN)];
        let svg = bars("t", "ms", &[Bar { name: "a".into(), parts }]);
        assert!(svg.contains(">42</text>"), "{svg}");
        assert!(!svg.contains("NaN"));
    }
}
