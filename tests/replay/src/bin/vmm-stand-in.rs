//! Stands in for `coffer-vmm`: takes its arguments, and in place of a guest runs init's own server in namespaces of the
//! host. The same containers are made by the same code, without KVM.
//!
//! It isolates nothing worth the name. What it does differently from a VM is said where it does it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::exit,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
    time::SystemTime,
};

use coffer_init::{boot, network, server::Server};
use coffer_protocol::{
    CONTROL_PORT, Decoder, Kind, Reply, Request, SHARE_DIR, encode,
    vm::{Line, NetAnswer, SizeAnswer, VmSize, parse_mac},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Connections of the host.
static OPEN: AtomicUsize = AtomicUsize::new(0);
/// MiB that the host wants this to have beside those of `--memory-mib`, and MiB that the guest took of them: as many, when it was told to.
static WANTED: AtomicU64 = AtomicU64::new(0);
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// Network devices of the guest, and how many it can have.
static NICS: AtomicUsize = AtomicUsize::new(0);
const MOST_NICS: usize = 3;
/// MiB that can be wanted.
const MOST_MIB: u64 = 4096;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let flags: HashMap<&str, &str> =
        words.chunks(2).filter_map(|p| Some((p.first()?.as_str(), p.get(1)?.as_str()))).collect();
    let get = |name: &str| flags.get(name).copied().unwrap_or_else(|| panic!("{name} is missing"));
    let lifeline = get("--lifeline-fd").parse().expect("a descriptor");
    // SAFETY: sets a flag on a descriptor: containers, which a VM would keep from it, do not get it.
    unsafe { libc::fcntl(lifeline, libc::F_SETFD, libc::FD_CLOEXEC) };
    // What a broken image does, for tests: no guest comes up.
    if fs::read(get("--image")).is_ok_and(|image| image == b"broken") {
        report(Path::new(get("--exit-report")), "panic", 70, "the guest's kernel or init failed");
        exit(70);
    }
    let socket = PathBuf::from(get("--vsock"));
    // Without a file: the directory may be renamed while this runs.
    let inner = SocketAddr::from_abstract_name(format!("coffer-stand-in.{}", std::process::id()))
        .expect("an address");
    let listener = UnixListener::bind_addr(&inner).expect("bind the inner socket");
    let share = get("--fs");
    show_later_mounts(share).expect("make --fs a shared mount");
    let group = group();
    // SAFETY: this process has one thread so far.
    let guest = match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => exit(match guest(listener.into(), share, group.as_deref()) {
            Ok(()) => 0,
            Err(error) => {
                let _ = fs::write(get("--log"), format!("stand-in: {error}\n"));
                1
            }
        }),
    };
    let abandoned = get("--exit-report").to_owned();
    let account = group.clone();
    thread::spawn(move || {
        // SAFETY: the caller left this descriptor open for us alone.
        let mut lifeline = unsafe { File::from_raw_fd(lifeline) };
        let _ = lifeline.read(&mut [0]);
        // SAFETY: signals our own child.
        unsafe { libc::kill(guest.as_raw(), libc::SIGKILL) };
        report(Path::new(&abandoned), "abandoned", 0, "nobody waits for this pod any more");
        remove(account.as_deref());
        exit(0);
    });
    let online = socket.with_file_name("stand-in-processors");
    for net in words.chunks(2).filter(|pair| pair[0] == "--net") {
        let parts = net[1].strip_prefix("fd=").and_then(|rest| rest.split_once(",mac="));
        let (fd, mac) = parts.expect("fd=N,mac=MAC");
        // SAFETY: the caller left this descriptor open for us alone.
        let tap = unsafe { File::from_raw_fd(fd.parse().expect("a descriptor")) };
        nic(tap, parse_mac(mac).expect("an address"), guest.as_raw()).expect("a network device");
    }
    // A VM takes requests when its guest is ready.
    let outer = UnixListener::bind(&socket).expect("bind --vsock");
    let booted = VmSize {
        boot_mib: get("--memory-mib").parse().expect("MiB"),
        vcpus: get("--vcpus").parse().expect("a number"),
        boot_vcpus: flags.get("--boot-vcpus").unwrap_or(&get("--vcpus")).parse().expect("a number"),
        most_mib: MOST_MIB,
        ..VmSize::default()
    };
    thread::spawn(move || {
        for (number, host) in outer.incoming().flatten().enumerate() {
            let (inner, online) = (inner.clone(), online.clone());
            OPEN.fetch_add(1, Ordering::SeqCst);
            thread::spawn(move || {
                connection(host, &inner, number, booted, &online, guest.as_raw());
                OPEN.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    let orderly = matches!(waitpid(guest, None), Ok(WaitStatus::Exited(_, 0)));
    remove(group.as_deref());
    // What the guest said last is still on its way.
    for _ in 0..1000 {
        if OPEN.load(Ordering::SeqCst) == 0 {
            break;
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    let path = Path::new(get("--exit-report"));
    if orderly {
        report(path, "orderly", 0, "the guest ended in good order");
        exit(0);
    }
    let why = fs::read_to_string(get("--log")).unwrap_or_default();
    report(path, "panic", 70, &format!("the guest's kernel or init failed: {why}"));
    exit(70);
}

fn report(path: &Path, reason: &str, code: u8, message: &str) {
    let value = serde_json::json!({ "reason": reason, "code": code, "message": message });
    let _ = fs::write(path, value.to_string());
}

/// A cgroup of the host's version 2 hierarchy for this guest, where there is such a hierarchy.
fn group() -> Option<PathBuf> {
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let root = root.into_iter().find(|r| r.join("cgroup.controllers").exists())?;
    // A stand-in that was killed leaves its own, with what is below, and its number is used again, in a namespace of processes soon.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let path = root.join(format!("coffer-stand-in.{}.{}", std::process::id(), now.as_nanos()));
    fs::create_dir(&path).ok()?;
    Some(path)
}

fn remove(group: Option<&Path>) {
    let Some(group) = group else { return };
    let _ = fs::write(group.join("cgroup.kill"), "1");
    for _ in 0..100 {
        for entry in fs::read_dir(group).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        if fs::remove_dir(group).is_ok() {
            return;
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// The guest's PID 1, but for the boot.
fn guest(listener: OwnedFd, share: &str, group: Option<&Path>) -> Result<(), Box<dyn std::error::Error>> {
    let group = group.ok_or("the host has no cgroup hierarchy of version 2")?;
    fs::write(group.join("cgroup.procs"), "0")?;
    let flags = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(flags)?;
    // SAFETY: this process has one thread.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        die_with_parent();
        return match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => Err(format!("PID 1: {other:?}").into()),
        };
    }
    die_with_parent();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let share = File::open(share)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    fs::create_dir_all(SHARE_DIR)?;
    let from = format!("/proc/self/fd/{}", share.as_raw_fd());
    mount(Some(from.as_str()), SHARE_DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none)?;
    fs::create_dir_all("/sys/fs/cgroup/init")?;
    fs::write("/sys/fs/cgroup/init/cgroup.procs", "0")?;
    boot::delegate_controllers("/sys/fs/cgroup");
    boot::raise_limits();
    keep_the_hosts_clock()?;
    network::loopback_up()?;
    Server::new(listener)?.run()?;
    exit(0)
}

/// What is mounted below the share while the guest runs appears in it, as it does through a real share.
fn show_later_mounts(share: &str) -> nix::Result<()> {
    let none = None::<&str>;
    mount(Some(share), share, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    mount(none, share, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none)
}

fn die_with_parent() {
    // SAFETY: asks for a signal when the parent ends.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
}

/// init sets the machine's clock; here that is the host's: the call does nothing, successfully.
fn keep_the_hosts_clock() -> Result<(), Box<dyn std::error::Error>> {
    let rules = [(libc::SYS_clock_settime, Vec::new())].into();
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), TargetArch::x86_64)?;
    let program = BpfProgram::try_from(filter)?;
    let mut filters: Vec<libc::sock_filter> =
        program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    let program = libc::sock_fprog { len: u16::try_from(filters.len())?, filter: filters.as_mut_ptr() };
    let result =
        // SAFETY: the program outlives the call. Without no_new_privs, which containers would inherit.
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error().into()) } else { Ok(()) }
}

/// The VMM's part of a connection: the handshake, then bytes both ways.
fn connection(
    mut host: UnixStream,
    inner: &SocketAddr,
    number: usize,
    booted: VmSize,
    online: &Path,
    guest: i32,
) -> Option<()> {
    let (line, tap) = first_line(&host)?;
    match Line::parse(&line)? {
        Line::Connect(CONTROL_PORT) => {}
        Line::Connect(_) => return None,
        Line::Net(mac) => return host.write_all(plug(mac, tap, guest).to_line().as_bytes()).ok(),
        Line::Memory(wanted) => return host.write_all(resize(booted, wanted).to_line().as_bytes()).ok(),
    }
    let mut guest = UnixStream::connect_addr(inner).ok()?;
    host.write_all(format!("OK {number}\n").as_bytes()).ok()?;
    let request = first_frame(&mut host)?;
    // The guest's kernel is the host's: it takes no memory from here, and its processors are the host's.
    let answered = match asked(&request) {
        Some(Request::TakeMemory) => {
            TAKEN.store(WANTED.load(Ordering::SeqCst), Ordering::SeqCst);
            true
        }
        Some(Request::Processors { online: count }) => fs::write(online, count.to_string()).is_ok(),
        _ => false,
    };
    if answered {
        let mut reply = Vec::new();
        encode(Kind::Reply, &Reply::Done.to_payload(), &mut reply);
        return host.write_all(&reply).ok();
    }
    guest.write_all(&request).ok()?;
    let (mut from_host, mut to_guest) = (host.try_clone().ok()?, guest.try_clone().ok()?);
    thread::spawn(move || {
        relay(&mut from_host, &mut to_guest);
        let _ = to_guest.shutdown(Shutdown::Write);
        // A host that says nothing more may still listen; one that has closed does not, which the guest is told, too.
        let mut wait = libc::pollfd { fd: from_host.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid entry.
        unsafe { libc::poll(&raw mut wait, 1, -1) };
        let _ = to_guest.shutdown(Shutdown::Both);
    });
    relay(&mut guest, &mut host);
    let _ = host.shutdown(Shutdown::Both);
    Some(())
}

/// The request of a whole frame.
fn asked(frame: &[u8]) -> Option<Request> {
    let mut decoder = Decoder::default();
    decoder.push(frame);
    Request::from_payload(&decoder.next_frame().ok()??.payload).ok()
}

/// The host's first line, and the descriptor that came with it.
fn first_line(host: &UnixStream) -> Option<(Vec<u8>, Option<File>)> {
    let (mut line, mut descriptor) = (Vec::new(), None);
    loop {
        let mut byte = [0];
        let mut parts = [io::IoSliceMut::new(&mut byte)];
        let mut room = nix::cmsg_space!([i32; 1]);
        let got =
            recvmsg::<()>(host.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
        for message in got.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just made this descriptor for this process, and nobody else has it.
                descriptor = numbers.first().map(|number| unsafe { File::from_raw_fd(*number) });
            }
        }
        if got.bytes == 0 {
            return None;
        }
        if byte[0] == b'\n' {
            return Some((line, descriptor));
        }
        line.push(byte[0]);
    }
}

/// What a VMM says to a host that wants a network device.
fn plug(mac: [u8; 6], tap: Option<File>, guest: i32) -> NetAnswer {
    if NICS.load(Ordering::SeqCst) >= MOST_NICS {
        return NetAnswer::Refused("a VM has 3 network devices at most, and these are there".into());
    }
    let made = tap.ok_or_else(|| io::ErrorKind::InvalidInput.into()).and_then(|tap| nic(tap, mac, guest));
    made.map_or_else(|error| NetAnswer::Refused(error.to_string()), |()| NetAnswer::Added)
}

/// A network device of the guest: a tap in its namespace, and two threads that carry packets between it and the host's.
fn nic(tap: File, mac: [u8; 6], guest: i32) -> io::Result<()> {
    NICS.fetch_add(1, Ordering::SeqCst);
    let inside = thread::spawn(move || {
        let own = fs::read_link("/proc/self/ns/net")?;
        let path = format!("/proc/{guest}/ns/net");
        // It has not made its namespaces yet.
        while fs::read_link(&path)? == own {
            thread::sleep(std::time::Duration::from_millis(1));
        }
        // Of this thread alone.
        setns(File::open(&path)?, CloneFlags::CLONE_NEWNET)?;
        tap_with_address(mac)
    });
    let inside = inside.join().map_err(|_| io::Error::other("the thread in the guest's network"))??;
    for (from, to) in [(tap.try_clone()?, inside.try_clone()?), (inside, tap)] {
        thread::spawn(move || {
            let mut packet = vec![0; 70_000];
            // A device that is down gives and takes nothing; it may come up again.
            loop {
                match (&from).read(&mut packet) {
                    Ok(count) => drop((&to).write(&packet[..count])),
                    Err(_) => thread::sleep(std::time::Duration::from_millis(5)),
                }
            }
        });
    }
    Ok(())
}

fn tap_with_address(mac: [u8; 6]) -> io::Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request outlives the call, which fills in a name.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all of sockaddr is plain data.
    let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
    address.sa_family = libc::ARPHRD_ETHER;
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    // SAFETY: as above; a tap takes this of its own descriptor.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap)
}

/// What a VMM says about its size. This guest gives back at once what is not wanted any more.
fn resize(booted: VmSize, wanted: Option<u32>) -> SizeAnswer {
    if let Some(mib) = wanted.map(u64::from) {
        if mib > MOST_MIB {
            return SizeAnswer::Refused(format!("at most {MOST_MIB} MiB can come"));
        }
        WANTED.store(mib, Ordering::SeqCst);
        TAKEN.fetch_min(mib, Ordering::SeqCst);
    }
    let (wanted_mib, plugged_mib) = (WANTED.load(Ordering::SeqCst), TAKEN.load(Ordering::SeqCst));
    SizeAnswer::Size(VmSize { wanted_mib, plugged_mib, ..booted })
}

/// Bytes from one to the other until either ends, in pieces as long as a VMM's packets; io::copy's have 8 KiB.
fn relay(from: &mut UnixStream, to: &mut UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// The request and what came with it; what is none, or not a whole one, as it came. A hybrid host's controllers are not in
/// the hierarchy that this guest has: limits that no file stands for are left out, where a guest's kernel has them all.
fn first_frame(host: &mut UnixStream) -> Option<Vec<u8>> {
    let mut decoder = Decoder::default();
    let mut raw = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let frame = loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => break frame,
            Ok(None) => {}
            Err(_) => return Some(raw),
        }
        let count = host.read(&mut buffer).ok()?;
        if count == 0 {
            return Some(raw);
        }
        raw.extend_from_slice(&buffer[..count]);
        decoder.push(&buffer[..count]);
    };
    let Ok(Request::Create(mut create)) = Request::from_payload(&frame.payload) else { return Some(raw) };
    let rest = raw.split_off(5 + frame.payload.len());
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let linux = create.spec.get_mut("linux").and_then(serde_json::Value::as_object_mut);
        linux.map(|linux| linux.remove("resources"));
    }
    let mut bytes = Vec::new();
    encode(Kind::Request, &Request::Create(create).to_payload(), &mut bytes);
    bytes.extend_from_slice(&rest);
    Some(bytes)
}
