//! Pods: from a Kubernetes manifest and the images that it names to what the guest may run.
//!
//! Owns: the meaning of a manifest's members inside a container, as the kubelet and `podman kube play` have it; what a policy cannot
//! promise is refused by its path. Does not own: YAML, the policy's text (both coffer-attestation's).
//!
//! Source: Kubernetes API reference, PodSpec v1.

use std::collections::BTreeMap;

use coffer_attestation::policy::{PodContainer, PodMount, PodUser};
use coffer_layers::config::ImageConfig;
use serde_json::{Value, json};

use super::fields::{FieldError, Fields, error};

/// An image that the owner has.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) digest: String,
    pub(super) config: ImageConfig,
}

/// What a pod needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) containers: Vec<PodContainer>,
}

/// The most that containerd, CRI-O and podman give by themselves.
const CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
/// Kernel parameters that engines set by themselves.
const SYSCTL: [(&str, &[&str]); 2] = [
    ("net.ipv4.ping_group_range", &["0 0", "0 2147483647"]),
    ("net.ipv4.ip_unprivileged_port_start", &["0"]),
];
/// Members of a pod that say where, when and how often it runs.
const POD: [&str; 26] = [
    "activeDeadlineSeconds",
    "affinity",
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "hostAliases",
    "hostname",
    "imagePullSecrets",
    "nodeName",
    "nodeSelector",
    "overhead",
    "preemptionPolicy",
    "priority",
    "priorityClassName",
    "readinessGates",
    "restartPolicy",
    "runtimeClassName",
    "schedulerName",
    "schedulingGates",
    "serviceAccount",
    "serviceAccountName",
    "setHostnameAsFQDN",
    "subdomain",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
];
const CONTAINER: [&str; 8] = [
    "imagePullPolicy",
    "ports",
    "resizePolicy",
    "resources",
    "restartPolicy",
    "stdinOnce",
    "terminationMessagePath",
    "terminationMessagePolicy",
];
const FROM_THE_CLUSTER: &str =
    "the host would choose the value: write the value itself (as sealed.… if it is a secret)";
const THE_HOSTS: &str = "a VM has nothing of the host's to share: leave it out";

/// Where a manifest keeps its pod.
fn place(kind: &str) -> Option<&'static str> {
    match kind {
        "Pod" => Some(""),
        "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "Job" | "ReplicationController" => {
            Some("/spec/template")
        }
        "CronJob" => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// The one pod of a manifest's documents: its path, and itself.
pub(super) fn find(documents: &[Value]) -> Result<(String, &Value), FieldError> {
    let pods: Vec<_> = documents
        .iter()
        .filter_map(|document| {
            let pointer = place(document["kind"].as_str()?)?;
            Some((pointer.trim_start_matches('/').replace('/', "."), document.pointer(pointer)?))
        })
        .collect();
    match pods.as_slice() {
        [pod] => Ok(pod.clone()),
        [] => Err(error("kind", "there is neither a Pod nor anything with a pod's template")),
        _ => Err(error(
            "kind",
            "there is more than one pod: a policy is for one, write them to files of their own",
        )),
    }
}

/// What a pod says, with images by the names that it has for them.
pub(super) fn read(
    path: &str,
    pod: &Value,
    images: &dyn Fn(&str) -> Result<Known, String>,
) -> Result<Pod, FieldError> {
    let at = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let mut spec = Fields::of(&at("spec"), pod["spec"].clone())?;
    spec.refuse(&["hostNetwork", "hostPID", "hostIPC"], THE_HOSTS)?;
    spec.refuse(
        &["ephemeralContainers", "resourceClaims"],
        "a policy cannot know it in advance: leave it out",
    )?;
    let shared = spec.flag("shareProcessNamespace")?.unwrap_or(false);
    let mut namespaces = vec!["mount".to_owned()];
    namespaces.extend((!shared).then(|| "pid".to_owned()));
    // User namespaces take rights away.
    spec.flag("hostUsers")?;
    let os = spec.object("os")?.text("name")?;
    if os.is_some_and(|os| os != "linux") {
        return Err(spec.error("os", "only linux runs here"));
    }
    let account = spec.flag("automountServiceAccountToken")?.unwrap_or(true);
    let links = spec.flag("enableServiceLinks")?.unwrap_or(true);
    let volumes = spec
        .objects("volumes")?
        .iter_mut()
        .map(|volume| volume.required("name"))
        .collect::<Result<Vec<_>, _>>()?;
    let context = Context::of(spec.object("securityContext")?)?;
    let mut pod = Pod { containers: Vec::new() };
    for list in ["initContainers", "containers"] {
        for mut fields in spec.objects(list)? {
            let container = Reader { images, volumes: &volumes, context: &context }.container(&mut fields)?;
            fields.end(&CONTAINER)?;
            let own = PodContainer {
                namespaces: namespaces.clone(),
                service_account: account,
                service_links: links,
                ..container
            };
            pod.containers.push(own);
        }
    }
    if pod.containers.is_empty() {
        return Err(spec.error("containers", "there is none"));
    }
    spec.end(&POD)?;
    Ok(pod)
}

