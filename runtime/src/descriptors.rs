//! Open files of the caller for a process in the guest: `--preserve-fds` and `LISTEN_FDS`.
//!
//! Owns: which of them can be carried. What crosses is a stream of bytes each way, relayed by the stub: a file is read or written
//! from where it stands, in order, and has no other operation of a file in the guest.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use coffer_protocol::{MAX_STREAMS, Stream};
use nix::sys::socket::{SockaddrStorage, getpeername};
use serde_json::Value;

use crate::error::Error;

/// One of them.
#[derive(Debug)]
pub struct Carried {
    /// The host's; none where the caller has nothing open at this number.
    pub fd: Option<OwnedFd>,
    /// What the process may do with its end.
    pub stream: Stream,
}

impl Carried {
    /// Its number in this process.
    #[must_use]
    pub fn number(&self) -> Option<RawFd> {
        self.fd.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// Highest number that is looked at.
const MOST: usize = 1 << 20;

/// The caller's first descriptor beside stdin, stdout and stderr.
const FIRST: RawFd = 3;

/// How many a caller passes by `LISTEN_FDS` (sd_listen_fds(3)), when they are for this process.
fn listening(variable: impl Fn(&str) -> Option<String>) -> usize {
    let number = |name: &str| variable(name)?.parse::<u32>().ok();
    match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid == std::process::id() => count as usize,
        _ => 0,
    }
}

/// How many there are: `LISTEN_FDS` first, as with runc, then those of `--preserve-fds`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// By `LISTEN_FDS`.
    pub listen: usize,
    /// All.
    pub all: usize,
}

/// Reads the option and, for a container's first process, the environment.
///
/// # Errors
/// [`Error::Usage`] when the option is no number, or a large one.
pub fn count(option: Option<&str>, first: bool) -> Result<Count, Error> {
    let preserved = match option {
        None => 0,
        Some(text) => {
            text.parse().map_err(|_| Error::Usage(format!("--preserve-fds={text}: a number is wanted")))?
        }
    };
    let listen = if first { listening(|name| std::env::var(name).ok()) } else { 0 };
    let all = listen.saturating_add(preserved);
    if all > MOST {
        return Err(Error::Usage(format!("{all} open files to pass on: at most {MOST} are looked at")));
    }
    Ok(Count { listen, all })
}

/// Says to a container's first process which descriptors `LISTEN_FDS` are.
pub fn tell(guest: &mut Value, listen: usize) {
    if let Some(Value::Array(environment)) = guest.pointer_mut("/process/env") {
        environment.retain(|pair| !pair.as_str().is_some_and(|pair| pair.starts_with("LISTEN_")));
        environment.push(Value::from(format!("LISTEN_FDS={listen}")));
        environment.push(Value::from("LISTEN_PID=1"));
    }
}

/// Takes them. Call it before this process opens anything. What `--preserve-fds` counts and is not open stays so in the
/// container, as with crun and youki; what `LISTEN_FDS` counts must be there.
///
/// # Errors
/// [`Error::Usage`], naming the descriptor and the way round it, or that there are too many.
pub fn take(count: Count) -> Result<Vec<Carried>, Error> {
    let mut numbers: Vec<RawFd> = (FIRST..).take(count.all).collect();
    let last = numbers.iter().rposition(|fd| is_open(*fd)).map_or(0, |n| n + 1);
    numbers.truncate(last.max(count.listen));
    if numbers.len() > MAX_STREAMS {
        let highest = FIRST + MAX_STREAMS as RawFd - 1;
        return Err(Error::Usage(format!(
            "open file {} cannot be given to a VM: numbers up to {highest} are possible",
            FIRST + numbers.len() as RawFd - 1
        )));
    }
    let wanted = |(n, fd): (usize, &RawFd)| n < count.listen || is_open(*fd);
    let stream = |(n, fd)| if wanted((n, fd)) { check(*fd).map(Some) } else { Ok(None) };
    let streams = numbers.iter().enumerate().map(stream).collect::<Result<Vec<_>, _>>()?;
    let own = |fd: RawFd| {
        // SAFETY: the caller gave it to this process, in which nothing else uses it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sets a flag on an open descriptor: programs that this one starts have no use for it.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        fd
    };
    let carried = |(fd, stream): (RawFd, Option<Stream>)| match stream {
        Some(stream) => Carried { fd: Some(own(fd)), stream },
        None => Carried { fd: None, stream: Stream { read: false, write: false } },
    };
    Ok(numbers.into_iter().zip(streams).map(carried).collect())
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: reads flags of a number that need not be a descriptor.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// What a process may do with a descriptor, when it can be carried.
fn check(fd: RawFd) -> Result<Stream, Error> {
    let refused = |what: &str| Err(Error::Usage(format!("open file {fd} cannot be given to a VM: {what}")));
    // SAFETY: reads flags of a number that need not be a descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return refused("it is not open");
    }
    // SAFETY: stat is plain data for which zero is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a stat that outlives the call.
    if unsafe { libc::fstat(fd, &raw mut stat) } < 0 || flags & libc::O_PATH != 0 {
        return refused("it is a path and no open file");
    }
    let stream = Stream {
        read: flags & libc::O_ACCMODE != libc::O_WRONLY,
        write: flags & libc::O_ACCMODE != libc::O_RDONLY,
    };
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFIFO | libc::S_IFCHR => Ok(stream),
        libc::S_IFREG if stream.read && stream.write => {
            refused("a file that is read and written has places, and a stream has none: mount it as a volume")
        }
        libc::S_IFREG => Ok(stream),
        libc::S_IFSOCK if option(fd, libc::SO_ACCEPTCONN) != 0 => refused(
            "connections to a listening socket of the host end there: publish the port, or pass each connection (Accept=yes of systemd's sockets)",
        ),
        libc::S_IFSOCK if option(fd, libc::SO_TYPE) != libc::SOCK_STREAM => refused(
            "a socket of messages has bounds between them, and a stream has none: use a stream socket",
        ),
        libc::S_IFSOCK if getpeername::<SockaddrStorage>(fd).is_err() => {
            refused("a socket of the host without a connection gets none in a VM: connect it first")
        }
        libc::S_IFSOCK => Ok(stream),
        libc::S_IFDIR => refused("a directory is no stream: mount it as a volume"),
        libc::S_IFBLK => refused("a block device has places, and a stream has none"),
        _ => refused("it is an object of the host's kernel and no stream"),
    }
}

