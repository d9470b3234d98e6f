//! What a service says to its manager (sd_notify(3)).
//!
//! Owns: which of it crosses from a guest to its host; both sides leave the rest out. Does not own: sockets, whom it is for.

/// What of a message may reach the host's manager: how the service is, in lines of printable text. Not which process it is,
/// which the guest cannot know, and no descriptors, of which none crosses.
#[must_use]
pub fn told(message: &[u8]) -> String {
    let Ok(text) = std::str::from_utf8(message) else { return String::new() };
    let number = |text: &str| text.len() <= 20 && text.bytes().all(|b| b.is_ascii_digit());
    let good = |line: &&str| match line.split_once('=') {
        Some(("READY" | "RELOADING" | "STOPPING" | "WATCHDOG", value)) => value == "1",
        Some(("ERRNO" | "EXTEND_TIMEOUT_USEC" | "MONOTONIC_USEC", value)) => number(value),
        Some(("STATUS", value)) => !value.chars().any(char::is_control),
        _ => false,
    };
    text.lines().filter(good).fold(String::new(), |all, line| all + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_how_the_service_is_passes() {
        let message = b"READY=1\nMAINPID=1\nSTATUS=up \xc3\xbc\nFDSTORE=1\nBARRIER=1\nERRNO=2\nX_OWN=1\nWATCHDOG=trigger\n";
        assert_eq!(told(message), "READY=1\nSTATUS=up \u{fc}\nERRNO=2\n");
        assert_eq!(told(b"STATUS=a\x1b[2J"), "");
        assert_eq!(told(b"READY=1\n\xff"), "");
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic_or_grow(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(told(&bytes).len() <= bytes.len() + 1);
        }
    }
}
