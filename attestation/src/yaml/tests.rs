//! What is read, and what is refused in which words. That others read the same is for `tests/steps/37-yaml`.

use super::*;
use proptest::prelude::*;
use serde_json::{Map, json};

fn one(text: &str) -> Value {
    let mut all = read(text).unwrap_or_else(|e| panic!("{text}\n{e}"));
    assert_eq!(all.len(), 1, "{text}");
    all.remove(0)
}

fn refused(text: &str) -> String {
    match read(text) {
        Err(error) => error.to_string(),
        Ok(value) => panic!("{text}\nwas read: {value:?}"),
    }
}

#[test]
fn a_pod_is_read() {
    let text = r#"# a pod
apiVersion: v1
kind: Pod
metadata:
  name: web
  annotations: {}
spec:
  containers:
  - name: app   # in the key's own column
    image: "registry.example/app:1"
    command: ["/bin/app", '--listen', 127.0.0.1:8080]
    args:
    - |
      two
        lines
    - >-
      one
      line

      and another
    env:
    - name: EMPTY
      value:
    - {name: B, value: "a: b # no comment"}
  hostNetwork: false
  terminationGracePeriodSeconds: 30
...
---
kind: Other
"#;
    let all = read(text).unwrap();
    assert_eq!(all[1], json!({"kind": "Other"}));
    let container = json!({
        "name": "app", "image": "registry.example/app:1", "command": ["/bin/app", "--listen", "127.0.0.1:8080"],
        "args": ["two\n  lines\n", "one line\nand another"],
        "env": [{"name": "EMPTY", "value": null}, {"name": "B", "value": "a: b # no comment"}],
    });
    assert_eq!(
        all[0],
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "annotations": {}},
            "spec": {"containers": [container], "hostNetwork": false, "terminationGracePeriodSeconds": 30}})
    );
    assert_eq!(read("# nothing\n---\n---\n"), Ok(Vec::new()));
}

