//! Base64 in its two spellings, and hexadecimal.
//!
//! Owns: text to bytes and back, in time that does not depend on the bytes. Does not own: what they mean.

use base64ct::{Base64, Base64UrlUnpadded, Encoding};
use thiserror::Error;

/// Text is not what its field promises.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("not {0}")]
pub struct EncodingError(&'static str);

/// Standard Base64 with padding.
#[must_use]
pub fn to_base64(bytes: &[u8]) -> String {
    Base64::encode_string(bytes)
}

/// Reads standard Base64 with padding.
///
/// # Errors
/// [`EncodingError`].
pub fn from_base64(text: &str) -> Result<Vec<u8>, EncodingError> {
    Base64::decode_vec(text).map_err(|_| EncodingError("padded Base64"))
}

/// URL-safe Base64 without padding, as JOSE has it.
#[must_use]
pub fn to_base64url(bytes: &[u8]) -> String {
    Base64UrlUnpadded::encode_string(bytes)
}

/// Reads URL-safe Base64 without padding.
///
/// # Errors
/// [`EncodingError`].
pub fn from_base64url(text: &str) -> Result<Vec<u8>, EncodingError> {
    Base64UrlUnpadded::decode_vec(text).map_err(|_| EncodingError("unpadded URL-safe Base64"))
}

/// Lower-case hexadecimal.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads hexadecimal.
///
/// # Errors
/// [`EncodingError`].
pub fn from_hex(text: &str) -> Result<Vec<u8>, EncodingError> {
    let wrong = EncodingError("hexadecimal");
    let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8).ok_or(wrong);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return Err(wrong);
    }
    pairs.iter().map(|[high, low]| Ok(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_two_spellings_do_not_read_each_other() {
        assert_eq!(to_base64(&[0xfb, 0xff]), "+/8=");
        assert_eq!(to_base64url(&[0xfb, 0xff]), "-_8");
        assert!(from_base64("-_8").is_err() && from_base64url("+/8=").is_err());
        assert!(from_hex("abc").is_err() && from_hex("zz").is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(from_base64(&to_base64(&bytes)).unwrap(), bytes.clone());
            prop_assert_eq!(from_base64url(&to_base64url(&bytes)).unwrap(), bytes.clone());
            prop_assert_eq!(from_hex(&to_hex(&bytes)).unwrap(), bytes);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,60}") {
            let _ = (from_base64(&text), from_base64url(&text), from_hex(&text));
        }
    }
}
