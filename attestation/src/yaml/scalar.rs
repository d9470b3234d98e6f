//! Scalars: what a plain word is, and text within quotes.

use serde_json::{Number, Value};

use super::{Reader, SHOWN, YamlError};

/// What a plain word is, when all readers agree; otherwise what it is to some.
pub(super) fn resolve(word: &str) -> Result<Value, &'static str> {
    match word {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Value::Null),
        "true" | "True" | "TRUE" => return Ok(Value::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(Value::Bool(false)),
        "<<" => return Err("a merge key"),
        "=" => return Err("a default value"),
        _ => {}
    }
    if ["y", "yes", "on", "n", "no", "off"].contains(&word.to_ascii_lowercase().as_str()) {
        return Err("a boolean");
    }
    match number(word) {
        Some(Some(number)) => Ok(Value::Number(number)),
        Some(None) => Err("a number"),
        None if is_time(word) => Err("a time"),
        None => Ok(Value::from(word)),
    }
}

/// Nothing: it is no number to anybody. Nothing within: it is one to some.
fn number(word: &str) -> Option<Option<Number>> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let loose = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || b == b'_');
    let unsigned = word.strip_prefix(['-', '+']).unwrap_or(word);
    let lower = unsigned.to_ascii_lowercase();
    if [".inf", ".nan"].contains(&lower.as_str()) {
        return Some(None);
    }
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        || !unsigned.contains(|c: char| c.is_ascii_digit())
    {
        return None;
    }
    if let Some(rest) = lower.strip_prefix("0x").or(lower.strip_prefix("0o")).or(lower.strip_prefix("0b")) {
        let all = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_hexdigit() || b == b'_');
        return all.then_some(None);
    }
    // Sixties: 12:30:45.
    if let Some((first, last)) = unsigned.rsplit_once(':') {
        let last =
            last.split_once('.').map_or(loose(last), |(whole, fraction)| loose(whole) && loose(fraction));
        return (last && first.split(':').all(loose)).then_some(None);
    }
    let (mantissa, exponent) = lower.split_once('e').map_or((lower.as_str(), None), |(m, e)| (m, Some(e)));
    let (whole, fraction) = mantissa.split_once('.').map_or((mantissa, None), |(w, f)| (w, Some(f)));
    let power = |text: &str| digits(text.strip_prefix(['-', '+']).unwrap_or(text));
    if !loose(whole) || !fraction.is_none_or(loose) || !exponent.is_none_or(power) {
        return None;
    }
    let plain = digits(whole)
        && fraction.is_none_or(digits)
        && exponent.is_none()
        && !word.starts_with('+')
        && (whole == "0" || !whole.starts_with('0'));
    // A number that does not fit is as bad as one in another notation.
    Some(if !plain {
        None
    } else if fraction.is_none() {
        word.parse::<i64>().ok().map(Number::from).or_else(|| word.parse::<u64>().ok().map(Number::from))
    } else {
        word.parse::<f64>().ok().and_then(Number::from_f64)
    })
}

