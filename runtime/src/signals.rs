//! Signal names and numbers, as runc's kill takes them.

/// The number of `TERM`, `SIGTERM`, `15` or `RTMIN+3`.
#[must_use]
pub fn parse(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (number <= 64).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    // What the C library leaves to programs, not the kernel's first two.
    let realtime = |text: &str, from: u32| text.parse::<u32>().ok().filter(|n| *n <= 30).map(|n| (from, n));
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return if rest.is_empty() {
            Some(34)
        } else {
            realtime(rest.strip_prefix('+')?, 34).map(|(a, b)| a + b)
        };
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return if rest.is_empty() {
            Some(64)
        } else {
            realtime(rest.strip_prefix('-')?, 64).map(|(a, b)| a - b)
        };
    }
    format!("SIG{name}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as u32)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_with_and_without_sig_and_numbers_are_the_same() {
        for text in ["15", "TERM", "SIGTERM", "term"] {
            assert_eq!(parse(text), Some(15), "{text}");
        }
        assert_eq!((parse("RTMIN+3"), parse("RTMAX-1"), parse("0")), (Some(37), Some(63), Some(0)));
        for wrong in ["", "65", "NOPE", "RTMIN+99", "-1"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
