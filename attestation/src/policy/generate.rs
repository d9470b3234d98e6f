//! Writing a policy: one container, as its owner means it, and nothing else.
//!
//! Owns: the Rego text. Does not own: where the container's configuration comes from; it has to be in the form in which the
//! guest will ask (`create_input`), so that what is compared is the same on both sides.

use std::fmt::Write;

use serde_json::{Value, json};

/// What the owner allows beside the container itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Command lines that the host may run in the container, to the word.
    pub exec: Vec<Vec<String>>,
    /// The host may write to the container's standard input.
    pub stdin: bool,
    /// Fields that the host may choose, such as `OCI.Hostname`.
    pub free: Vec<String>,
}

/// What the host may do without an owner's loss: it could stop the machine as well.
const HOSTS: [&str; 11] = [
    "CreateSandboxRequest",
    "UpdateInterfaceRequest",
    "StartContainerRequest",
    "SignalProcessRequest",
    "ReadStreamRequest",
    "PauseContainerRequest",
    "UpdateContainerRequest",
    "ListProcessesRequest",
    "StatsContainerRequest",
    "RemoveContainerRequest",
    "DestroySandboxRequest",
];

/// The policy that admits a container like `input` (a `CreateContainerRequest`), and denies it when any field but its id is
/// another.
#[must_use]
pub fn generate(input: &Value, allowed: &Allowed) -> String {
    let mut fields = Vec::new();
    leaves("", input, &mut fields);
    fields.retain(|(name, _)| name != "container_id" && !allowed.free.contains(name));
    let mut text = preamble("one container, to the field", allowed);
    let _ = writeln!(text, "expected := {{");
    for (name, value) in &fields {
        let _ = writeln!(text, "\t{}: {},", json!(name), ordered(name, &value.to_string()));
    }
    text += "}\n\nasked := {\n";
    for (name, _) in &fields {
        let path: String =
            name.split('.').fold(String::from("input"), |path, part| path + &format!("[{}]", json!(part)));
        let _ = writeln!(text, "\t{}: {},", json!(name), ordered(name, &path));
    }
    let _ = writeln!(text, "}}\n\nexec := {}\n", json!(allowed.exec));
    text += RULES;
    text
}

/// What every policy begins with.
pub(super) fn preamble(what: &str, allowed: &Allowed) -> String {
    let mut text = format!(
        "# Written by `coffer policy generate`: {what}. The names are those of the denial.\n\
         package agent_policy\n\nimport rego.v1\n\n",
    );
    for rule in HOSTS {
        let _ = writeln!(text, "{rule} := true\n");
    }
    let _ = writeln!(text, "WriteStreamRequest := {}\n", allowed.stdin);
    text
}

/// Engines give what they mount themselves in any order, another each time.
fn ordered(name: &str, term: &str) -> String {
    if name == "OCI.Mounts" { format!("sort({term})") } else { term.to_owned() }
}

/// The comparison. A field that is not there makes `asked` undefined, which denies.
const RULES: &str = r#"differing contains name if {
	some name, value in expected
	asked[name] != value
}

default CreateContainerRequest := false

CreateContainerRequest if {
	asked
	count(differing) == 0
}

default ExecProcessRequest := false

ExecProcessRequest if input.process.Args in exec

reasons contains {"field": name, "value": asked[name], "allowed": expected[name]} if {
	input.OCI
	some name in differing
}

reasons contains {"field": "process.Args", "value": input.process.Args, "allowed": exec} if input.process

reasons contains {"field": "stdin", "value": true, "allowed": WriteStreamRequest} if input.stdin
"#;

