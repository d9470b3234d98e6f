//! Writing a policy for a pod: its containers as a manifest means them, whatever engine brings them.
//!
//! Owns: what is compared, and what engines may add by themselves. Does not own: reading manifests. Unlike a policy of one recorded
//! configuration (`generate`), it names what is admitted, not all that is asked.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;

use super::generate::{Allowed, preamble};

const RULES: &str = concat!(include_str!("pod.rego"), include_str!("masked.rego"));

/// A container of a pod, as the owner means it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodContainer {
    /// Its name in the pod.
    pub name: String,
    /// Digest of its image.
    pub image: String,
    /// Its program, to the word.
    pub args: Vec<String>,
    /// Its variables, the image's too.
    pub env: BTreeMap<String, String>,
    /// Its directory.
    pub cwd: String,
    /// As whom it runs. None: program, variables, directory and user are the image's own, whatever the host says.
    pub user: Option<PodUser>,
    /// It has a terminal.
    pub terminal: bool,
    /// It must not gain privileges.
    pub no_new_privileges: bool,
    /// All that it may have of them, in any set.
    pub capabilities: Vec<String>,
    /// Its root file system is read-only.
    pub read_only: bool,
    /// Its volumes, by place.
    pub mounts: BTreeMap<String, PodMount>,
    /// Namespaces that it has to itself.
    pub namespaces: Vec<String>,
    /// Kernel parameters, and values that they may have.
    pub sysctl: BTreeMap<String, Vec<String>>,
    /// It must have a filter of system calls.
    pub seccomp: bool,
    /// The kubelet tells it about the namespace's services.
    pub service_links: bool,
    /// The kubelet may mount the service account's token.
    pub service_account: bool,
    /// Command lines of its probes and hooks, which the kubelet runs by exec.
    pub exec: Vec<Vec<String>>,
}

/// Numbers of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "each is its name")]
pub struct PodUser {
    pub uid: u32,
    pub gid: u32,
    /// It may be in these.
    pub groups: Vec<u32>,
}

/// A volume's place. What is in it is the host's to choose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodMount {
    /// It can be written to.
    pub writable: bool,
}

/// Files whose content the host may choose: engines mount them into every container.
const ENGINE_FILES: [&str; 5] =
    ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/termination-log"];
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// File systems of the guest's own kernel, and where engines mount them.
const FILE_SYSTEMS: [(&str, &[&str]); 7] = [
    ("/proc", &["proc"]),
    ("/sys", &["sysfs"]),
    ("/dev", &["tmpfs", "devtmpfs"]),
    ("/dev/pts", &["devpts"]),
    ("/dev/mqueue", &["mqueue"]),
    ("/dev/shm", &["tmpfs"]),
    ("/sys/fs/cgroup", &["cgroup", "cgroup2"]),
];
/// Where podman puts a tmpfs when the root is read-only.
const SCRATCH: [&str; 3] = ["/run", "/tmp", "/var/tmp"];
/// Variables that engines and the kubelet add. None of their values leads to another program or file.
pub(super) const VARIABLES: [&str; 5] = [
    "^HOSTNAME=[A-Za-z0-9.-]*$",
    "^TERM=[A-Za-z0-9+._-]+$",
    "^container=(podman|oci)$",
    "^HOME=(/|/root|/home/[a-z0-9_-]+)$",
    "^KUBERNETES_(SERVICE_HOST|SERVICE_PORT|SERVICE_PORT_HTTPS|PORT|PORT_443_TCP|PORT_443_TCP_(PROTO|PORT|ADDR))=[a-z0-9.:/]*$",
];
const SERVICES: &str = "^[A-Z][A-Z0-9_]*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)=[A-Za-z0-9.:/-]*$";

/// The policy that admits these containers, each as often as the host likes, and no other.
#[must_use]
pub fn generate_pod(containers: &[PodContainer], allowed: &Allowed) -> String {
    let mut text = preamble("one pod's containers, to the field", allowed);
    let described: Vec<_> = containers.iter().map(|container| describe(container, allowed)).collect();
    text += &format!("containers := {}\n\n", json!(described));
    text + RULES
}

fn describe(container: &PodContainer, allowed: &Allowed) -> serde_json::Value {
    let mut described = json!(container);
    // What may be run anywhere is not for a process of which the owner has said nothing.
    let anywhere = allowed.exec.iter().filter(|_| container.user.is_some());
    described["exec"] = container.exec.iter().chain(anywhere).map(|words| json!(words)).collect();
    let services = container.service_links.then_some(SERVICES);
    described["others"] = VARIABLES.into_iter().chain(services).collect();
    let account = container.service_account.then_some(SERVICE_ACCOUNT);
    described["engine_files"] = ENGINE_FILES.into_iter().chain(account).collect();
    let scratch =
        SCRATCH.into_iter().filter(|_| container.read_only).map(|place| (place, &["tmpfs"] as &[&str]));
    described["file_systems"] = FILE_SYSTEMS
        .into_iter()
        .chain(scratch)
        .map(|(place, kinds)| (place.to_owned(), json!(kinds)))
        .collect();
    described
}
