//! What requests and replies say.
//!
//! Owns: the message types. Does not own: their transport, or the OCI types, which travel as JSON values so that this
//! crate need not depend on them and unknown fields are kept.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{FrameError, ProcessInfo, Stats};

/// First frame of a connection.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Sets the pod up: once, before any container.
    Sandbox(Sandbox),
    /// Applies interfaces, addresses, routes and neighbours, again at each start because they may arrive late. Devices that came since
    /// boot are looked for.
    Network(Network),
    /// Makes a container up to, not including, its first instruction. The connection becomes its process's.
    Create(Box<CreateContainer>),
    /// Lets a created container run.
    Start {
        /// Container.
        id: String,
    },
    /// Runs one more process in a container. The connection becomes its.
    Exec(Box<Exec>),
    /// Sends a signal.
    Signal {
        /// To whom.
        target: SignalTarget,
        /// Linux signal number.
        signal: u32,
    },
    /// Stops every process of a container where it stands (cgroup freezer), or lets them go on.
    Freeze {
        /// Container.
        id: String,
        /// True to stop, false to go on.
        frozen: bool,
    },
    /// Changes the container's cgroup limits: OCI `LinuxResources`.
    Update {
        /// Container.
        id: String,
        /// OCI `LinuxResources` as JSON.
        resources: Value,
    },
    /// Takes the memory that the host has added to the machine, and lets go of what it wants back ([`crate::vm`]). Again: no
    /// effect.
    TakeMemory,
    /// Has so many of the machine's processors work and the others wait; no fewer than one, no more than it has.
    Processors {
        /// How many.
        online: u32,
    },
    /// Lists a container's processes.
    Processes {
        /// Container.
        id: String,
    },
    /// Asks what a container uses.
    Stats {
        /// Container.
        id: String,
    },
    /// Forgets a container that has ended.
    Delete {
        /// Container.
        id: String,
    },
    /// Ends the pod: everything is killed, what it wrote is the host's, the machine powers off.
    Shutdown,
}

/// The pod.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Sandbox {
    /// [`crate::VERSION`] of the host.
    pub version: u32,
    /// Host name of the pod, when the pod has one.
    pub hostname: Option<String>,
    /// Host's wall clock, nanoseconds since 1970.
    pub unix_time_ns: u64,
    /// Network, as far as it is known yet.
    pub network: Network,
    /// Random bytes of the host for a machine that may have been started from a template: its generator's state is then that of
    /// every other. Not for a guest in a TEE, whose host knows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<[u8; 32]>,
    /// The owner's initdata, to the byte: init checks it against what the launch is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initdata: Option<String>,
    /// Addresses of the pod's name servers, as its resolv.conf has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub name_servers: Vec<String>,
    /// The VM has a disk for unpacked images, which the guest encrypts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scratch: bool,
}

/// All interfaces of the pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Network {
    /// In the order of the VMM's net devices.
    pub interfaces: Vec<Interface>,
    /// Routes, in the order to apply.
    pub routes: Vec<Route>,
    /// Whose addresses are known without asking the link.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub neighbours: Vec<Neighbour>,
}

/// One interface.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Interface {
    /// Name to give it, such as `eth0`.
    pub name: String,
    /// MAC address `xx:xx:xx:xx:xx:xx` by which the guest finds the device.
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// `address/prefix`, IPv4 and IPv6.
    pub addresses: Vec<String>,
}

/// One route.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Route {
    /// Interface name.
    pub interface: String,
    /// `address/prefix`, or `None` for the default route.
    pub destination: Option<String>,
    /// Gateway address, which may be of the other family, or `None` for what is on the link.
    pub gateway: Option<String>,
    /// Preferred source address.
    pub source: Option<String>,
    /// Metric.
    pub metric: Option<u32>,
    /// True when this is a route of the IPv6 table although neither address says so.
    pub ipv6: bool,
    /// The gateway is on the link although no route leads to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub on_link: bool,
}

/// A permanent entry of the neighbour table.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Neighbour {
    /// Interface name.
    pub interface: String,
    /// IPv4 or IPv6.
    pub address: String,
    /// MAC address `xx:xx:xx:xx:xx:xx`.
    pub mac: String,
}

/// A container to make.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct CreateContainer {
    /// Container id, checked against the runtime's rules by the host and again by init.
    pub id: String,
    /// OCI configuration, rewritten into guest terms: `root.path` and sources of bind mounts are guest paths, host
    /// namespaces, cgroup path and host hooks are gone.
    pub spec: Value,
    /// Window size to start with, for a terminal.
    pub window: Option<WindowSize>,
    /// Which mounts of `spec` are files or directories of the share.
    pub binds: Vec<BindSource>,
    /// Namespaces that are another container's of this pod.
    pub shared: Vec<SharedNamespace>,
    /// The image that the root file system and the process come from, in place of what `spec` says of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSource>,
    /// Path in the container of the socket to which its processes send notifications (sd_notify(3)). `spec` has a file system
    /// of the guest's own for it, and says so in the environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify: Option<String>,
    /// Descriptors of the process from 3 on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<Stream>,
}

