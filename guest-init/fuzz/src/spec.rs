//! A container's configuration: what init makes of it, against what the configuration's JSON says.
//!
//! Owns: an independent reading of filters, device rules and limits. Does not own: running programs (`bpf`).

use coffer_init::container::{self, fuzz};
use serde_json::Value;

use crate::bpf;

/// Looks at everything that init would do with it.
pub(crate) fn look(value: &Value) {
    let places = fuzz::check_places(value);
    let Ok(spec) = container::parse_spec(value.clone()) else { return };
    if places.is_ok() {
        let root = value.pointer("/root/path").and_then(Value::as_str).expect("it has a root");
        assert!(root.starts_with("/run/coffer/share/") && !root.contains("/../"));
    }
    for (_, propagation, _, data) in fuzz::mounts(&spec) {
        assert!(propagation != Some(0));
        for word in ["ro", "rbind", "nosuid", "rprivate", "rro"] {
            assert!(data.iter().all(|d| d != word), "{word} is no file system's");
        }
    }
    if let Ok(programs) = fuzz::filters(&spec)
        && let Some(profile) = value.pointer("/linux/seccomp").filter(|p| !p.is_null())
    {
        filters(profile, &programs);
    }
    if let (Some(found), Some(said)) = (fuzz::resources(&spec), value.pointer("/linux/resources")) {
        resources(said, found);
    }
    for map in fuzz::maps(&spec).into_iter().flatten() {
        let mut lines = map.lines();
        assert!(lines.all(|line| line.split(' ').filter(|n| n.parse::<u32>().is_ok()).count() == 3));
    }
    if let Ok(lines) = fuzz::clocks(&spec) {
        let mut lines = lines.lines();
        assert!(lines.all(|l| l.starts_with("monotonic ") || l.starts_with("boottime ")));
    }
    if let Ok(files) = fuzz::parameters(&spec) {
        assert!(files.iter().all(|file| file.starts_with("/proc/sys/")), "{files:?}");
    }
    if let Some(process) = spec.process() {
        environment(&fuzz::environment(process));
    }
    let _ = fuzz::others(&spec);
}

/// No name twice, and a home.
pub(crate) fn environment(pairs: &[String]) {
    let mut names: Vec<&str> = pairs.iter().map(|pair| pair.split('=').next().unwrap_or_default()).collect();
    assert!(names.contains(&"HOME"));
    names.sort_unstable();
    assert!(names.windows(2).all(|two| two[0] != two[1]), "{pairs:?}");
}

/// Limits and rules for devices.
pub(crate) fn resources(said: &Value, found: &fuzz::Resources) {
    for (file, _) in fuzz::limits(found).into_iter().flatten() {
        assert!(!file.contains('/') && file.contains('.') && !file.starts_with("cgroup."), "{file}");
    }
    if let Ok(Some(program)) = fuzz::devices(found) {
        devices(&said["devices"], &program);
    }
}

/// What every container may do (docs/oci.md): any node made, and these used.
const OWN: [(i64, i64); 8] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];

/// For some devices and each way to use them: the last rule that names both decides.
fn devices(rules: &Value, program: &[(u8, u8, i16, i32)]) {
    bpf::verify(program);
    let rules: Vec<&Value> = rules.as_array().into_iter().flatten().collect();
    let mut asked = vec![("c", 1, 3), ("c", 10, 229), ("b", 8, 0), ("c", 136, 5), ("b", 1, 3)];
    for rule in rules.iter().take(4) {
        let number = |name: &str| rule[name].as_i64().filter(|n| *n >= 0).unwrap_or(7);
        asked.push((if rule["type"] == "b" { "b" } else { "c" }, number("major"), number("minor")));
    }
    for (kind, major, minor) in asked {
        for (letter, bit) in [('m', 1), ('r', 2), ('w', 4)] {
            let any = |value: &Value, wanted: i64| value.as_i64().is_none_or(|v| v == -1 || v == wanted);
            let fits = |rule: &&&Value| {
                let is_kind = match rule["type"].as_str().unwrap_or("a") {
                    "a" => true,
                    "u" => kind == "c",
                    other => other == kind,
                };
                let letters = rule["access"].as_str().unwrap_or("rwm");
                is_kind
                    && any(&rule["major"], major)
                    && any(&rule["minor"], minor)
                    && letters.contains(letter)
            };
            let own = letter == 'm' || kind == "c" && (major == 136 || OWN.contains(&(major, minor)));
            let wanted = own || rules.iter().rev().find(fits).is_some_and(|rule| rule["allow"] == true);
            let kind = if kind == "b" { 1 } else { 2 };
            assert_eq!(
                bpf::device(program, kind, major, minor, bit),
                wanted,
                "{kind} {major}:{minor} {letter}"
            );
        }
    }
}