/// A socket's option; -1 without it.
fn option(fd: RawFd, name: libc::c_int) -> libc::c_int {
    let (mut value, mut length) = (-1, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: pointers to an int and its size, which outlive the call.
    unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length) };
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        net::TcpListener,
        os::unix::net::{UnixDatagram, UnixStream},
    };

    fn words(fd: &impl AsRawFd) -> String {
        check(fd.as_raw_fd()).unwrap_err().to_string()
    }

    #[test]
    fn streams_are_carried_in_their_direction() {
        let (reads, writes) = nix::unistd::pipe().unwrap();
        assert_eq!(check(reads.as_raw_fd()).unwrap(), Stream { read: true, write: false });
        assert_eq!(check(writes.as_raw_fd()).unwrap(), Stream { read: false, write: true });
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = File::open(file.path()).unwrap();
        assert_eq!(check(read.as_raw_fd()).unwrap(), Stream { read: true, write: false });
        let append = File::options().append(true).open(file.path()).unwrap();
        assert_eq!(check(append.as_raw_fd()).unwrap(), Stream { read: false, write: true });
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(check(ours.as_raw_fd()).unwrap(), Stream { read: true, write: true });
        drop(theirs);
        assert_eq!(check(ours.as_raw_fd()).unwrap(), Stream { read: true, write: true });
    }

    #[test]
    fn what_is_no_stream_is_refused_with_its_number_and_a_reason() {
        let both = tempfile::tempfile().unwrap();
        assert_eq!(
            words(&both),
            format!(
                "open file {} cannot be given to a VM: a file that is read and written has places, and a stream has none: mount it as a volume",
                both.as_raw_fd()
            )
        );
        assert!(words(&TcpListener::bind("127.0.0.1:0").unwrap()).contains("publish the port"));
        assert!(words(&UnixDatagram::unbound().unwrap()).contains("a socket of messages"));
        // SAFETY: a new descriptor that nobody else has.
        let lonely = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)) };
        assert!(words(&lonely).contains("without a connection"));
        assert!(words(&File::open("/").unwrap()).contains("directory"));
        // SAFETY: a new descriptor that nobody else has.
        let counter = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, 0)) };
        assert!(words(&counter).contains("object of the host's kernel"));
        assert!(
            check(9999).unwrap_err().to_string().contains("9999 cannot be given to a VM: it is not open")
        );
    }

    #[test]
    fn the_environment_counts_only_when_it_is_for_this_process() {
        let of = |pid: String, count: &str| {
            let count = count.to_owned();
            listening(move |name| Some(if name == "LISTEN_PID" { pid.clone() } else { count.clone() }))
        };
        let me = std::process::id().to_string();
        assert_eq!((of(me.clone(), "2"), of("1".into(), "2"), of(me, "x")), (2, 0, 0));
        assert!(count(Some("x"), false).is_err() && count(Some("1048577"), false).is_err());
        assert_eq!(count(Some("2"), false).unwrap(), Count { listen: 0, all: 2 });
    }
}
