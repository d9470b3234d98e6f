//! Flags with values and words, in any order.

use super::Error;

/// What followed the command.
pub(super) struct Arguments {
    command: String,
    words: Vec<String>,
    values: Vec<(&'static str, Vec<String>)>,
}

impl Arguments {
    /// Reads flags of these names, each with a value, and at most `most` words.
    pub(super) fn parse(
        command: &str,
        words: &[String],
        flags: &[&'static str],
        most: usize,
    ) -> Result<Self, Error> {
        let mut read = Self {
            command: command.into(),
            words: Vec::new(),
            values: flags.iter().map(|flag| (*flag, Vec::new())).collect(),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if !word.starts_with("--") {
                read.words.push(word.clone());
                continue;
            }
            let (flag, inline) = word.split_once('=').map_or((word.as_str(), None), |(f, v)| (f, Some(v)));
            let values = read.values.iter_mut().find(|(name, _)| *name == flag);
            let (_, values) =
                values.ok_or_else(|| Error::Usage(format!("{command}: unknown flag {flag:?}")))?;
            let value = inline.or_else(|| words.next().map(String::as_str));
            values.push(value.ok_or_else(|| Error::Usage(format!("{flag} wants a value")))?.to_owned());
        }
        if read.words.len() > most {
            return Err(Error::Usage(format!("{command}: too many words: {}", read.words[most..].join(" "))));
        }
        Ok(read)
    }

    pub(super) fn word(&self, at: usize, what: &str) -> Result<&str, Error> {
        let word = self.words.get(at).map(String::as_str);
        word.ok_or_else(|| Error::Usage(format!("{}: {what} is missing", self.command)))
    }

    pub(super) fn words(&self) -> &[String] {
        &self.words
    }

    pub(super) fn values(&self, flag: &str) -> &[String] {
        self.values.iter().find(|(name, _)| *name == flag).map_or(&[], |(_, values)| values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, Error> {
        let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        Arguments::parse("unpack", &words, &["--key", "--most"], 2)
    }

    #[test]
    fn flags_stand_anywhere() {
        let a = parse("--key kbs:///a/b/c=f A --most=7 B --key=x=y").unwrap();
        assert_eq!(a.values("--key"), ["kbs:///a/b/c=f", "x=y"]);
        assert_eq!(
            (a.word(0, "").unwrap(), a.word(1, "").unwrap(), a.values("--most")),
            ("A", "B", &["7".into()][..])
        );
        assert_eq!(
            parse("A").unwrap().word(1, "DIRECTORY").unwrap_err().to_string(),
            "image: unpack: DIRECTORY is missing: see coffer image --help"
        );
        for bad in ["A B C", "--nope", "--key"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
