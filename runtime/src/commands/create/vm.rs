//! The VM of a container: started, or the pod's, and asked for the container.
//!
//! Owns: what the VMM is started with, the first two requests, why a VM that ended did. Does not own: its process's arguments (`spawn`),
//! which pod a container belongs to (`pod`).

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    process::Child,
    time::{SystemTime, UNIX_EPOCH},
};

use coffer_protocol::{CreateContainer, Network, Request, Sandbox, VERSION};
use oci_spec::runtime::LinuxNamespaceType as Kind;

use super::Making;
use crate::{
    client::Connection,
    commands::{boot_chart, pod},
    confidential::Confidential,
    error::Error,
    home::Home,
    image, interrupt,
    log::{self, Level},
    network::{self, Tap},
    pid::{self, Pid},
    plan::{self, namespace},
    resize::{self, Change},
    spawn::{self, Started},
    start::{self, Start},
    state::{Directory, Record},
    stub, template,
};

/// The VM's process, and what this container has of it.
pub(super) struct Vm {
    pub(super) process: Pid,
    /// The process that this command started for it, if it did.
    pub(super) child: Option<Child>,
    /// It boots, and has no container yet.
    pub(super) fresh: bool,
    /// Keeps it alive.
    pub(super) hold: OwnedFd,
    pub(super) network: Network,
}

impl Vm {
    pub(super) fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => self.process.is_alive(),
        }
    }
}

fn hosts_network() -> Error {
    Error::State("the host's network cannot be given to a VM: use a bridge network or --network none".into())
}

impl Making<'_> {
    /// Starts a VM for this container and those that may follow.
    pub(super) fn boot(&self) -> Result<Vm, Error> {
        let (lifeline, hold) = pod::lifeline(self.directory)?;
        let (network, taps) = self.network()?;
        let trace = self.trace();
        let home = Home::find()?;
        let pod_network = namespace(&self.plan.spec, Kind::Network).flatten();
        let shape = template::Shape {
            image: spawn::image(self.plan, &home),
            memory_mib: self.plan.memory_mib,
            vcpus: self.plan.most_vcpus,
            nets: taps.len(),
        };
        let start = start::wanted(self.plan)?;
        let started = spawn::vmm(&spawn::Start {
            plan: self.plan,
            template: (start == Start::Template).then(|| shape.directory(self.root)),
            pool: (start == Start::Pool).then_some(self.root),
            directory: self.directory,
            home: &home,
            network: pod_network.as_deref(),
            taps: &taps,
            lifeline: &lifeline,
            trace,
        })?;
        let (process, child) = match started {
            Started::Child(child) => (Pid::of(child.id() as i32), Some(child)),
            Started::Shell(process) => (Some(process), None),
        };
        let process = process.ok_or_else(|| Error::Vm("it ended at once".into()))?;
        // Its memory is the guest's. A pod's further containers have no say in it, as they share it with the others.
        pid::set_oom_score_adj(process.pid, plan::oom_score_adj(&self.plan.spec));
        Ok(Vm { process, child, fresh: true, hold, network })
    }

    /// Has the pod's VM grow where a further container needs more than there is. One that cannot stays as it is: the container's limit is
    /// then more than it can have, and the log says so.
    pub(super) fn make_room(&self, record: &Record) -> Result<(), Error> {
        let resources = plan::resources(&self.plan.spec);
        let limit = resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit()).filter(|l| *l > 0);
        let processors = resources.and_then(|r| r.cpu().as_ref()).and_then(plan::quota_vcpus);
        if limit.is_none() && processors.is_none() {
            return Ok(());
        }
        let mut vm = resize::Vm::of(self.root, self.directory, record)?;
        let memory = match limit.map(|limit| resize::change(&vm.size, vm.needed_mib(limit))) {
            Some(Change::Grow(mib)) => vm.grow(mib),
            _ => Ok(()),
        };
        let processors = processors.map_or(Ok(()), |own| {
            vm.set_processors(vm.needed_processors(own))?;
            resize::enough_for_a_member(own, &vm.size)
        });
        for error in [memory, processors].into_iter().filter_map(Result::err) {
            log::say(self.global, Level::Warning, &error.line());
        }
        Ok(())
    }

    /// What the pod's namespace has, and taps for it. A pod that shares the host's network is refused.
    fn network(&self) -> Result<(Network, Vec<Tap>), Error> {
        match namespace(&self.plan.spec, Kind::Network) {
            // By a path too: taps there would take every packet of the host's own interfaces.
            None => Err(hosts_network()),
            Some(Some(path)) if network::is_own(&path) => Err(hosts_network()),
            Some(None) => Ok((Network::default(), Vec::new())),
            Some(Some(path)) => {
                let _turn = network::turn(&path)?;
                network::inside(&path, || {
                    let seen = network::look()?;
                    let taps = seen.taps()?;
                    Ok((seen.network, taps))
                })
            }
        }
    }

    /// Boot stages are always written, for `boot-chart`: a dozen lines; somebody may want them elsewhere.
    fn trace(&self) -> Option<PathBuf> {
        let annotation = self.plan.spec.annotations().as_ref().and_then(|a| a.get("io.coffer.trace"));
        let elsewhere = std::env::var_os("COFFER_TRACE").map(PathBuf::from).filter(|_| annotation.is_none());
        elsewhere.or_else(|| Some(boot_chart::trace_of(self.directory, annotation)))
    }

    /// Sets the pod up and makes the container in the guest, as soon as it has booted.
    pub(super) fn ask_guest(&self, vm: &mut Vm, slave: Option<&OwnedFd>) -> Result<Connection, Error> {
        let socket = self.directory.socket();
        let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sandbox = Sandbox {
            version: VERSION,
            hostname: hostname(self.plan.spec.hostname().clone(), &self.plan.confidential, || {
                nix::unistd::gethostname().ok()?.into_string().ok()
            }),
            unix_time_ns: u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX),
            network: vm.network.clone(),
            entropy: (start::wanted(self.plan)? == Start::Template).then(template::entropy).transpose()?,
            initdata: self.plan.confidential.initdata()?,
            name_servers: self.plan.name_servers.clone(),
            scratch: self.plan.scratch.is_some(),
        };
        let create = CreateContainer {
            id: self.id.to_owned(),
            spec: self.plan.guest_spec.clone(),
            window: slave.and_then(stub::window),
            binds: self.plan.bind_sources.clone(),
            shared: self.vm.as_ref().map_or_else(Vec::new, |vm| pod::shared(self.root, &self.plan.spec, vm)),
            image: self.plan.image.clone().map(|mut image| {
                image::find_signatures(&mut image, &self.plan.binds);
                image
            }),
            notify: self.plan.notify.as_ref().map(|n| n.inside.clone()),
            streams: self.streams.clone(),
        };
        let pod = self.vm.as_ref().map(|vm| &vm.record.annotations);
        let waits = pod.into_iter().chain(self.plan.spec.annotations()).any(pod::may_wait);
        let mut talk = || {
            if vm.fresh {
                let mut connection = Connection::open(&socket, || vm.is_alive() && !interrupt::came())?;
                asked(&mut connection, &Request::Sandbox(sandbox.clone()), waits)?;
            }
            let mut connection = Connection::open(&socket, || vm.is_alive() && !interrupt::came())?;
            asked(&mut connection, &Request::Create(Box::new(create.clone())), waits)?;
            Ok(connection)
        };
        talk().map_err(|error| match error {
            Error::VmGone if interrupt::came() => interrupted(),
            Error::VmGone => {
                if let Ok(process) = vm.process.open() {
                    let _ = pid::wait_end(&process, stub::VMM_END_LIMIT);
                }
                self.report().map_or(error, Error::Vm)
            }
            other => other,
        })
    }

    /// Where the VM's process writes.
    pub(super) fn vm_directory(&self) -> &Directory {
        self.vm.as_ref().map_or(self.directory, |vm| &vm.directory)
    }

    /// Why the VMM ended, in its own words.
    fn report(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.vm_directory().file("exit-report")).ok()?;
        let value: serde_json::Value = serde_json::from_str(&text).ok()?;
        value["message"].as_str().map(str::to_owned)
    }
}