/// seccomp(2): what a filter answers. The stricter one is the smaller number with a sign.
fn answer(action: &Value, code: &Value) -> u32 {
    let code = code.as_u64().unwrap_or(1) as u32 & 0xffff;
    match action.as_str().unwrap_or_default() {
        "SCMP_ACT_ALLOW" => 0x7fff_0000,
        "SCMP_ACT_LOG" => 0x7ffc_0000,
        "SCMP_ACT_TRACE" => 0x7ff0_0000 | code,
        "SCMP_ACT_ERRNO" => 0x0005_0000 | code,
        "SCMP_ACT_NOTIFY" => 0x0005_0000 | 38,
        "SCMP_ACT_TRAP" => 0x0003_0000,
        "SCMP_ACT_KILL_PROCESS" => 0x8000_0000,
        _ => 0,
    }
}

const CALLS: [(&str, u32); 9] = [
    ("read", 0),
    ("write", 1),
    ("open", 2),
    ("ioctl", 16),
    ("personality", 135),
    ("mount", 165),
    ("clone3", 435),
    ("bpf", 321),
    ("\0", 999),
];

/// The largest number that the profile names, if its default denies calls past it: they get ENOSYS. `Err` when it names calls that are not
/// looked at.
fn newest(profile: &Value, default: u32) -> Result<Option<u32>, ()> {
    let groups = profile["syscalls"].as_array().into_iter().flatten();
    let names = groups.flat_map(|group| group["names"].as_array().into_iter().flatten());
    let known = &CALLS[..CALLS.len() - 1];
    let number =
        |name: &Value| known.iter().find(|(own, _)| name == own).map(|(_, number)| *number).ok_or(());
    let numbers = names.map(number).collect::<Result<Vec<_>, ()>>()?;
    let lets_through = default as i32 >= 0x7ff0_0000 || profile["defaultErrnoRet"] == 38;
    Ok(numbers.into_iter().max().filter(|newest| *newest > 0 && !lets_through))
}

/// Of the answers of all filters the strictest counts. Calls that a group names with conditions are not looked at.
fn filters(profile: &Value, programs: &[Vec<(u16, u8, u8, u32)>]) {
    let default = answer(&profile["defaultAction"], &profile["defaultErrnoRet"]);
    let groups: Vec<&Value> = profile["syscalls"].as_array().into_iter().flatten().collect();
    let newest = newest(profile, default);
    let strictest = |answers: Vec<u32>| answers.into_iter().map(|a| (a & 0xffff_0000) as i32).min();
    for (name, number) in CALLS {
        let names = |group: &&&Value| group["names"].as_array().into_iter().flatten().any(|n| n == name);
        let mut by_group = groups.iter().filter(names);
        if by_group.clone().any(|group| group["args"].as_array().is_some_and(|a| !a.is_empty())) {
            continue;
        }
        let own: Vec<u32> = by_group
            .by_ref()
            .map(|group| answer(&group["action"], &group["errnoRet"]))
            .filter(|own| *own != default)
            .collect();
        let wanted = match (strictest(own), newest) {
            (Some(own), _) => own,
            (None, Err(())) => continue,
            (None, Ok(Some(newest))) if number > newest => 0x0005_0000,
            (None, Ok(_)) => (default & 0xffff_0000) as i32,
        };
        let given = programs.iter().map(|program| bpf::seccomp(program, number, [0; 6])).collect();
        let given = strictest(given).unwrap_or(0x7fff_0000);
        assert_eq!(given, wanted, "{name}");
    }
}
