use proptest::prelude::*;

use super::*;

/// By gpg 2.2: see `testdata/openpgp/make`.
macro_rules! made {
    ($name:literal) => {
        include_bytes!(concat!("../../testdata/openpgp/", $name)).as_slice()
    };
}

const PAYLOAD: &[u8] = made!("payload.json");
const ED25519: &[u8] = made!("ed25519.pgp");
const MESSAGE: &[u8] = made!("ed25519.sig");
const RSA: &[u8] = made!("rsa.pgp");
const P256: &[u8] = made!("p256.pgp");
/// Not compressed.
const P256_MESSAGE: &[u8] = made!("p256.sig");
/// 2026-11-26.
const NOW: u64 = 1_795_651_200;
/// 2030-01-01, when some of the keys and signatures expire.
const YEAR_2030: u64 = 1_893_456_000;

fn checked(ring: &[u8], message: &[u8], now: u64) -> Result<Vec<u8>, String> {
    let ring = Ring::parse(ring).map_err(|e| e.to_string())?;
    check(message, &[ring], now).map_err(|e| e.to_string())
}

#[test]
fn what_gpg_signed_holds() {
    for (ring, message) in [
        (RSA, made!("rsa.sig")),
        (ED25519, MESSAGE),
        (made!("ed25519.asc"), MESSAGE),
        (made!("ed25519-expiring.pgp"), MESSAGE),
        (made!("p256.pgp"), made!("p256.sig")),
        (made!("p384.pgp"), made!("p384.sig")),
        (made!("subkey.pgp"), made!("subkey.sig")),
        (made!("users.pgp"), made!("users.sig")),
        (RSA, made!("expiring.sig")),
    ] {
        assert_eq!(checked(ring, message, NOW).as_deref(), Ok(PAYLOAD));
    }
    assert_eq!(checked(made!("p256.pgp"), made!("parts.sig"), NOW), Ok(PAYLOAD.repeat(40)));
    // Any key of any ring.
    let both = [RSA, ED25519].concat();
    assert_eq!(checked(&both, MESSAGE, NOW).as_deref(), Ok(PAYLOAD));
    let rings = [made!("p256.pgp"), RSA].map(|ring| Ring::parse(ring).unwrap());
    assert_eq!(check(made!("rsa.sig"), &rings, NOW).as_deref(), Ok(PAYLOAD));
}

#[test]
fn what_does_not_hold_is_said() {
    for (ring, message, now, words) in [
        (ED25519, made!("rsa.sig"), NOW, "which is none of the rule's"),
        (made!("ed25519-revoked.pgp"), MESSAGE, NOW, "it is revoked"),
        (made!("ed25519-expiring.pgp"), MESSAGE, YEAR_2030, "it has expired"),
        (made!("subkey-revoked.pgp"), made!("subkey.sig"), NOW, "it is a revoked subkey"),
        (RSA, made!("expiring.sig"), YEAR_2030, "signature: it has expired"),
        (ED25519, MESSAGE, 1_735_750_000, "it was made in the future"),
        (made!("weak.pgp"), made!("weak.sig"), NOW, "RSA with 1024 bits is not supported"),
        (made!("sha1-self.pgp"), MESSAGE, NOW, "SHA-1 is not supported"),
        (RSA, made!("sha1.sig"), NOW, "SHA-1 is not supported"),
        (RSA, made!("text.sig"), NOW, "without --textmode"),
        (RSA, made!("bzip2.sig"), NOW, "algorithm 3 is not supported: sign with gpg --compress-algo zip"),
        (RSA, made!("two.sig"), NOW, "want one signature around one content"),
        (RSA, made!("detached.sig"), NOW, "want one signature around one content"),
        (RSA, made!("clear.sig"), NOW, "a byte where a packet should begin"),
        (RSA, b"", NOW, "want one signature around one content"),
        (&[0x94, 0][..], MESSAGE, NOW, "private key"),
        (b"", MESSAGE, NOW, "no key in it"),
        (MESSAGE, MESSAGE, NOW, "a packet of type"),
    ] {
        let why = checked(ring, message, now).unwrap_err();
        assert!(why.starts_with("OpenPGP: ") && why.contains(words) && !why.contains('\n'), "{words}: {why}");
    }
}

/// Packets of a ring, each with its header, as gpg writes them: old lengths.
fn cut(ring: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut all = Vec::new();
    let mut rest = ring;
    while let Some(first) = rest.first() {
        let (header, length) = match first & 3 {
            0 => (2, usize::from(rest[1])),
            1 => (3, usize::from(u16::from_be_bytes([rest[1], rest[2]]))),
            _ => panic!("an unusual length"),
        };
        let (packet, next) = rest.split_at(header + length);
        all.push(((first >> 2) & 0xf, packet.to_vec()));
        rest = next;
    }
    all
}