/// A security context: of the pod, or of a container.
#[derive(Clone, Debug, Default)]
struct Context {
    uid: Option<u32>,
    gid: Option<u32>,
    groups: Vec<u32>,
    not_root: Option<bool>,
    seccomp: Option<bool>,
    sysctl: BTreeMap<String, Vec<String>>,
    read_only: bool,
    no_new_privileges: bool,
    capabilities: Vec<String>,
}

impl Context {
    fn of(mut fields: Fields) -> Result<Self, FieldError> {
        fields.refuse(
            &["privileged"],
            "the host's devices are not in a VM, and a policy for all capabilities is none: leave it out",
        )?;
        fields.refuse(&["windowsOptions"], "only linux runs here")?;
        if fields.text("procMount")?.is_some_and(|kind| kind != "Default") {
            return Err(fields.error("procMount", "only Default can be promised"));
        }
        let profile = |fields: &mut Fields, name: &str| -> Result<Option<bool>, FieldError> {
            match fields.object(name)?.text("type")?.as_deref() {
                None => Ok(None),
                Some("RuntimeDefault") => Ok(Some(true)),
                Some("Unconfined") => Ok(Some(false)),
                Some(_) => {
                    Err(fields.error(name, "a profile of the host's is no promise: use RuntimeDefault"))
                }
            }
        };
        let seccomp = profile(&mut fields, "seccompProfile")?;
        profile(&mut fields, "appArmorProfile")?;
        let mut context = Self {
            uid: fields.number("runAsUser")?,
            gid: fields.number("runAsGroup")?,
            not_root: fields.flag("runAsNonRoot")?,
            seccomp,
            read_only: fields.flag("readOnlyRootFilesystem")?.unwrap_or(false),
            no_new_privileges: fields.flag("allowPrivilegeEscalation")? == Some(false),
            capabilities: capabilities(fields.object("capabilities")?)?,
            ..Self::default()
        };
        context.groups.extend(fields.number("fsGroup")?);
        for group in fields.list("supplementalGroups")? {
            let number = group.as_u64().and_then(|number| u32::try_from(number).ok());
            context.groups.push(
                number.ok_or_else(|| {
                    fields.error("supplementalGroups", "they have to be numbers below 2^32")
                })?,
            );
        }
        for mut parameter in fields.objects("sysctls")? {
            context
                .sysctl
                .insert(parameter.required("name")?.replace('/', "."), vec![parameter.required("value")?]);
        }
        fields.end(&[
            "fsGroupChangePolicy",
            "seLinuxOptions",
            "seLinuxChangePolicy",
            "supplementalGroupsPolicy",
        ])?;
        Ok(context)
    }
}

/// What is left of an engine's own, and what is added.
fn capabilities(mut fields: Fields) -> Result<Vec<String>, FieldError> {
    let bare = |name: String| name.strip_prefix("CAP_").map_or(name.clone(), str::to_owned);
    let (add, drop) = (fields.words("add")?.into_iter().map(bare), fields.words("drop")?);
    let drop: Vec<String> = drop.into_iter().map(bare).collect();
    let all = drop.iter().any(|name| name == "ALL");
    let kept = CAPABILITIES.into_iter().filter(|name| !all && !drop.iter().any(|dropped| dropped == name));
    let mut kept: Vec<String> = kept.map(str::to_owned).collect();
    for name in add {
        if name == "ALL" {
            return Err(fields.error("add", "ALL is no list: name those that it needs"));
        }
        kept.push(name);
    }
    kept.sort_unstable();
    kept.dedup();
    Ok(kept.into_iter().map(|name| format!("CAP_{name}")).collect())
}

