//! Forking the stub into the namespaces that the configuration names.
//!
//! Owns: what is open in it, the order with the hooks of both sides, what its maker hears of it. Does not own: what it does from then on
//! (`stub`).

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use coffer_protocol::Outbox;
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::wait::waitpid,
    unistd::{Pid as NixPid, pipe2},
};
use oci_spec::runtime::{LinuxNamespaceType as Kind, Spec};

use super::Making;
use crate::{
    cgroup,
    client::Connection,
    commands::hooks,
    descriptors::Carried,
    error::{Error, host},
    notify::Teller,
    pid::{Pid, set_oom_score_adj},
    plan::{namespace, oom_score_adj},
    spawn::clone,
    state::{Record, Status},
    stub::{self, Relay, Terminal},
    title,
};

fn pipe(stage: &str) -> Result<(OwnedFd, OwnedFd), Error> {
    pipe2(OFlag::O_CLOEXEC).map_err(host(stage))
}

impl Making<'_> {
    /// The process that callers wait for. It goes on when this process has said that all is well, and ends when this
    /// process ends without it.
    pub(super) fn fork_stub(
        &self,
        connection: Connection,
        slave: Option<Terminal>,
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
        // podman 4 looks in the bundle, podman 5 in a directory of conmon's, `events` in the container's own.
        let oom: Vec<File> = std::iter::once(self.bundle.clone())
            .chain(persist_dir())
            .filter_map(|d| File::open(d).ok())
            .collect();
        let of_container = File::open(self.directory.file("")).ok();
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
                set_oom_score_adj(pid, oom_score_adj(spec));
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
                    title::show(spec.process().as_ref().and_then(|p| p.args().as_deref()).unwrap_or(&[]));
                    let kept =
                        [ready.as_raw_fd(), go.as_raw_fd(), hold.as_raw_fd(), connection.stream.as_raw_fd()];
                    let others = slave
                        .iter()
                        .map(AsRawFd::as_raw_fd)
                        .chain(reports.iter().chain(&oom).chain(&of_container).map(AsRawFd::as_raw_fd))
                        .chain(vmm.iter().map(AsRawFd::as_raw_fd))
                        .chain(teller.iter().map(Teller::fd))
                        .chain(carried.iter().filter_map(Carried::number))
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
                    stub::take_outputs(slave.as_ref(), &carried);
                    stub::root::enter(self.plan, &destinations)?;
                    if let Some(slave) = &slave {
                        stub::take_terminal(slave);
                    }
                    if let Some(root) = root_of(spec) {
                        stub::save_user(root);
                    }
                    stub::drop_rights();
                    Ok(signals)
                };
                let signals = set_up();
                // `hold` stays open until this process ends.
                stub::go_on(ready, signals, |signals| Relay {
                    out: Outbox::default(),
                    connection,
                    signals,
                    terminal: slave,
                    reports,
                    vmm,
                    oom,
                    own: of_container,
                    teller,
                    further: carried.into_iter().map(Into::into).collect(),
                })
            }
        }
    }
}

/// Whom of the host the root of a container's user namespace is.
fn root_of(spec: &Spec) -> Option<u32> {
    let maps = spec.linux().as_ref()?.uid_mappings().as_ref()?;
    maps.iter().find(|map| map.container_id() == 0).map(oci_spec::runtime::LinuxIdMapping::host_id)
}

/// Where conmon keeps what podman is to know of a container when it has ended, if it is conmon that called.
fn persist_dir() -> Option<PathBuf> {
    let conmon = Pid::parent_named("conmon")?;
    persist_dir_in(&std::fs::read(format!("/proc/{}/cmdline", conmon.pid)).ok()?)
}

fn persist_dir_in(command_line: &[u8]) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let mut words = command_line.split(|byte| *byte == 0);
    let value = words.find_map(|word| word.strip_prefix(b"--persist-dir"))?;
    let value = value.strip_prefix(b"=").or_else(|| words.next())?;
    Some(std::ffi::OsStr::from_bytes(value).into()).filter(|path: &PathBuf| path.is_absolute())
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
pub(in crate::commands) fn close_others(kept: &[RawFd]) {
    let open = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<RawFd> = open.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in numbers.into_iter().filter(|fd| *fd > 2 && !kept.contains(fd)) {
        // SAFETY: this process, a fresh fork, uses none but those that are kept.
        unsafe { libc::close(fd) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conmons_directory_is_among_its_words() {
        let of = |line: &str| persist_dir_in(line.replace(' ', "\0").as_bytes());
        let wanted = Some(PathBuf::from("/run/libpod/persist/c"));
        assert_eq!(of("conmon -c c --persist-dir /run/libpod/persist/c -p /p "), wanted);
        assert_eq!(of("conmon --persist-dir=/run/libpod/persist/c "), wanted);
        for line in ["conmon -c c ", "conmon --persist-dir", "conmon --persist-dir relative "] {
            assert_eq!(of(line), None, "{line}");
        }
    }
}
