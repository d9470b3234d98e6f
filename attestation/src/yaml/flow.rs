//! Flow collections: `[a, b]` and `{a: b}`, over lines as they like.

use serde_json::{Map, Value};

use super::{MOST_KEY, Reader, YamlError, scalar::plain_end};

impl Reader<'_> {
    /// From the bracket that opens it to behind the one that closes it.
    pub(super) fn flow(&mut self) -> Result<Value, YamlError> {
        self.enter()?;
        let (line, word) = (self.row + 1, self.word());
        let open = || YamlError::Form { line, word: word.clone(), what: "the closing bracket is missing" };
        let mapping = self.rest().starts_with('{');
        let close = if mapping { '}' } else { ']' };
        self.at += 1;
        let (mut items, mut members) = (Vec::new(), Map::new());
        loop {
            self.flow_space().ok_or_else(open)??;
            if self.take(close) {
                self.leave();
                return Ok(if mapping { Value::Object(members) } else { Value::Array(items) });
            }
            if mapping {
                let key = self.flow_key()?;
                self.skip_spaces();
                if !self.take(':') {
                    return Err(self.form("a key's colon is missing"));
                }
                self.flow_space().ok_or_else(open)??;
                let none = self.rest().starts_with([',', '}']);
                let value = if none { Value::Null } else { self.flow_value()? };
                if members.insert(key, value).is_some() {
                    return Err(self.form("the key before it stands here twice"));
                }
            } else {
                items.push(self.flow_value()?);
            }
            self.flow_space().ok_or_else(open)??;
            if !self.take(',') && !self.rest().starts_with(close) {
                return Err(self.form("a comma or the closing bracket is missing"));
            }
        }
    }

    fn flow_value(&mut self) -> Result<Value, YamlError> {
        match self.rest().chars().next() {
            Some('[' | '{') => self.flow(),
            Some('"' | '\'') => self.quoted(None).map(Value::from),
            _ => {
                let line = self.row;
                let word = self.flow_plain()?;
                self.resolved(line, &word)
            }
        }
    }

    fn flow_key(&mut self) -> Result<String, YamlError> {
        let (line, at) = (self.row, self.at);
        let wrong = self.form("a key is text on one line, of 1024 bytes at most: put it into quotes");
        let key = match self.flow_value()? {
            Value::String(key) if self.row == line && self.at - at <= MOST_KEY => key,
            _ => return Err(wrong),
        };
        Ok(key)
    }

    fn flow_plain(&mut self) -> Result<String, YamlError> {
        self.check_plain(true)?;
        let rest = self.rest();
        let end = plain_end(rest, true);
        self.at += end;
        match rest.as_bytes().get(end) {
            Some(b'?') => return Err(self.form("put a word with a question mark into quotes here")),
            Some(b'\t') => return Err(self.tab()),
            Some(b':') if !self.rest()[1..].is_empty() && !self.rest()[1..].starts_with(' ') => {
                return Err(self.form("a key's colon wants a space behind it"));
            }
            // Everything else is looked at by who asked; a word that goes on in the next line is a missing comma to him.
            _ => {}
        }
        Ok(rest[..end].trim_end_matches(' ').to_owned())
    }

    /// To the next letter that is none of a comment. Nothing at the text's end.
    fn flow_space(&mut self) -> Option<Result<(), YamlError>> {
        loop {
            let before = self.at;
            self.skip_spaces();
            let rest = self.rest();
            if rest.starts_with('\t') {
                return Some(Err(self.tab()));
            }
            if rest.starts_with('#') && before == self.at && before > 0 {
                return Some(Err(self.form("a comment wants a space before it")));
            }
            if !rest.is_empty() && !rest.starts_with('#') {
                return Some(if self.at == 0 && self.is_marker() {
                    Err(self.form("a document ends within brackets"))
                } else {
                    Ok(())
                });
            }
            self.next_line();
            if self.is_end() {
                return None;
            }
        }
    }

    fn take(&mut self, letter: char) -> bool {
        let found = self.rest().starts_with(letter);
        self.at += usize::from(found);
        found
    }
}
