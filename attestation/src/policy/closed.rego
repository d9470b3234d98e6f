# Under a TEE and without a policy of the owner: an image that the guest verified may run; the host may not look in.
package agent_policy

import rego.v1

CreateSandboxRequest := true

UpdateInterfaceRequest := true

default CreateContainerRequest := false

CreateContainerRequest if {
	input.host_root == false
	count(foreign_mounts) == 0
	count(misplaced) == 0
	count(parameters) == 0
	input.OCI.Linux.Devices == []
	every _, set in input.OCI.Process.Capabilities { is_array(set) }
	count(foreign_capabilities) == 0
	has_processes_to_itself
	"mount" in input.OCI.Linux.Namespaces
	every path in masked { path in input.OCI.Linux.MaskedPaths }
	every path in read_only { path in input.OCI.Linux.ReadonlyPaths }
}

# The most that podman, Docker, containerd and CRI-O give by themselves.
capabilities := [
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
]

foreign_capabilities contains capability if {
	some _, set in input.OCI.Process.Capabilities
	some capability in set
	not capability in capabilities
}

# Or shares those of another container of the pod. With neither it would be among the guest's own.
has_processes_to_itself if "pid" in input.OCI.Linux.Namespaces

has_processes_to_itself if "pid" in input.OCI.Linux.Shared

# What an engine mounts into every container, and whose content the host may decide.
engine_files := ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/termination-log"]

foreign_mounts contains mount if {
	some mount in input.OCI.Mounts
	mount.from_host
	not is_engine_file(mount)
}

# A bind: a file system of another type would be the host's disk, for the guest's kernel to read.
is_engine_file(mount) if {
	mount.destination in engine_files
	mount.type_ in [null, "bind", "none"]
}

# Where engines mount the kernel's own. Anywhere else they would hide a part of the image.
kernels_places := {
	"/proc": ["proc"], "/sys": ["sysfs"], "/sys/fs/cgroup": ["cgroup", "cgroup2"], "/dev": ["tmpfs", "devtmpfs"], "/dev/pts": ["devpts"],
	"/dev/mqueue": ["mqueue"], "/dev/shm": ["tmpfs"], "/run": ["tmpfs"], "/run/lock": ["tmpfs"], "/run/notify": ["tmpfs"],
	"/tmp": ["tmpfs"], "/var/tmp": ["tmpfs"], "/var/log/journal": ["tmpfs"],
}

misplaced contains mount if {
	some mount in input.OCI.Mounts
	not mount.from_host
	not in_place(mount)
}

in_place(mount) if mount.type_ in kernels_places[mount.destination]

# Those that Kubernetes calls safe. Others are the whole machine's, name a program (kernel.core_pattern), or let the host's packets reach
# what listens on 127.0.0.1 (net.ipv4.conf.all.route_localnet).
safe_parameters := [
	"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_unprivileged_port_start",
	"net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes",
	"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_syncookies",
]

parameters contains name if {
	some name, _ in input.OCI.Linux.Sysctl
	not name in safe_parameters
}

StartContainerRequest := true

ExecProcessRequest := false

WriteStreamRequest := false

ReadStreamRequest := true

PauseContainerRequest := true

UpdateContainerRequest := true

ListProcessesRequest := true

ListCommandLinesRequest := false

StatsContainerRequest := true

RemoveContainerRequest := true

DestroySandboxRequest := true

reasons contains {"field": "host_root", "value": true, "allowed": false} if input.host_root

reasons contains {"field": "OCI.Mounts", "value": mount, "allowed": engine_files} if some mount in foreign_mounts

reasons contains {"field": "OCI.Mounts", "value": mount, "allowed": kernels_places} if some mount in misplaced

reasons contains {"field": "OCI.Linux.Sysctl", "value": name, "allowed": safe_parameters} if some name in parameters

reasons contains {"field": "OCI.Linux.Devices", "value": input.OCI.Linux.Devices, "allowed": []} if input.OCI.Linux.Devices != []

reasons contains {"field": "OCI.Process.Capabilities", "value": capability, "allowed": capabilities} if some capability in foreign_capabilities

reasons contains {"field": "OCI.Linux.Namespaces", "value": input.OCI.Linux.Namespaces, "allowed": ["pid", "mount"]} if {
	not has_processes_to_itself
	input.OCI.Linux
}

reasons contains {"field": "OCI.Linux.Namespaces", "value": input.OCI.Linux.Namespaces, "allowed": ["pid", "mount"]} if {
	input.OCI.Linux
	not "mount" in input.OCI.Linux.Namespaces
}

reasons contains {"field": "OCI.Linux.MaskedPaths", "value": input.OCI.Linux.MaskedPaths, "allowed": masked} if {
	some path in masked
	not path in input.OCI.Linux.MaskedPaths
}

reasons contains {"field": "OCI.Linux.ReadonlyPaths", "value": input.OCI.Linux.ReadonlyPaths, "allowed": read_only} if {
	some path in read_only
	not path in input.OCI.Linux.ReadonlyPaths
}

reasons contains {"field": "process.Args", "value": input.process.Args, "allowed": []} if input.process

reasons contains {"field": "stdin", "value": true, "allowed": false} if input.stdin
