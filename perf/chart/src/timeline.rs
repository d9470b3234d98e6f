//! One boot, stage by stage, as `systemd-analyze plot` draws a machine's.

use crate::{
    axis::{Axis, draw_x},
    svg::{Anchor, Svg, colour, text_width},
};

const WIDTH: f64 = 980.0;
const ROW: f64 = 24.0;
const TOP: f64 = 56.0;

/// One stage of a boot.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Its name.
    pub name: String,
    /// Who worked: spans of the same owner have the same colour.
    pub owner: String,
    /// Milliseconds from the first stage's beginning.
    pub from_ms: f64,
    /// Milliseconds, at least `from_ms`.
    pub to_ms: f64,
}

/// Each span in a row of its own, in the order given. `notes` are lines of text below.
#[must_use]
pub fn timeline(title: &str, spans: &[Span], notes: &[String]) -> String {
    let spans: Vec<&Span> = spans.iter().filter(|s| s.from_ms.is_finite() && s.to_ms.is_finite()).collect();
    let mut owners: Vec<&str> = Vec::new();
    for span in &spans {
        if !owners.contains(&span.owner.as_str()) {
            owners.push(&span.owner);
        }
    }
    let bottom = TOP + ROW * spans.len() as f64;
    // Room at the right for the name of a stage that is short and late.
    let axis = Axis::new(spans.iter().map(|s| s.to_ms).fold(0.0, f64::max), 10, 24.0, WIDTH - 210.0);
    let mut svg = Svg::new(WIDTH, bottom + 48.0 + 18.0 * notes.len() as f64, title);
    draw_x(&mut svg, &axis, TOP, bottom, "ms from the start of the VMM's process, the host's clock");
    for (index, span) in spans.iter().enumerate() {
        let y = TOP + ROW * index as f64 + 3.0;
        let (from, to) = (axis.at(span.from_ms), axis.at(span.to_ms));
        let label = format!("{}  {}", span.name, milliseconds(span.to_ms - span.from_ms));
        let which = owners.iter().position(|o| *o == span.owner).unwrap_or(0);
        svg.rect(from, y, to - from, ROW - 6.0, colour(which), &format!("{}: {label}", span.owner));
        svg.text(to.max(from + 1.0) + 6.0, y + 13.0, &label, Anchor::Start);
    }
    let mut x = WIDTH - 24.0 - owners.iter().map(|o| text_width(o) + 26.0).sum::<f64>();
    for (index, owner) in owners.iter().enumerate() {
        svg.rect(x, 34.0 - 9.0, 10.0, 10.0, colour(index), owner);
        svg.text(x + 14.0, 34.0, owner, Anchor::Start);
        x += text_width(owner) + 26.0;
    }
    for (index, note) in notes.iter().enumerate() {
        svg.text(24.0, bottom + 56.0 + 18.0 * index as f64, note, Anchor::Start);
    }
    svg.finish()
}

/// Three figures.
fn milliseconds(ms: f64) -> String {
    match ms {
        ms if ms >= 100.0 => format!("{ms:.0} ms"),
        ms if ms >= 10.0 => format!("{ms:.1} ms"),
        ms => format!("{ms:.2} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_has_its_length() {
        let span =
            |name: &str, from_ms, to_ms| Span { name: name.into(), owner: "VMM".into(), from_ms, to_ms };
        let svg = timeline("t", &[span("image", 0.0, 1.25), span("kernel", 1.25, 200.0)], &["n".into()]);
        assert!(svg.contains("image  1.25 ms") && svg.contains("kernel  199 ms"), "{svg}");
        assert_eq!(svg.matches("<title>VMM: ").count(), 2);
    }
}
