//! Writing a policy: one container, as its owner means it, and nothing else.
//!
//! Owns: the Rego text. Does not own: where the container's configuration comes from; it has to be in the form in which the
//! guest will ask (`create_input`), so that what is compared is the same on both sides.

use std::fmt::Write;

use serde_json::{Value, json};

use super::pod::VARIABLES;

/// What the owner allows beside the container itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Command lines that the host may run in the container, to the word.
    pub exec: Vec<Vec<String>>,
    /// Variables that the engine gives to these, beside the container's own and those of every engine.
    pub exec_env: Vec<String>,
    /// Directories that it may start these in, beside the container's own.
    pub exec_cwd: Vec<String>,
    /// The host may write to the container's standard input.
    pub stdin: bool,
    /// The container has a network. Which addresses, the host chooses.
    pub network: bool,
    /// Fields that the host may choose, such as `OCI.Hostname`.
    pub free: Vec<String>,
}

/// What the host may do without an owner's loss: it could stop the machine as well.
const HOSTS: [&str; 9] = [
    "CreateSandboxRequest",
    "StartContainerRequest",
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
    if !allowed.exec.is_empty() {
        text += &exec_terms(input, allowed);
    }
    text += RULES;
    text
}

/// What a command line may be run with: a variable such as LD_PRELOAD, or PATH, would make another program of it.
fn exec_terms(input: &Value, allowed: &Allowed) -> String {
    let process = &input["OCI"]["Process"];
    let own = |name: &str| process[name].as_array().cloned().unwrap_or_default();
    let mut env = own("Env");
    env.extend(allowed.exec_env.iter().map(|pair| json!(pair)));
    let mut cwd = vec![process["Cwd"].clone()];
    cwd.extend(allowed.exec_cwd.iter().map(|path| json!(path)));
    let sets = process["Capabilities"].as_object().into_iter().flat_map(serde_json::Map::values);
    let mut capabilities: Vec<&str> =
        sets.filter_map(Value::as_array).flatten().filter_map(Value::as_str).collect();
    capabilities.sort_unstable();
    capabilities.dedup();
    format!(
        "exec_env := {}\n\nexec_others := {}\n\nexec_cwd := {}\n\nexec_capabilities := {}\n\n{EXEC}",
        json!(env),
        json!(VARIABLES),
        json!(cwd),
        json!(capabilities)
    )
}

const EXEC: &str = r#"ExecProcessRequest if {
	input.process.Args in exec
	every entry in input.process.Env { admits_variable(entry) }
	input.process.Cwd in exec_cwd
	admits_container_user
	every _, set in input.process.Capabilities {
		every capability in set { capability in exec_capabilities }
	}
}

admits_variable(entry) if entry in exec_env

admits_variable(entry) if {
	some pattern in exec_others
	regex.match(pattern, entry)
}

# The container's own user, whom the guest knows. Root may set its groups itself.
admits_user(user, own) if {
	user.UID == own.UID
	user.GID == own.GID
	every group in user.AdditionalGids { group in array.concat([own.GID], own.AdditionalGids) }
}

admits_user(user, own) if {
	user.UID == 0
	own.UID == 0
}

admits_container_user if admits_user(input.process.User, input.container.User)

reasons contains {"field": "process.User", "value": input.process.User, "allowed": [own | own := input.container.User]} if {
	input.process
	not admits_container_user
}

reasons contains {"field": "process.Env", "value": entry, "allowed": exec_env} if {
	some entry in input.process.Env
	not admits_variable(entry)
}

reasons contains {"field": "process.Cwd", "value": input.process.Cwd, "allowed": exec_cwd} if {
	input.process
	not input.process.Cwd in exec_cwd
}

reasons contains {"field": "process.Capabilities", "value": capability, "allowed": exec_capabilities} if {
	some _, set in input.process.Capabilities
	some capability in set
	not capability in exec_capabilities
}

"#;