/// A date, alone or with a time after it.
fn is_time(word: &str) -> bool {
    let mut parts = word.splitn(3, '-');
    let (Some(year), Some(month), Some(day)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let digits = |text: &str, least: usize, most: usize| {
        (least..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit())
    };
    let end = day.find(|c: char| !c.is_ascii_digit()).unwrap_or(day.len());
    digits(year, 4, 4)
        && digits(month, 1, 2)
        && digits(&day[..end], 1, 2)
        && day[end..].chars().next().is_none_or(|c| "Tt ".contains(c))
}

/// Lines of a scalar put together: one break is a space, each empty line more is a break.
pub(super) fn fold(text: &mut String, breaks: usize) {
    if breaks == 1 {
        text.push(' ');
    }
    text.extend(std::iter::repeat_n('\n', breaks.saturating_sub(1)));
}

/// An end of a plain scalar within its line, in bytes: where a comment or a key's colon begins, or a flow collection goes on.
pub(super) fn plain_end(text: &str, flow: bool) -> usize {
    let bytes = text.as_bytes();
    let stops = |at: usize| match bytes[at] {
        b':' => bytes
            .get(at + 1)
            .is_none_or(|next| *next == b' ' || *next == b'\t' || flow && b",[]{}".contains(next)),
        b'#' => at > 0 && bytes[at - 1] == b' ',
        b',' | b'?' | b'[' | b']' | b'{' | b'}' => flow,
        b'\t' => true,
        _ => false,
    };
    (0..bytes.len()).find(|at| stops(*at)).unwrap_or(bytes.len())
}

impl Reader<'_> {
    pub(super) fn resolved(&self, line: usize, word: &str) -> Result<Value, YamlError> {
        resolve(word).map_err(|what| YamlError::Ambiguous {
            line: line + 1,
            word: word.chars().take(SHOWN).collect(),
            what,
        })
    }

    /// Refuses a plain scalar's first letter where it has a meaning.
    pub(super) fn check_plain(&self, flow: bool) -> Result<(), YamlError> {
        let rest = self.rest();
        let next = rest.chars().nth(1);
        let lone = next.is_none_or(|c| c == ' ' || c == '\t' || flow && ",[]{}".contains(c));
        match rest.chars().next() {
            Some('&') => Err(self.unsupported("anchors", "write the value again where it is used")),
            Some('*') => Err(self.unsupported("aliases", "write the value itself")),
            Some('!') => Err(self.unsupported("tags", "write the value without")),
            Some('%') => Err(self.unsupported("directives", "leave them out")),
            Some('?') if lone || flow => Err(self.unsupported("complex keys", "write KEY: VALUE")),
            Some('@' | '`') => Err(self.form("this letter is reserved: put the word into quotes")),
            Some(':') if lone || flow => Err(self.form("a value without a key")),
            Some('-') if lone => Err(self.form("an entry of a list cannot begin here")),
            Some(',' | '[' | ']' | '{' | '}' | '#' | '|' | '>' | '"' | '\'') => {
                Err(self.form("no scalar can begin so"))
            }
            Some('\t') => Err(self.tab()),
            _ => Ok(()),
        }
    }

    /// Text within quotes, from the opening one to behind the closing one. Its further lines stand right of `parent`.
    pub(super) fn quoted(&mut self, parent: Option<usize>) -> Result<String, YamlError> {
        let (line, start) = (self.row, self.word());
        let open =
            || YamlError::Form { line: line + 1, word: start.clone(), what: "the closing quote is missing" };
        let double = self.rest().starts_with('"');
        self.at += 1;
        let mut text = String::new();
        // What may be cut at a line's end: spaces that were written as such.
        let mut kept = 0;
        loop {
            let rest = self.rest();
            let Some(letter) = rest.chars().next() else {
                text.truncate(text[kept..].trim_end_matches([' ', '\t']).len() + kept);
                let breaks = self.quoted_break(parent).ok_or_else(open)?;
                fold(&mut text, breaks);
                kept = text.len();
                continue;
            };
            self.at += letter.len_utf8();
            match letter {
                '"' if double => return Ok(text),
                '\'' if !double && rest.starts_with("''") => {
                    self.at += 1;
                    text.push('\'');
                }
                '\'' if !double => return Ok(text),
                '\\' if double => {
                    if self.rest().is_empty() {
                        let breaks = self.quoted_break(parent).ok_or_else(open)?;
                        text.extend(std::iter::repeat_n('\n', breaks - 1));
                    } else {
                        text.push(self.escape()?);
                    }
                    kept = text.len();
                }
                other => text.push(other),
            }
        }
    }

    /// From a line's end to the next letter: how many lines ended. Nothing when the text does, or the next line belongs to another.
    fn quoted_break(&mut self, parent: Option<usize>) -> Option<usize> {
        let mut breaks = 0;
        loop {
            self.next_line();
            breaks += 1;
            if self.is_end() {
                return None;
            }
            self.skip_spaces();
            if !self.rest().is_empty() {
                let here = !self.is_marker() && parent.is_none_or(|parent| self.at > parent);
                return (here && !self.rest().starts_with('\t')).then_some(breaks);
            }
        }
    }

    /// What stands for the letters behind a backslash.
    fn escape(&mut self) -> Result<char, YamlError> {
        let rest = self.rest();
        let wrong = self.form("no escape of YAML");
        let letter = rest.chars().next().unwrap_or_default();
        let digits = match letter {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        let found = match letter {
            '0' => '\0',
            'a' => '\x07',
            'b' => '\x08',
            't' => '\t',
            'n' => '\n',
            'v' => '\x0b',
            'f' => '\x0c',
            'r' => '\r',
            'e' => '\x1b',
            ' ' | '"' | '/' | '\\' => letter,
            'N' => '\u{85}',
            '_' => '\u{a0}',
            'L' => '\u{2028}',
            'P' => '\u{2029}',
            'x' | 'u' | 'U' => {
                let number = rest.get(1..=digits).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
                let number = number.and_then(|hex| u32::from_str_radix(hex, 16).ok());
                number.and_then(char::from_u32).ok_or(wrong)?
            }
            _ => return Err(wrong),
        };
        self.at += letter.len_utf8() + digits;
        Ok(found)
    }
}
