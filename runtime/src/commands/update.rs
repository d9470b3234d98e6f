//! `update`: other limits for a container that runs.
//!
//! Owns: flags and files to OCI `LinuxResources`, in which order guest, VM (`resize`) and host get them. Does not own: setting them.

use std::path::Path;

use coffer_protocol::Request;
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};

use super::{find, network};
use crate::{
    cgroup,
    cli::Call,
    client,
    error::{Error, host},
    log::{self, Level},
    plan,
    resize::{self, Change, Vm},
    state::{Record, Status},
    support,
};

/// Flags whose value is a number, and where it goes.
const NUMBERS: &[(&str, [&str; 2])] = &[
    ("memory", ["memory", "limit"]),
    ("memory-reservation", ["memory", "reservation"]),
    ("memory-swap", ["memory", "swap"]),
    ("cpu-period", ["cpu", "period"]),
    ("cpu-quota", ["cpu", "quota"]),
    ("cpu-burst", ["cpu", "burst"]),
    ("cpu-share", ["cpu", "shares"]),
    ("cpu-idle", ["cpu", "idle"]),
    ("pids-limit", ["pids", "limit"]),
    ("blkio-weight", ["blockIO", "weight"]),
];

/// Flags that mean nothing in a guest: real-time groups and kernel memory are of cgroup version 1, the others of the
/// host's processor.
const REFUSED: &[&str] = &["cpu-rt-period", "cpu-rt-runtime", "l3-cache-schema", "mem-bw-schema"];

/// Changes limits: of the host first where they grow, of the guest first where they shrink, and the VM between.
pub(super) fn update(call: &Call, root: &Path) -> Result<(), Error> {
    let (directory, record) = find(root, call.id()?)?;
    let text = match call.value("resources") {
        None => None,
        Some("-") => Some(std::io::read_to_string(std::io::stdin()).map_err(host("read stdin"))?),
        Some(path) => Some(std::fs::read_to_string(path).map_err(host(format!("read {path}")))?),
    };
    let resources = resources(call, text.as_deref())?;
    if directory.status(&record) == Status::Stopped {
        return Err(Error::NotRunning);
    }
    network::look_again(&directory, &record);
    let parsed: LinuxResources =
        serde_json::from_value(resources.clone()).map_err(|e| Error::Usage(format!("update: {e}")))?;
    let guest = Request::Update { id: record.id.clone(), resources: resources.clone() };
    let guest = || client::ask(&directory.socket(), &guest).map(drop);
    let vcpus = parsed.cpu().as_ref().and_then(plan::quota_vcpus);
    let limit = parsed.memory().as_ref().and_then(|m| m.limit()).filter(|limit| *limit != 0);
    if vcpus.is_none() && limit.is_none() {
        guest()?;
        return set_host(&record, &parsed, None);
    }
    let mut vm = Vm::of(root, &directory, &record)?;
    if let Some(limit) = limit {
        with_memory(call, &mut vm, (&record, &parsed), limit, guest)?;
    } else {
        guest()?;
        set_host(&record, &parsed, None)?;
    }
    if let Some(own) = vcpus {
        vm.set_processors(vm.needed_processors(own))?;
        if let Some(words) = too_few_processors(own, vm.size.vcpus) {
            log::say(&call.global, Level::Warning, &words);
        }
    }
    resize::remember(&directory, limit, vcpus)
}

/// The limits with one of memory: `guest` sets the guest's.
fn with_memory(
    call: &Call,
    vm: &mut Vm<'_>,
    (record, parsed): (&Record, &LinuxResources),
    limit: i64,
    guest: impl Fn() -> Result<(), Error>,
) -> Result<(), Error> {
    match resize::change(&vm.size, vm.needed_mib(limit)) {
        Change::Grow(mib) => {
            set_host(record, parsed, vm.own_mib(mib))?;
            vm.grow(mib)?;
            guest()
        }
        Change::Stay if limit < 0 || limit >= vm.least() => {
            set_host(record, parsed, vm.own_mib(0))?;
            guest()
        }
        change => {
            guest()?;
            if let Change::Shrink(mib) = change {
                let kept = vm.shrink(mib)?;
                if kept > 0 {
                    let words = format!(
                        "update: the guest still uses {kept} MiB of what it is to give back; it does so when it can"
                    );
                    log::say(&call.global, Level::Warning, &words);
                }
            }
            set_host(record, parsed, vm.own_mib(0))
        }
    }
}

/// Limits of the host's cgroup, and of the unit that it may be. A limit of memory comes with the MiB of the guest whose VMM is under it.
fn set_host(record: &Record, resources: &LinuxResources, guest_mib: Option<u64>) -> Result<(), Error> {
    record.cgroup.as_ref().map_or(Ok(()), |path| cgroup::apply(path, resources, guest_mib))?;
    record.scope.as_ref().map_or(Ok(()), |scope| scope.update(resources, guest_mib))
}

