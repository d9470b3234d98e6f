//! A signed message (RFC 9580, 10.3): one signature around one content, as `gpg --sign` writes it.
//!
//! Owns: that nothing else is in it, and the verdict. Does not own: keys (`ring`).

use super::{
    MOST_MESSAGE, OpenPgpError, Ring,
    packet::{Cursor, decompress, packets, tag},
    signature::{Signature, kind},
};

const WHAT: &str = "message";

/// What a message says, if it is by a key of one of these rings that may sign at `now` (seconds since 1970).
///
/// # Errors
/// [`OpenPgpError`].
pub fn check(message: &[u8], rings: &[Ring], now: u64) -> Result<Vec<u8>, OpenPgpError> {
    if message.len() > MOST_MESSAGE {
        return Err(OpenPgpError::Form(WHAT, "more than 64 KiB"));
    }
    let outer = packets(message, WHAT)?;
    let plain;
    let inner = match outer.as_slice() {
        [only] if only.tag == tag::COMPRESSED => {
            plain = decompress(&only.body)?;
            packets(&plain, WHAT)?
        }
        _ => outer,
    };
    let [first, content, last] = inner.as_slice() else {
        return Err(OpenPgpError::Form(WHAT, "want one signature around one content: sign with gpg --sign"));
    };
    if (first.tag, content.tag, last.tag) != (tag::ONE_PASS, tag::LITERAL, tag::SIGNATURE) {
        return Err(OpenPgpError::Form(WHAT, "want one signature around one content: sign with gpg --sign"));
    }
    let signature = Signature::parse(&last.body)?;
    announced(&first.body, &signature)?;
    let content = literal(&content.body)?;
    // A short name may be that of two keys.
    let mut refused = OpenPgpError::Stranger(signature.issuer());
    for signer in rings.iter().flat_map(|ring| ring.by(&signature)) {
        let held = signature
            .check(&signer.key, &[content])
            .and_then(|()| in_time(&signature, now))
            .and_then(|()| signer.may_sign(signature.created, now));
        match held {
            Ok(()) => return Ok(content.to_vec()),
            Err(why) => refused = why,
        }
    }
    Err(refused)
}

/// The packet before the content says what is said again behind it (5.4).
fn announced(body: &[u8], signature: &Signature) -> Result<(), OpenPgpError> {
    let mut cursor = Cursor::new(body, "one-pass signature");
    let version = cursor.u8()?;
    let said = (cursor.u8()?, cursor.u8()?, cursor.u8()?);
    let (issuer, last) = (cursor.array()?, cursor.u8()?);
    cursor.end()?;
    if version != 3 || last != 1 {
        return Err(OpenPgpError::Form("one-pass signature", "want version 3, and the only one"));
    }
    let same = said == (signature.kind, signature.hash, signature.algorithm)
        && signature.issuer_id() == Some(issuer);
    if !same {
        return Err(OpenPgpError::Form("one-pass signature", "it is not for the signature that follows"));
    }
    if signature.kind != kind::BINARY {
        return Err(OpenPgpError::Unsupported {
            object: "signature",
            what: format!("type {:#04x}", signature.kind),
            remedy: "sign with gpg --sign, without --textmode",
        });
    }
    Ok(())
}

/// A content's bytes (5.9). Its name and date are not signed, and not looked at.
fn literal(body: &[u8]) -> Result<&[u8], OpenPgpError> {
    let mut cursor = Cursor::new(body, "content");
    if cursor.u8()? != b'b' {
        return Err(OpenPgpError::Form("content", "it is text: sign without --textmode"));
    }
    let name = usize::from(cursor.u8()?);
    cursor.take(name)?;
    cursor.u32()?;
    Ok(cursor.rest())
}

/// Neither of the future nor expired.
fn in_time(signature: &Signature, now: u64) -> Result<(), OpenPgpError> {
    if u64::from(signature.created) > now {
        return Err(OpenPgpError::Time("it was made in the future: is the clock right?"));
    }
    if signature.until().is_some_and(|until| until <= now) {
        return Err(OpenPgpError::Time("it has expired"));
    }
    Ok(())
}