/// What every policy begins with.
pub(super) fn preamble(what: &str, allowed: &Allowed) -> String {
    let mut text = format!(
        "# Written by `coffer policy generate`: {what}. The names are those of the denial.\n\
         package agent_policy\n\nimport rego.v1\n\n",
    );
    for rule in HOSTS {
        let _ = writeln!(text, "{rule} := true\n");
    }
    text += if allowed.network { "UpdateInterfaceRequest := true\n\n" } else { NO_NETWORK };
    let _ = writeln!(text, "WriteStreamRequest := {}\n", allowed.stdin);
    text + SIGNALS.trim_start() + "\n"
}

/// What ends a program or stops it, and tells it nothing else.
const SIGNALS: &str = include_str!("signals.rego");

/// A secret could leave by a network that was not meant to be.
const NO_NETWORK: &str = r#"default UpdateInterfaceRequest := false

UpdateInterfaceRequest if {
	input.interfaces == []
	input.routes == []
}

reasons contains {"field": "interfaces", "value": input.interfaces, "allowed": []} if input.interfaces != []

"#;

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
    use crate::policy::{Policy, Rule, VerifiedImage, create_input, process_input, with_container};

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
    fn a_denial_names_variables_and_says_none_of_their_values() {
        let mut other = input("a");
        other["OCI"]["Process"]["Env"].as_array_mut().unwrap().push(json!("TOKEN=hunter2"));
        let denied = policy(&Allowed::default()).check(Rule::CreateContainer, &other).unwrap_err().reason;
        assert!(denied.contains("\"A=…\"") && denied.contains("\"TOKEN=…\""), "{denied}");
        assert!(!denied.contains("hunter2") && !denied.contains("A=1"), "{denied}");
    }

    #[test]
    fn signals_end_or_stop_the_program_and_its_command_lines_stay_its_own() {
        let mut policy = policy(&Allowed::default());
        let signal =
            |signal: u32| json!({ "container_id": "a", "signal": signal, "all": false, "stop_signal": 3 });
        for sent in [3, 9, 15] {
            policy.check(Rule::SignalProcess, &signal(sent)).unwrap();
        }
        let denied = policy.check(Rule::SignalProcess, &signal(10)).unwrap_err().to_string();
        assert!(
            denied.starts_with("policy: SignalProcessRequest denied: signal is 10, allowed: ["),
            "{denied}"
        );
        policy.check(Rule::ListProcesses, &json!({ "container_id": "a" })).unwrap();
        policy.check(Rule::ListCommandLines, &json!({ "container_id": "a" })).unwrap_err();
    }

    #[test]
    fn what_the_owner_leaves_free_may_change_and_nothing_more_may_be_run() {
        let allowed = Allowed {
            exec: vec![vec!["date".into(), "-u".into()]],
            exec_env: vec!["PATH=/engine".into()],
            exec_cwd: vec!["/".into()],
            stdin: true,
            network: false,
            free: vec!["OCI.Hostname".into()],
        };
        let mut policy = policy(&allowed);
        let mut named = input("a");
        named["OCI"]["Hostname"] = json!("other");
        policy.check(Rule::CreateContainer, &named).unwrap();
        let own = json!({ "User": { "UID": 0, "GID": 0, "AdditionalGids": [] } });
        let mut run = |args: Value| {
            let asked = process_input("a", "e", &json!({ "args": args }));
            policy.check(Rule::ExecProcess, &with_container(asked, Some(&own)))
        };
        run(json!(["date", "-u"])).unwrap();
        for args in [json!(["date"]), json!(["date", "-u", "-s"]), json!(["sh", "-c", "date -u"]), json!([])]
        {
            assert!(run(args).is_err());
        }
        policy.check(Rule::WriteStream, &json!({ "container_id": "a", "stdin": true })).unwrap();
    }

    #[test]
    fn a_container_without_a_network_gets_none() {
        let none = json!({ "interfaces": [], "routes": [] });
        let one = json!({ "interfaces": [{ "name": "eth0" }], "routes": [] });
        let mut with = policy(&Allowed { network: true, ..Allowed::default() });
        let mut without = policy(&Allowed::default());
        for network in [&none, &one] {
            with.check(Rule::UpdateInterface, network).unwrap();
        }
        without.check(Rule::UpdateInterface, &none).unwrap();
        let denied = without.check(Rule::UpdateInterface, &one).unwrap_err().to_string();
        assert!(denied.starts_with("policy: UpdateInterfaceRequest denied: interfaces is "), "{denied}");
        let route = json!({ "interfaces": [], "routes": [{ "interface": "eth0" }] });
        without.check(Rule::UpdateInterface, &route).unwrap_err();
        without.check(Rule::CreateSandbox, &json!({ "hostname": "web" })).unwrap();
    }

    #[test]
    fn a_command_line_that_may_be_run_stays_the_same_program() {
        let allowed = Allowed {
            exec: vec![vec!["date".into()]],
            exec_env: vec!["PATH=/engine".into()],
            exec_cwd: vec!["/".into()],
            ..Allowed::default()
        };
        let mut policy = policy(&allowed);
        let mut run = |field: &str, value: Value| {
            let mut process = json!({ "args": ["date"], "cwd": "/", "env": ["PATH=/engine", "TERM=xterm"],
                "capabilities": { "bounding": ["CAP_KILL"] } });
            process[field] = value;
            let own = json!({ "User": { "UID": 0, "GID": 0, "AdditionalGids": [] } });
            let asked = with_container(process_input("a", "e", &process), Some(&own));
            policy.check(Rule::ExecProcess, &asked).map_err(|denied| denied.reason)
        };
        run("terminal", json!(true)).unwrap();
        let own = input("a")["OCI"]["Process"]["Env"].clone();
        run("env", own).unwrap();
        let denied = run("env", json!(["LD_PRELOAD=/etc/hosts"])).unwrap_err();
        assert!(denied.contains("process.Env is \"LD_PRELOAD=…\", allowed: ["), "{denied}");
        for (field, value) in [
            ("env", json!(["PATH=/data"])),
            ("env", json!(["TERM=xterm\nLD_PRELOAD=/etc/hosts"])),
            ("env", json!([7])),
            ("env", json!("LD_PRELOAD=/etc/hosts")),
            ("cwd", json!("/data")),
            ("capabilities", json!({ "ambient": ["CAP_SYS_ADMIN"] })),
        ] {
            assert!(run(field, value.clone()).is_err(), "{field}: {value}");
        }
    }

    /// An image's user may be a name that only the guest can look up, so it is the guest that says who the container is.
    #[test]
    fn a_command_line_that_may_be_run_is_so_by_the_containers_user_and_no_other() {
        let allowed = Allowed { exec: vec![vec!["date".into()]], ..Allowed::default() };
        let mut policy = policy(&allowed);
        let cwd = input("a")["OCI"]["Process"]["Cwd"].clone();
        let mut run = |user: Value, own: Option<Value>| {
            let asked = process_input("a", "e", &json!({ "args": ["date"], "cwd": cwd, "user": user }));
            let checked = policy.check(Rule::ExecProcess, &with_container(asked, own.as_ref()));
            checked.map_err(|denied| denied.reason)
        };
        let own = || Some(json!({ "User": { "UID": 7, "GID": 8, "AdditionalGids": [9] } }));
        run(json!({ "uid": 7, "gid": 8 }), own()).unwrap();
        run(json!({ "uid": 7, "gid": 8, "additionalGids": [8, 9] }), own()).unwrap();
        let denied = run(json!({ "uid": 0, "gid": 0 }), own()).unwrap_err();
        assert!(denied.contains("process.User is ") && denied.contains("allowed: ["), "{denied}");
        for user in [
            json!({ "uid": 0, "gid": 8 }),
            json!({ "uid": 7, "gid": 0 }),
            json!({ "uid": 8, "gid": 8 }),
            json!({ "uid": 7, "gid": 8, "additionalGids": [9, 0] }),
            // Nobody is root.
            Value::Null,
        ] {
            assert!(run(user.clone(), own()).is_err(), "{user}");
        }
        let root = || Some(json!({ "User": { "UID": 0, "GID": 0, "AdditionalGids": [] } }));
        run(json!({ "uid": 0, "gid": 0, "additionalGids": [1, 2] }), root()).unwrap();
        run(json!({ "uid": 7, "gid": 8 }), root()).unwrap_err();
        run(json!({ "uid": 0, "gid": 0 }), None).unwrap_err();
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