/// A VM has the processors that it was made with: a quota worth more is set, and what it cannot use is said, as to a pod's member.
fn too_few_processors(wanted: u32, has: u32) -> Option<String> {
    (wanted > has).then(|| {
        format!(
            "update: {wanted} processors: the VM was made with {has}, which is what the container has of them; make it with annotation {}={wanted} to have so many later",
            plan::MOST_VCPUS_ANNOTATION
        )
    })
}

/// What the file says, or else the flags; never both, as with runc.
fn resources(call: &Call, text: Option<&str>) -> Result<Value, Error> {
    let wrong = |message: String| Error::Usage(format!("update: {message}"));
    let value: Value = match text {
        Some(text) => serde_json::from_str(text).map_err(|e| wrong(format!("resources: {e}")))?,
        None => flags(call)?,
    };
    // Their types, before anybody acts on them.
    let typed: oci_spec::runtime::LinuxResources =
        serde_json::from_value(value.clone()).map_err(|e| wrong(format!("resources: {e}")))?;
    support::resources(&typed, "update: resources")?;
    // Without flags nothing changes, which is no error with runc either.
    if value.is_object() { Ok(value) } else { Err(wrong("resources: not an object".into())) }
}

fn flags(call: &Call) -> Result<Value, Error> {
    let mut value = json!({});
    if let Some(flag) = REFUSED.iter().find(|f| call.value(f).is_some()) {
        return Err(Error::Usage(format!("update: --{flag} is not supported in a VM")));
    }
    for (flag, [group, field]) in NUMBERS {
        if let Some(text) = call.value(flag) {
            value[group][field] = json!(number(flag, text)?);
        }
    }
    for (flag, field) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(text) = call.value(flag) {
            value["cpu"][field] = json!(text);
        }
    }
    Ok(value)
}

/// A number, for memory with a unit as runc takes it: `64m` is 64 MiB.
fn number(flag: &str, text: &str) -> Result<i64, Error> {
    let wrong = || Error::Usage(format!("update: --{flag} {text}: a number is wanted"));
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches('b');
    let (digits, shift) = match digits.chars().last() {
        Some(unit @ ('k' | 'm' | 'g' | 't')) if flag.starts_with("memory") => {
            (&digits[..digits.len() - 1], 10 * (1 + "kmgt".find(unit).unwrap_or(0) as u32))
        }
        _ if flag.starts_with("memory") => (digits, 0),
        _ => (lower.as_str(), 0),
    };
    digits.parse::<i64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    fn of(line: &str, text: Option<&str>) -> Result<Value, String> {
        let call = cli::parse(line.split_whitespace().map(str::to_owned)).unwrap();
        resources(&call, text).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_the_specifications_fields() {
        let line =
            "update --memory 64m --cpu-quota=50000 --cpu-period 100000 --cpuset-cpus 0-1 --pids-limit 20 c";
        assert_eq!(
            of(line, None).unwrap(),
            json!({
                "memory": { "limit": 67_108_864 },
                "cpu": { "quota": 50_000, "period": 100_000, "cpus": "0-1" },
                "pids": { "limit": 20 }
            })
        );
        assert_eq!(of("update c --memory -1", None).unwrap(), json!({ "memory": { "limit": -1 } }));
    }

    #[test]
    fn a_file_counts_alone() {
        let text = r#"{ "cpu": { "shares": 512 }, "unknown": 1 }"#;
        let value = of("update -r f --memory 64m c", Some(text)).unwrap();
        assert_eq!(value["cpu"]["shares"], 512);
        assert!(value.get("memory").is_none());
    }

    #[test]
    fn what_a_vm_has_not_of_a_limit_is_said_with_what_helps() {
        assert_eq!(too_few_processors(2, 2), None);
        let said = too_few_processors(3, 2).unwrap();
        assert!(said.starts_with("update: 3 processors: the VM was made with 2"), "{said}");
        assert!(said.contains("io.coffer.vcpus-max=3"), "{said}");
    }

    #[test]
    fn what_cannot_be_is_named() {
        assert_eq!(of("update c", None), Ok(json!({})));
        assert!(of("update --memory much c", None).unwrap_err().contains("--memory much"));
        assert!(of("update --cpu-rt-period 1 c", None).unwrap_err().contains("--cpu-rt-period"));
        assert!(of("update -r f c", Some("[1]")).is_err());
        let rdma = Some(r#"{ "rdma": { "mlx5": { "hcaHandles": 1 } } }"#);
        assert!(of("update -r f c", rdma).unwrap_err().contains("resources.rdma"));
        assert!(of("update -r f c", Some(r#"{ "memory": { "limit": "x" } }"#)).is_err());
    }
}
