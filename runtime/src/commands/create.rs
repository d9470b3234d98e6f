//! `create` and `run`: from a bundle to a VM with a container that waits, and a stub on the host.
//!
//! Owns: the order. The VM boots while the rest is made; the pid file is written last; whatever fails takes all down.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::Child,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use coffer_protocol::{CreateContainer, Network, Outbox, Request, Sandbox, Stream, VERSION};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::wait::waitpid,
    unistd::{Pid as NixPid, pipe2},
};
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use super::{Ready, boot_chart, config, delete, foreground, hooks, pod, start as start_container, terminal};
use crate::{
    cgroup,
    cli::Call,
    client::{self, Connection},
    clock,
    descriptors::{self, Carried},
    error::{Error, host},
    home::Home,
    image,
    network::{self, Tap},
    notify::{self, Teller, Whom},
    pid::{self, Pid},
    plan::{self, Plan, namespace},
    scratch,
    spawn::{self, Started, clone},
    start::{self, Start},
    state::{self, Directory, Record, Status},
    stub::{self, Relay},
    systemd::Scope,
    template,
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
    let mut plan = plan::plan(&bundle, &id, &text)?;
    pod::sweep(root);
    let vm = pod::find(root, &plan.spec, &id);
    start::wanted(&plan)?;
    let pod = vm.as_ref().map(|vm| &vm.record.annotations);
    plan.confidential.check(pod)?;
    scratch::check(plan.scratch, pod)?;
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
    directory.create()?;
    state::write_whole(&directory.file("config.json"), &text)?;
    if plan.notify.as_ref().is_some_and(|notify| notify.whom == Whom::Starter) {
        directory.mark("notifies", true)?;
    }
    let share = vm.as_ref().zip(share).map(|(vm, name)| vm.directory.file("share").join(name));
    let config = call.value("config").map(|_| path);
    let streams = carried.iter().map(|c| c.stream).collect();
    let made = Making {
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
    let result = made.and_then(|pid| match call.value("pid-file") {
        // Last: callers take create for done as soon as it is there.
        Some(path) => state::write_whole(Path::new(path), pid.to_string().as_bytes()),
        None => Ok(()),
    });
    if result.is_err() {
        let _ = delete(root, &id, true);
    }
    result
}

/// Makes and starts a container; in the foreground its exit code is ours.
pub(super) fn run(call: &Call, root: &Path) -> Result<i32, Error> {
    // A stub must be our child to be waited for.
    create(call, root)?;
    let id = call.id()?;
    let waits = if call.has("detach") { Ready::Awaited } else { Ready::Behind };
    let started = start_container(root, id, waits);
    let record = Directory::of(root, id)?.read()?;
    if let Err(error) = started {
        let _ = delete(root, id, true);
        return Err(error);
    }
    if call.has("detach") {
        return Ok(0);
    }
    let wants_terminal =
        plan::wants_terminal(&config(&Directory::of(root, id)?)?) && call.value("console-socket").is_none();
    let terminal = if wants_terminal { foreground::terminal()? } else { None };
    let code = record.stub.map_or(Ok(0), |stub| foreground::wait(stub.pid, terminal));
    if !call.has("keep") {
        delete(root, id, true)?;
    }
    code
}

struct Making<'a> {
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

/// The VM's process, and what this container has of it.
struct Vm {
    process: Pid,
    /// The process that this command started for it, if it did.
    child: Option<Child>,
    /// It boots, and has no container yet.
    fresh: bool,
    /// Keeps it alive.
    hold: OwnedFd,
    network: Network,
}

impl Vm {
    fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => self.process.is_alive(),
        }
    }
}

/// A process that keeps a cgroup from being empty, until this is dropped.
struct Holder(i32);

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: signals a child of this process, which was not reaped.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        let _ = waitpid(NixPid::from_raw(self.0), None);
    }
}