struct Reader<'a> {
    images: &'a dyn Fn(&str) -> Result<Known, String>,
    volumes: &'a [String],
    context: &'a Context,
}

impl Reader<'_> {
    fn container(&self, fields: &mut Fields) -> Result<PodContainer, FieldError> {
        let name = fields.required("name")?;
        let image = fields.required("image")?;
        let known = (self.images)(&image).map_err(|why| fields.error("image", why))?;
        fields.refuse(&["envFrom"], FROM_THE_CLUSTER)?;
        fields.refuse(&["volumeDevices"], THE_HOSTS)?;
        let own = Context::of(fields.object("securityContext")?)?;
        let (command, args) = (plain(fields, "command")?, plain(fields, "args")?);
        let env = variables(fields)?;
        let entrypoint = (!command.is_empty()).then_some(command.as_slice());
        let process = known
            .config
            .process(entrypoint, &args, &env)
            .map_err(|e| fields.error("command", e.to_string()))?;
        let user = self.user(fields, &own, &process.user)?;
        let exec = probes(fields)?;
        // Whether it may be written to is --stdin's to say.
        fields.flag("stdin")?;
        let mut sysctl: BTreeMap<String, Vec<String>> = SYSCTL
            .iter()
            .map(|(name, values)| ((*name).to_owned(), values.iter().map(|v| (*v).to_owned()).collect()))
            .collect();
        sysctl.extend(self.context.sysctl.clone());
        Ok(PodContainer {
            name,
            image: known.digest,
            args: process.args,
            env: pairs(&process.env),
            cwd: fields.text("workingDir")?.unwrap_or(process.cwd),
            user: Some(user),
            terminal: fields.flag("tty")?.unwrap_or(false),
            no_new_privileges: own.no_new_privileges,
            capabilities: own.capabilities,
            read_only: own.read_only,
            mounts: self.mounts(fields)?,
            namespaces: Vec::new(),
            sysctl,
            seccomp: own.seccomp.or(self.context.seccomp).unwrap_or(false),
            service_links: true,
            service_account: true,
            exec,
        })
    }

    /// The manifest's numbers, else the image's: names are looked up in files that only the guest reads.
    fn user(&self, fields: &Fields, own: &Context, image: &str) -> Result<PodUser, FieldError> {
        let (name, group) = image.split_once(':').map_or((image, None), |(name, group)| (name, Some(group)));
        let named = |member: &str| {
            let why = format!(
                "the image's user is {image:?}, and a policy knows no names: write {member} in numbers"
            );
            fields.error("securityContext", why)
        };
        let uid = match own.uid.or(self.context.uid) {
            Some(uid) => uid,
            None if name.is_empty() => 0,
            None => name.parse().map_err(|_| named("runAsUser"))?,
        };
        let gid = match (own.gid.or(self.context.gid), group) {
            (Some(gid), _) => gid,
            (None, Some(group)) if own.uid.or(self.context.uid).is_none() => {
                group.parse().map_err(|_| named("runAsGroup"))?
            }
            (None, _) if uid == 0 => 0,
            (None, _) => {
                return Err(fields.error(
                    "securityContext",
                    "runAsGroup is missing: the group would be the one of a file in the image",
                ));
            }
        };
        if own.not_root.or(self.context.not_root) == Some(true) && uid == 0 {
            return Err(fields.error("securityContext", "runAsNonRoot, but it runs as 0: write runAsUser"));
        }
        let mut groups = vec![gid];
        groups.extend(&self.context.groups);
        Ok(PodUser { uid, gid, groups })
    }

    fn mounts(&self, fields: &mut Fields) -> Result<BTreeMap<String, PodMount>, FieldError> {
        let mut mounts = BTreeMap::new();
        for mut mount in fields.objects("volumeMounts")? {
            let (name, path) = (mount.required("name")?, mount.required("mountPath")?);
            if !self.volumes.contains(&name) {
                return Err(mount.error("name", format!("spec.volumes has no {name:?}")));
            }
            let clean = path.starts_with('/') && !path.split('/').any(|part| part == ".." || part == ".");
            let trimmed = path.trim_end_matches('/');
            if !clean || trimmed.is_empty() || trimmed.contains("//") {
                return Err(mount.error("mountPath", "it has to be an absolute path below /"));
            }
            if mount.text("mountPropagation")?.is_some_and(|kind| kind != "None") {
                return Err(mount.error("mountPropagation", "only None can be promised"));
            }
            let writable = !mount.flag("readOnly")?.unwrap_or(false);
            if mounts.insert(trimmed.to_owned(), PodMount { writable }).is_some() {
                return Err(mount.error("mountPath", "something is mounted there already"));
            }
            mount.refuse(&["subPathExpr"], FROM_THE_CLUSTER)?;
            // Which part of a volume it is, the host decides anyway.
            mount.end(&["subPath", "recursiveReadOnly"])?;
        }
        Ok(mounts)
    }
}

