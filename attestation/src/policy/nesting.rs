//! What a policy's nested lists cost its reader. regorus 0.14 takes each `[` and `{` for a comprehension first, and reads what was no comprehension
//! again: the first element of a first element four times, and one of thirty levels for hours.
//!
//! Owns: the estimate and its bound. Does not own: reading the policy.

/// Bytes that may be read, counted as often as they are. A policy of a hundred containers has less; this many take seconds.
pub(super) const MOST: u64 = 1 << 22;

/// Bytes that are read of a text that is Rego: each once, and twice for each list that it is in the first element of.
pub(super) fn bytes_read(text: &str) -> u64 {
    let mut sum = 0u64;
    // For each open bracket, whether this is its first element.
    let mut open: Vec<bool> = Vec::new();
    let mut firsts = 0u32;
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let before = bytes.len();
        match byte {
            b'#' => drop(bytes.find(|b| *b == b'\n')),
            b'`' => drop(bytes.find(|b| *b == b'`')),
            b'"' => {
                while let Some(b) = bytes.next()
                    && b != b'"'
                {
                    if b == b'\\' {
                        bytes.next();
                    }
                }
            }
            b'[' | b'{' => {
                open.push(true);
                firsts += 1;
            }
            b',' => {
                if let Some(first) = open.last_mut().filter(|first| **first) {
                    *first = false;
                    firsts -= 1;
                }
            }
            b']' | b'}' => firsts -= u32::from(open.pop() == Some(true)),
            _ => {}
        }
        let length = 1 + (before - bytes.len()) as u64;
        sum = sum.saturating_add(length.saturating_mul(1 << firsts.min(40)));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_first_elements_counts_double_for_each() {
        for (text, count) in [
            ("x := 1", 6),
            ("[a, b]", 2 + 2 + 1 + 1 + 1 + 1),
            ("[[a]]", 2 + 4 + 4 + 2 + 1),
            ("[1, [a]]", 2 + 2 + 1 + 1 + 2 + 2 + 1 + 1),
            // Brackets of texts and remarks open nothing.
            (r#""[\"[" "#, 7),
            ("`[\\`a", 5),
            ("# [[[\na", 7),
            ("]]}a", 4),
            ("\"[", 2),
        ] {
            assert_eq!(bytes_read(text), count, "{text}");
        }
    }
}