fn joined<'a>(packets: impl IntoIterator<Item = &'a (u8, Vec<u8>)>) -> Vec<u8> {
    packets.into_iter().flat_map(|(_, bytes)| bytes.clone()).collect()
}

#[test]
fn a_ring_without_a_binding_binds_nothing() {
    let packets = cut(made!("subkey.pgp"));
    let tags: Vec<u8> = packets.iter().map(|(tag, _)| *tag).collect();
    assert_eq!(tags, [6, 13, 2, 14, 2, 14, 2]);
    let signed = made!("subkey.sig");
    checked(&joined(&packets), signed, NOW).unwrap();
    let without = |at: usize| {
        let mut fewer = packets.clone();
        fewer.remove(at);
        checked(&joined(&fewer), signed, NOW).unwrap_err()
    };
    assert!(without(4).contains("does not bind"), "{}", without(4));
    assert!(without(2).contains("no user who is not revoked"), "{}", without(2));
    assert!(without(1).contains("a signature of type 0x13"), "{}", without(1));
    // The signature that binds the subkey for encryption does not bind the other.
    let mut crossed = packets.clone();
    crossed.swap(4, 6);
    let why = checked(&joined(&crossed), signed, NOW).unwrap_err();
    assert!(why.contains("what it signs was changed"), "{why}");
    // Somebody else's subkey: its binding is not by this key.
    let stolen = [cut(ED25519), packets[3..5].to_vec()].concat();
    let why = checked(&joined(&stolen), signed, NOW).unwrap_err();
    assert!(why.contains("a signature of type 0x18 by"), "{why}");
    // Without the back signature, which is in the part of the binding that is not signed.
    let header = |packet: &[u8]| if packet[0] & 3 == 0 { 2 } else { 3 };
    let binding = &packets[4].1[header(&packets[4].1)..];
    let primary = key::Key::parse(&packets[0].1[header(&packets[0].1)..]).unwrap();
    let length = |at: usize| usize::from(u16::from_be_bytes([binding[at], binding[at + 1]]));
    let at = 6 + length(4);
    let issuer = [&[0, 10, 9, 16][..], &primary.fingerprint.id()].concat();
    let body = [&binding[..at], &issuer, &binding[at + 2 + length(at)..]].concat();
    let bare = [&[0x89][..], &u16::try_from(body.len()).unwrap().to_be_bytes(), &body].concat();
    let mut alone = packets.clone();
    alone[4].1 = bare;
    let why = checked(&joined(&alone), signed, NOW).unwrap_err();
    assert!(why.contains("does not say so itself: OpenPGP: back signature: there is none"), "{why}");
}

#[test]
fn strangers_certifications_and_revoked_users_change_nothing() {
    // A certification of another key's user, put behind this one's.
    let (mine, other) = (cut(ED25519), cut(RSA));
    let certified = [mine.clone(), vec![other[2].clone()]].concat();
    checked(&joined(&certified), MESSAGE, NOW).unwrap();
    // But no revocation by another is passed over.
    let revoked = cut(made!("ed25519-revoked.pgp"));
    assert_eq!(revoked[1].0, 2);
    let foreign = [vec![other[0].clone(), revoked[1].clone()], other[1..].to_vec()].concat();
    let why = checked(&joined(&foreign), made!("rsa.sig"), NOW).unwrap_err();
    assert!(why.contains("a signature of type 0x20 by"), "{why}");
    // A user without the key's own word is none, and one with it remains.
    let added = [mine.clone(), vec![other[1].clone()]].concat();
    checked(&joined(&added), MESSAGE, NOW).unwrap();
    let only_added = [vec![mine[0].clone()], vec![other[1].clone(), other[2].clone()]].concat();
    assert!(checked(&joined(&only_added), MESSAGE, NOW).unwrap_err().contains("no user"));
    // Another user with another's name, under the first one's signature.
    let renamed = [vec![mine[0].clone()], vec![other[1].clone(), mine[2].clone()]].concat();
    assert!(checked(&joined(&renamed), MESSAGE, NOW).unwrap_err().contains("was changed"));
}