/// Members that are compared, each by its path: objects by their members, everything else whole.
fn leaves(path: &str, value: &Value, fields: &mut Vec<(String, Value)>) {
    match value {
        // What a container's own words are (environment, kernel parameters) is no path.
        Value::Object(members) if path != "OCI.Linux.Sysctl" => {
            for (name, value) in members {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                leaves(&path, value, fields);
            }
        }
        other => fields.push((path.to_owned(), other.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Policy, Rule, VerifiedImage, create_input, process_input};

    /// A configuration that podman 4.3 wrote, with a volume, a tmpfs and a capability less, as the guest gets it.
    const SPEC: &str = include_str!("../../testdata/podman/spec.json");

    fn input(id: &str) -> Value {
        create_input(
            id,
            &serde_json::from_str(SPEC).unwrap(),
            Some(VerifiedImage { digest: "sha256:00", name: None }),
        )
    }

    fn policy(allowed: &Allowed) -> Policy {
        Policy::parse(&generate(&input("a"), allowed)).unwrap()
    }

    #[test]
    fn it_admits_that_container_under_any_id() {
        let mut policy = policy(&Allowed::default());
        for id in ["a", "b"] {
            policy.check(Rule::CreateContainer, &input(id)).unwrap();
        }
        let mut reversed = input("a");
        reversed["OCI"]["Mounts"].as_array_mut().unwrap().reverse();
        policy.check(Rule::CreateContainer, &reversed).unwrap();
        policy.check(Rule::StartContainer, &json!({ "container_id": "a" })).unwrap();
        assert!(
            policy.check(Rule::ExecProcess, &process_input("a", "e", &json!({ "args": ["sh"] }))).is_err()
        );
        assert!(policy.check(Rule::WriteStream, &json!({ "container_id": "a", "stdin": true })).is_err());
    }

    /// Every place of a document, changed in one way that its type allows.
    fn changes(value: &Value) -> Vec<Value> {
        match value {
            Value::Object(members) => {
                let mut all = Vec::new();
                for (name, member) in members {
                    for changed in changes(member) {
                        let mut copy = members.clone();
                        copy.insert(name.clone(), changed);
                        all.push(Value::Object(copy));
                    }
                    let mut copy = members.clone();
                    copy.remove(name);
                    all.push(Value::Object(copy));
                }
                all
            }
            Value::Array(items) => {
                let mut longer = items.clone();
                longer.push(json!("more"));
                let mut all = vec![Value::Array(longer)];
                for at in 0..items.len() {
                    for changed in changes(&items[at]) {
                        let mut copy = items.clone();
                        copy[at] = changed;
                        all.push(Value::Array(copy));
                    }
                    let mut copy = items.clone();
                    copy.remove(at);
                    all.push(Value::Array(copy));
                }
                all
            }
            Value::Bool(value) => vec![json!(!value)],
            Value::Number(value) => vec![json!(value.as_u64().unwrap_or_default() + 1)],
            Value::String(text) => vec![json!(format!("{text}x")), Value::Null],
            Value::Null => vec![json!("x")],
        }
    }

    #[test]
    fn each_field_changed_is_denied_and_named() {
        let mut policy = policy(&Allowed::default());
        let honest = input("a");
        let all = changes(&honest);
        assert!(all.len() > 200, "{}", all.len());
        for changed in all {
            let same = |key: &str| changed.get(key) == honest.get(key);
            let checked = policy.check(Rule::CreateContainer, &changed);
            if ["OCI", "image", "image_name", "host_root"].into_iter().all(same) {
                checked.unwrap(); // only the id
            } else {
                let denied = checked.expect_err(&changed.to_string()).to_string();
                assert!(!denied.contains('\n'));
            }
        }
        let mut other = honest;
        other["OCI"]["Process"]["Args"] = json!(["sh"]);
        let denied = policy.check(Rule::CreateContainer, &other).unwrap_err().reason;
        assert_eq!(denied, "OCI.Process.Args is [\"sh\"], allowed: [\"cat\",\"/data/x\"]");
    }

    #[test]
    fn what_the_owner_leaves_free_may_change_and_nothing_more_may_be_run() {
        let allowed = Allowed {
            exec: vec![vec!["date".into(), "-u".into()]],
            stdin: true,
            free: vec!["OCI.Hostname".into()],
        };
        let mut policy = policy(&allowed);
        let mut named = input("a");
        named["OCI"]["Hostname"] = json!("other");
        policy.check(Rule::CreateContainer, &named).unwrap();
        let mut run =
            |args: Value| policy.check(Rule::ExecProcess, &process_input("a", "e", &json!({ "args": args })));
        run(json!(["date", "-u"])).unwrap();
        for args in [json!(["date"]), json!(["date", "-u", "-s"]), json!(["sh", "-c", "date -u"]), json!([])]
        {
            assert!(run(args).is_err());
        }
        policy.check(Rule::WriteStream, &json!({ "container_id": "a", "stdin": true })).unwrap();
    }

    #[test]
    fn words_of_a_container_are_no_rego() {
        let mut evil = input("a");
        evil["OCI"]["Process"]["Args"] = json!(["\"}\nExecProcessRequest := true\n#", "`", "\u{1f}\\"]);
        let mut policy = Policy::parse(&generate(&evil, &Allowed::default())).unwrap();
        policy.check(Rule::CreateContainer, &evil).unwrap();
        assert!(
            policy.check(Rule::ExecProcess, &process_input("a", "e", &json!({ "args": ["sh"] }))).is_err()
        );
    }
}