#[test]
fn scalars_of_all_kinds() {
    for (word, value) in [
        ("a b", json!("a b")),
        ("-1", json!(-1)),
        ("0", json!(0)),
        ("18446744073709551615", json!(u64::MAX)),
        ("1.50", json!(1.5)),
        ("~", json!(null)),
        ("True", json!(true)),
        ("100m", json!("100m")),
        ("10.0.0.1", json!("10.0.0.1")),
        ("10.0.0.1:80", json!("10.0.0.1:80")),
        ("fd00::1", json!("fd00::1")),
        ("1.2.3", json!("1.2.3")),
        ("-", json!([null])),
        ("-x", json!("-x")),
        ("a#b", json!("a#b")),
        ("http://a/b?c", json!("http://a/b?c")),
        (r#""\x41\u00e9\U0001F600\t\/\\""#, json!("Aé😀\t/\\")),
        ("'it''s'", json!("it's")),
        ("\"a\n    b\n\n    c \\\n    d\\n\"", json!("a b\nc d\n")),
        ("plain\n    over\n\n    lines # and a comment", json!("plain over\nlines")),
        ("|2-\n    two\n  ", json!("  two")),
        ("|+\n  a\n\n", json!("a\n\n\n")),
        (">\n  a\n  b\n    c\n  d\n\n  e\n", json!("a b\n  c\nd\ne\n")),
        ("[a, [b, {c: d}], 'e', ]", json!(["a", ["b", {"c": "d"}], "e"])),
        ("{\"a\":1,\n\"b\": [\n]\n}", json!({"a": 1, "b": []})),
    ] {
        let text = if value == json!([null]) { format!("k:\n{word}\n") } else { format!("k: {word}\n") };
        assert_eq!(one(&text), json!({ "k": value }), "{text}");
    }
}

#[test]
fn what_readers_disagree_about_is_refused() {
    let words = "yes No ON off y N 017 0o17 0x1f 0b1 1_000 +1 .5 5. 1e3 1.5E+3 12:30 1:30:45.5 .inf -.INF .NaN 2024-01-01 2024-1-1T10:00:00Z = <<";
    for word in words.split(' ') {
        assert!(refused(&format!("k: {word}")).contains("put it into quotes"), "{word}");
        assert!(refused(&format!("k: [{word}]")).contains("put it into quotes"), "{word}");
        assert_eq!(one(&format!("k: '{word}'")), json!({ "k": word }));
        assert!(refused(&format!("{word}: v")).starts_with("YAML: line 1"), "{word}");
    }
    assert!(refused("k: 99999999999999999999").contains("a number"));
}

#[test]
fn what_is_not_read_is_named_with_its_line() {
    for (text, words) in [
        ("a: 1\nb: &x c", r#"line 2: "&x c": anchors are not read here: write the value again"#),
        ("a: *x", "aliases"),
        ("a: !!str b", "tags"),
        ("<<: {a: b}", "a merge key"),
        ("%YAML 1.2\n---\na: b", "directives"),
        ("? a\n: b", "complex keys"),
        ("a:\n\tb: c", r#"line 2: "\tb: c": tabs are not read here: write spaces"#),
        ("a: b\tc", "tabs"),
        ("a: 1\nb: 2\na: 3", r#"line 3: "a: 3": the key stands in this mapping already"#),
        ("{a: 1, a: 2}", "twice"),
        ("1: a", "a key is text"),
        ("[a]: b", "nothing may follow here"),
        ("a: b: c", "a key cannot stand here"),
        ("a: \"b\" c", "nothing may follow here"),
        ("a: \"b", "the closing quote is missing"),
        ("a:\n  b: 'c\nd: e", "the closing quote is missing"),
        ("a: [b", "the closing bracket is missing"),
        ("a: [b c: d]", "a comma or the closing bracket is missing"),
        ("a: {b}", "a key's colon is missing"),
        ("a: 1\n  b: 2", "a key cannot stand here"),
        ("a:\n  b: 1\n c: 2", "line 3"),
        ("a:\n  - b\n   - c: d", "a key cannot stand here"),
        ("a: |x\n b", "a block scalar begins"),
        ("a: @b", "reserved"),
        ("just text", "a mapping or a list"),
        ("a: \"\\q\"", "no escape of YAML"),
        ("a: \"\\ud83d\\ude00\"", "no escape of YAML"),
        ("a: b\u{85}c", "control characters"),
        ("\u{feff}a: b", "byte order marks"),
        ("- a\nb: c", "neither in line"),
    ] {
        let said = refused(text);
        assert!(said.contains(words) && !said.contains('\n'), "{text}: {said}");
    }
    assert!(refused(&"[".repeat(65)).contains("64 collections"));
    assert!(refused(&format!("{}a", "- ".repeat(65))).contains("64 collections"));
    assert!(refused(&" ".repeat(MOST_BYTES + 1)).contains("1 MiB"));
}

/// Any value, as block or flow with every string quoted: a writer that shares nothing with the reader.
fn write(value: &Value, indent: usize, flow: bool, out: &mut String) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(members) if !flow && !members.is_empty() => {
            for (key, member) in members {
                *out += &format!("\n{pad}{}:", json!(key));
                write(member, indent + 2, member.is_string(), out);
            }
        }
        Value::Array(items) if !flow && !items.is_empty() => {
            for item in items {
                *out += &format!("\n{pad}-");
                write(item, indent + 1, !item.is_object(), out);
            }
        }
        other => *out += &format!(" {other}"),
    }
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~äß€]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[ -~]{0,8}", inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_reads_back(value in values(), flow: bool) {
        let value = json!({ "k": value });
        let mut text = String::new();
        write(&value, 0, flow, &mut text);
        prop_assert_eq!(one(&text), value, "{}", text);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "([-a:{}\\[\\],'\"|>#&*!?%~\n\t ]|  |\n  |- |: |yes|01){0,60}") {
        if let Err(error) = read(&text) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
}
