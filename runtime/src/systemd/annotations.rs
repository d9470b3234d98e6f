//! Properties of a scope that a configuration's annotations name (`org.systemd.property.NAME`), as runc has them.
//!
//! Owns: which there are, and their values in GVariant's text. Does not own: what systemd does with them.

use std::collections::HashMap;

use super::message::Value;
use crate::error::Error;

const PREFIX: &str = "org.systemd.property.";
/// Types whose name may stand before a number; one without is an `int32`.
const NUMBERS: [&str; 7] = ["byte", "int16", "uint16", "int32", "uint32", "int64", "uint64"];

/// Those that are passed on, and the names of others.
pub(super) type Properties<'a> = (Vec<(&'static str, Value)>, Vec<&'a str>);

/// Reads them, in the order of their names.
///
/// # Errors
/// [`Error::Bundle`], naming the annotation.
pub(super) fn properties(annotations: &HashMap<String, String>) -> Result<Properties<'_>, Error> {
    let mut list: Vec<(&str, &str)> =
        annotations.iter().filter_map(|(key, text)| Some((key.strip_prefix(PREFIX)?, text.trim()))).collect();
    list.sort_unstable();
    let (mut known, mut others) = (Vec::new(), Vec::new());
    for (name, text) in list {
        let (property, value) = match name {
            "TimeoutStopUSec" => (name, number(text).map(Value::Number)),
            // As runc: in seconds, which systemd's own interface does not have.
            "TimeoutStopSec" => {
                let micros = number(text).and_then(|seconds: u64| seconds.checked_mul(1_000_000));
                ("TimeoutStopUSec", micros.map(Value::Number))
            }
            "KillSignal" => (name, number(text).map(Value::Signed)),
            "CollectMode" => (name, quoted(text).map(|text| Value::Text(text.to_owned()))),
            _ => {
                others.push(name);
                continue;
            }
        };
        let wrong =
            || Error::Bundle(format!("config.json: annotation {PREFIX}{name}={text}: no value of its type"));
        let property =
            ["TimeoutStopUSec", "KillSignal", "CollectMode"].into_iter().find(|own| *own == property);
        known.push((property.unwrap_or_default(), value.ok_or_else(wrong)?));
    }
    Ok((known, others))
}

/// A number, with its type or without.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = match text.split_once(' ') {
        Some((kind, digits)) if NUMBERS.contains(&kind) => digits.trim_start(),
        Some(_) => return None,
        None => text,
    };
    digits.parse().ok()
}

/// What stands between two quotation marks of a kind. The values in question have nothing to escape.
fn quoted(text: &str) -> Option<&str> {
    let inside = |mark| text.strip_prefix(mark)?.strip_suffix(mark);
    inside('\'').or_else(|| inside('"')).filter(|inside| !inside.contains(['\\', '\'', '"']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, text)| (format!("{PREFIX}{name}"), (*text).to_owned())).collect()
    }

    #[test]
    fn three_properties_are_passed_on_and_others_are_named() {
        let mut all = of(&[
            ("TimeoutStopUSec", "uint64 5000000"),
            ("KillSignal", "int32 37"),
            ("CollectMode", "'inactive-or-failed'"),
            ("DefaultDependencies", "true"),
            ("After", "['crio.service']"),
        ]);
        all.insert("io.container.manager".into(), "libpod".into());
        let (known, others) = properties(&all).unwrap();
        assert_eq!(
            known,
            [
                ("CollectMode", Value::Text("inactive-or-failed".into())),
                ("KillSignal", Value::Signed(37)),
                ("TimeoutStopUSec", Value::Number(5_000_000)),
            ]
        );
        assert_eq!(others, ["After", "DefaultDependencies"]);
        let seconds = of(&[("TimeoutStopSec", "10"), ("KillSignal", "15"), ("CollectMode", "\"inactive\"")]);
        let wanted = [
            ("CollectMode", Value::Text("inactive".into())),
            ("KillSignal", Value::Signed(15)),
            ("TimeoutStopUSec", Value::Number(10_000_000)),
        ];
        assert_eq!(properties(&seconds).unwrap().0, wanted);
    }

    #[test]
    fn what_is_no_value_is_named() {
        for (name, text) in [
            ("TimeoutStopUSec", "uint64 -1"),
            ("TimeoutStopUSec", "soon"),
            ("TimeoutStopSec", "uint64 18446744073709551615"),
            ("KillSignal", "'SIGTERM'"),
            ("CollectMode", "inactive"),
            ("CollectMode", "'"),
        ] {
            let message = properties(&of(&[(name, text)])).unwrap_err().to_string();
            assert!(message.contains(&format!("annotation org.systemd.property.{name}={text}")), "{message}");
        }
    }
}
