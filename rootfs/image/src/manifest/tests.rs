use proptest::prelude::*;

use super::*;

fn descriptor(media_type: &str) -> serde_json::Value {
    serde_json::json!({"mediaType": media_type, "digest": Digest::sha256(b"").to_string(), "size": 0})
}

#[test]
fn platform_of_this_machine_is_chosen() {
    let mut other = descriptor(MANIFEST);
    other["platform"] = serde_json::json!({"architecture": "riscv64", "os": "linux"});
    let mut ours = descriptor(MANIFEST);
    ours["size"] = 7.into();
    ours["platform"] = serde_json::json!({"architecture": architecture(), "os": "linux", "features": []});
    let text = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [other, ours]});
    let Document::Index(mut index) = Document::parse(text.to_string().as_bytes(), None).unwrap() else {
        panic!("not an index")
    };
    assert_eq!(index.choose().unwrap().size, 7);
    index.manifests.pop();
    let message = index.choose().unwrap_err().to_string();
    assert!(message.ends_with("it has linux/riscv64"), "{message}");
}

#[test]
fn a_variant_that_not_every_machine_has_is_only_chosen_where_there_is_no_other() {
    let index = |variants: &[serde_json::Value]| {
        let entry = |(i, variant): (usize, &serde_json::Value)| {
            let mut entry = descriptor(MANIFEST);
            entry["size"] = i.into();
            entry["platform"] =
                serde_json::json!({"architecture": architecture(), "os": "linux", "variant": variant});
            entry
        };
        let manifests: Vec<_> = variants.iter().enumerate().map(entry).collect();
        let text = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let Document::Index(index) = Document::parse(text.to_string().as_bytes(), None).unwrap() else {
            panic!("not an index")
        };
        index.choose().unwrap().size
    };
    assert_eq!(index(&["v3".into(), serde_json::Value::Null, "".into()]), 1);
    assert_eq!(index(&["v3".into(), "v1".into(), "".into()]), 1);
    assert_eq!(index(&["v4".into(), "".into()]), 1);
    assert_eq!(index(&["v3".into(), "v2".into()]), 0);
}

#[test]
fn one_blob_is_not_read_in_two_ways() {
    let both = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor("x"),
        "layers": [], "manifests": []});
    assert!(Document::parse(both.to_string().as_bytes(), None).is_err());
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor("x"), "layers": []});
    let bytes = manifest.to_string().into_bytes();
    assert!(Document::parse(&bytes, Some(MANIFEST)).is_ok());
    assert!(Document::parse(&bytes, Some(INDEX)).is_err());
    // The same member twice: parsers differ in which counts.
    let twice = br#"{"schemaVersion":2,"schemaVersion":2,"manifests":[]}"#;
    assert!(matches!(Document::parse(twice, None), Err(ManifestError::Json(_))));
    assert!(matches!(Document::parse(br#"{"schemaVersion":1}"#, None), Err(ManifestError::Schema(1))));
}

#[test]
fn layer_types() {
    let of = |text: &str| layer_type(&serde_json::from_value(descriptor(text)).unwrap());
    let oci = "application/vnd.oci.image.layer.v1.tar";
    assert_eq!(of(oci).unwrap(), (Compression::None, false));
    assert_eq!(of(&format!("{oci}+gzip")).unwrap(), (Compression::Gzip, false));
    assert_eq!(of(&format!("{oci}+zstd+encrypted")).unwrap(), (Compression::Zstd, true));
    assert_eq!(of(&format!("{oci}+encrypted")).unwrap(), (Compression::None, true));
    assert_eq!(of("application/vnd.docker.image.rootfs.diff.tar.gzip").unwrap(), (Compression::Gzip, false));
    for other in ["application/vnd.in-toto+json", &format!("{oci}+lz4"), &format!("{oci}+encrypted+gzip"), ""]
    {
        assert!(of(other).is_err(), "{other}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Document::parse(&bytes, None);
    }
}
