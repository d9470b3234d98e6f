//! Where instructions go: from counts by address to counts by function.
//!
//! Owns: reading the plugin's `addresses` and a kernel's `System.map`. The two must be of the same kernel.

use std::{collections::BTreeMap, fmt::Write};

use thiserror::Error;

/// One of the two files is not what it should be.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{file}, line {line}: wanted {wanted}")]
pub struct SymbolsError {
    file: &'static str,
    /// From 1.
    line: usize,
    wanted: &'static str,
}

/// Counts of one function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Function {
    /// Instructions, repeated string instructions left out.
    pub instructions: u64,
    /// Steps of repeated string instructions.
    pub string_steps: u64,
    /// How often its first instruction ran.
    pub calls: u64,
}

/// Attributes `addresses` (lines `ADDRESS COUNT [s]`) to the functions of `map` (lines `ADDRESS TYPE NAME`). What is in
/// none has the name `outside`.
///
/// # Errors
/// [`SymbolsError`], naming file and line.
pub fn attribute(addresses: &str, map: &str) -> Result<BTreeMap<String, Function>, SymbolsError> {
    let starts = functions(map)?;
    let mut table: BTreeMap<String, Function> = BTreeMap::new();
    for (index, line) in addresses.lines().enumerate() {
        let wrong = SymbolsError { file: "addresses", line: index + 1, wanted: "ADDRESS COUNT [s]" };
        let mut words = line.split_whitespace();
        let address = words.next().and_then(|w| u64::from_str_radix(w, 16).ok());
        let (Some(address), Some(count)) = (address, words.next().and_then(|w| w.parse::<u64>().ok())) else {
            return Err(wrong);
        };
        let (start, name) =
            starts.range(..=address).next_back().map_or((0, "outside"), |(a, n)| (*a, n.as_str()));
        let function = table.entry(name.to_owned()).or_default();
        match words.next() {
            None => function.instructions = function.instructions.saturating_add(count),
            Some("s") => function.string_steps = function.string_steps.saturating_add(count),
            Some(_) => return Err(wrong),
        }
        if start == address {
            function.calls = function.calls.saturating_add(count);
        }
    }
    Ok(table)
}

fn functions(map: &str) -> Result<BTreeMap<u64, String>, SymbolsError> {
    let mut starts = BTreeMap::new();
    for (index, line) in map.lines().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(address), [_, kind, name]) =
            (words.first().and_then(|w| u64::from_str_radix(w, 16).ok()), words.as_slice())
        else {
            return Err(SymbolsError { file: "System.map", line: index + 1, wanted: "ADDRESS TYPE NAME" });
        };
        if matches!(*kind, "t" | "T" | "w" | "W") {
            starts.insert(address, (*name).to_owned());
        }
    }
    Ok(starts)
}

/// The `most` functions with the most instructions, as Markdown.
#[must_use]
pub fn table(functions: &BTreeMap<String, Function>, most: usize) -> String {
    let total: u64 = functions.values().map(|f| f.instructions).sum();
    let mut rows: Vec<_> = functions.iter().collect();
    rows.sort_by_key(|(name, f)| (std::cmp::Reverse(f.instructions), *name));
    let mut text =
        String::from("| function | instructions | % | calls | string steps |\n|---|---|---|---|---|\n");
    for (name, f) in rows.into_iter().take(most) {
        let part = f.instructions as f64 * 100.0 / total.max(1) as f64;
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "| `{name}` | {} | {part:.1} | {} | {} |",
            f.instructions, f.calls, f.string_steps
        );
    }
    let strings: u64 = functions.values().map(|f| f.string_steps).sum();
    let _ = writeln!(text, "| all {} | {total} | 100 | | {strings} |", functions.len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAP: &str = "1000 T start\n1010 d table\n1020 t memset\n";

    #[test]
    fn counts_go_to_the_function_below_them() {
        let found = attribute("1000 3\n1004 5\n1015 1\n1020 2\n1028 90 s\nfff 7\n", MAP).unwrap();
        assert_eq!(found["start"], Function { instructions: 9, string_steps: 0, calls: 3 });
        assert_eq!(found["memset"], Function { instructions: 2, string_steps: 90, calls: 2 });
        assert_eq!(found["outside"].instructions, 7);
        let text = table(&found, 1);
        assert!(text.contains("| `start` | 9 | 50.0 | 3 | 0 |") && text.contains("| all 3 | 18 |"), "{text}");
    }

    #[test]
    fn a_broken_line_is_named() {
        assert_eq!(
            attribute("1000 3\nx", MAP).unwrap_err().to_string(),
            "addresses, line 2: wanted ADDRESS COUNT [s]"
        );
        assert_eq!(attribute("", "1000 T").unwrap_err().file, "System.map");
    }

    proptest! {
        #[test]
        fn any_text_is_a_table_or_an_error(addresses in "\\PC*", map in "\\PC*", n in any::<u64>()) {
            let _ = attribute(&addresses, &map);
            let twice = attribute(&format!("1000 {n}\n1001 {n}\n"), MAP);
            prop_assert!(twice.is_ok());
        }
    }
}
