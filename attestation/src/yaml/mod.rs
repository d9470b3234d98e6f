//! YAML, as far as Kubernetes manifests need it: what `kubectl get -o yaml`, `podman kube generate` and people write.
//!
//! Here because no YAML crate is among those that this workspace builds from, and because what an owner signs off must not mean one thing
//! to us and another to a cluster. Read are block mappings and sequences, plain, quoted and block scalars, flow collections, comments,
//! `---`. Refused, with line and word: tabs, anchors, aliases, tags, merge keys, directives, complex keys, keys that are no text, a
//! key twice; and every plain word that YAML 1.1 (sigs.k8s.io/yaml, PyYAML) and 1.2 take for different things, such as `on`, `017`,
//! `12:30` and `1e3`. What is read means the same to both: PyYAML is the oracle (`tests/steps/37-yaml`).
//!
//! Owns: text to JSON values. Does not own: what the values mean.

mod block;
mod flow;
mod scalar;

use serde_json::Value;
use thiserror::Error;

/// Longest text, in bytes.
pub const MOST_BYTES: usize = 1 << 20;
/// Collections within each other.
pub const MOST_DEPTH: usize = 64;
/// Longest key, in bytes: YAML's own bound on a key without `?`.
const MOST_KEY: usize = 1024;
/// Letters of a refused word that a message shows.
const SHOWN: usize = 40;

/// A text that is not read. Lines count from 1.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum YamlError {
    /// It is too long or too deep.
    #[error("YAML: line {line}: {what}")]
    Bound {
        /// Where.
        line: usize,
        /// Which bound.
        what: &'static str,
    },
    /// YAML, but of a kind that is not read.
    #[error("YAML: line {line}: {word:?}: {what} are not read here: {remedy}")]
    Unsupported {
        /// Where.
        line: usize,
        /// What stands there.
        word: String,
        /// Its kind.
        what: &'static str,
        /// What to write in its place.
        remedy: &'static str,
    },
    /// A word that is one thing to YAML 1.1 and another to 1.2.
    #[error(
        "YAML: line {line}: {word:?} is {what} to some readers and text to others: put it into quotes, or write it plainly"
    )]
    Ambiguous {
        /// Where.
        line: usize,
        /// The word.
        word: String,
        /// What it is to some.
        what: &'static str,
    },
    /// No YAML.
    #[error("YAML: line {line}: {word:?}: {what}")]
    Form {
        /// Where.
        line: usize,
        /// What stands there.
        word: String,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// The documents of a text; those with nothing in them are left out. JSON is read as the flow collection that it is.
///
/// # Errors
/// [`YamlError`].
pub fn read(text: &str) -> Result<Vec<Value>, YamlError> {
    if text.len() > MOST_BYTES {
        return Err(YamlError::Bound { line: 1, what: "more than 1 MiB of text" });
    }
    let mut lines = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let broken = line.ends_with('\n');
        let line = line.trim_end_matches('\n');
        let line = if broken { line.strip_suffix('\r').unwrap_or(line) } else { line };
        if let Some(letter) = line.chars().find(|c| !is_printable(*c)) {
            return Err(YamlError::Unsupported {
                line: number + 1,
                word: letter.into(),
                what: "control characters, byte order marks and Unicode's line breaks",
                remedy: "write an escape within double quotes",
            });
        }
        lines.push(Line { text: line, broken });
    }
    let mut reader = Reader { lines, row: 0, at: 0, depth: 0 };
    reader.documents()
}

/// What YAML may hold raw, without what only some readers take for a line's end.
fn is_printable(letter: char) -> bool {
    !matches!(letter, '\0'..='\x08' | '\x0a'..='\x1f' | '\x7f'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

#[derive(Clone, Copy, Debug)]
struct Line<'a> {
    text: &'a str,
    /// It ends with a line break; the last one may not.
    broken: bool,
}

/// A place in the text: byte `at` of line `row`.
#[derive(Debug)]
struct Reader<'a> {
    lines: Vec<Line<'a>>,
    row: usize,
    at: usize,
    depth: usize,
}

impl<'a> Reader<'a> {
    /// What is left of this line.
    fn rest(&self) -> &'a str {
        self.lines.get(self.row).map_or("", |line| line.text.get(self.at..).unwrap_or(""))
    }

    fn is_end(&self) -> bool {
        self.row >= self.lines.len()
    }

    fn next_line(&mut self) {
        self.row += 1;
        self.at = 0;
    }

    fn skip_spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches(' ').len();
    }

    fn word(&self) -> String {
        self.rest().chars().take(SHOWN).collect::<String>().trim_end().to_owned()
    }

    fn form(&self, what: &'static str) -> YamlError {
        YamlError::Form { line: self.row + 1, word: self.word(), what }
    }

    fn unsupported(&self, what: &'static str, remedy: &'static str) -> YamlError {
        YamlError::Unsupported { line: self.row + 1, word: self.word(), what, remedy }
    }

    fn enter(&mut self) -> Result<(), YamlError> {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            return Err(YamlError::Bound {
                line: self.row + 1,
                what: "more than 64 collections within each other",
            });
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.depth -= 1;
    }

    /// Nothing but a comment may follow on this line.
    fn end_line(&mut self) -> Result<(), YamlError> {
        let start = self.at;
        self.skip_spaces();
        let rest = self.rest();
        let comment = rest.starts_with('#') && (self.at > start || start == 0);
        if !rest.is_empty() && !comment {
            return Err(match rest.starts_with('\t') {
                true => self.tab(),
                false => self.form("nothing may follow here"),
            });
        }
        self.next_line();
        Ok(())
    }

    fn tab(&self) -> YamlError {
        self.unsupported("tabs", "write spaces")
    }
}

#[cfg(test)]
mod tests;
