//! The stages of a start, in words.

/// As [`work_before`], where the stage before is known too: a VMM that `coffer` starts is not there by an exec alone, and not every guest has a shim.
#[must_use]
pub fn work_between<'a>(before: Option<&str>, stage: &'a str) -> (&'a str, &'static str) {
    match (before, stage) {
        (Some("create-entry"), "process-entry") => ("plan the pod, start the VMM", "coffer"),
        (Some("create-entry"), "shell-taken") => ("plan the pod, take a shell", "coffer"),
        // A guest without a shim.
        (Some("first-run"), "kernel-entry") => work_before("shim-entry"),
        _ => work_before(stage),
    }
}

/// What is done until a stage of the VMM's trace is reached, and by whom. A stage that is not known has its own name.
#[must_use]
pub fn work_before(stage: &str) -> (&str, &'static str) {
    match stage {
        "create-entry" => ("exec", "coffer"),
        "process-entry" => ("exec", "coffer-vmm"),
        "shell-taken" => ("take a shell", "coffer"),
        "image-planned" => ("join the pod, plan the launch", "coffer-vmm"),
        "image-checked" => ("read and check the image", "coffer-vmm"),
        "vm-created" => ("make the VM", "coffer-vmm"),
        "memory-loaded" => ("map memory, load the image", "coffer-vmm"),
        "vcpus-set" => ("make processors", "coffer-vmm"),
        "devices-made" => ("make devices", "coffer-vmm"),
        "first-run" => ("start threads", "coffer-vmm"),
        "shim-entry" => ("first entry into the guest", "coffer-vmm"),
        "kernel-entry" => ("shim", "shim"),
        "init-entry" => ("kernel", "kernel"),
        "init-ready" => ("init: mounts, network, vsock", "init"),
        "container-created" => ("wait for create; make it", "container"),
        "container-started" => ("wait for start; let it go", "container"),
        "orderly-end" => ("the container runs", "container"),
        "ended" => ("the VM ends", "coffer-vmm"),
        other => (other, "other"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_without_shim_is_only_entered() {
        assert_eq!(work_between(Some("first-run"), "kernel-entry").0, "first entry into the guest");
        assert_eq!(work_between(Some("shim-entry"), "kernel-entry").0, "shim");
    }
}