/// Each bit of a message, and of a ring, that is changed is refused, or is one of those that nobody signs: the content's date.
#[test]
fn every_bit_counts() {
    let flips = |bytes: &[u8], held: &dyn Fn(&[u8]) -> bool| -> Vec<usize> {
        let mut bytes = bytes.to_vec();
        let mut unnoticed = Vec::new();
        for at in 0..bytes.len() * 8 {
            bytes[at / 8] ^= 1 << (at % 8);
            if held(&bytes) {
                unnoticed.push(at / 8);
            }
            bytes[at / 8] ^= 1 << (at % 8);
        }
        unnoticed.dedup();
        unnoticed
    };
    let ring = Ring::parse(P256).unwrap();
    let rings = [ring];
    let unnoticed = flips(P256_MESSAGE, &|message| match check(message, &rings, NOW) {
        Ok(content) => {
            assert_eq!(content, PAYLOAD);
            true
        }
        Err(_) => false,
    });
    let content = P256_MESSAGE.windows(PAYLOAD.len()).position(|window| window == PAYLOAD).unwrap();
    assert!(!unnoticed.is_empty());
    // Its name lies before the date: gpg writes the file's, and its length counts.
    let name = content - 4 - "payload.json".len();
    assert!(unnoticed.iter().all(|at| (name..content).contains(at)), "{unnoticed:?}, content at {content}");
    assert_eq!(flips(P256, &|ring| checked(ring, P256_MESSAGE, NOW).is_ok()), [0; 0]);
}

#[test]
fn bounds() {
    // 64 MiB of zeros in 64 KiB.
    let mut bomb = flate2::write::DeflateEncoder::new(vec![0xa3, 1], flate2::Compression::best());
    std::io::Write::write_all(&mut bomb, &vec![0; 32 << 20]).unwrap();
    let why = checked(RSA, &bomb.finish().unwrap(), NOW).unwrap_err();
    assert!(why.contains("more than 64 KiB"), "{why}");
    assert!(checked(RSA, &vec![0xa3; MOST_MESSAGE + 1], NOW).unwrap_err().contains("more than 64 KiB"));
    assert!(Ring::parse(&vec![0x99; MOST_RING + 1]).unwrap_err().to_string().contains("more than 1 MiB"));
    assert!(Ring::parse(&[0xb4, 0].repeat(5000)).unwrap_err().to_string().contains("too many packets"));
    // Compressed twice.
    let mut twice = flate2::write::DeflateEncoder::new(vec![0xa3, 1], flate2::Compression::best());
    std::io::Write::write_all(&mut twice, made!("rsa.sig")).unwrap();
    assert!(checked(RSA, &twice.finish().unwrap(), NOW).unwrap_err().contains("want one signature"));
}

#[test]
fn armour() {
    let text = std::str::from_utf8(made!("ed25519.asc")).unwrap();
    for good in [
        text.replace('\n', "\r\n"),
        format!("\n\n{text}"),
        text.replacen("\n\n", "\nComment: x\n\n", 1),
        format!("{text}{text}"),
    ] {
        checked(good.as_bytes(), MESSAGE, NOW).unwrap();
    }
    for (bad, words) in [
        (text.replace("PUBLIC", "PRIVATE"), "want -----BEGIN"),
        (format!("hello\n{text}"), "want -----BEGIN"),
        (text.replacen("\n\n", "\n", 1), "no empty line"),
        (text.replace("-----END PGP PUBLIC KEY BLOCK-----", ""), "no end"),
        (text.replacen("\n\n", "\n\n!", 1), "not base64"),
    ] {
        let why = checked(bad.as_bytes(), MESSAGE, NOW).unwrap_err();
        assert!(why.contains(words), "{words}: {why}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Ring::parse(&bytes).is_err());
        prop_assert!(checked(ED25519, &bytes, NOW).is_err());
    }

    #[test]
    fn nothing_else_comes_out_of_a_changed_message(
        which in 0..4usize, at in any::<prop::sample::Index>(), cut in 0..8usize,
        put in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let (ring, message) = [
            (ED25519, MESSAGE), (RSA, made!("rsa.sig")), (made!("p256.pgp"), made!("p256.sig")),
            (made!("subkey.pgp"), made!("subkey.sig")),
        ][which];
        let splice = |bytes: &[u8]| {
            let at = at.index(bytes.len());
            let mut changed = bytes.to_vec();
            changed.splice(at..(at + cut).min(bytes.len()), put.iter().copied());
            changed
        };
        if let Ok(content) = checked(ring, &splice(message), NOW) {
            prop_assert_eq!(content, PAYLOAD);
        }
        if let Ok(content) = checked(&splice(ring), message, NOW) {
            prop_assert_eq!(content, PAYLOAD);
        }
    }
}