/// What the guest is called: as configured, or like the host, as a new namespace of the host's would be. Where an owner has a say the host's
/// name is none of the pod's, and the policy is asked about what the configuration says alone.
fn hostname(
    configured: Option<String>,
    confidential: &Confidential,
    hosts: impl FnOnce() -> Option<String>,
) -> Option<String> {
    let owners =
        confidential.initdata.is_some() || confidential.tee.as_ref().is_some_and(|tee| tee != "none");
    configured.or_else(|| hosts().filter(|_| !owners))
}

/// A signal ends the wait for the answer, which may be long.
fn asked(connection: &mut Connection, request: &Request, waits: bool) -> Result<(), Error> {
    let _ends = interrupt::Ends::connection(connection.stream.as_raw_fd());
    if interrupt::came() { Err(interrupted()) } else { connection.ask_of(request, waits).map(drop) }
}

/// Why a container is not made that somebody has asked for.
pub(super) fn interrupted() -> Error {
    Error::State("interrupted by a signal: what there was of the container is taken down".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan;
    use serde_json::json;

    #[test]
    fn a_guest_without_a_name_has_the_hosts_where_no_owner_has_a_say() {
        let of = |name: Option<&str>, annotations: serde_json::Value| {
            let config = json!({
                "ociVersion": "1.0.2", "root": { "path": "rootfs" }, "hostname": name, "annotations": annotations,
                "linux": { "namespaces": [{ "type": "uts" }] },
                "process": { "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/" },
            });
            let plan = plan(std::path::Path::new("/bundle"), "c", &serde_json::to_vec(&config).unwrap());
            let plan = plan.map_err(|e| e.to_string()).unwrap();
            hostname(plan.spec.hostname().clone(), &plan.confidential, || Some("host".into()))
        };
        assert_eq!(of(None, json!({})).as_deref(), Some("host"));
        assert_eq!(of(None, json!({ "io.coffer.tee": "none" })).as_deref(), Some("host"));
        assert_eq!(of(Some("web"), json!({})).as_deref(), Some("web"));
        for owners in [json!({ "io.coffer.tee": "snp" }), json!({ "io.coffer.initdata": "/initdata" })] {
            assert_eq!(of(None, owners.clone()), None);
            assert_eq!(of(Some("web"), owners).as_deref(), Some("web"));
        }
    }
}
