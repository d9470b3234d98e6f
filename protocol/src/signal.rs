//! Signals as messages carry them: by number.
//!
//! Owns: the numbers of the names that engines and images use (signal(7), x86 and ARM). Does not own: sending them.

/// What ends a program in good order, unless its image says otherwise.
pub const TERM: u32 = 15;
/// What the C library leaves to programs, not the kernel's first two.
const FIRST_REALTIME: u32 = 34;
const LAST: u32 = 64;

/// Names by number, from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The number of `TERM`, `SIGTERM`, `15` or `RTMIN+3`, in any case of letters, as runc's kill takes them.
#[must_use]
pub fn parse(text: &str) -> Option<u32> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().filter(|number| *number <= LAST);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |text: &str| text.parse::<u32>().ok().filter(|n| *n <= LAST - FIRST_REALTIME);
    match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => Some(FIRST_REALTIME),
        (Some(rest), _) => Some(FIRST_REALTIME + offset(rest.strip_prefix('+')?)?),
        (_, Some("")) => Some(LAST),
        (_, Some(rest)) => Some(LAST - offset(rest.strip_prefix('-')?)?),
        _ => NAMES.iter().zip(1..).find_map(|(have, number)| (*have == name).then_some(number)),
    }
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
        for wrong in ["", "65", "NOPE", "RTMIN+99", "RTMIN+", "RTMAX-31", "-1", "+15"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