fn pipe(stage: &str) -> Result<(OwnedFd, OwnedFd), Error> {
    pipe2(OFlag::O_CLOEXEC).map_err(host(stage))
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
            conmon: Pid::parent_named("conmon"),
            config: self.config.clone(),
        };
        // From here on `delete --force` can take everything down, even if this process is killed.
        self.directory.write(&record)?;
        // Until the stub is in it, so that there is a scope.
        let _holder = self.scope.as_ref().map(|scope| self.make_scope(scope)).transpose()?;
        if let Some(path) = &record.cgroup {
            if self.scope.is_none() {
                cgroup::create(path, &self.plan.spec)?;
            } else if let Some(resources) = plan::resources(&self.plan.spec) {
                cgroup::apply(path, resources)?;
            }
            if vm.fresh {
                self.confine(&mut vm, path)?;
            }
        }
        if let Some(running) = &self.vm {
            pod::show(running, &self.plan.binds)?;
        }
        if !vm.network.interfaces.is_empty() {
            self.directory.mark("networked", true)?;
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
        let (slave, master) = pty.map_or((own, None), |(master, slave)| (Some(slave), Some(master)));
        let stub = self.fork_stub(connection, slave, vm.hold, carried, &mut record)?;
        if let (Some(master), Some(console)) = (master, console) {
            terminal::give(console, &master)?;
        }
        Ok(stub.pid)
    }

    /// Starts a VM for this container and those that may follow.
    fn boot(&self) -> Result<Vm, Error> {
        let (lifeline, hold) = pod::lifeline(self.directory)?;
        let (network, taps) = self.network()?;
        let trace = self.trace();
        let home = Home::find()?;
        let pod_network = namespace(&self.plan.spec, Kind::Network).flatten();
        let shape = template::Shape {
            image: spawn::image(self.plan, &home),
            memory_mib: self.plan.memory_mib,
            vcpus: self.plan.vcpus,
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
        Ok(Vm { process, child, fresh: true, hold, network })
    }

    /// Has systemd make the cgroup, with a process that does nothing.
    fn make_scope(&self, scope: &Scope) -> Result<Holder, Error> {
        let Some(pid) = clone(0).map_err(host("fork a process for the scope"))? else {
            // SAFETY: asks the kernel to end this process along with its parent.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
            close_others(&[]);
            loop {
                nix::unistd::pause();
            }
        };
        let holder = Holder(pid);
        scope.start(pid, self.id, plan::resources(&self.plan.spec))?;
        Ok(holder)
    }

    /// Puts the VMM into the pod's cgroup once it has what it needs of /dev: podman's cgroup of a pod allows its processes
    /// no device at all, and the VMM's socket is there when it has opened its own.
    fn confine(&self, vm: &mut Vm, group: &Path) -> Result<(), Error> {
        let (socket, began) = (self.directory.socket(), Instant::now());
        while !socket.exists() && vm.is_alive() && began.elapsed() < client::SOCKET_LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
        match cgroup::join(group, vm.process.pid) {
            // It has ended: why is said by who asks it next.
            Err(_) if !vm.is_alive() => Ok(()),
            other => other,
        }
    }

    /// What the pod's namespace has, and taps for it. A pod that shares the host's network is refused.
    fn network(&self) -> Result<(Network, Vec<Tap>), Error> {
        match namespace(&self.plan.spec, Kind::Network) {
            None => Err(Error::State(
                "the host's network cannot be given to a VM: use a bridge network or --network none".into(),
            )),
            Some(None) => Ok((Network::default(), Vec::new())),
            Some(Some(path)) => network::inside(&path, || {
                let network = network::look()?;
                let taps = network::taps(&network)?;
                Ok((network, taps))
            }),
        }
    }

    /// Boot stages are always written, for `boot-chart`: a dozen lines; somebody may want them elsewhere.
    fn trace(&self) -> Option<PathBuf> {
        let annotation = self.plan.spec.annotations().as_ref().and_then(|a| a.get("io.coffer.trace"));
        let elsewhere = std::env::var_os("COFFER_TRACE").map(PathBuf::from).filter(|_| annotation.is_none());
        elsewhere.or_else(|| Some(boot_chart::trace_of(self.directory, annotation)))
    }

    /// Sets the pod up and makes the container in the guest, as soon as it has booted.
    fn ask_guest(&self, vm: &mut Vm, slave: Option<&OwnedFd>) -> Result<Connection, Error> {
        let socket = self.directory.socket();
        let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let sandbox = Sandbox {
            version: VERSION,
            hostname: self.plan.spec.hostname().clone(),
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
        let mut talk = || {
            if vm.fresh {
                Connection::open(&socket, || vm.is_alive())?.ask(&Request::Sandbox(sandbox.clone()))?;
            }
            let mut connection = Connection::open(&socket, || vm.is_alive())?;
            connection.ask(&Request::Create(Box::new(create.clone())))?;
            Ok(connection)
        };
        talk().map_err(|error| match error {
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
    fn vm_directory(&self) -> &Directory {
        self.vm.as_ref().map_or(self.directory, |vm| &vm.directory)
    }

    /// Why the VMM ended, in its own words.
    fn report(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.vm_directory().file("exit-report")).ok()?;
        let value: serde_json::Value = serde_json::from_str(&text).ok()?;
        value["message"].as_str().map(str::to_owned)
    }

    /// The process that callers wait for. It goes on when this process has said that all is well, and ends when this
    /// process ends without it.
    fn fork_stub(
        &self,
        connection: Connection,
        slave: Option<OwnedFd>,
        hold: OwnedFd,
        carried: Vec<Carried>,
        record: &mut Record,
    ) -> Result<Pid, Error> {
        let teller = self.plan.notify.as_ref();
        let teller = teller.map(|notify| Teller::open(&notify.whom, &self.directory.file(""))).transpose()?;
        let (ready, tell_ready) = pipe("make a pipe")?;
        let (go, tell_go) = pipe("make a pipe")?;
        let spec = &self.plan.spec;
        let mut flags = libc::CLONE_NEWNS;
        let mut joins = Vec::new();
        for (kind, flag) in [
            (Kind::Pid, libc::CLONE_NEWPID),
            (Kind::Network, libc::CLONE_NEWNET),
            (Kind::Ipc, libc::CLONE_NEWIPC),
            (Kind::Uts, libc::CLONE_NEWUTS),
            (Kind::Cgroup, libc::CLONE_NEWCGROUP),
        ] {
            match namespace(spec, kind) {
                Some(None) => flags |= flag,
                Some(Some(_)) if kind == Kind::Pid => {}
                Some(Some(path)) => {
                    let file =
                        File::open(&path).map_err(host(format!("open namespace {}", path.display())))?;
                    joins.push((file, flag, path));
                }
                None => {}
            }
        }
        let reports = File::open(self.vm_directory().file("")).ok();
        let bundle = File::open(&self.bundle).ok();
        let vmm = record.vmm.open().ok();
        let destinations: Vec<PathBuf> = self
            .plan
            .bind_sources
            .iter()
            .filter_map(|b| spec.mounts().as_ref()?.get(b.mount).map(|m| m.destination().clone()))
            .collect();
        // A namespace of processes is entered by children only: by the stub, and by nothing that this process runs later.
        let processes = match namespace(spec, Kind::Pid) {
            Some(Some(path)) => {
                Some(File::open(&path).map_err(host(format!("open namespace {}", path.display())))?)
            }
            _ => None,
        };
        let own = File::open("/proc/self/ns/pid").map_err(host("open this namespace of processes"))?;
        if let Some(other) = &processes {
            setns(other, CloneFlags::CLONE_NEWPID).map_err(host("join the pod's processes"))?;
        }
        match clone(flags).map_err(host("fork the stub"))? {
            Some(pid) => {
                if processes.is_some() {
                    setns(&own, CloneFlags::CLONE_NEWPID).map_err(host("leave the pod's processes"))?;
                }
                drop((tell_ready, go, hold, slave, connection, carried));
                if let Some(path) = &record.cgroup {
                    cgroup::join(path, pid)?;
                }
                let mut ready = File::from(ready);
                let failed = |word: &[u8]| {
                    let _ = waitpid(NixPid::from_raw(pid), None);
                    Error::State(format!("set up the stub: {}", String::from_utf8_lossy(word)))
                };
                let mut first = [0];
                if ready.read(&mut first).unwrap_or(0) == 0 || first != *b"n" {
                    let mut word = first.to_vec();
                    let _ = ready.read_to_end(&mut word);
                    return Err(failed(&word));
                }
                // Its namespaces are there: the time for hooks of the host, which come before those of the container.
                let stub = Pid::of(pid).ok_or_else(|| Error::State("the stub ended at once".into()))?;
                record.stub = Some(stub);
                self.directory.write(record)?;
                let hooks = self.plan.spec.hooks().as_ref();
                hooks::run(hooks.and_then(|h| h.prestart().as_ref()), record, Status::Created)?;
                hooks::run(hooks.and_then(|h| h.create_runtime().as_ref()), record, Status::Created)?;
                let _ = File::from(tell_go).write_all(b"g");
                let mut word = Vec::new();
                let _ = ready.read_to_end(&mut word);
                if word == b"k" { Ok(stub) } else { Err(failed(&word)) }
            }
            None => {
                drop((ready, tell_go));
                let mut ready = File::from(tell_ready);
                let mut go = File::from(go);
                let mut set_up = || -> std::io::Result<_> {
                    nix::unistd::setsid()?;
                    let kept =
                        [ready.as_raw_fd(), go.as_raw_fd(), hold.as_raw_fd(), connection.stream.as_raw_fd()];
                    let others = slave
                        .iter()
                        .map(AsRawFd::as_raw_fd)
                        .chain(reports.iter().chain(&bundle).map(AsRawFd::as_raw_fd))
                        .chain(vmm.iter().map(AsRawFd::as_raw_fd))
                        .chain(teller.iter().map(Teller::fd))
                        .chain(carried.iter().map(|c| c.fd.as_raw_fd()))
                        .chain(joins.iter().map(|(file, ..)| file.as_raw_fd()));
                    close_others(&kept.into_iter().chain(others).collect::<Vec<_>>());
                    for (file, flag, path) in &joins {
                        // With its type: a path to a namespace of another one is an error.
                        setns(file, CloneFlags::from_bits_retain(*flag)).map_err(|e| {
                            std::io::Error::other(format!("join namespace {}: {e}", path.display()))
                        })?;
                    }
                    if flags & libc::CLONE_NEWUTS != 0
                        && let Some(name) = spec.hostname()
                    {
                        nix::unistd::sethostname(name)?;
                    }
                    ready.write_all(b"n")?;
                    if go.read(&mut [0])? == 0 {
                        // This container is not wanted any more.
                        std::process::exit(1);
                    }
                    create_container_hooks(spec, record)?;
                    let signals = stub::take_signals()?;
                    stub::enter_root(&self.plan.binds, &destinations)?;
                    if let Some(slave) = &slave {
                        stub::take_terminal(slave);
                    }
                    stub::drop_rights();
                    Ok(signals)
                };
                match set_up() {
                    Ok(signals) => {
                        let _ = ready.write_all(b"k");
                        drop(ready);
                        let relay = Relay {
                            out: Outbox::default(),
                            connection,
                            signals,
                            terminal: slave,
                            reports,
                            vmm,
                            bundle,
                            teller,
                            further: carried.into_iter().map(Into::into).collect(),
                        };
                        let code = relay.run();
                        drop(hold);
                        std::process::exit(code)
                    }
                    Err(error) => {
                        let _ = ready.write_all(error.to_string().as_bytes());
                        std::process::exit(1)
                    }
                }
            }
        }
    }
}

/// Runs in the stub: its namespaces are the container's, its root is still the host's.
fn create_container_hooks(spec: &Spec, record: &Record) -> std::io::Result<()> {
    let Some(list) = spec.hooks().as_ref().and_then(|h| h.create_container().as_ref()) else { return Ok(()) };
    // /proc is the host's: this process's number there, not the one of its own namespace.
    let number = std::fs::read_link("/proc/self")?.to_str().and_then(|n| n.parse().ok());
    let record = Record { stub: number.and_then(Pid::of), ..record.clone() };
    hooks::run(Some(list), &record, Status::Created).map_err(std::io::Error::other)
}

/// Closes what callers leaked: sockets of published ports, a shell's descriptors.
pub(super) fn close_others(kept: &[RawFd]) {
    let open = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<RawFd> = open.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in numbers.into_iter().filter(|fd| *fd > 2 && !kept.contains(fd)) {
        // SAFETY: this process, a fresh fork, uses none but those that are kept.
        unsafe { libc::close(fd) };
    }
}
