//! `create` and `run`: from a bundle to a VM with a container that waits, and a stub on the host.
//!
//! Owns: the order. The VM boots while the rest is made; the pid file is written last; whatever fails takes all down. Its parts: the VM
//! (`vm`), the host's cgroup (`group`), the stub (`fork`), maps of a user namespace (`user`).

mod fork;
mod group;
mod user;
mod vm;

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use coffer_protocol::{Network, Stream};
pub(super) use fork::close_others;
use vm::Vm;

use super::{Ready, config, delete, foreground, pod, start as start_container, terminal};
use crate::{
    cgroup,
    cli::{Call, Global},
    clock,
    descriptors::{self, Carried},
    error::{Error, host},
    image, interrupt,
    notify::{self, Whom},
    pid::Pid,
    plan::{self, Plan},
    scratch, start,
    state::{self, Directory, Record},
    stub::Terminal,
    support,
    systemd::Scope,
};

/// Makes a container.
pub(super) fn create(call: &Call, root: &Path) -> Result<(), Error> {
    let id = call.id()?.to_owned();
    let count = descriptors::count(call.value("preserve-fds"), true)?;
    let carried = descriptors::take(count)?;
    let bundle = std::path::absolute(call.value("bundle").unwrap_or(".")).map_err(host("find the bundle"))?;
    let path = bundle.join(call.value("config").unwrap_or("config.json"));
    let text = std::fs::read(&path).map_err(|e| Error::Bundle(format!("{}: {e}", path.display())))?;
    let text = plan::annotate(text, &call.global.annotations)?;
    let text = user::with_maps(text, root)?;
    let mut plan = plan::plan(&bundle, &id, &text)?;
    support::warn_of_unknown(&plan::unknown_capabilities(&text));
    pod::sweep(root);
    let vm = pod::find(root, &plan.spec, &id);
    start::wanted(&plan)?;
    let pod = vm.as_ref().map(|vm| &vm.record.annotations);
    plan.confidential.check(pod)?;
    scratch::check(plan.scratch, pod)?;
    if pod.is_none() {
        image::make_room(&mut plan)?;
    }
    let share = vm.as_ref().map(|_| {
        // Not the name that an earlier container of this id had in this VM, which the guest may still know.
        let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        format!("{id}.{}", elapsed.as_nanos())
    });
    if let Some(name) = &share {
        plan = plan::plan(&bundle, name, &text)?;
    }
    if plan.notify.is_none() && notify::manager().is_some() {
        plan.notify = Some(notify::added(&mut plan.guest_spec));
    }
    if count.listen > 0 {
        // As runc: the process that reads them is the container's first.
        descriptors::tell(&mut plan.guest_spec, count.listen);
    }
    let console = call.value("console-socket").map(PathBuf::from);
    let scope = call.global.systemd_cgroup.then(|| Scope::of(&plan.spec, &id)).transpose()?;
    if plan.terminal && console.is_none() && (call.command == "create" || call.has("detach")) {
        return Err(Error::Usage("cannot allocate a terminal without --console-socket".into()));
    }
    if !plan.rootfs.is_dir() {
        return Err(Error::Bundle(format!("root file system {} is not a directory", plan.rootfs.display())));
    }
    if let Some(bind) = plan.binds.iter().find(|b| !b.source.exists()) {
        return Err(Error::Bundle(format!(
            "config.json: mounts: source {} is not there",
            bind.source.display()
        )));
    }
    super::collect(root);
    super::give_way(root, &id);
    let directory = Directory::of(root, &id)?;
    interrupt::remember().map_err(host("take signals"))?;
    directory.create()?;
    let begun = || {
        directory.making()?;
        state::write_whole(&directory.file("config.json"), &text)?;
        match plan.notify.as_ref().is_some_and(|notify| notify.whom == Whom::Starter) {
            true => directory.mark("notifies", true),
            false => Ok(()),
        }
    };
    begun().inspect_err(|_| {
        let _ = delete(root, &id, true);
    })?;
    let share = vm.as_ref().zip(share).map(|(vm, name)| vm.directory.file("share").join(name));
    let config = call.value("config").map(|_| path);
    let streams = carried.iter().map(|c| c.stream).collect();
    let made = Making {
        global: &call.global,
        root,
        plan: &plan,
        directory: &directory,
        bundle,
        id: &id,
        vm,
        share,
        config,
        streams,
        scope,
    }
    .all(console.as_deref(), carried);
    let made = made.and_then(|pid| directory.made().map(|()| pid));
    let result = made.and_then(|pid| match call.value("pid-file") {
        // Last: callers take create for done as soon as it is there.
        Some(path) => state::write_whole(Path::new(path), pid.to_string().as_bytes()),
        None => Ok(()),
    });
    let result = result.and_then(|()| wanted());
    if result.is_err() {
        let _ = delete(root, &id, true);
    }
    result
}

/// Nobody has asked this command to end.
fn wanted() -> Result<(), Error> {
    if interrupt::came() { Err(vm::interrupted()) } else { Ok(()) }
}

