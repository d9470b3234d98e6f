//! What a taker says to a shell: a `coffer-vmm` that was started ahead and waits on a Unix socket for one pod's arguments.
//!
//! Owns: the bytes of request and answer. Does not own: sockets, who may ask, what the words mean.
//!
//! A request is the length of what follows (u32, little-endian) and the words of a command line, each ended by a NUL. Its first byte
//! brings descriptors along: a mount namespace and a network namespace to join, then those that the words name. These get numbers from
//! [`FIRST_DESCRIPTOR`] on, in order. The answer is one line. A shell that is taken goes on at [`GO`], when the taker has made it its own; at the
//! end of the connection without that it ends.

use thiserror::Error;

/// Number of the first descriptor that a request's words may name: over all that a waiting shell has open.
pub const FIRST_DESCRIPTOR: i32 = 64;
/// Namespaces before those descriptors.
pub const NAMESPACES: usize = 2;
/// Descriptors of a request, the two namespaces among them: more than a machine has devices.
pub const MOST_DESCRIPTORS: usize = 16;
/// Longest request in bytes, without its length: some paths and numbers.
pub const MOST_BYTES: usize = 64 << 10;
/// Longest answer in bytes.
pub const MOST_ANSWER: usize = 4 << 10;
/// The answer of a shell that is the pod's VM from now on.
pub const TAKEN: &str = "taken\n";
/// What a taker says then.
pub const GO: u8 = b'g';

/// Bytes that are no request.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ShellError {
    /// Over [`MOST_BYTES`].
    #[error("a request of {0} bytes: {MOST_BYTES} are the most")]
    Long(usize),
    /// A word with a NUL, or the last one without.
    #[error("a request's words each end with a NUL and hold none")]
    Words,
    /// Not UTF-8.
    #[error("a request's words are UTF-8")]
    Text,
}

/// A request's bytes.
///
/// # Errors
/// [`ShellError::Words`], [`ShellError::Long`].
pub fn encode(words: &[String]) -> Result<Vec<u8>, ShellError> {
    if words.iter().any(|word| word.contains('\0')) {
        return Err(ShellError::Words);
    }
    let length = words.iter().map(|word| word.len() + 1).sum();
    let announced = u32::try_from(length).ok().filter(|_| length <= MOST_BYTES);
    let mut bytes = announced.ok_or(ShellError::Long(length))?.to_le_bytes().to_vec();
    for word in words {
        bytes.extend_from_slice(word.as_bytes());
        bytes.push(0);
    }
    Ok(bytes)
}

/// How many bytes follow those four.
///
/// # Errors
/// [`ShellError::Long`].
pub fn length_of(bytes: [u8; 4]) -> Result<usize, ShellError> {
    let length = u32::from_le_bytes(bytes) as usize;
    if length <= MOST_BYTES { Ok(length) } else { Err(ShellError::Long(length)) }
}

/// The words in a request's bytes, without its length.
///
/// # Errors
/// [`ShellError`].
pub fn decode(bytes: &[u8]) -> Result<Vec<String>, ShellError> {
    if bytes.len() > MOST_BYTES {
        return Err(ShellError::Long(bytes.len()));
    }
    let Some(body) = bytes.strip_suffix(&[0]) else {
        return if bytes.is_empty() { Ok(Vec::new()) } else { Err(ShellError::Words) };
    };
    let text = std::str::from_utf8(body).map_err(|_| ShellError::Text)?;
    Ok(text.split('\0').map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_its_length_and_its_words() {
        let words = ["--image".to_owned(), "/i".to_owned(), String::new()];
        let bytes = encode(&words).unwrap();
        assert_eq!(bytes, b"\x0c\0\0\0--image\0/i\0\0");
        assert_eq!(length_of(*bytes.first_chunk().unwrap()), Ok(12));
        assert_eq!(decode(&bytes[4..]).unwrap(), words);
    }

    #[test]
    fn what_is_no_request_is_named() {
        assert_eq!(encode(&["a\0b".to_owned()]), Err(ShellError::Words));
        assert_eq!(encode(&["a".repeat(MOST_BYTES)]), Err(ShellError::Long(MOST_BYTES + 1)));
        assert_eq!(length_of([0xff; 4]), Err(ShellError::Long(0xffff_ffff)));
        assert_eq!(decode(b"--image"), Err(ShellError::Words));
        assert_eq!(decode(b"\xff\0"), Err(ShellError::Text));
        assert_eq!(decode(&vec![0; MOST_BYTES + 1]), Err(ShellError::Long(MOST_BYTES + 1)));
    }

    proptest! {
        #[test]
        fn words_come_back(words in prop::collection::vec("[^\0]{0,20}", 0..20)) {
            let bytes = encode(&words).unwrap();
            prop_assert_eq!(length_of(*bytes.first_chunk().unwrap()), Ok(bytes.len() - 4));
            prop_assert_eq!(decode(&bytes[4..]).unwrap(), words);
        }

        #[test]
        fn any_bytes_are_words_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(words) = decode(&bytes) {
                prop_assert_eq!(&encode(&words).unwrap()[4..], &bytes);
            }
        }
    }
}
