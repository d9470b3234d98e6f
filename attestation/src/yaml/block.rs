//! Documents, block mappings and sequences, block scalars.

use serde_json::{Map, Value};

use super::{
    MOST_KEY, Reader, YamlError,
    scalar::{fold, plain_end},
};

/// What a block scalar does with the breaks at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chomp {
    Clip,
    Strip,
    Keep,
}

impl Reader<'_> {
    pub(super) fn documents(&mut self) -> Result<Vec<Value>, YamlError> {
        let mut all = Vec::new();
        loop {
            self.seek_content()?;
            if self.is_end() {
                return Ok(all);
            }
            let mut value = None;
            if self.is_marker() {
                let begins = self.rest().starts_with('-');
                self.at = 3;
                self.skip_spaces();
                if !begins || !self.rest().starts_with(['[', '{']) {
                    self.at = 3;
                    self.end_line()?;
                    self.seek_content()?;
                    if !begins && !self.is_end() && !self.is_marker() {
                        return Err(self.form("behind ... the next document begins with ---"));
                    }
                    continue;
                }
                value = Some(self.value(None)?);
            }
            let scalar = self.form("a document has to be a mapping or a list");
            let value = match value {
                Some(value) => value,
                None => self.node(None)?,
            };
            if !value.is_object() && !value.is_array() {
                return Err(scalar);
            }
            all.push(value);
            self.seek_content()?;
            if !self.is_end() && !self.is_marker() {
                return Err(self.form("it stands neither in line with what is before it nor below it"));
            }
        }
    }

    /// `---` or `...`, which stand at a line's begin and alone.
    pub(super) fn is_marker(&self) -> bool {
        let rest = self.rest();
        let marker = rest.starts_with("---") || rest.starts_with("...");
        self.at == 0 && marker && rest[3..].chars().next().is_none_or(|c| c == ' ')
    }

    /// From a line's begin to the first letter that is none of a comment: `at` is its column.
    fn seek_content(&mut self) -> Result<(), YamlError> {
        while !self.is_end() {
            self.at = 0;
            self.skip_spaces();
            let rest = self.rest();
            if rest.starts_with('\t') {
                return Err(self.tab());
            }
            if !rest.is_empty() && !rest.starts_with('#') {
                break;
            }
            self.next_line();
        }
        Ok(())
    }

    /// The column of what comes next, if it is of this document and right of `parent`.
    fn deeper(&mut self, parent: Option<usize>) -> Result<Option<usize>, YamlError> {
        self.seek_content()?;
        let there = !self.is_end() && !self.is_marker() && parent.is_none_or(|parent| self.at > parent);
        Ok(there.then_some(self.at))
    }

    /// The node that begins here, to the begin of the line after it. It belongs to the collection at column `parent`.
    fn node(&mut self, parent: Option<usize>) -> Result<Value, YamlError> {
        if self.is_entry() {
            return self.sequence();
        }
        if self.key_ahead()?.is_some() {
            return self.mapping();
        }
        self.value(parent)
    }

    fn is_entry(&self) -> bool {
        self.rest().strip_prefix('-').is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    }

    fn sequence(&mut self) -> Result<Value, YamlError> {
        self.enter()?;
        let column = self.at;
        let mut items = Vec::new();
        loop {
            self.at += 1;
            self.skip_spaces();
            items.push(if self.is_rest_empty() {
                self.next_line();
                match self.deeper(Some(column))? {
                    Some(_) => self.node(Some(column))?,
                    None => Value::Null,
                }
            } else {
                self.node(Some(column))?
            });
            self.seek_content()?;
            if self.is_end() || self.is_marker() || self.at < column || self.at == column && !self.is_entry()
            {
                self.leave();
                return Ok(Value::Array(items));
            }
            if self.at > column {
                return Err(self.form("it stands right of the list's entries"));
            }
        }
    }

    fn mapping(&mut self) -> Result<Value, YamlError> {
        self.enter()?;
        let column = self.at;
        let mut members = Map::new();
        loop {
            let Some((key, behind)) = self.key_ahead()? else {
                self.check_plain(false)?;
                return Err(self.form("a key and its colon are wanted here"));
            };
            if members.contains_key(&key) {
                return Err(self.form("the key stands in this mapping already"));
            }
            self.at = behind;
            self.skip_spaces();
            let value = if self.is_rest_empty() {
                self.next_line();
                self.seek_content()?;
                // A list may begin in its key's own column.
                if !self.is_end() && self.at == column && self.is_entry() {
                    self.sequence()?
                } else if self.deeper(Some(column))?.is_some() {
                    self.node(Some(column))?
                } else {
                    Value::Null
                }
            } else {
                self.value(Some(column))?
            };
            members.insert(key, value);
            self.seek_content()?;
            if self.is_end() || self.is_marker() || self.at < column || self.at == column && self.is_entry() {
                self.leave();
                return Ok(Value::Object(members));
            }
            if self.at > column {
                return Err(self.form("it stands right of the mapping's keys"));
            }
        }
    }

    fn is_rest_empty(&self) -> bool {
        let rest = self.rest();
        rest.is_empty() || rest.starts_with('#')
    }

    /// The key that begins here, and the place behind its colon. Nothing is taken.
    fn key_ahead(&mut self) -> Result<Option<(String, usize)>, YamlError> {
        let (row, start) = (self.row, self.at);
        let rest = self.rest();
        if rest.starts_with(['[', '{', '|', '>']) {
            return Ok(None);
        }
        let key = if rest.starts_with(['"', '\'']) {
            let text = self.quoted(None);
            let end = self.at;
            let here = self.row == row;
            (self.row, self.at) = (row, start);
            let text = text?;
            let Some(behind) = self.lines[row].text.get(end..).filter(|_| here) else { return Ok(None) };
            let colon = behind.len() - behind.trim_start_matches(' ').len();
            if !is_colon(&behind[colon..]) {
                return Ok(None);
            }
            (text, end + colon + 1)
        } else {
            let end = plain_end(rest, false);
            if !is_colon(&rest[end..]) {
                return Ok(None);
            }
            self.check_plain(false)?;
            let word = rest[..end].trim_end_matches(' ');
            match self.resolved(row, word)? {
                Value::String(key) => (key, start + end + 1),
                _ => return Err(self.form("a key is text: put it into quotes")),
            }
        };
        if key.1 - start > MOST_KEY {
            return Err(self.form("a key has more than 1024 bytes"));
        }
        Ok(Some(key))
    }

    /// A value that is neither a block mapping nor a block sequence, to the begin of the line after it.
    fn value(&mut self, parent: Option<usize>) -> Result<Value, YamlError> {
        let value = match self.rest().chars().next() {
            Some('|' | '>') => return self.block_scalar(parent).map(Value::from),
            Some('[' | '{') => self.flow()?,
            Some('"' | '\'') => Value::from(self.quoted(parent)?),
            _ => {
                let line = self.row;
                let word = self.plain(parent)?;
                return self.resolved(line, &word);
            }
        };
        self.end_line()?;
        Ok(value)
    }

    /// A plain scalar, over as many lines as stand right of `parent`.
    fn plain(&mut self, parent: Option<usize>) -> Result<String, YamlError> {
        self.check_plain(false)?;
        let mut text = String::new();
        loop {
            let rest = self.rest();
            let end = plain_end(rest, false);
            text += rest[..end].trim_end_matches(' ');
            self.at += end;
            match rest.as_bytes().get(end) {
                Some(b':') => return Err(self.form(
                    "a key cannot stand here: put the text into quotes, or the key into a line of its own",
                )),
                Some(b'\t') => return Err(self.tab()),
                _ => {}
            }
            let ends = !self.rest().is_empty();
            let mut breaks = 0;
            loop {
                self.next_line();
                breaks += 1;
                self.skip_spaces();
                if self.is_end() || !self.rest().is_empty() {
                    break;
                }
            }
            let goes_on = !self.is_end() && !self.is_marker() && parent.is_none_or(|parent| self.at > parent);
            if !goes_on || self.rest().starts_with('#') {
                self.at = 0;
                return Ok(text);
            }
            if ends {
                return Err(self.form("text cannot go on behind a comment"));
            }
            if self.rest().starts_with('\t') {
                return Err(self.tab());
            }
            fold(&mut text, breaks);
        }
    }

    /// `|` or `>`, with what stands below it.
    fn block_scalar(&mut self, parent: Option<usize>) -> Result<String, YamlError> {
        let folded = self.rest().starts_with('>');
        self.at += 1;
        let (mut chomp, mut given) = (Chomp::Clip, None);
        while let Some(letter) = self.rest().chars().next().filter(|c| !c.is_whitespace()) {
            match letter {
                '-' | '+' if chomp == Chomp::Clip => {
                    chomp = if letter == '-' { Chomp::Strip } else { Chomp::Keep }
                }
                '1'..='9' if given.is_none() => given = letter.to_digit(10).map(|digit| digit as usize),
                _ => {
                    return Err(
                        self.form("a block scalar begins with | or >, then - or +, then its indentation")
                    );
                }
            }
            self.at += 1;
        }
        self.end_line()?;
        let least = parent.map_or(0, |parent| parent + 1);
        let indent = match given {
            Some(digit) => least + digit - 1,
            None => self.block_indent(least)?,
        };
        Ok(self.block_text(indent, folded, chomp))
    }

    /// The column of a block scalar's first letter. Lines of spaces before it may not reach further.
    fn block_indent(&self, least: usize) -> Result<usize, YamlError> {
        let mut longest = least;
        for (row, line) in self.lines.iter().enumerate().skip(self.row) {
            let spaces = line.text.len() - line.text.trim_start_matches(' ').len();
            if spaces == line.text.len() {
                longest = longest.max(spaces);
                continue;
            }
            if spaces >= least && spaces < longest {
                return Err(YamlError::Form {
                    line: row + 1,
                    word: String::new(),
                    what: "an empty line before it has more spaces",
                });
            }
            return Ok(spaces.max(longest));
        }
        Ok(longest)
    }

    fn block_text(&mut self, indent: usize, folded: bool, chomp: Chomp) -> String {
        let mut text = String::new();
        // Breaks since the last line with a letter; whether that line begins with one, and ended with a break.
        let (mut breaks, mut flush, mut any) = (0, false, false);
        let mut broken = false;
        while let Some(line) = self.lines.get(self.row).copied() {
            let spaces = line.text.len() - line.text.trim_start_matches(' ').len();
            if spaces == line.text.len() && spaces <= indent {
                breaks += usize::from(line.broken);
                self.row += 1;
                continue;
            }
            if spaces < indent {
                break;
            }
            let content = &line.text[indent..];
            let starts = !content.starts_with([' ', '\t']);
            if any {
                if !(folded && flush && starts) {
                    text.push('\n');
                } else if breaks == 0 {
                    text.push(' ');
                }
            }
            text.extend(std::iter::repeat_n('\n', breaks));
            text += content;
            (breaks, flush, any, broken) = (0, starts, true, line.broken);
            self.row += 1;
        }
        self.at = 0;
        if chomp != Chomp::Strip && broken {
            text.push('\n');
        }
        if chomp == Chomp::Keep {
            text.extend(std::iter::repeat_n('\n', breaks));
        }
        text
    }
}

/// A colon that ends a key.
fn is_colon(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}
