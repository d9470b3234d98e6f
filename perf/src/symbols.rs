//! Where instructions go: from counts by address to counts by function, and by the source's directory.
//!
//! Owns: reading the plugin's `addresses`, a kernel's `System.map` and the list of directories that `perf/peer-kernel` makes.
//! The first two must be of the same kernel.

use std::{collections::BTreeMap, fmt::Write};

use thiserror::Error;

/// One of the files is not what it should be.
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

/// Adds up `functions` by the directory of their source. `list` has lines `FUNCTION DIRECTORY`; a function that it has in
/// several directories, or not at all, is in `several` or `unknown`.
///
/// # Errors
/// [`SymbolsError`], naming the line of `list`.
pub fn by_directory(
    functions: &BTreeMap<String, Function>,
    list: &str,
) -> Result<BTreeMap<String, Function>, SymbolsError> {
    let mut directories: BTreeMap<&str, &str> = BTreeMap::new();
    for (index, line) in list.lines().enumerate() {
        let Some((function, directory)) = line.split_once(' ') else {
            let (file, wanted) = ("list of directories", "FUNCTION DIRECTORY");
            return Err(SymbolsError { file, line: index + 1, wanted });
        };
        let known = directories.entry(function).or_insert(directory);
        if *known != directory {
            *known = "several";
        }
    }
    let mut table: BTreeMap<String, Function> = BTreeMap::new();
    for (name, function) in functions {
        let directory = directories.get(name.as_str()).copied().unwrap_or("unknown");
        let sum = table.entry(directory.to_owned()).or_default();
        sum.instructions = sum.instructions.saturating_add(function.instructions);
        sum.string_steps = sum.string_steps.saturating_add(function.string_steps);
        sum.calls = sum.calls.saturating_add(function.calls);
    }
    Ok(table)
}

/// The `most` rows with the most instructions, as Markdown; `what` they are, functions or directories.
#[must_use]
pub fn table(what: &str, functions: &BTreeMap<String, Function>, most: usize) -> String {
    let total: u64 = functions.values().map(|f| f.instructions).sum();
    let mut rows: Vec<_> = functions.iter().collect();
    rows.sort_by_key(|(name, f)| (std::cmp::Reverse(f.instructions), *name));
    let mut text = format!("| {what} | instructions | % | calls | string steps |\n|---|---|---|---|---|\n");
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
        let text = table("function", &found, 1);
        assert!(text.contains("| `start` | 9 | 50.0 | 3 | 0 |") && text.contains("| all 3 | 18 |"), "{text}");
    }

    #[test]
    fn functions_of_one_directory_are_added_up() {
        let of = |instructions| Function { instructions, string_steps: 1, calls: 2 };
        let functions = [("a", of(3)), ("b", of(5)), ("init", of(7)), ("new", of(9))];
        let functions = functions.map(|(name, f)| (name.to_owned(), f)).into();
        let list = "a kernel/sched\nb kernel/sched\ninit drivers/acpi\ninit fs/ext4\ninit drivers/acpi\n";
        let found = by_directory(&functions, list).unwrap();
        assert_eq!(found["kernel/sched"], Function { instructions: 8, string_steps: 2, calls: 4 });
        assert_eq!((found["several"].instructions, found["unknown"].instructions), (7, 9));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn a_broken_line_is_named() {
        assert_eq!(
            attribute("1000 3\nx", MAP).unwrap_err().to_string(),
            "addresses, line 2: wanted ADDRESS COUNT [s]"
        );
        assert_eq!(attribute("", "1000 T").unwrap_err().file, "System.map");
        let error = by_directory(&BTreeMap::new(), "a b\nc").unwrap_err();
        assert_eq!(error.to_string(), "list of directories, line 2: wanted FUNCTION DIRECTORY");
    }

    proptest! {
        #[test]
        fn any_text_is_a_table_or_an_error(addresses in "\\PC*", map in "\\PC*", n in any::<u64>()) {
            let _ = attribute(&addresses, &map);
            let _ = by_directory(&BTreeMap::new(), &map);
            let twice = attribute(&format!("1000 {n}\n1001 {n}\n"), MAP);
            prop_assert!(twice.is_ok());
        }
    }
}