/// Words without `$(NAME)`, which the kubelet would replace.
fn plain(fields: &mut Fields, name: &str) -> Result<Vec<String>, FieldError> {
    let words = fields.words(name)?;
    match words.iter().find(|word| word.contains("$(")) {
        Some(word) => {
            Err(fields.error(name, format!("{word:?}: the kubelet replaces $(…): write what it stands for")))
        }
        None => Ok(words),
    }
}

fn variables(fields: &mut Fields) -> Result<Vec<String>, FieldError> {
    let mut all: Vec<String> = Vec::new();
    for mut variable in fields.objects("env")? {
        let name = variable.required("name")?;
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(variable.error("name", "no name of a variable"));
        }
        variable.refuse(&["valueFrom"], FROM_THE_CLUSTER)?;
        let value = variable.text("value")?.unwrap_or_default();
        if value.contains("$(") {
            return Err(variable.error("value", "the kubelet replaces $(…): write what it stands for"));
        }
        variable.end(&[])?;
        all.push(format!("{name}={value}"));
    }
    Ok(all)
}

/// Commands that the kubelet runs in the container; what it asks over the network is none of the runtime's.
fn probes(fields: &mut Fields) -> Result<Vec<Vec<String>>, FieldError> {
    let mut lifecycle = fields.object("lifecycle")?;
    let mut all = Vec::new();
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        all.push(fields.object(name)?);
    }
    for name in ["postStart", "preStop"] {
        all.push(lifecycle.object(name)?);
    }
    let mut exec = Vec::new();
    for mut probe in all {
        let command = plain(&mut probe.object("exec")?, "command")?;
        if !command.is_empty() && !exec.contains(&command) {
            exec.push(command);
        }
    }
    Ok(exec)
}

/// The pod's sandbox as an image of the owner's: what the image says, and nothing of the pod's.
pub(super) fn sandbox(known: &Known) -> Result<PodContainer, FieldError> {
    let process = known.config.process(None, &[], &[]).map_err(|e| error("--sandbox", e.to_string()))?;
    let capabilities = capabilities(Fields::of("--sandbox", json!({}))?)?;
    Ok(PodContainer {
        name: "sandbox".into(),
        image: known.digest.clone(),
        args: process.args,
        env: pairs(&process.env),
        cwd: process.cwd,
        user: None,
        terminal: false,
        no_new_privileges: false,
        capabilities,
        read_only: false,
        mounts: BTreeMap::new(),
        namespaces: vec!["mount".into()],
        sysctl: SYSCTL
            .iter()
            .map(|(name, values)| ((*name).to_owned(), values.iter().map(|v| (*v).to_owned()).collect()))
            .collect(),
        seccomp: false,
        service_links: false,
        service_account: false,
        exec: Vec::new(),
    })
}

/// An environment's names and values.
fn pairs<T: FromIterator<(String, String)>>(env: &[String]) -> T {
    env.iter().filter_map(|pair| pair.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
}

#[cfg(test)]
mod tests;