/// A further descriptor of a process: bytes that its stub relays to and from an open file of the host. At most
/// [`crate::MAX_STREAMS`]; the first has number 0 in frames and is the process's descriptor 3.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Stream {
    /// The process may read it. Neither this nor `write`: its number is not open, and those after it are.
    pub read: bool,
    /// The process may write it.
    pub write: bool,
}

/// A namespace of another container.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct SharedNamespace {
    /// Which.
    pub kind: NamespaceKind,
    /// Whose.
    pub container: String,
}

/// Namespaces that containers of a pod may share beside the network, which all of them do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the kernel's own names")]
pub enum NamespaceKind {
    Pid,
    Ipc,
    Uts,
}

/// An image whose blobs the host shows.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct ImageSource {
    /// Guest path of a directory with blobs by digest, as `blobs` of an OCI layout.
    pub blobs: String,
    /// Digest of its manifest or index.
    pub digest: String,
    /// What it is called in a registry, for the owner's signature policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Digests of manifests that list signatures of it, among the blobs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signatures: Vec<String>,
    /// Its OpenPGP signatures (simple signing) themselves, in base64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub simple_signatures: Vec<String>,
}

/// A bind mount's source as the host sees it: init must know whether to make a file or a directory to mount on.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct BindSource {
    /// Index in the spec's `mounts`.
    pub mount: usize,
    /// True for a directory.
    pub directory: bool,
}

/// A process to add to a container.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Exec {
    /// Container.
    pub id: String,
    /// A cgroup below the container's, as a path that starts there; none: the container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// Names the process within the container.
    pub exec_id: String,
    /// OCI `process` as JSON.
    pub process: Value,
    /// Window size to start with, for a terminal.
    pub window: Option<WindowSize>,
    /// As in [`CreateContainer`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<Stream>,
}

/// Whom a signal is for.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum SignalTarget {
    /// The container's first process.
    Init(String),
    /// Every process of the container.
    All(String),
}

/// Size of a terminal, in cells.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Done; for create and exec: the process exists.
    Done,
    /// Begun, by [`Request::Freeze`]: some process has not stopped yet. Who asks again hears whether it has.
    Stopping,
    /// Process ids in the guest.
    Processes {
        /// What is known of them.
        list: Vec<ProcessInfo>,
    },
    /// What a container uses.
    Stats(Box<Stats>),
    /// Not done.
    Failed {
        /// What kind of failure, for the caller's exit code.
        kind: ErrorKind,
        /// One line: stage, object, remedy.
        message: String,
    },
}

/// Kinds of failure that callers tell apart.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The program, or the directory that it is to be in, is not there: exit code 127 from podman.
    NotFound,
    /// The program cannot be executed: exit code 126 from podman.
    NotExecutable,
    /// No such container in this guest.
    NoContainer,
    /// The container's state does not allow it.
    WrongState,
    /// The request itself is wrong.
    Invalid,
    /// Something failed in the guest.
    Guest,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub struct Ended {
    /// Its own end.
    pub exit: Exit,
    /// Said of a container's first process: how many processes of the container the kernel has killed for want of memory, not necessarily
    /// this one.
    pub oom_kills: u64,
}

/// What a parent is told of a process's end.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// It exited with this code.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl Exit {
    /// The code that runc and a shell give: the exit code, or 128 and the signal.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128u8.wrapping_add(signal),
        }
    }
}

impl From<Exit> for Ended {
    /// With memory enough.
    fn from(exit: Exit) -> Self {
        Self { exit, oom_kills: 0 }
    }
}

macro_rules! json_payload {
    ($($type:ty),*) => {$(
        impl $type {
            /// JSON for a frame's payload.
            #[must_use]
            pub fn to_payload(&self) -> Vec<u8> {
                serde_json::to_vec(self).expect("plain data always serialises")
            }

            /// Reads a frame's payload.
            ///
            /// # Errors
            /// [`FrameError::Payload`] when it is not this message.
            pub fn from_payload(payload: &[u8]) -> Result<Self, FrameError> {
                read(payload)
            }
        }
    )*};
}

json_payload!(Request, Reply, WindowSize, Ended);

fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(payload).map_err(|e| FrameError::Payload(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_reads_back_as_itself() {
        let request = Request::Signal { target: SignalTarget::All("a".into()), signal: 9 };
        assert_eq!(Request::from_payload(&request.to_payload()), Ok(request));
    }

    #[test]
    fn exit_codes_are_a_shells() {
        assert_eq!(Exit::Code(42).code(), 42);
        assert_eq!(Exit::Signal(15).code(), 143);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::from_payload(&bytes);
            let _ = Reply::from_payload(&bytes);
            let _ = Ended::from_payload(&bytes);
        }
    }
}
