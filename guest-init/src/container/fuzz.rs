//! For fuzz targets: what init makes of a container's configuration, before anything of it is done.
//!
//! Owns: nothing. Each function is the one that a child or PID 1 calls, or a list of such.

pub use oci_spec::runtime::LinuxResources as Resources;
use oci_spec::runtime::{Process, Spec};

use super::{
    ContainerError, cgroup, child, clocks, device_rules, options, places, scheduling, seccomp, security, user,
};

/// A mount's options: flags, propagation, whether what lies below is copied, the file system's own words.
pub type Mount = (u64, Option<u64>, bool, Vec<String>);

/// Instructions of a system call filter: code, jumps when true and false, value.
pub type Filter = Vec<(u16, u8, u8, u32)>;

/// Those of device rules: code, registers, offset, immediate.
pub type Rules = Vec<(u8, u8, i16, i32)>;

/// As the host sent it: its sources.
///
/// # Errors
/// [`ContainerError`].
pub fn check_places(spec: &serde_json::Value) -> Result<(), ContainerError> {
    places::check(spec)
}

/// The mounts' options.
#[must_use]
pub fn mounts(spec: &Spec) -> Vec<Mount> {
    let sorted = |mount: &oci_spec::runtime::Mount| {
        let options = options::parse(mount.options().as_deref().unwrap_or_default());
        (options.set.bits(), options.propagation.map(|p| p.bits()), options.copy_up, options.data)
    };
    spec.mounts().iter().flatten().map(sorted).collect()
}

/// The system call filter's programs, in the order in which they are installed.
///
/// # Errors
/// [`ContainerError`].
pub fn filters(spec: &Spec) -> Result<Vec<Filter>, ContainerError> {
    let Some(profile) = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()) else {
        return Ok(Vec::new());
    };
    seccomp::flags(profile);
    let programs = seccomp::programs(profile)?;
    Ok(programs.iter().map(|p| p.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect()).collect())
}

/// The device rules' program.
///
/// # Errors
/// [`ContainerError`].
pub fn devices(resources: &Resources) -> Result<Option<Rules>, ContainerError> {
    let rules = device_rules::read(resources.devices().as_deref().unwrap_or_default())?;
    let all = |i: device_rules::Instruction| (i.code, i.registers, i.offset, i.immediate);
    Ok(rules.map(|rules| device_rules::with_defaults(rules).into_iter().map(all).collect()))
}

/// The cgroup's files and what is written to them.
///
/// # Errors
/// [`ContainerError`].
pub fn limits(resources: &Resources) -> Result<Vec<(String, String)>, ContainerError> {
    cgroup::settings(resources, "max 100000\n")
}

/// A configuration's `linux.resources`.
#[must_use]
pub fn resources(spec: &Spec) -> Option<&Resources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// The user namespace's maps, for users and groups; who outside a user is.
#[must_use]
pub fn maps(spec: &Spec) -> Option<[String; 2]> {
    let _ = user::outside(spec, 0);
    user::wanted(spec).then(|| user::mappings(spec).map(user::lines))
}

/// The clocks' offsets.
///
/// # Errors
/// [`ContainerError`].
pub fn clocks(spec: &Spec) -> Result<String, ContainerError> {
    clocks::offsets(spec)
}

/// The files of the kernel's parameters.
///
/// # Errors
/// [`ContainerError`].
pub fn parameters(spec: &Spec) -> Result<Vec<std::path::PathBuf>, ContainerError> {
    let names = spec.linux().iter().flat_map(|l| l.sysctl().iter().flatten());
    names.map(|(name, _)| child::parameter(name)).collect()
}

/// The program's environment; its I/O priority and capabilities are looked at as well.
#[must_use]
pub fn environment(process: &Process) -> Vec<String> {
    let _ = process.io_priority().map(scheduling::io_priority);
    let _ = security::set(process.capabilities().as_ref().and_then(|c| c.bounding().as_ref()));
    child::environment(process, || "/".to_owned())
}

/// The execution domain, and the root's propagation.
///
/// # Errors
/// [`ContainerError`].
pub fn others(spec: &Spec) -> Result<(), ContainerError> {
    let linux = spec.linux().as_ref();
    let _ = linux.and_then(|l| l.rootfs_propagation().as_deref()).and_then(options::propagation);
    linux.and_then(|l| l.personality().as_ref()).map_or(Ok(()), |p| scheduling::domain(p).map(drop))
}

/// A user's home by a container's passwd.
#[must_use]
pub fn home(passwd: &str, uid: u32) -> Option<String> {
    security::home_in(passwd, uid)
}

/// A process of a request.
///
/// # Errors
/// [`ContainerError`].
pub fn process(value: serde_json::Value) -> Result<Process, ContainerError> {
    let invalid =
        |e: serde_json::Error| ContainerError::new(coffer_protocol::ErrorKind::Invalid, e.to_string());
    let process: Process = serde_json::from_value(value).map_err(invalid)?;
    super::check_process(&process)?;
    Ok(process)
}

/// Limits of a request.
#[must_use]
pub fn update(value: serde_json::Value) -> Option<Resources> {
    serde_json::from_value(value).ok()
}
