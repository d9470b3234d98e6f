# Under a TEE and without a policy of the owner: an image that the guest verified may run; the host may not look in.
package agent_policy

import rego.v1

CreateSandboxRequest := true

UpdateInterfaceRequest := true

default CreateContainerRequest := false

CreateContainerRequest if {
	input.host_root == false
	count(foreign_mounts) == 0
}

# What an engine mounts into every container, and whose content the host may decide.
engine_files := ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/shm", "/dev/termination-log"]

foreign_mounts contains mount if {
	some mount in input.OCI.Mounts
	mount.from_host
	not mount.destination in engine_files
}

StartContainerRequest := true

ExecProcessRequest := false

SignalProcessRequest := true

WriteStreamRequest := false

ReadStreamRequest := true

PauseContainerRequest := true

UpdateContainerRequest := true

ListProcessesRequest := true

StatsContainerRequest := true

RemoveContainerRequest := true

DestroySandboxRequest := true

reasons contains {"field": "host_root", "value": true, "allowed": false} if input.host_root

reasons contains {"field": "OCI.Mounts", "value": mount, "allowed": engine_files} if some mount in foreign_mounts

reasons contains {"field": "process.Args", "value": input.process.Args, "allowed": []} if input.process

reasons contains {"field": "stdin", "value": true, "allowed": false} if input.stdin
