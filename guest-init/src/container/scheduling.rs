//! How the kernel schedules a process: policy, I/O priority, execution domain (OCI runtime specification, config.md,
//! `process.scheduler` and `process.ioPriority`; config-linux.md, "Personality").
//!
//! Owns: the specification's words as the kernel's numbers, and setting them. Runs in the child while it is still root.

use std::io;

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Process, Scheduler, Spec,
};

use super::ContainerError;
use coffer_protocol::ErrorKind;

/// Numbers of linux/sched.h, linux/sched/types.h, linux/ioprio.h and linux/personality.h.
mod abi {
    /// `struct sched_attr`, its first version.
    #[derive(Debug, Default, PartialEq, Eq)]
    #[repr(C)]
    pub(super) struct SchedAttr {
        pub(super) size: u32,
        pub(super) policy: u32,
        pub(super) flags: u64,
        pub(super) nice: i32,
        pub(super) priority: u32,
        pub(super) runtime: u64,
        pub(super) deadline: u64,
        pub(super) period: u64,
    }
    const _: () = assert!(size_of::<SchedAttr>() == 48);

    pub(super) const ISO: u32 = 4;
    pub(super) const DEADLINE: u32 = 6;
    pub(super) const IOPRIO_WHO_PROCESS: i32 = 1;
    pub(super) const IOPRIO_CLASS_SHIFT: i64 = 13;
    pub(super) const PER_LINUX: u64 = 0;
    pub(super) const PER_LINUX32: u64 = 8;
}

fn attributes(wanted: &Scheduler) -> abi::SchedAttr {
    let policy = match wanted.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER as u32,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO as u32,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR as u32,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH as u32,
        LinuxSchedulerPolicy::SchedIso => abi::ISO,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE as u32,
        LinuxSchedulerPolicy::SchedDeadline => abi::DEADLINE,
    };
    let flags = wanted.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x1,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x2,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x4,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x8,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        }
    });
    abi::SchedAttr {
        size: size_of::<abi::SchedAttr>() as u32,
        policy,
        flags,
        nice: wanted.nice().unwrap_or(0),
        priority: u32::try_from(wanted.priority().unwrap_or(0)).unwrap_or(u32::MAX),
        runtime: wanted.runtime().unwrap_or(0),
        deadline: wanted.deadline().unwrap_or(0),
        period: wanted.period().unwrap_or(0),
    }
}

pub(super) fn io_priority(wanted: LinuxIOPriority) -> Result<i64, ContainerError> {
    if !(0..=7).contains(&wanted.priority()) {
        let message = format!("config.json: process.ioPriority: {} is not 0 to 7", wanted.priority());
        return Err(ContainerError::new(ErrorKind::Invalid, message));
    }
    let class = match wanted.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    Ok(class << abi::IOPRIO_CLASS_SHIFT | wanted.priority())
}

/// Sets what the process asks for.
pub(super) fn apply(process: &Process) -> Result<(), ContainerError> {
    if let Some(wanted) = process.scheduler() {
        let attributes = attributes(wanted);
        // SAFETY: the structure outlives the call and says its own size.
        let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        done(set, &format!("set the scheduler to {}", wanted.policy()))?;
    }
    if let Some(wanted) = *process.io_priority() {
        let value = io_priority(wanted)?;
        // SAFETY: takes numbers only.
        let set = unsafe { libc::syscall(libc::SYS_ioprio_set, abi::IOPRIO_WHO_PROCESS, 0, value) };
        done(set, &format!("set the I/O priority to {} {}", wanted.class(), wanted.priority()))?;
    }
    Ok(())
}

pub(super) fn domain(wanted: &LinuxPersonality) -> Result<u64, ContainerError> {
    if wanted.flags().as_ref().is_some_and(|f| !f.is_empty()) {
        // The specification reserves the field and names no flag.
        let message = "config.json: linux.personality.flags: the specification names none";
        return Err(ContainerError::new(ErrorKind::Invalid, message));
    }
    Ok(match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => abi::PER_LINUX,
        LinuxPersonalityDomain::PerLinux32 => abi::PER_LINUX32,
    })
}

/// Sets the execution domain, which all of a container's processes have.
pub(super) fn personality(spec: &Spec) -> Result<(), ContainerError> {
    let Some(wanted) = spec.linux().as_ref().and_then(|l| l.personality().as_ref()) else { return Ok(()) };
    let domain = domain(wanted)?;
    // SAFETY: takes a number only.
    done(unsafe { libc::syscall(libc::SYS_personality, domain) }, "set the personality")
}

fn done(result: i64, stage: &str) -> Result<(), ContainerError> {
    if result < 0 { Err(ContainerError::guest(stage, io::Error::last_os_error())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_are_the_kernels_numbers() {
        let wanted = json!({ "policy": "SCHED_FIFO", "priority": 10, "flags": ["SCHED_RESET_ON_FORK"] });
        let attributes = attributes(&serde_json::from_value(wanted).unwrap());
        assert_eq!(
            (attributes.size, attributes.policy, attributes.priority, attributes.flags),
            (48, 1, 10, 1)
        );
        let of = |class: &str, priority: i64| {
            let wanted = json!({ "class": class, "priority": priority });
            io_priority(serde_json::from_value(wanted).unwrap()).map_err(|e| e.message)
        };
        assert_eq!(of("IOPRIO_CLASS_BE", 4), Ok(0x4004));
        assert!(of("IOPRIO_CLASS_RT", 8).unwrap_err().contains("ioPriority"));
    }
}