/// Makes and starts a container; in the foreground its exit code is ours.
pub(super) fn run(call: &Call, root: &Path) -> Result<i32, Error> {
    // A stub must be our child to be waited for.
    create(call, root)?;
    let id = call.id()?;
    let detached = call.has("detach");
    let waits = if detached { Ready::Awaited } else { Ready::Behind };
    let in_front = || Ok((foreground::Signals::hold()?, own_terminal(call, &Directory::of(root, id)?)?));
    let held = if detached { Ok(None) } else { in_front().map(Some) };
    let started = held.and_then(|held| {
        wanted()?;
        start_container(root, id, waits)?;
        Ok(held)
    });
    let record = Directory::of(root, id)?.read()?;
    let (signals, raw) = match started {
        Err(error) => {
            let _ = delete(root, id, true);
            return Err(error);
        }
        Ok(None) => return Ok(0),
        Ok(Some(held)) => held,
    };
    let code = record.stub.map_or(Ok(0), |stub| foreground::wait(stub.pid, &signals));
    drop(raw);
    if !call.has("keep") {
        delete(root, id, true)?;
    }
    code
}

/// This process's own terminal, for a container that wants one.
fn own_terminal(call: &Call, directory: &Directory) -> Result<Option<foreground::Raw>, Error> {
    if !plan::wants_terminal(&config(directory)?) || call.value("console-socket").is_some() {
        return Ok(None);
    }
    foreground::terminal()?.map(foreground::Raw::new).transpose()
}

/// A container that is being made.
struct Making<'a> {
    global: &'a Global,
    root: &'a Path,
    plan: &'a Plan,
    directory: &'a Directory,
    bundle: PathBuf,
    id: &'a str,
    /// The pod's, when there is one already.
    vm: Option<pod::Running>,
    /// This container's files as that VM's process sees them.
    share: Option<PathBuf>,
    /// As in [`Record`].
    config: Option<PathBuf>,
    /// The process's descriptors from 3 on.
    streams: Vec<Stream>,
    /// systemd makes the cgroup.
    scope: Option<Scope>,
}

impl Making<'_> {
    /// Everything up to the pid file; the stub's pid.
    fn all(&self, console: Option<&Path>, carried: Vec<Carried>) -> Result<i32, Error> {
        let group = match &self.scope {
            Some(scope) => Some(scope.path()),
            None => cgroup::path(&self.plan.spec)?,
        };
        let mut vm = match &self.vm {
            Some(running) => Vm {
                process: running.record.vmm,
                child: None,
                fresh: false,
                hold: pod::share(running, self.directory)?,
                network: Network::default(),
            },
            None => self.boot()?,
        };
        let mut record = Record {
            id: self.id.to_owned(),
            oci_version: self.plan.spec.version().clone(),
            bundle: self.bundle.clone(),
            rootfs: self.plan.rootfs.clone(),
            annotations: self.plan.spec.annotations().clone().unwrap_or_default(),
            created: clock::now(),
            stub: None,
            vmm: vm.process,
            cgroup: group,
            scope: self.scope.clone(),
            share: self.share.clone(),
            volumes: pod::volumes(&self.plan.binds),
            conmon: Pid::parent_named("conmon"),
            config: self.config.clone(),
        };
        // From here on `delete --force` can take everything down, even if this process is killed.
        self.directory.write(&record)?;
        // Until the stub is in it, so that there is a scope.
        let _holder = self.scope.as_ref().map(|scope| self.make_scope(scope)).transpose()?;
        if let Some(path) = &record.cgroup {
            if self.scope.is_none() {
                cgroup::create(path, &self.plan.spec, self.guest_mib())?;
            } else if let Some(resources) = plan::resources(&self.plan.spec) {
                cgroup::apply(path, resources, self.guest_mib())?;
            }
            if vm.fresh {
                self.confine(&mut vm, path)?;
            }
        }
        if let Some(running) = &self.vm {
            self.make_room(&record)?;
            pod::show(running, &self.plan.binds)?;
        }
        let pty = if self.plan.terminal && console.is_some() { Some(terminal::open()?) } else { None };
        let own = if self.plan.terminal && pty.is_none() { foreground::terminal()? } else { None };
        if let Some((_, slave)) = &pty {
            terminal::size(
                slave,
                self.plan.spec.process().as_ref().and_then(oci_spec::runtime::Process::console_size),
            );
        }
        let connection = self.ask_guest(&mut vm, pty.as_ref().map(|(_, slave)| slave).or(own.as_ref()))?;
        let (slave, master) = match pty {
            Some((master, slave)) => (Some(Terminal::Made(slave)), Some(master)),
            None => (own.map(Terminal::Callers), None),
        };
        let stub = self.fork_stub(connection, slave, vm.hold, carried, &mut record)?;
        if let (Some(master), Some(console)) = (master, console) {
            terminal::give(console, &master)?;
        }
        Ok(stub.pid)
    }
}
